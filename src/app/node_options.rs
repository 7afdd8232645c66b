//! The command-line options of the node plugin.

use std::path::{Path, PathBuf};
use std::str::FromStr as _;

use clap::Args;
use clap::builder::{BoolishValueParser, NonEmptyStringValueParser};

use crate::csi::UnixEndpoint;
use crate::file_leases::LeasePolicy;

/// The maximum length of a driver's name in CSI.
const MAXIMUM_DRIVER_NAME: usize = 63;

/// The command-line options of the node plugin.
#[derive(Clone, Debug, Args)]
pub struct NodeOptions {
    /// The CSI socket.
    #[arg(long, env = "CSI_ENDPOINT", default_value = "unix:///csi/csi.sock")]
    pub endpoint: UnixEndpoint,
    /// The name of this node's Node object.
    #[arg(long, env = "NODE_NAME", value_parser = NonEmptyStringValueParser::new())]
    pub node_id: String,
    /// The CSI driver's name, as in the CSIDriver object.
    #[arg(long, env = "DRIVER_NAME", default_value = "oci.custom.io", value_parser = driver_name)]
    pub driver_name: String,
    /// The directory of all content. Only one process uses it at a time.
    #[arg(long, env = "STATE_DIR", default_value = "/var/lib/csi-driver-oci")]
    pub state_dir: PathBuf,
    /// The kubelet's root directory, which contains the volumes of pods.
    #[arg(long, env = "KUBELET_DIR", default_value = "/var/lib/kubelet", value_parser = absolute_path)]
    pub kubelet_dir: PathBuf,
    /// The kubelet's plugin registry [default: <kubelet-dir>/plugins_registry]. Empty if the node-driver-registrar
    /// sidecar registers the driver.
    #[arg(long, env = "REGISTRATION_DIR", value_parser = PathBuf::from_str)]
    pub registration_dir: Option<PathBuf>,
    /// The CSI socket's path as the kubelet sees it
    /// [default: <kubelet-dir>/plugins/<driver-name>/csi.sock].
    #[arg(long, env = "KUBELET_ENDPOINT")]
    pub kubelet_endpoint: Option<String>,
    /// The socket for commands that call the node plugin.
    #[arg(long, env = "ADMIN_ENDPOINT", default_value = "unix:///run/csi-driver-oci/admin.sock")]
    pub admin_endpoint: UnixEndpoint,
    /// The address that serves `/healthz` and `/readyz`.
    #[arg(long, env = "HEALTH_ENDPOINT", default_value = "127.0.0.1:19808", value_parser = listen_address)]
    pub health_endpoint: String,
    /// The address that serves `/metrics`.
    #[arg(long, env = "METRICS_ENDPOINT", default_value = "[::]:19809", value_parser = listen_address)]
    pub metrics_endpoint: String,
    /// A YAML file of kind NodeConfiguration.
    #[arg(long, env = "CONFIG")]
    pub config: Option<PathBuf>,
    /// The key of a taint that nodes start with. It is removed once the kubelet has registered the driver. Needs a
    /// service account that may get `csinodes` and get and patch `nodes`.
    #[arg(long, env = "STARTUP_TAINT")]
    pub startup_taint: Option<String>,
    /// Carry out what `ArtifactPreload` objects want of this node. Needs a service account that may list and watch
    /// `nodeartifacts`, and patch their status.
    #[arg(long, alias = "fleet", env = "FLEET", value_parser = BoolishValueParser::new())]
    pub preload: bool,
    /// Report the progress and the end of pulls as Events on pods. Needs a service account that may create and patch
    /// `events`.
    #[arg(long, env = "EVENTS", value_parser = BoolishValueParser::new())]
    pub events: bool,
    /// The setting of file leases on this node at the start. `Disable` sets the sysctl `fs.leases-enable` to 0, so that
    /// no pod can delay opens of files that it shares with others; NFS servers of the kernel and Samba lose delegations
    /// and oplocks.
    #[arg(long, env = "LEASES", default_value = "Keep", ignore_case = true)]
    pub leases: LeasePolicy,
    /// Mount as on kernels before 5.12, which are detected automatically; for tests.
    #[arg(long, env = "STAGED_MOUNTS", hide = true, value_parser = BoolishValueParser::new())]
    pub staged_mounts: bool,
}

impl NodeOptions {
    /// Makes the state directory's path absolute.
    pub fn checked(mut self) -> Result<Self, String> {
        // Mounts are compared with the real path of the store.
        self.state_dir = std::path::absolute(&self.state_dir)
            .map_err(|error| format!("--state-dir: {error}"))?;
        Ok(self)
    }

    /// Returns the kubelet's plugin registry directory; `None` turns self-registration off.
    pub(super) fn registration_dir(&self) -> Option<PathBuf> {
        let default = || self.kubelet_dir.join("plugins_registry");
        let folder = self.registration_dir.clone().unwrap_or_else(default);
        (!folder.as_os_str().is_empty()).then_some(folder)
    }

    /// Returns the CSI socket's path as the kubelet sees it.
    pub(super) fn kubelet_endpoint(&self) -> String {
        let own = format!("plugins/{}/csi.sock", self.driver_name);
        let given = self.kubelet_endpoint.clone().filter(|endpoint| !endpoint.is_empty());
        given.unwrap_or_else(|| self.kubelet_dir.join(own).display().to_string())
    }
}

/// Parses an absolute path.
fn absolute_path(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    if path.is_absolute() { Ok(path.to_owned()) } else { Err("use an absolute path".to_owned()) }
}

/// Checks an address to listen on. An empty one turns the endpoint off.
pub fn listen_address(text: &str) -> Result<String, String> {
    let has_port = text.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    match text {
        "" => Ok(String::new()),
        text if has_port => Ok(text.to_owned()),
        _ => Err("use host:port, or nothing to turn it off".to_owned()),
    }
}

/// Parses a driver name: a DNS-1123 subdomain, as CSI and Kubernetes demand.
pub fn driver_name(text: &str) -> Result<String, String> {
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
        let command = || NodeOptions::augment_args(Command::new("node"));
        for flag in ["--preload", "--fleet"] {
            let matches = command().get_matches_from(["node", "--node-id=one", flag]);
            let arguments = NodeOptions::from_arg_matches(&matches).expect("arguments");
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
