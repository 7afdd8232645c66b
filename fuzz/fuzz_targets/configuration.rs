//! A node's configuration file with its policy: no panic, and one line of error.

#![no_main]

use csi_driver_oci::config::NodeConfiguration;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Err(error) = NodeConfiguration::parse(text) {
        assert!(!error.contains('\n'));
    }
});
