//! The policy of a node's administrator: which pods may mount which artifacts, and under which demands.
//!
//! A decision is a pure function of the request and the policy. The first rule that matches counts.
//!
//! An attribute of a volume can add a demand and never removes one.

use std::fmt;

use globset::{GlobBuilder, GlobSet};

use oci::Reference;
use oci::registry::other_spellings;
use oci::signature::{SignatureDemand, SignatureMode, Signers};
use sys::reload::Reloadable;
use text::printable::excerpt;

/// The policy in force, read again when the configuration or a key's file changes. Cheap to clone.
pub type PolicySource = Reloadable<Policy>;

/// The rules of a node. The default policy allows everything.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// The rules in order. The first that matches counts.
    pub rules: Vec<PolicyRule>,
    /// The action for artifacts that no rule matches.
    pub default: PolicyAction,
    /// All keys and identities, for volumes that demand a signature when no rule does.
    pub signers: Signers,
}

/// The effect of a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
pub enum PolicyAction {
    /// The artifact may be mounted if it meets the rule's demands.
    #[default]
    Allow,
    /// The artifact may not be mounted.
    Deny,
}

/// An action for some references and namespaces.
#[derive(Clone, Debug)]
pub struct PolicyRule {
    /// Patterns of the repository's `host/path`. An empty list matches any repository.
    pub references: Vec<GlobPattern>,
    /// Patterns of pods' namespaces. An empty list matches any pod.
    pub namespaces: Vec<GlobPattern>,
    /// The action for a mount that matches.
    pub action: PolicyAction,
    /// The demands on a mount that is allowed.
    pub demands: PolicyDemands,
}

/// The demands on an artifact whose mount is allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyDemands {
    /// True if the reference must have a digest.
    pub digest: bool,
    /// The maximum size in bytes of all blobs, and of the unpacked tree.
    pub maximum_bytes: Option<u64>,
    /// The signature that the artifact must have.
    pub signature: Option<SignatureDemand>,
}

/// The maximum size of a pattern: hundreds of alternatives.
const MAXIMUM_PATTERN_BYTES: usize = 64 << 10;
/// Alternatives within each other. The parser of globs calls itself for each level.
const MAXIMUM_NESTED: usize = 10;

/// A glob: `*` matches within a path component, `**` across components.
#[derive(Clone, Debug)]
pub struct GlobPattern(GlobSet);

/// A mount that the policy decides on, before the registry is contacted.
#[derive(Clone, Copy, Debug)]
pub struct PolicyRequest<'a> {
    /// The artifact to mount.
    pub reference: &'a Reference,
    /// The pod's namespace, if the kubelet passes it.
    pub namespace: Option<&'a str>,
    /// True if the volume demands a signature.
    pub require_signature: bool,
}

/// The reason that the policy refuses a mount.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A rule or the default denies the artifact.
    #[error("the node's policy does not allow it ({}){}: ask the node's administrator",
        rule_name(*.rule), namespace_clause(.namespace.as_ref()))]
    Denied {
        /// The rule, counted from 1. Without a rule, the default denies.
        rule: Option<usize>,
        /// The pod's namespace.
        namespace: Option<String>,
    },
    /// A rule has `requireDigest`, and the reference has no digest.
    #[error("the node's policy ({}) wants a digest: write the reference as name@sha256:...", rule_name(*.rule))]
    NoDigest {
        /// The rule, counted from 1.
        rule: Option<usize>,
    },
    /// The volume has `requireSignature`, and no key or identity could have signed.
    #[error(
        "requireSignature is \"true\" and this node has no key to verify signatures with: configure one (policy.keys, policy.identities), or remove the attribute"
    )]
    NoKeys,
}

impl GlobPattern {
    /// Parses a glob of repositories, as `host/path`.
    ///
    /// # Errors
    ///
    /// A message for a glob that is malformed, or that no repository matches.
    pub fn of_repositories(text: &str) -> Result<Self, String> {
        let path = text.split_once('/').map_or("", |(_, path)| path);
        let has_path = !path.is_empty() || text.contains("**");
        let is_outside = |part| text.contains(part) || path.contains(':');
        let ends = text.starts_with('/') || text.ends_with('/');
        if !has_path || ends || ["://", "@", " "].into_iter().any(is_outside) {
            return Err(format!(
                "\"{}\" matches no repository: write registry/repository, without scheme, tag and digest; registry/** is all of a registry",
                excerpt(text, 80)
            ));
        }
        Self::parse(text)
    }

    /// Parses a glob of namespaces.
    ///
    /// # Errors
    ///
    /// A message for a malformed glob.
    pub fn of_namespaces(text: &str) -> Result<Self, String> {
        Self::parse(text)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let refused = |reason: &dyn fmt::Display| {
            format!("\"{}\" is no pattern: {reason}", excerpt(text, 80))
        };
        if text.is_empty() {
            return Err("a pattern is empty".to_owned());
        }
        if text.len() > MAXIMUM_PATTERN_BYTES {
            let reason = format!("it has more than {MAXIMUM_PATTERN_BYTES} bytes");
            return Err(refused(&reason));
        }
        let mut depth = 0_usize;
        let is_nested = |character| {
            depth =
                depth + usize::from(character == '{') - usize::from(character == '}' && depth > 0);
            depth > MAXIMUM_NESTED
        };
        if text.chars().any(is_nested) {
            let reason =
                format!("it has more than {MAXIMUM_NESTED} alternatives within each other");
            return Err(refused(&reason));
        }
        // The case of hosts does not matter, and paths and namespaces have no upper case.
        let glob = GlobBuilder::new(text)
            .literal_separator(true)
            .backslash_escape(false)
            .case_insensitive(true)
            .build();
        // Unlike a matcher, a set refuses what it cannot compile.
        let set = glob.and_then(|glob| GlobSet::new([glob]));
        set.map(Self).map_err(|error| refused(error.kind()))
    }

    fn matches(&self, text: &str) -> bool {
        self.0.is_match(text)
    }
}

impl Policy {
    /// Decides on a mount, and returns the demands on its artifact.
    ///
    /// # Errors
    ///
    /// The reason that the mount is refused.
    pub fn decide(&self, request: PolicyRequest<'_>) -> Result<PolicyDemands, PolicyError> {
        let found = self.rules.iter().enumerate().find(|(_, rule)| rule.matches(request));
        let number = found.map(|(index, _)| index + 1);
        let (action, mut demands) = match found {
            Some((_, rule)) => (rule.action, rule.demands.clone()),
            None => (self.default, PolicyDemands::default()),
        };
        if action == PolicyAction::Deny {
            let namespace = request.namespace.map(str::to_owned);
            return Err(PolicyError::Denied { rule: number, namespace });
        }
        if demands.digest && request.reference.digest().is_none() {
            return Err(PolicyError::NoDigest { rule: number });
        }
        if request.require_signature {
            let by_any = || SignatureDemand::signed_by(self.signers.clone());
            let demand = demands.signature.get_or_insert_with(by_any);
            demand.mode = SignatureMode::Enforce;
            if demand.statements.iter().all(|statement| statement.signers.is_empty()) {
                return Err(PolicyError::NoKeys);
            }
        }
        Ok(demands)
    }
}

impl PolicyRule {
    fn matches(&self, request: PolicyRequest<'_>) -> bool {
        let repository = request.reference.repository();
        // Another spelling of a host reaches the same registry, and must meet the same rule.
        let spellings = other_spellings(repository.host()).into_iter();
        let mut names = spellings.map(|host| format!("{host}/{}", repository.path()));
        let any = |patterns: &[GlobPattern], text: &str| {
            patterns.is_empty() || patterns.iter().any(|pattern| pattern.matches(text))
        };
        // A request without a namespace matches only rules for all namespaces.
        let matches_namespace = match request.namespace {
            Some(namespace) => any(&self.namespaces, namespace),
            None => self.namespaces.is_empty(),
        };
        let matches_name = |name: &str| any(&self.references, name);
        matches_namespace
            && (matches_name(&repository.to_string()) || names.any(|name| matches_name(&name)))
    }
}

fn rule_name(rule: Option<usize>) -> String {
    rule.map_or("its default".to_owned(), |number| format!("rule {number}"))
}

fn namespace_clause(namespace: Option<&String>) -> String {
    namespace.map(|name| format!(" for the namespace {name}")).unwrap_or_default()
}

#[cfg(test)]
mod tests;
