//! Room on the state directory's filesystem.

use std::path::Path;

use super::Store;
use super::error::StoreError;

/// Room as a process without privileges could use it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// What is left.
    pub free_bytes: u64,
    /// What there is.
    pub total_bytes: u64,
}

impl Store {
    /// How full the filesystem is that a folder lies on.
    pub fn room(folder: &Path) -> Result<Room, StoreError> {
        let status = nix::sys::statvfs::statvfs(folder)
            .map_err(|error| StoreError::io("look at", folder, error.into()))?;
        let bytes = |blocks: u64| blocks.saturating_mul(status.fragment_size());
        Ok(Room {
            free_bytes: bytes(status.blocks_available()),
            total_bytes: bytes(status.blocks()),
        })
    }
}
