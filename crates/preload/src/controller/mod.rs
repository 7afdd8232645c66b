//! The controller: one process of the cluster that assigns artifacts to nodes.
//!
//! ```text
//! leader_election     leader election
//! api_watch           watches of the API server -> facts of the planner
//! reference_resolver  resolution of references and of credentials
//! reconciler the reconciliation loop: facts -> plan -> writes
//! api_write           one write, and the meaning of its failure
//! preload_events      events of preloads, one for each transition
//! api_rate_limit      write rate limit
//! controller_metrics  metrics of the controller
//! ```
//!
//! All facts are read from the API server and the registries: a restarted controller continues
//! where the last one ended. Writes carry the version of the object that they change, so that a
//! process that has lost leadership changes nothing.

mod api_rate_limit;
mod api_watch;
mod api_write;
pub mod controller_metrics;
pub mod leader_election;
mod preload_events;
pub mod reconciler;
pub mod reference_resolver;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use kube::Client;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use crate::plan::cluster_facts::NamespaceQuota;
pub use controller_metrics::ControllerMetrics;
pub use leader_election::LeaderElection;
pub use reconciler::{ControllerPace, PreloadReconciler};
pub use reference_resolver::{ReferenceResolver, RegistryResolver};
use telemetry::http_server;

/// Time for calls to end at shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(8);

/// Options of the controller.
#[derive(Clone, Debug)]
pub struct ControllerOptions {
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
    /// Write rate of the controller.
    pub pace: ControllerPace,
    /// Quota of each namespace.
    pub quota: NamespaceQuota,
}

/// Runs until `shutdown`, and leads whenever no other process does.
pub async fn run(
    client: Client,
    resolver: Arc<dyn ReferenceResolver>,
    options: ControllerOptions,
    shutdown: CancellationToken,
) {
    let metrics = Arc::new(ControllerMetrics::default());
    let tracker = TaskTracker::new();
    // A standby process is ready too: it takes over within seconds.
    let health = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(|| async { "ok\n" }));
    let endpoints = [
        ("health", &options.health_endpoint, health),
        ("metrics", &options.metrics_endpoint, metrics.router()),
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
        let reconciler = PreloadReconciler::new(
            client.clone(),
            Arc::clone(&resolver),
            options.pace,
            options.quota,
            Arc::clone(&metrics),
        );
        reconciler.run(leadership.lost.clone()).await;
        metrics.set_leader(false);
        leadership.end().await;
        tracing::info!("leading no more");
    }
    tracker.close();
    let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, tracker.wait()).await;
}
