//! The `policy` section. Read again when the file, or the file of a key or of a trust root, changes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::{Quantity, reloadable};
use oci::signature::{
    NamedIdentity, NamedKey, NamedRoot, PublicKey, SignatureDemand, SignatureFormat, SignatureMode,
    Signers, StatementDemand,
};
use policy::{GlobPattern, Policy, PolicyAction, PolicyDemands, PolicyRule, PolicySource};
use sigstore::trust_root::MAXIMUM_TRUST_ROOT_BYTES;
use sigstore::{IdentityPattern, TextPattern, TransparencyLog, TrustRoot};
use sys::reload::FileVersions;

/// The maximum size of a key's file. An RSA key of 8192 bits has 1.5 KiB.
const MAXIMUM_KEY_BYTES: u64 = 64 * 1024;

/// The `policy` section.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PolicySection {
    /// Public keys, for rules and for `requireSignature`.
    pub keys: Vec<KeyEntry>,
    /// Sigstore instances, for identities.
    pub trust_roots: Vec<TrustRootEntry>,
    /// Identities of keyless signatures, for rules and for `requireSignature`.
    pub identities: Vec<IdentityEntry>,
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

/// A Sigstore instance, in a file or inline.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrustRootEntry {
    /// The name of the instance, for identities and messages.
    pub name: String,
    /// The path of a `trusted_root.json`.
    pub file: Option<PathBuf>,
    /// The JSON text.
    pub data: Option<String>,
    /// `Required`, or `None` if the instance has no log.
    #[serde(default)]
    pub transparency_log: TransparencyLog,
}

/// An identity of keyless signatures.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct IdentityEntry {
    /// The name of the identity, for rules and messages.
    pub name: String,
    /// The issuer of identity tokens.
    pub issuer: Option<String>,
    /// A regular expression for the whole issuer.
    pub issuer_reg_exp: Option<String>,
    /// The email address or URI in the certificate.
    pub subject: Option<String>,
    /// A regular expression for the whole subject.
    pub subject_reg_exp: Option<String>,
    /// Claims that the certificate must have, by name.
    pub claims: BTreeMap<String, String>,
    /// The names of instances that may have issued the certificate; all if empty.
    pub trust_roots: Vec<String>,
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
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct SignatureEntry {
    /// `Enforce` or `Warn`.
    pub mode: SignatureMode,
    /// `Any`, `Legacy` or `Bundle`.
    pub format: SignatureFormat,
    /// The names of keys. A signature of any key or identity suffices.
    pub keys: Vec<String>,
    /// The names of identities.
    pub identities: Vec<String>,
    /// Annotations that the signature must have.
    pub annotations: BTreeMap<String, String>,
    /// Attestations that the artifact must have, each one.
    pub attestations: Vec<AttestationEntry>,
}

/// A demand for an attestation.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AttestationEntry {
    /// The predicate type of the statement.
    pub predicate_type: String,
    /// The names of keys. An attestation of any key or identity suffices.
    #[serde(default)]
    pub keys: Vec<String>,
    /// The names of identities.
    #[serde(default)]
    pub identities: Vec<String>,
}

/// The entries of one list by name. An entry whose file was not read has no value.
struct NamedEntries<T> {
    list: &'static str,
    entries: Vec<(String, Option<T>)>,
}

/// The keys and identities that rules name.
struct KnownSigners {
    keys: NamedEntries<NamedKey>,
    identities: NamedEntries<NamedIdentity>,
}

impl PolicySection {
    /// Checks everything that needs no file of a key or an instance.
    pub(super) fn check(&self) -> Result<(), String> {
        self.build(|_, _| Ok(None)).map(drop)
    }

    /// Returns the policy with its keys and instances.
    pub fn policy(&self, seen: &mut FileVersions) -> Result<Policy, String> {
        self.build(|path, limit| seen.read(path, limit).map(Some))
    }

    /// Builds the policy without the keys and instances whose files `read` does not return.
    fn build(
        &self,
        mut read: impl FnMut(&Path, u64) -> io::Result<Option<Vec<u8>>>,
    ) -> Result<Policy, String> {
        let mut content = |file: &Option<PathBuf>, data: &Option<String>, limit| match (file, data)
        {
            (Some(path), None) => read(path, limit)
                .map_err(|error| format!("cannot be read from {}: {error}", path.display())),
            (None, Some(data)) => Ok(Some(data.clone().into_bytes())),
            _ => Err("needs either file or data".to_owned()),
        };
        let keys = NamedEntries::build(
            "keys",
            &self.keys,
            |key| &key.name,
            |KeyEntry { name, file, data }| {
                let Some(pem) = content(file, data, MAXIMUM_KEY_BYTES)? else { return Ok(None) };
                let key =
                    PublicKey::from_pem(&pem).map_err(|error| format!("is no key: {error}"))?;
                Ok(Some(NamedKey { name: name.clone(), key }))
            },
        );
        let roots = NamedEntries::build(
            "trustRoots",
            &self.trust_roots,
            |root| &root.name,
            |root| {
                let json = content(&root.file, &root.data, MAXIMUM_TRUST_ROOT_BYTES)?;
                let Some(json) = json else { return Ok(None) };
                let name = root.name.clone();
                let root = TrustRoot::parse(&json, root.transparency_log);
                let root = root.map_err(|error| format!("is no trust root: {error}"))?;
                Ok(Some(NamedRoot { name, root: Arc::new(root) }))
            },
        )?;
        let identities = NamedEntries::build(
            "identities",
            &self.identities,
            |identity| &identity.name,
            |identity| identity.with_roots(&roots).map(Some),
        );
        let signers = KnownSigners { keys: keys?, identities: identities? };
        let rules = self.rules.iter().enumerate().map(|(number, rule)| {
            let rule = rule.with_signers(&signers);
            rule.map_err(|reason| format!("policy.rules: rule {}: {reason}", number + 1))
        });
        let rules = rules.collect::<Result<_, _>>()?;
        Ok(Policy { rules, default: self.default, signers: signers.all() })
    }
}

impl<T: Clone> NamedEntries<T> {
    fn build<E>(
        list: &'static str,
        all: &[E],
        name: fn(&E) -> &str,
        mut value: impl FnMut(&E) -> Result<Option<T>, String>,
    ) -> Result<Self, String> {
        let (mut names, mut entries) = (BTreeSet::new(), Vec::new());
        for entry in all {
            let name = name(entry);
            if name.is_empty() || !names.insert(name) {
                return Err(format!("policy.{list}: the name \"{name}\" is empty or there twice"));
            }
            let value = value(entry);
            let value = value.map_err(|reason| format!("policy.{list}: \"{name}\" {reason}"))?;
            entries.push((name.to_owned(), value));
        }
        Ok(Self { list, entries })
    }

    /// Returns the values of these entries.
    fn select(&self, names: &[String]) -> Result<Arc<[T]>, String> {
        let entry = |name: &String| self.entries.iter().find(|(known, _)| known == name);
        if let Some(name) = names.iter().find(|name| entry(name).is_none()) {
            return Err(format!("there is no \"{name}\" in policy.{}", self.list));
        }
        Ok(names.iter().filter_map(|name| entry(name)?.1.clone()).collect())
    }

    fn all(&self) -> Arc<[T]> {
        self.entries.iter().filter_map(|(_, value)| value.clone()).collect()
    }
}

impl KnownSigners {
    fn all(&self) -> Signers {
        Signers { keys: self.keys.all(), identities: self.identities.all() }
    }

    fn select(&self, keys: &[String], identities: &[String]) -> Result<Signers, String> {
        let keys = self.keys.select(keys)?;
        Ok(Signers { keys, identities: self.identities.select(identities)? })
    }
}

impl IdentityEntry {
    fn with_roots(&self, roots: &NamedEntries<NamedRoot>) -> Result<NamedIdentity, String> {
        let parse = |name, exact: &Option<String>, expression: &Option<String>| {
            TextPattern::parse(name, exact.as_deref(), expression.as_deref())
        };
        let issuer = parse("issuer", &self.issuer, &self.issuer_reg_exp)?;
        let subject = parse("subject", &self.subject, &self.subject_reg_exp)?;
        let pattern = IdentityPattern::new(issuer, subject, self.claims.clone())?;
        if roots.entries.is_empty() {
            return Err("needs a Sigstore instance in policy.trustRoots".to_owned());
        }
        let all = self.trust_roots.is_empty();
        let roots = if all { roots.all() } else { roots.select(&self.trust_roots)? };
        Ok(NamedIdentity { name: self.name.clone(), pattern, roots })
    }
}

impl RuleEntry {
    fn with_signers(&self, signers: &KnownSigners) -> Result<PolicyRule, String> {
        let references = self.references.iter().map(|text| GlobPattern::of_repositories(text));
        let references = references.collect::<Result<_, _>>()?;
        let namespaces = self.namespaces.iter().map(|text| GlobPattern::of_namespaces(text));
        let namespaces = namespaces.collect::<Result<_, _>>()?;
        let signatures = self.signatures.as_ref();
        let signature = signatures.map(|entry| entry.with_signers(signers)).transpose()?;
        let maximum_bytes = self.max_artifact_bytes.map(|quantity| quantity.0);
        let demands = PolicyDemands { digest: self.require_digest, maximum_bytes, signature };
        Ok(PolicyRule { references, namespaces, action: self.action, demands })
    }
}

impl SignatureEntry {
    fn with_signers(&self, known: &KnownSigners) -> Result<SignatureDemand, String> {
        let mut statements = Vec::new();
        if !self.keys.is_empty() || !self.identities.is_empty() {
            let signers = known.select(&self.keys, &self.identities)?;
            let annotations = self.annotations.clone();
            statements.push(StatementDemand { predicate_type: None, signers, annotations });
        } else if self.attestations.is_empty() || !self.annotations.is_empty() {
            return Err("signatures needs keys or identities".to_owned());
        }
        for AttestationEntry { predicate_type, keys, identities } in &self.attestations {
            if predicate_type.is_empty() || keys.is_empty() && identities.is_empty() {
                return Err("an attestation needs predicateType, and keys or identities".to_owned());
            }
            let (signers, predicate_type) =
                (known.select(keys, identities)?, Some(predicate_type.clone()));
            statements.push(StatementDemand { predicate_type, signers, ..Default::default() });
        }
        if self.format == SignatureFormat::Legacy && !self.attestations.is_empty() {
            return Err("attestations are bundles: format must not be Legacy".to_owned());
        }
        Ok(SignatureDemand { mode: self.mode, format: self.format, statements: statements.into() })
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
        assert_eq!(
            (signature.mode, signature.format),
            (SignatureMode::Warn, SignatureFormat::Bundle)
        );
        assert_eq!(signature.statements[0].signers, policy.signers);
        assert_eq!(
            (policy.default, policy.rules[1].action),
            (PolicyAction::Deny, PolicyAction::Deny)
        );
    }

    const IDENTITIES: &str = "  identities:\n  - name: ci\n    issuer: https://issuer.example\n    \
        subjectRegExp: https://git.example/team/.*\n    claims: {sourceRepositoryRef: refs/heads/main}\n";

    /// Returns the lines of the trust root of a public instance.
    fn trust_root(more: &str) -> String {
        let json = include_str!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/crates/sigstore/testdata/rekor2-dsse/trusted_root.json"
        ));
        format!("  trustRoots:\n  - name: public\n{more}    data: '{}'\n", json.replace('\n', " "))
    }

    #[test]
    fn identities_and_attestations_are_read() {
        let rules = "  rules:\n  - signatures:\n      identities: [ci]\n      annotations: {env: prod}\n      \
             attestations: [{predicateType: https://slsa.dev/provenance/v1, identities: [ci]}]\n  \
             - signatures: {attestations: [{predicateType: a, identities: [ci]}]}\n";
        let policy = parse(&format!("{}{IDENTITIES}{rules}", trust_root(""))).expect("valid");
        let demand = |rule: usize| policy.rules[rule].demands.signature.as_ref().expect("a demand");
        let [signature, attestation] = &demand(0).statements[..] else { panic!() };
        assert_eq!(signature.annotations["env"], "prod");
        assert_eq!(attestation.predicate_type.as_deref(), Some("https://slsa.dev/provenance/v1"));
        assert_eq!(signature.signers, attestation.signers);
        assert_eq!(policy.signers.identities[0].roots.len(), 1);
        assert_eq!(demand(1).statements.len(), 1);
        // The same words with another demand on the instance are another policy.
        let other = trust_root("    transparencyLog: None\n");
        let other = parse(&format!("{other}{IDENTITIES}{rules}")).expect("valid");
        let of_other = other.rules[0].demands.signature.as_ref().expect("a demand");
        let id = |demand: &SignatureDemand| demand.id(oci::signature::SignedObject::Manifest);
        assert_ne!(id(demand(0)), id(of_other));
    }

    #[test]
    fn wrong_identities_are_named() {
        let root = trust_root("");
        for (lines, named) in [
            (IDENTITIES.to_owned(), "policy.trustRoots"),
            (format!("{root}  identities: [{{name: ci, issuer: a}}]\n"), "subjectRegExp"),
            (
                format!("{root}  identities: [{{name: ci, issuer: a, subjectRegExp: \"(\"}}]\n"),
                "no regular expression",
            ),
            (
                format!("{root}{}", IDENTITIES.replace("sourceRepositoryRef", "ref")),
                "sourceRepositoryRef",
            ),
            (
                format!("{root}{IDENTITIES}    trustRoots: [other]\n"),
                "\"other\" in policy.trustRoots",
            ),
            (
                format!("{root}{IDENTITIES}  rules: [{{signatures: {{identities: [cd]}}}}]\n"),
                "\"cd\" in policy.identities",
            ),
            (
                format!("{root}{IDENTITIES}  rules: [{{signatures: {{annotations: {{a: b}}}}}}]\n"),
                "keys or identities",
            ),
            (
                format!(
                    "{root}{IDENTITIES}  rules: [{{signatures: {{attestations: [{{predicateType: a}}]}}}}]\n"
                ),
                "predicateType",
            ),
            (
                format!(
                    "{root}{IDENTITIES}  rules: [{{signatures: {{format: Legacy, attestations: [{{predicateType: a, identities: [ci]}}]}}}}]\n"
                ),
                "Legacy",
            ),
            ("  trustRoots: [{name: a, data: \"{}\"}]\n".to_owned(), "trusted_root.json"),
            ("  trustRoots: [{name: a}]\n".to_owned(), "file or data"),
            ("  trustRoots: [{name: a, file: /missing.json}]\n".to_owned(), "/missing.json"),
            (format!("{root}  - {{name: public, data: x}}\n"), "there twice"),
        ] {
            let error = parse(&lines).expect_err(named);
            assert!(error.contains(named) && !error.contains('\n'), "{named}: {error}");
        }
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
