//! Text to a platform: what is accepted accepts itself, and is written as it was read.

#![no_main]

use oci::Platform;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(platform) = text.parse::<Platform>() {
        assert_eq!(platform.to_string(), text);
        assert!(platform.accepts(&platform));
    }
});
