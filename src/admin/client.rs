//! The command line's side of the admin socket.

use std::io;
use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::proto::admin::admin_client::AdminClient;

/// Why the node plugin cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is no socket.
    #[error(
        "no node plugin runs on this node: there is no {}; start it, or give its socket with --admin-endpoint",
        .0.display()
    )]
    NoSocket(PathBuf),
    /// The socket is left over.
    #[error("no node plugin runs on this node: nobody listens at {}; look at its log", .0.display())]
    NobodyListens(PathBuf),
    /// Only root may.
    #[error("{} may only be opened by root: run the command as root", .0.display())]
    NotAllowed(PathBuf),
    /// Something else.
    #[error("the node plugin cannot be reached at {}: {reason}", path.display())]
    Other {
        /// Where.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl ConnectError {
    /// The transport's own text says nothing; its last cause does.
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
    // The address is only a name here: the connector knows the socket.
    let endpoint = Endpoint::from_static("http://localhost");
    let socket = path.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = endpoint.connect_with_connector(connector).await;
    Ok(AdminClient::new(channel.map_err(|error| ConnectError::new(path, &error))?))
}
