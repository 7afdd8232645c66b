//! The `policy` section. Read again when the file or the file of a key changes.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;

use super::{NodeConfiguration, Quantity};
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
        let mut names = BTreeSet::new();
        for KeyEntry { name, file, data } in &self.keys {
            if name.is_empty() || !names.insert(name.as_str()) {
                return Err(format!("policy.keys: the name \"{name}\" is empty or there twice"));
            }
            if file.is_some() == data.is_some() {
                return Err(format!("policy.keys: the key \"{name}\" needs either file or data"));
            }
            if let Some(data) = data {
                key(name, data.as_bytes())?;
            }
        }
        for (number, rule) in self.rules.iter().enumerate() {
            let place = |reason: String| format!("policy.rules: rule {}: {reason}", number + 1);
            for text in rule.references.iter().chain(&rule.namespaces) {
                GlobPattern::parse(text).map_err(place)?;
            }
            let Some(signatures) = &rule.signatures else { continue };
            if signatures.keys.is_empty() {
                return Err(place("signatures needs keys".to_owned()));
            }
            if let Some(name) = signatures.keys.iter().find(|name| !names.contains(name.as_str())) {
                return Err(place(format!("there is no key \"{name}\" in policy.keys")));
            }
        }
        Ok(())
    }

    /// Returns the policy with its keys.
    pub fn policy(&self, seen: &mut FileVersions) -> Result<Policy, String> {
        let keys = self.keys.iter().map(|entry| {
            let pem = match (&entry.file, &entry.data) {
                (Some(path), _) => seen.read(path, MAXIMUM_KEY_BYTES).map_err(|error| {
                    let path = path.display();
                    format!(
                        "policy.keys: the key \"{}\" cannot be read from {path}: {error}",
                        entry.name
                    )
                })?,
                (None, data) => data.clone().unwrap_or_default().into_bytes(),
            };
            key(&entry.name, &pem)
        });
        let keys: Arc<[NamedKey]> = keys.collect::<Result<_, _>>()?;
        let patterns = |texts: &[String]| -> Result<Vec<GlobPattern>, String> {
            texts.iter().map(|text| GlobPattern::parse(text)).collect()
        };
        let rules = self.rules.iter().map(|rule| {
            let signature = rule.signatures.as_ref().map(|entry| SignatureDemand {
                mode: entry.mode,
                format: entry.format,
                keys: keys.iter().filter(|key| entry.keys.contains(&key.name)).cloned().collect(),
            });
            Ok(PolicyRule {
                references: patterns(&rule.references)?,
                namespaces: patterns(&rule.namespaces)?,
                action: rule.action,
                demands: PolicyDemands {
                    digest: rule.require_digest,
                    maximum_bytes: rule.max_artifact_bytes.map(|quantity| quantity.0),
                    signature,
                },
            })
        });
        let rules = rules.collect::<Result<_, String>>()?;
        Ok(Policy { rules, default: self.default, keys })
    }
}

fn key(name: &str, pem: &[u8]) -> Result<NamedKey, String> {
    let key = PublicKey::from_pem(pem)
        .map_err(|error| format!("policy.keys: the key \"{name}\": {error}"))?;
    Ok(NamedKey { name: name.to_owned(), key })
}

/// Returns the policy source of a configuration file. Without a file everything is allowed.
pub fn policy_source(
    path: Option<PathBuf>,
    report: impl Fn(bool) + Send + Sync + 'static,
) -> PolicySource {
    let Some(path) = path else { return policy::permissive() };
    let read = move |seen: &mut FileVersions| {
        NodeConfiguration::read_again(&path, seen)?.policy.policy(seen)
    };
    PolicySource::new("the policy", read, report)
}

#[cfg(test)]
mod tests {
    use super::*;

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
