//! From a volume's wish to a complete tree in the store.
//!
//! ```text
//! want       what a volume asks for, and with which credentials it may
//! candidates the credentials that it may try, and whose right each stands for
//! verification  when cached content needs no proof
//! resolve    reference, pull policy and what is cached -> manifest; and the proof of access
//! flights    one piece of work at a time, however many wait
//! sponsors   whose credentials pay for it
//! transfer   one blob to partial/, verified
//! objects    blobs -> files and layers of the store
//! room       how much of the disk an artifact will take, before its first byte
//! artifact   manifest -> tree
//! ```
//!
//! All work runs in flights that belong to the node; [`Puller::acquire`] only
//! waits for them and may be dropped at any time.

pub mod artifact;
pub mod candidates;
pub mod error;
pub mod flights;
pub mod objects;
pub mod progress;
pub mod resolve;
mod room;
pub mod sponsors;
pub mod transfer;
pub mod verification;
pub mod want;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use error::PullError;
pub use verification::{CredentialsVerification, Verification};
pub use want::{IfUnavailable, PullPolicy, Want};

use crate::oci::credentials::providers::NodeCredentials;
use crate::oci::registry::Registry;
use crate::store::{LayerKey, Store, Tree, TreeKey};
use crate::unpack::Limits;
use flights::Flights;
use progress::Progress;
use resolve::{ResolveKey, Resolved};
use transfer::RetryPolicy;

/// How long a flight goes on when nobody waits: the kubelet comes back within
/// seconds at first, and a pod that was deleted does not.
const LINGER: Duration = Duration::from_mins(1);

/// What may be set about pulling.
#[derive(Clone, Copy, Debug)]
pub struct PullOptions {
    /// Blobs that are downloaded at once on this node.
    pub downloads: usize,
    /// Layers that are unpacked at once on this node.
    pub unpacks: usize,
    /// How broken transfers are continued.
    pub retry: RetryPolicy,
}

/// Where content comes from, and who may see it.
#[derive(Clone, Debug)]
pub struct Sources {
    /// Speaks to registries.
    pub registry: Registry,
    /// The node's own credentials.
    pub node_credentials: NodeCredentials,
    /// When cached content needs no proof.
    pub verification: Verification,
}

/// Pulls artifacts. Cheap to clone; clones share flights.
#[derive(Clone)]
pub struct Puller(Arc<Inner>);

struct Inner {
    store: Store,
    registry: Registry,
    node_credentials: NodeCredentials,
    verification: Verification,
    limits: Limits,
    options: PullOptions,
    downloads: Semaphore,
    unpacks: Arc<Semaphore>,
    resolving: Flights<ResolveKey, Resolved>,
    trees: Flights<TreeKey, Tree>,
    origins: Flights<(String, TreeKey), ()>,
    files: Flights<objects::FileWant, crate::store::files::StoredFile>,
    layers: Flights<LayerKey, crate::store::layers::Layer>,
    blobs: objects::BlobLocks,
    sponsors: artifact::SponsorsByTree,
}

/// Where somebody who waits can see how far his pull is.
#[derive(Clone, Debug, Default)]
pub struct ProgressView(Arc<Mutex<Option<Arc<Progress>>>>);

impl ProgressView {
    /// How far the pull is now.
    #[must_use]
    pub fn snapshot(&self) -> progress::Snapshot {
        let progress = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        progress.map_or_else(|| Progress::default().snapshot(), |progress| progress.snapshot())
    }

    /// Whether there was anything to wait for.
    #[must_use]
    pub fn was_shown(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn show(&self, progress: &Arc<Progress>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(progress));
    }
}

impl Default for PullOptions {
    fn default() -> Self {
        Self {
            downloads: 8,
            unpacks: 2,
            retry: RetryPolicy { attempts: 6, first_delay: Duration::from_millis(250) },
        }
    }
}

impl Puller {
    /// Nothing under way yet. Flights run on `tracker` and end with `shutdown`.
    #[must_use]
    pub fn new(
        store: Store,
        sources: Sources,
        limits: Limits,
        options: PullOptions,
        tracker: &TaskTracker,
        shutdown: &CancellationToken,
    ) -> Self {
        // A tree lingers when nobody waits; what it waits for itself ends with it.
        let now = Duration::ZERO;
        Self(Arc::new(Inner {
            store,
            registry: sources.registry,
            node_credentials: sources.node_credentials,
            verification: sources.verification,
            limits,
            options,
            downloads: Semaphore::new(options.downloads.max(1)),
            unpacks: Arc::new(Semaphore::new(options.unpacks.max(1))),
            resolving: Flights::new(tracker.clone(), shutdown.clone(), now),
            trees: Flights::new(tracker.clone(), shutdown.clone(), LINGER),
            origins: Flights::new(tracker.clone(), shutdown.clone(), LINGER),
            files: Flights::new(tracker.clone(), shutdown.clone(), now),
            layers: Flights::new(tracker.clone(), shutdown.clone(), now),
            blobs: objects::BlobLocks::default(),
            sponsors: artifact::SponsorsByTree::default(),
        }))
    }

    /// Returns the tree that is wanted, from the cache or the registry.
    ///
    /// # Errors
    ///
    /// The failure of the flight that was waited for, or of the credentials of
    /// this want alone.
    pub async fn acquire(&self, want: &Want, view: &ProgressView) -> Result<Tree, Arc<PullError>> {
        let resolved = self.resolve(want).await?;
        self.tree(want, &resolved, view).await
    }
}
