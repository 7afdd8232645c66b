//! Connects commands to the running node plugin.

use std::error::Error as _;
use std::path::{Path, PathBuf};

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Channel;

use super::output::OutputArguments;
use super::{CommandError, runtime};
use crate::admin::admin_client::{WHERE_THE_LOG_IS, connect};
use crate::csi::UnixEndpoint;
use crate::proto::admin::admin_client::AdminClient;
use oci::{Platform, Reference};

/// Arguments of commands that call the node plugin.
#[derive(Debug, Args)]
pub(super) struct AdminCallArguments {
    /// The socket of the node plugin.
    #[arg(long, env = "ADMIN_ENDPOINT", default_value = "unix:///run/csi-driver-oci/admin.sock", value_parser = socket)]
    admin_endpoint: PathBuf,
    #[command(flatten)]
    pub(super) output: OutputArguments,
}

impl AdminCallArguments {
    /// Calls the node plugin. An error is the message of its status.
    pub(super) fn call<T>(
        &self,
        request: impl AsyncFnOnce(AdminClient<Channel>) -> Result<T, tonic::Status>,
    ) -> Result<T, CommandError> {
        let path = &self.admin_endpoint;
        self.output.start_log();
        tracing::debug!(socket = %path.display(), "calling the node plugin");
        runtime()?.block_on(async {
            let client = connect(path).await.map_err(|error| error.to_string())?;
            request(client).await.map_err(|status| status_message(path, &status))
        })
    }

    /// Calls the node plugin once for each reference, also after a failure. Returns the answers, and the failures as
    /// one line.
    pub(super) fn call_each<T>(
        &self,
        references: &[Reference],
        mut request: impl AsyncFnMut(&mut AdminClient<Channel>, String) -> Result<T, tonic::Status>,
    ) -> Result<(Vec<T>, Result<(), CommandError>), CommandError> {
        self.call(async |mut client| {
            let (mut answers, mut failures) = (Vec::new(), Vec::new());
            for reference in references {
                match request(&mut client, reference.to_string()).await {
                    Ok(answer) => answers.push(answer),
                    // The node plugin has gone.
                    Err(status) if status.source().is_some() => return Err(status),
                    Err(status) => failures.push(status.message().to_owned()),
                }
            }
            let failed = failures.join("; ");
            Ok((answers, if failures.is_empty() { Ok(()) } else { Err(failed) }))
        })
    }
}

/// Parses the endpoint of a socket to connect to.
fn socket(text: &str) -> Result<PathBuf, String> {
    let endpoint: Option<UnixEndpoint> = text.parse().ok();
    let path = endpoint.and_then(|endpoint| endpoint.path().map(Path::to_owned));
    path.ok_or_else(|| "use unix:///path/to/admin.sock".to_owned())
}

/// Returns the message of a status. Only a status of this process has a source: the connection broke.
fn status_message(socket: &Path, status: &tonic::Status) -> CommandError {
    match status.message() {
        _ if status.source().is_some() => format!(
            "the node plugin at {} ended during the command; {WHERE_THE_LOG_IS}",
            socket.display()
        ),
        "" => format!("the node plugin answered {:?}", status.code()),
        message => message.to_owned(),
    }
}

/// Returns a platform as messages have it: empty for none.
pub(super) fn platform_text(platform: Option<&Platform>) -> String {
    platform.map(Platform::to_string).unwrap_or_default()
}

/// Returns the status of a stream that ended before its last message.
pub(super) fn ended_early() -> tonic::Status {
    tonic::Status::from_error("the stream ended".into())
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
