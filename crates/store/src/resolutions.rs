//! What references resolved to: so that `IfNotPresent` and `Never` need no registry.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::eviction::Goal;
use super::namespace_resolutions::renew;
use super::record_index::{FoundRecord, RecordTarget};
use super::{Store, keys, records};
use oci_types::{Digest, Platform, Reference};

/// What a reference meant for a platform when the registry was last asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolution {
    /// For people who read the folder.
    pub reference: String,
    /// What the registry answered: a manifest or an index.
    pub resolved: Digest,
    /// The manifest that was chosen for the platform.
    pub manifest: Digest,
    /// The platform; none in records of before it was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
}

impl Resolution {
    pub(super) fn target(&self) -> RecordTarget {
        let &Self { resolved, manifest, .. } = self;
        RecordTarget { manifest, index: (resolved != manifest).then_some(resolved) }
    }
}

impl Store {
    /// What the reference last resolved to.
    #[must_use]
    pub fn resolution(&self, reference: &Reference, platform: &Platform) -> Option<Resolution> {
        records::read(&self.resolution_path(reference, platform))
    }

    /// All readable resolutions.
    pub fn resolutions(&self) -> Result<Vec<Resolution>, StoreError> {
        let records = records::list(&self.path("resolutions"))?;
        Ok(records.into_iter().map(|(_, resolution)| resolution).collect())
    }

    /// What the reference last resolved to, for every platform.
    pub fn meanings(&self, reference: &Reference) -> Result<Vec<Resolution>, StoreError> {
        let records = self.resolution_records(reference)?;
        Ok(records.into_iter().map(|(_, resolution)| resolution).collect())
    }

    /// Returns the references that last resolved to a manifest.
    pub fn references_of(&self, manifest: Digest) -> Result<BTreeSet<String>, StoreError> {
        self.index_resolutions()?;
        let records = self.resolution_index().of_manifest(manifest);
        let resolutions = records.iter().filter_map(|record| records::read::<Resolution>(record));
        let leading = resolutions.filter(|resolution| resolution.manifest == manifest);
        Ok(leading.map(|resolution| resolution.reference).collect())
    }

    /// Fills the index of resolutions at the first call.
    pub(super) fn index_resolutions(&self) -> Result<(), StoreError> {
        self.resolution_index().load(|| {
            let records = records::list::<Resolution>(&self.path("resolutions"))?.into_iter();
            Ok(records
                .filter_map(|(path, resolution)| {
                    let reference = name(&resolution.reference.parse().ok()?);
                    Some(FoundRecord { path, reference, target: resolution.target() })
                })
                .collect())
        })
    }

    /// Returns the records of a reference, for every platform.
    pub(super) fn resolution_records(
        &self,
        reference: &Reference,
    ) -> Result<Vec<(Arc<Path>, Resolution)>, StoreError> {
        self.index_resolutions()?;
        let wanted = name(reference);
        let is_wanted = |resolution: &Resolution| {
            resolution.reference.parse().is_ok_and(|known: Reference| name(&known) == wanted)
        };
        let records = self.resolution_index().of_reference(&wanted).into_iter();
        Ok(records
            .filter_map(|record| records::read(&record).map(|resolution| (record, resolution)))
            .filter(|(_, resolution)| is_wanted(resolution))
            .collect())
    }

    /// Forgets what the reference resolved to, for every platform; says what that was.
    pub fn remove_resolutions(&self, reference: &Reference) -> Result<Vec<Resolution>, StoreError> {
        let mut removed = Vec::new();
        for (path, resolution) in self.resolution_records(reference)? {
            self.remove_resolution(&path)?;
            removed.push(resolution);
        }
        Ok(removed)
    }

    /// Removes one record. Returns whether it was there.
    pub(super) fn remove_resolution(&self, path: &Path) -> Result<bool, StoreError> {
        let removed = records::remove_if_there(path)?;
        if removed {
            self.catalog().count_records(Goal::default(), self.units().record());
        }
        self.resolution_index().remove(path);
        Ok(removed)
    }

    /// Remembers what a reference resolved to. Unchanged, it costs no write.
    pub fn put_resolution(
        &self,
        reference: &Reference,
        platform: &Platform,
        resolution: &Resolution,
    ) -> Result<(), StoreError> {
        let resolution = &Resolution { platform: Some(platform.to_string()), ..resolution.clone() };
        let path = self.resolution_path(reference, platform);
        let known = self.resolution(reference, platform);
        if known.as_ref() == Some(resolution) {
            renew(&path);
            return self.supersede_namespaces(reference, platform);
        }
        records::write_durable(&self.staging(), &path, resolution)?;
        self.resolution_index().insert(&path, &name(reference), resolution.target());
        if known.is_none() {
            self.catalog().count_records(self.units().record(), Goal::default());
        }
        self.supersede_namespaces(reference, platform)
    }

    pub(super) fn resolution_path(&self, reference: &Reference, platform: &Platform) -> PathBuf {
        let key = keys::hash(&[&name(reference), &platform.to_string()]);
        self.path("resolutions").join(records::name(key))
    }
}

/// With a digest the tag only informs.
pub(super) fn name(reference: &Reference) -> String {
    match reference.digest() {
        Some(digest) => format!("{}@{digest}", reference.repository()),
        None => format!("{}:{}", reference.repository(), reference.tag_or_latest()),
    }
}
