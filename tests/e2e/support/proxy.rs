//! A proxy in front of a registry that counts requests, holds them back, and can be down.

use std::{
    io,
    net::{Shutdown, SocketAddr},
    os::fd::AsFd as _,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{StatusCode, header},
    response::Response,
};
use futures_util::{Stream, StreamExt as _, stream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::watch,
};

use super::{Port, Registry, stop_listening};

/// A request that was forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardedRequest {
    pub method: String,
    pub path: String,
    pub authorized: bool,
    pub ranged: bool,
}

/// A registry as the driver sees it.
pub struct Proxy {
    port: Port,
    shared: Arc<Shared>,
    server: Mutex<Option<Server>>,
}

struct Shared {
    upstream: String,
    client: reqwest::Client,
    passed: Mutex<Vec<ForwardedRequest>>,
    gate: Mutex<Option<Arc<Gate>>>,
}

/// Holds back the bodies of blobs: each sends its first half, then waits.
pub struct Gate {
    open: watch::Sender<bool>,
    waiting: AtomicUsize,
}

impl Gate {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { open: watch::Sender::new(false), waiting: AtomicUsize::new(0) })
    }

    /// Returns the number of bodies that have stopped at the gate so far.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    /// Lets all bodies pass, current and future ones.
    pub fn open(&self) {
        self.open.send_replace(true);
    }

    pub(super) async fn pass(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        // The sender lives as long as the gate.
        let _ = self.open.subscribe().wait_for(|open| *open).await;
    }
}

/// A server on a thread of its own, so that tests may block.
pub struct Server {
    stop: watch::Sender<bool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    /// Serves on this address (port 0: any). Returns the actual address. Its end closes all connections.
    pub fn start(address: SocketAddr, router: Router) -> (Self, SocketAddr) {
        let (stop, mut stopped) = watch::channel(false);
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            super::block_on(async {
                let listener = Listener(listen(address).await);
                let copy = listener.0.as_fd().try_clone_to_owned().expect("a copy of the socket");
                let _ = sender.send(listener.0.local_addr().expect("an address"));
                tokio::select! {
                    result = axum::serve(listener, router) => result.expect("the server"),
                    _ = stopped.wait_for(|stopped| *stopped) => {}
                }
                stop_listening(copy);
            });
            // The runtime is dropped here, and every connection with it.
        });
        let address = receiver.recv().expect("the server's address");
        (Self { stop, thread: Some(thread) }, address)
    }
}

/// A listener whose connections end when they are dropped, also where a process that another thread has just forked
/// still holds copies of them.
struct Listener(tokio::net::TcpListener);

struct Connection(TcpStream);

impl axum::serve::Listener for Listener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let (stream, address) = axum::serve::Listener::accept(&mut self.0).await;
        (Connection(stream), address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let copy = self.0.as_fd().try_clone_to_owned().expect("a copy of the socket");
        // The peer may have ended it before.
        let _ = std::net::TcpStream::from(copy).shutdown(Shutdown::Both);
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

/// Listens on an address. A process that another thread has just forked holds the previous listener until it executes
/// its program.
async fn listen(address: SocketAddr) -> tokio::net::TcpListener {
    for _ in 0..1000 {
        match tokio::net::TcpListener::bind(address).await {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            listener => return listener.expect("a port"),
        }
    }
    panic!("the port of {address} stays in use");
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Proxy {
    pub fn new(registry: &Registry) -> Self {
        install_tls_provider();
        let shared = Arc::new(Shared {
            upstream: format!("http://{}", registry.address()),
            client: reqwest::Client::builder().no_proxy().build().expect("an HTTP client"),
            passed: Mutex::default(),
            gate: Mutex::default(),
        });
        let port = Port::new();
        let (server, _) = Server::start(port.address(), router(&shared));
        Self { port, shared, server: Mutex::new(Some(server)) }
    }

    /// Returns `127.0.0.1:port`, as in references.
    pub fn host(&self) -> String {
        self.port.address().to_string()
    }

    /// Returns a reference to a repository behind this proxy.
    pub fn reference(&self, repository_and_tag: &str) -> String {
        format!("{}/{repository_and_tag}", self.port.address())
    }

    /// Refuses connections, and closes the current ones.
    pub fn go_down(&self) {
        self.server.lock().expect("the server").take();
    }

    /// Serves again on the same port.
    pub fn come_back(&self) {
        let (server, _) = Server::start(self.port.address(), router(&self.shared));
        *self.server.lock().expect("the server") = Some(server);
    }

    /// Returns every request since the last call.
    pub fn take_requests(&self) -> Vec<ForwardedRequest> {
        std::mem::take(&mut self.shared.passed.lock().expect("the requests"))
    }

    /// Returns every request so far.
    pub fn requests(&self) -> Vec<ForwardedRequest> {
        self.shared.passed.lock().expect("the requests").clone()
    }

    /// Returns how often this path was fetched in whole or in part.
    pub fn fetches(&self, path_part: &str) -> usize {
        self.requests()
            .iter()
            .filter(|passed| passed.method == "GET" && passed.path.contains(path_part))
            .count()
    }

    /// Makes bodies of blobs wait half way from now on.
    pub fn hold_blobs(&self) -> Arc<Gate> {
        let gate = Gate::new();
        *self.shared.gate.lock().expect("the gate") = Some(Arc::clone(&gate));
        gate
    }
}

/// Installs a TLS provider. reqwest is built without one, and needs it even for plain HTTP.
pub fn install_tls_provider() {
    // A second call finds the first one's and changes nothing.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

fn router(shared: &Arc<Shared>) -> Router {
    Router::new().fallback(forward).with_state(Arc::clone(shared))
}

async fn forward(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    shared.passed.lock().expect("the requests").push(ForwardedRequest {
        method: parts.method.to_string(),
        path: parts.uri.path().to_owned(),
        authorized: parts.headers.contains_key(header::AUTHORIZATION),
        ranged: parts.headers.contains_key(header::RANGE),
    });
    let url = format!("{}{}", shared.upstream, parts.uri);
    let mut headers = parts.headers;
    // Connections to the registry are the proxy's own.
    headers.remove(header::CONNECTION);
    let Ok(body) = axum::body::to_bytes(body, usize::MAX).await else {
        return plain(StatusCode::BAD_GATEWAY);
    };
    let mut request = shared.client.request(parts.method, url).headers(headers);
    if !body.is_empty() {
        request = request.body(body);
    }
    let Ok(answer) = request.send().await else {
        return plain(StatusCode::BAD_GATEWAY);
    };
    let mut response = Response::builder().status(answer.status());
    for (name, value) in answer.headers() {
        if name != header::TRANSFER_ENCODING && name != header::CONNECTION {
            response = response.header(name, value);
        }
    }
    let length = answer.content_length().unwrap_or(0);
    let gate = shared
        .gate
        .lock()
        .expect("the gate")
        .clone()
        .filter(|_| parts.uri.path().contains("/blobs/"));
    let bytes = answer.bytes_stream();
    let body = match gate {
        Some(gate) => Body::from_stream(held_in_the_middle(bytes, length / 2, gate)),
        None => Body::from_stream(bytes),
    };
    response.body(body).unwrap_or_else(|_| plain(StatusCode::BAD_GATEWAY))
}

fn held_in_the_middle(
    bytes: impl Stream<Item = reqwest::Result<Bytes>> + Send + 'static,
    free: u64,
    gate: Arc<Gate>,
) -> impl Stream<Item = reqwest::Result<Bytes>> + Send {
    let state = (Box::pin(bytes), usize::try_from(free).unwrap_or(usize::MAX), None, gate, false);
    stream::unfold(state, |(mut bytes, free, pending, gate, passed)| async move {
        if passed {
            let next: reqwest::Result<Bytes> = match pending {
                Some(rest) => Ok(rest),
                None => bytes.next().await?,
            };
            return Some((next, (bytes, 0, None, gate, true)));
        }
        if free == 0 {
            gate.pass().await;
            let next = match pending {
                Some(rest) => Ok(rest),
                None => bytes.next().await?,
            };
            return Some((next, (bytes, 0, None, gate, true)));
        }
        match bytes.next().await? {
            Ok(mut chunk) => {
                let now = chunk.split_to(free.min(chunk.len()));
                let left = free - now.len();
                let rest = (!chunk.is_empty()).then_some(chunk);
                Some((Ok(now), (bytes, left, rest, gate, false)))
            }
            Err(error) => Some((Err(error), (bytes, 0, None, gate, true))),
        }
    })
}

fn plain(status: StatusCode) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}
