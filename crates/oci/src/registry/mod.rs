//! The registry client: manifests and blobs, by the distribution specification.
//!
//! ```text
//! mod                  the client: manifests, tags, blobs
//! registry_request     requests, and failover between the hosts of a registry
//! authenticate         challenges and authorizations of a request
//! auth_cache           cached challenges and authorizations by repository
//! auth_challenge       WWW-Authenticate
//! bearer_token         token servers and cached tokens
//! referrers            referrers of a digest, with pagination
//! blob_response        blob responses and bodies
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
mod environment_proxy;
mod error;
mod exchange_timeout;
pub mod hosts;
mod http_clients;
mod http_transport;
mod lru_map;
mod mirror_health;
mod plain_http;
mod redirect_rules;
mod referrers;
mod registry_backoff;
mod registry_endpoint;
mod registry_request;
mod response_source;
mod tls;

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

use self::auth_cache::AuthCache;
use self::blob_response::{BlobAnswer, BlobPart};
use self::document_memory::DocumentMemory;
use self::exchange_timeout::ExchangeTimeout;
use self::hosts::RegistryHosts;
use self::http_transport::{HttpResponse, Transport};
use self::lru_map::LruMap;
use self::mirror_health::{MirrorFailures, MirrorHealth};
use self::registry_backoff::{RegistryBackoff, RequestKey};
use self::registry_endpoint::RegistryEndpoint;
use self::registry_request::{HostFailover, RegistryRequest, RequiredCapability};
use super::credentials::Credential;
use super::{Digest, Repository};

/// Maximum number of unreachable registries that are remembered. Evicting one costs a connection
/// timeout.
const MAXIMUM_UNREACHABLE: usize = 256;
/// Time during which an unreachable registry is not asked to confirm the response of a mirror.
/// Otherwise, each pod behind a mirror would wait for the connection timeout.
const UNREACHABLE_FOR: Duration = Duration::from_mins(1);

const DOCKER_CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// Options of the client. The defaults suit a registry in the cluster.
#[derive(Clone, Debug)]
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
#[derive(Clone, Debug)]
pub struct Registry {
    transport: Transport,
    auth_cache: Arc<AuthCache>,
    backoff: Arc<RegistryBackoff>,
    hosts: RegistryHosts,
    mirror_health: Arc<MirrorFailures>,
    unreachable: Arc<Mutex<LruMap<String, UnreachableRegistry>>>,
    documents: Arc<DocumentMemory>,
    options: Arc<RegistryOptions>,
}

/// Client of one repository, which sends one credential.
#[derive(Clone, Copy, Debug)]
pub struct RepositoryClient<'a> {
    /// Client of all registries.
    pub registry: &'a Registry,
    /// Repository of the requests.
    pub repository: &'a Repository,
    /// Credential that they send.
    pub credential: &'a Credential,
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
            transport: Transport::new(&options)?,
            auth_cache: Arc::new(AuthCache::new()?),
            backoff: Arc::new(RegistryBackoff::new()?),
            hosts: RegistryHosts::new(
                options.hosts_dirs.clone(),
                options.mirrors_with_credentials.clone(),
            ),
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
        RepositoryClient { registry: self, repository, credential }
    }

    /// Returns the addresses of a registry's mirrors, as configured now; `None` if its `hosts.toml`
    /// is broken. Blocking.
    pub fn mirrors(&self, repository: &Repository) -> Option<Vec<Arc<str>>> {
        let route = self.hosts.route_blocking(&self.transport, repository.host());
        let endpoints = route.as_ref().as_ref().ok()?;
        let mirrors = endpoints.iter().filter(|endpoint| !endpoint.is_registry());
        Some(mirrors.map(|endpoint| endpoint.address()).collect())
    }

    async fn fetch_manifest(
        &self,
        request: &RegistryRequest<'_>,
        endpoint: &RegistryEndpoint,
        name: &ManifestName,
    ) -> Result<FetchedManifest, RegistryError> {
        let limit = self.options.manifest_bytes_limit;
        let mut timeout = self.timeout(request, endpoint);
        let (mut held, mut most) = (None, document_memory::SMALL.min(limit));
        loop {
            let answer = timeout.run(self.expect_success(request, endpoint)).await?;
            let answered_by = AnsweredBy::of(endpoint, &answer);
            let headers = answer.response.headers();
            let content_type =
                headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).map(str::to_owned);
            let expected = match name {
                ManifestName::Digest(digest) => Some(*digest),
                ManifestName::Tag(_) => announced_digest(headers),
            };
            if held.is_none() {
                // `Content-Length` is the encoded length, not the decoded one.
                let announced = answer.response.content_length().filter(|_| !answer.is_encoded());
                most = if announced.is_some() { limit } else { most };
                held = self
                    .reserve_memory(request.repository, announced.unwrap_or(most).min(limit))
                    .await;
            }
            let bytes = match timeout.run(answer.document(&request.what, most)).await {
                Ok(bytes) => bytes,
                // The document is larger than the small pool allows. A task must not wait for a
                // reservation while it holds one, so this drops the reservation and the content,
                // and sends the request again.
                Err(RegistryError::TooLarge { .. }) if most < limit => {
                    drop(held.take());
                    (held, most) = (self.reserve_memory(request.repository, limit).await, limit);
                    continue;
                }
                Err(error) => return Err(error),
            };
            let got = Digest::of(&bytes);
            return match expected {
                Some(expected) if expected != got => {
                    Err(RegistryError::DigestMismatch { what: request.what.clone(), expected, got })
                }
                _ => {
                    let held = held.map(Arc::new);
                    Ok(FetchedManifest {
                        bytes,
                        digest: got,
                        content_type,
                        answered_by,
                        _held: held,
                    })
                }
            };
        }
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

    /// Returns the hosts for a request, in order.
    async fn failover(
        &self,
        request: &RegistryRequest<'_>,
        needs: RequiredCapability,
    ) -> Result<HostFailover, RegistryError> {
        let host = request.repository.host();
        let route = self.hosts.route(&self.transport, host).await;
        let endpoints = route.as_ref().as_ref().map_err(Clone::clone)?;
        let fitting = endpoints.iter().filter(|endpoint| needs.is_met_by(endpoint));
        let health = |mirror: &RegistryEndpoint| match request.blob {
            Some(_) if request.without.contains(&mirror.name()) => MirrorHealth::Unusable,
            Some(blob) => self.mirror_health.health(host, blob, &mirror.name()),
            None => MirrorHealth::Healthy,
        };
        HostFailover::new(fitting.cloned().collect(), health).ok_or_else(|| {
            let reason = format!("its hosts.toml names no host with the capability {needs:?}");
            RegistryError::Configuration { reason }
        })
    }

    /// Performs one exchange with one host, within the timeout.
    async fn with_timeout<T>(
        &self,
        request: &RegistryRequest<'_>,
        endpoint: &RegistryEndpoint,
        exchange: impl Future<Output = Result<T, RegistryError>>,
    ) -> Result<T, RegistryError> {
        let mut timeout = self.timeout(request, endpoint);
        self.with_backoff(request, endpoint, Box::pin(timeout.run(exchange))).await
    }

    /// Performs one exchange with one host, which applies the timeout itself.
    async fn with_backoff<T>(
        &self,
        request: &RegistryRequest<'_>,
        endpoint: &RegistryEndpoint,
        exchange: impl Future<Output = Result<T, RegistryError>>,
    ) -> Result<T, RegistryError> {
        endpoint.check(self.transport.rules())?;
        let key = self.request_key(request, endpoint);
        self.backoff.wait(&key).await?;
        let outcome = exchange.await;
        self.backoff.record_outcome(&key, &outcome);
        outcome
    }

    /// Returns the key of a request for the backoff of a host.
    fn request_key(
        &self,
        request: &RegistryRequest<'_>,
        endpoint: &RegistryEndpoint,
    ) -> RequestKey {
        let host = http_transport::authority(&endpoint.root);
        let credential = request.credential_for(endpoint);
        self.backoff.request_key(&host, request.repository, credential, &request.what)
    }

    /// Returns the timeout for one exchange with one host.
    fn timeout<'a>(
        &self,
        request: &'a RegistryRequest<'_>,
        endpoint: &RegistryEndpoint,
    ) -> ExchangeTimeout<'a> {
        let host = http_transport::authority(&endpoint.root);
        ExchangeTimeout::new(host, &request.what, self.options.manifest_timeout)
    }

    /// Returns whether a host serves tags but not content.
    async fn has_resolve_only_host(&self, repository: &Repository) -> Result<bool, RegistryError> {
        let route = self.hosts.route(&self.transport, repository.host()).await;
        let endpoints = route.as_ref().as_ref().map_err(Clone::clone)?;
        Ok(endpoints.iter().any(|endpoint| endpoint.resolve && !endpoint.pull))
    }
}

impl RepositoryClient<'_> {
    /// Fetches a manifest. Compares its digest with the requested one, or with the one that the
    /// registry announces for a tag.
    pub async fn manifest(self, name: &ManifestName) -> Result<FetchedManifest, RegistryError> {
        let registry = self.registry;
        let request = &RegistryRequest::manifest(self, name, Method::GET)?;
        if matches!(name, ManifestName::Tag(_))
            && registry.has_resolve_only_host(self.repository).await?
        {
            // A host that serves tags may not serve manifests. By digest, all hosts do.
            if let Some(tag) = self.resolve(name).await? {
                let name = ManifestName::Digest(tag.digest);
                return Box::pin(self.manifest(&name)).await;
            }
        }
        let mut failover = registry.failover(request, name.needs()).await?;
        loop {
            let endpoint = failover.current();
            let tried = Box::pin(registry.fetch_manifest(request, endpoint, name));
            if let Some(done) =
                failover.evaluate(registry.with_backoff(request, endpoint, tried).await)
            {
                return done;
            }
        }
    }

    /// Fetches a manifest from the registry itself, not from a mirror: a mirror that serves it
    /// publicly does not prove that the credential may read it. `None` if a `hosts.toml` replaces
    /// the registry by another host.
    pub async fn manifest_of_registry(
        self,
        digest: Digest,
    ) -> Result<Option<FetchedManifest>, RegistryError> {
        let registry = self.registry;
        let host = self.repository.host();
        let name = ManifestName::Digest(digest);
        let request = &RegistryRequest::manifest(self, &name, Method::GET)?;
        let route = registry.hosts.route(&registry.transport, host).await;
        let endpoints = route.as_ref().as_ref().map_err(Clone::clone)?;
        let own = endpoints.iter().filter(|endpoint| endpoint.is_registry() && endpoint.pull);
        let own: Vec<_> = own.cloned().collect();
        let Some(mut failover) = HostFailover::new(own, |_| MirrorHealth::Healthy) else {
            return Ok(None);
        };
        let failed = registry.unreachable.lock().get(&host.to_owned());
        if let Some((_, error)) = failed.filter(|(since, _)| since.elapsed() < UNREACHABLE_FOR) {
            return Err(error.about(&request.what));
        }
        let fetched = loop {
            let endpoint = failover.current();
            let tried = Box::pin(registry.fetch_manifest(request, endpoint, &name));
            if let Some(done) =
                failover.evaluate(registry.with_backoff(request, endpoint, tried).await)
            {
                break done;
            }
        };
        if let Err(error @ (RegistryError::Unreachable { .. } | RegistryError::Timeout { .. })) =
            &fetched
        {
            registry.unreachable.lock().insert(host.to_owned(), (Instant::now(), error.clone()));
        }
        fetched.map(Some)
    }

    /// Proves with one small request that a credential gives access to a manifest.
    pub async fn probe(self, digest: Digest) -> Result<AnsweredBy, RegistryError> {
        let registry = self.registry;
        let name = ManifestName::Digest(digest);
        let head = &RegistryRequest::manifest(self, &name, Method::HEAD)?;
        let get = &RegistryRequest::manifest(self, &name, Method::GET)?;
        let mut failover = registry.failover(head, RequiredCapability::Pull).await?;
        loop {
            let endpoint = failover.current();
            let tried = async {
                let answer = registry.send_authenticated(head, endpoint).await?;
                if answer.status().is_success() {
                    return Ok(AnsweredBy::of(endpoint, &answer));
                }
                if !is_head_unsupported(&answer) {
                    return Err(answer.refusal(&head.what, head.is_anonymous_at(endpoint)));
                }
                let answer = registry.expect_success(get, endpoint).await?;
                let answered_by = AnsweredBy::of(endpoint, &answer);
                answer.discard().await;
                Ok(answered_by)
            };
            if let Some(done) =
                failover.evaluate(registry.with_timeout(head, endpoint, tried).await)
            {
                return done;
            }
        }
    }

    /// Resolves a tag. `None` if the registry does not announce the digest without sending the
    /// manifest.
    pub async fn resolve_tag(self, tag: &str) -> Result<Option<ResolvedTag>, RegistryError> {
        self.resolve(&ManifestName::Tag(tag.to_owned())).await
    }

    async fn resolve(self, name: &ManifestName) -> Result<Option<ResolvedTag>, RegistryError> {
        let registry = self.registry;
        let request = &RegistryRequest::manifest(self, name, Method::HEAD)?;
        let get = &RegistryRequest::manifest(self, name, Method::GET)?;
        let mut failover = registry.failover(request, name.needs()).await?;
        loop {
            let endpoint = failover.current();
            let tried = async {
                let mut answer = registry.send_authenticated(request, endpoint).await?;
                // The registry may refuse the method HEAD, not the credential.
                if answer.status() == StatusCode::FORBIDDEN && !answer.redirected {
                    answer.discard().await;
                    answer = registry.expect_success(get, endpoint).await?;
                }
                if answer.status().is_success() {
                    let digest = announced_digest(answer.response.headers());
                    let answered_by = AnsweredBy::of(endpoint, &answer);
                    answer.discard().await;
                    return Ok(digest.map(|digest| ResolvedTag { digest, answered_by }));
                }
                if is_head_unsupported(&answer) {
                    return Ok(None);
                }
                Err(answer.refusal(&request.what, request.is_anonymous_at(endpoint)))
            };
            if let Some(done) =
                failover.evaluate(registry.with_timeout(request, endpoint, tried).await)
            {
                return done;
            }
        }
    }

    /// Proves with one small request that a credential gives access to a blob.
    pub async fn probe_blob(self, digest: Digest) -> Result<AnsweredBy, RegistryError> {
        let registry = self.registry;
        let head = &RegistryRequest::blob(self, digest, Method::HEAD);
        let mut get = RegistryRequest::blob(self, digest, Method::GET);
        get.headers.insert(RANGE, HeaderValue::from_static("bytes=0-0"));
        let get = &get;
        let mut failover = registry.failover(head, RequiredCapability::Pull).await?;
        loop {
            let endpoint = failover.current();
            let tried = async {
                let mut answer = registry.send_authenticated(head, endpoint).await?;
                if is_head_unsupported(&answer) {
                    answer = registry.send_authenticated(get, endpoint).await?;
                }
                match answer.refusal_or_success(head, endpoint) {
                    // An empty blob has no first byte, so 416 proves access too.
                    Some(refusal) if answer.status() != StatusCode::RANGE_NOT_SATISFIABLE => {
                        Err(refusal)
                    }
                    _ => Ok(AnsweredBy::of(endpoint, &answer)),
                }
            };
            if let Some(done) =
                failover.evaluate(registry.with_timeout(head, endpoint, tried).await)
            {
                return done;
            }
        }
    }

    /// Opens a blob from `offset` on. A registry without support for ranges sends it from the
    /// start: [`BlobBody::offset`] is the actual start of the body.
    pub async fn blob(self, digest: Digest, offset: u64) -> Result<BlobBody, RegistryError> {
        let asked = (offset > 0).then_some(BlobPart { start: offset, end: None });
        let whole = RegistryRequest::blob(self, digest, Method::GET);
        self.blob_part(whole, digest, asked).await
    }

    /// Opens a blob, but not at these mirrors.
    pub async fn blob_without(
        self,
        mirrors: &[Arc<str>],
        digest: Digest,
    ) -> Result<BlobBody, RegistryError> {
        let whole = RegistryRequest::blob(self, digest, Method::GET);
        self.blob_part(RegistryRequest { without: mirrors, ..whole }, digest, None).await
    }

    /// Opens a part of a blob or, if the registry has no support for ranges, the whole blob:
    /// [`BlobBody::offset`] is the actual start of the body.
    pub async fn blob_range(
        self,
        digest: Digest,
        range: Range<u64>,
    ) -> Result<BlobBody, RegistryError> {
        let asked = Some(BlobPart { start: range.start, end: Some(range.end) });
        let whole = RegistryRequest::blob(self, digest, Method::GET);
        self.blob_part(whole, digest, asked).await
    }

    async fn blob_part(
        self,
        whole: RegistryRequest<'_>,
        digest: Digest,
        asked: Option<BlobPart>,
    ) -> Result<BlobBody, RegistryError> {
        let registry = self.registry;
        let whole = &whole;
        let mut part = RegistryRequest::blob(self, digest, Method::GET);
        if let Some(BlobPart { start, end }) = asked {
            part.headers.insert(RANGE, range_of(start, end));
        }
        let part = &part;
        let mut failover = registry.failover(whole, RequiredCapability::Pull).await?;
        loop {
            let endpoint = failover.current();
            let tried = async {
                let mut answer = registry.send_authenticated(part, endpoint).await?;
                if asked.is_some() && answer.status() == StatusCode::RANGE_NOT_SATISFIABLE {
                    answer.discard().await;
                    answer = registry.send_authenticated(whole, endpoint).await?;
                }
                if let Some(refusal) = answer.refusal_or_success(whole, endpoint) {
                    return Err(refusal);
                }
                let answer = BlobAnswer {
                    mirror: failover.mirror(),
                    answered_by: AnsweredBy::of(endpoint, &answer),
                    answer,
                    asked,
                    what: whole.what.clone(),
                    stall_timeout: registry.options.stall_timeout,
                };
                answer.body()
            };
            if let Some(done) =
                failover.evaluate(registry.with_timeout(whole, endpoint, tried).await)
            {
                return done;
            }
        }
    }
}

impl HttpResponse {
    fn refusal_or_success(
        &self,
        request: &RegistryRequest<'_>,
        endpoint: &RegistryEndpoint,
    ) -> Option<RegistryError> {
        (!self.status().is_success())
            .then(|| self.refusal(&request.what, request.is_anonymous_at(endpoint)))
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
