//! Sizes of a published volume: numbers kept with its tree, in constant time.

use super::Volumes;
use super::error::VolumeError;
use super::target_path::TargetPath;
use crate::mount::{Target, TargetState};
use crate::store::{MountedTree, Tree};

/// What a volume holds; it is full by nature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeStats {
    /// Bytes of its files.
    pub bytes: u64,
    /// Its inodes.
    pub inodes: u64,
}

impl Volumes {
    /// Sizes of the volume at a path.
    pub async fn stats(&self, path: TargetPath) -> Result<VolumeStats, VolumeError> {
        let volumes = self.clone();
        let look = move || volumes.measure(&path);
        tokio::task::spawn_blocking(look).await.unwrap_or(Err(VolumeError::Crashed))
    }

    fn measure(&self, path: &TargetPath) -> Result<VolumeStats, VolumeError> {
        let full = path.full();
        let unknown = || VolumeError::NotPublished(full.clone());
        let failed =
            |source| VolumeError::Kernel { action: "look at", target: full.clone(), source };
        let target = Target::open(path.base(), path.relative()).map_err(|_| unknown())?;
        let TargetState::Mounted(origin) = target.state().map_err(failed)? else {
            return Err(unknown());
        };
        let MountedTree { key, generation, .. } = MountedTree::of(&origin).ok_or_else(unknown)?;
        // Its record alone is read: statistics need no open store.
        let tree = Tree::read(&self.0.state_dir, key, generation).ok_or_else(unknown)?;
        Ok(VolumeStats { bytes: tree.record.bytes, inodes: tree.record.inodes })
    }
}
