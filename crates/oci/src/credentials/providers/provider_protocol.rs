//! Requests to a credential provider plugin and its responses.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Repository;
use crate::credentials::{Credential, Keyring};
use text::duration::GoDuration;

/// A request, written to standard input.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ProviderRequest<'a> {
    pub(super) kind: &'static str,
    pub(super) api_version: &'a str,
    pub(super) image: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) service_account_token: Option<&'a str>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) service_account_annotations: BTreeMap<&'a str, &'a str>,
}

/// A parsed response.
#[derive(Clone, Debug)]
pub struct ProviderAnswer {
    /// Credentials of the response, by registry.
    pub keyring: Keyring,
    /// Scope of the cached response.
    pub cache_key: CacheKeyType,
    /// Cache duration; `None` for the plugin's default.
    pub cache_duration: Option<Duration>,
}

/// Scope of a cached response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum CacheKeyType {
    /// One repository only.
    Image,
    /// All repositories of one registry.
    Registry,
    /// All registries and repositories.
    Global,
}

impl CacheKeyType {
    /// Returns the key of the response in a cache.
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
struct ResponseDocument {
    kind: String,
    api_version: String,
    cache_key_type: CacheKeyType,
    cache_duration: Option<GoDuration>,
    auth: Option<BTreeMap<String, ProviderAuth>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ProviderAuth {
    username: String,
    password: String,
}

/// Parses the output of a plugin, which must use the version of the request.
///
/// # Errors
///
/// The defect, without quoted output, since it may contain a secret.
pub fn parse(bytes: &[u8], api_version: &str) -> Result<ProviderAnswer, String> {
    let response: ResponseDocument = serde_json::from_slice(bytes).map_err(|error| {
        format!("no CredentialProviderResponse (line {} column {})", error.line(), error.column())
    })?;
    if response.kind != "CredentialProviderResponse" || response.api_version != api_version {
        return Err(format!("no CredentialProviderResponse of {api_version}"));
    }
    let mut keyring = Keyring::empty();
    let entries = response.auth.unwrap_or_default().into_iter().map(|(registry, auth)| {
        let ProviderAuth { username, password } = auth;
        (registry, Credential::Basic { username, password })
    });
    keyring.add_entries(entries.collect());
    Ok(ProviderAnswer {
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

    fn response(rest: &str) -> Result<ProviderAnswer, String> {
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
