//! Units of disk space on the state directory's filesystem.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::error::StoreError;
use super::space_amount::SpaceAmount;

/// Bytes of a small file or folder on common filesystems, at most: one block.
pub(super) const BYTES_PER_INODE: u64 = 4096;

/// Disk space of files and folders on the state directory's filesystem.
#[derive(Clone, Copy, Debug)]
pub(super) struct DiskUnits {
    /// Bytes of a block: files take whole ones.
    pub(super) block: u64,
    /// Bytes of an empty folder: 0 on a filesystem that keeps few names in the inode.
    pub(super) folder: u64,
}

impl DiskUnits {
    /// Reads them from the filesystem of a state directory.
    pub(super) fn of(root: &Path) -> Result<Self, StoreError> {
        let empty = root.join("empty");
        let failed = |error| StoreError::io("look at", &empty, error);
        let status = nix::sys::statvfs::statvfs(&empty).map_err(|error| failed(error.into()))?;
        let folder = empty.symlink_metadata().map_err(failed)?.blocks() * 512;
        // Other numbers are implausible.
        let block = status.fragment_size().clamp(512, 1 << 16);
        Ok(Self { block, folder: folder.min(1 << 16) })
    }

    /// Returns the disk space of a file of this size: whole blocks.
    pub(super) const fn blocks(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.block).saturating_mul(self.block)
    }

    /// Returns the disk space of names in a folder beyond its first block.
    pub(super) const fn more_names(self, bytes: u64) -> u64 {
        self.blocks(bytes).saturating_sub(self.block)
    }

    /// Returns the disk space of a proof or another small record.
    pub(super) const fn record(self) -> SpaceAmount {
        SpaceAmount { bytes: self.block, inodes: 1 }
    }
}

/// Returns the bytes that one more name takes of its folder: ext4 has eight bytes with each, and leaves
/// about half of a full folder's blocks empty.
pub(super) const fn bytes_of_a_name(length: u8) -> u64 {
    2 * (length as u64 + 8)
}
