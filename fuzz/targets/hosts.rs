//! A hosts.toml: no panic, one line of error, and addresses that cannot hide anything.

use std::path::Path;

use oci::registry::hosts::HostsFile;

/// Runs one input.
pub(super) fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    match HostsFile::parse(text, Path::new("/certs.d/r.io")) {
        Ok(file) => {
            let server = file.hosts.last().expect("the server is always there");
            assert!(server.root.is_none() || text.contains("server"));
            for root in file.hosts.iter().filter_map(|host| host.root.as_ref()) {
                assert!(matches!(root.scheme(), "http" | "https"));
                assert!(root.username().is_empty() && root.password().is_none());
                assert!(root.path().ends_with('/') && root.query().is_none());
            }
        }
        Err(error) => assert!(!error.contains('\n')),
    }
}
