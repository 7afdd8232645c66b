//! Detaches a volume from its target.
//!
//! Needs nothing but the mount table: no store, no configuration and no record. A pod must never hang in Terminating
//! because of this driver.

use super::VolumeManager;
use super::error::VolumeError;
use super::target_path::TargetPath;
use store::MountedContent;
use sys::fault;
use sys::mount::{DetachedFilesystem, MountForm, MountTarget, TargetState, UnmountError};

/// The most mounts on one target. No caller stacks so many; it bounds a loop that only the kernel ends.
const MAXIMUM_STACK: usize = 1024;

impl VolumeManager {
    /// Unpublishes any mounts of the driver at the target. Other mounts stay, and are no error.
    pub async fn unpublish(&self, target: TargetPath) -> Result<(), VolumeError> {
        let target_turn = self.0.target_locks.begin_unpublish(&target.full());
        let held = target_turn.lock().await;
        let (answer, answered) = tokio::sync::oneshot::channel();
        let volumes = self.clone();
        // One job on one thread. The caller waits only until the volume is unmounted.
        self.0.tracker.spawn_blocking(move || {
            let detached = match take_away(&target) {
                Ok(detached) => detached,
                Err(error) => {
                    let _ = answer.send(Err(error));
                    return drop(held);
                }
            };
            let _ = answer.send(Ok(()));
            // The next publish waits for the disk that holds the record.
            volumes.forget(&target);
            drop(held);
            // The kernel may take long to free a filesystem, so the lock is released before.
            drop(detached);
        });
        answered.await.unwrap_or(Err(VolumeError::Crashed))
    }

    /// Removes the record last. A record that stays harms nothing.
    fn forget(&self, target: &TargetPath) {
        self.followed().remove(&target.full());
        let Ok(content) = self.content() else { return };
        if let Err(error) = content.store.publications().remove(&target.full()) {
            tracing::warn!(%error, %target, "the record of an unpublished volume stays");
        }
        let _ = fault::point("unpublish.forgotten");
        content.maintenance.notify_one();
    }
}

/// The result of detaching a target.
#[derive(Default)]
pub struct DetachedTarget {
    /// The number of unmounted mounts.
    pub unmounted: usize,
    /// A mount of another program stays.
    pub foreign: bool,
    /// Filesystems of the overlays that were unmounted. Dropping them takes the kernel microseconds for each name that
    /// was looked up in them, so they are dropped under no lock.
    filesystems: Vec<DetachedFilesystem>,
}

/// Unmounts the driver's mounts at the target, and removes its directory.
fn take_away(path: &TargetPath) -> Result<DetachedTarget, VolumeError> {
    let detached = detach(path)?;
    fault::point("unpublish.unmounted").map_err(failed(path, "unmount"))?;
    remove(path, &detached)?;
    fault::point("unpublish.removed").map_err(failed(path, "remove"))?;
    Ok(detached)
}

/// Unmounts the driver's mounts at the target, the topmost first.
pub fn detach(path: &TargetPath) -> Result<DetachedTarget, VolumeError> {
    let mut detached = DetachedTarget::default();
    let Some(target) = open(path)? else { return Ok(detached) };
    while detached.unmounted < MAXIMUM_STACK {
        let TargetState::Mounted(top) = target.state().map_err(failed(path, "look at"))? else {
            return Ok(detached);
        };
        let Some(content) = MountedContent::of(&top) else {
            tracing::warn!(%path, root = %top.root.display(), filesystem = top.filesystem,
                "a mount that is not this driver's stays");
            let stack = target.stack().map_err(failed(path, "look at"))?;
            if stack.iter().any(|origin| MountedContent::of(origin).is_some()) {
                return Err(VolumeError::Covered(path.full()));
            }
            detached.foreign = true;
            return Ok(detached);
        };
        if content.form() == MountForm::Overlay {
            detached.filesystems.extend(target.hold_filesystem());
        }
        target.unmount_top().map_err(|error| match error {
            UnmountError::Nested(nested) => VolumeError::Nested { target: path.full(), nested },
            UnmountError::Kernel(source) => failed(path, "unmount")(source),
        })?;
        detached.unmounted += 1;
    }
    Ok(detached)
}

/// Removes the target's directory, if it is empty and nothing is mounted there.
pub(super) fn remove(path: &TargetPath, detached: &DetachedTarget) -> Result<(), VolumeError> {
    let Some(target) = open(path)? else { return Ok(()) };
    target.remove_if_empty().map_err(failed(path, "remove"))?;
    // "OK" for a volume that is still mounted would leave the pod in Terminating for ever.
    let state = target.state().map_err(failed(path, "look at"))?;
    if !detached.foreign && matches!(state, TargetState::Mounted(_)) {
        return Err(VolumeError::Busy(path.full()));
    }
    Ok(())
}

/// Opens the target. Returns `None` if the pod's directory is gone, and a mount with it.
fn open(path: &TargetPath) -> Result<Option<MountTarget>, VolumeError> {
    match path.open() {
        Err(error) if is_not_there(&error) => Ok(None),
        target => target.map(Some).map_err(failed(path, "open the folder of")),
    }
}

/// Returns whether a path component is missing, or is no directory: no mount of the driver can be there.
fn is_not_there(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory)
}

fn failed(path: &TargetPath, action: &'static str) -> impl Fn(std::io::Error) -> VolumeError {
    move |source| VolumeError::Kernel { action, target: path.full(), source }
}
