//! Builds every part once, and owns the lock, the cancellation token and the task tracker.
//!
//! ```text
//! lock       the state directory's lock is acquired before any socket is touched
//! sockets    CSI first, then health and metrics, the registration last
//! content    opened beside the sockets: CSI is served while the store recovers
//! shutdown   stop accepting; waiting calls get UNAVAILABLE; mounts stay; exit within 10 s
//! ```

mod content_startup;
mod node_options;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tonic::transport::server::Router;

pub use content_startup::content_of;
pub use node_options::{NodeOptions, driver_name, listen_address};

use crate::admin::admin_service::AdminService;
use crate::admin::health_probes::HealthProbes;
use crate::admin::node_metrics::NodeMetrics;
use crate::config::{ConfigurationError, NodeConfiguration};
use crate::csi::csi_request::RequestContext;
use crate::csi::identity_service::IdentityService;
use crate::csi::node_service::NodeService;
use crate::csi::plugin_registration::RegistrationService;
use crate::csi::unix_socket::ListeningSocket;
use crate::kubernetes::{EventRecorder, remove_startup_taint};
use crate::node_artifacts::PreloadAgent;
use crate::proto::admin::admin_server::AdminServer;
use crate::proto::csi::v1::identity_server::IdentityServer;
use crate::proto::csi::v1::node_server::NodeServer;
use crate::proto::pluginregistration::registration_server::RegistrationServer;
use crate::volume::mount_form::MountMode;
use crate::volume::{ContentState, VolumeManager, VolumeMounter};
use content_startup::ContentOpener;
use store::state_lock::Lock;
use store::{SecurityLabel, StoreError};
use sys::mount::AttachMethod;
use telemetry::http_server;

/// The time that a new process waits for the old one to end.
const LOCK_PATIENCE: Duration = Duration::from_secs(30);
/// The interval between two attempts to take the lock or a socket.
const LOCK_INTERVAL: Duration = Duration::from_millis(100);
/// The time that the admin socket may delay the start: the process that holds it may be about to end.
const ADMIN_PATIENCE: Duration = Duration::from_secs(2);
/// The time that registration waits for content. Then it goes on without, because the kubelet sends no unpublish to a
/// driver that is not registered.
const REGISTRATION_PATIENCE: Duration = Duration::from_secs(10);
/// The time that calls and disk work get to end. The whole shutdown takes at most ten seconds.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(8);

/// An error that ends the node plugin.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The state directory is in use, or fails.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A socket that the driver cannot do without.
    #[error("cannot listen at {}: {source}", path.display())]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The CSI endpoint is off.
    #[error("the CSI endpoint is empty: set --endpoint to unix:///path/to/csi.sock")]
    NoEndpoint,
    /// A critical server ended by itself.
    #[error("the {0} server ended: {1}")]
    Server(&'static str, String),
}

/// Runs the node plugin until `shutdown`.
pub async fn run_node(options: NodeOptions, shutdown: CancellationToken) -> Result<(), AppError> {
    let csi_path = options.endpoint.path().ok_or(AppError::NoEndpoint)?.to_owned();
    let configuration = NodeConfiguration::of_file(options.config.as_deref());
    let must_be_mounted =
        configuration.as_ref().is_ok_and(|configuration| configuration.cache.require_mountpoint);
    let lock = match lock(&options.state_dir, must_be_mounted, &shutdown).await? {
        StateLock::Held(lock) => Some(lock),
        StateLock::Unavailable => None,
        StateLock::Stopped => return Ok(()),
    };
    // Dropped last: the sockets below are dropped before it.
    let lock = Arc::new(Mutex::new(lock));
    // Leases must be off before the first volume is published.
    options.leases.apply();
    let (content_sender, content) = watch::channel(Err("it is still starting".to_owned()));
    // Nothing is published without a configuration, so the default is never used.
    let mode = configuration.as_ref().map(|found| found.volumes.mount).unwrap_or_default();
    let mut plugin = NodePlugin::new(options, mode, content, shutdown);
    let Some(_csi_socket) = plugin.serve_csi(&csi_path).await? else { return Ok(()) };
    // The store may take long to open. Unpublishing works from here on.
    plugin.open_content(configuration, content_sender, Arc::clone(&lock));
    let _admin_socket = plugin.serve_admin().await;
    plugin.serve_http().await;
    plugin.join_cluster();
    let registration_socket = plugin.serve_registration().await?;
    let ended = plugin.wait().await;
    tracing::info!("stopping: mounts stay, downloads go on after the restart");
    // The kubelet learns it first, and stops sending pods that would only wait.
    drop(registration_socket);
    plugin.drain().await;
    ended
}

/// The parts of a running node plugin.
struct NodePlugin {
    options: NodeOptions,
    metrics: Arc<NodeMetrics>,
    content: watch::Receiver<ContentState>,
    volumes: VolumeManager,
    /// `None` if pulls are not reported as Events.
    events: Option<EventRecorder>,
    /// `None` if the driver does not register itself.
    registration: Option<RegistrationService>,
    health: HealthProbes,
    /// Critical servers: if one ends, the process ends.
    servers: JoinSet<AppError>,
    /// All other tasks.
    tracker: TaskTracker,
    shutdown: CancellationToken,
}

impl NodePlugin {
    fn new(
        options: NodeOptions,
        mode: MountMode,
        content: watch::Receiver<ContentState>,
        shutdown: CancellationToken,
    ) -> Self {
        let tracker = TaskTracker::new();
        let volumes = VolumeManager::new(
            options.state_dir.clone(),
            mounter(&options, mode),
            content.clone(),
            tracker.clone(),
            shutdown.clone(),
        );
        let (driver, node) = (&options.driver_name, &options.node_id);
        let events =
            options.events.then(|| EventRecorder::start(driver, node, &tracker, &shutdown));
        let registration = options.registration_dir().map(|_| RegistrationService {
            driver_name: driver.clone(),
            endpoint: options.kubelet_endpoint(),
            registered: Arc::default(),
        });
        let registered = registration.as_ref().map(|service| Arc::clone(&service.registered));
        let health = HealthProbes::new(content.clone(), registered);
        let (metrics, servers) = (Arc::default(), JoinSet::new());
        Self {
            options,
            metrics,
            content,
            volumes,
            events,
            registration,
            health,
            servers,
            tracker,
            shutdown,
        }
    }

    /// Serves CSI. Returns `None` if `shutdown` comes before the socket is free.
    async fn serve_csi(&mut self, path: &Path) -> Result<Option<ListeningSocket>, AppError> {
        let Some((socket, listener)) = listen(path, LOCK_PATIENCE, &self.shutdown).await? else {
            return Ok(None);
        };
        let identity = IdentityService { driver_name: self.options.driver_name.clone() };
        let node = NodeService {
            node_id: self.options.node_id.clone(),
            node: RequestContext {
                kubelet_dir: self.options.kubelet_dir.clone(),
                selinux: SecurityLabel::is_used_on_this_node(),
            },
            volumes: self.volumes.clone(),
            metrics: Arc::clone(&self.metrics),
            events: self.events.clone(),
        };
        let services = Server::builder()
            .add_service(IdentityServer::new(identity))
            .add_service(NodeServer::new(node));
        self.serve("CSI", services, listener);
        Ok(Some(socket))
    }

    fn serve(&mut self, name: &'static str, services: Router, listener: UnixListener) {
        let shutdown = self.shutdown.clone().cancelled_owned();
        self.servers.spawn(async move {
            let incoming = UnixListenerStream::new(listener);
            let ended = services.serve_with_incoming_shutdown(incoming, shutdown).await;
            let why = ended.map_or_else(|error| error.to_string(), |()| "it was stopped".into());
            AppError::Server(name, why)
        });
    }

    /// Opens and maintains the store in a task of its own, while the sockets are served.
    fn open_content(
        &self,
        configuration: Result<NodeConfiguration, ConfigurationError>,
        content: watch::Sender<ContentState>,
        lock: Arc<Mutex<Option<Lock>>>,
    ) {
        let opener = ContentOpener {
            options: self.options.clone(),
            configuration,
            volumes: self.volumes.clone(),
            metrics: Arc::clone(&self.metrics),
            events: self.events.clone(),
            content,
            lock,
            tracker: self.tracker.clone(),
            shutdown: self.shutdown.clone(),
        };
        self.tracker.spawn(opener.run());
    }

    /// Serves commands. A failure leaves this endpoint off, and the node plugin goes on.
    async fn serve_admin(&mut self) -> Option<ListeningSocket> {
        let path = self.options.admin_endpoint.path()?;
        let (socket, listener) = match listen(path, ADMIN_PATIENCE, &self.shutdown).await {
            Ok(listening) => listening?,
            Err(error) => {
                self.metrics.endpoint_error("admin");
                tracing::error!(endpoint = "admin", %error, "this endpoint stays off");
                return None;
            }
        };
        let service = AdminService {
            node_id: self.options.node_id.clone(),
            driver_name: self.options.driver_name.clone(),
            state_dir: self.options.state_dir.clone(),
            health: self.health.clone(),
            warming: Arc::clone(&self.metrics.warming),
            following: self.metrics.following.clone(),
            scrub: self.metrics.scrub.clone(),
            tracker: self.tracker.clone(),
        };
        let services = Server::builder().add_service(AdminServer::new(service));
        self.serve("admin", services, listener);
        Some(socket)
    }

    /// Serves health and metrics. Logs and counts an endpoint that cannot be listened on.
    async fn serve_http(&self) {
        let endpoints = [
            ("health", &self.options.health_endpoint, self.health.clone().router()),
            ("metrics", &self.options.metrics_endpoint, self.metrics.router()),
        ];
        for (name, address, router) in endpoints {
            if address.is_empty() {
                continue;
            }
            match http_server::serve(address, router, &self.tracker, self.shutdown.clone()).await {
                Ok(local) => tracing::info!(endpoint = name, %local, "listening"),
                Err(error) => {
                    self.metrics.endpoint_error(name);
                    tracing::error!(endpoint = name, address, %error, "cannot listen: this endpoint stays off");
                }
            }
        }
    }

    /// Starts the tasks that need the Kubernetes API: removing the startup taint once the kubelet has registered the
    /// driver, and carrying out preloads.
    fn join_cluster(&self) {
        let (node, shutdown) = (&self.options.node_id, &self.shutdown);
        let taint = self.options.startup_taint.clone();
        if let Some(taint) = taint.filter(|taint| !taint.is_empty()) {
            let driver = self.options.driver_name.clone();
            self.tracker.spawn(remove_startup_taint(node.clone(), driver, taint, shutdown.clone()));
        }
        if self.options.preload {
            let agent = PreloadAgent { node: node.clone(), content: self.content.clone() };
            self.tracker.spawn(agent.run(shutdown.clone()));
        }
    }

    /// Registers the driver with the kubelet once content is available: the kubelet sends calls at once after
    /// registration, for every pod of the node.
    async fn serve_registration(&mut self) -> Result<Option<ListeningSocket>, AppError> {
        let (Some(folder), Some(service)) =
            (self.options.registration_dir(), self.registration.take())
        else {
            return Ok(None);
        };
        let path = folder.join(format!("{}@reg.sock", self.options.driver_name));
        wait_for_content(self.content.clone(), &self.shutdown).await;
        let Some((socket, listener)) = listen(&path, LOCK_PATIENCE, &self.shutdown).await? else {
            return Ok(None);
        };
        let services = Server::builder().add_service(RegistrationServer::new(service));
        self.serve("registration", services, listener);
        Ok(Some(socket))
    }

    /// Waits for `shutdown`, or for the end of a critical server, which is a failure.
    async fn wait(&mut self) -> Result<(), AppError> {
        tokio::select! {
            // After `shutdown` the servers end as well, which is no failure.
            biased;
            () = self.shutdown.cancelled() => Ok(()),
            // Without one of its servers the process would run and serve no pod.
            Some(ended) = self.servers.join_next() => Err(ended
                .unwrap_or_else(|error| AppError::Server("CSI", error.to_string()))),
        }
    }

    /// Waits for calls and work to end, at most [`SHUTDOWN_PATIENCE`].
    async fn drain(mut self) {
        self.shutdown.cancel();
        let drained = async {
            while self.servers.join_next().await.is_some() {}
            self.tracker.close();
            self.tracker.wait().await;
        };
        if tokio::time::timeout(SHUTDOWN_PATIENCE, drained).await.is_err() {
            tracing::warn!(
                "some work did not end in time and is cut off; nothing of it has a name yet"
            );
        }
    }
}

/// Chooses the mount method for this node's kernel.
fn mounter(options: &NodeOptions, mode: MountMode) -> VolumeMounter {
    let staging = options.state_dir.join("mounts");
    let method = if options.staged_mounts {
        AttachMethod::Staged(staging)
    } else {
        AttachMethod::detect(&staging)
    };
    let mounter = VolumeMounter::new(method, mode);
    if !mounter.has_overlay {
        tracing::warn!("this kernel has no overlayfs: volumes without readOnly: true are refused");
    }
    mounter
}

/// The outcome of taking the state directory's lock at the start.
enum StateLock {
    Held(Lock),
    /// The disk fails. Calls that need no store are served without it.
    Unavailable,
    /// `shutdown` came first.
    Stopped,
}

/// Waits for the lock of the state directory.
async fn lock(
    root: &Path,
    must_be_mounted: bool,
    shutdown: &CancellationToken,
) -> Result<StateLock, AppError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    let mut is_logged = false;
    loop {
        match content_startup::acquire(root, must_be_mounted) {
            Ok(lock) => return Ok(StateLock::Held(lock)),
            Err(error @ StoreError::Locked { .. }) => {
                if Instant::now() >= deadline {
                    return Err(error.into());
                }
                if !std::mem::replace(&mut is_logged, true) {
                    tracing::info!(%error, "waiting for the state directory");
                }
            }
            Err(error) => {
                // A broken disk must not keep pods in Terminating: calls that need no store are served.
                tracing::error!(%error, "the state directory cannot be locked");
                return Ok(StateLock::Unavailable);
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LOCK_INTERVAL) => {}
            () = shutdown.cancelled() => return Ok(StateLock::Stopped),
        }
    }
}

/// Listens on a socket, once no other process does. Returns `None` if `shutdown` comes first.
async fn listen(
    path: &Path,
    patience: Duration,
    shutdown: &CancellationToken,
) -> Result<Option<(ListeningSocket, UnixListener)>, AppError> {
    let deadline = Instant::now() + patience;
    let mut is_logged = false;
    while !shutdown.is_cancelled() {
        match ListeningSocket::listen(path).await {
            Ok(listening) => return Ok(Some(listening)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                if !std::mem::replace(&mut is_logged, true) {
                    tracing::info!(path = %path.display(), %error, "waiting for the socket");
                }
            }
            Err(source) => return Err(AppError::Listen { path: path.to_owned(), source }),
        }
        tokio::select! {
            () = tokio::time::sleep(LOCK_INTERVAL) => {}
            () = shutdown.cancelled() => {}
        }
    }
    Ok(None)
}

/// Returns when content is available, when it is known not to come soon, or at shutdown.
async fn wait_for_content(
    mut content: watch::Receiver<ContentState>,
    shutdown: &CancellationToken,
) {
    tokio::select! {
        // Any first state ends the wait, and so does the time: a driver that cannot publish must still be there to
        // unpublish.
        _ = content.changed() => {}
        () = tokio::time::sleep(REGISTRATION_PATIENCE) => {}
        () = shutdown.cancelled() => {}
    }
}
