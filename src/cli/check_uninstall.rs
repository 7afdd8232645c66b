//! `check-uninstall`: checks whether the driver can be removed from a cluster.

use clap::Args;

use super::output::OutputArguments;
use super::{CommandError, runtime};
use crate::app::driver_name;
use crate::kubernetes::{KubernetesClient, pods_using_driver};

/// The most pods that a failure lists.
const NAMED: usize = 10;

/// Arguments of `check-uninstall`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  csi-driver-oci check-uninstall
  csi-driver-oci check-uninstall --driver-name artifacts.example.com -o json

Runs in a pod whose service account may list pods and persistent volumes, as the chart's job
before an uninstall does. Without the driver the kubelet cannot unmount its volumes, and their
pods stay in Terminating.")]
pub(super) struct CheckUninstallArguments {
    /// The CSI driver's name.
    #[arg(long, env = "DRIVER_NAME", default_value = "oci.custom.io", value_parser = driver_name)]
    driver_name: String,
    #[command(flatten)]
    output: OutputArguments,
}

pub(super) fn run(arguments: &CheckUninstallArguments) -> Result<(), CommandError> {
    arguments.output.start_log();
    let find = async {
        let client = KubernetesClient::in_cluster()?;
        pods_using_driver(&client, &arguments.driver_name).await
    };
    let pods = runtime()?.block_on(find).map_err(|error| error.to_string())?;
    arguments.output.result(&pods, || pods.clone())?;
    if pods.is_empty() {
        return Ok(());
    }
    let more = if pods.len() > NAMED { ", ..." } else { "" };
    let named = pods[..pods.len().min(NAMED)].join(", ");
    Err(format!(
        "{} pods have volumes of {}: {named}{more}: delete them first, as nothing unmounts their volumes afterwards; to keep the driver, `helm rollback NAME REVISION`, since a release whose uninstall was refused cannot be upgraded",
        pods.len(),
        arguments.driver_name
    ))
}
