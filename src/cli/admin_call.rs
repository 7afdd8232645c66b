//! Connects commands to the running node plugin.

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Channel;

use super::{CommandError, OutputFormat, runtime};
use crate::admin::admin_client::connect;
use crate::csi::UnixEndpoint;
use crate::proto::admin::admin_client::AdminClient;

/// Arguments of commands that call the node plugin.
#[derive(Debug, Args)]
pub(super) struct AdminCallArguments {
    /// The socket of the node plugin.
    #[arg(long, env = "ADMIN_ENDPOINT", default_value = "unix:///run/csi-driver-oci/admin.sock")]
    admin_endpoint: UnixEndpoint,
    /// The output format.
    #[arg(long, value_enum, default_value_t)]
    pub(super) output: OutputFormat,
}

impl AdminCallArguments {
    /// Calls the node plugin. An error is the message of its status.
    pub(super) fn call<T>(
        &self,
        request: impl AsyncFnOnce(AdminClient<Channel>) -> Result<T, tonic::Status>,
    ) -> Result<T, CommandError> {
        let path = self
            .admin_endpoint
            .path()
            .ok_or_else(|| "--admin-endpoint is empty: set it to the node plugin's".to_owned())?;
        runtime()?.block_on(async {
            let client = connect(path).await.map_err(|error| error.to_string())?;
            request(client).await.map_err(|status| status_message(&status))
        })
    }
}

/// Returns the message of a status, or its code if there is no message.
pub(super) fn status_message(status: &tonic::Status) -> CommandError {
    match status.message() {
        "" => format!("the node plugin answered {:?}", status.code()),
        message => message.to_owned(),
    }
}

/// Waits for a call. If the command is interrupted (SIGINT, SIGTERM or SIGHUP), fails with a note that the node plugin
/// continues.
pub(super) async fn unless_interrupted<T>(
    work: impl Future<Output = Result<T, tonic::Status>>,
) -> Result<T, tonic::Status> {
    let failed = |error: std::io::Error| tonic::Status::internal(error.to_string());
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut hang_up = signal(SignalKind::hangup()).map_err(failed)?;
    tokio::select! {
        done = work => done,
        _ = tokio::signal::ctrl_c() => Err(interrupted()),
        _ = terminate.recv() => Err(interrupted()),
        _ = hang_up.recv() => Err(interrupted()),
    }
}

fn interrupted() -> tonic::Status {
    tonic::Status::cancelled("left before the end: the node goes on; `ls` tells what it has")
}
