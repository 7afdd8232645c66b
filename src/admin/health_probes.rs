//! `/healthz` reports whether the process responds: if it does, a restart would not help. `/readyz` reports whether
//! this node can serve pods: the driver is registered with the kubelet, recovery has ended, and the state directory can
//! be written.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::sync::{Semaphore, watch};

use crate::volume::ContentState;

/// The limit on a write to the disk. Less than a probe's default `timeoutSeconds` of 1.
const DISK_PATIENCE: Duration = Duration::from_millis(800);

/// The state that readiness depends on.
#[derive(Clone)]
pub struct HealthProbes {
    /// The content, or the reason why it cannot be served.
    pub content: watch::Receiver<ContentState>,
    /// Set by the kubelet; `None` if another program registers the driver.
    pub registered: Option<Arc<AtomicBool>>,
    /// One write at a time: each that hangs with its disk keeps a blocking thread.
    probing: Arc<Semaphore>,
}

impl HealthProbes {
    /// Returns the probes of this state.
    pub fn new(
        content: watch::Receiver<ContentState>,
        registered: Option<Arc<AtomicBool>>,
    ) -> Self {
        Self { content, registered, probing: Arc::new(Semaphore::new(1)) }
    }

    /// Returns the routes of both probes.
    pub fn router(self) -> Router {
        let ready = move || {
            let health = self.clone();
            async move {
                match health.ready().await {
                    Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
                    Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
                }
            }
        };
        Router::new().route("/healthz", get(|| async { "ok\n" })).route("/readyz", get(ready))
    }

    /// Fails with the reason why this node cannot serve pods.
    pub async fn ready(&self) -> Result<(), String> {
        let store = self.content.borrow().clone()?.store;
        match &self.registered {
            Some(registered) if !registered.load(Ordering::SeqCst) => {
                return Err("not registered with the kubelet yet".to_owned());
            }
            _ => {}
        }
        // A response must come also if the disk hangs.
        let probe = async {
            let permit = Arc::clone(&self.probing).acquire_owned().await;
            let probe = move || {
                let _permit = permit;
                store.probe()
            };
            tokio::task::spawn_blocking(probe).await
        };
        match tokio::time::timeout(DISK_PATIENCE, probe).await {
            Ok(Ok(probed)) => probed.map_err(|error| error.to_string()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("the state directory's disk does not answer".to_owned()),
        }
    }
}
