//! Requests to a registry.

use std::sync::Arc;

use reqwest::header::{ACCEPT, HeaderMap, HeaderValue};
use reqwest::{Method, Url};

use super::error::{self, RegistryError};
use super::registry_endpoint::RegistryEndpoint;
use super::{AskedHosts, RepositoryClient};
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

/// One request to a registry.
#[derive(Clone)]
pub(super) struct RegistryRequest<'a> {
    pub(super) repository: &'a Repository,
    pub(super) credential: &'a Credential,
    pub(super) method: Method,
    /// Digest of the requested blob.
    pub(super) blob: Option<Digest>,
    /// Mirrors that are not used for the blob.
    pub(super) without: &'a [Arc<str>],
    pub(super) hosts: AskedHosts,
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
        let RepositoryClient { repository, credential, hosts, .. } = client;
        Self {
            repository,
            credential,
            method: Method::GET,
            what: error::describe(what, repository),
            blob: None,
            without: &[],
            hosts,
            object,
            query: None,
            headers: HeaderMap::new(),
        }
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
