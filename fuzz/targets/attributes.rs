//! Volume attributes, `key=value` a line: what is accepted has one meaning, and errors are bounded.

use std::collections::HashMap;

use csi_driver_oci::volume::volume_attributes::VolumeAttributes;
use sys::mount::MountFlags;

/// Runs one input.
pub(super) fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let pair = |line: &str| line.split_once('=').map(|(key, value)| (key.into(), value.into()));
    let context: HashMap<String, String> = text.lines().filter_map(pair).collect();
    match VolumeAttributes::parse(&context) {
        Ok(attributes) => {
            let flags = MountFlags::default();
            assert_eq!(attributes.fingerprint(flags), attributes.fingerprint(flags));
            assert!((1..=32).contains(&attributes.artifacts.len()));
            for artifact in &attributes.artifacts {
                assert!(artifact.shape.file_mode.is_none_or(|mode| mode <= 0o777));
                assert!(artifact.path.components().all(|name| name != b".."));
            }
        }
        Err(error) => assert!(error.to_string().len() < 4096),
    }
}
