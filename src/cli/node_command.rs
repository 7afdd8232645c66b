//! `node`: the node plugin.

use std::path::PathBuf;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::logging::{self, LogFormat};
use super::{CommandError, runtime};
use crate::app::{self, NodeOptions};
use crate::csi::UnixEndpoint;
use crate::file_leases::LeasePolicy;

/// The maximum length of a driver's name in CSI.
const MAXIMUM_DRIVER_NAME: usize = 63;

/// Arguments of `node`. Each can be set in the environment as well.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  csi-driver-oci node --node-id worker-1
  csi-driver-oci node --node-id worker-1 --endpoint unix:///tmp/csi.sock --registration-dir ''

An empty endpoint or directory turns the feature off.")]
pub(super) struct NodeArguments {
    /// The CSI socket.
    #[arg(long, env = "CSI_ENDPOINT", default_value = "unix:///csi/csi.sock")]
    endpoint: UnixEndpoint,
    /// The name of this node's Node object.
    #[arg(long, env = "NODE_NAME")]
    node_id: String,
    /// The CSI driver's name, as in the CSIDriver object.
    #[arg(long, env = "DRIVER_NAME", default_value = "oci.custom.io", value_parser = driver_name)]
    driver_name: String,
    /// The directory of all content. Only one process uses it at a time.
    #[arg(long, env = "STATE_DIR", default_value = "/var/lib/csi-driver-oci")]
    state_dir: PathBuf,
    /// The kubelet's root directory, which contains the volumes of pods.
    #[arg(long, env = "KUBELET_DIR", default_value = "/var/lib/kubelet")]
    kubelet_dir: PathBuf,
    /// The kubelet's plugin registry [default: <kubelet-dir>/plugins_registry]. Empty if the node-driver-registrar
    /// sidecar registers the driver.
    #[arg(long, env = "REGISTRATION_DIR")]
    registration_dir: Option<String>,
    /// The CSI socket's path as the kubelet sees it
    /// [default: <kubelet-dir>/plugins/<driver-name>/csi.sock].
    #[arg(long, env = "KUBELET_ENDPOINT")]
    kubelet_endpoint: Option<String>,
    /// The socket for commands that call the node plugin.
    #[arg(long, env = "ADMIN_ENDPOINT", default_value = "unix:///run/csi-driver-oci/admin.sock")]
    admin_endpoint: UnixEndpoint,
    /// The address that serves `/healthz` and `/readyz`.
    #[arg(long, env = "HEALTH_ENDPOINT", default_value = "127.0.0.1:19808")]
    health_endpoint: String,
    /// The address that serves `/metrics`.
    #[arg(long, env = "METRICS_ENDPOINT", default_value = "[::]:19809")]
    metrics_endpoint: String,
    /// A YAML file of kind NodeConfiguration.
    #[arg(long, env = "CONFIG")]
    config: Option<PathBuf>,
    /// The key of a taint that nodes start with. It is removed once the kubelet has registered the driver. Needs a
    /// service account that may get `csinodes` and get and patch `nodes`.
    #[arg(long, env = "STARTUP_TAINT")]
    startup_taint: Option<String>,
    /// Carry out what `ArtifactPreload` objects want of this node. Needs a service account that may list and watch
    /// `nodeartifacts`, and patch their status.
    #[arg(long, alias = "fleet", env = "FLEET")]
    preload: bool,
    /// Report the progress and the end of pulls as Events on pods. Needs a service account that may create and patch
    /// `events`.
    #[arg(long, env = "EVENTS")]
    events: bool,
    /// The setting of file leases on this node at the start. `Disable` sets the sysctl `fs.leases-enable` to 0, so that
    /// no pod can delay opens of files that it shares with others; NFS servers of the kernel and Samba lose delegations
    /// and oplocks.
    #[arg(long, env = "LEASES", default_value = "Keep", ignore_case = true)]
    leases: LeasePolicy,
    /// The log level: error, warn, info, debug or trace.
    #[arg(long, env = "LOG_LEVEL", default_value = "info")]
    log_level: String,
    /// The format of log lines [default: json, text on a terminal].
    #[arg(long, env = "LOG_FORMAT")]
    log_format: Option<LogFormat>,
    /// Mount as on kernels before 5.12, which are detected automatically; for tests.
    #[arg(long, env = "STAGED_MOUNTS", hide = true)]
    staged_mounts: bool,
}

pub(super) fn run(arguments: NodeArguments) -> Result<(), CommandError> {
    logging::start(&arguments.log_level, arguments.log_format)?;
    let options = options(arguments)?;
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

fn options(arguments: NodeArguments) -> Result<NodeOptions, CommandError> {
    if arguments.node_id.is_empty() {
        return Err("--node-id is empty: set it to the Node object's name".to_owned());
    }
    if !arguments.kubelet_dir.is_absolute() {
        return Err(format!(
            "--kubelet-dir {} is not absolute: give it as the kubelet has it",
            arguments.kubelet_dir.display()
        ));
    }
    let kubelet = |rest: &str| arguments.kubelet_dir.join(rest);
    let registration_dir = match arguments.registration_dir {
        None => Some(kubelet("plugins_registry")),
        Some(folder) => (!folder.is_empty()).then(|| folder.into()),
    };
    let own_socket = kubelet(&format!("plugins/{}/csi.sock", arguments.driver_name));
    let kubelet_endpoint = arguments
        .kubelet_endpoint
        .filter(|endpoint| !endpoint.is_empty())
        .unwrap_or_else(|| own_socket.display().to_string());
    let on = |endpoint: String| (!endpoint.is_empty()).then_some(endpoint);
    Ok(NodeOptions {
        endpoint: arguments.endpoint,
        node_id: arguments.node_id,
        driver_name: arguments.driver_name,
        // Mounts are compared with the real path of the store.
        state_dir: std::path::absolute(&arguments.state_dir)
            .map_err(|error| format!("--state-dir: {error}"))?,
        kubelet_dir: arguments.kubelet_dir,
        registration_dir,
        kubelet_endpoint,
        admin_endpoint: arguments.admin_endpoint,
        health_endpoint: on(arguments.health_endpoint),
        metrics_endpoint: on(arguments.metrics_endpoint),
        config: arguments.config,
        startup_taint: arguments.startup_taint.filter(|key| !key.is_empty()),
        preload: arguments.preload,
        events: arguments.events,
        leases: arguments.leases,
        staged_mounts: arguments.staged_mounts,
    })
}

/// Parses a driver name: a DNS-1123 subdomain, as CSI and Kubernetes demand.
fn driver_name(text: &str) -> Result<String, String> {
    let label = |label: &str| {
        let edge = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        label.bytes().all(inner) && edge(label.bytes().next()) && edge(label.bytes().next_back())
    };
    if text.len() <= MAXIMUM_DRIVER_NAME && text.split('.').all(label) {
        return Ok(text.to_owned());
    }
    Err(format!("use a lower-case DNS name of at most {MAXIMUM_DRIVER_NAME} characters"))
}

#[cfg(test)]
mod tests {
    use clap::{Command, FromArgMatches as _};

    use super::*;

    #[test]
    fn the_former_name_of_the_flag_preload_is_a_hidden_alias() {
        let command = || NodeArguments::augment_args(Command::new("node"));
        for flag in ["--preload", "--fleet"] {
            let matches = command().get_matches_from(["node", "--node-id=one", flag]);
            let arguments = NodeArguments::from_arg_matches(&matches).expect("arguments");
            assert!(arguments.preload, "{flag}");
        }
        let help = command().render_long_help().to_string();
        assert!(help.contains("--preload") && !help.contains("--fleet"), "{help}");
    }

    #[test]
    fn driver_names() {
        for name in ["oci.custom.io", "a", "a-b.c1"] {
            assert!(driver_name(name).is_ok(), "{name}");
        }
        for name in ["", "A.io", "-a", "a-", "a..b", "a/b", &"a".repeat(64)] {
            assert!(driver_name(name).is_err(), "{name}");
        }
    }
}
