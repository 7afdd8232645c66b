//! What may be asked, and of whom in which order.

use std::sync::Arc;

use reqwest::header::{ACCEPT, HeaderMap, HeaderValue};
use reqwest::{Method, Url};

use super::endpoint::Endpoint;
use super::error::{self, RegistryError};
use super::passed_by::Standing;
use crate::credentials::Credential;
use crate::{Digest, Reference, Repository, media_type};

/// How a manifest is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ManifestName {
    /// By a tag, which may move.
    Tag(String),
    /// By its content.
    Digest(Digest),
}

/// What a host must be good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needs {
    /// Sending content that is named by its digest.
    Pull,
    /// Saying what a tag means.
    Resolve,
}

/// The hosts of a registry that fit a question: mirrors, the registry itself, and mirrors that are
/// asked when that is of no use.
pub(super) struct Turns {
    endpoints: Vec<Arc<Endpoint>>,
    turn: usize,
    /// Where the registry itself stands.
    own: usize,
    /// What it said, when others are asked after it.
    verdict: Option<RegistryError>,
}

/// One question to a registry.
pub(super) struct Question<'a> {
    pub(super) repository: &'a Repository,
    pub(super) credential: &'a Credential,
    pub(super) method: Method,
    /// The blob that is asked for.
    pub(super) blob: Option<Digest>,
    /// Mirrors that are not asked.
    pub(super) without: &'a [Arc<str>],
    /// The path below the repository.
    pub(super) object: String,
    /// Which of several pages.
    pub(super) query: Option<String>,
    pub(super) headers: HeaderMap,
    /// Names the thing in errors.
    pub(super) what: String,
}

impl Needs {
    pub(super) fn are_met_by(self, endpoint: &Endpoint) -> bool {
        match self {
            Self::Pull => endpoint.pull,
            Self::Resolve => endpoint.resolve,
        }
    }
}

impl ManifestName {
    /// Returns how a registry is asked for what a reference names.
    #[must_use]
    pub fn of(reference: &Reference) -> Self {
        match reference.digest() {
            Some(digest) => Self::Digest(digest),
            None => Self::Tag(reference.tag_or_latest().to_owned()),
        }
    }

    /// Names the manifest in errors.
    #[must_use]
    pub fn describe(&self, repository: &Repository) -> String {
        match self {
            Self::Tag(tag) => error::describe(&format!("manifest {tag}"), repository),
            Self::Digest(digest) => error::describe(&format!("manifest {digest}"), repository),
        }
    }

    pub(super) fn needs(&self) -> Needs {
        match self {
            Self::Tag(_) => Needs::Resolve,
            Self::Digest(_) => Needs::Pull,
        }
    }
}

impl<'a> Question<'a> {
    /// Where this host answers it.
    pub(super) fn address(&self, endpoint: &Endpoint) -> Url {
        let mut url = endpoint.object(self.repository, &self.object);
        if self.query.is_some() {
            let namespace = url.query().map(str::to_owned);
            url.set_query(self.query.as_deref());
            let is_named = url.query_pairs().any(|(name, _)| name == "ns");
            if let (Some(namespace), false) = (namespace, is_named) {
                url.set_query(Some(&format!("{}&{namespace}", url.query().unwrap_or_default())));
            }
        }
        url
    }

    /// What this host may be shown.
    pub(super) fn credential_for(&self, endpoint: &Endpoint) -> &'a Credential {
        if endpoint.takes_credentials { self.credential } else { &Credential::Anonymous }
    }

    pub(super) fn is_anonymous_at(&self, endpoint: &Endpoint) -> bool {
        self.credential_for(endpoint).is_anonymous()
    }

    pub(super) fn manifest(
        repository: &'a Repository,
        name: &ManifestName,
        credential: &'a Credential,
        method: Method,
    ) -> Result<Self, RegistryError> {
        let name = match name {
            ManifestName::Digest(digest) => digest.to_string(),
            ManifestName::Tag(tag) if is_tag(tag) => tag.clone(),
            ManifestName::Tag(_) => {
                return Err(RegistryError::NotFound {
                    what: error::describe("tag of that spelling", repository),
                });
            }
        };
        let mut headers = HeaderMap::new();
        if let Ok(accepted) = HeaderValue::from_str(&media_type::MANIFESTS.join(", ")) {
            headers.insert(ACCEPT, accepted);
        }
        Ok(Self {
            repository,
            credential,
            method,
            what: error::describe(&format!("manifest {name}"), repository),
            blob: None,
            without: &[],
            object: format!("manifests/{name}"),
            query: None,
            headers,
        })
    }

    pub(super) fn referrers(
        repository: &'a Repository,
        subject: Digest,
        credential: &'a Credential,
    ) -> Self {
        let accepted = HeaderValue::from_static(media_type::OCI_INDEX);
        Self {
            repository,
            credential,
            method: Method::GET,
            what: error::describe(&format!("what refers to {subject}"), repository),
            blob: None,
            without: &[],
            object: format!("referrers/{subject}"),
            query: None,
            headers: HeaderMap::from_iter([(ACCEPT, accepted)]),
        }
    }

    pub(super) fn blob(
        repository: &'a Repository,
        digest: Digest,
        credential: &'a Credential,
        method: Method,
    ) -> Self {
        Self {
            repository,
            credential,
            method,
            what: error::describe(&format!("blob {digest}"), repository),
            blob: Some(digest),
            without: &[],
            object: format!("blobs/{digest}"),
            query: None,
            headers: HeaderMap::new(),
        }
    }
}

impl Turns {
    /// The last of the hosts is the registry itself; none where there is no host.
    pub(super) fn new(
        mut endpoints: Vec<Arc<Endpoint>>,
        standing: impl Fn(&Endpoint) -> Standing,
    ) -> Option<Self> {
        let registry = endpoints.pop()?;
        let standing: Vec<_> = endpoints.into_iter().map(|one| (standing(&one), one)).collect();
        let of = |wanted| {
            let fitting = standing.iter().filter(move |(standing, _)| *standing == wanted);
            fitting.map(|(_, endpoint)| Arc::clone(endpoint))
        };
        let mut endpoints: Vec<_> = of(Standing::Trusted).collect();
        let own = endpoints.len();
        endpoints.push(registry);
        endpoints.extend(of(Standing::LastResort));
        Some(Self { endpoints, turn: 0, own, verdict: None })
    }

    pub(super) fn current(&self) -> &Endpoint {
        &self.endpoints[self.turn]
    }

    /// The mirror whose turn it is, unless it is the registry itself.
    pub(super) fn mirror(&self) -> Option<Arc<str>> {
        (self.turn != self.own).then(|| self.current().name())
    }

    /// What comes of a try: none means that the next host is asked. When none gives what was
    /// asked for, the registry's own failure counts.
    pub(super) fn judge<T>(
        &mut self,
        tried: Result<T, RegistryError>,
    ) -> Option<Result<T, RegistryError>> {
        let error = match tried {
            Ok(done) => return Some(Ok(done)),
            Err(error) => error,
        };
        let is_last = self.turn + 1 == self.endpoints.len();
        if self.turn == self.own {
            if is_last || !error.is_absence() {
                return Some(Err(error));
            }
            self.verdict = Some(error);
        } else {
            let mirror = self.current().name();
            tracing::info!(%mirror, %error, "a mirror was of no use: the next host is asked");
            if is_last {
                return Some(Err(self.verdict.take().unwrap_or(error)));
            }
        }
        self.turn += 1;
        None
    }
}

/// The specification's grammar, so that a tag cannot become a path or a query.
fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let bytes = tag.as_bytes();
    bytes.len() <= 128
        && bytes.first().is_some_and(|&first| word(first))
        && bytes.iter().all(|&byte| word(byte) || byte == b'.' || byte == b'-')
}
