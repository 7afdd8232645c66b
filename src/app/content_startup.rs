//! Opens the store while the sockets are served, and makes content available.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::NodeOptions;
use crate::admin::node_metrics::NodeMetrics;
use crate::config::policy_config::policy_source;
use crate::config::{ConfigurationError, NodeConfiguration, reloadable};
use crate::following::TagFollower;
use crate::kubernetes::EventRecorder;
use crate::node_artifacts::OWNERS;
use crate::node_maintenance::NodeMaintenance;
use crate::scrub::{ContentScrubber, system_clock};
use crate::volume::{ContentState, NodeContent, VolumeManager};
use crate::warming::{ListKeeper, SourcePins, WantedPins};
use oci::credentials::providers::NodeCredentials;
use oci::registry::{Registry, RegistryOptions};
use policy::PolicySource;
use pull::download_resources::Observer;
use pull::memory::container_limit;
use pull::single_flight::Runway;
use pull::{Puller, Sources};
use store::state_lock::Lock;
use store::state_ownership::require_mountpoint;
use store::{Store, StoreError, StoreOptions};
use sys::background::Background;

/// The interval between two attempts to open the store: the disk may be mounted, repaired or emptied meanwhile.
const STORE_RETRY: Duration = Duration::from_secs(10);

/// The parts that the task needs to open a node's store.
pub(super) struct ContentOpener {
    pub(super) options: NodeOptions,
    pub(super) configuration: Result<NodeConfiguration, ConfigurationError>,
    pub(super) volumes: VolumeManager,
    pub(super) metrics: Arc<NodeMetrics>,
    pub(super) events: Option<EventRecorder>,
    pub(super) content: watch::Sender<ContentState>,
    /// `None` until a disk that failed at start has come back.
    pub(super) lock: Arc<Mutex<Option<Lock>>>,
    pub(super) tracker: TaskTracker,
    pub(super) shutdown: CancellationToken,
}

impl ContentOpener {
    /// Opens the store, retrying until it opens; makes content available, and maintains it until `shutdown`.
    pub(super) async fn run(self) {
        let configuration = match &self.configuration {
            Ok(configuration) => configuration,
            Err(error) => {
                tracing::error!(%error, "publishing is off until the file is mended and the driver restarted");
                self.metrics.configuration_error("file", true);
                self.content.send_modify(|state| *state = Err(error.to_string()));
                return;
            }
        };
        let content = loop {
            let reason = match self.open(configuration).await {
                Ok(content) => break content,
                Err(reason) => reason,
            };
            tracing::error!(error = reason, "content cannot be served; trying again");
            self.content.send_modify(|state| *state = Err(reason));
            tokio::select! {
                () = tokio::time::sleep(STORE_RETRY) => {}
                () = self.shutdown.cancelled() => return,
            }
        };
        let maintenance = NodeMaintenance {
            volumes: self.volumes.clone(),
            content: content.clone(),
            kubelet_dir: self.options.kubelet_dir.clone(),
            metrics: Arc::clone(&self.metrics),
        };
        // Mounts of an earlier process must have records before anything new is published.
        maintenance.reconcile().await;
        self.metrics.observe_store(&content.store);
        let (store, wanted) = (content.store.clone(), Arc::clone(&content.maintenance));
        self.content.send_modify(|state| *state = Ok(content.clone()));
        self.tracker.spawn_blocking(move || {
            if let Err(error) = store.inventory().load() {
                tracing::warn!(%error, "the sizes of cached content cannot be read yet");
            }
        });
        self.release_preloads(&content);
        let scrub = ContentScrubber {
            content: content.clone(),
            interval: configuration.cache.scrub_interval(),
            state: self.metrics.scrub.clone(),
            events: self.events.clone(),
            clock: system_clock,
        };
        self.tracker.spawn(scrub.run(self.shutdown.clone()));
        self.follow_tags(content.clone());
        self.keep_warm(content);
        maintenance.run(wanted, self.shutdown.clone()).await;
    }

    /// Removes the pins of preloads where preloads are off: nothing else on this node would remove them.
    fn release_preloads(&self, content: &NodeContent) {
        if self.options.preload {
            return;
        }
        let pins = SourcePins::new(content.store.clone(), OWNERS);
        self.tracker.spawn_blocking(move || pins.keep(WantedPins::default()));
    }

    /// Starts to follow the tags of mounted volumes.
    fn follow_tags(&self, content: NodeContent) {
        let follower = TagFollower {
            content,
            volumes: self.volumes.clone(),
            state: self.metrics.following.clone(),
            events: self.events.clone(),
        };
        self.tracker.spawn(follower.run(self.shutdown.clone()));
    }

    /// Starts fetching and pinning the references of the configuration.
    fn keep_warm(&self, content: NodeContent) {
        let metrics = Arc::clone(&self.metrics);
        let report = move |failed| metrics.configuration_error("warm", failed);
        let (name, path) = ("the list of what is kept warm", self.options.config.clone());
        let keeper = ListKeeper {
            content,
            source: reloadable(name, path, |file, _| Ok(file.warm), report),
            references: Arc::clone(&self.metrics.warming),
            node_id: self.options.node_id.clone(),
        };
        self.tracker.spawn(keeper.run(self.shutdown.clone()));
    }

    async fn open(&self, configuration: &NodeConfiguration) -> Result<NodeContent, String> {
        let (root, for_store) = (self.options.state_dir.clone(), configuration.clone());
        let lock = Arc::clone(&self.lock);
        let opened = tokio::task::spawn_blocking(move || open_store(&root, &for_store, &lock));
        let store = opened.await.map_err(|error| error.to_string())?;
        let store = store.map_err(|error| error.to_string())?;
        let observer = Arc::clone(&self.metrics) as Arc<dyn Observer>;
        let runway = Runway {
            tracker: self.tracker.clone(),
            shutdown: self.shutdown.clone(),
            background: Background::start().map_err(|error| error.to_string())?,
        };
        let metrics = Arc::clone(&self.metrics);
        let report = move |failed| metrics.configuration_error("policy", failed);
        let policy = policy_source(self.options.config.clone(), report);
        content_of(store, policy, configuration, observer, &runway)
    }
}

fn open_store(
    root: &Path,
    configuration: &NodeConfiguration,
    lock: &Mutex<Option<Lock>>,
) -> Result<Store, StoreError> {
    // A disk that failed at start may have come back. The store is never opened without the lock.
    let mut lock = lock.lock();
    if lock.is_none() {
        *lock = Some(acquire(root, configuration.cache.require_mountpoint)?);
    }
    drop(lock);
    let (label, cache) = (configuration.selinux.label(), configuration.cache);
    let store = Store::open(root, StoreOptions { label, cache })?;
    tracing::info!(state = %root.display(), "the store is open");
    Ok(store)
}

/// Takes the lock. It is the first write, and goes only to the right disk.
pub(super) fn acquire(root: &Path, must_be_mounted: bool) -> Result<Lock, StoreError> {
    if must_be_mounted {
        require_mountpoint(root)?;
    }
    Lock::try_acquire(root)
}

/// Builds the puller and its registry client over an open store.
pub fn content_of(
    store: Store,
    policy: PolicySource,
    configuration: &NodeConfiguration,
    observer: Arc<dyn Observer>,
    runway: &Runway,
) -> Result<NodeContent, String> {
    let options = configuration.pull;
    let registry = RegistryOptions {
        stall_timeout: options.stall_timeout,
        ..configuration.registries.options(&configuration.limits)?
    };
    let sources = Sources {
        registry: Registry::new(registry).map_err(|error| error.to_string())?,
        node_credentials: NodeCredentials::new(configuration.registries.provider_files()),
        verification: configuration.registries.verification(),
        limits: configuration.limits.clone(),
    };
    if let Err(reason) = options.check_memory(&configuration.limits, container_limit()) {
        tracing::warn!(reason, "artifacts that the limits allow may be refused for memory");
    }
    let puller = Puller::new(store.clone(), sources, options, observer, runway);
    Ok(NodeContent { policy, store, puller, maintenance: Arc::default() })
}
