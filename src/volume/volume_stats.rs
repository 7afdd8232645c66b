//! Sizes of a published volume: numbers kept with its tree, and those of its filesystem, in constant time.

use super::VolumeManager;
use super::error::VolumeError;
use super::target_path::TargetPath;
use store::followed_volumes::shown_tree;
use store::{DiskSpace, MountedContent, Tree};
use sys::mount::TargetState;

/// Statistics of a volume, defined as the kubelet defines them for local volumes: the use of the volume itself, and the
/// capacity of its filesystem. A volume that is always full would trip every alert on volumes that fill up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeStats {
    /// Bytes of the volume's files.
    pub bytes: ResourceUsage,
    /// Inodes of the volume.
    pub inodes: ResourceUsage,
}

/// The use of bytes or inodes by a volume, and the capacity of its filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResourceUsage {
    /// The number that the volume uses.
    pub used: u64,
    /// The number that the filesystem has left.
    pub available: u64,
    /// The capacity of the filesystem, at least the sum of the other two.
    pub total: u64,
}

impl ResourceUsage {
    /// Returns the usage. A filesystem that creates inodes on demand, such as btrfs, reports a total of 0.
    fn new(used: u64, available: u64, total: u64) -> Self {
        Self { used, available, total: total.max(used.saturating_add(available)) }
    }
}

impl VolumeManager {
    /// Returns the sizes of the volume at a path.
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
        let target = path.open().map_err(|_| unknown())?;
        let TargetState::Mounted(origin) = target.state().map_err(failed)? else {
            return Err(unknown());
        };
        let (key, generation) = match MountedContent::of(&origin).ok_or_else(unknown)? {
            MountedContent::Tree(tree) => (tree.key, tree.generation),
            MountedContent::Followed(key) => {
                shown_tree(&self.0.state_dir, key).ok_or_else(unknown)?
            }
        };
        // Reads the tree's record alone: statistics need no open store.
        let tree = Tree::read(&self.0.state_dir, key, generation).ok_or_else(unknown)?;
        let room = DiskSpace::of(&self.0.state_dir)?;
        Ok(VolumeStats {
            bytes: ResourceUsage::new(tree.record.bytes, room.free_bytes, room.total_bytes),
            inodes: ResourceUsage::new(tree.record.inodes, room.free_inodes, room.total_inodes),
        })
    }
}
