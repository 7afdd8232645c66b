//! Templates in the parameters of a class, with the tokens of external-provisioner.
//!
//! A `$` that no `{` follows stands for itself. Everything in `${...}` must be a known token.

use std::collections::BTreeMap;

use text::printable::excerpt;

/// Maximum bytes of an expanded text, that of a volume's attribute: a class can repeat an
/// annotation of 256 KiB thousands of times.
const MAXIMUM_BYTES: usize = 64 * 1024;

/// A parsed template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<TemplatePart>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum TemplatePart {
    Text(String),
    Token(TemplateToken),
}

/// A token, which a claim replaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TemplateToken {
    /// Name of the claim: `${pvc.name}`.
    ClaimName,
    /// Namespace of the claim: `${pvc.namespace}`.
    ClaimNamespace,
    /// An annotation of the claim: `${pvc.annotations['key']}`.
    ClaimAnnotation(String),
    /// Name of the volume: `${pv.name}`.
    VolumeName,
}

/// Texts of a claim that replace tokens.
#[derive(Clone, Copy, Debug)]
pub struct ClaimTexts<'a> {
    /// Name of the claim.
    pub name: &'a str,
    /// Namespace of the claim.
    pub namespace: &'a str,
    /// Annotations of the claim.
    pub annotations: &'a BTreeMap<String, String>,
    /// Name of its volume.
    pub volume_name: &'a str,
}

/// Reason why a template cannot be parsed or expanded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// An unknown token.
    #[error(
        "${{{0}}} is not known: use ${{pvc.name}}, ${{pvc.namespace}}, ${{pvc.annotations['key']}} or ${{pv.name}}"
    )]
    Unknown(String),
    /// A `${` without its end.
    #[error("a ${{ has no }}")]
    Unclosed,
    /// An annotation that the claim lacks.
    #[error("the claim has no annotation {0}")]
    MissingAnnotation(String),
    /// A text of the claim that may end the value that it stands in.
    #[error(
        "the claim has the text \"{0}\" for it, and beside other text it may have letters, digits and ._:/@- only"
    )]
    NotPlain(String),
    /// More bytes than a volume's attribute may have.
    #[error("it has more than {MAXIMUM_BYTES} bytes with the texts of the claim")]
    TooLong,
}

impl Template {
    /// Parses a template.
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        let (mut parts, mut rest) = (Vec::new(), text);
        while let Some((before, after)) = rest.split_once("${") {
            let (token, after) = after.split_once('}').ok_or(TemplateError::Unclosed)?;
            if !before.is_empty() {
                parts.push(TemplatePart::Text(before.to_owned()));
            }
            parts.push(TemplatePart::Token(TemplateToken::parse(token)?));
            rest = after;
        }
        if !rest.is_empty() {
            parts.push(TemplatePart::Text(rest.to_owned()));
        }
        Ok(Self(parts))
    }

    /// Returns the template of the claim's own namespace.
    pub(crate) fn of_claim_namespace() -> Self {
        Self(vec![TemplatePart::Token(TemplateToken::ClaimNamespace)])
    }

    /// Returns the tokens in their order.
    pub fn tokens(&self) -> impl Iterator<Item = &TemplateToken> {
        self.0.iter().filter_map(|part| match part {
            TemplatePart::Token(token) => Some(token),
            TemplatePart::Text(_) => None,
        })
    }

    /// Returns whether the author of a claim has a say in the text: by its name or annotations.
    pub fn is_chosen_by_claims(&self) -> bool {
        self.tokens().any(|token| {
            matches!(token, TemplateToken::ClaimName | TemplateToken::ClaimAnnotation(_))
        })
    }

    /// Checks the texts of a claim that stand beside other text in YAML: one with a line break or a
    /// brace could add entries of its own.
    pub fn check_in_yaml(&self, claim: ClaimTexts<'_>) -> Result<(), TemplateError> {
        let is_plain =
            |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || "._:/@-".contains(c));
        for token in self.tokens().filter(|_| self.0.len() > 1) {
            let text = token.text(claim)?;
            if !is_plain(text) {
                return Err(TemplateError::NotPlain(excerpt(text, 100)));
            }
        }
        Ok(())
    }

    /// Returns the text for a claim.
    pub fn expand(&self, claim: ClaimTexts<'_>) -> Result<String, TemplateError> {
        let mut expanded = String::new();
        for part in &self.0 {
            expanded += match part {
                TemplatePart::Text(text) => text,
                TemplatePart::Token(token) => token.text(claim)?,
            };
            if expanded.len() > MAXIMUM_BYTES {
                return Err(TemplateError::TooLong);
            }
        }
        Ok(expanded)
    }
}

impl TemplateToken {
    fn parse(token: &str) -> Result<Self, TemplateError> {
        let annotation = |token: &str| {
            let key = token.strip_prefix("pvc.annotations['")?.strip_suffix("']")?;
            (!key.is_empty()).then(|| Self::ClaimAnnotation(key.to_owned()))
        };
        match token {
            "pvc.name" => Ok(Self::ClaimName),
            "pvc.namespace" => Ok(Self::ClaimNamespace),
            "pv.name" => Ok(Self::VolumeName),
            _ => annotation(token).ok_or_else(|| TemplateError::Unknown(excerpt(token, 100))),
        }
    }

    fn text<'a>(&self, claim: ClaimTexts<'a>) -> Result<&'a str, TemplateError> {
        match self {
            Self::ClaimName => Ok(claim.name),
            Self::ClaimNamespace => Ok(claim.namespace),
            Self::VolumeName => Ok(claim.volume_name),
            Self::ClaimAnnotation(key) => {
                let value = claim.annotations.get(key).map(String::as_str);
                value.ok_or_else(|| TemplateError::MissingAnnotation(excerpt(key, 100)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn expand(template: &str, annotations: &[(&str, &str)]) -> Result<String, TemplateError> {
        let annotations = annotations.iter().map(|(key, value)| ((*key).into(), (*value).into()));
        let annotations = annotations.collect();
        Template::parse(template)?.expand(ClaimTexts {
            name: "tool-web-0",
            namespace: "team",
            annotations: &annotations,
            volume_name: "pvc-1",
        })
    }

    #[test]
    fn tokens_are_replaced_and_all_else_stays() {
        let all = "r.io/${pvc.namespace}/${pvc.name}/${pv.name}:${pvc.annotations['a/b']}-$5$";
        assert_eq!(
            expand(all, &[("a/b", "v1 ${pvc.name}")]),
            Ok("r.io/team/tool-web-0/pvc-1:v1 ${pvc.name}-$5$".to_owned()),
            "the text of a claim is no template"
        );
        assert_eq!(expand("", &[]), Ok(String::new()));
    }

    #[test]
    fn a_text_of_a_claim_adds_nothing_to_yaml() {
        let check = |template: &str, value: &str| {
            let annotations = [("x".to_owned(), value.to_owned())].into();
            Template::parse(template).expect("a template").check_in_yaml(ClaimTexts {
                name: "tool",
                namespace: "team",
                annotations: &annotations,
                volume_name: "pvc-1",
            })
        };
        let part = "- reference: r.io/team/${pvc.annotations['x']}";
        assert_eq!(check(part, "tool:v1"), Ok(()));
        for value in ["a\n- reference: evil.io/x", "a}, {reference: evil.io/x", "a #", "'", "*b"] {
            assert!(matches!(check(part, value), Err(TemplateError::NotPlain(_))), "{value}");
            assert_eq!(check("${pvc.annotations['x']}", value), Ok(()), "the claim's own list");
        }
    }

    #[test]
    fn unknown_tokens_and_missing_annotations_are_errors() {
        for token in ["pvc.uid", "", "PVC.name", "pvc.annotations[a]", "pvc.annotations['']", " "] {
            let text = format!("a${{{token}}}b");
            assert_eq!(expand(&text, &[]), Err(TemplateError::Unknown(token.to_owned())));
        }
        for text in ["${", "${pvc.name", "a${pvc.annotations['a']"] {
            assert_eq!(expand(text, &[]), Err(TemplateError::Unclosed), "{text}");
        }
        let missing = expand("${pvc.annotations['a']}", &[("b", "")]);
        assert_eq!(missing, Err(TemplateError::MissingAnnotation("a".to_owned())));
    }

    #[test]
    fn an_annotation_cannot_fill_the_memory() {
        let long = "x".repeat(MAXIMUM_BYTES);
        let template = "${pvc.annotations['a']}".repeat(1000);
        assert_eq!(expand(&template[..23], &[("a", &long)]).map(|text| text.len()), Ok(65536));
        assert_eq!(expand(&template, &[("a", &long)]), Err(TemplateError::TooLong));
    }

    #[test]
    fn the_author_of_a_claim_chooses_its_name_and_annotations() {
        for (text, chosen) in [
            ("${pvc.name}", true),
            ("a${pvc.annotations['a']}", true),
            ("${pvc.namespace}/${pv.name}", false),
            ("constant", false),
        ] {
            assert_eq!(Template::parse(text).expect("valid").is_chosen_by_claims(), chosen);
        }
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_parser(text in r"[${}a-z.\['\]\PC]{0,64}") {
            match Template::parse(&text) {
                // Without a token, the text is its own expansion.
                Ok(template) if template.tokens().next().is_none() => {
                    prop_assert_eq!(expand(&text, &[]), Ok(text));
                }
                Ok(_) => {}
                Err(error) => prop_assert!(text.contains("${"), "{}", error),
            }
        }

        #[test]
        fn parts_come_in_their_order(
            parts in prop::collection::vec(prop_oneof![
                "[a-z$]{0,5}[a-z]".prop_map(|text| (text.clone(), text)),
                Just(("${pvc.name}".to_owned(), "tool-web-0".to_owned())),
                Just(("${pvc.annotations['k']}".to_owned(), "}${".to_owned())),
            ], 0..12),
        ) {
            let (template, expected): (String, String) = parts.into_iter().unzip();
            prop_assert_eq!(expand(&template, &[("k", "}${")]), Ok(expected));
        }
    }
}
