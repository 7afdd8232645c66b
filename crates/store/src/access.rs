//! Who has been proven to open what.
//!
//! ```text
//! access/<hash of repository>/m-<manifest>-<principal>.json   this principal may read this manifest
//! access/<hash of repository>/a-<manifest>-<account>.json     ... when somebody of this account last did
//! access/<hash of repository>/i-<manifest>.json               the administrator imported this manifest
//! access/<hash of repository>/t-<tree>.json                   every blob of this tree came from here
//! access/<hash of repository>/b-<blob>.json                   this blob came from this repository
//! access/<hash of repository>/refuses-anonymous.json          the registry refuses it to who shows nothing
//! access/<hash of host>/b-<blob>.json                         ... or from another one of its host
//! ```
//!
//! A manifest that one has been proven to read may name any digest. So that
//! nobody gets another's cached blob by naming it in a manifest of his own, a
//! blob of the store takes part in a tree of a repository only after it has been
//! had from there: fetched, or, where the same registry host has sent it before,
//! given by it for this repository.
//!
//! A proof says who gave it, the registry itself or which of its mirrors
//! ([`ProofSource`]). A mirror's counts as long as the mirror is configured, and
//! is removed at the first look after that. Records of before this was kept say
//! nothing of it and count as the registry's own, until they are renewed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::eviction::Goal;
use super::{Store, TreeKey, keys, records};
use oci_types::{Digest, Repository};

/// Whom a proof is for: a text that is safe as a part of a file name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Principal(String);

/// A proof of an account is written again when it is older than this: nobody counts it in minutes.
const RENEWAL_SECONDS: i64 = 60;
/// Any other is written again when it is older than this, so that it is young to [`super::sweep`].
const REFRESH_SECONDS: i64 = 12 * 3600;

/// Names the registry itself in a proof; no mirror's address looks like it.
const REGISTRY: &str = "registry";
/// Stands before the address of a mirror that was shown no credential.
const ANONYMOUS: &str = "anonymous ";

/// Who gave a proof.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProofSource {
    /// The registry itself, or the administrator.
    Registry,
    /// A mirror.
    Mirror {
        /// Its address.
        address: Arc<str>,
        /// Whether it was shown no credential: then it is not known whom the registry would refuse.
        is_anonymous: bool,
    },
}

/// The mirrors of a repository's registry whose proofs count.
#[derive(Clone, Debug)]
pub struct Mirrors {
    configured: Option<Vec<Arc<str>>>,
    /// Whether the registry itself refuses the repository to an anonymous request.
    is_private: bool,
}

/// Orders the changes of records: one that is being renewed is not swept, and its folder stays.
#[derive(Debug, Default)]
pub(super) struct ProofLock(Mutex<()>);

/// A proof's file.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Proof {
    /// When it was last written.
    #[serde(default)]
    unix_seconds: i64,
    /// Who gave it, and when. Empty in records of before this was kept.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    by: BTreeMap<String, i64>,
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

impl Mirrors {
    /// The addresses of those that are configured; none where the configuration cannot be read.
    /// Then those of all mirrors count: none is known to have gone.
    ///
    /// Of a private repository, which the registry refuses to an anonymous request, what a mirror
    /// gives without a credential says nothing of who may read it.
    #[must_use]
    pub const fn new(configured: Option<Vec<Arc<str>>>, is_private: bool) -> Self {
        Self { configured, is_private }
    }

    /// Whether what a source has given counts.
    fn counts(&self, source: &str) -> bool {
        match ProofSource::named(source) {
            ProofSource::Registry => true,
            ProofSource::Mirror { is_anonymous: true, .. } if self.is_private => false,
            ProofSource::Mirror { address, .. } => {
                self.configured.as_ref().is_none_or(|configured| configured.contains(&address))
            }
        }
    }
}

impl ProofLock {
    pub(super) fn hold(&self) -> MutexGuard<'_, ()> {
        // It protects files, which are whole at any time.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Proof {
    /// When somebody whose proofs count last gave it; one is enough.
    fn given(&self, mirrors: &Mirrors) -> Option<i64> {
        if self.by.is_empty() {
            return Some(self.unix_seconds);
        }
        let counting = self.by.iter().filter(|(source, _)| mirrors.counts(source));
        counting.map(|(_, seconds)| *seconds).max()
    }

    /// Whether all that gave a part of it count.
    fn is_given_by_all(&self, mirrors: &Mirrors) -> bool {
        self.by.keys().all(|source| mirrors.counts(source))
    }

    /// Who gave it, of those that count; the registry before any mirror.
    fn source(&self, mirrors: &Mirrors) -> Option<ProofSource> {
        if self.by.is_empty() || self.by.contains_key(REGISTRY) {
            return Some(ProofSource::Registry);
        }
        let mut counting = self.by.keys().filter(|source| mirrors.counts(source));
        counting.next().map(|source| ProofSource::named(source))
    }
}

impl Principal {
    /// Anybody at all.
    #[must_use]
    pub fn anonymous() -> Self {
        Self("anonymous".into())
    }

    /// The node's own credentials, which any pod could use.
    #[must_use]
    pub fn node() -> Self {
        Self("node".into())
    }

    /// A credential for a host, remembered as an HMAC under the node's key: the
    /// secret itself is never written, and the file is worth nothing elsewhere.
    #[must_use]
    pub fn credential(node_key: &[u8; 32], host: &str, material: &[u8]) -> Self {
        Self(keyed(node_key, host, material))
    }

    /// A service account of a namespace, for which a credential provider made a credential.
    #[must_use]
    pub fn service_account(node_key: &[u8; 32], namespace: &str, name: &str) -> Self {
        // No host looks like this, so no credential's name does either.
        Self(keyed(node_key, &format!("/service-account/{namespace}"), name.as_bytes()))
    }
}

/// HMAC under the node's key, of a context and what is hidden in it.
fn keyed(node_key: &[u8; 32], context: &str, material: &[u8]) -> String {
    use hmac::{KeyInit as _, Mac as _};
    // Any length is a key for HMAC, so this cannot fail; without a key nothing would ever be proven.
    let Ok(mut mac) = hmac::Hmac::<sha2::Sha256>::new_from_slice(node_key) else {
        return "none".into();
    };
    mac.update(&(context.len() as u64).to_le_bytes());
    mac.update(context.as_bytes());
    mac.update(material);
    let tag: [u8; 32] = mac.finalize().into_bytes().into();
    Digest::from_bytes(tag).hex()
}

impl Store {
    /// Whether the principal has been proven to read the manifest.
    #[must_use]
    pub fn is_proven(
        &self,
        repository: &Repository,
        manifest: Digest,
        who: &Principal,
        mirrors: &Mirrors,
    ) -> bool {
        let path = self.proof_path(repository, manifest, who);
        self.read_proof(&path, |proof| proof.given(mirrors)).is_some()
    }

    /// Remembers a proof.
    pub fn put_proof(
        &self,
        repository: &Repository,
        manifest: Digest,
        who: &Principal,
        by: &ProofSource,
    ) -> Result<(), StoreError> {
        self.put_given(&self.proof_path(repository, manifest, who), by, REFRESH_SECONDS)
    }

    /// Whether somebody of the account has been proven to read the manifest within `age`.
    #[must_use]
    pub fn is_proven_for_account(
        &self,
        repository: &Repository,
        manifest: Digest,
        (account, age): (&Principal, Duration),
        mirrors: &Mirrors,
    ) -> bool {
        let path = self.account_path(repository, manifest, account);
        let given = self.read_proof(&path, |proof| proof.given(mirrors));
        let Some(unix_seconds) = given else { return false };
        let seconds = jiff::Timestamp::now().as_second().saturating_sub(unix_seconds);
        // A clock that was set back makes a proof of the future, which says nothing.
        u64::try_from(seconds).is_ok_and(|seconds| seconds <= age.as_secs())
    }

    /// Remembers that somebody of the account has just been proven to read the manifest.
    pub fn put_account_proof(
        &self,
        repository: &Repository,
        manifest: Digest,
        account: &Principal,
        by: &ProofSource,
    ) -> Result<(), StoreError> {
        self.put_given(&self.account_path(repository, manifest, account), by, RENEWAL_SECONDS)
    }

    /// Whether the registry itself has refused the repository to an anonymous request since it last
    /// answered one.
    #[must_use]
    pub fn refuses_anonymous(&self, repository: &Repository) -> bool {
        self.refusal_path(repository).exists()
    }

    /// Remembers whether the registry itself refuses the repository to an anonymous request.
    pub fn put_refuses_anonymous(
        &self,
        repository: &Repository,
        refuses: bool,
    ) -> Result<(), StoreError> {
        let path = self.refusal_path(repository);
        if refuses {
            return self.put_access(&path);
        }
        let _turn = self.proofs().hold();
        self.remove_proof(&path).map(|_| ())
    }

    /// Whether the administrator has imported the manifest as one of the repository.
    #[must_use]
    pub fn is_imported(&self, repository: &Repository, manifest: Digest) -> bool {
        self.imported_path(repository, manifest).exists()
    }

    /// Remembers that the administrator has imported the manifest as one of the repository: its
    /// content counts as preloaded. Whoever imports also says where each blob came from
    /// ([`Self::put_blob_origin`]).
    pub fn put_imported(
        &self,
        repository: &Repository,
        manifest: Digest,
    ) -> Result<(), StoreError> {
        self.put_access(&self.imported_path(repository, manifest))
    }

    /// Whether every blob of the tree has been had from the repository.
    #[must_use]
    pub fn tree_came_from(
        &self,
        repository: &Repository,
        tree: TreeKey,
        mirrors: &Mirrors,
    ) -> bool {
        let path = self.tree_origin_path(repository, tree);
        self.read_proof(&path, |proof| proof.is_given_by_all(mirrors).then_some(())).is_some()
    }

    /// Remembers that every blob of the tree has been had from the repository, each from one of
    /// these.
    pub fn put_tree_origin(
        &self,
        repository: &Repository,
        tree: TreeKey,
        by: &BTreeSet<ProofSource>,
    ) -> Result<(), StoreError> {
        let unix_seconds = jiff::Timestamp::now().as_second();
        // The registry alone, where no mirror had a part in it.
        let mirrors = by.iter().filter(|source| **source != ProofSource::Registry);
        let mut by: BTreeMap<_, _> = mirrors.map(|source| (source.name(), unix_seconds)).collect();
        if by.is_empty() {
            by.insert(REGISTRY.to_owned(), unix_seconds);
        }
        let _turn = self.proofs().hold();
        self.write_proof(&self.tree_origin_path(repository, tree), &Proof { unix_seconds, by })
    }

    /// Who has sent the blob for the repository; none when nobody whose proofs count has.
    #[must_use]
    pub fn blob_came_from(
        &self,
        repository: &Repository,
        blob: Digest,
        mirrors: &Mirrors,
    ) -> Option<ProofSource> {
        let path = self.origin_path(&repository.to_string(), blob);
        self.read_proof(&path, |proof| proof.source(mirrors))
    }

    /// Whether the blob has been had from any repository of the host.
    #[must_use]
    pub fn blob_came_from_host(&self, host: &str, blob: Digest, mirrors: &Mirrors) -> bool {
        self.read_proof(&self.origin_path(host, blob), |proof| proof.source(mirrors)).is_some()
    }

    /// Remembers where a blob was had from.
    pub fn put_blob_origin(
        &self,
        repository: &Repository,
        blob: Digest,
        by: &ProofSource,
    ) -> Result<(), StoreError> {
        self.put_given(&self.origin_path(repository.host(), blob), by, REFRESH_SECONDS)?;
        self.put_given(&self.origin_path(&repository.to_string(), blob), by, REFRESH_SECONDS)
    }

    /// Remembers that it is so.
    pub(super) fn put_access(&self, path: &Path) -> Result<(), StoreError> {
        let now = jiff::Timestamp::now().as_second();
        let _turn = self.proofs().hold();
        let known: Option<Proof> = records::read(path);
        if known.is_some_and(|proof| (0..REFRESH_SECONDS).contains(&(now - proof.unix_seconds))) {
            return Ok(());
        }
        self.write_proof(path, &Proof { unix_seconds: now, by: BTreeMap::new() })
    }

    /// Reads what a proof says; one that nobody gave whose proofs count is forgotten.
    fn read_proof<T>(&self, path: &Path, says: impl Fn(&Proof) -> Option<T>) -> Option<T> {
        let says = |path| says(&records::read::<Proof>(path)?);
        if let Some(said) = says(path) {
            return Some(said);
        }
        if path.exists() {
            let _turn = self.proofs().hold();
            // Somebody may have given it meanwhile.
            if let Some(said) = says(path) {
                return Some(said);
            }
            // It is not believed either way; one that resists is looked at again.
            if let Err(error) = self.remove_proof(path) {
                tracing::debug!(%error, "a proof that does not count stays");
            }
        }
        None
    }

    /// Writes a proof that one gave, beside what others gave, unless it says so for less than `age`.
    fn put_given(&self, path: &Path, by: &ProofSource, age: i64) -> Result<(), StoreError> {
        let now = jiff::Timestamp::now().as_second();
        let _turn = self.proofs().hold();
        // Of one that does not say who gave it nothing stays: now it is renewed.
        let known = records::read::<Proof>(path).map(|proof| proof.by).unwrap_or_default();
        let given = known.get(&by.name());
        if given.is_some_and(|seconds| (0..age).contains(&(now - seconds))) {
            return Ok(());
        }
        let mut all = known;
        all.insert(by.name(), now);
        self.write_proof(path, &Proof { unix_seconds: now, by: all })
    }

    /// The caller holds the lock.
    fn write_proof(&self, path: &Path, proof: &Proof) -> Result<(), StoreError> {
        if let Some(folder) = path.parent()
            && super::durable::create_folder(folder)?
        {
            self.catalog().count_records(self.units().record(), Goal::default());
        }
        let is_new = path.symlink_metadata().is_err();
        // Losing one in a power cut costs a request, so none of them is worth a sync.
        records::write_hint(&self.staging(), path, proof)?;
        if is_new {
            self.catalog().count_records(self.units().record(), Goal::default());
        }
        Ok(())
    }

    /// Removes a proof. The caller holds the lock.
    pub(super) fn remove_proof(&self, path: &Path) -> Result<bool, StoreError> {
        let removed = records::remove_if_there(path)?;
        if removed {
            self.catalog().count_records(Goal::default(), self.units().record());
        }
        Ok(removed)
    }

    fn proof_path(&self, repository: &Repository, manifest: Digest, who: &Principal) -> PathBuf {
        self.access_path(&repository.to_string(), &format!("m-{}-{}", manifest.hex(), who.0))
    }

    fn account_path(&self, repository: &Repository, manifest: Digest, who: &Principal) -> PathBuf {
        self.access_path(&repository.to_string(), &format!("a-{}-{}", manifest.hex(), who.0))
    }

    fn refusal_path(&self, repository: &Repository) -> PathBuf {
        self.access_path(&repository.to_string(), "refuses-anonymous")
    }

    fn imported_path(&self, repository: &Repository, manifest: Digest) -> PathBuf {
        self.access_path(&repository.to_string(), &format!("i-{}", manifest.hex()))
    }

    fn tree_origin_path(&self, repository: &Repository, tree: TreeKey) -> PathBuf {
        self.access_path(&repository.to_string(), &format!("t-{tree}"))
    }

    fn origin_path(&self, place: &str, blob: Digest) -> PathBuf {
        self.access_path(place, &format!("b-{}", blob.hex()))
    }

    pub(super) fn access_path(&self, place: &str, name: &str) -> PathBuf {
        let folder = keys::hash(&[place]).hex();
        self.path("access").join(folder).join(format!("{name}.json"))
    }
}
