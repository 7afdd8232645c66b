//! `check-config`: what `node` would say about a configuration file.

use std::path::PathBuf;

use clap::Args;

use super::{Failure, print};
use crate::config::NodeConfiguration;

/// Arguments of `check-config`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  csi-driver-oci check-config /etc/csi-driver-oci/config.yaml")]
pub(super) struct CheckConfigArguments {
    /// The configuration file.
    file: PathBuf,
}

pub(super) fn run(arguments: &CheckConfigArguments) -> Result<(), Failure> {
    NodeConfiguration::read(&arguments.file).map_err(|error| error.to_string())?;
    print(&format!("{} can be used", arguments.file.display()));
    Ok(())
}
