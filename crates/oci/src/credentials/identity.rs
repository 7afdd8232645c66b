//! Whom a volume is for, and the tokens that the kubelet got for it.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use serde::Deserialize;

/// Where the kubelet puts tokens: into the secrets, or, before Kubernetes 1.35, into the volume context.
pub const TOKENS_KEY: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// Tokens of a few audiences, of a few KiB each.
const MAXIMUM_BYTES: usize = 256 * 1024;

/// A service account of a namespace, with its tokens by audience.
#[derive(Clone, Debug, Default)]
pub struct WorkloadIdentity {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's service account.
    pub service_account: String,
    tokens: BTreeMap<String, ServiceAccountToken>,
}

/// A token that cannot be printed.
#[derive(Clone, PartialEq, Eq)]
pub struct ServiceAccountToken(String);

impl fmt::Debug for ServiceAccountToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ServiceAccountToken")
    }
}

impl ServiceAccountToken {
    /// The token itself, for the plugin that it is for.
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }
}

/// The kubelet's map has these under each audience.
#[derive(Deserialize)]
struct Issued {
    token: String,
}

impl WorkloadIdentity {
    /// Reads what came with a publish; none where the kubelet does not say whom it is for.
    #[must_use]
    pub fn of(
        namespace: Option<&str>,
        service_account: Option<&str>,
        secrets: &HashMap<String, String>,
        context: &HashMap<String, String>,
    ) -> Option<Self> {
        let text = secrets.get(TOKENS_KEY).or_else(|| context.get(TOKENS_KEY));
        // The kubelet writes it. What cannot be read is as good as no token, and says so when one is needed.
        let issued: BTreeMap<String, Issued> = text
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

    /// The token for an audience.
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
            assert!(!format!("{identity:?}").contains("planted"));
        }
        assert!(WorkloadIdentity::of(Some("team"), None, &map(text), &none).is_none());
        let broken = WorkloadIdentity::of(Some("a"), Some("b"), &map("{"), &none);
        assert!(broken.expect("an identity").token("sts").is_none());
    }
}
