//! The command line's side of the admin socket.

use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::proto::admin::admin_client::AdminClient;

/// Why the node plugin cannot be asked.
#[derive(Debug, thiserror::Error)]
#[error("no node plugin answers at {} ({reason}): is it running on this node, and are you root?", path.display())]
pub struct ConnectError {
    path: PathBuf,
    reason: String,
}

/// Connects to a running node plugin.
pub async fn connect(path: &Path) -> Result<AdminClient<Channel>, ConnectError> {
    let failed = |error: &dyn std::error::Error| {
        // The transport's own text says nothing; its last cause does.
        let mut cause = error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        ConnectError { path: path.to_owned(), reason: cause.to_string() }
    };
    // The address is only a name here: the connector knows the socket.
    let endpoint = Endpoint::from_static("http://localhost");
    let socket = path.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel =
        endpoint.connect_with_connector(connector).await.map_err(|error| failed(&error))?;
    Ok(AdminClient::new(channel))
}
