//! Text to a platform: what is accepted accepts itself, and is written as it was read.

use oci::Platform;

/// Runs one input.
pub(super) fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(platform) = text.parse::<Platform>() {
        assert_eq!(platform.to_string(), text);
        assert!(platform.accepts(&platform));
    }
}
