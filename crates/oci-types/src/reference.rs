//! References to artifacts in registries: `host[:port]/repository[:tag][@digest]`.

use std::borrow::Cow;
use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use text::printable::excerpt;

use super::digest::{Digest, DigestError};

/// The host of Docker Hub in references. Its registry has another address.
pub const DOCKER_HUB: &str = "docker.io";

/// A repository in a registry, normalised as by Docker's clients: no host means
/// Docker Hub, and a single name there means `library/<name>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Repository {
    host: String,
    path: String,
}

/// A repository with a tag, a digest, both or neither, which means the tag `latest`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    repository: Repository,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// The reason that a text is not a reference.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReferenceError {
    /// The text does not follow the grammar of the distribution specification.
    #[error(
        "\"{text}\" is not a reference ({reason}): write host[:port]/repository[:tag][@sha256:<digest>]"
    )]
    Malformed {
        /// The text, shortened.
        text: String,
        /// The message of the parser.
        reason: String,
    },
    /// The text has a common mistake with a known correction.
    #[error("\"{text}\" is not a reference ({reason}): write \"{corrected}\"")]
    Correctable {
        /// The text, shortened, without user names and passwords.
        text: String,
        /// The rule that the text breaks.
        reason: &'static str,
        /// The reference to write instead.
        corrected: String,
    },
    /// The part after `@` is not a digest.
    #[error("the reference's digest: {0}")]
    Digest(DigestError),
}

impl Repository {
    /// Returns the registry's `host[:port]` as written, `docker.io` for Docker Hub.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Returns the repository's path on its host.
    pub fn path(&self) -> &str {
        &self.path
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.host, self.path)
    }
}

impl Reference {
    /// Returns the repository of the artifact.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Returns the tag as written. Beside a digest, it only informs.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// Returns the digest, which takes precedence over the tag.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// Returns the tag to request from the registry if there is no digest.
    pub fn tag_or_latest(&self) -> &str {
        self.tag.as_deref().unwrap_or("latest")
    }

    /// Returns the same reference with this digest.
    #[must_use]
    pub fn at(&self, digest: Digest) -> Self {
        Self { digest: Some(digest), ..self.clone() }
    }

    /// Returns the same reference without a digest.
    #[must_use]
    pub fn floating(&self) -> Self {
        Self { digest: None, ..self.clone() }
    }

    /// Joins parts that a template filled in one by one. Together they must
    /// form a reference.
    ///
    /// # Errors
    ///
    /// Those of [`Reference::from_str`].
    pub fn from_parts(
        repository: &str,
        tag: Option<&str>,
        digest: Option<&str>,
    ) -> Result<Self, ReferenceError> {
        let whole: Self = repository.parse()?;
        if whole.tag.is_some() || whole.digest.is_some() {
            return Err(malformed(
                repository,
                "the repository must carry neither tag nor digest here",
            ));
        }
        let mut text = repository.to_owned();
        if let Some(tag) = tag {
            text = format!("{text}:{tag}");
        }
        if let Some(digest) = digest {
            text = format!("{text}@{digest}");
        }
        let joined: Self = text.parse()?;
        // A tag such as "1@sha256:..." or "8/x" must not change the other parts.
        if joined.repository != whole.repository
            || joined.tag.as_deref() != tag
            || joined.digest.is_some() != digest.is_some()
        {
            return Err(malformed(&text, "its parts do not fit together"));
        }
        Ok(joined)
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        parse(text).map_err(|error| match (correction(text), text.split_once("://")) {
            (Some(corrected), _) => corrected,
            // The text before an "@" may be a password.
            (None, Some((_, rest))) if rest.contains('@') => {
                malformed("…", "it starts with a scheme")
            }
            (None, _) => error,
        })
    }
}

fn parse(text: &str) -> Result<Reference, ReferenceError> {
    // The digest is parsed here, since oci-spec accepts digests that are not supported.
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => (name, Some(digest.parse().map_err(ReferenceError::Digest)?)),
        None => (text, None),
    };
    let (literal, name) = split_ipv6_host(name).ok_or_else(|| {
        malformed(text, "a host in brackets is an IPv6 address: [<address>]:port")
    })?;
    let parsed: oci_spec::distribution::Reference =
        name.parse().map_err(|error| malformed(text, &format!("{error}")))?;
    // The library checks for upper case before it adds the registry, and so misses some.
    if parsed.repository().bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err(malformed(text, "a repository is written in lower case"));
    }
    let host = match parsed.registry() {
        "index.docker.io" => DOCKER_HUB,
        host => literal.unwrap_or(host),
    };
    let port = host.rsplit_once(':').filter(|_| literal.is_none());
    if port.is_some_and(|(_, port)| port.parse::<u16>().is_err()) {
        return Err(malformed(text, "a port is a number up to 65535"));
    }
    // The library replaces a missing tag by "latest", but this type keeps the difference.
    let tag_is_written = name.rsplit('/').next().is_some_and(|last| last.contains(':'));
    Ok(Reference {
        repository: Repository { host: host.to_owned(), path: parsed.repository().to_owned() },
        tag: parsed.tag().filter(|_| tag_is_written).map(str::to_owned),
        digest,
    })
}

/// Splits off an IPv6 address with its port, and replaces it by a host that the library can parse.
/// Returns none if the brackets do not hold such an address.
fn split_ipv6_host(name: &str) -> Option<(Option<&str>, Cow<'_, str>)> {
    if !name.starts_with('[') {
        return Some((None, name.into()));
    }
    let (host, path) = name.split_once('/')?;
    let (address, port) = host.strip_prefix('[')?.split_once(']')?;
    let is_port = |port: &str| port.parse::<u16>().is_ok() && !port.starts_with('+');
    let has_port = port.strip_prefix(':').is_some_and(is_port);
    let is_host = address.parse::<Ipv6Addr>().is_ok() && (port.is_empty() || has_port);
    is_host.then(|| (Some(host), format!("localhost/{path}").into()))
}

/// Corrects a text that is almost a reference: with a scheme in front, in upper case, with an IPv6
/// address without brackets, or with blanks and slashes at its ends.
fn correction(text: &str) -> Option<ReferenceError> {
    let trimmed = text.trim();
    let (scheme, rest) = trimmed.split_once("://").unwrap_or(("", trimmed));
    let rest = rest.trim_matches('/');
    let (authority, path) = rest.split_once('/').unwrap_or(("", rest));
    // User names and passwords belong in a Secret, and in no message.
    let (user, host) = authority.rsplit_once('@').unwrap_or(("", authority));
    let is_ipv6 = host.parse::<Ipv6Addr>().is_ok();
    let host = if is_ipv6 { format!("[{host}]") } else { host.to_owned() };
    // A part without dot and port is the first component of a path on Docker Hub.
    let is_host = host.contains(['.', ':']) || host == "localhost";
    let host = if is_host { host } else { host.to_ascii_lowercase() };
    // Only the tag may have upper case.
    let (name, digest) = path.split_once('@').map_or((path, None), |(n, d)| (n, Some(d)));
    let tag_at = name.rfind(':').filter(|&colon| !name[colon..].contains('/'));
    let (repository, tag) = name.split_at(tag_at.unwrap_or(name.len()));
    let mut corrected = format!("{}{tag}", repository.to_ascii_lowercase());
    if !host.is_empty() {
        corrected = format!("{host}/{corrected}");
    } else if repository.contains('.') {
        // A host alone is no repository on Docker Hub.
        return None;
    }
    if let Some(digest) = digest {
        corrected = format!("{corrected}@{}", digest.to_ascii_lowercase());
    }
    parse(&corrected).ok()?;
    let reason = if !user.is_empty() {
        "it has no user name: credentials come from nodePublishSecretRef or `docker login`"
    } else if !scheme.is_empty() {
        "it has no scheme"
    } else if is_ipv6 {
        "an IPv6 address stands in brackets"
    } else if trimmed != text || rest != trimmed {
        "it neither starts nor ends with blanks or slashes"
    } else {
        "repository and digest are written in lower case"
    };
    let shown =
        if user.is_empty() { excerpt(text, 200) } else { format!("{scheme}://…@{host}/…") };
    Some(ReferenceError::Correctable { text: shown, reason, corrected })
}

impl fmt::Display for Reference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.repository)?;
        match (&self.tag, &self.digest) {
            (Some(tag), Some(digest)) => write!(formatter, ":{tag}@{digest}"),
            (Some(tag), None) => write!(formatter, ":{tag}"),
            (None, Some(digest)) => write!(formatter, "@{digest}"),
            (None, None) => write!(formatter, ":latest"),
        }
    }
}

fn malformed(text: &str, reason: &str) -> ReferenceError {
    ReferenceError::Malformed { text: excerpt(text, 200), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";

    fn parse(text: &str) -> Reference {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    proptest! {
        #[test]
        fn corrections_are_references(
            text in "(https?://|oci://|)(u:p@|)(R\\.io|\\[::1\\]|::1|Hub)(:[0-9]{1,5}|)/[A-Za-z./_:@-]{0,20}"
        ) {
            if let Err(ReferenceError::Correctable { corrected, .. }) = text.parse::<Reference>() {
                prop_assert!(corrected.parse::<Reference>().is_ok(), "{text}: {corrected}");
            }
        }

        #[test]
        fn nothing_makes_the_parser_panic(text in "(?s).{0,80}") {
            let _ = text.parse::<Reference>();
        }
    }

    #[test]
    fn references_are_split_into_parts() {
        let reference = parse(&format!("127.0.0.1:5000/team/app:v1@sha256:{HEX}"));
        assert_eq!(reference.repository().host(), "127.0.0.1:5000");
        assert_eq!(reference.repository().path(), "team/app");
        assert_eq!(reference.tag(), Some("v1"));
        assert_eq!(reference.digest().map(|digest| digest.hex()).as_deref(), Some(HEX));
        assert_eq!(parse("localhost:5000/app").tag(), None);
        assert_eq!(parse("localhost:5000/app").tag_or_latest(), "latest");
        assert_eq!(parse(&format!("r.io/app@sha256:{HEX}")).tag(), None);
    }

    #[test]
    fn docker_hub_is_filled_in() {
        assert_eq!(parse("busybox").to_string(), "docker.io/library/busybox:latest");
        assert_eq!(parse("index.docker.io/a/b:1").to_string(), "docker.io/a/b:1");
    }

    #[test]
    fn malformed_references_are_refused() {
        for text in [
            "",
            " ",
            "r.io/UPPER",
            "7eeeeLe70/7l/g.e",
            "r.io/app:",
            "r.io/app@",
            "r.io/app@sha256:12",
            "r.io/../x",
            "r.io/a b",
            "127.0.0.1:99999/x",
            "r.io:65536/x:v1",
            "r.io:123456789012345678901/x",
            "https://r.io:65536/x",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_ipv6_address_is_a_host() {
        for (text, host, tag) in [
            ("[::1]:5000/team/x:v1", "[::1]:5000", Some("v1")),
            ("[2001:db8::2]/x", "[2001:db8::2]", None),
            ("[FD00::A]:443/x:V1", "[FD00::A]:443", Some("V1")),
            ("[::ffff:10.0.0.1]:80/x", "[::ffff:10.0.0.1]:80", None),
        ] {
            let reference = parse(text);
            assert_eq!((reference.repository().host(), reference.tag()), (host, tag), "{text}");
            let again = parse(&reference.to_string());
            assert_eq!(again.repository(), reference.repository());
            let pinned = parse(&format!("{text}@sha256:{HEX}"));
            assert_eq!(pinned.repository(), reference.repository());
            assert!(pinned.digest().is_some());
        }
        for text in [
            "[::1]",
            "[::1]:5000",
            "[::1]:5000/",
            "[::1]:/x",
            "[::1]:+5/x",
            "[::1]:70000/x",
            "[::1/x",
            "[]/x",
            "[::1]x/x",
            "[fe80::1%eth0]/x",
            "[10.0.0.1]:5000/x",
            "[r.io]/x",
            "[::1]:5000/../x",
            "a[::1]/x",
            "[::1]:5000:5000/x",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
    }

    #[test]
    fn common_mistakes_are_refused_with_a_correction() {
        let digest = format!("sha256:{HEX}");
        let upper = digest.to_uppercase();
        for (text, correction) in [
            ("https://r.io/team/app:v1", "r.io/team/app:v1"),
            ("http://127.0.0.1:5000/x:v1", "127.0.0.1:5000/x:v1"),
            ("oci://r.io/app:V1", "r.io/app:V1"),
            ("docker://docker.io/library/app", "docker.io/library/app"),
            ("oras://R.io/App", "R.io/app"),
            ("https://[::1]:5000/x:v1", "[::1]:5000/x:v1"),
            ("r.io/Team/APP:V1", "r.io/team/app:V1"),
            ("localhost:5000/App", "localhost:5000/app"),
            ("MyOrg/app:v1", "myorg/app:v1"),
            ("docker://Busybox:1.36", "busybox:1.36"),
            ("fd00::a/x:v1", "[fd00::a]/x:v1"),
            (" r.io/app:v1\n", "r.io/app:v1"),
            ("r.io/app/", "r.io/app"),
            (&format!("oci://r.io/app:v1@{digest}"), &format!("r.io/app:v1@{digest}")),
            (&format!("r.io/app@{upper}"), &format!("r.io/app@{digest}")),
        ] {
            let error = text.parse::<Reference>().expect_err(text);
            let ReferenceError::Correctable { corrected, .. } = &error else {
                panic!("{text}: {error}")
            };
            assert_eq!(corrected, correction, "{text}");
            assert!(error.to_string().contains(&format!("write \"{correction}\"")), "{error}");
        }
        let error =
            "https://me:hunter2@r.io/app:v1".parse::<Reference>().expect_err("no reference");
        assert!(error.to_string().contains("write \"r.io/app:v1\""), "{error}");
        assert!(!format!("{error}{error:?}").contains("hunter2"), "{error}");
        let error =
            "https://me:hunter2@hunter2@r.io/ö".parse::<Reference>().expect_err("no reference");
        assert!(!format!("{error}{error:?}").contains("hunter2"), "{error}");
        for text in ["https://", "https://r.io", "oci://a b/c", "r.io/ö", "://", "r.io/app:v1:v2"]
        {
            let error = text.parse::<Reference>().expect_err(text);
            assert!(!matches!(error, ReferenceError::Correctable { .. }), "{error}");
        }
    }

    #[test]
    fn an_unsupported_algorithm_is_distinguished_from_a_malformed_reference() {
        for digest in [&format!("sha512:{HEX}{HEX}"), "blake3:00", "sha1:00"] {
            let error = format!("r.io/app@{digest}").parse::<Reference>().expect_err(digest);
            let algorithm = matches!(error, ReferenceError::Digest(DigestError::Algorithm(_)));
            assert!(algorithm, "{error}");
        }
    }

    #[test]
    fn parts_that_would_form_another_reference_are_refused() {
        let digest = format!("sha256:{HEX}");
        assert!(Reference::from_parts("r.io/app", Some("v1"), Some(&digest)).is_ok());
        assert!(Reference::from_parts("r.io/app:v1", Some("v2"), None).is_err());
        assert!(Reference::from_parts("r.io/app", Some("v1/evil"), None).is_err());
        assert!(Reference::from_parts("r.io", Some("5000/evil"), None).is_err());
        assert!(Reference::from_parts("r.io/app", Some(&format!("v1@{digest}")), None).is_err());
    }
}
