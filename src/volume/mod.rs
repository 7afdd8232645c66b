//! The use cases: what the kubelet wants done with volumes.
//!
//! ```text
//! request      a publish, parsed: nothing of the wire comes further than the edge
//! attributes   what a volume's author may say
//! form         bind or overlay: how a volume is mounted
//! publish      attach a tree at a target
//! unpublish    take it away; needs nothing but the mount table
//! stats        sizes, from numbers kept with the tree
//! reconcile    at start: records and reality
//! guard        one attach or detach at a target at a time
//! ```

pub mod attributes;
pub mod error;
pub mod form;
pub mod guard;
pub mod publish;
pub mod reconcile;
pub mod request;
pub mod stats;
pub mod target_path;
pub mod unpublish;

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use error::VolumeError;
pub use form::Mounter;
pub use request::{PodInfo, PublishRequest};
pub use target_path::TargetPath;

use policy::PolicySource;
use pull::Puller;
use store::Store;

/// What publishing needs beside the kernel. It may come late (recovery) or not
/// at all (a bad configuration, a broken disk); unpublishing never asks for it.
#[derive(Clone)]
pub struct Content {
    /// What may be mounted.
    pub policy: PolicySource,
    /// The node's content.
    pub store: Store,
    /// Gets more of it.
    pub puller: Puller,
    /// Woken when there may be something to look after: a pull or an unpublish has ended.
    pub upkeep: Arc<Notify>,
}

/// Whether content can be served now, and why not.
pub type ContentState = Result<Content, String>;

/// What does the kubelet's bidding. Cheap to clone.
#[derive(Clone)]
pub struct Volumes(Arc<Inner>);

struct Inner {
    /// Where content lies, open or not.
    state_dir: PathBuf,
    mounter: Mounter,
    content: watch::Receiver<ContentState>,
    guards: guard::Guards,
    boot_id: String,
    /// Work that changes mounts runs here, so that no lost caller interrupts it.
    tracker: TaskTracker,
    shutdown: CancellationToken,
}

impl Volumes {
    /// Content may arrive later.
    #[must_use]
    pub fn new(
        state_dir: PathBuf,
        mounter: Mounter,
        content: watch::Receiver<ContentState>,
        tracker: TaskTracker,
        shutdown: CancellationToken,
    ) -> Self {
        let boot_id = store::publications::boot_id();
        let guards = guard::Guards::default();
        Self(Arc::new(Inner { state_dir, mounter, content, guards, boot_id, tracker, shutdown }))
    }

    fn content(&self) -> Result<Content, VolumeError> {
        let state = self.0.content.borrow();
        state.as_ref().map(Clone::clone).map_err(|reason| VolumeError::NotReady(reason.clone()))
    }
}
