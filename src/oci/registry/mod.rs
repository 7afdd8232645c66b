//! The registry client: manifests and blobs, by the distribution specification.
//!
//! ```text
//! mod        what may be asked: manifests, tags, blobs; authentication's three steps
//! session    which proof to show: what is known of a repository, answers to challenges
//! token      token servers, and tokens in memory
//! challenge  WWW-Authenticate
//! endpoint   where a repository's registry answers, with or without TLS
//! transport  one exchange over HTTP: connections, redirects, bounded bodies
//! redirect   which addresses a registry may send this node to
//! blob       a blob while it arrives
//! error      why not
//! ```
//!
//! What a caller can rely on:
//!
//! - No retries but those of authentication: one who waits, retries or gives up
//!   knows more than this room. [`RegistryError::is_transient`] helps.
//! - Everything is bounded: manifests and tokens in bytes, every exchange in
//!   time, a blob's silence in time. A blob's size is the caller's to bound.
//! - A credential reaches the registry that it was given for and the token
//!   server that this registry names, over TLS (or on loopback), and nobody else.
//! - Addresses in descriptors (`urls`) are never fetched.

mod blob;
mod challenge;
mod endpoint;
mod error;
mod recent;
mod redirect;
mod session;
mod token;
mod transport;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RANGE};
use reqwest::{Method, StatusCode, Url};
use rustls::pki_types::CertificateDer;

pub use blob::BlobBody;
pub use error::RegistryError;

use self::endpoint::Endpoint;
use self::session::{Proof, Session};
use self::transport::{Answer, Request, Transport};
use super::credentials::Credential;
use super::{Digest, Repository, media_type};

const DOCKER_CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// First without or with what is known, then with the challenge's answer, then
/// once more when that was a stale token.
const MAXIMUM_ATTEMPTS: usize = 3;

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
}

/// How a manifest is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ManifestName {
    /// By a tag, which may move.
    Tag(String),
    /// By its content.
    Digest(Digest),
}

/// A manifest as the registry sent it, hashed.
#[derive(Clone, Debug)]
pub struct FetchedManifest {
    /// The exact bytes.
    pub bytes: Bytes,
    /// Their digest, computed here.
    pub digest: Digest,
    /// The `Content-Type` as sent.
    pub content_type: Option<String>,
}

/// Speaks to all registries. Cheap to clone; clones share connections and tokens.
#[derive(Clone, Debug)]
pub struct Registry {
    transport: Transport,
    session: Arc<Session>,
    options: Arc<RegistryOptions>,
}

/// One question to a registry.
struct Question<'a> {
    repository: &'a Repository,
    credential: &'a Credential,
    method: Method,
    /// The path below the repository.
    object: String,
    headers: HeaderMap,
    /// Names the thing in errors.
    what: String,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            manifest_timeout: Duration::from_secs(30),
            manifest_bytes_limit: 4 * 1024 * 1024,
            extra_roots: Vec::new(),
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
        let question = Question::manifest(repository, name, credential, Method::GET)?;
        let what = question.what.clone();
        let exchange = async {
            let answer = self.expect_success(&question).await?;
            answer.check_encoding(&question.what)?;
            let headers = answer.response.headers();
            let content_type =
                headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).map(str::to_owned);
            let expected = match name {
                ManifestName::Digest(digest) => Some(*digest),
                ManifestName::Tag(_) => announced_digest(headers),
            };
            let bytes = answer.body(&question.what, self.options.manifest_bytes_limit).await?;
            let got = Digest::of(&bytes);
            match expected {
                Some(expected) if expected != got => Err(RegistryError::DigestMismatch {
                    what: question.what.clone(),
                    expected,
                    got,
                }),
                _ => Ok(FetchedManifest { bytes, digest: got, content_type }),
            }
        };
        self.in_time(repository, &what, exchange).await
    }

    /// Proves with one cheap request that a credential opens a manifest.
    pub async fn probe(
        &self,
        repository: &Repository,
        digest: Digest,
        credential: &Credential,
    ) -> Result<(), RegistryError> {
        let name = ManifestName::Digest(digest);
        let head = Question::manifest(repository, &name, credential, Method::HEAD)?;
        let what = head.what.clone();
        let exchange = async {
            let answer = self.ask(&head).await?;
            if answer.status().is_success() {
                return Ok(());
            }
            if !head_is_not_understood(&answer) {
                return Err(answer.refusal(&head.what, credential.is_anonymous()));
            }
            let get = Question::manifest(repository, &name, credential, Method::GET)?;
            self.expect_success(&get).await?.discard().await;
            Ok(())
        };
        self.in_time(repository, &what, exchange).await
    }

    /// Asks what a tag stands for; none when the registry does not say without
    /// sending the manifest.
    pub async fn resolve_tag(
        &self,
        repository: &Repository,
        tag: &str,
        credential: &Credential,
    ) -> Result<Option<Digest>, RegistryError> {
        let name = ManifestName::Tag(tag.to_owned());
        let question = Question::manifest(repository, &name, credential, Method::HEAD)?;
        let what = question.what.clone();
        let exchange = async {
            let answer = self.ask(&question).await?;
            if answer.status().is_success() {
                return Ok(announced_digest(answer.response.headers()));
            }
            if head_is_not_understood(&answer) {
                return Ok(None);
            }
            Err(answer.refusal(&question.what, credential.is_anonymous()))
        };
        self.in_time(repository, &what, exchange).await
    }

    /// Whether the registry has a blob.
    pub async fn has_blob(
        &self,
        repository: &Repository,
        digest: Digest,
        credential: &Credential,
    ) -> Result<bool, RegistryError> {
        let head = Question::blob(repository, digest, credential, Method::HEAD);
        let what = head.what.clone();
        let exchange = async {
            let mut answer = self.ask(&head).await?;
            if head_is_not_understood(&answer) {
                let mut get = Question::blob(repository, digest, credential, Method::GET);
                get.headers.insert(RANGE, HeaderValue::from_static("bytes=0-0"));
                answer = self.ask(&get).await?;
            }
            match answer.refusal_or_success(&head) {
                // An empty blob has no first byte; a server that says so has it.
                Some(_) if answer.status() == StatusCode::RANGE_NOT_SATISFIABLE => Ok(true),
                Some(RegistryError::NotFound { .. }) => Ok(false),
                Some(refusal) => Err(refusal),
                None => Ok(true),
            }
        };
        self.in_time(repository, &what, exchange).await
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
        let mut question = Question::blob(repository, digest, credential, Method::GET);
        if offset > 0 {
            question.headers.insert(RANGE, range_from(offset));
        }
        let what = question.what.clone();
        let exchange = async {
            let mut answer = self.ask(&question).await?;
            if offset > 0 && answer.status() == StatusCode::RANGE_NOT_SATISFIABLE {
                answer.discard().await;
                question.headers.remove(RANGE);
                answer = self.ask(&question).await?;
            }
            if let Some(refusal) = answer.refusal_or_success(&question) {
                return Err(refusal);
            }
            BlobBody::open(answer, offset, question.what, self.options.stall_timeout)
        };
        self.in_time(repository, &what, exchange).await
    }

    async fn expect_success(&self, question: &Question<'_>) -> Result<Answer, RegistryError> {
        let answer = self.ask(question).await?;
        match answer.refusal_or_success(question) {
            Some(refusal) => Err(refusal),
            None => Ok(answer),
        }
    }

    /// Asks, and answers what the registry asks back. Any status may come out.
    async fn ask(&self, question: &Question<'_>) -> Result<Answer, RegistryError> {
        let Question { repository, credential, .. } = *question;
        let endpoint = Endpoint::of(repository)?;
        let url = endpoint.object(repository, &question.object);
        let mut proof =
            self.session.eager(&self.transport, &endpoint, repository, credential).await?;
        let mut attempt = 1;
        loop {
            let answer = self.send(question, &url, &proof).await?;
            let status = answer.status();
            let refused = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
            // What another host refuses is its own affair.
            if answer.redirected || !(refused || status == StatusCode::NOT_FOUND) {
                return Ok(answer);
            }
            let mut challenges = challenge::read(answer.response.headers());
            if refused {
                self.session.forget(&proof).await;
            } else if !matches!(proof, Proof::Nothing) {
                return Ok(answer);
            }
            if status != StatusCode::UNAUTHORIZED && matches!(proof, Proof::Nothing) {
                // Registries that let anybody in hide from anybody what only some may
                // see. The API itself says how to ask.
                if credential.is_anonymous() {
                    return Ok(answer);
                }
                challenges = self.challenges_of_api(question, &endpoint).await?;
            }
            if attempt == MAXIMUM_ATTEMPTS {
                return Ok(answer);
            }
            attempt += 1;
            // A refusal without a challenge still makes a stale token worth renewing.
            self.session.learn(repository, &challenges);
            let challenges = self.session.known(repository);
            let next = self
                .session
                .answer(&self.transport, &endpoint, repository, &challenges, credential, &proof)
                .await?;
            if proof.is_no_better(&next) {
                return Ok(answer);
            }
            answer.discard().await;
            proof = next;
        }
    }

    async fn challenges_of_api(
        &self,
        question: &Question<'_>,
        endpoint: &Endpoint,
    ) -> Result<Vec<challenge::Challenge>, RegistryError> {
        let request = Request {
            method: Method::GET,
            url: endpoint.api(),
            headers: HeaderMap::new(),
            authorization: None,
            form: None,
            what: &question.what,
        };
        let answer = self.transport.send(request).await?;
        let asks = answer.status() == StatusCode::UNAUTHORIZED && !answer.redirected;
        let challenges = if asks { challenge::read(answer.response.headers()) } else { Vec::new() };
        answer.discard().await;
        Ok(challenges)
    }

    async fn send(
        &self,
        question: &Question<'_>,
        url: &Url,
        proof: &Proof,
    ) -> Result<Answer, RegistryError> {
        self.transport
            .send(Request {
                method: question.method.clone(),
                url: url.clone(),
                headers: question.headers.clone(),
                authorization: proof.header(),
                form: None,
                what: &question.what,
            })
            .await
    }

    async fn in_time<T>(
        &self,
        repository: &Repository,
        what: &str,
        exchange: impl Future<Output = Result<T, RegistryError>>,
    ) -> Result<T, RegistryError> {
        let waited = self.options.manifest_timeout;
        tokio::time::timeout(waited, exchange).await.unwrap_or_else(|_| {
            Err(RegistryError::Timeout {
                host: error::host(repository.host()),
                what: what.to_owned(),
                waited,
            })
        })
    }
}

impl<'a> Question<'a> {
    fn manifest(
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
            object: format!("manifests/{name}"),
            headers,
        })
    }

    fn blob(
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
            object: format!("blobs/{digest}"),
            headers: HeaderMap::new(),
        }
    }
}

impl Answer {
    fn refusal_or_success(&self, question: &Question<'_>) -> Option<RegistryError> {
        (!self.status().is_success())
            .then(|| self.refusal(&question.what, question.credential.is_anonymous()))
    }
}

/// Answers to `HEAD` that say nothing about the thing: registries without it,
/// and storage whose presigned addresses are for `GET` alone.
fn head_is_not_understood(answer: &Answer) -> bool {
    let status = answer.status();
    matches!(status.as_u16(), 400 | 405 | 501)
        || (answer.redirected && status.is_client_error() && status.as_u16() != 429)
}

/// The digest that the registry says the manifest has, if it says so in a way that can be checked.
fn announced_digest(headers: &HeaderMap) -> Option<Digest> {
    headers.get(DOCKER_CONTENT_DIGEST)?.to_str().ok()?.trim().parse().ok()
}

fn range_from(offset: u64) -> HeaderValue {
    HeaderValue::try_from(format!("bytes={offset}-"))
        .unwrap_or_else(|_| HeaderValue::from_static("bytes=0-"))
}

/// The specification's grammar, so that a tag cannot become a path or a query.
fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let bytes = tag.as_bytes();
    bytes.len() <= 128
        && bytes.first().is_some_and(|&first| word(first))
        && bytes.iter().all(|&byte| word(byte) || byte == b'.' || byte == b'-')
}

#[cfg(test)]
mod tests;
