//! A small HTTP server for each endpoint. One that cannot listen is logged and
//! counted, and takes nothing else down.
//!
//! The metrics port is open to every pod of a node with host network. So connections are bounded and
//! short: each serves one request, and its client has little time for it. At the maximum number of
//! connections, a new one closes the oldest: a client that sends and reads is faster than one that
//! waits.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The maximum number of open connections of one endpoint, more than scrapers and probes open.
const CONNECTIONS: usize = 64;
/// The maximum time from the start of a connection to the end of its response: three times as long as
/// Prometheus waits for a scrape.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// The delay after a connection could not be accepted, as when no more files can be opened.
const ACCEPT_RETRY: Duration = Duration::from_secs(1);

/// Listens on an address, and serves in the background until shutdown. Returns the address with its
/// port.
///
/// # Errors
///
/// The kernel's, if it refuses to listen on the address.
pub async fn serve(
    address: &str,
    router: Router,
    tracker: &TaskTracker,
    shutdown: CancellationToken,
) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let local = listener.local_addr()?;
    tracker.spawn(async move {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = serve_connections(&listener, &router) => {}
        }
    });
    Ok(local)
}

/// Accepts connections for ever. Dropping the future closes all of them.
async fn serve_connections(listener: &TcpListener, router: &Router) {
    let mut tasks = JoinSet::new();
    // The oldest comes first.
    let mut open: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = tasks.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                open.retain(|connection| !connection.is_finished());
                if open.len() >= CONNECTIONS
                    && let Some(oldest) = open.pop_front()
                {
                    oldest.abort();
                }
                open.push_back(tasks.spawn(serve_one(stream, router.clone())));
            }
            Err(error) => {
                tracing::debug!(%error, "a connection cannot be accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// Answers the one request of a connection.
async fn serve_one(stream: TcpStream, router: Router) {
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().keep_alive(false);
    let served = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    // A connection that its client breaks is no failure of the node.
    let _ = tokio::time::timeout(REQUEST_TIMEOUT, served).await;
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const LARGE: usize = 64 << 20;

    async fn start() -> (SocketAddr, CancellationToken, TaskTracker) {
        let router = Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/large", get(|| async { vec![0_u8; LARGE] }));
        let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
        let address = serve("127.0.0.1:0", router, &tracker, shutdown.clone()).await;
        (address.expect("a port"), shutdown, tracker)
    }

    async fn send(address: SocketAddr, text: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.expect("a connection");
        stream.write_all(text.as_bytes()).await.expect("sent");
        stream
    }

    async fn read_to_end(mut stream: TcpStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        // A reset ends the connection as well.
        let _ = stream.read_to_end(&mut bytes).await;
        bytes
    }

    #[tokio::test]
    async fn a_connection_serves_one_request() {
        let (address, ..) = start().await;
        let request = "GET /healthz HTTP/1.1\r\nhost: node\r\n\r\n";
        let answer = read_to_end(send(address, &request.repeat(2)).await).await;
        let answer = String::from_utf8(answer).expect("text").to_lowercase();
        assert_eq!(answer.matches("200 ok").count(), 1, "{answer}");
        assert!(answer.contains("connection: close"), "{answer}");
    }

    #[tokio::test]
    async fn clients_that_wait_do_not_block_others() {
        let (address, ..) = start().await;
        let mut waiting = Vec::new();
        for number in 0..3 * CONNECTIONS {
            let sent = ["", "GET ", "GET /large HTTP/1.1\r\nhost: node\r\n\r\n"][number % 3];
            waiting.push(send(address, sent).await);
        }
        let served = read_to_end(send(address, "GET /healthz HTTP/1.0\r\n\r\n").await).await;
        assert!(served.ends_with(b"ok\n"), "{}", String::from_utf8_lossy(&served));
        assert_eq!(read_to_end(waiting.swap_remove(0)).await, b"", "the oldest is closed");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_sends_or_reads_too_slowly_is_closed() {
        let (address, ..) = start().await;
        for sent in ["", "GET ", "GET /healthz HTTP/1.1\r\nhost: "] {
            assert_eq!(read_to_end(send(address, sent).await).await, b"", "{sent:?}");
        }
        let slow = send(address, "GET /large HTTP/1.1\r\nhost: node\r\n\r\n").await;
        tokio::time::sleep(2 * REQUEST_TIMEOUT).await;
        assert!(read_to_end(slow).await.len() < LARGE);
    }

    #[tokio::test]
    async fn a_shutdown_waits_for_no_client() {
        let (address, shutdown, tracker) = start().await;
        let waiting = send(address, "GET ").await;
        shutdown.cancel();
        tracker.close();
        tracker.wait().await;
        assert_eq!(read_to_end(waiting).await, b"");
    }
}
