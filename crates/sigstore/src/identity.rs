//! The signer that a certificate names, and what a policy demands of it.
//!
//! The names of the claims are those of Sigstore's own libraries. [Fulcio] describes them.
//!
//! [Fulcio]: https://github.com/sigstore/fulcio/blob/main/docs/oid-info.md

use std::collections::BTreeMap;
use std::fmt;

use regex::{Regex, RegexBuilder};
use serde::Serialize;
use sigstore_verify::crypto::{CertificateInfo, FulcioCiClaims};
use text::printable::shorten;

/// The maximum memory of one compiled expression in bytes.
const EXPRESSION_BYTES: usize = 1 << 20;
/// The maximum length of a part of an identity in a message in bytes.
const SHOWN_BYTES: usize = 200;

type ReadClaim = fn(&FulcioCiClaims) -> &Option<String>;

/// The claims that a policy may demand.
const CLAIMS: [(&str, ReadClaim); 21] = [
    ("buildConfigDigest", |claims| &claims.build_config_digest),
    ("buildConfigURI", |claims| &claims.build_config_uri),
    ("buildSignerDigest", |claims| &claims.build_signer_digest),
    ("buildSignerURI", |claims| &claims.build_signer_uri),
    ("buildTrigger", |claims| &claims.build_trigger),
    ("deploymentEnvironment", |claims| &claims.deployment_environment),
    ("githubWorkflowName", |claims| &claims.deprecated_github.workflow_name),
    ("githubWorkflowRef", |claims| &claims.deprecated_github.workflow_ref),
    ("githubWorkflowRepository", |claims| &claims.deprecated_github.workflow_repository),
    ("githubWorkflowSHA", |claims| &claims.deprecated_github.workflow_sha),
    ("githubWorkflowTrigger", |claims| &claims.deprecated_github.workflow_trigger),
    ("runInvocationURI", |claims| &claims.run_invocation_uri),
    ("runnerEnvironment", |claims| &claims.runner_environment),
    ("sourceRepositoryDigest", |claims| &claims.source_repository_digest),
    ("sourceRepositoryIdentifier", |claims| &claims.source_repository_identifier),
    ("sourceRepositoryOwnerIdentifier", |claims| &claims.source_repository_owner_identifier),
    ("sourceRepositoryOwnerURI", |claims| &claims.source_repository_owner_uri),
    ("sourceRepositoryRef", |claims| &claims.source_repository_ref),
    ("sourceRepositoryURI", |claims| &claims.source_repository_uri),
    ("sourceRepositoryVisibilityAtSigning", |claims| {
        &claims.source_repository_visibility_at_signing
    }),
    ("tokenSubject", |claims| &claims.token_subject),
];

/// The signer that a certificate names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SignerIdentity {
    /// The issuer of the identity token that the signer had.
    pub issuer: String,
    /// The email address or URI of the signer.
    pub subject: String,
    /// Claims about the job that signed, by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub claims: BTreeMap<&'static str, String>,
}

/// The demand on the identity of a signer.
#[derive(Clone, Debug)]
pub struct IdentityPattern {
    issuer: TextPattern,
    subject: TextPattern,
    claims: BTreeMap<String, String>,
}

/// The demand on one text.
#[derive(Clone, Debug)]
pub enum TextPattern {
    /// The text itself.
    Exact(String),
    /// An expression that matches the whole text.
    Expression {
        /// The expression as it is written.
        written: String,
        /// The expression between anchors.
        anchored: Regex,
    },
}

impl SignerIdentity {
    /// Returns the identity of a certificate that names an issuer and a subject.
    pub(crate) fn of(certificate: &CertificateInfo) -> Option<Self> {
        let claims = &certificate.ci_claims;
        let claims = CLAIMS.iter().filter_map(|(name, read)| Some((*name, read(claims).clone()?)));
        Some(Self {
            issuer: certificate.issuer.clone()?,
            subject: certificate.identity.as_ref()?.as_str().to_owned(),
            claims: claims.collect(),
        })
    }
}

impl fmt::Display for SignerIdentity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [subject, issuer] =
            [&self.subject, &self.issuer].map(|text| shorten(text, SHOWN_BYTES));
        write!(formatter, "{subject} ({issuer})")
    }
}

impl TextPattern {
    /// Returns the pattern of a field `name`, which is given either as it is or as an expression.
    ///
    /// # Errors
    ///
    /// A message that names the field.
    pub fn parse(
        name: &str,
        exact: Option<&str>,
        expression: Option<&str>,
    ) -> Result<Self, String> {
        match (exact, expression) {
            (Some(exact), None) if exact.contains(char::is_whitespace) => {
                Err(format!("{name} has white space, which none has"))
            }
            (Some(exact), None) if !exact.is_empty() => Ok(Self::Exact(exact.to_owned())),
            (None, Some(written)) if !written.is_empty() => {
                let compile = |text: &str| {
                    let error = |error| format!("{name}RegExp is no regular expression: {error}");
                    RegexBuilder::new(text).size_limit(EXPRESSION_BYTES).build().map_err(error)
                };
                // It must be whole by itself: "a)|(b" would reach around the anchors.
                compile(written)?;
                let anchored = compile(&format!(r"\A(?:{written})\z"))?;
                Ok(Self::Expression { written: written.to_owned(), anchored })
            }
            _ => Err(format!("needs either {name} or {name}RegExp")),
        }
    }

    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => text == exact,
            Self::Expression { anchored, .. } => anchored.is_match(text),
        }
    }
}

impl fmt::Display for TextPattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(exact) => write!(formatter, "be \"{exact}\""),
            Self::Expression { written, .. } => write!(formatter, "match \"{written}\""),
        }
    }
}

impl IdentityPattern {
    /// Returns the demand on an issuer, a subject and claims, of which each must have its value.
    ///
    /// # Errors
    ///
    /// A message that names an unknown claim.
    pub fn new(
        issuer: TextPattern,
        subject: TextPattern,
        claims: BTreeMap<String, String>,
    ) -> Result<Self, String> {
        let known = |name: &String| CLAIMS.iter().any(|(claim, _)| claim == name);
        if let Some(unknown) = claims.keys().find(|name| !known(name)) {
            let names = CLAIMS.map(|(name, _)| name).join(", ");
            return Err(format!("there is no claim \"{unknown}\": the claims are {names}"));
        }
        Ok(Self { issuer, subject, claims })
    }

    /// Checks that an identity is as demanded.
    ///
    /// # Errors
    ///
    /// The first part that is not, with what it must be and what it is.
    pub fn check(&self, identity: &SignerIdentity) -> Result<(), String> {
        let parts = [
            ("issuer", &self.issuer, &identity.issuer),
            ("subject", &self.subject, &identity.subject),
        ];
        if let Some((part, demanded, found)) =
            parts.into_iter().find(|(_, demanded, found)| !demanded.matches(found))
        {
            return Err(format!("the {part} must {demanded}, not be {}", shown(Some(found))));
        }
        for (name, demanded) in &self.claims {
            let found = identity.claims.get(name.as_str());
            if found != Some(demanded) {
                return Err(format!("{name} must be \"{demanded}\", not {}", shown(found)));
            }
        }
        Ok(())
    }
}

fn shown(found: Option<&String>) -> String {
    found.map_or("absent".to_owned(), |found| format!("\"{}\"", shorten(found, SHOWN_BYTES)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ISSUER: &str = "https://token.actions.githubusercontent.com";
    const SUBJECT: &str = "https://github.com/team/app/.github/workflows/push.yml@refs/heads/main";

    fn identity() -> SignerIdentity {
        SignerIdentity {
            issuer: ISSUER.to_owned(),
            subject: SUBJECT.to_owned(),
            claims: [("sourceRepositoryRef", "refs/heads/main".to_owned())].into(),
        }
    }

    fn exact(text: &str) -> TextPattern {
        TextPattern::parse("x", Some(text), None).expect("a text")
    }

    fn expression(text: &str) -> TextPattern {
        TextPattern::parse("x", None, Some(text)).expect("an expression")
    }

    #[test]
    fn an_identity_must_match_as_a_whole() {
        let check = |issuer, subject| {
            let pattern = IdentityPattern::new(issuer, subject, BTreeMap::new()).expect("valid");
            pattern.check(&identity())
        };
        assert_eq!(check(exact(ISSUER), exact(SUBJECT)), Ok(()));
        let by_team = "https://github[.]com/team/[^/]+/[.]github/.*@refs/heads/(main|release)";
        assert_eq!(check(exact(ISSUER), expression(by_team)), Ok(()));
        assert_eq!(check(expression(".*"), expression(&format!("(?i){SUBJECT}"))), Ok(()));
        for (issuer, subject, part) in [
            (exact("https://accounts.google.com"), exact(SUBJECT), "issuer"),
            (exact("https://token.actions.githubusercontent.com/"), exact(SUBJECT), "issuer"),
            (exact(ISSUER), exact("https://github.com/team/app"), "subject"),
            // A part of the text is not enough, in whatever way an expression is written.
            (exact(ISSUER), expression("https://github.com/team/app"), "subject"),
            (exact(ISSUER), expression("github.com/team/.*"), "subject"),
            (exact(ISSUER), expression("(?m)^https://github.com/team/app$|x"), "subject"),
            (exact(ISSUER), expression("https|.*@refs/heads/dev"), "subject"),
        ] {
            let error = check(issuer, subject).expect_err(part);
            assert!(error.starts_with(&format!("the {part} must")), "{error}");
        }
        let mut lines = identity();
        lines.subject = format!("{SUBJECT}\nx");
        let pattern = IdentityPattern::new(exact(ISSUER), expression(SUBJECT), BTreeMap::new());
        assert!(pattern.expect("valid").check(&lines).is_err());
    }

    #[test]
    fn claims_must_have_their_values() {
        let with = |name: &str, value: &str| {
            let claims = [(name.to_owned(), value.to_owned())].into();
            IdentityPattern::new(exact(ISSUER), exact(SUBJECT), claims)
        };
        let check = |name, value| with(name, value).expect("valid").check(&identity());
        assert_eq!(check("sourceRepositoryRef", "refs/heads/main"), Ok(()));
        assert_eq!(
            check("sourceRepositoryRef", "refs/heads/dev").expect_err("another"),
            "sourceRepositoryRef must be \"refs/heads/dev\", not \"refs/heads/main\""
        );
        assert_eq!(
            check("buildTrigger", "push").expect_err("absent"),
            "buildTrigger must be \"push\", not absent"
        );
        assert!(with("repository", "x").expect_err("unknown").contains("sourceRepositoryURI"));
    }

    #[test]
    fn malformed_patterns_are_refused() {
        for (exact, expression, named) in [
            (None, None, "issuerRegExp"),
            (Some("a"), Some("a"), "either"),
            (Some(""), None, "either"),
            (Some("a\n"), None, "white space"),
            (None, Some(""), "either"),
            (None, Some("a)|(b"), "no regular expression"),
            (None, Some("(?x)a #"), "no regular expression"),
            (None, Some("\\w{1000}{1000}"), "no regular expression"),
        ] {
            let error = TextPattern::parse("issuer", exact, expression).expect_err(named);
            assert!(error.contains(named), "{error}");
        }
    }
}
