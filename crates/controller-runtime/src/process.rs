//! The process of the controllers: its endpoints, and the tasks that run while it leads.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use futures_util::future::{BoxFuture, select_all};
use kube::Client;
use telemetry::http_server;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::ControllerMetrics;
use crate::leader_election::LeaderElection;

/// Time for calls to end at shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(8);

/// Options of the process.
#[derive(Clone, Debug)]
pub struct ProcessOptions {
    /// Identity of this process, unique among all that could lead.
    pub identity: String,
    /// Namespace of the lease.
    pub namespace: String,
    /// Name of the lease.
    pub lease: String,
    /// Address of the health endpoint; `None` disables it.
    pub health_endpoint: Option<String>,
    /// Address of the metrics endpoint; `None` disables it.
    pub metrics_endpoint: Option<String>,
}

/// Work of the leader. It is started at each begin of leadership, with a token that is cancelled
/// at the end. All work ends as soon as one task does.
pub struct LeaderTask(Box<dyn Fn(CancellationToken) -> BoxFuture<'static, ()> + Send + Sync>);

impl fmt::Debug for LeaderTask {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("LeaderTask")
    }
}

impl LeaderTask {
    /// Creates the work of the leader from a function that starts it.
    pub fn new(
        start: impl Fn(CancellationToken) -> BoxFuture<'static, ()> + Send + Sync + 'static,
    ) -> Self {
        Self(Box::new(start))
    }
}

/// Runs until `shutdown`, and leads whenever no other process does.
pub async fn run(
    client: Client,
    options: ProcessOptions,
    metrics: &ControllerMetrics,
    metrics_router: Router,
    tasks: &[LeaderTask],
    shutdown: CancellationToken,
) {
    let tracker = TaskTracker::new();
    // A standby process is ready too: it takes over within seconds.
    let health = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(|| async { "ok\n" }));
    let endpoints = [
        ("health", &options.health_endpoint, health),
        ("metrics", &options.metrics_endpoint, metrics_router),
    ];
    for (name, address, router) in endpoints {
        let Some(address) = address else { continue };
        match http_server::serve(address, router, &tracker, shutdown.clone()).await {
            Ok(local) => tracing::info!(endpoint = name, %local, "listening"),
            Err(error) => {
                tracing::error!(endpoint = name, address, %error, "cannot listen: this endpoint stays off");
            }
        }
    }
    let (namespace, lease) = (&options.namespace, &options.lease);
    let election = Arc::new(LeaderElection::new(&client, namespace, lease, &options.identity));
    while !shutdown.is_cancelled() {
        let Some(leadership) = election.lead(&shutdown).await else { break };
        tracing::info!(identity = options.identity, "leading");
        metrics.set_leader(true);
        select_all(tasks.iter().map(|LeaderTask(start)| start(leadership.lost.clone()))).await;
        metrics.set_leader(false);
        leadership.end().await;
        tracing::info!("leading no more");
    }
    tracker.close();
    let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, tracker.wait()).await;
}
