//! The workload identity of a volume: the service account of its pod, with the tokens that the
//! kubelet requested for it.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use serde::Deserialize;

/// Key under which the kubelet passes tokens: in the secrets or, before Kubernetes 1.35, in the
/// volume context.
pub const TOKENS_KEY: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// Maximum size in bytes: tokens of a few audiences have a few KiB each.
const MAXIMUM_BYTES: usize = 256 * 1024;

/// A service account of a namespace, with its tokens by audience.
#[derive(Clone, Debug, Default)]
pub struct WorkloadIdentity {
    /// Namespace of the pod.
    pub namespace: String,
    /// Service account of the pod.
    pub service_account: String,
    tokens: BTreeMap<String, ServiceAccountToken>,
}

/// A token that `Debug` does not print.
#[derive(Clone, PartialEq, Eq)]
pub struct ServiceAccountToken(String);

impl fmt::Debug for ServiceAccountToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ServiceAccountToken")
    }
}

impl ServiceAccountToken {
    /// Returns the token, to be passed to a credential provider plugin.
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }
}

/// Value of one audience in the kubelet's map.
#[derive(Deserialize)]
struct IssuedToken {
    token: String,
}

impl WorkloadIdentity {
    /// Reads the identity from a publish request. `None` if the kubelet does not pass the namespace
    /// or service account.
    pub fn of(
        namespace: Option<&str>,
        service_account: Option<&str>,
        secrets: &HashMap<String, String>,
        context: &HashMap<String, String>,
    ) -> Option<Self> {
        let text = secrets.get(TOKENS_KEY).or_else(|| context.get(TOKENS_KEY));
        // The kubelet writes this text. An unreadable one counts as no token: a plugin that needs
        // one fails with an error that names the audience.
        let issued: BTreeMap<String, IssuedToken> = text
            .filter(|text| text.len() <= MAXIMUM_BYTES)
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or_default();
        let tokens = issued
            .into_iter()
            .map(|(audience, issued)| (audience, ServiceAccountToken(issued.token)))
            .collect();
        Some(Self {
            namespace: namespace?.to_owned(),
            service_account: service_account?.to_owned(),
            tokens,
        })
    }

    /// Returns whether the kubelet passes tokens of the service account.
    pub fn has_tokens(&self) -> bool {
        !self.tokens.is_empty()
    }

    /// Returns the token for an audience.
    pub(super) fn token(&self, audience: &str) -> Option<&ServiceAccountToken> {
        self.tokens.get(audience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(text: &str) -> HashMap<String, String> {
        HashMap::from([(TOKENS_KEY.to_owned(), text.to_owned())])
    }

    #[test]
    fn tokens_come_from_secrets_or_from_the_context() {
        let text = r#"{"sts":{"token":"planted","expirationTimestamp":"2999-01-01T00:00:00Z"}}"#;
        let none = HashMap::new();
        for (secrets, context) in [(map(text), none.clone()), (none.clone(), map(text))] {
            let identity = WorkloadIdentity::of(Some("team"), Some("app"), &secrets, &context);
            let identity = identity.expect("an identity");
            assert_eq!(identity.token("sts").map(ServiceAccountToken::reveal), Some("planted"));
            assert!(identity.token("other").is_none());
            assert!(identity.has_tokens());
            assert!(!format!("{identity:?}").contains("planted"));
        }
        assert!(WorkloadIdentity::of(Some("team"), None, &map(text), &none).is_none());
        let broken = WorkloadIdentity::of(Some("a"), Some("b"), &map("{"), &none);
        assert!(!broken.expect("an identity").has_tokens());
    }
}
