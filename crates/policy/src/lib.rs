//! What the node's administrator lets be mounted, by whom, and under which demands.
//!
//! Facts in, decision out: the first rule that matches counts.
//!
//! An attribute of a volume can add a demand and never removes one.

use std::sync::Arc;

use globset::{GlobBuilder, GlobMatcher};

use oci::Reference;
use oci::registry::other_spellings;
use oci::signature::{NamedKey, SignatureDemand, SignatureFormat, SignatureMode};
use sys::reload::Reloadable;

/// The policy of now, read again when the configuration or a key's file changes. Cheap to clone.
pub type PolicySource = Reloadable<Policy>;

/// Returns a source of the policy that allows everything.
#[must_use]
pub fn permissive() -> PolicySource {
    Reloadable::new("the policy", |_| Ok(Policy::default()), |_| {})
}

/// The node's rules. The default lets everything pass.
#[derive(Clone, Debug)]
pub struct Policy {
    /// In order; the first that matches counts.
    pub rules: Vec<Rule>,
    /// What no rule matches.
    pub default: Action,
    /// All keys, for volumes that demand a signature where no rule does.
    pub keys: Arc<[NamedKey]>,
}

/// Whether something may be mounted at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
pub enum Action {
    /// It may.
    #[default]
    Allow,
    /// It may not.
    Deny,
}

/// One rule.
#[derive(Clone, Debug)]
pub struct Rule {
    /// `host/path` of the repository; none means any.
    pub references: Vec<Pattern>,
    /// Namespaces of pods; none means any.
    pub namespaces: Vec<Pattern>,
    /// What then.
    pub action: Action,
    /// What is demanded besides.
    pub demands: Demands,
}

/// What an artifact must be, beyond being allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Demands {
    /// The reference must name a digest.
    pub digest: bool,
    /// Bytes of all blobs, and of the unpacked tree.
    pub maximum_bytes: Option<u64>,
    /// Whose signature it must have.
    pub signature: Option<SignatureDemand>,
}

/// A glob: `*` within a part, `**` across parts.
#[derive(Clone, Debug)]
pub struct Pattern(GlobMatcher);

/// What is known before anything is asked.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// What is to be mounted.
    pub reference: &'a Reference,
    /// The pod's namespace, where the kubelet says it.
    pub namespace: Option<&'a str>,
    /// Whether the volume demands a signature.
    pub require_signature: bool,
}

/// Why something may not be mounted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// By a rule, or by the default.
    #[error("the node's policy does not allow it ({}){}: ask the node's administrator",
        place(*.rule), of_namespace(.namespace.as_ref()))]
    Denied {
        /// The rule, counted from 1; none is the default.
        rule: Option<usize>,
        /// The pod's namespace.
        namespace: Option<String>,
    },
    /// `requireDigest`.
    #[error("the node's policy ({}) wants a digest: write the reference as name@sha256:...", place(*.rule))]
    NoDigest {
        /// The rule, counted from 1.
        rule: Option<usize>,
    },
    /// `requireSignature`, and no key that could have signed.
    #[error(
        "requireSignature is \"true\" and this node has no key to verify signatures with: configure one (policy.keys), or remove the attribute"
    )]
    NoKeys,
}

impl Default for Policy {
    fn default() -> Self {
        Self { rules: Vec::new(), default: Action::Allow, keys: Arc::new([]) }
    }
}

impl Pattern {
    /// Parses a glob.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let shown: String = text.chars().filter(|c| !c.is_control()).take(80).collect();
        // Hosts are the same in upper case; all else that is matched has none.
        let glob = GlobBuilder::new(text)
            .literal_separator(true)
            .backslash_escape(false)
            .case_insensitive(true)
            .build();
        match glob {
            Ok(glob) if !text.is_empty() => Ok(Self(glob.compile_matcher())),
            Ok(_) => Err("a pattern is empty".to_owned()),
            Err(error) => Err(format!("\"{shown}\" is no pattern: {}", error.kind())),
        }
    }

    fn matches(&self, text: &str) -> bool {
        self.0.is_match(text)
    }
}

impl Policy {
    /// What the facts lead to.
    ///
    /// # Errors
    ///
    /// Why it may not be mounted.
    pub fn decide(&self, facts: Facts<'_>) -> Result<Demands, Refusal> {
        let found = self.rules.iter().enumerate().find(|(_, rule)| rule.matches(facts));
        let number = found.map(|(index, _)| index + 1);
        let (action, mut demands) = match found {
            Some((_, rule)) => (rule.action, rule.demands.clone()),
            None => (self.default, Demands::default()),
        };
        if action == Action::Deny {
            let namespace = facts.namespace.map(str::to_owned);
            return Err(Refusal::Denied { rule: number, namespace });
        }
        if demands.digest && facts.reference.digest().is_none() {
            return Err(Refusal::NoDigest { rule: number });
        }
        if facts.require_signature {
            let demand = demands.signature.get_or_insert_with(|| SignatureDemand {
                mode: SignatureMode::Enforce,
                format: SignatureFormat::Any,
                keys: Arc::clone(&self.keys),
            });
            demand.mode = SignatureMode::Enforce;
            if demand.keys.is_empty() {
                return Err(Refusal::NoKeys);
            }
        }
        Ok(demands)
    }
}

impl Rule {
    fn matches(&self, facts: Facts<'_>) -> bool {
        let repository = facts.reference.repository();
        // Whoever writes a host in another way reaches the same registry, and must meet the same rule.
        let spellings = other_spellings(repository.host()).into_iter();
        let mut names = spellings.map(|host| format!("{host}/{}", repository.path()));
        let any = |patterns: &[Pattern], text: &str| {
            patterns.is_empty() || patterns.iter().any(|pattern| pattern.matches(text))
        };
        // Who does not say where he is from is from nowhere that a rule could name.
        let from = match facts.namespace {
            Some(namespace) => any(&self.namespaces, namespace),
            None => self.namespaces.is_empty(),
        };
        let reference = |name: &str| any(&self.references, name);
        from && (reference(&repository.to_string()) || names.any(|name| reference(&name)))
    }
}

fn place(rule: Option<usize>) -> String {
    rule.map_or("its default".to_owned(), |number| format!("rule {number}"))
}

fn of_namespace(namespace: Option<&String>) -> String {
    namespace.map(|name| format!(" for the namespace {name}")).unwrap_or_default()
}

#[cfg(test)]
mod tests;
