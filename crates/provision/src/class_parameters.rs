//! Parameters of a `StorageClass`: the attributes of its volumes as templates, and what an
//! administrator allows the authors of claims.

use std::collections::BTreeMap;

use oci::Reference;
use text::printable::excerpt;

use crate::template::{Template, TemplateError, TemplateToken};

/// Parameter with the name of the secret for nodes.
const SECRET_NAME: &str = "csi.storage.k8s.io/node-publish-secret-name";
/// Parameter with the namespace of the secret for nodes.
const SECRET_NAMESPACE: &str = "csi.storage.k8s.io/node-publish-secret-namespace";
/// Parameter that allows access modes which no artifact needs.
const ALLOW_ANY_ACCESS_MODE: &str = "allowAnyAccessMode";
/// Parameter with the repositories that volumes of the class may name.
const ALLOWED_REPOSITORIES: &str = "allowedRepositories";
/// All parameters besides the attributes of volumes.
const OWN_PARAMETERS: [&str; 4] =
    [ALLOWED_REPOSITORIES, ALLOW_ANY_ACCESS_MODE, SECRET_NAME, SECRET_NAMESPACE];

/// Parsed parameters of a class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassParameters {
    /// Attributes of volumes.
    pub attributes: BTreeMap<String, Template>,
    /// Secret for nodes.
    pub secret: Option<SecretTemplate>,
    /// True if claims may ask for other access modes than `ReadOnlyMany`.
    pub allows_any_access_mode: bool,
    /// Repositories that volumes may name; `None` means all.
    pub allowed_repositories: Option<AllowedRepositories>,
}

/// Secret of a class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretTemplate {
    /// Name of the secret.
    pub name: Template,
    /// Namespace of the secret: constant, or that of the claim.
    pub namespace: Template,
}

/// Hosts, and repositories with all below them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowedRepositories(Vec<String>);

/// Reason why parameters cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParameterError {
    /// An unknown parameter.
    #[error("the parameter \"{key}\" is not known: use {known}")]
    Unknown {
        /// Name of the parameter.
        key: String,
        /// All known ones.
        known: String,
    },
    /// A template with an error.
    #[error("the parameter \"{key}\": {error}")]
    Template {
        /// Name of the parameter.
        key: String,
        /// Reason why it cannot be parsed.
        error: TemplateError,
    },
    /// A secret's namespace with other tokens than the namespace of the claim.
    #[error(
        "the parameter \"{SECRET_NAMESPACE}\" may be a constant or ${{pvc.namespace}}: with other tokens, a claim could name the secrets of other namespaces"
    )]
    SecretNamespace,
    /// One half of the secret.
    #[error("the parameters \"{SECRET_NAME}\" and \"{SECRET_NAMESPACE}\" go together: set both")]
    HalfOfSecret,
    /// A value that is neither true nor false.
    #[error("the parameter \"{ALLOW_ANY_ACCESS_MODE}\" is \"{0}\": use true or false")]
    AnyAccessMode(String),
    /// An entry that no repository can match.
    #[error(
        "the parameter \"{ALLOWED_REPOSITORIES}\" has \"{0}\": write registry.example.com, or registry.example.com/team for all below it, separated by commas"
    )]
    Repository(String),
    /// Credentials of other namespaces for any repository that a claim names.
    #[error(
        "claims choose the artifact, and the secret is not of their namespace: set \"{ALLOWED_REPOSITORIES}\" to the repositories that they may read with it"
    )]
    ForeignSecret,
}

impl ClassParameters {
    /// Parses the parameters of a class. `keys` are the attributes that a volume may have, and
    /// `naming` those of them that name its artifact.
    pub fn parse(
        parameters: &BTreeMap<String, String>,
        keys: &[&str],
        naming: &[&str],
    ) -> Result<Self, ParameterError> {
        let known = |key: &str| keys.contains(&key) || OWN_PARAMETERS.contains(&key);
        if let Some(key) = parameters.keys().find(|key| !known(key)) {
            let known = [keys, &OWN_PARAMETERS].concat().join(", ");
            return Err(ParameterError::Unknown { key: excerpt(key, 100), known });
        }
        // An empty value is an absent one, as in a volume's attributes.
        let get = |key| parameters.get(key).filter(|value| !value.is_empty());
        let template = |(key, value): (&str, &String)| {
            Template::parse(value)
                .map_err(|error| ParameterError::Template { key: key.to_owned(), error })
        };
        let mut attributes = BTreeMap::new();
        for (key, value) in keys.iter().filter_map(|&key| Some((key, get(key)?))) {
            attributes.insert(key.to_owned(), template((key, value))?);
        }
        let secret = match (get(SECRET_NAME), get(SECRET_NAMESPACE)) {
            (None, None) => None,
            (Some(name), Some(namespace)) => Some(SecretTemplate {
                name: template((SECRET_NAME, name))?,
                namespace: template((SECRET_NAMESPACE, namespace))?,
            }),
            _ => return Err(ParameterError::HalfOfSecret),
        };
        let allows_any_access_mode = match get(ALLOW_ANY_ACCESS_MODE).map(String::as_str) {
            None | Some("false") => false,
            Some("true") => true,
            Some(other) => return Err(ParameterError::AnyAccessMode(excerpt(other, 100))),
        };
        let allowed = get(ALLOWED_REPOSITORIES).map(|list| AllowedRepositories::parse(list));
        let parsed = Self {
            attributes,
            secret,
            allows_any_access_mode,
            allowed_repositories: allowed.transpose()?,
        };
        parsed.check_secret(naming)?;
        Ok(parsed)
    }

    /// Returns whether the class names the artifact, in one of the attributes `naming`.
    pub fn names_artifact(&self, naming: &[&str]) -> bool {
        naming.iter().any(|&key| self.attributes.contains_key(key))
    }

    /// Returns whether a template contains this annotation of claims.
    pub fn uses_annotation(&self, key: &str) -> bool {
        let secret = self.secret.iter().flat_map(|secret| [&secret.name, &secret.namespace]);
        let mut tokens = self.attributes.values().chain(secret).flat_map(Template::tokens);
        tokens.any(|token| matches!(token, TemplateToken::ClaimAnnotation(used) if used == key))
    }

    fn check_secret(&self, naming: &[&str]) -> Result<(), ParameterError> {
        let Some(secret) = &self.secret else { return Ok(()) };
        if !secret.namespace.tokens().all(|token| *token == TemplateToken::ClaimNamespace) {
            return Err(ParameterError::SecretNamespace);
        }
        let is_of_claim = secret.namespace == Template::of_claim_namespace();
        let mut named = naming.iter().filter_map(|&key| self.attributes.get(key));
        let is_chosen = !self.names_artifact(naming) || named.any(Template::is_chosen_by_claims);
        if is_chosen && !is_of_claim && self.allowed_repositories.is_none() {
            return Err(ParameterError::ForeignSecret);
        }
        Ok(())
    }
}

impl AllowedRepositories {
    fn parse(list: &str) -> Result<Self, ParameterError> {
        let entries = list.split(',').map(|entry| {
            let entry = entry.trim();
            // An artifact below it must be a valid one: this excludes tags, digests and schemes.
            let below = format!("{entry}/a").parse::<Reference>();
            match below {
                Ok(below) if below.repository().to_string() == format!("{entry}/a") => {
                    Ok(entry.to_owned())
                }
                _ => Err(ParameterError::Repository(excerpt(entry, 100))),
            }
        });
        Ok(Self(entries.collect::<Result<_, _>>()?))
    }

    /// Returns whether a volume may name this artifact. An entry ends at the end of a name:
    /// `r.io/team` allows neither `r.io/team-b` nor `r.io:5000/team`.
    pub fn allow(&self, reference: &Reference) -> bool {
        let repository = reference.repository().to_string();
        self.0.iter().any(|entry| {
            let below = repository.strip_prefix(entry.as_str());
            below.is_some_and(|below| below.is_empty() || below.starts_with('/'))
        })
    }
}

impl std::fmt::Display for AllowedRepositories {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [&str; 3] = ["reference", "repository", "pullPolicy"];
    const NAMING: [&str; 2] = ["reference", "repository"];

    fn parse(pairs: &[(&str, &str)]) -> Result<ClassParameters, ParameterError> {
        let pairs = pairs.iter().map(|(key, value)| ((*key).into(), (*value).into()));
        ClassParameters::parse(&pairs.collect(), &KEYS, &NAMING)
    }

    #[test]
    fn an_unknown_parameter_lists_the_known_ones() {
        for key in ["refrence", "fsType", "csi.storage.k8s.io/fstype", "Reference"] {
            let text = parse(&[(key, "x")]).expect_err("unknown").to_string();
            for known in [&format!("\"{key}\""), "pullPolicy", SECRET_NAME, ALLOWED_REPOSITORIES] {
                assert!(text.contains(known), "{text}");
            }
        }
    }

    #[test]
    fn an_empty_value_is_an_absent_one() {
        let pairs = [("reference", ""), (SECRET_NAME, ""), (ALLOWED_REPOSITORIES, "")];
        let parsed = parse(&pairs).expect("valid");
        assert_eq!(parsed, parse(&[]).expect("valid"));
        assert!(!parsed.names_artifact(&NAMING));
    }

    #[test]
    fn a_secret_is_constant_or_of_the_claims_namespace() {
        let secret = |name, namespace| parse(&[(SECRET_NAME, name), (SECRET_NAMESPACE, namespace)]);
        secret("${pvc.annotations['secret']}", "${pvc.namespace}").expect("the claim's own");
        for namespace in ["${pvc.name}", "${pvc.annotations['a']}", "a-${pv.name}"] {
            assert_eq!(secret("a", namespace), Err(ParameterError::SecretNamespace), "{namespace}");
        }
        assert_eq!(parse(&[(SECRET_NAME, "a")]), Err(ParameterError::HalfOfSecret));
        assert_eq!(parse(&[(SECRET_NAMESPACE, "a")]), Err(ParameterError::HalfOfSecret));
    }

    #[test]
    fn a_secret_of_another_namespace_is_for_named_repositories() {
        let secret = [(SECRET_NAME, "pull"), (SECRET_NAMESPACE, "platform")];
        let with = |more: &[_]| parse(&[&secret, more].concat());
        assert_eq!(with(&[]), Err(ParameterError::ForeignSecret), "the annotation names it");
        for reference in ["${pvc.annotations['a']}", "r.io/${pvc.name}:v1"] {
            assert_eq!(with(&[("reference", reference)]), Err(ParameterError::ForeignSecret));
        }
        with(&[("reference", "r.io/tool:v1")]).expect("the class names it");
        with(&[("reference", "r.io/${pvc.namespace}/tool:v1")]).expect("the class names it");
        with(&[(ALLOWED_REPOSITORIES, "r.io/team")]).expect("the class bounds it");
        let prefixed = [(SECRET_NAME, "pull"), (SECRET_NAMESPACE, "pull-${pvc.namespace}")];
        assert_eq!(parse(&prefixed), Err(ParameterError::ForeignSecret));
    }

    #[test]
    fn repositories_end_at_the_end_of_a_name() {
        let list = [(ALLOWED_REPOSITORIES, "r.io/team, r.io:5000,localhost:80/a")];
        let allowed = parse(&list).expect("valid").allowed_repositories.expect("some");
        for (reference, expected) in [
            ("r.io/team/tool:v1", true),
            ("r.io/team:v1", true),
            ("r.io/team-b/tool:v1", false),
            ("r.io/tool:v1", false),
            ("r.io:5000/any/thing", true),
            ("r.io:50001/any/thing", false),
            ("r.io.evil.org/team/tool:v1", false),
            ("localhost:80/a/b", true),
        ] {
            let reference: Reference = reference.parse().expect("valid");
            assert_eq!(allowed.allow(&reference), expected, "{reference}");
        }
        for wrong in [",", "r.io/team:v1", "https://r.io", "r.io/team/", "*", "r.io/T"] {
            let refused = parse(&[(ALLOWED_REPOSITORIES, wrong)]);
            assert!(matches!(refused, Err(ParameterError::Repository(_))), "{wrong}: {refused:?}");
        }
    }

    #[test]
    fn any_access_mode_is_true_or_false() {
        let with = |value| parse(&[(ALLOW_ANY_ACCESS_MODE, value)]);
        assert!(with("true").expect("valid").allows_any_access_mode);
        assert!(!with("false").expect("valid").allows_any_access_mode);
        assert_eq!(with("yes"), Err(ParameterError::AnyAccessMode("yes".to_owned())));
    }
}
