//! Keeps all writers of a store above the floor of free space.

use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use super::disk_space::{CacheOptions, DiskSpace};
use super::error::StoreError;
use super::space_amount::SpaceAmount;

/// The most that writers take between two looks at the filesystem, which other programs write to.
const MOST_UNSEEN: SpaceAmount = SpaceAmount { bytes: 4 << 20, inodes: 1024 };

/// Keeps writers above the floor. All writers of a store share one meter, so that together they
/// never take more than what was free above the floor when the meter last looked.
pub struct WriteMeter {
    root: PathBuf,
    options: CacheOptions,
    /// Bytes and inodes that may be taken before the next look at the filesystem.
    left: Mutex<SpaceAmount>,
}

impl WriteMeter {
    pub(super) fn new(root: &Path, options: CacheOptions) -> Self {
        Self { root: root.to_owned(), options, left: Mutex::default() }
    }

    /// Takes bytes that are about to be written.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSpace`] when that would go below the floor.
    pub fn writes(&self, bytes: u64) -> Result<(), StoreError> {
        self.take(SpaceAmount { bytes, inodes: 0 })
    }

    /// Takes inodes for files, directories or links that are about to be made.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSpace`] when that would go below the floor.
    pub fn makes(&self, inodes: u64) -> Result<(), StoreError> {
        self.take(SpaceAmount { bytes: 0, inodes })
    }

    fn take(&self, wanted: SpaceAmount) -> Result<(), StoreError> {
        let mut left = self.left.lock();
        if !wanted.is_met_by(*left) {
            let space = DiskSpace::of(&self.root)?;
            let floor = space.floor(&self.options);
            if !space.missing_until(floor.plus(wanted)).is_nothing() {
                return Err(StoreError::NoSpace { action: "write below", path: self.root.clone() });
            }
            *left = MOST_UNSEEN.min(space.above(floor)).max(wanted);
        }
        *left = left.less(wanted);
        Ok(())
    }
}

/// Converts an error of the meter: space below the floor is a full disk to a writer.
pub(super) fn full(error: StoreError) -> std::io::Error {
    match error {
        StoreError::NoSpace { .. } => std::io::ErrorKind::StorageFull.into(),
        other => std::io::Error::other(other),
    }
}
