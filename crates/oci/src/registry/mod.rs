//! The registry client: manifests and blobs, by the distribution specification.
//!
//! ```text
//! mod        what may be had: manifests, tags, blobs
//! answered_by  who answered: the registry itself or a mirror
//! ask        authentication's three steps
//! referrers  what refers to a digest, page by page
//! passed_by  mirrors that were of no use for a blob
//! question   what may be asked, and of whom in which order
//! session    which proof to show: what is known of a repository, answers to challenges
//! token      token servers, and tokens in memory
//! challenge  WWW-Authenticate
//! hosts      who answers for a registry: itself and its mirrors, by containerd's hosts.toml
//! endpoint   one of them: where it answers, and what it may be asked and told
//! transport  one exchange over HTTP: redirects, bounded bodies
//! connection with which client, tls  with which certificates
//! lookup     how many names are looked up at once
//! address    which addresses a pod's author may aim this node at
//! redirect   which addresses a registry may send this node to
//! plain_http where the administrator lets it do so without TLS
//! proxy      which proxy of the environment an address is reached through
//! blob       a blob while it arrives
//! documents  how many bytes of what is read whole are in memory at once
//! time       how long one exchange may take
//! manners    what keeps being refused is not asked again at once, and patience is had
//! error      why not, refusals  of several credentials
//! ```
//!
//! What a caller can rely on:
//!
//! - No retries but those of authentication: one who waits, retries or gives up
//!   knows more than this room. [`RegistryError::is_transient`] helps.
//! - Everything is bounded: manifests and tokens in bytes, each and all that are
//!   in memory at once, every exchange in time, a blob's silence in time. A blob's size is the caller's to bound.
//! - A credential reaches the registry that it was given for and the token
//!   server that this registry names, over TLS (or on loopback, or as configured),
//!   and nobody else; a mirror gets it only where the administrator marked it.
//! - The first of a registry's hosts that gives what was asked for counts; when
//!   none does, the last one's answer, as that is the registry itself.
//! - Addresses in descriptors (`urls`) are never fetched.

mod address;
mod answered_by;
mod ask;
mod blob;
mod challenge;
mod connection;
mod documents;
mod endpoint;
mod error;
pub mod hosts;
mod lookup;
mod manners;
mod passed_by;
mod plain_http;
mod proxy;
mod question;
mod recent;
mod redirect;
mod referrers;
mod refusals;
mod session;
mod time;
mod tls;
mod token;
mod transport;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RANGE};
use reqwest::{Method, StatusCode, Url};
use rustls::pki_types::CertificateDer;
use tokio::time::Instant;

pub use address::{AddressRules, Loopback};
pub use answered_by::AnsweredBy;
pub use blob::BlobBody;
pub use documents::Held;
pub use endpoint::other_spellings;
pub use error::RegistryError;
pub use hosts::mirror_address;
pub use plain_http::plain_http_address;
pub use question::ManifestName;
pub use referrers::Referrers;
pub use refusals::Refusals;

use self::blob::{BlobAnswer, BlobPart};
use self::documents::Documents;
use self::endpoint::Endpoint;
use self::hosts::Hosts;
use self::manners::{Asker, Manners};
use self::passed_by::{PassedBy, Standing};
use self::question::{Needs, Question, Turns};
use self::recent::Recent;
use self::session::Session;
use self::time::ExchangeTime;
use self::transport::{Answer, Transport};
use super::credentials::Credential;
use super::{Digest, Repository};

/// Registries whose absence is remembered; forgetting one costs a connection's timeout.
const MAXIMUM_ABSENCES: usize = 256;
/// How long a registry that could not be reached is not asked again for its word on what a mirror
/// gave: pods behind a mirror would each wait for a connection that is not made.
const ABSENT: Duration = Duration::from_mins(1);

const DOCKER_CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// What may be set about the client; the defaults suit a cluster's registry.
#[derive(Clone, Debug)]
pub struct RegistryOptions {
    /// For a connection with its TLS session.
    pub connect_timeout: Duration,
    /// For the next bytes of a blob.
    pub stall_timeout: Duration,
    /// For everything else, token and redirects included: a manifest with its
    /// body, or the head of a blob's answer.
    pub manifest_timeout: Duration,
    /// The largest manifest that is read.
    pub manifest_bytes_limit: u64,
    /// Certificate authorities beside the system's, DER.
    pub extra_roots: Vec<CertificateDer<'static>>,
    /// Which addresses strangers may aim the node at.
    pub addresses: AddressRules,
    /// Folders of `hosts.toml`, as containerd's `config_path`.
    pub hosts_dirs: Vec<PathBuf>,
    /// Mirrors that the registries' credentials may be sent to.
    pub mirrors_with_credentials: Vec<Url>,
    /// Hosts without TLS that registries may redirect to.
    pub plain_http_redirects: Vec<Url>,
}

/// When a registry could not be reached, and why.
type Absence = (Instant, RegistryError);

/// A manifest as the registry sent it, hashed.
#[derive(Clone, Debug)]
pub struct FetchedManifest {
    /// The exact bytes.
    pub bytes: Bytes,
    /// Their digest, computed here.
    pub digest: Digest,
    /// The `Content-Type` as sent.
    pub content_type: Option<String>,
    /// Who sent them.
    pub answered_by: AnsweredBy,
    /// Who holds it asks for no other.
    _held: Option<Arc<Held>>,
}

/// What a tag stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedTag {
    /// The digest that was announced.
    pub digest: Digest,
    /// Who announced it.
    pub answered_by: AnsweredBy,
}

/// Speaks to all registries. Cheap to clone; clones share connections and tokens.
#[derive(Clone, Debug)]
pub struct Registry {
    transport: Transport,
    session: Arc<Session>,
    manners: Arc<Manners>,
    hosts: Hosts,
    passed_by: Arc<PassedBy>,
    absent: Arc<Mutex<Recent<String, Absence>>>,
    documents: Arc<Documents>,
    options: Arc<RegistryOptions>,
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
    /// Builds the client and reads the system's certificate authorities; asks
    /// nobody. Proxies are read from the environment, now.
    pub fn new(options: RegistryOptions) -> Result<Self, RegistryError> {
        Ok(Self {
            transport: Transport::new(&options)?,
            session: Arc::new(Session::new()?),
            manners: Arc::new(Manners::new()?),
            hosts: Hosts::new(options.hosts_dirs.clone(), options.mirrors_with_credentials.clone()),
            passed_by: Arc::default(),
            absent: Arc::new(Mutex::new(Recent::new(MAXIMUM_ABSENCES))),
            documents: Arc::default(),
            options: Arc::new(options),
        })
    }

    /// Fetches a manifest. Its digest is computed from its bytes, and compared
    /// with the one asked for, or with the one that the registry announces for a tag.
    pub async fn manifest(
        &self,
        repository: &Repository,
        name: &ManifestName,
        credential: &Credential,
    ) -> Result<FetchedManifest, RegistryError> {
        let question = &Question::manifest(repository, name, credential, Method::GET)?;
        if matches!(name, ManifestName::Tag(_)) && self.resolves_apart(repository).await? {
            // Who may say what a tag means may not send it: asked for by its digest, all may.
            if let Some(tag) = self.resolve(repository, name, credential).await? {
                let name = ManifestName::Digest(tag.digest);
                return Box::pin(self.manifest(repository, &name, credential)).await;
            }
        }
        let mut turns = self.turns(question, name.needs()).await?;
        loop {
            let endpoint = turns.current();
            let tried = Box::pin(self.fetch_manifest(question, endpoint, name));
            if let Some(done) = turns.judge(self.with_manners(question, endpoint, tried).await) {
                return done;
            }
        }
    }

    /// Fetches a manifest from the registry itself, past its mirrors: whether a mirror gives it to
    /// everyone says nothing of who may have it. None where a `hosts.toml` has put another host in
    /// the registry's place.
    pub async fn manifest_of_registry(
        &self,
        repository: &Repository,
        digest: Digest,
        credential: &Credential,
    ) -> Result<Option<FetchedManifest>, RegistryError> {
        let host = repository.host();
        let name = ManifestName::Digest(digest);
        let question = &Question::manifest(repository, &name, credential, Method::GET)?;
        let route = self.hosts.route(&self.transport, host).await;
        let endpoints = route.as_ref().as_ref().map_err(Clone::clone)?;
        let own = endpoints.iter().filter(|endpoint| endpoint.is_registry() && endpoint.pull);
        let own: Vec<_> = own.cloned().collect();
        let Some(mut turns) = Turns::new(own, |_| Standing::Trusted) else { return Ok(None) };
        let absence = self.absent().get(&host.to_owned());
        if let Some((_, error)) = absence.filter(|(since, _)| since.elapsed() < ABSENT) {
            return Err(error.about(&question.what));
        }
        let fetched = loop {
            let endpoint = turns.current();
            let tried = Box::pin(self.fetch_manifest(question, endpoint, &name));
            if let Some(done) = turns.judge(self.with_manners(question, endpoint, tried).await) {
                break done;
            }
        };
        if let Err(error @ (RegistryError::Unreachable { .. } | RegistryError::Timeout { .. })) =
            &fetched
        {
            self.absent().insert(host.to_owned(), (Instant::now(), error.clone()));
        }
        fetched.map(Some)
    }

    /// The addresses of a registry's mirrors, as configured now; none where its `hosts.toml` cannot
    /// be used. Blocking.
    #[must_use]
    pub fn mirrors(&self, repository: &Repository) -> Option<Vec<Arc<str>>> {
        let route = self.hosts.route_blocking(&self.transport, repository.host());
        let endpoints = route.as_ref().as_ref().ok()?;
        let mirrors = endpoints.iter().filter(|endpoint| !endpoint.is_registry());
        Some(mirrors.map(|endpoint| endpoint.address()).collect())
    }

    fn absent(&self) -> std::sync::MutexGuard<'_, Recent<String, Absence>> {
        self.absent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn fetch_manifest(
        &self,
        question: &Question<'_>,
        endpoint: &Endpoint,
        name: &ManifestName,
    ) -> Result<FetchedManifest, RegistryError> {
        let limit = self.options.manifest_bytes_limit;
        let mut time = self.time(question, endpoint);
        let (mut held, mut most) = (None, documents::SMALL.min(limit));
        loop {
            let answer = time.of(self.expect_success(question, endpoint)).await?;
            let answered_by = AnsweredBy::of(endpoint, &answer);
            let headers = answer.response.headers();
            let content_type =
                headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).map(str::to_owned);
            let expected = match name {
                ManifestName::Digest(digest) => Some(*digest),
                ManifestName::Tag(_) => announced_digest(headers),
            };
            if held.is_none() {
                // The header has the encoded length, which says nothing of the decoded one.
                let announced = answer.response.content_length().filter(|_| !answer.is_encoded());
                most = if announced.is_some() { limit } else { most };
                held = self.hold(question.repository, announced.unwrap_or(most).min(limit)).await;
            }
            let bytes = match time.of(answer.document(&question.what, most)).await {
                Ok(bytes) => bytes,
                // Larger than most are. Who waits for more room gives back what he has, with all
                // that was read, and asks again when he has it.
                Err(RegistryError::TooLarge { .. }) if most < limit => {
                    drop(held.take());
                    (held, most) = (self.hold(question.repository, limit).await, limit);
                    continue;
                }
                Err(error) => return Err(error),
            };
            let got = Digest::of(&bytes);
            return match expected {
                Some(expected) if expected != got => Err(RegistryError::DigestMismatch {
                    what: question.what.clone(),
                    expected,
                    got,
                }),
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

    /// Proves with one cheap request that a credential opens a manifest.
    pub async fn probe(
        &self,
        repository: &Repository,
        digest: Digest,
        credential: &Credential,
    ) -> Result<AnsweredBy, RegistryError> {
        let name = ManifestName::Digest(digest);
        let head = &Question::manifest(repository, &name, credential, Method::HEAD)?;
        let get = &Question::manifest(repository, &name, credential, Method::GET)?;
        let mut turns = self.turns(head, Needs::Pull).await?;
        loop {
            let endpoint = turns.current();
            let tried = async {
                let answer = self.ask(head, endpoint).await?;
                if answer.status().is_success() {
                    return Ok(AnsweredBy::of(endpoint, &answer));
                }
                if !head_is_not_understood(&answer) {
                    return Err(answer.refusal(&head.what, head.is_anonymous_at(endpoint)));
                }
                let answer = self.expect_success(get, endpoint).await?;
                let answered_by = AnsweredBy::of(endpoint, &answer);
                answer.discard().await;
                Ok(answered_by)
            };
            if let Some(done) = turns.judge(self.in_time(head, endpoint, tried).await) {
                return done;
            }
        }
    }

    /// Asks what a tag stands for; none when the registry does not say without
    /// sending the manifest.
    pub async fn resolve_tag(
        &self,
        repository: &Repository,
        tag: &str,
        credential: &Credential,
    ) -> Result<Option<ResolvedTag>, RegistryError> {
        self.resolve(repository, &ManifestName::Tag(tag.to_owned()), credential).await
    }

    async fn resolve(
        &self,
        repository: &Repository,
        name: &ManifestName,
        credential: &Credential,
    ) -> Result<Option<ResolvedTag>, RegistryError> {
        let question = &Question::manifest(repository, name, credential, Method::HEAD)?;
        let get = &Question::manifest(repository, name, credential, Method::GET)?;
        let mut turns = self.turns(question, name.needs()).await?;
        loop {
            let endpoint = turns.current();
            let tried = async {
                let mut answer = self.ask(question, endpoint).await?;
                // The method may be what is refused, and not the credential.
                if answer.status() == StatusCode::FORBIDDEN && !answer.redirected {
                    answer.discard().await;
                    answer = self.expect_success(get, endpoint).await?;
                }
                if answer.status().is_success() {
                    let digest = announced_digest(answer.response.headers());
                    let answered_by = AnsweredBy::of(endpoint, &answer);
                    answer.discard().await;
                    return Ok(digest.map(|digest| ResolvedTag { digest, answered_by }));
                }
                if head_is_not_understood(&answer) {
                    return Ok(None);
                }
                Err(answer.refusal(&question.what, question.is_anonymous_at(endpoint)))
            };
            if let Some(done) = turns.judge(self.in_time(question, endpoint, tried).await) {
                return done;
            }
        }
    }

    /// Proves with one cheap request that a credential opens a blob.
    pub async fn probe_blob(
        &self,
        repository: &Repository,
        digest: Digest,
        credential: &Credential,
    ) -> Result<AnsweredBy, RegistryError> {
        let head = &Question::blob(repository, digest, credential, Method::HEAD);
        let mut get = Question::blob(repository, digest, credential, Method::GET);
        get.headers.insert(RANGE, HeaderValue::from_static("bytes=0-0"));
        let get = &get;
        let mut turns = self.turns(head, Needs::Pull).await?;
        loop {
            let endpoint = turns.current();
            let tried = async {
                let mut answer = self.ask(head, endpoint).await?;
                if head_is_not_understood(&answer) {
                    answer = self.ask(get, endpoint).await?;
                }
                match answer.refusal_or_success(head, endpoint) {
                    // An empty blob has no first byte; a server that says so has it.
                    Some(refusal) if answer.status() != StatusCode::RANGE_NOT_SATISFIABLE => {
                        Err(refusal)
                    }
                    _ => Ok(AnsweredBy::of(endpoint, &answer)),
                }
            };
            if let Some(done) = turns.judge(self.in_time(head, endpoint, tried).await) {
                return done;
            }
        }
    }

    /// Opens a blob from `offset` on. A registry that cannot continue sends it
    /// from its start: [`BlobBody::offset`] says where the body starts.
    pub async fn blob(
        &self,
        repository: &Repository,
        digest: Digest,
        offset: u64,
        credential: &Credential,
    ) -> Result<BlobBody, RegistryError> {
        let asked = (offset > 0).then_some(BlobPart { start: offset, end: None });
        let whole = Question::blob(repository, digest, credential, Method::GET);
        self.blob_part(whole, digest, asked).await
    }

    /// Opens a blob at any host but these mirrors.
    pub async fn blob_without(
        &self,
        mirrors: &[Arc<str>],
        repository: &Repository,
        digest: Digest,
        credential: &Credential,
    ) -> Result<BlobBody, RegistryError> {
        let whole = Question::blob(repository, digest, credential, Method::GET);
        self.blob_part(Question { without: mirrors, ..whole }, digest, None).await
    }

    /// Opens a part of a blob that ends before its end, or, when the registry does
    /// not know parts, the whole: [`BlobBody::offset`] says where the body starts.
    pub async fn blob_range(
        &self,
        repository: &Repository,
        digest: Digest,
        range: Range<u64>,
        credential: &Credential,
    ) -> Result<BlobBody, RegistryError> {
        let asked = Some(BlobPart { start: range.start, end: Some(range.end) });
        let whole = Question::blob(repository, digest, credential, Method::GET);
        self.blob_part(whole, digest, asked).await
    }

    async fn blob_part(
        &self,
        whole: Question<'_>,
        digest: Digest,
        asked: Option<BlobPart>,
    ) -> Result<BlobBody, RegistryError> {
        let whole = &whole;
        let mut part = Question::blob(whole.repository, digest, whole.credential, Method::GET);
        if let Some(BlobPart { start, end }) = asked {
            part.headers.insert(RANGE, range_of(start, end));
        }
        let part = &part;
        let mut turns = self.turns(whole, Needs::Pull).await?;
        loop {
            let endpoint = turns.current();
            let tried = async {
                let mut answer = self.ask(part, endpoint).await?;
                if asked.is_some() && answer.status() == StatusCode::RANGE_NOT_SATISFIABLE {
                    answer.discard().await;
                    answer = self.ask(whole, endpoint).await?;
                }
                if let Some(refusal) = answer.refusal_or_success(whole, endpoint) {
                    return Err(refusal);
                }
                let answer = BlobAnswer {
                    mirror: turns.mirror(),
                    answered_by: AnsweredBy::of(endpoint, &answer),
                    answer,
                    asked,
                    what: whole.what.clone(),
                    stall_timeout: self.options.stall_timeout,
                };
                answer.body()
            };
            if let Some(done) = turns.judge(self.in_time(whole, endpoint, tried).await) {
                return done;
            }
        }
    }

    /// Waits for room in memory for so many bytes that are read whole, as long as the answer is
    /// kept; none at the driver's end. Who has it asks for no more, and for no manifest.
    pub async fn hold(&self, repository: &Repository, bytes: u64) -> Option<Held> {
        self.documents.hold(repository.host(), bytes).await
    }

    /// What mirrors of this registry sent for a blob was not what its digest says: for a while
    /// only the registry itself is asked for it, unless that cannot be had.
    pub fn distrust_mirrors(&self, repository: &Repository, blob: Digest) {
        self.passed_by.mark(repository.host(), blob, None);
    }

    /// A mirror began to send a blob and did not get far: the others are asked for it, for a while.
    pub fn pass_by(&self, repository: &Repository, blob: Digest, mirror: &Arc<str>) {
        self.passed_by.mark(repository.host(), blob, Some(mirror));
    }

    /// The hosts to ask, one after the other.
    async fn turns(&self, question: &Question<'_>, needs: Needs) -> Result<Turns, RegistryError> {
        let host = question.repository.host();
        let route = self.hosts.route(&self.transport, host).await;
        let endpoints = route.as_ref().as_ref().map_err(Clone::clone)?;
        let fitting = endpoints.iter().filter(|endpoint| needs.are_met_by(endpoint));
        let standing = |mirror: &Endpoint| match question.blob {
            Some(_) if question.without.contains(&mirror.name()) => Standing::Useless,
            Some(blob) => self.passed_by.standing(host, blob, &mirror.name()),
            None => Standing::Trusted,
        };
        Turns::new(fitting.cloned().collect(), standing).ok_or_else(|| {
            let reason = format!("its hosts.toml names no host with the capability {needs:?}");
            RegistryError::Configuration { reason }
        })
    }

    /// One exchange with one host.
    async fn in_time<T>(
        &self,
        question: &Question<'_>,
        endpoint: &Endpoint,
        exchange: impl Future<Output = Result<T, RegistryError>>,
    ) -> Result<T, RegistryError> {
        let mut time = self.time(question, endpoint);
        self.with_manners(question, endpoint, Box::pin(time.of(exchange))).await
    }

    /// One exchange with one host, which sees to its time itself.
    async fn with_manners<T>(
        &self,
        question: &Question<'_>,
        endpoint: &Endpoint,
        exchange: impl Future<Output = Result<T, RegistryError>>,
    ) -> Result<T, RegistryError> {
        endpoint.check(self.transport.rules())?;
        let asker = self.asker(question, endpoint);
        self.manners.before(&asker).await?;
        let outcome = exchange.await;
        self.manners.after(&asker, &outcome);
        outcome
    }

    /// Returns the key of a request for the backoff of a host.
    fn asker(&self, question: &Question<'_>, endpoint: &Endpoint) -> Asker {
        let host = transport::authority(&endpoint.root);
        let credential = question.credential_for(endpoint);
        self.manners.asker(&host, question.repository, credential, &question.what)
    }

    /// The time that one exchange with one host has.
    fn time<'a>(&self, question: &'a Question<'_>, endpoint: &Endpoint) -> ExchangeTime<'a> {
        let host = transport::authority(&endpoint.root);
        ExchangeTime::new(host, &question.what, self.options.manifest_timeout)
    }

    /// Whether some host may say what tags mean, and send nothing.
    async fn resolves_apart(&self, repository: &Repository) -> Result<bool, RegistryError> {
        let route = self.hosts.route(&self.transport, repository.host()).await;
        let endpoints = route.as_ref().as_ref().map_err(Clone::clone)?;
        Ok(endpoints.iter().any(|endpoint| endpoint.resolve && !endpoint.pull))
    }
}

impl Answer {
    fn refusal_or_success(
        &self,
        question: &Question<'_>,
        endpoint: &Endpoint,
    ) -> Option<RegistryError> {
        (!self.status().is_success())
            .then(|| self.refusal(&question.what, question.is_anonymous_at(endpoint)))
    }
}

/// Answers to `HEAD` that say nothing about the thing: registries and gateways that refuse the
/// method, and storage whose presigned addresses are for `GET` alone.
fn head_is_not_understood(answer: &Answer) -> bool {
    let status = answer.status();
    matches!(status.as_u16(), 400 | 403 | 405 | 501)
        || (answer.redirected && status.is_client_error() && status.as_u16() != 429)
}

/// The digest that the registry says the manifest has, if it says so in a way that can be checked.
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
