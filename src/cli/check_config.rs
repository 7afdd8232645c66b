//! `check-config`: validates a configuration file as `node` does at its start.

use std::path::PathBuf;

use clap::Args;

use super::CommandError;
use super::output::print;
use crate::config::{NodeConfiguration, Quantity};
use pull::memory::container_limit;
use sys::reload::FileVersions;

/// Arguments of `check-config`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  csi-driver-oci check-config /etc/csi-driver-oci/config.yaml")]
pub(super) struct CheckConfigArguments {
    /// The configuration file.
    file: PathBuf,
    /// The memory limit of the driver's container, such as 512Mi [default: the limit of this process].
    #[arg(long, value_name = "QUANTITY")]
    memory: Option<Quantity>,
}

pub(super) fn run(arguments: &CheckConfigArguments) -> Result<(), CommandError> {
    let read = NodeConfiguration::read(&arguments.file).map_err(|error| error.to_string())?;
    // The keys are files of their own.
    read.policy.policy(&mut FileVersions::new())?;
    let container = arguments.memory.map_or_else(container_limit, |limit| Some(limit.0));
    read.pull.check_memory(&read.limits, container)?;
    print(&format!("{} can be used", arguments.file.display()));
    Ok(())
}
