//! The use cases: operations of the kubelet on volumes.
//!
//! ```text
//! publish_request    a parsed publish: no message of CSI comes further than the edge
//! volume_attributes  the settings of a volume's author
//! artifact_list      several artifacts in one volume
//! mount_form         bind or overlay: the form of a volume's mount
//! publish_volume     attaches a tree at a target
//! unpublish_volume   detaches it; needs nothing but the mount table
//! volume_stats       sizes, from numbers kept with the tree
//! mount_reconcile    brings records and mounts together
//! follow_attribute   the attribute of volumes that follow a tag
//! followed_volume    these volumes: credentials in memory, and the switch to another tree
//! target_lock        one attach or detach at a target at a time
//! ```

mod artifact_list;
pub mod error;
mod follow_attribute;
pub mod followed_volume;
pub mod mount_form;
pub mod mount_reconcile;
pub mod publish_request;
pub mod publish_volume;
pub mod target_lock;
pub mod target_path;
pub mod unpublish_volume;
pub mod volume_attributes;
pub mod volume_stats;

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use error::VolumeError;
pub use follow_attribute::Follow;
pub use followed_volume::{FollowList, FollowedVolume};
pub use mount_form::VolumeMounter;
pub use publish_request::{PodInfo, PublishRequest};
pub use target_path::TargetPath;

use policy::PolicySource;
use pull::Puller;
use store::Store;

/// The parts that publishing needs besides the kernel. They may come late (recovery) or never (an invalid
/// configuration, a broken disk). Unpublishing never needs them.
#[derive(Clone)]
pub struct NodeContent {
    /// The node's policy.
    pub policy: PolicySource,
    /// The content on this node.
    pub store: Store,
    /// Pulls further content.
    pub puller: Puller,
    /// Wakes maintenance after a pull or an unpublish.
    pub maintenance: Arc<Notify>,
}

/// The content, or the reason why it cannot be served.
pub type ContentState = Result<NodeContent, String>;

/// Runs the use cases. Cheap to clone.
#[derive(Clone)]
pub struct VolumeManager(Arc<ManagerInner>);

struct ManagerInner {
    /// The state directory, also while the store is not open.
    state_dir: PathBuf,
    mounter: VolumeMounter,
    content: watch::Receiver<ContentState>,
    target_locks: target_lock::TargetLocks,
    followed: Arc<FollowList>,
    boot_id: String,
    /// Runs work that changes mounts, so that no caller that goes can interrupt it.
    tracker: TaskTracker,
    shutdown: CancellationToken,
}

impl VolumeManager {
    /// Creates the use cases. `content` may arrive later.
    pub fn new(
        state_dir: PathBuf,
        mounter: VolumeMounter,
        content: watch::Receiver<ContentState>,
        tracker: TaskTracker,
        shutdown: CancellationToken,
    ) -> Self {
        let boot_id = store::publication_records::boot_id();
        let target_locks = target_lock::TargetLocks::default();
        Self(Arc::new(ManagerInner {
            state_dir,
            mounter,
            content,
            target_locks,
            followed: Arc::default(),
            boot_id,
            tracker,
            shutdown,
        }))
    }

    fn content(&self) -> Result<NodeContent, VolumeError> {
        let state = self.0.content.borrow();
        state.as_ref().map(Clone::clone).map_err(|reason| VolumeError::NotReady(reason.clone()))
    }
}
