//! The controller: one process of the cluster that turns preloads into wishes of nodes.
//!
//! ```text
//! lease    which process leads
//! watch    what the API server tells -> the planner's facts
//! look     what a reference means, and what the secrets have for its registry
//! fleet    facts -> plan -> writes, again and again
//! write    one write, and what its failure means
//! events   what people are told of a preload, once each
//! pace     how fast may be written
//! metrics  what it counts
//! ```
//!
//! All that it knows is read from the API server and the registries; killed at any point, it goes on from there.
//! Writes carry the version of what they change, so that one who leads no more changes nothing.

mod events;
pub mod fleet;
pub mod lease;
pub mod look;
pub mod metrics;
mod pace;
mod watch;
mod write;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use kube::Client;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use crate::plan::facts::NamespaceQuota;
pub use fleet::{Fleet, Pace};
pub use lease::Elector;
pub use look::{Look, Looker};
pub use metrics::FleetMetrics;
use telemetry::http;

/// Calls under way get this long to end.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(8);

/// How the controller runs.
#[derive(Clone, Debug)]
pub struct ControllerOptions {
    /// Of this process, among all that could lead.
    pub identity: String,
    /// Where the lease is.
    pub namespace: String,
    /// The lease's name.
    pub lease: String,
    /// Where health is served; none turns it off.
    pub health_endpoint: Option<String>,
    /// Where metrics are served; none turns it off.
    pub metrics_endpoint: Option<String>,
    /// How fast it writes.
    pub pace: Pace,
    /// What the preloads of one namespace may take.
    pub quota: NamespaceQuota,
}

/// Runs until `shutdown`: leads whenever nobody else does.
pub async fn run(
    client: Client,
    look: Arc<dyn Look>,
    options: ControllerOptions,
    shutdown: CancellationToken,
) {
    let metrics = Arc::new(FleetMetrics::default());
    let tracker = TaskTracker::new();
    // Whoever stands by is as ready as whoever leads: he takes over within seconds.
    let health = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(|| async { "ok\n" }));
    let endpoints = [
        ("health", &options.health_endpoint, health),
        ("metrics", &options.metrics_endpoint, metrics.router()),
    ];
    for (name, address, router) in endpoints {
        let Some(address) = address else { continue };
        match http::serve(address, router, &tracker, shutdown.clone()).await {
            Ok(local) => tracing::info!(endpoint = name, %local, "listening"),
            Err(error) => {
                tracing::error!(endpoint = name, address, %error, "cannot listen: this endpoint stays off");
            }
        }
    }
    let elector = Elector::new(&client, &options.namespace, &options.lease, &options.identity);
    while !shutdown.is_cancelled() {
        let Some(leading) = elector.lead(&shutdown).await else { break };
        tracing::info!(identity = options.identity, "leading");
        metrics.leads(true);
        let fleet =
            Fleet::new(client.clone(), Arc::clone(&look), options.pace, Arc::clone(&metrics));
        let fleet = fleet.with_quota(options.quota);
        fleet.run(leading.lost().clone()).await;
        metrics.leads(false);
        leading.end().await;
        tracing::info!("leading no more");
    }
    tracker.close();
    let _ = tokio::time::timeout(SHUTDOWN_PATIENCE, tracker.wait()).await;
}
