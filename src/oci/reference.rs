//! References: `host[:port]/repository[:tag][@digest]`.

use std::fmt;
use std::str::FromStr;

use super::digest::{Digest, DigestError};

/// Docker Hub's name in references; its registry answers elsewhere.
pub const DOCKER_HUB: &str = "docker.io";

/// A repository on a registry, normalised as Docker's clients do: no host means
/// Docker Hub, and a single name there means `library/<name>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Repository {
    host: String,
    path: String,
}

/// What a volume names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    repository: Repository,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is not a reference.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReferenceError {
    /// The grammar of the distribution specification is not met.
    #[error(
        "\"{text}\" is not a reference ({reason}): write host[:port]/repository[:tag][@sha256:<digest>]"
    )]
    Malformed {
        /// The text, shortened.
        text: String,
        /// What the parser says.
        reason: String,
    },
    /// The part after `@`.
    #[error("the reference's digest: {0}")]
    Digest(DigestError),
}

impl Repository {
    /// The registry's `host[:port]` as written, `docker.io` for Docker Hub.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository's path on that host.
    #[must_use]
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
    /// The repository.
    #[must_use]
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The tag as written; with a digest it only informs.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, which decides.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The tag to ask the registry for when there is no digest.
    #[must_use]
    pub fn tag_or_latest(&self) -> &str {
        self.tag.as_deref().unwrap_or("latest")
    }

    /// The same, meaning this digest whatever its tag means.
    #[must_use]
    pub fn at(&self, digest: Digest) -> Self {
        Self { digest: Some(digest), ..self.clone() }
    }

    /// The same, meaning whatever its tag means.
    #[must_use]
    pub fn floating(&self) -> Self {
        Self { digest: None, ..self.clone() }
    }

    /// Joins parts that a template patched one by one; they must form a
    /// reference together.
    ///
    /// # Errors
    ///
    /// As [`Reference::from_str`].
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
        // A tag of "1@sha256:..." or "8/x" must not turn into something else.
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
        // The digest is taken off first: oci-client's own digest accepts more than is supported here.
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(digest.parse().map_err(ReferenceError::Digest)?)),
            None => (text, None),
        };
        let parsed: oci_client::Reference =
            name.parse().map_err(|error| malformed(text, &format!("{error}")))?;
        // The library looks for upper case before it fills in the registry, and so misses some.
        if parsed.repository().bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(malformed(text, "a repository is written in lower case"));
        }
        let host = match parsed.registry() {
            "index.docker.io" => DOCKER_HUB,
            host => host,
        };
        // The library writes a missing tag as "latest"; whether one was written matters here.
        let tag_is_written = name.rsplit('/').next().is_some_and(|last| last.contains(':'));
        Ok(Self {
            repository: Repository { host: host.to_owned(), path: parsed.repository().to_owned() },
            tag: parsed.tag().filter(|_| tag_is_written).map(str::to_owned),
            digest,
        })
    }
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
    ReferenceError::Malformed { text: text.chars().take(200).collect(), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";

    fn parse(text: &str) -> Reference {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn parts_are_told_apart() {
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
    fn nonsense_is_refused() {
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
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
    }

    #[test]
    fn parts_that_would_form_something_else_are_refused() {
        let digest = format!("sha256:{HEX}");
        assert!(Reference::from_parts("r.io/app", Some("v1"), Some(&digest)).is_ok());
        assert!(Reference::from_parts("r.io/app:v1", Some("v2"), None).is_err());
        assert!(Reference::from_parts("r.io/app", Some("v1/evil"), None).is_err());
        assert!(Reference::from_parts("r.io", Some("5000/evil"), None).is_err());
        assert!(Reference::from_parts("r.io/app", Some(&format!("v1@{digest}")), None).is_err());
    }
}
