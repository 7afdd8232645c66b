//! From a volume's wish to a complete tree in the store.
//!
//! ```text
//! want       what a volume asks for, and with which credentials it may
//! candidates the credentials that it may try, and whose right each stands for
//! cached     the fast path: a tree that is in the store and proven for its caller
//! verification  when cached content needs no proof
//! resolve    reference, pull policy and what is cached -> manifest; and the proof of access
//! flights    one piece of work at a time, however many wait
//! sponsors   whose credentials pay for it
//! tenant     the namespace that it is charged to: shares are fair between tenants
//! signatures finding an artifact's signatures, and verifying them
//! transfer   one blob to partial/, verified
//! connections  the connections that bring it; spans: which brings which bytes; retry: after how long;
//!            rate: whether it is enough
//! document   one small blob, whole in memory
//! idle       whether the node's processors have time
//! shared_downloads  one download for all repositories of a host: a slow source loses it to a faster one
//! wire       what all downloads share; slots: fair shares of connections; throttle: how fast
//! unpacking  a layer, unpacked while it comes
//! objects    blobs -> files and layers of the store
//! origins    whether a repository gives a blob that the store has; locks: one at a time
//! memory     one budget for the memory of all pulls
//! room       how much of the disk an artifact will take, before its first byte
//! sums       what its layers come to, while they come
//! artifact   manifest -> tree
//! self_check reads content back: all of it, an item, or what an earlier format left before it is
//!            shown; and makes anew what is damaged
//! import     an OCI image layout in place of a registry
//! ```
//!
//! All work runs in flights that belong to the node; [`Puller::acquire`] only
//! waits for them and may be dropped at any time.

pub mod artifact;
mod cached;
pub mod candidates;
pub mod connections;
pub mod document;
pub mod error;
pub mod flights;
mod idle;
pub mod import;
mod locks;
pub mod memory;
pub mod objects;
mod origins;
pub mod progress;
pub mod rate;
pub mod resolve;
pub mod retry;
mod room;
pub mod self_check;
mod shared_downloads;
pub mod signatures;
pub mod slots;
pub mod spans;
pub mod sponsors;
mod sums;
pub mod tenant;
pub mod throttle;
pub mod transfer;
pub mod unpacking;
pub mod verification;
pub mod want;
pub mod wire;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use error::PullError;
pub use tenant::{Caller, Tenant};
pub use verification::{CredentialsVerification, Verification};
pub use want::{IfUnavailable, Priority, PullPolicy, Want};

use flights::{Flights, Runway};
use locks::KeyedLocks;
use memory::{MemoryBudget, MemoryPlan};
use oci::credentials::providers::NodeCredentials;
use oci::registry::Registry;
use oci::{Digest, Repository};
use progress::Progress;
use resolve::{ResolveKey, Resolved};
use shared_downloads::SharedDownloads;
use store::resolutions::Resolution;
use store::{LayerKey, Store, Tree, TreeKey};
use sys::background::{Background, PodStartGuard};
use unpack::Limits;
use unpacking::Unpackers;
use wire::{Observer, Wire, WireOptions};

/// How long a flight goes on when nobody waits: the kubelet comes back within
/// seconds at first, and a pod that was deleted does not.
const LINGER: Duration = Duration::from_mins(1);

/// What may be set about pulling.
#[derive(Clone, Copy, Debug)]
pub struct PullOptions {
    /// How blobs are downloaded.
    pub wire: WireOptions,
    /// Layers that are unpacked at once on this node.
    pub unpacks: usize,
    /// Layers with zstd windows above 8 MiB that are unpacked at once on this node.
    pub wide_unpacks: usize,
    /// The memory budget of all pulls in bytes.
    pub memory_bytes: u64,
}

/// A reservation of memory by a pull.
type Memory = memory::MemoryReservation<Tenant>;

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
    wire: Wire,
    unpackers: Unpackers,
    memory: MemoryBudget<Tenant>,
    background: Background,
    resolving: Flights<ResolveKey, Resolved>,
    // Of one repository each: what fails for one is no news for another.
    trees: Flights<(Repository, TreeKey), Tree>,
    files: Flights<(Repository, objects::FileWant), store::files::StoredFile>,
    layers: Flights<(Repository, LayerKey), objects::ReadyLayer>,
    readings: Flights<self_check::Item, self_check::ReadBack>,
    /// The downloads that repositories of a host share, by host and digest.
    downloads: SharedDownloads,
    /// Held while it is proven that a repository gives a blob.
    proving: KeyedLocks<(Repository, Digest)>,
    /// Held while what was made of a blob gets its name.
    blobs: KeyedLocks<Digest>,
    /// Held while a tree is built.
    building: KeyedLocks<TreeKey>,
    sponsors: artifact::SponsorsByTree,
    /// Held while a large cached document is parsed for a publish, which reserves no memory.
    large_documents: Mutex<()>,
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

/// A pull that is under way.
#[derive(Clone, Debug)]
pub struct UnderWay {
    /// Repository and manifest.
    pub name: String,
    /// How far it is.
    pub progress: progress::Snapshot,
}

impl Default for PullOptions {
    fn default() -> Self {
        Self {
            wire: WireOptions::default(),
            unpacks: 4,
            wide_unpacks: 1,
            memory_bytes: MemoryPlan::default_bytes(None),
        }
    }
}

impl Puller {
    /// Nothing under way yet.
    #[must_use]
    pub fn new(
        store: Store,
        sources: Sources,
        limits: Limits,
        (options, observer): (PullOptions, Arc<dyn Observer>),
        runway: &Runway,
    ) -> Self {
        // A tree lingers when nobody waits; what it waits for itself ends with it.
        let now = Duration::ZERO;
        let background = runway.background.clone();
        let memory = MemoryBudget::new(MemoryPlan::new(options.memory_bytes, options.unpacks));
        Self(Arc::new(Inner {
            wire: Wire::new(sources.registry.clone(), options.wire, observer, background.clone()),
            unpackers: Unpackers::new(
                store.clone(),
                limits.clone(),
                options.unpacks,
                options.wide_unpacks,
                memory.clone(),
                background.clone(),
            ),
            store,
            registry: sources.registry,
            node_credentials: sources.node_credentials,
            verification: sources.verification,
            limits,
            memory,
            background: background.clone(),
            resolving: Flights::new(runway.clone(), now),
            trees: Flights::new(runway.clone(), LINGER),
            files: Flights::new(runway.clone(), now),
            layers: Flights::new(runway.clone(), now),
            readings: Flights::new(runway.clone(), LINGER),
            downloads: SharedDownloads::default(),
            proving: KeyedLocks::default(),
            blobs: KeyedLocks::default(),
            building: KeyedLocks::default(),
            sponsors: artifact::SponsorsByTree::default(),
            large_documents: Mutex::default(),
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
        self.have(want, &resolved, view).await
    }

    /// As [`Puller::acquire`], of what the reference means at its registry now, whatever the pull
    /// policy. What pods with `IfNotPresent` get stays as it is; the answer says what they would
    /// get if it were remembered.
    ///
    /// # Errors
    ///
    /// As [`Puller::acquire`].
    pub async fn acquire_unremembered(
        &self,
        want: &Want,
        view: &ProgressView,
    ) -> Result<(Tree, Resolution), Arc<PullError>> {
        let resolved = self.resolve_unremembered(want).await?;
        let tree = self.have(want, &resolved, view).await?;
        let resolution = Resolution {
            reference: want.reference.to_string(),
            resolved: resolved.top,
            manifest: resolved.manifest,
            platform: None,
        };
        Ok((tree, resolution))
    }

    async fn have(
        &self,
        want: &Want,
        resolved: &Resolved,
        view: &ProgressView,
    ) -> Result<Tree, Arc<PullError>> {
        self.check_size(want, resolved).await?;
        self.verify(want, resolved).await?;
        let tree = loop {
            let tree = self.tree(want, resolved, view).await?;
            // One that is damaged has been marked: the next look does not find it.
            if self.is_sound(&tree, want.caller(), view).await? {
                break tree;
            }
        };
        want.check_bytes(tree.record.bytes).map_err(Arc::new)?;
        Ok(tree)
    }

    /// All pulls that are under way, and how far they are.
    #[must_use]
    pub fn under_way(&self) -> Vec<UnderWay> {
        let flights = self.0.trees.under_way().into_iter();
        let pulls = flights.map(|flight| UnderWay {
            name: flight.named().unwrap_or_default().to_owned(),
            progress: flight.snapshot(),
        });
        pulls.collect()
    }

    /// Until the answer is dropped, what no pod waits for pauses, unless it is its turn.
    #[must_use]
    pub fn goes_first(&self) -> PodStartGuard {
        self.0.background.begin_pod_start()
    }

    /// Connections that download now.
    #[must_use]
    pub fn downloads_in_flight(&self) -> usize {
        self.0.wire.slots.taken()
    }
}
