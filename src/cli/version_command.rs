//! `version`: the version of this program.

use serde_json::json;

use super::CommandError;
use super::output::OutputArguments;
use oci::Platform;

pub(super) fn run(arguments: &OutputArguments) -> Result<(), CommandError> {
    let (version, platform) = (env!("CARGO_PKG_VERSION"), Platform::of_this_node().to_string());
    arguments.result(&json!({"version": version, "platform": platform}), || {
        vec![format!("csi-driver-oci {version} {platform}")]
    })
}
