//! Proofs of who may open which content: `access/<hash of repository or host>/<name>.json`.
//!
//! Each kind of record has a file below this one, which has its name ([`AccessRecord`]).
//!
//! A manifest that one has been proven to read may name any digest. So that
//! no pod gets another's cached blob by naming it in a manifest of its own, a
//! blob of the store takes part in a tree of a repository only after it has been
//! had from there: fetched, or, where the same registry host has sent it before,
//! given by it for this repository.
//!
//! A proof says who gave it, the registry itself or which of its mirrors
//! ([`ProofSource`]). A mirror's counts as long as the mirror is configured, and
//! is removed at the first look after that. Records of before this was kept say
//! nothing of it and count as the registry's own, until they are renewed.

pub mod access_proofs;
pub mod anonymous_refusals;
pub mod blob_origins;
pub mod imported_manifests;
pub mod verified_signatures;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::folder_listing::names;
use super::record_sweep::{Sweep, SweptRecords, all_but_newest};
use super::state_directory::StateDirectory;
use super::{durable_rename, json_records, object_keys};
use oci_types::{Digest, Repository};

/// Below the state directory.
pub(super) const FOLDER: &str = "access";
/// All kinds of records in the folder.
const KINDS: &[&[AccessRecord]] = &[
    access_proofs::KINDS,
    blob_origins::KINDS,
    imported_manifests::KINDS,
    anonymous_refusals::KINDS,
    verified_signatures::KINDS,
];
/// Longer than any pull that is still wanted goes on between two of its records.
const AGE: Duration = Duration::from_hours(24);
/// Records that are kept for one manifest of one repository, at most.
const MOST_OF_A_MANIFEST: usize = 1024;
/// A record is written again when it is older than this, so that it is young to [`sweep`](super::record_sweep).
const REFRESH_SECONDS: i64 = 12 * 3600;

/// Names the registry itself in a proof; no mirror's address looks like it.
const REGISTRY: &str = "registry";
/// Stands before the address of a mirror that was shown no credential.
const ANONYMOUS: &str = "anonymous ";

/// The source of a proof.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProofSource {
    /// The registry itself, or the administrator.
    Registry,
    /// A mirror of the registry.
    Mirror {
        /// The address of the mirror.
        address: Arc<str>,
        /// True if it was shown no credential: then it is not known whom the registry would refuse.
        is_anonymous: bool,
    },
}

/// The sources whose proofs count for a repository: its registry, and some of the mirrors.
#[derive(Clone, Debug)]
pub struct RepositorySources {
    /// Repository of the pull.
    pub repository: Repository,
    /// The addresses of the mirrors that are configured; none where the configuration cannot be read.
    /// Then those of all mirrors count: none is known to have gone.
    pub mirrors: Option<Vec<Arc<str>>>,
    /// True if the registry itself refuses the repository to an anonymous request. Then what a mirror
    /// gives without a credential says nothing of who may read it.
    pub is_private: bool,
}

/// A kind of records in the folder.
pub(super) struct AccessRecord {
    /// Begins the file names; the digest of the subject follows.
    prefix: &'static str,
    subject: RecordSubject,
}

/// The subject of a record: the record is kept as long as the subject is in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RecordSubject {
    Manifest,
    Tree,
    Blob,
    /// The record has no digest in its name, and goes with the last of the others.
    Repository,
}

/// The folder `access`.
pub(super) struct AccessFolder {
    directory: Arc<StateDirectory>,
    /// Orders the changes of records: one that is being renewed is not swept, and its folder stays.
    /// It protects files, which are whole at any time.
    lock: Mutex<()>,
}

/// A proof's file.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Proof {
    /// When it was last written.
    #[serde(default)]
    unix_seconds: i64,
    /// The sources that gave it, with the time of each. Empty in records of earlier versions.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    by: BTreeMap<String, i64>,
    /// The signers of a verified signature, as text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    signed_by: Vec<String>,
}

impl ProofSource {
    fn name(&self) -> String {
        match self {
            Self::Registry => REGISTRY.to_owned(),
            Self::Mirror { address, is_anonymous: false } => String::from(&**address),
            Self::Mirror { address, is_anonymous: true } => format!("{ANONYMOUS}{address}"),
        }
    }

    fn named(name: &str) -> Self {
        if name == REGISTRY {
            return Self::Registry;
        }
        let anonymous = name.strip_prefix(ANONYMOUS);
        let address = anonymous.unwrap_or(name).into();
        Self::Mirror { address, is_anonymous: anonymous.is_some() }
    }
}

impl RepositorySources {
    /// Returns whether proofs of a source count.
    fn counts(&self, source: &str) -> bool {
        match ProofSource::named(source) {
            ProofSource::Registry => true,
            ProofSource::Mirror { is_anonymous: true, .. } if self.is_private => false,
            ProofSource::Mirror { address, .. } => {
                self.mirrors.as_ref().is_none_or(|configured| configured.contains(&address))
            }
        }
    }
}

impl Proof {
    /// Returns when a source whose proofs count last gave it; one is enough.
    fn given(&self, of: &RepositorySources) -> Option<i64> {
        if self.by.is_empty() {
            return Some(self.unix_seconds);
        }
        let counting = self.by.iter().filter(|(source, _)| of.counts(source));
        counting.map(|(_, seconds)| *seconds).max()
    }

    /// Returns whether the proofs of all its sources count.
    fn is_given_by_all(&self, of: &RepositorySources) -> bool {
        self.by.keys().all(|source| of.counts(source))
    }

    /// Returns a source whose proofs count; the registry before any mirror.
    fn source(&self, of: &RepositorySources) -> Option<ProofSource> {
        if self.by.is_empty() || self.by.contains_key(REGISTRY) {
            return Some(ProofSource::Registry);
        }
        let mut counting = self.by.keys().filter(|source| of.counts(source));
        counting.next().map(|source| ProofSource::named(source))
    }
}

impl AccessRecord {
    const fn new(prefix: &'static str, subject: RecordSubject) -> Self {
        Self { prefix, subject }
    }

    /// Returns the name of a record without its extension.
    fn name(&self, subject: Digest) -> String {
        format!("{}{}", self.prefix, subject.hex())
    }
}

impl AccessFolder {
    pub(super) fn new(directory: Arc<StateDirectory>) -> Self {
        Self { directory, lock: Mutex::default() }
    }

    /// Returns the path of a record of a repository or host.
    fn path(&self, place: &str, name: &str) -> PathBuf {
        let folder = object_keys::hash(&[place]).hex();
        self.directory.path(FOLDER).join(folder).join(format!("{name}.json"))
    }

    /// Remembers that it is so.
    fn put(&self, path: &Path) -> Result<(), StoreError> {
        self.put_signed(path, Vec::new())
    }

    /// Remembers that it is so, and who signed.
    fn put_signed(&self, path: &Path, signed_by: Vec<String>) -> Result<(), StoreError> {
        let now = jiff::Timestamp::now().as_second();
        let _turn = self.lock.lock();
        let known: Option<Proof> = json_records::read(path);
        if known.is_some_and(|proof| (0..REFRESH_SECONDS).contains(&(now - proof.unix_seconds))) {
            return Ok(());
        }
        self.write_proof(path, &Proof { unix_seconds: now, signed_by, ..Proof::default() })
    }

    /// Reads what a proof says; one without a source that counts is forgotten.
    fn read<T>(&self, path: &Path, says: impl Fn(&Proof) -> Option<T>) -> Option<T> {
        let says = |path| says(&json_records::read::<Proof>(path)?);
        if let Some(said) = says(path) {
            return Some(said);
        }
        if path.exists() {
            let _turn = self.lock.lock();
            // It may have been given meanwhile.
            if let Some(said) = says(path) {
                return Some(said);
            }
            // It is not believed either way; one that resists is looked at again.
            if let Err(error) = self.remove(path) {
                tracing::debug!(%error, "a proof that does not count stays");
            }
        }
        None
    }

    /// Writes a proof that one gave, beside what others gave, unless it says so for less than `age`.
    fn put_given(&self, path: &Path, by: &ProofSource, age: i64) -> Result<(), StoreError> {
        let now = jiff::Timestamp::now().as_second();
        let _turn = self.lock.lock();
        // Of one that does not say who gave it nothing stays: now it is renewed.
        let known = json_records::read::<Proof>(path).map(|proof| proof.by).unwrap_or_default();
        let given = known.get(&by.name());
        if given.is_some_and(|seconds| (0..age).contains(&(now - seconds))) {
            return Ok(());
        }
        let mut all = known;
        all.insert(by.name(), now);
        self.write_proof(path, &Proof { unix_seconds: now, by: all, ..Proof::default() })
    }

    /// The caller holds the lock.
    fn write_proof(&self, path: &Path, proof: &Proof) -> Result<(), StoreError> {
        if let Some(folder) = path.parent()
            && durable_rename::create_folder(folder)?
        {
            self.directory.count_record();
        }
        let is_new = path.symlink_metadata().is_err();
        // Losing one in a power cut costs a request, so none of them is worth a sync.
        json_records::write_hint(&self.directory.staging(), path, proof)?;
        if is_new {
            self.directory.count_record();
        }
        Ok(())
    }

    /// Removes a proof. The caller holds the lock.
    fn remove(&self, path: &Path) -> Result<bool, StoreError> {
        let removed = json_records::remove_if_there(path)?;
        if removed {
            self.directory.uncount_record();
        }
        Ok(removed)
    }

    /// Removes a record if it is old. One that is being renewed at this moment is not.
    fn remove_old(&self, path: &Path, sweep: &Sweep<'_>) -> Result<bool, StoreError> {
        let _turn = self.lock.lock();
        if !sweep.is_old(path, AGE) {
            return Ok(false);
        }
        self.remove(path)
    }

    /// Sweeps the records of one repository or host, but keeps those of manifests and trees that are
    /// here. Where a blob came from that no manifest names stays known only while it is young: asking
    /// again costs one request.
    fn sweep_place(
        &self,
        place: &Path,
        origins: &HashSet<Digest>,
        sweep: &Sweep<'_>,
    ) -> Result<usize, StoreError> {
        let trees = self.directory.path("trees");
        let (mut swept, mut is_used, mut of_repository) = (0, false, Vec::new());
        let mut by_manifest = HashMap::<_, Vec<PathBuf>>::new();
        for name in names(place)? {
            let path = place.join(&name);
            let needed = match subject_of(&name) {
                Some((RecordSubject::Manifest, Some(manifest))) => {
                    by_manifest.entry(manifest).or_default().push(path.clone());
                    sweep.manifests.contains(&manifest)
                }
                Some((RecordSubject::Tree, Some(tree))) => trees.join(tree.hex()).exists(),
                Some((RecordSubject::Blob, Some(blob))) => origins.contains(&blob),
                Some(_) => {
                    of_repository.push(path);
                    continue;
                }
                // It was not made here.
                None => true,
            };
            if needed || !self.remove_old(&path, sweep)? {
                is_used = true;
            } else {
                swept += 1;
            }
        }
        let surplus = by_manifest.into_values();
        let mut old: Vec<_> =
            surplus.flat_map(|paths| all_but_newest(paths, MOST_OF_A_MANIFEST)).collect();
        if !is_used {
            old.append(&mut of_repository);
        }
        for path in old {
            swept += usize::from(self.remove_old(&path, sweep)?);
        }
        let _turn = self.lock.lock();
        // Empty ones go; the others refuse.
        if fs::remove_dir(place).is_ok() {
            self.directory.uncount_record();
            swept += 1;
        }
        Ok(swept)
    }
}

impl SweptRecords for AccessFolder {
    fn load(&self) -> Result<usize, StoreError> {
        let mut count = 0;
        let access = self.directory.path(FOLDER);
        for place in names(&access)? {
            let place = access.join(place);
            if !place.is_symlink() {
                count += 1 + names(&place)?.len();
            }
        }
        Ok(count)
    }

    fn sweep(&self, sweep: &mut Sweep<'_>) -> Result<usize, StoreError> {
        let access = self.directory.path(FOLDER);
        let origins = sweep.origins();
        let mut swept = 0;
        for place in names(&access)? {
            let place = access.join(place);
            // The store makes no symbolic links here: the target of one is foreign.
            if !place.is_symlink() {
                swept += self.sweep_place(&place, &origins, sweep)?;
            }
        }
        Ok(swept)
    }
}

/// Returns the subject of a record with its digest; none for a name of another form.
fn subject_of(name: &str) -> Option<(RecordSubject, Option<Digest>)> {
    KINDS.iter().copied().flatten().find_map(|kind| {
        let rest = name.strip_prefix(kind.prefix)?;
        match kind.subject {
            RecordSubject::Repository => (rest == ".json").then_some((kind.subject, None)),
            subject => Some((subject, Some(Digest::from_hex(rest.get(..64)?)?))),
        }
    })
}
