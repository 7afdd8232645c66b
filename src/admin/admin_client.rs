//! The client of the admin socket, for the command line.

use std::io;
use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::proto::admin::admin_client::AdminClient;

/// The advice in messages about a node plugin that has ended.
pub const WHERE_THE_LOG_IS: &str = "its log says why: `kubectl logs --previous` of its pod, or `journalctl` if it runs as a service";

/// A failure to connect to the node plugin.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The socket does not exist.
    #[error(
        "no node plugin runs on this node: there is no {}; start it, or give its socket with --admin-endpoint",
        .0.display()
    )]
    NoSocket(PathBuf),
    /// The socket exists, and no process listens on it.
    #[error("no node plugin runs on this node: no process listens at {}; {WHERE_THE_LOG_IS}", .0.display())]
    NobodyListens(PathBuf),
    /// The caller is not root.
    #[error("{} may only be opened by root: run the command as root", .0.display())]
    NotAllowed(PathBuf),
    /// Any other error.
    #[error("the node plugin cannot be reached at {}: {reason}", path.display())]
    Other {
        /// The socket's path.
        path: PathBuf,
        /// The deepest cause.
        reason: String,
    },
}

impl ConnectError {
    /// Maps the deepest cause, since the transport's own text does not say why.
    fn new(path: &Path, error: &(dyn std::error::Error + 'static)) -> Self {
        let mut cause = error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        let path = path.to_owned();
        match cause.downcast_ref::<io::Error>().map(io::Error::kind) {
            Some(io::ErrorKind::NotFound) => Self::NoSocket(path),
            Some(io::ErrorKind::ConnectionRefused) => Self::NobodyListens(path),
            Some(io::ErrorKind::PermissionDenied) => Self::NotAllowed(path),
            _ => Self::Other { path, reason: cause.to_string() },
        }
    }
}

/// Connects to a running node plugin.
pub async fn connect(path: &Path) -> Result<AdminClient<Channel>, ConnectError> {
    // Never resolved: the connector uses the socket.
    let endpoint = Endpoint::from_static("http://localhost");
    let socket = path.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = endpoint.connect_with_connector(connector).await;
    Ok(AdminClient::new(channel.map_err(|error| ConnectError::new(path, &error))?))
}
