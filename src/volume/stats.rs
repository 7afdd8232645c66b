//! Sizes of a published volume: numbers kept with its tree, in constant time.

use std::path::Path;

use super::Volumes;
use super::error::VolumeError;
use super::target_path::TargetPath;
use crate::mount::syscalls::FileIdentity;
use crate::mount::{MountTable, Target, TargetState};
use crate::store::{Tree, TreeKey};

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
        let TargetState::MountRoot(identity) = target.state().map_err(failed)? else {
            return Err(unknown());
        };
        if let Some(tree) = self.recorded_tree(&full, identity) {
            return Ok(VolumeStats { bytes: tree.record.bytes, inodes: tree.record.inodes });
        }
        let table = MountTable::read().map_err(failed)?;
        let mount = target.top_mount(&table).map_err(failed)?.ok_or_else(unknown)?;
        let (key, generation) =
            TreeKey::of_mount_root(mount.root_as_mounted()).ok_or_else(unknown)?;
        let tree = Tree::read(&self.0.state_dir, key, generation).ok_or_else(unknown)?;
        Ok(VolumeStats { bytes: tree.record.bytes, inodes: tree.record.inodes })
    }

    /// The tree that the target's record names, if it is what is mounted.
    fn recorded_tree(&self, full: &Path, mounted: FileIdentity) -> Option<Tree> {
        let store = self.content().ok()?.store;
        let record = store.publication(full)?;
        let tree = store.tree_generation(record.tree, record.generation)?;
        (tree.identity().ok()? == mounted).then_some(tree)
    }
}
