//! `/healthz` says whether a restart would help: that it answers is the answer.
//! `/readyz` says whether this node can serve pods: registered with the kubelet,
//! and content can be served.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::sync::watch;

use crate::volume::ContentState;

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
        let ready = move || {
            let answer = self.ready();
            async move {
                match answer {
                    Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
                    Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
                }
            }
        };
        Router::new().route("/healthz", get(|| async { "ok\n" })).route("/readyz", get(ready))
    }

    fn ready(&self) -> Result<(), String> {
        if let Err(reason) = &*self.content.borrow() {
            return Err(reason.clone());
        }
        match &self.registered {
            Some(registered) if !registered.load(Ordering::SeqCst) => {
                Err("not registered with the kubelet yet".to_owned())
            }
            _ => Ok(()),
        }
    }
}
