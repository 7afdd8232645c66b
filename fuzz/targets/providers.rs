//! The kubelet's `CredentialProviderConfig` and a plugin's answer: no panic, no path in a name,
//! and nothing of an answer in an error.

use oci::Reference;
use oci::credentials::providers::{kubelet_provider_config, provider_protocol};

/// Runs one input.
pub(super) fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let reference: Reference = "registry.example:5000/team/app".parse().expect("a reference");
    if let Ok(providers) = kubelet_provider_config::parse(text) {
        for provider in providers {
            assert!(!provider.name.contains('/') && provider.name != "..");
            let _ = provider.matches(reference.repository());
        }
    }
    match provider_protocol::parse(text.as_bytes(), "credentialprovider.kubelet.k8s.io/v1") {
        Ok(answer) => drop(answer.keyring.matching(reference.repository())),
        Err(error) => assert!(error.len() < 200),
    }
}
