//! Resolutions of references to digests, so that `IfNotPresent` and `Never` need no registry.

pub mod namespace_resolutions;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::folder_listing::names;
use super::record_index::{FoundRecord, RecordIndex, RecordTarget};
use super::record_sweep::{Sweep, SweptRecords, all_but_newest};
use super::state_directory::StateDirectory;
use super::{ObjectName, json_records, object_keys};
use namespace_resolutions::renew;
use oci_types::{Digest, Platform, Reference};

/// Below the state directory.
pub(super) const FOLDER: &str = "resolutions";
/// Longer than any pull that is still wanted goes on between two of its records.
const AGE: Duration = Duration::from_hours(24);
/// Resolutions that are kept for one manifest, at most.
const MOST_OF_A_MANIFEST: usize = 64;

/// The meaning of a reference for a platform at the last answer of the registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolution {
    /// The reference, as text for people.
    pub reference: String,
    /// The digest in the registry's answer: of a manifest or an index.
    pub resolved: Digest,
    /// The manifest that was chosen for the platform.
    pub manifest: Digest,
    /// The platform; none in records of before it was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
}

impl Resolution {
    fn target(&self) -> RecordTarget {
        let &Self { resolved, manifest, .. } = self;
        RecordTarget { manifest, index: (resolved != manifest).then_some(resolved) }
    }
}

/// The resolutions of a store.
pub struct Resolutions {
    directory: Arc<StateDirectory>,
    index: RecordIndex,
}

impl Resolutions {
    pub(super) fn new(directory: Arc<StateDirectory>) -> Self {
        Self { directory, index: RecordIndex::default() }
    }

    /// Returns the last resolution of the reference.
    pub fn get(&self, reference: &Reference, platform: &Platform) -> Option<Resolution> {
        json_records::read(&self.record_path(reference, platform))
    }

    /// All readable resolutions.
    pub fn list(&self) -> Result<Vec<Resolution>, StoreError> {
        let records = json_records::list(&self.directory.path(FOLDER))?;
        Ok(records.into_iter().map(|(_, resolution)| resolution).collect())
    }

    /// Returns the last resolutions of the reference, for every platform.
    pub fn of_reference(&self, reference: &Reference) -> Result<Vec<Resolution>, StoreError> {
        let records = self.records_of(reference)?;
        Ok(records.into_iter().map(|(_, resolution)| resolution).collect())
    }

    /// Returns the references that last resolved to a manifest.
    pub fn references_of(&self, manifest: Digest) -> Result<BTreeSet<String>, StoreError> {
        self.load_index()?;
        let records = self.index.of_manifest(manifest);
        let resolutions =
            records.iter().filter_map(|record| json_records::read::<Resolution>(record));
        let leading = resolutions.filter(|resolution| resolution.manifest == manifest);
        Ok(leading.map(|resolution| resolution.reference).collect())
    }

    /// Returns the indexes that some manifests were chosen from.
    pub(super) fn indexes_of(
        &self,
        manifests: &HashSet<Digest>,
    ) -> Result<HashSet<ObjectName>, StoreError> {
        self.load_index()?;
        Ok(self.index.indexes_of(manifests))
    }

    /// Fills the index of resolutions at the first call.
    fn load_index(&self) -> Result<(), StoreError> {
        self.index.load(|| {
            let records =
                json_records::list::<Resolution>(&self.directory.path(FOLDER))?.into_iter();
            Ok(records
                .filter_map(|(path, resolution)| {
                    let reference = name(&resolution.reference.parse().ok()?);
                    Some(FoundRecord { path, reference, target: resolution.target() })
                })
                .collect())
        })
    }

    /// Returns the records of a reference, for every platform.
    fn records_of(
        &self,
        reference: &Reference,
    ) -> Result<Vec<(Arc<Path>, Resolution)>, StoreError> {
        self.load_index()?;
        let wanted = name(reference);
        let is_wanted = |resolution: &Resolution| {
            resolution.reference.parse().is_ok_and(|known: Reference| name(&known) == wanted)
        };
        let records = self.index.of_reference(&wanted).into_iter();
        Ok(records
            .filter_map(|record| json_records::read(&record).map(|resolution| (record, resolution)))
            .filter(|(_, resolution)| is_wanted(resolution))
            .collect())
    }

    /// Forgets what the reference resolved to, for every platform; says what that was.
    pub fn remove(&self, reference: &Reference) -> Result<Vec<Resolution>, StoreError> {
        let mut removed = Vec::new();
        for (path, resolution) in self.records_of(reference)? {
            self.remove_record(&path)?;
            removed.push(resolution);
        }
        Ok(removed)
    }

    /// Removes one record. Returns whether it was there.
    fn remove_record(&self, path: &Path) -> Result<bool, StoreError> {
        let removed = json_records::remove_if_there(path)?;
        if removed {
            self.directory.uncount_record();
        }
        self.index.remove(path);
        Ok(removed)
    }

    /// Remembers what a reference resolved to. Unchanged, it costs no write.
    pub fn put(
        &self,
        reference: &Reference,
        platform: &Platform,
        resolution: &Resolution,
    ) -> Result<(), StoreError> {
        let resolution = &Resolution { platform: Some(platform.to_string()), ..resolution.clone() };
        let path = self.record_path(reference, platform);
        let known = self.get(reference, platform);
        if known.as_ref() == Some(resolution) {
            renew(&path);
            return self.supersede_namespaces(reference, platform);
        }
        json_records::write_durable(&self.directory.staging(), &path, resolution)?;
        self.index.insert(&path, &name(reference), resolution.target());
        if known.is_none() {
            self.directory.count_record();
        }
        self.supersede_namespaces(reference, platform)
    }

    fn record_path(&self, reference: &Reference, platform: &Platform) -> PathBuf {
        let key = object_keys::hash(&[&name(reference), &platform.to_string()]);
        self.directory.path(FOLDER).join(json_records::name(key))
    }
}

impl SweptRecords for Resolutions {
    fn load(&self) -> Result<usize, StoreError> {
        self.load_index()?;
        Ok(names(&self.directory.path(FOLDER))?.len())
    }

    /// Keeps the resolutions to manifests that are kept or that a pull may be under way for.
    fn sweep(&self, sweep: &mut Sweep<'_>) -> Result<usize, StoreError> {
        let mut swept = 0;
        let mut by_manifest = HashMap::<_, Vec<PathBuf>>::new();
        for (path, resolution) in json_records::list::<Resolution>(&self.directory.path(FOLDER))? {
            let manifest = resolution.manifest;
            // A manifest that was used just now is one of a pull that is under way.
            let is_young = !sweep.is_old(&path, AGE) || sweep.is_young_document(manifest, AGE);
            if sweep.manifests.contains(&manifest) || is_young {
                sweep.manifests.insert(manifest);
                by_manifest.entry(manifest).or_default().push(path);
            } else {
                swept += usize::from(self.remove_record(&path)?);
            }
        }
        for paths in by_manifest.into_values() {
            for path in all_but_newest(paths, MOST_OF_A_MANIFEST) {
                if sweep.is_old(&path, AGE) {
                    swept += usize::from(self.remove_record(&path)?);
                }
            }
        }
        Ok(swept)
    }
}

/// Returns the name of a reference in keys: beside a digest the tag has no meaning.
fn name(reference: &Reference) -> String {
    match reference.digest() {
        Some(digest) => format!("{}@{digest}", reference.repository()),
        None => format!("{}:{}", reference.repository(), reference.tag_or_latest()),
    }
}
