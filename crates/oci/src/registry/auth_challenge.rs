//! Challenges: the header `WWW-Authenticate`.
//!
//! Reads what registries really send: several challenges in one header and in several, commas
//! inside quoted scopes, a missing service or scope, unknown schemes. Unreadable parts are skipped
//! and are never an error.

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};
use text::printable::truncated;

/// Maximum bytes that are read of a header, more than any registry sends.
const MAXIMUM_HEADER_BYTES: usize = 16 * 1024;
/// Maximum number of scopes of one challenge. A registry asks for one, sometimes two.
const MAXIMUM_SCOPES: usize = 8;

/// A supported authentication challenge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// A bearer token from a token server.
    Bearer {
        /// Address of the token server, as written.
        realm: String,
        /// Name of the registry at the token server.
        service: Option<String>,
        /// Scopes of the token; empty if the challenge has none.
        scopes: Vec<String>,
    },
    /// User name and password.
    Basic,
}

/// Returns the supported challenges of a response, in their order.
pub(super) fn read(headers: &HeaderMap) -> Vec<Challenge> {
    headers
        .get_all(WWW_AUTHENTICATE)
        .iter()
        .flat_map(|value| parse(&String::from_utf8_lossy(value.as_bytes())))
        .filter_map(known)
        .collect()
}

/// A challenge of any scheme, with names in lower case.
#[derive(Debug, Default)]
pub(super) struct RawChallenge {
    scheme: String,
    parameters: Vec<(String, String)>,
}

impl RawChallenge {
    fn take(&mut self, name: &str) -> Option<String> {
        let position = self.parameters.iter().position(|(given, _)| given == name)?;
        Some(self.parameters.swap_remove(position).1).filter(|value| !value.is_empty())
    }
}

fn known(mut raw: RawChallenge) -> Option<Challenge> {
    match raw.scheme.as_str() {
        "basic" => Some(Challenge::Basic),
        "bearer" => Some(Challenge::Bearer {
            realm: raw.take("realm")?,
            service: raw.take("service"),
            scopes: raw
                .take("scope")
                .unwrap_or_default()
                .split_ascii_whitespace()
                .take(MAXIMUM_SCOPES)
                .map(str::to_owned)
                .collect(),
        }),
        _ => None,
    }
}

/// Splits the value of a header. A word followed by `=` is a parameter of the current challenge,
/// any other word starts a challenge.
pub(super) fn parse(header: &str) -> Vec<RawChallenge> {
    let mut challenges: Vec<RawChallenge> = Vec::new();
    let mut cursor = HeaderCursor { rest: truncated(header, MAXIMUM_HEADER_BYTES) };
    while !cursor.rest.is_empty() {
        let word = cursor.word();
        if word.is_empty() {
            // Separators, and token characters that no supported scheme has.
            cursor.skip();
            continue;
        }
        let name = word.to_ascii_lowercase();
        match challenges.last_mut() {
            Some(challenge) if cursor.equals_sign() => {
                let value = cursor.value();
                challenge.parameters.push((name, value));
            }
            _ => challenges.push(RawChallenge { scheme: name, parameters: Vec::new() }),
        }
    }
    challenges
}

struct HeaderCursor<'a> {
    rest: &'a str,
}

impl HeaderCursor<'_> {
    fn skip(&mut self) {
        let mut characters = self.rest.chars();
        characters.next();
        self.rest = characters.as_str();
    }

    fn word(&mut self) -> &str {
        let is_word = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
        let end = self.rest.find(|c| !is_word(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word
    }

    /// Consumes an equals sign with the spaces that older servers write around it.
    fn equals_sign(&mut self) -> bool {
        match self.rest.trim_start().strip_prefix('=') {
            Some(rest) => {
                self.rest = rest.trim_start();
                true
            }
            None => false,
        }
    }

    fn value(&mut self) -> String {
        let Some(quoted) = self.rest.strip_prefix('"') else {
            let end = self.rest.find([',', ' ', '\t']).unwrap_or(self.rest.len());
            let (value, rest) = self.rest.split_at(end);
            self.rest = rest;
            return value.to_owned();
        };
        let mut value = String::new();
        let mut characters = quoted.chars();
        while let Some(character) = characters.next() {
            match character {
                '"' => break,
                '\\' => value.extend(characters.next()),
                other => value.push(other),
            }
        }
        self.rest = characters.as_str();
        value
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use reqwest::header::HeaderValue;

    use super::*;

    fn of(values: &[&str]) -> Vec<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_str(value).unwrap());
        }
        read(&headers)
    }

    fn bearer(realm: &str, service: Option<&str>, scopes: &[&str]) -> Challenge {
        Challenge::Bearer {
            realm: realm.into(),
            service: service.map(Into::into),
            scopes: scopes.iter().map(|&scope| scope.into()).collect(),
        }
    }

    #[test]
    fn a_comma_in_quotes_separates_nothing() {
        assert_eq!(
            of(&[r#"Bearer realm="https://a/t",service="r.io",scope="repository:a/b:pull,push""#]),
            [bearer("https://a/t", Some("r.io"), &["repository:a/b:pull,push"])]
        );
    }

    #[test]
    fn several_challenges_are_told_apart() {
        let expected = [Challenge::Basic, bearer("https://a/t", None, &[])];
        assert_eq!(of(&[r#"Basic realm="x, y", Bearer realm="https://a/t""#]), expected);
        assert_eq!(of(&[r#"Basic realm="x""#, r"bearer REALM=https://a/t"]), expected);
        assert_eq!(of(&[r#"Negotiate YII==, Basic, Bearer realm = "https://a/t" "#]), expected);
    }

    #[test]
    fn several_scopes_are_separated_by_blanks() {
        assert_eq!(
            of(&[r#"Bearer realm="https://a",scope="repository:a:pull repository:b:pull""#]),
            [bearer("https://a", None, &["repository:a:pull", "repository:b:pull"])]
        );
    }

    #[test]
    fn escapes_in_quotes_are_undone() {
        assert_eq!(
            of(&[r#"Bearer realm="https://a",service="a \"b\" \\""#]),
            [bearer("https://a", Some(r#"a "b" \"#), &[])]
        );
    }

    #[test]
    fn a_service_may_have_a_name_beyond_ascii() {
        let value = "Bearer realm=\"https://a/t\",service=\"Größe\"".as_bytes();
        let headers =
            HeaderMap::from_iter([(WWW_AUTHENTICATE, HeaderValue::from_bytes(value).unwrap())]);
        assert_eq!(read(&headers), [bearer("https://a/t", Some("Größe"), &[])]);
    }

    #[test]
    fn unsupported_schemes_are_skipped() {
        assert_eq!(of(&["Bearer", "Digest nonce=1", "", ",,=,", r#"Bearer service="x""#]), []);
    }

    proptest! {
        #[test]
        fn nothing_makes_the_parser_panic(header in "(?s).{0,200}") {
            let _ = parse(&header);
        }

        #[test]
        fn nothing_like_a_challenge_makes_it_panic(
            header in r#"((Bearer|Basic|realm|scope|=|"|\\|,| |é|https://a/t){0,40})"#
        ) {
            for challenge in parse(&header) {
                let _ = known(challenge);
            }
        }

        #[test]
        fn what_is_quoted_comes_back(service in "[ -~]{1,40}") {
            let quoted = service.replace('\\', r"\\").replace('"', "\\\"");
            let header = format!(r#"Basic, Bearer service="{quoted}",realm="https://a""#);
            prop_assert_eq!(of(&[&header]), [Challenge::Basic, bearer("https://a", Some(&service), &[])]);
        }
    }
}
