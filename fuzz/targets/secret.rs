//! The keys of a pull secret: no panic, and no content in an error.

use std::collections::HashMap;

use oci::Reference;
use oci::credentials::Keyring;

/// Runs one input.
pub(super) fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let repository: Reference = "registry.example:5000/team/app".parse().expect("a reference");
    for key in [".dockerconfigjson", ".dockercfg"] {
        let secret = HashMap::from([(key.to_owned(), text.to_owned())]);
        match Keyring::from_secrets(&secret, repository.repository().host()) {
            Ok(keyring) => drop(keyring.matching(repository.repository())),
            Err(error) => assert!(error.to_string().len() < 1024),
        }
    }
}
