//! The `policy` section. Read again when the file or the file of a key changes.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Quantity, reloadable};
use oci::signature::{NamedKey, PublicKey, SignatureDemand, SignatureFormat, SignatureMode};
use policy::{GlobPattern, Policy, PolicyAction, PolicyDemands, PolicyRule, PolicySource};
use sys::reload::FileVersions;

/// The maximum size of a key's file. An RSA key of 8192 bits has 1.5 KiB.
const MAXIMUM_KEY_BYTES: u64 = 64 * 1024;

/// The `policy` section.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PolicySection {
    /// Public keys, for rules and for `requireSignature`.
    pub keys: Vec<KeyEntry>,
    /// The action if no rule matches.
    pub default: PolicyAction,
    /// The rules in order. The first match decides.
    pub rules: Vec<RuleEntry>,
}

/// A public key, in a file or inline.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KeyEntry {
    /// The name of the key, for rules and messages.
    pub name: String,
    /// The path of a PEM file.
    pub file: Option<PathBuf>,
    /// The PEM text.
    pub data: Option<String>,
}

/// A rule of the policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RuleEntry {
    /// Patterns of `host/path`; all match if empty.
    pub references: Vec<String>,
    /// Patterns of namespaces; all match if empty.
    pub namespaces: Vec<String>,
    /// `Allow` or `Deny`.
    pub action: PolicyAction,
    /// The reference must have a digest.
    pub require_digest: bool,
    /// The most bytes of all blobs, and of the unpacked tree.
    pub max_artifact_bytes: Option<Quantity>,
    /// The signature that the artifact must have.
    pub signatures: Option<SignatureEntry>,
}

/// A demand for a signature.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SignatureEntry {
    /// `Enforce` or `Warn`.
    #[serde(default)]
    pub mode: SignatureMode,
    /// `Any`, `Legacy` or `Bundle`.
    #[serde(default)]
    pub format: SignatureFormat,
    /// The names of keys. A signature of any one suffices.
    pub keys: Vec<String>,
}

impl PolicySection {
    /// Checks everything that needs no file of a key.
    pub(super) fn check(&self) -> Result<(), String> {
        self.build(|_| Ok(None)).map(drop)
    }

    /// Returns the policy with its keys.
    pub fn policy(&self, seen: &mut FileVersions) -> Result<Policy, String> {
        self.build(|path| seen.read(path, MAXIMUM_KEY_BYTES).map(Some))
    }

    /// Builds the policy without the keys whose files `read` does not return.
    fn build(
        &self,
        mut read: impl FnMut(&Path) -> io::Result<Option<Vec<u8>>>,
    ) -> Result<Policy, String> {
        let (mut names, mut keys) = (BTreeSet::new(), Vec::new());
        for KeyEntry { name, file, data } in &self.keys {
            if name.is_empty() || !names.insert(name.as_str()) {
                return Err(format!("policy.keys: the name \"{name}\" is empty or there twice"));
            }
            let of_key = |reason: String| format!("policy.keys: the key \"{name}\"{reason}");
            let pem = match (file, data) {
                (Some(path), None) => read(path).map_err(|error| {
                    of_key(format!(" cannot be read from {}: {error}", path.display()))
                })?,
                (None, Some(data)) => Some(data.clone().into_bytes()),
                _ => return Err(of_key(" needs either file or data".to_owned())),
            };
            let key = pem.map(|pem| PublicKey::from_pem(&pem)).transpose();
            let key = key.map_err(|error| of_key(format!(": {error}")))?;
            keys.extend(key.map(|key| NamedKey { name: name.clone(), key }));
        }
        let rules = self.rules.iter().enumerate().map(|(number, rule)| {
            let rule = rule.with_keys(&names, &keys);
            rule.map_err(|reason| format!("policy.rules: rule {}: {reason}", number + 1))
        });
        let rules = rules.collect::<Result<_, _>>()?;
        Ok(Policy { rules, default: self.default, keys: keys.into() })
    }
}

impl RuleEntry {
    fn with_keys(&self, names: &BTreeSet<&str>, keys: &[NamedKey]) -> Result<PolicyRule, String> {
        let patterns = |texts: &[String]| -> Result<Vec<GlobPattern>, String> {
            texts.iter().map(|text| GlobPattern::parse(text)).collect()
        };
        let (references, namespaces) = (patterns(&self.references)?, patterns(&self.namespaces)?);
        if let Some(SignatureEntry { keys, .. }) = &self.signatures {
            if keys.is_empty() {
                return Err("signatures needs keys".to_owned());
            }
            if let Some(name) = keys.iter().find(|name| !names.contains(name.as_str())) {
                return Err(format!("there is no key \"{name}\" in policy.keys"));
            }
        }
        let signature = self.signatures.as_ref().map(|entry| SignatureDemand {
            mode: entry.mode,
            format: entry.format,
            keys: keys.iter().filter(|key| entry.keys.contains(&key.name)).cloned().collect(),
        });
        let maximum_bytes = self.max_artifact_bytes.map(|quantity| quantity.0);
        let demands = PolicyDemands { digest: self.require_digest, maximum_bytes, signature };
        Ok(PolicyRule { references, namespaces, action: self.action, demands })
    }
}

/// Returns the policy source of a configuration file. Without a file everything is allowed.
pub fn policy_source(
    path: Option<PathBuf>,
    report: impl Fn(bool) + Send + Sync + 'static,
) -> PolicySource {
    reloadable("the policy", path, |file, seen| file.policy.policy(seen), report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NodeConfiguration;

    const HEAD: &str = "apiVersion: oci.custom.io/v1alpha1\nkind: NodeConfiguration\n";

    fn parse(lines: &str) -> Result<Policy, String> {
        NodeConfiguration::parse(&format!("{HEAD}policy:\n{lines}"))?
            .policy
            .policy(&mut FileVersions::new())
    }

    #[test]
    fn a_whole_policy_is_read() {
        let policy = parse(
            "  default: Deny\n  keys:\n  - name: release\n    data: |\n      -----BEGIN PUBLIC KEY-----\n      \
             MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n      -----END PUBLIC KEY-----\n  \
             rules:\n  - references: [\"r.io/**\"]\n    namespaces: [team]\n    requireDigest: true\n    \
             maxArtifactBytes: 10Gi\n    signatures: {mode: Warn, format: Bundle, keys: [release]}\n  \
             - action: Deny\n",
        )
        .expect("valid");
        let rule = &policy.rules[0];
        assert_eq!(rule.demands.maximum_bytes, Some(10 << 30));
        let signature = rule.demands.signature.as_ref().expect("a demand");
        assert_eq!((signature.mode, signature.keys.len()), (SignatureMode::Warn, 1));
        assert_eq!(
            (policy.default, policy.rules[1].action),
            (PolicyAction::Deny, PolicyAction::Deny)
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (lines, named) in [
            ("  rules:\n  - refrences: [a]\n", "refrences"),
            ("  rules:\n  - action: Maybe\n", "Maybe"),
            ("  rules:\n  - references: [\"[\"]\n", "rule 1"),
            ("  rules:\n  - signatures: {keys: [release]}\n", "release"),
            ("  rules:\n  - signatures: {keys: []}\n", "keys"),
            ("  keys: [{name: a}]\n", "file or data"),
            ("  keys: [{name: a, data: x}]\n", "PEM"),
            ("  keys: [{name: a, file: /missing.pub}]\n", "/missing.pub"),
            ("  rules:\n  - maxArtifactBytes: many\n", "many"),
        ] {
            let error = parse(lines).expect_err(lines);
            assert!(error.contains(named) && !error.contains('\n'), "{lines}: {error}");
        }
    }
}
