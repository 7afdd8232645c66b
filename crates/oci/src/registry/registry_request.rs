//! Requests, and failover between the hosts of a registry.

use std::sync::Arc;

use reqwest::header::{ACCEPT, HeaderMap, HeaderValue};
use reqwest::{Method, Url};

use super::RepositoryClient;
use super::error::{self, RegistryError};
use super::mirror_health::MirrorHealth;
use super::registry_endpoint::RegistryEndpoint;
use crate::credentials::Credential;
use crate::{Digest, Reference, Repository, media_type};

/// Name of a manifest in a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ManifestName {
    /// A tag, which may move.
    Tag(String),
    /// The digest of the content.
    Digest(Digest),
}

/// Capability that a request needs of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequiredCapability {
    /// Serves content by digest.
    Pull,
    /// Resolves tags to digests.
    Resolve,
}

/// Failover between the hosts that can serve a request: healthy mirrors, the registry itself, then
/// mirrors that are the last resort.
pub(super) struct HostFailover {
    endpoints: Vec<Arc<RegistryEndpoint>>,
    turn: usize,
    /// Index of the registry itself.
    own: usize,
    /// Error of the registry itself, if other hosts are tried after it.
    registry_error: Option<RegistryError>,
}

/// One request to a registry.
pub(super) struct RegistryRequest<'a> {
    pub(super) repository: &'a Repository,
    pub(super) credential: &'a Credential,
    pub(super) method: Method,
    /// Digest of the requested blob.
    pub(super) blob: Option<Digest>,
    /// Mirrors that are not used.
    pub(super) without: &'a [Arc<str>],
    /// Path below the repository.
    pub(super) object: String,
    /// Query of a page.
    pub(super) query: Option<String>,
    pub(super) headers: HeaderMap,
    /// Description of the object for errors.
    pub(super) what: String,
}

impl RequiredCapability {
    pub(super) fn is_met_by(self, endpoint: &RegistryEndpoint) -> bool {
        match self {
            Self::Pull => endpoint.pull,
            Self::Resolve => endpoint.resolve,
        }
    }
}

impl ManifestName {
    /// Returns the name of the manifest that a reference names.
    pub fn of(reference: &Reference) -> Self {
        match reference.digest() {
            Some(digest) => Self::Digest(digest),
            None => Self::Tag(reference.tag_or_latest().to_owned()),
        }
    }

    /// Describes the manifest for errors.
    pub fn describe(&self, repository: &Repository) -> String {
        match self {
            Self::Tag(tag) => error::describe(&format!("manifest {tag}"), repository),
            Self::Digest(digest) => error::describe(&format!("manifest {digest}"), repository),
        }
    }

    pub(super) fn needs(&self) -> RequiredCapability {
        match self {
            Self::Tag(_) => RequiredCapability::Resolve,
            Self::Digest(_) => RequiredCapability::Pull,
        }
    }
}

impl<'a> RegistryRequest<'a> {
    /// Returns the URL of the request at a host.
    pub(super) fn address(&self, endpoint: &RegistryEndpoint) -> Url {
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

    /// Returns the credential that a host may get.
    pub(super) fn credential_for(&self, endpoint: &RegistryEndpoint) -> &'a Credential {
        if endpoint.takes_credentials { self.credential } else { &Credential::Anonymous }
    }

    pub(super) fn is_anonymous_at(&self, endpoint: &RegistryEndpoint) -> bool {
        self.credential_for(endpoint).is_anonymous()
    }

    pub(super) fn manifest(
        client: RepositoryClient<'a>,
        name: &ManifestName,
        method: Method,
    ) -> Result<Self, RegistryError> {
        let name = match name {
            ManifestName::Digest(digest) => digest.to_string(),
            ManifestName::Tag(tag) if is_tag(tag) => tag.clone(),
            ManifestName::Tag(_) => {
                return Err(RegistryError::NotFound {
                    what: error::describe("tag of that spelling", client.repository),
                });
            }
        };
        let mut headers = HeaderMap::new();
        if let Ok(accepted) = HeaderValue::from_str(&media_type::MANIFESTS.join(", ")) {
            headers.insert(ACCEPT, accepted);
        }
        let what = format!("manifest {name}");
        let request = Self::new(client, &what, format!("manifests/{name}"));
        Ok(Self { method, headers, ..request })
    }

    pub(super) fn referrers(client: RepositoryClient<'a>, subject: Digest) -> Self {
        let accepted = HeaderValue::from_static(media_type::OCI_INDEX);
        let what = format!("what refers to {subject}");
        let request = Self::new(client, &what, format!("referrers/{subject}"));
        Self { headers: HeaderMap::from_iter([(ACCEPT, accepted)]), ..request }
    }

    pub(super) fn blob(client: RepositoryClient<'a>, digest: Digest, method: Method) -> Self {
        let what = format!("blob {digest}");
        let request = Self::new(client, &what, format!("blobs/{digest}"));
        Self { method, blob: Some(digest), ..request }
    }

    /// Returns a GET request for an object of a repository, which `what` describes in messages.
    fn new(client: RepositoryClient<'a>, what: &str, object: String) -> Self {
        let RepositoryClient { repository, credential, .. } = client;
        Self {
            repository,
            credential,
            method: Method::GET,
            what: error::describe(what, repository),
            blob: None,
            without: &[],
            object,
            query: None,
            headers: HeaderMap::new(),
        }
    }
}

impl HostFailover {
    /// Creates the failover. The last endpoint is the registry itself; `None` if there is no
    /// endpoint.
    pub(super) fn new(
        mut endpoints: Vec<Arc<RegistryEndpoint>>,
        health: impl Fn(&RegistryEndpoint) -> MirrorHealth,
    ) -> Option<Self> {
        let registry = endpoints.pop()?;
        let health: Vec<_> = endpoints.into_iter().map(|one| (health(&one), one)).collect();
        let of = |wanted| {
            let fitting = health.iter().filter(move |(health, _)| *health == wanted);
            fitting.map(|(_, endpoint)| Arc::clone(endpoint))
        };
        let mut endpoints: Vec<_> = of(MirrorHealth::Healthy).collect();
        let own = endpoints.len();
        endpoints.push(registry);
        endpoints.extend(of(MirrorHealth::LastResort));
        Some(Self { endpoints, turn: 0, own, registry_error: None })
    }

    pub(super) fn current(&self) -> &RegistryEndpoint {
        &self.endpoints[self.turn]
    }

    /// Returns the current host if it is a mirror.
    pub(super) fn mirror(&self) -> Option<Arc<str>> {
        (self.turn != self.own).then(|| self.current().name())
    }

    /// Returns whether the current host is the registry itself, by its own entry or by another one.
    fn is_registry_itself(&self) -> bool {
        let (current, own) = (&self.current().root, &self.endpoints[self.own].root);
        (current.host(), current.port(), current.path()) == (own.host(), own.port(), own.path())
    }

    /// Evaluates an attempt. `None` means that the next host has to be tried. If none succeeds, the
    /// error of the registry itself counts. A response of it counts more than a later connection
    /// that fails: another entry for it may have other settings.
    pub(super) fn evaluate<T>(
        &mut self,
        tried: Result<T, RegistryError>,
    ) -> Option<Result<T, RegistryError>> {
        let error = match tried {
            Ok(done) => return Some(Ok(done)),
            Err(error) => error,
        };
        let is_last = self.turn + 1 == self.endpoints.len();
        if self.is_registry_itself() {
            let earlier = self.registry_error.take().filter(RegistryError::is_response);
            let error = earlier.unwrap_or(error);
            if is_last || (self.turn == self.own && !error.is_absence()) {
                return Some(Err(error));
            }
            self.registry_error = Some(error);
        } else {
            let mirror = self.current().name();
            tracing::info!(%mirror, %error, "a mirror was of no use: the next host is asked");
            if is_last {
                return Some(Err(self.registry_error.take().unwrap_or(error)));
            }
        }
        self.turn += 1;
        None
    }
}

/// Checks the grammar of the specification, so that a tag cannot become a path or a query.
fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let bytes = tag.as_bytes();
    bytes.len() <= 128
        && bytes.first().is_some_and(|&first| word(first))
        && bytes.iter().all(|&byte| word(byte) || byte == b'.' || byte == b'-')
}
