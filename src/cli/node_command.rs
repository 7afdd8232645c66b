//! `node`: the node plugin.

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::logging::LogArguments;
use super::{CommandError, runtime};
use crate::app::{self, NodeOptions};

/// Arguments of `node`. Each can be set in the environment as well.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  csi-driver-oci node --node-id worker-1
  csi-driver-oci node --node-id worker-1 --endpoint unix:///tmp/csi.sock --registration-dir ''

An empty endpoint or directory turns the feature off.")]
pub(super) struct NodeArguments {
    #[command(flatten)]
    options: NodeOptions,
    #[command(flatten)]
    log: LogArguments,
}

pub(super) fn run(arguments: NodeArguments) -> Result<(), CommandError> {
    arguments.log.start();
    let options = arguments.options.checked()?;
    raise_open_files();
    let runtime = runtime()?;
    let done = runtime.block_on(async {
        let shutdown = shutdown_token()?;
        app::run_node(options, shutdown).await.map_err(|error| error.to_string())
    });
    // A blocking system call on a dead disk must not keep the process.
    runtime.shutdown_background();
    done
}

/// Returns a token that SIGTERM and SIGINT cancel.
pub(super) fn shutdown_token() -> Result<CancellationToken, CommandError> {
    let failed = |error| format!("cannot listen for signals: {error}");
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let shutdown = CancellationToken::new();
    let token = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        token.cancel();
    });
    Ok(shutdown)
}

/// Raises the limit on open files. Runtimes start containers with 1,024, for programs that use select(2). A node with
/// many volumes and downloads must not run out of them.
fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
