//! The state directory, which all parts of a store share: its folders, its catalog, its guards of writes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::SecurityLabel;
use super::damage_marks::DamageMarks;
use super::disk_space::{CacheOptions, DiskSpace};
use super::disk_units::DiskUnits;
use super::durable_rename::Barrier;
use super::error::StoreError;
use super::object_catalog::{Catalog, Lease};
use super::object_name::ObjectName;
use super::old_format_content::ReadBack;
use super::space_amount::SpaceAmount;
use super::write_meter::WriteMeter;

/// An open state directory.
pub(super) struct StateDirectory {
    pub(super) root: PathBuf,
    /// The label of new content.
    pub(super) label: Option<SecurityLabel>,
    pub(super) cache: CacheOptions,
    pub(super) units: DiskUnits,
    pub(super) barrier: Barrier,
    pub(super) catalog: Arc<Catalog>,
    pub(super) meter: Arc<WriteMeter>,
    pub(super) damage: DamageMarks,
    pub(super) read_back: ReadBack,
}

impl StateDirectory {
    /// Opens a directory whose folders are there already.
    pub(super) fn open(
        root: &Path,
        label: Option<SecurityLabel>,
        cache: CacheOptions,
    ) -> Result<Self, StoreError> {
        let catalog = Arc::<Catalog>::default();
        Ok(Self {
            root: root.to_owned(),
            label,
            cache,
            units: DiskUnits::of(root)?,
            barrier: Barrier::default(),
            damage: DamageMarks::new(root, &catalog),
            catalog,
            meter: Arc::new(WriteMeter::new(root, cache)),
            read_back: ReadBack::load(root)?,
        })
    }

    /// Returns the path of a folder or file of the directory.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Returns the folder in which content and records are made before they have a name.
    pub(super) fn staging(&self) -> PathBuf {
        self.path("staging")
    }

    /// Reads how full its filesystem is.
    pub(super) fn disk_space(&self) -> Result<DiskSpace, StoreError> {
        DiskSpace::of(&self.root)
    }

    /// Counts one more proof, resolution or folder of them.
    pub(super) fn count_record(&self) {
        self.catalog.count_records(self.units.record(), SpaceAmount::default());
    }

    /// Counts one proof, resolution or folder of them less.
    pub(super) fn uncount_record(&self) {
        self.catalog.count_records(SpaceAmount::default(), self.units.record());
    }

    /// Returns the object that lies at a path.
    pub(super) fn object_at(&self, path: &Path) -> Option<ObjectName> {
        ObjectName::at(&self.root, path)
    }

    /// Leases an object. Returns the lease and the object's path; none where it is not there.
    pub(super) fn hold(&self, name: &ObjectName) -> Option<(Lease, PathBuf)> {
        let lease = self.catalog.lease(name.clone());
        let path = self.root.join(name.as_str());
        path.symlink_metadata().is_ok().then_some((lease, path))
    }
}
