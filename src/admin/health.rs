//! `/healthz` says whether a restart would help: that it answers is the answer.
//! `/readyz` says whether this node can serve pods: registered with the kubelet,
//! recovery has ended, and the state directory can be written.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::sync::{Semaphore, watch};

use crate::volume::ContentState;

/// Less than a probe of the kubelet waits when it is told nothing.
const DISK_PATIENCE: Duration = Duration::from_millis(800);

/// What readiness depends on.
#[derive(Clone)]
pub struct Health {
    /// Whether content can be served.
    pub content: watch::Receiver<ContentState>,
    /// Set by the kubelet; none when somebody else registers the driver.
    pub registered: Option<Arc<AtomicBool>>,
}

impl Health {
    /// The routes.
    pub fn router(self) -> Router {
        // One at a time: each that is left behind by a disk that hangs would keep a blocking thread.
        let probing = Arc::new(Semaphore::new(1));
        let ready = move || {
            let (health, probing) = (self.clone(), Arc::clone(&probing));
            async move {
                match health.ready(probing).await {
                    Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
                    Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
                }
            }
        };
        Router::new().route("/healthz", get(|| async { "ok\n" })).route("/readyz", get(ready))
    }

    async fn ready(&self, probing: Arc<Semaphore>) -> Result<(), String> {
        let store = self.content.borrow().clone()?.store;
        match &self.registered {
            Some(registered) if !registered.load(Ordering::SeqCst) => {
                return Err("not registered with the kubelet yet".to_owned());
            }
            _ => {}
        }
        // A disk that hangs must not hang the answer.
        let probe = async {
            let permit = probing.acquire_owned().await;
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
