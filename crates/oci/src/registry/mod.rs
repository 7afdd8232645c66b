//! The registry client: manifests and blobs, by the distribution specification.
//!
//! ```text
//! mod                  the client: manifests, tags, blobs
//! registry_request     requests
//! host_failover        failover between the hosts of a registry
//! exchange             one exchange: a request at one host
//! authenticate         challenges and authorizations of a request
//! auth_cache           cached challenges and authorizations by repository
//! auth_challenge       WWW-Authenticate
//! bearer_token         token servers and cached tokens
//! referrers            referrers of a digest, with pagination
//! blob_response        blob responses and bodies
//! documents            documents that are read whole
//! document_memory      memory budget of documents that are read whole
//! response_source      source of a response: the registry itself or a mirror
//! hosts                hosts of a registry, by containerd's hosts.toml
//! registry_endpoint    one host with its capabilities
//! mirror_health        mirrors that failed for a blob
//! registry_backoff     rate limits and cached refusals
//! http_transport       one HTTP exchange: redirects, bounded bodies
//! http_clients         HTTP clients
//! tls                  certificates
//! dns_lookup           bounded DNS lookups
//! address_rules        addresses that the author of a pod may make this node connect to
//! redirect_rules       addresses that a registry may redirect this node to
//! plain_http           permissions of the administrator for redirects without TLS
//! environment_proxy    proxies of the environment
//! exchange_timeout     timeout of one exchange
//! credential_refusals  refusals of several credentials for one request
//! web_files            files of other servers, without credentials
//! error                errors of registries
//! ```
//!
//! Callers can rely on these properties:
//!
//! - The client does not retry, except for authentication: the caller knows better whether to
//!   retry. [`RegistryError::is_transient`] helps.
//! - Everything is bounded: manifests and tokens in bytes, each and all that are in memory at once,
//!   every exchange in time, a stalled blob in time. The caller bounds the size of a blob.
//! - A credential reaches only the registry that it is for and the token server that this registry
//!   names, over TLS (or on loopback, or as configured). A mirror gets it only if the administrator
//!   marked it.
//! - The first host of a registry that succeeds gives the result. If none does, the error of the
//!   registry itself counts, a response before a connection that failed.
//! - URLs in descriptors (`urls`) are never fetched.

mod address_rules;
mod auth_cache;
mod auth_challenge;
mod authenticate;
mod bearer_token;
mod blob_response;
mod credential_refusals;
mod dns_lookup;
mod document_memory;
mod documents;
mod environment_proxy;
mod error;
mod exchange;
mod exchange_timeout;
mod host_failover;
pub mod hosts;
mod http_clients;
mod http_transport;
mod mirror_health;
mod plain_http;
mod redirect_rules;
mod referrers;
mod registry_backoff;
mod registry_endpoint;
mod registry_request;
mod response_source;
mod tls;
mod web_files;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RANGE};
use reqwest::{Method, StatusCode, Url};
use rustls::pki_types::CertificateDer;
use tokio::time::Instant;

pub use address_rules::{AddressRules, Loopback};
pub use blob_response::BlobBody;
pub use credential_refusals::Refusals;
pub use document_memory::DocumentReservation;
pub use error::{CHECK_SECRET, GIVE_SECRET, RegistryError, ShownCredential};
pub use hosts::mirror_address;
pub use plain_http::plain_http_address;
pub use referrers::Referrers;
pub use registry_endpoint::other_spellings;
pub use registry_request::ManifestName;
pub use response_source::AnsweredBy;
pub use web_files::{WebAddress, WebFiles};

use self::auth_cache::AuthCache;
use self::blob_response::BlobPart;
use self::document_memory::DocumentMemory;
use self::documents::Documents;
use self::exchange::Exchange;
use self::host_failover::HostFailover;
use self::hosts::RegistryHosts;
use self::http_transport::{HttpResponse, Transport};
use self::mirror_health::{MirrorFailures, MirrorHealth};
use self::registry_backoff::RegistryBackoff;
use self::registry_endpoint::RegistryEndpoint;
use self::registry_request::{RegistryRequest, RequiredCapability};
use super::credentials::Credential;
use super::{Digest, Repository};
use sys::lru_map::LruMap;

/// Maximum number of unreachable registries that are remembered. Evicting one costs a connection
/// timeout.
const MAXIMUM_UNREACHABLE: usize = 256;
/// Time during which an unreachable registry is not asked to confirm the response of a mirror.
/// Otherwise, each pod behind a mirror would wait for the connection timeout.
const UNREACHABLE_FOR: Duration = Duration::from_mins(1);

const DOCKER_CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// Options of the client. The defaults suit a registry in the cluster.
#[derive(Clone)]
pub struct RegistryOptions {
    /// Timeout for a connection with its TLS session.
    pub connect_timeout: Duration,
    /// Timeout for the next bytes of a blob.
    pub stall_timeout: Duration,
    /// Timeout for other exchanges, token and redirects included: a manifest with its body, or the
    /// header of a blob response.
    pub manifest_timeout: Duration,
    /// Maximum size of a manifest in bytes.
    pub manifest_bytes_limit: u64,
    /// Certificate authorities beside those of the system, in DER.
    pub extra_roots: Vec<CertificateDer<'static>>,
    /// Rules for the addresses of untrusted hosts.
    pub addresses: AddressRules,
    /// Folders of `hosts.toml`, as in containerd's `config_path`.
    pub hosts_dirs: Vec<PathBuf>,
    /// Mirrors that may get the credentials of registries.
    pub mirrors_with_credentials: Vec<Url>,
    /// Hosts without TLS that registries may redirect to.
    pub plain_http_redirects: Vec<Url>,
}

/// Time and error of the last attempt to reach a registry.
type UnreachableRegistry = (Instant, RegistryError);

/// A manifest as the registry sent it, with its digest.
#[derive(Clone, Debug)]
pub struct FetchedManifest {
    /// Exact bytes of the response.
    pub bytes: Bytes,
    /// Digest, computed from the bytes.
    pub digest: Digest,
    /// Value of `Content-Type`, as sent.
    pub content_type: Option<String>,
    /// Source of the response.
    pub answered_by: AnsweredBy,
    /// Reservation of memory. A task that holds one must not wait for another.
    _held: Option<Arc<DocumentReservation>>,
}

/// A digest that a tag resolves to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedTag {
    /// Digest in the response header.
    pub digest: Digest,
    /// Source of the response.
    pub answered_by: AnsweredBy,
}

/// Client of all registries. Cheap to clone; clones share connections and tokens.
#[derive(Clone)]
pub struct Registry {
    transport: Arc<Transport>,
    auth_cache: Arc<AuthCache>,
    backoff: Arc<RegistryBackoff>,
    hosts: Arc<RegistryHosts>,
    mirror_health: Arc<MirrorFailures>,
    unreachable: Arc<Mutex<LruMap<String, UnreachableRegistry>>>,
    documents: Arc<DocumentMemory>,
    options: Arc<RegistryOptions>,
}

/// Client of one repository, which sends one credential.
#[derive(Clone, Copy)]
pub struct RepositoryClient<'a> {
    /// Client of all registries.
    pub registry: &'a Registry,
    /// Repository of the requests.
    pub repository: &'a Repository,
    /// Credential that they send.
    pub credential: &'a Credential,
    hosts: AskedHosts,
}

/// The hosts that a client asks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum AskedHosts {
    All,
    Mirrors,
    RegistryItself,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            manifest_timeout: Duration::from_secs(30),
            manifest_bytes_limit: 4 * 1024 * 1024,
            extra_roots: Vec::new(),
            addresses: AddressRules::default(),
            hosts_dirs: Vec::new(),
            mirrors_with_credentials: Vec::new(),
            plain_http_redirects: Vec::new(),
        }
    }
}

impl Registry {
    /// Creates the client. Reads the system's certificate authorities and the proxies of the
    /// environment, but sends no request.
    pub fn new(options: RegistryOptions) -> Result<Self, RegistryError> {
        Ok(Self {
            transport: Arc::new(Transport::new(&options)?),
            auth_cache: Arc::new(AuthCache::new()?),
            backoff: Arc::new(RegistryBackoff::new()?),
            hosts: Arc::new(RegistryHosts::new(
                options.hosts_dirs.clone(),
                options.mirrors_with_credentials.clone(),
            )),
            mirror_health: Arc::default(),
            unreachable: Arc::new(Mutex::new(LruMap::new(MAXIMUM_UNREACHABLE))),
            documents: Arc::default(),
            options: Arc::new(options),
        })
    }

    /// Returns the client of a repository that sends this credential.
    pub fn at<'a>(
        &'a self,
        repository: &'a Repository,
        credential: &'a Credential,
    ) -> RepositoryClient<'a> {
        RepositoryClient { registry: self, repository, credential, hosts: AskedHosts::All }
    }

    /// Returns the addresses of a registry's mirrors, as configured now; `None` if its `hosts.toml`
    /// is broken. Blocking.
    pub fn mirrors(&self, repository: &Repository) -> Option<Vec<Arc<str>>> {
        let route = self.hosts.route_blocking(&self.transport, repository.host());
        let endpoints = route.as_ref().as_ref().ok()?;
        let mirrors = endpoints.iter().filter(|endpoint| !endpoint.is_registry());
        Some(mirrors.map(|endpoint| endpoint.address()).collect())
    }

    /// Waits for a reservation of memory for a document, to be kept as long as the document; `None`
    /// when the driver ends. A task that holds one must not wait for another, nor fetch a manifest.
    pub async fn reserve_memory(
        &self,
        repository: &Repository,
        bytes: u64,
    ) -> Option<DocumentReservation> {
        self.documents.hold(repository.host(), bytes).await
    }

    /// Records that mirrors of this registry sent wrong content for a blob. For a while the blob is
    /// requested from the registry itself first.
    pub fn record_wrong_content(&self, repository: &Repository, blob: Digest) {
        self.mirror_health.record_failure(repository.host(), blob, None);
    }

    /// Records that a mirror failed while it sent a blob. For a while other hosts are preferred.
    pub fn record_mirror_failure(&self, repository: &Repository, blob: Digest, mirror: &Arc<str>) {
        self.mirror_health.record_failure(repository.host(), blob, Some(mirror));
    }

    /// Returns the hosts of a registry, in order, as configured now.
    async fn endpoints(
        &self,
        repository: &Repository,
    ) -> Result<Vec<Arc<RegistryEndpoint>>, RegistryError> {
        let route = self.hosts.route(&self.transport, repository.host()).await;
        Result::clone(&route)
    }

    /// Returns the hosts for a request, in order.
    async fn failover<'a>(
        &'a self,
        request: &'a RegistryRequest<'a>,
        needs: RequiredCapability,
    ) -> Result<HostFailover<'a>, RegistryError> {
        let host = request.repository.host();
        let mut endpoints = self.endpoints(request.repository).await?;
        endpoints.retain(|endpoint| {
            let is_asked = match request.hosts {
                AskedHosts::All => true,
                AskedHosts::Mirrors => !endpoint.is_registry(),
                AskedHosts::RegistryItself => endpoint.is_registry(),
            };
            is_asked && needs.is_met_by(endpoint)
        });
        let health = |mirror: &RegistryEndpoint| match request.blob {
            Some(_) if request.without.contains(&mirror.name()) => MirrorHealth::Unusable,
            Some(blob) => self.mirror_health.health(host, blob, &mirror.name()),
            None => MirrorHealth::Healthy,
        };
        HostFailover::new(self, request, endpoints, health).ok_or_else(|| {
            let reason = format!("its hosts.toml names no host with the capability {needs:?}");
            RegistryError::Configuration { reason }
        })
    }
}

impl RepositoryClient<'_> {
    /// Returns a client of the mirrors, and one of the registry itself. `None` if it has no mirrors,
    /// or if a `hosts.toml` replaces it by another host.
    pub async fn mirrors_and_registry(self) -> Result<Option<(Self, Self)>, RegistryError> {
        let endpoints = self.registry.endpoints(self.repository).await?;
        let is_own = |one: &&Arc<RegistryEndpoint>| one.is_registry() && one.pull && one.resolve;
        let own = endpoints.iter().filter(is_own).count();
        let of = |hosts| Self { hosts, ..self };
        let clients = || (of(AskedHosts::Mirrors), of(AskedHosts::RegistryItself));
        Ok((own > 0 && own < endpoints.len()).then(clients))
    }

    /// Fetches a manifest. Compares its digest with the requested one, or with the one that the
    /// registry announces for a tag.
    pub async fn manifest(self, name: &ManifestName) -> Result<FetchedManifest, RegistryError> {
        let request = &RegistryRequest::manifest(self, name, Method::GET)?;
        if matches!(name, ManifestName::Tag(_)) {
            let endpoints = self.registry.endpoints(self.repository).await?;
            // A host that serves tags may not serve manifests. By digest, all hosts do.
            if endpoints.iter().any(|endpoint| endpoint.resolve && !endpoint.pull)
                && let Some(tag) = self.resolve(name).await?
            {
                let name = ManifestName::Digest(tag.digest);
                return Box::pin(self.manifest(&name)).await;
            }
        }
        let hosts = self.registry.failover(request, name.needs()).await?;
        hosts.try_each(|exchange| FetchedManifest::fetch(exchange, name)).await
    }

    /// Fetches a manifest from the registry itself, not from a mirror: a mirror that serves it
    /// publicly does not prove that the credential may read it. `None` if a `hosts.toml` replaces
    /// the registry by another host.
    pub async fn manifest_of_registry(
        self,
        digest: Digest,
    ) -> Result<Option<FetchedManifest>, RegistryError> {
        let (registry, host) = (self.registry, self.repository.host());
        let name = &ManifestName::Digest(digest);
        let request = &RegistryRequest::manifest(self, name, Method::GET)?;
        let mut own = registry.endpoints(self.repository).await?;
        own.retain(|endpoint| endpoint.is_registry() && endpoint.pull);
        let healthy = |_: &RegistryEndpoint| MirrorHealth::Healthy;
        let Some(hosts) = HostFailover::new(registry, request, own, healthy) else {
            return Ok(None);
        };
        let failed = registry.unreachable.lock().get(&host.to_owned());
        if let Some((_, error)) = failed.filter(|(since, _)| since.elapsed() < UNREACHABLE_FOR) {
            return Err(error.about(&request.what));
        }
        let fetched = hosts.try_each(|exchange| FetchedManifest::fetch(exchange, name)).await;
        if let Err(error @ (RegistryError::Unreachable { .. } | RegistryError::Timeout { .. })) =
            &fetched
        {
            registry.unreachable.lock().insert(host.to_owned(), (Instant::now(), error.clone()));
        }
        fetched.map(Some)
    }

    /// Proves with one small request that a credential gives access to a manifest.
    pub async fn probe(self, digest: Digest) -> Result<AnsweredBy, RegistryError> {
        let name = ManifestName::Digest(digest);
        let head = &RegistryRequest::manifest(self, &name, Method::HEAD)?;
        let get = &RegistryRequest { method: Method::GET, ..head.clone() };
        let hosts = self.registry.failover(head, RequiredCapability::Pull).await?;
        let probe = hosts.try_each_in_time(|exchange| async move {
            let answer = exchange.send().await?;
            if answer.status().is_success() {
                return Ok(exchange.answered_by(&answer));
            }
            if !is_head_unsupported(&answer) {
                return Err(exchange.refusal(&answer));
            }
            let answer = exchange.with(get).expect_success().await?;
            let answered_by = exchange.answered_by(&answer);
            answer.discard().await;
            Ok(answered_by)
        });
        probe.await
    }

    /// Resolves a tag. `None` if the registry does not announce the digest without sending the
    /// manifest.
    pub async fn resolve_tag(self, tag: &str) -> Result<Option<ResolvedTag>, RegistryError> {
        self.resolve(&ManifestName::Tag(tag.to_owned())).await
    }

    async fn resolve(self, name: &ManifestName) -> Result<Option<ResolvedTag>, RegistryError> {
        let head = &RegistryRequest::manifest(self, name, Method::HEAD)?;
        let get = &RegistryRequest { method: Method::GET, ..head.clone() };
        let hosts = self.registry.failover(head, name.needs()).await?;
        let resolved = hosts.try_each_in_time(|exchange| async move {
            let mut answer = exchange.send().await?;
            // The registry may refuse the method HEAD, not the credential.
            if answer.status() == StatusCode::FORBIDDEN && !answer.redirected {
                answer.discard().await;
                answer = exchange.with(get).expect_success().await?;
            }
            if answer.status().is_success() {
                let digest = announced_digest(answer.response.headers());
                let answered_by = exchange.answered_by(&answer);
                answer.discard().await;
                return Ok(digest.map(|digest| ResolvedTag { digest, answered_by }));
            }
            if is_head_unsupported(&answer) { Ok(None) } else { Err(exchange.refusal(&answer)) }
        });
        resolved.await
    }

    /// Proves with one small request that a credential gives access to a blob.
    pub async fn probe_blob(self, digest: Digest) -> Result<AnsweredBy, RegistryError> {
        let head = &RegistryRequest::blob(self, digest, Method::HEAD);
        let mut get = RegistryRequest::blob(self, digest, Method::GET);
        get.headers.insert(RANGE, HeaderValue::from_static("bytes=0-0"));
        let get = &get;
        let hosts = self.registry.failover(head, RequiredCapability::Pull).await?;
        let probe = hosts.try_each_in_time(|exchange| async move {
            let mut answer = exchange.send().await?;
            if is_head_unsupported(&answer) {
                answer = exchange.with(get).send().await?;
            }
            // An empty blob has no first byte, so 416 proves access too.
            if answer.status().is_success() || answer.status() == StatusCode::RANGE_NOT_SATISFIABLE
            {
                return Ok(exchange.answered_by(&answer));
            }
            Err(exchange.refusal(&answer))
        });
        probe.await
    }

    /// Opens a blob from `offset` on. A registry without support for ranges sends it from the
    /// start: [`BlobBody::offset`] is the actual start of the body.
    pub async fn blob(self, digest: Digest, offset: u64) -> Result<BlobBody, RegistryError> {
        self.blob_part(&[], digest, (offset > 0).then_some(BlobPart { start: offset, end: None }))
            .await
    }

    /// Opens a blob, but not at these mirrors.
    pub async fn blob_without(
        self,
        mirrors: &[Arc<str>],
        digest: Digest,
    ) -> Result<BlobBody, RegistryError> {
        self.blob_part(mirrors, digest, None).await
    }

    /// Opens a part of a blob or, if the registry has no support for ranges, the whole blob:
    /// [`BlobBody::offset`] is the actual start of the body.
    pub async fn blob_range(
        self,
        digest: Digest,
        range: Range<u64>,
    ) -> Result<BlobBody, RegistryError> {
        let asked = BlobPart { start: range.start, end: Some(range.end) };
        self.blob_part(&[], digest, Some(asked)).await
    }

    async fn blob_part(
        self,
        without: &[Arc<str>],
        digest: Digest,
        asked: Option<BlobPart>,
    ) -> Result<BlobBody, RegistryError> {
        let blob = RegistryRequest::blob(self, digest, Method::GET);
        let whole = &RegistryRequest { without, ..blob };
        let mut part = whole.clone();
        if let Some(BlobPart { start, end }) = asked {
            part.headers.insert(RANGE, range_of(start, end));
        }
        let part = &part;
        let hosts = self.registry.failover(whole, RequiredCapability::Pull).await?;
        let opened = hosts.try_each_in_time(|exchange| async move {
            let mut answer = exchange.with(part).send().await?;
            if asked.is_some() && answer.status() == StatusCode::RANGE_NOT_SATISFIABLE {
                answer.discard().await;
                answer = exchange.send().await?;
            }
            if !answer.status().is_success() {
                return Err(exchange.refusal(&answer));
            }
            BlobBody::open(exchange, answer, asked)
        });
        opened.await
    }
}

impl FetchedManifest {
    async fn fetch(exchange: Exchange<'_>, name: &ManifestName) -> Result<Self, RegistryError> {
        let Documents { pages, headers, answered_by, held } =
            exchange.documents(|_, _| None).await?;
        let bytes = pages.into_iter().next().unwrap_or_default();
        let expected = match name {
            ManifestName::Digest(digest) => Some(*digest),
            ManifestName::Tag(_) => announced_digest(&headers),
        };
        let digest = Digest::of(&bytes);
        if let Some(expected) = expected.filter(|&expected| expected != digest) {
            let what = exchange.request.what.clone();
            return Err(RegistryError::DigestMismatch { what, expected, got: digest });
        }
        let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let content_type = content_type.map(str::to_owned);
        Ok(Self { bytes, digest, content_type, answered_by, _held: held.map(Arc::new) })
    }
}

/// Returns whether a response to HEAD says nothing about the object: registries and gateways may
/// refuse the method, and presigned URLs of storage may be for GET only.
fn is_head_unsupported(answer: &HttpResponse) -> bool {
    let status = answer.status();
    matches!(status.as_u16(), 400 | 403 | 405 | 501)
        || (answer.redirected && status.is_client_error() && status.as_u16() != 429)
}

/// Returns the digest that the registry announces, if it is valid.
fn announced_digest(headers: &HeaderMap) -> Option<Digest> {
    headers.get(DOCKER_CONTENT_DIGEST)?.to_str().ok()?.trim().parse().ok()
}

fn range_of(start: u64, end: Option<u64>) -> HeaderValue {
    let last = end.map_or_else(String::new, |end| end.saturating_sub(1).to_string());
    HeaderValue::try_from(format!("bytes={start}-{last}"))
        .unwrap_or_else(|_| HeaderValue::from_static("bytes=0-"))
}

#[cfg(test)]
mod tests;
