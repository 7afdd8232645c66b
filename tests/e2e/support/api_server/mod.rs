//! A simulated API server, as far as preloads and claims need one: versions, conflicts, watches with bookmarks that
//! break, 410 for expired versions, 429 on demand, subresources, merge patches, defaults, and schemas that refuse objects.
//!
//! ```text
//! store   objects and their history
//! answer  requests
//! schema  validation by the definitions
//! ```
//!
//! It listens on a port for real programs. Writes of thousands of simulated nodes come from the caller's process.

mod answer;
mod schema;
mod store;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
};

use axum::body::Body;
use http::{Request, Response};
use serde_json::Value;

use store::Store;
pub use store::{Counts, Fault, Kind};

/// The API server. Clones share everything.
#[derive(Clone)]
pub struct ApiServer(Arc<Mutex<Store>>);

impl ApiServer {
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Store::new())))
    }

    /// Listens on a free port of the loopback, on a thread of its own that ends with the process.
    pub fn listen(&self) -> SocketAddr {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("a socket");
        let address = listener.local_addr().expect("its address");
        let server = self.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                let router = axum::Router::new().fallback(move |request: Request<Body>| {
                    let server = server.clone();
                    async move { server.handle(request).await }
                });
                axum::serve(listener, router).await.expect("served");
            });
        });
        address
    }

    /// Answers one request.
    pub async fn handle(&self, request: Request<Body>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let body = axum::body::to_bytes(body, usize::MAX).await.expect("a body");
        answer::answer(&mut self.store(), &parts, &body)
    }

    /// Creates or replaces an object, as a user with all rights.
    #[track_caller]
    pub fn apply(&self, object: Value) {
        self.store().apply(object).expect("a valid object");
    }

    /// Creates or replaces an object. Returns the refusal of an invalid one.
    pub fn try_apply(&self, object: Value) -> Result<(), String> {
        self.store().apply(object)
    }

    pub fn delete(&self, kind: Kind, namespace: &str, name: &str) {
        self.store().delete(kind, namespace, name);
    }

    /// Returns an object, or null.
    pub fn get(&self, kind: Kind, namespace: &str, name: &str) -> Value {
        self.store().get(kind, namespace, name).unwrap_or_default()
    }

    pub fn list(&self, kind: Kind) -> Vec<Value> {
        self.store().list(kind)
    }

    /// Sets a node's condition Ready, as the kubelet or the node controller does.
    #[track_caller]
    pub fn set_node_ready(&self, name: &str, is_ready: bool) {
        let mut node = self.get(Kind::Node, "", name);
        let status = if is_ready { "True" } else { "Unknown" };
        node["status"] = serde_json::json!({"conditions": [{"type": "Ready", "status": status}]});
        self.store().replace(Kind::Node, "", name, node).expect("a node");
    }

    /// Ends all watches, as a restart of the server does.
    pub fn break_watches(&self) {
        self.store().break_watches();
    }

    /// Deletes the history: watches from earlier versions get 410.
    pub fn forget_history(&self) {
        self.store().forget_history();
    }

    /// Replaces the definition by an older one, without this field of the status.
    pub fn forget_field(&self, kind: Kind, field: &str) {
        self.store().schemas.forget(kind, field);
    }

    /// Fails the next requests that match.
    pub fn fail(&self, fault: Fault) {
        self.store().faults.push(fault);
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[allow(dead_code, reason = "for benches alone, which share this with the tests")]
impl ApiServer {
    /// Returns a stream of every object of a kind, whenever it is created or changed.
    pub fn changes(&self, kind: Kind) -> tokio::sync::mpsc::UnboundedReceiver<Value> {
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
        self.store().listeners.push((kind, sender));
        receiver
    }

    /// Writes a status as a node does, without a client.
    pub async fn patch_status(&self, kind: Kind, name: &str, change: &Value) {
        let (group, plural, _, _) = kind.about();
        let request = Request::patch(format!("/apis/{group}/{plural}/{name}/status"))
            .header("content-type", "application/merge-patch+json")
            .body(Body::from(change.to_string()))
            .expect("a request");
        self.handle(request).await;
    }

    /// Returns the counts of writes so far.
    pub fn counts(&self) -> Counts {
        self.store().counts
    }
}
