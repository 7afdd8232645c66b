//! Chooses the form of a volume's mount from the node's configuration and the publish.
//!
//! A container runtime gives a container its own copy of the volume's mount, and clears the read-only flag of that copy
//! unless the pod asks for a read-only volume. So a bind is safe only if the pod asks for it, and an overlay is always
//! safe.

use std::os::fd::{AsFd as _, OwnedFd};

use serde::Deserialize;

use super::error::VolumeError;
use store::{MountedTree, Store, StoreError, Tree};
use sys::mount::{AttachMethod, MountContent, MountFlags, MountForm, MountTarget};

/// The `volumes` section of the configuration. Read at start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct VolumeOptions {
    /// The form in which volumes are mounted.
    pub mount: MountMode,
}

/// The setting `volumes.mount`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum MountMode {
    /// A bind for `readOnly: true`, which pods with user namespaces need; else an overlay.
    #[default]
    Auto,
    /// An overlay for every volume, for clusters that do not use user namespaces.
    Overlay,
    /// A bind for every volume; a publish that is not read-only is refused.
    Bind,
}

/// Mounts trees on this node. Cheap to clone.
#[derive(Clone)]
pub struct VolumeMounter {
    method: AttachMethod,
    mode: MountMode,
    /// True if this kernel has overlayfs.
    pub has_overlay: bool,
}

impl VolumeMounter {
    /// Creates a mounter. Asks the kernel once whether it has overlayfs.
    pub fn new(method: AttachMethod, mode: MountMode) -> Self {
        let has_overlay = method.has_overlay();
        Self { method, mode, has_overlay }
    }

    /// Chooses the form of a volume's mount.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Invalid`] if the volume would be writable for its pod, and [`VolumeError::NotReady`] if the
    /// configuration needs a feature that the kernel lacks.
    pub fn form(&self, readonly: bool) -> Result<MountForm, VolumeError> {
        match (self.mode, readonly, self.has_overlay) {
            (MountMode::Overlay, _, true) | (MountMode::Auto, false, true) => {
                Ok(MountForm::Overlay)
            }
            (MountMode::Auto | MountMode::Bind, true, _) => Ok(MountForm::Bind),
            (MountMode::Overlay, _, false) => Err(VolumeError::NotReady(
                "its configuration says volumes.mount: Overlay, and this node's kernel has no overlayfs".into(),
            )),
            (MountMode::Bind, false, _) => Err(not_read_only(
                "this node's configuration says volumes.mount: Bind",
            )),
            (MountMode::Auto, false, false) => {
                Err(not_read_only("this node's kernel has no overlayfs"))
            }
        }
    }

    /// Returns the form of a volume that follows a tag: a bind, since the lower directories of an overlay must not
    /// change.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Invalid`] if the volume is not read-only.
    pub fn followed_form(readonly: bool) -> Result<MountForm, VolumeError> {
        if readonly { Ok(MountForm::Bind) } else { Err(not_read_only("it follows a tag")) }
    }

    /// Mounts an open folder at a target as a bind. Blocking.
    pub(super) fn attach_folder(
        &self,
        folder: &OwnedFd,
        target: &MountTarget,
        flags: MountFlags,
    ) -> Result<(), AttachError> {
        Ok(self.method.attach(MountContent::Bind { tree: folder.as_fd() }, target, flags)?)
    }

    /// Mounts a tree at a target, whose directory exists and is empty. Blocking.
    pub(super) fn attach(
        &self,
        form: MountForm,
        store: &Store,
        tree: &Tree,
        target: &MountTarget,
        flags: MountFlags,
    ) -> Result<(), AttachError> {
        let root = tree.open()?;
        let (source, empty): (_, OwnedFd);
        let content = match form {
            MountForm::Bind => MountContent::Bind { tree: root.as_fd() },
            MountForm::Overlay => {
                source = MountedTree::source(tree.key, tree.generation);
                empty = store.empty_folder()?;
                MountContent::Overlay { tree: root.as_fd(), empty: empty.as_fd(), source: &source }
            }
        };
        Ok(self.method.attach(content, target, flags)?)
    }
}

/// A failure to mount a tree.
#[derive(Debug, thiserror::Error)]
pub(super) enum AttachError {
    /// The state directory failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A system call failed.
    #[error(transparent)]
    Kernel(#[from] std::io::Error),
}

/// Refuses a volume that a container runtime would make writable.
fn not_read_only(reason: &str) -> VolumeError {
    VolumeError::Invalid(format!(
        "the volume is not read-only, and {reason}, so that its pod could write into the node's \
         cache: set readOnly: true on the volume, or on the claim of a PersistentVolume"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(mode: MountMode, readonly: bool, has_overlay: bool) -> Option<MountForm> {
        let method = AttachMethod::Detached;
        VolumeMounter { method, mode, has_overlay }.form(readonly).ok()
    }

    #[test]
    fn no_volume_that_is_not_read_only_is_a_bind() {
        for mode in [MountMode::Auto, MountMode::Overlay, MountMode::Bind] {
            for has_overlay in [false, true] {
                assert_ne!(form(mode, false, has_overlay), Some(MountForm::Bind), "{mode:?}");
            }
        }
    }

    #[test]
    fn the_mode_decides_the_form() {
        use MountForm::{Bind, Overlay};
        for (mode, readonly, has_overlay, expected) in [
            (MountMode::Auto, true, true, Some(Bind)),
            (MountMode::Auto, true, false, Some(Bind)),
            (MountMode::Auto, false, true, Some(Overlay)),
            (MountMode::Auto, false, false, None),
            (MountMode::Overlay, true, true, Some(Overlay)),
            (MountMode::Overlay, false, true, Some(Overlay)),
            (MountMode::Overlay, true, false, None),
            (MountMode::Bind, true, true, Some(Bind)),
            (MountMode::Bind, false, true, None),
        ] {
            assert_eq!(form(mode, readonly, has_overlay), expected, "{mode:?} {readonly}");
        }
    }
}
