//! Builds every part once, and owns what ends them all.
//!
//! ```text
//! lock       the state directory's, waited for before any socket is touched
//! sockets    CSI first, then health and metrics, the registration last
//! content    opened beside: the CSI socket answers while the store recovers
//! shutdown   stop accepting; waiting calls get UNAVAILABLE; mounts stay; exit within 10 s
//! ```

mod content;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tonic::transport::server::Router;

pub use content::content_of;

use crate::admin::health::Health;
use crate::admin::metrics::Metrics;
use crate::admin::service::AdminService;
use crate::config::NodeConfiguration;
use crate::csi::Endpoint;
use crate::csi::identity::IdentityService;
use crate::csi::node::NodeService;
use crate::csi::registration::RegistrationService;
use crate::csi::request::Node;
use crate::csi::socket::Socket;
use crate::file_leases::LeasePolicy;
use crate::kubernetes::{PodEvents, take_taint};
use crate::node_artifacts::NodePart;
use crate::proto::admin::admin_server::AdminServer;
use crate::proto::csi::v1::identity_server::IdentityServer;
use crate::proto::csi::v1::node_server::NodeServer;
use crate::proto::pluginregistration::registration_server::RegistrationServer;
use crate::volume::form::MountMode;
use crate::volume::{ContentState, Mounter, Volumes};
use content::Opening;
use store::lock::Lock;
use store::{SecurityLabel, StoreError};
use sys::mount::AttachMethod;
use telemetry::http;

/// How long a new process waits for the old one to go.
const LOCK_PATIENCE: Duration = Duration::from_secs(30);
/// How often the lock, or a socket, is tried meanwhile.
const LOCK_INTERVAL: Duration = Duration::from_millis(100);
/// How long the admin socket may delay the start: the process that holds it may be ending.
const ADMIN_PATIENCE: Duration = Duration::from_secs(2);
/// The kubelet sends no unpublish to a driver that is not registered.
const REGISTRATION_PATIENCE: Duration = Duration::from_secs(10);
/// Calls and disk work get this long to end; the promise is to be gone within ten seconds.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(8);

/// How the node plugin runs.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// The CSI socket.
    pub endpoint: Endpoint,
    /// The Node object's name.
    pub node_id: String,
    /// The CSI driver's name.
    pub driver_name: String,
    /// Where content lies.
    pub state_dir: PathBuf,
    /// The kubelet's folder.
    pub kubelet_dir: PathBuf,
    /// The kubelet's plugin registry; none turns self-registration off.
    pub registration_dir: Option<PathBuf>,
    /// The CSI socket's path as the kubelet sees it.
    pub kubelet_endpoint: String,
    /// Where commands reach the node plugin.
    pub admin_endpoint: Endpoint,
    /// Where health is served; none turns it off.
    pub health_endpoint: Option<String>,
    /// Where metrics are served; none turns it off.
    pub metrics_endpoint: Option<String>,
    /// The configuration file.
    pub config: Option<PathBuf>,
    /// The key of a taint that this node starts with; none where nodes have no such taint.
    pub startup_taint: Option<String>,
    /// Whether preloads are carried out on this node.
    pub fleet: bool,
    /// Whether pods are told of their pulls by Events.
    pub events: bool,
    /// What is done with file leases on the node.
    pub leases: LeasePolicy,
    /// Forces the mounts of old kernels, for tests.
    pub staged_mounts: bool,
}

/// Why the node plugin ended.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The state directory is in use.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A socket that the driver is nothing without.
    #[error("cannot listen at {}: {source}", path.display())]
    Listen {
        /// Which.
        path: PathBuf,
        /// The kernel's answer.
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
    let metrics = Arc::new(Metrics::default());
    let configuration = match &options.config {
        Some(path) => NodeConfiguration::read(path),
        None => Ok(NodeConfiguration::without_file()),
    };
    let must_be_mounted =
        configuration.as_ref().is_ok_and(|configuration| configuration.cache.require_mountpoint);
    let lock = lock(&options.state_dir, must_be_mounted, &shutdown).await?;
    let Some(lock) = lock else { return Ok(()) };
    let lock = Arc::new(Mutex::new(lock));
    // Before the first volume is published.
    options.leases.apply();
    let tracker = TaskTracker::new();
    let (content_sender, content) = watch::channel(Err("it is still starting".to_owned()));
    // Without a configuration nothing is published.
    let mode = configuration.as_ref().map(|found| found.volumes.mount).unwrap_or_default();
    let volumes = Volumes::new(
        options.state_dir.clone(),
        mounter(&options, mode),
        content.clone(),
        tracker.clone(),
        shutdown.clone(),
    );
    let node = Node {
        kubelet_dir: options.kubelet_dir.clone(),
        selinux: SecurityLabel::is_used_on_this_node(),
    };
    let listening = listen(&csi_path, LOCK_PATIENCE, &shutdown).await?;
    let Some((csi_socket, listener)) = listening else { return Ok(()) };
    let events = pod_events(&options, &tracker, &shutdown);
    let csi = Server::builder()
        .add_service(IdentityServer::new(IdentityService {
            driver_name: options.driver_name.clone(),
        }))
        .add_service(NodeServer::new(NodeService {
            node_id: options.node_id.clone(),
            node,
            volumes: volumes.clone(),
            metrics: Arc::clone(&metrics),
            events: events.clone(),
        }));
    let mut servers = JoinSet::new();
    servers.spawn(serve("CSI", csi, listener, shutdown.clone()));
    // The store may take its time: unpublishing works from here on.
    let opening = Opening {
        options: options.clone(),
        configuration,
        volumes,
        metrics: Arc::clone(&metrics),
        events,
        content: content_sender,
        lock: Arc::clone(&lock),
        tracker: tracker.clone(),
        shutdown: shutdown.clone(),
    };
    tracker.spawn(opening.run());
    let registration = options.registration_dir.as_ref().map(|folder| {
        let (name, endpoint) = (options.driver_name.clone(), options.kubelet_endpoint.clone());
        let path = folder.join(RegistrationService::socket_name(&name));
        (path, RegistrationService::new(name, endpoint))
    });
    let registered = registration.as_ref().map(|(_, service)| service.registered());
    let admin_socket = serve_admin(
        &options,
        &content,
        registered.clone(),
        &metrics,
        &tracker,
        &mut servers,
        &shutdown,
    )
    .await;
    let health = Health { content: content.clone(), registered }.router();
    serve_http(&options, health, &metrics, &tracker, &shutdown).await;
    take_part_in_the_cluster(&options, &content, &tracker, &shutdown);
    let mut registration_socket = None;
    if let Some((path, service)) = registration {
        // A kubelet that registers us calls us at once, and every pod of the node follows: content first.
        wait_for_content(content, &shutdown).await;
        if let Some((socket, listener)) = listen(&path, LOCK_PATIENCE, &shutdown).await? {
            let server = Server::builder().add_service(RegistrationServer::new(service));
            servers.spawn(serve("registration", server, listener, shutdown.clone()));
            registration_socket = Some(socket);
        }
    }
    let ended = tokio::select! {
        // Told to stop, the servers end as well: that is no failure.
        biased;
        () = shutdown.cancelled() => Ok(()),
        // A server that ends while nobody asked leaves a driver that looks alive and is not.
        Some(ended) = servers.join_next() => Err(ended
            .unwrap_or_else(|error| AppError::Server("CSI", error.to_string()))),
    };
    tracing::info!("stopping: mounts stay, downloads go on after the restart");
    // The kubelet is told first: it stops sending pods that would only wait.
    drop(registration_socket);
    shutdown.cancel();
    drain(servers, &tracker).await;
    drop(admin_socket);
    drop(csi_socket);
    drop(lock);
    ended
}

/// Chooses how this node's kernel makes mounts.
fn mounter(options: &NodeOptions, mode: MountMode) -> Mounter {
    let staging = options.state_dir.join("mounts");
    let method = if options.staged_mounts {
        AttachMethod::Staged(staging)
    } else {
        AttachMethod::detect(&staging)
    };
    let mounter = Mounter::new(method, mode);
    if !mounter.has_overlay() {
        tracing::warn!("this kernel has no overlayfs: volumes without readOnly: true are refused");
    }
    mounter
}

/// Where pods are told of their pulls, what tells them.
fn pod_events(
    options: &NodeOptions,
    tracker: &TaskTracker,
    shutdown: &CancellationToken,
) -> Option<PodEvents> {
    let (driver, node) = (&options.driver_name, &options.node_id);
    options.events.then(|| PodEvents::start(driver, node, tracker, shutdown))
}

/// Waits for calls and work to end, but not for ever.
async fn drain(mut servers: JoinSet<AppError>, tracker: &TaskTracker) {
    let drained = async {
        while servers.join_next().await.is_some() {}
        tracker.close();
        tracker.wait().await;
    };
    if tokio::time::timeout(SHUTDOWN_PATIENCE, drained).await.is_err() {
        tracing::warn!(
            "some work did not end in time and is cut off; nothing of it has a name yet"
        );
    }
}

/// Starts what asks the Kubernetes API, beside everything else: where nodes start with a taint, it goes once the kubelet has
/// registered the driver; and what preloads want of this node is carried out.
fn take_part_in_the_cluster(
    options: &NodeOptions,
    content: &watch::Receiver<ContentState>,
    tracker: &TaskTracker,
    shutdown: &CancellationToken,
) {
    if let Some(taint) = options.startup_taint.clone() {
        let (node, driver) = (options.node_id.clone(), options.driver_name.clone());
        tracker.spawn(take_taint(node, driver, taint, shutdown.clone()));
    }
    if options.fleet {
        let part = NodePart { node: options.node_id.clone(), content: content.clone() };
        tracker.spawn(part.run(shutdown.clone()));
    }
}

/// Health and metrics; one that cannot be listened on is logged and counted.
async fn serve_http(
    options: &NodeOptions,
    health: axum::Router,
    metrics: &Arc<Metrics>,
    tracker: &TaskTracker,
    shutdown: &CancellationToken,
) {
    let endpoints = [
        ("health", &options.health_endpoint, health),
        ("metrics", &options.metrics_endpoint, metrics.router()),
    ];
    for (name, address, router) in endpoints {
        let Some(address) = address else { continue };
        match http::serve(address, router, tracker, shutdown.clone()).await {
            Ok(local) => tracing::info!(endpoint = name, %local, "listening"),
            Err(error) => {
                metrics.endpoint_error(name);
                tracing::error!(endpoint = name, address, %error, "cannot listen: this endpoint stays off");
            }
        }
    }
}

/// The admin socket is a convenience: the node goes on without it.
async fn serve_admin(
    options: &NodeOptions,
    content: &watch::Receiver<ContentState>,
    registered: Option<Arc<AtomicBool>>,
    metrics: &Metrics,
    tracker: &TaskTracker,
    servers: &mut JoinSet<AppError>,
    shutdown: &CancellationToken,
) -> Option<Socket> {
    let path = options.admin_endpoint.path()?;
    let (socket, listener) = match listen(path, ADMIN_PATIENCE, shutdown).await {
        Ok(listening) => listening?,
        Err(error) => {
            metrics.endpoint_error("admin");
            tracing::error!(endpoint = "admin", %error, "this endpoint stays off");
            return None;
        }
    };
    let service = AdminService {
        node_id: options.node_id.clone(),
        driver_name: options.driver_name.clone(),
        state_dir: options.state_dir.clone(),
        content: content.clone(),
        registered,
        warming: metrics.warming().clone(),
        scrub: metrics.scrub().clone(),
        tracker: tracker.clone(),
    };
    let server = Server::builder().add_service(AdminServer::new(service));
    servers.spawn(serve("admin", server, listener, shutdown.clone()));
    Some(socket)
}

/// Waits for the state directory; none when told to stop meanwhile.
async fn lock(
    root: &Path,
    must_be_mounted: bool,
    shutdown: &CancellationToken,
) -> Result<Option<Option<Lock>>, AppError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    let mut told = false;
    loop {
        match content::acquire(root, must_be_mounted) {
            Ok(lock) => return Ok(Some(Some(lock))),
            Err(error @ StoreError::Locked { .. }) => {
                if Instant::now() >= deadline {
                    return Err(error.into());
                }
                if !std::mem::replace(&mut told, true) {
                    tracing::info!(%error, "waiting for the state directory");
                }
            }
            Err(error) => {
                // A broken disk must not keep pods in Terminating: serve what needs no store.
                tracing::error!(%error, "the state directory cannot be locked");
                return Ok(Some(None));
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LOCK_INTERVAL) => {}
            () = shutdown.cancelled() => return Ok(None),
        }
    }
}

/// Listens on a socket, once no other process does; none when told to stop meanwhile.
async fn listen(
    path: &Path,
    patience: Duration,
    shutdown: &CancellationToken,
) -> Result<Option<(Socket, UnixListener)>, AppError> {
    let deadline = Instant::now() + patience;
    let mut is_logged = false;
    while !shutdown.is_cancelled() {
        match Socket::listen(path).await {
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

async fn serve(
    name: &'static str,
    server: Router,
    listener: UnixListener,
    shutdown: CancellationToken,
) -> AppError {
    let incoming = UnixListenerStream::new(listener);
    let ended = server.serve_with_incoming_shutdown(incoming, shutdown.cancelled_owned()).await;
    AppError::Server(
        name,
        ended.map_or_else(|error| error.to_string(), |()| "it was stopped".into()),
    )
}

/// Returns when content is there, when it is known not to come soon, or at shutdown.
async fn wait_for_content(
    mut content: watch::Receiver<ContentState>,
    shutdown: &CancellationToken,
) {
    tokio::select! {
        // Any first word will do, and none for long as well: a driver that cannot publish must
        // still be there to unpublish.
        _ = content.changed() => {}
        () = tokio::time::sleep(REGISTRATION_PATIENCE) => {}
        () = shutdown.cancelled() => {}
    }
}
