//! Turns a volume's request into a complete tree in the store.
//!
//! ```text
//! artifact_request            what a volume asks for, and with which credentials it may
//! pull_tenant                 the namespace that a pull is charged to
//! cached_tree                 the fast path: a tree that is in the store and proven for its caller
//!
//! reference_resolution        the resolver: reference, pull policy and cached content -> manifest
//!   credential_candidates     the credentials that a volume may try, and whose right each stands for
//!   known_resolution          the store's earlier answers for a reference
//!   credentials_verification  when an earlier answer needs no new proof
//!   manifest_fetch            the index, the manifest and the configuration from a registry
//!   access_proofs             whether a credential opens a manifest
//! signature_verification      verifying the signatures of an artifact; signature_search: finding them;
//!                             deferred_verification: beside the mount, where a policy only warns
//!
//! artifact_tree               the tree assembler: manifest -> tree
//!   tree_shape                what a volume shows of a manifest
//!   tree_sources              the files and layers that a tree is planned from
//!   disk_space_claim          the disk space of an artifact, claimed before its first byte
//!   composite_tree            several artifacts in one tree
//!   artifact_totals           limits on the sums of its layers, while they arrive
//! blob_objects                the layer store: blobs -> files and layers of the store
//!   streaming_unpack          unpacks a layer while it arrives
//!
//! downloader                  the downloader: the right to a blob, the proof that a repository has it, its bytes
//!   blob_origins              whether a repository has a blob that the store holds
//!   shared_downloads          one download for all repositories of a host: a slow source loses it to a faster one
//!   blob_transfer             one blob to `partial/`, verified
//!   blob_connections          its connections; range_scheduler: their ranges; connection_rate: whether one is
//!                             fast enough; cpu_idle: whether processors are free; transfer_retry: back-off
//!   download_resources        shared by all downloads; connection_slots: fair shares; download_throttle: rate limit
//!   small_blob                a small document, whole in memory
//!   pull_options              the section `pull` of the configuration file
//!
//! content_repair              reads content back, and repairs what is damaged
//! image_layout                an OCI image layout in place of a registry
//! single_flight               one piece of work for all that wait for it; credential_offers: their credentials;
//!                             pull_progress: its progress; keyed_locks: one holder for each key
//! memory                      one memory budget for all pulls; compute_budget: its use by computations
//! ```
//!
//! [`Puller`] connects the parts, of which each knows only the few that it needs. All work runs in
//! flights that belong to the node; [`Puller::acquire`] only waits for them and may be dropped at any
//! time.

mod access_proofs;
mod artifact_request;
mod artifact_totals;
mod artifact_tree;
mod blob_connections;
mod blob_objects;
mod blob_origins;
mod blob_transfer;
mod cached_tree;
mod composite_tree;
mod compute_budget;
mod connection_rate;
mod connection_slots;
pub mod content_repair;
mod cpu_idle;
mod credential_candidates;
mod credential_offers;
mod credentials_verification;
mod deferred_verification;
mod disk_space_claim;
pub mod download_resources;
mod download_throttle;
mod downloader;
mod error;
pub mod image_layout;
mod keyed_locks;
mod known_resolution;
mod manifest_fetch;
pub mod memory;
mod pull_options;
pub mod pull_progress;
mod pull_tenant;
mod range_scheduler;
mod reference_resolution;
mod shared_downloads;
pub mod signature_search;
mod signature_verification;
pub mod single_flight;
mod small_blob;
mod streaming_unpack;
#[cfg(test)]
mod testing;
pub mod transfer_retry;
mod tree_shape;
mod tree_sources;

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

pub use artifact_request::{IfUnavailable, Priority, PullPolicy, Want};
pub use composite_tree::{CompositeError, PlacedWant};
pub use credentials_verification::{CredentialsVerification, Verification};
pub use error::PullError;
pub use pull_options::PullOptions;
pub use pull_tenant::{Caller, Tenant};
pub use tree_shape::Shape;

use access_proofs::AccessProver;
use artifact_tree::{TreeAssembler, TreeRequest};
use blob_objects::LayerStore;
use blob_origins::BlobOrigins;
use blob_transfer::SizedBlob;
use composite_tree::Composer;
use compute_budget::Computations;
use content_repair::ContentReader;
use credential_offers::Source;
use deferred_verification::DeferredVerifications;
use disk_space_claim::SpaceReserver;
use download_resources::{Observer, Wire};
use downloader::Downloader;
use image_layout::LayoutImporter;
use keyed_locks::KeyedLocks;
use known_resolution::KnownManifests;
use manifest_fetch::ManifestFetcher;
use memory::{MemoryBudget, MemoryPlan, container_limit};
use oci::credentials::providers::NodeCredentials;
use oci::registry::Registry;
use pull_progress::Progress;
use reference_resolution::{Resolved, Resolver};
use shared_downloads::SharedDownloads;
use signature_verification::SignatureVerifier;
use single_flight::{Flights, Outcome, Runway};
use store::resolution_records::Resolution;
use store::{Store, Tree};
use streaming_unpack::Unpackers;
use sys::background::{Background, PodStartGuard};
use sys::weak_map::WeakMap;
use unpack::Limits;

/// The time that a flight continues without a caller: the kubelet calls again within seconds at first, and a deleted
/// pod does not.
const LINGER: Duration = Duration::from_mins(1);

/// A reservation of memory by a pull.
type Memory = memory::MemoryReservation<Tenant>;

/// The sources of content, and the rules for access to it.
#[derive(Clone)]
pub struct Sources {
    /// Speaks to registries.
    pub registry: Registry,
    /// The node's own credentials.
    pub node_credentials: NodeCredentials,
    /// When cached content needs no proof.
    pub verification: Verification,
    /// Bounds on what registries send.
    pub limits: Limits,
}

/// Pulls artifacts. Cheap to clone; clones share flights.
#[derive(Clone)]
pub struct Puller(Arc<Parts>);

/// The steps of a pull.
struct Parts {
    resolver: Arc<Resolver>,
    signatures: Arc<SignatureVerifier>,
    deferred: DeferredVerifications,
    assembler: Arc<TreeAssembler>,
    composer: Arc<Composer>,
    reader: Arc<ContentReader>,
    importer: Arc<LayoutImporter>,
    wire: Arc<Wire>,
    background: Background,
}

/// A view of a pull's progress, for a caller that waits.
#[derive(Clone, Debug, Default)]
pub struct ProgressView(Arc<Mutex<ViewedProgress>>);

/// The flight that is waited for last, and the views of several that are waited for together.
#[derive(Debug, Default)]
struct ViewedProgress {
    own: Option<Arc<Progress>>,
    parts: Vec<ProgressView>,
}

impl ProgressView {
    /// Returns the current progress.
    pub fn snapshot(&self) -> pull_progress::Snapshot {
        let (own, parts) = {
            let viewed = self.0.lock();
            (viewed.own.clone(), viewed.parts.clone())
        };
        let nothing = || Progress::default().snapshot();
        let own = own.map_or_else(nothing, |progress| progress.snapshot());
        let parts = parts.iter().filter(|part| part.was_shown());
        parts.fold(own, |all, part| all.with(part.snapshot()))
    }

    /// Returns whether there was a flight to wait for.
    pub fn was_shown(&self) -> bool {
        let parts = {
            let viewed = self.0.lock();
            if viewed.own.is_some() {
                return true;
            }
            viewed.parts.clone()
        };
        parts.iter().any(Self::was_shown)
    }

    fn show(&self, progress: &Arc<Progress>) {
        self.0.lock().own = Some(Arc::clone(progress));
    }

    /// Adds a view of something that is waited for beside other things.
    fn part(&self) -> Self {
        let part = Self::default();
        self.0.lock().parts.push(part.clone());
        part
    }
}

/// A pull that is under way.
#[derive(Clone, Debug)]
pub struct UnderWay {
    /// Repository and manifest.
    pub name: String,
    /// The progress of the flight.
    pub progress: pull_progress::Snapshot,
    /// The tenants that wait for it, or the one that waited last.
    pub tenants: Vec<Tenant>,
}

impl Puller {
    /// Builds the parts. Nothing is under way yet.
    pub fn new(
        store: Store,
        sources: Sources,
        options: PullOptions,
        observer: Arc<dyn Observer>,
        runway: &Runway,
    ) -> Self {
        let Sources { registry, node_credentials, verification, limits } = sources;
        let PullOptions { unpacks, wide_unpacks, .. } = options;
        // A tree lingers without a caller. The flights that it waits for end with it.
        let now = Duration::ZERO;
        let background = runway.background.clone();
        let memory = options.memory_bytes(container_limit());
        let budget = MemoryBudget::new(MemoryPlan::new(memory, unpacks));
        let computations = Computations::new(budget, unpacks, background.clone());
        let origins = BlobOrigins { store: store.clone(), registry: registry.clone() };
        let observe = Arc::clone(&observer);
        let wire = Arc::new(Wire::new(registry.clone(), options, observe, background.clone()));
        let resolver = Arc::new(Resolver {
            store: store.clone(),
            node_credentials,
            known: KnownManifests {
                origins: origins.clone(),
                limits: limits.clone(),
                verification,
                large_documents: Mutex::default(),
            },
            fetcher: ManifestFetcher { origins: origins.clone(), limits: limits.clone(), options },
            prover: AccessProver { origins: origins.clone() },
            flights: Flights::new(runway.clone(), now),
        });
        let reader = Arc::new(ContentReader {
            store: store.clone(),
            computations: computations.clone(),
            flights: Flights::new(runway.clone(), LINGER),
        });
        let downloader = Arc::new(Downloader {
            store: store.clone(),
            wire: Arc::clone(&wire),
            origins: origins.clone(),
            background: background.clone(),
            shared: SharedDownloads::default(),
            proving: KeyedLocks::default(),
        });
        let layers = Arc::new(LayerStore {
            store: store.clone(),
            downloader: Arc::clone(&downloader),
            unpackers: Unpackers::new(
                store.clone(),
                limits.clone(),
                unpacks,
                wide_unpacks,
                computations.clone(),
                background.clone(),
            ),
            reader: Arc::clone(&reader),
            background: background.clone(),
            files: Flights::new(runway.clone(), now),
            layers: Flights::new(runway.clone(), now),
            naming: KeyedLocks::default(),
        });
        let signatures = Arc::new(SignatureVerifier {
            store: store.clone(),
            registry,
            resolver: Arc::clone(&resolver),
            computations: computations.clone(),
            options,
            limits: limits.manifest(),
            observer: Arc::clone(&observer),
            flights: Flights::new(runway.clone(), LINGER),
        });
        let composer = Arc::new(Composer {
            store: store.clone(),
            reader: Arc::clone(&reader),
            computations: computations.clone(),
            limits: limits.clone(),
            flights: Flights::new(runway.clone(), LINGER),
        });
        let assembler = Arc::new(TreeAssembler {
            store: store.clone(),
            space: SpaceReserver { origins: origins.clone() },
            origins,
            limits: limits.clone(),
            layers,
            computations,
            background: background.clone(),
            observer,
            flights: Flights::new(runway.clone(), LINGER),
            sponsors: WeakMap::default(),
            building: KeyedLocks::default(),
        });
        let importer = Arc::new(LayoutImporter { store, limits, downloader });
        Self(Arc::new(Parts {
            resolver,
            signatures,
            deferred: DeferredVerifications::new(runway.clone()),
            assembler,
            composer,
            reader,
            importer,
            wire,
            background,
        }))
    }

    /// Returns the tree that is wanted, from the cache or the registry.
    ///
    /// # Errors
    ///
    /// The failure of the flight that was waited for, or of the credentials of
    /// this want alone.
    pub async fn acquire(&self, want: &Want, view: &ProgressView) -> Result<Tree, Arc<PullError>> {
        let resolved = self.0.resolver.resolve(want).await?;
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
        let resolved = self.0.resolver.resolve_unremembered(want).await?;
        let tree = self.have(want, &resolved, view).await?;
        Ok((tree, resolved.digests.resolution_of(&want.reference)))
    }

    async fn have(
        &self,
        want: &Want,
        resolved: &Resolved,
        view: &ProgressView,
    ) -> Result<Tree, Arc<PullError>> {
        self.check(want, resolved).await?;
        self.sound_tree(want, resolved, view).await
    }

    /// Compares what was resolved with the demands of the volume, before any of it is fetched.
    async fn check(&self, want: &Want, resolved: &Resolved) -> Outcome<()> {
        self.0.resolver.check_size(want, resolved).await?;
        if want.priority == Priority::Pod && want.is_only_warned_of() {
            self.verify_later(want, resolved.digests, Some(resolved));
            return Ok(());
        }
        self.0.signatures.verify(want, resolved).await
    }

    /// Returns the tree of what was resolved, read back if it is of an earlier format.
    async fn sound_tree(
        &self,
        want: &Want,
        resolved: &Resolved,
        view: &ProgressView,
    ) -> Outcome<Tree> {
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

    /// Returns the tree of a manifest that this volume may see, from the store or the registry.
    async fn tree(&self, want: &Want, resolved: &Resolved, view: &ProgressView) -> Outcome<Tree> {
        let Parts { resolver, assembler, .. } = &*self.0;
        let request = TreeRequest::new(resolved.digests.manifest, want.shape.clone());
        let repository = want.reference.repository();
        if let Some(tree) = assembler.cached(repository, request.key).await? {
            return Ok(tree);
        }
        if want.policy == PullPolicy::Never {
            return Err(Arc::new(PullError::NotCached));
        }
        let credential = resolver.credential(resolved).await?;
        let source = Source { repository: repository.clone(), credential };
        assembler.assemble(&request, &source, want.caller(), view).await
    }

    /// All pulls that are under way, and how far they are.
    pub fn under_way(&self) -> Vec<UnderWay> {
        let flights = self.0.assembler.flights.under_way().into_iter();
        let pulls = flights.map(|flight| UnderWay {
            name: flight.named().unwrap_or_default().to_owned(),
            progress: flight.snapshot(),
            tenants: flight.tenants(),
        });
        pulls.collect()
    }

    /// Until the answer is dropped, what no pod waits for pauses, unless it is its turn.
    #[must_use]
    pub fn goes_first(&self) -> PodStartGuard {
        self.0.background.begin_pod_start()
    }

    /// Connections that download now.
    pub fn downloads_in_flight(&self) -> usize {
        self.0.wire.slots.taken()
    }
}

/// Runs disk work off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PullError> + Send + 'static,
) -> Result<T, PullError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(PullError::Crashed))
}
