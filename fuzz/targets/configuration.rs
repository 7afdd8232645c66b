//! A node's configuration file with its policy: no panic, and one line of error.

use csi_driver_oci::config::NodeConfiguration;

/// Runs one input.
pub(super) fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Err(error) = NodeConfiguration::parse(text) {
        assert!(!error.contains('\n'));
    }
}
