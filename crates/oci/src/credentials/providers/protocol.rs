//! What is said to a plugin, and what it says.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Repository;
use crate::credentials::{Credential, Keyring};
use text::duration::GoDuration;

/// On standard input.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Request<'a> {
    pub(super) kind: &'static str,
    pub(super) api_version: &'a str,
    pub(super) image: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) service_account_token: Option<&'a str>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) service_account_annotations: BTreeMap<&'a str, &'a str>,
}

/// What an answer means.
#[derive(Clone, Debug)]
pub struct Answer {
    /// What it says, by registry.
    pub keyring: Keyring,
    /// What it counts for.
    pub cache_key: CacheKeyType,
    /// How long; none means the plugin's default.
    pub cache_duration: Option<Duration>,
}

/// What an answer counts for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum CacheKeyType {
    /// One repository.
    Image,
    /// All of one registry.
    Registry,
    /// Everything.
    Global,
}

impl CacheKeyType {
    /// The key of the answer in a cache.
    pub(super) fn key(self, repository: &Repository) -> String {
        match self {
            Self::Image => format!("image {repository}"),
            Self::Registry => format!("registry {}", repository.host()),
            Self::Global => "global".to_owned(),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    kind: String,
    api_version: String,
    cache_key_type: CacheKeyType,
    cache_duration: Option<GoDuration>,
    auth: Option<BTreeMap<String, Auth>>,
}

#[derive(Deserialize)]
struct Auth {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
}

/// Reads what a plugin printed; it must speak the version that it was spoken to in.
///
/// # Errors
///
/// What is wrong; nothing of it is quoted, as it may be a secret.
pub fn parse(bytes: &[u8], api_version: &str) -> Result<Answer, String> {
    let response: Response = serde_json::from_slice(bytes).map_err(|error| {
        format!("no CredentialProviderResponse (line {} column {})", error.line(), error.column())
    })?;
    if response.kind != "CredentialProviderResponse" || response.api_version != api_version {
        return Err(format!("no CredentialProviderResponse of {api_version}"));
    }
    let mut keyring = Keyring::empty();
    let entries = response.auth.unwrap_or_default().into_iter().map(|(registry, auth)| {
        let Auth { username, password } = auth;
        (registry, Credential::Basic { username, password })
    });
    keyring.add_entries(entries.collect());
    Ok(Answer {
        keyring,
        cache_key: response.cache_key_type,
        cache_duration: response.cache_duration.map(|duration| duration.0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reference;

    const V1: &str = "credentialprovider.kubelet.k8s.io/v1";

    fn response(rest: &str) -> Result<Answer, String> {
        let text = format!(
            r#"{{"kind":"CredentialProviderResponse","apiVersion":"{V1}","cacheKeyType":"Registry"{rest}}}"#
        );
        parse(text.as_bytes(), V1)
    }

    #[test]
    fn an_answer_is_read() {
        let auth = r#","cacheDuration":"6h0m0s","auth":{"r.io":{"username":"u","password":"p"}}"#;
        let answer = response(auth).expect("valid");
        assert_eq!(answer.cache_duration, Some(Duration::from_hours(6)));
        let reference: Reference = "r.io/app".parse().expect("a reference");
        assert_eq!(answer.keyring.matching(reference.repository()).len(), 1);
        assert_eq!(answer.cache_key.key(reference.repository()), "registry r.io");
        for empty in ["", r#","auth":null,"cacheDuration":null"#] {
            assert!(response(empty).expect("valid").keyring.is_empty());
        }
    }

    #[test]
    fn anything_else_is_refused_and_not_quoted() {
        for text in [
            "",
            "planted",
            "{}",
            r#"{"kind":"CredentialProviderResponse","apiVersion":"v0","cacheKeyType":"Image"}"#,
            r#"{"kind":"planted","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Image"}"#,
            r#"{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"planted"}"#,
        ] {
            let error = parse(text.as_bytes(), V1).expect_err(text);
            assert!(!error.contains("planted"), "{error}");
        }
        assert!(response(r#","cacheDuration":"soon""#).is_err());
    }
}
