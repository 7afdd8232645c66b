//! Tests with servers on loopback that behave like well-behaved and broken registries.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::body::Body;
use axum::http::Response as HttpResponse;
use axum::response::Response;
use base64::Engine as _;
use futures_util::future::join_all;
use futures_util::{StreamExt as _, stream};

use super::http_transport::HttpRequest;
use super::*;
use crate::{Reference, media_type};

const PASSWORD: &str = "hunter2-never-shown";
const SIGNATURE: &str = "presigned-never-shown";
const MANIFEST: &[u8] = br#"{"schemaVersion":2}"#;

/// A request that a server received.
#[derive(Clone, Debug)]
struct Seen {
    method: String,
    path: String,
    query: String,
    headers: HeaderMap,
    body: String,
}

impl Seen {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    fn authorization(&self) -> Option<&str> {
        self.header("authorization")
    }

    fn is_token_request(&self) -> bool {
        self.path == "/token"
    }
}

/// A server that runs during one test.
struct Server {
    address: SocketAddr,
    seen: Arc<std::sync::Mutex<Vec<Seen>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// Starts a server. The handler gets the server's `host:port` too.
    async fn start(handler: impl Fn(&Seen, &str) -> Response + Send + Sync + 'static) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen: Arc<std::sync::Mutex<Vec<Seen>>> = Arc::default();
        let (log, handler) = (seen.clone(), Arc::new(handler));
        let router = axum::Router::new().fallback(move |request: axum::extract::Request| {
            let (log, handler) = (log.clone(), handler.clone());
            async move {
                let (parts, body) = request.into_parts();
                let body = axum::body::to_bytes(body, 65536).await.unwrap();
                let seen = Seen {
                    method: parts.method.to_string(),
                    path: parts.uri.path().to_owned(),
                    query: parts.uri.query().unwrap_or_default().to_owned(),
                    headers: parts.headers,
                    body: String::from_utf8(body.to_vec()).unwrap(),
                };
                log.lock().unwrap().push(seen.clone());
                handler(&seen, &address.to_string())
            }
        });
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, seen, task }
    }

    fn repository(&self) -> Repository {
        repository(&format!("{}/team/app", self.address))
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    fn token_requests(&self) -> Vec<Seen> {
        self.seen().into_iter().filter(Seen::is_token_request).collect()
    }

    fn registry_requests(&self) -> Vec<Seen> {
        self.seen().into_iter().filter(|seen| !seen.is_token_request()).collect()
    }
}

fn repository(text: &str) -> Repository {
    text.parse::<Reference>().unwrap().repository().clone()
}

fn registry() -> Registry {
    Registry::new(RegistryOptions::default()).unwrap()
}

fn basic_credential() -> Credential {
    Credential::Basic { username: "robot".into(), password: PASSWORD.into() }
}

fn identity_token() -> Credential {
    Credential::IdentityToken { username: String::new(), token: PASSWORD.into() }
}

fn basic_header() -> String {
    let pair = base64::engine::general_purpose::STANDARD.encode(format!("robot:{PASSWORD}"));
    format!("Basic {pair}")
}

fn status(code: u16) -> Response {
    // Errors must never show the body of a response.
    answer(code, &[], format!("<html>{PASSWORD}</html>"))
}

fn ok(body: impl Into<Body>) -> Response {
    answer(200, &[], body)
}

fn answer(code: u16, headers: &[(&str, &str)], body: impl Into<Body>) -> Response {
    let mut builder = HttpResponse::builder().status(code);
    for &(name, value) in headers {
        builder = builder.header(name, value);
    }
    builder.body(body.into()).unwrap()
}

fn challenge_at(host: &str) -> Response {
    let value = format!(
        r#"Bearer realm="http://{host}/token",service="the registry",scope="repository:team/app:pull""#
    );
    answer(401, &[("www-authenticate", &value)], "")
}

/// Returns a body of unknown length, which may never end.
fn chunks(chunks: &'static [&'static [u8]], ends: bool) -> Body {
    let body = stream::iter(chunks).map(|&chunk| Ok::<_, Infallible>(Bytes::from_static(chunk)));
    if ends { Body::from_stream(body) } else { Body::from_stream(body.chain(stream::pending())) }
}

fn tag() -> ManifestName {
    ManifestName::Tag("v1".into())
}

/// A registry with a token server beside it; tokens are counted: `token-1`, `token-2`, ..
async fn with_tokens(
    accepts: impl Fn(&str) -> bool + Send + Sync + 'static,
    answer_with: impl Fn(&Seen) -> Response + Send + Sync + 'static,
) -> Server {
    let count = AtomicUsize::new(0);
    Server::start(move |seen, host| {
        if seen.is_token_request() {
            let number = count.fetch_add(1, Ordering::Relaxed) + 1;
            return ok(format!(r#"{{"token": "token-{number}", "expires_in": 300}}"#));
        }
        match seen.authorization() {
            Some(authorization) if accepts(authorization) => answer_with(seen),
            _ => challenge_at(host),
        }
    })
    .await
}

/// Checks an error. All tests use it.
fn discreet<T: std::fmt::Debug>(result: Result<T, RegistryError>) -> RegistryError {
    let error = result.unwrap_err();
    for text in [error.to_string(), format!("{error:?}"), format!("{error:#?}")] {
        for secret in [PASSWORD, SIGNATURE, "token-", "Basic ", "Bearer ", "<html>", "Signature"] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
    }
    assert!(error.to_string().len() < 500);
    error
}

async fn manifest_error(
    handler: impl Fn(&Seen, &str) -> Response + Send + Sync + 'static,
) -> RegistryError {
    let server = Server::start(handler).await;
    discreet(registry().at(&server.repository(), &Credential::Anonymous).manifest(&tag()).await)
}

async fn blob_error(
    handler: impl Fn(&Seen, &str) -> Response + Send + Sync + 'static,
) -> RegistryError {
    let server = Server::start(handler).await;
    let result = registry()
        .at(&server.repository(), &Credential::Anonymous)
        .blob(Digest::of(b"blob"), 2)
        .await;
    match result {
        Ok(mut body) => discreet(read(&mut body).await),
        Err(error) => discreet(Err::<(), _>(error)),
    }
}

async fn read(body: &mut BlobBody) -> Result<Vec<u8>, RegistryError> {
    let mut all = Vec::new();
    while let Some(chunk) = body.chunk().await? {
        all.extend_from_slice(&chunk);
    }
    Ok(all)
}

// --- manifests ---

#[tokio::test]
async fn a_manifest_is_hashed_and_its_type_kept() {
    let server =
        Server::start(|_, _| answer(200, &[("content-type", media_type::OCI_MANIFEST)], MANIFEST))
            .await;
    let fetched =
        registry().at(&server.repository(), &Credential::Anonymous).manifest(&tag()).await.unwrap();
    assert_eq!(fetched.bytes, MANIFEST);
    assert_eq!(fetched.digest, Digest::of(MANIFEST));
    assert_eq!(fetched.content_type.as_deref(), Some(media_type::OCI_MANIFEST));
    let seen = &server.seen()[0];
    assert_eq!((seen.method.as_str(), seen.path.as_str()), ("GET", "/v2/team/app/manifests/v1"));
    assert!(media_type::MANIFESTS.iter().all(|kind| seen.header("accept").unwrap().contains(kind)));
    assert_eq!(seen.header("accept-encoding"), Some("identity"));
    let agent = concat!("csi-driver-oci/", env!("CARGO_PKG_VERSION"));
    assert_eq!(seen.header("user-agent"), Some(agent));
    assert_eq!(seen.authorization(), None);
}

#[tokio::test]
async fn other_content_than_asked_for_is_refused() {
    let server = Server::start(|_, _| ok("something else")).await;
    let asked = Digest::of(MANIFEST);
    let name = ManifestName::Digest(asked);
    let error =
        discreet(registry().at(&server.repository(), &Credential::Anonymous).manifest(&name).await);
    let got = Digest::of(b"something else");
    assert!(
        matches!(error, RegistryError::DigestMismatch { expected, got: found, .. }
            if expected == asked && found == got),
        "{error}"
    );
    assert!(!error.is_transient());
}

#[tokio::test]
async fn other_content_than_announced_is_refused() {
    let announced = Digest::of(b"announced").to_string();
    let error =
        manifest_error(move |_, _| answer(200, &[("docker-content-digest", &announced)], MANIFEST))
            .await;
    assert!(matches!(error, RegistryError::DigestMismatch { .. }), "{error}");
}

#[tokio::test]
async fn an_announced_digest_of_another_algorithm_is_ignored() {
    let server =
        Server::start(|_, _| answer(200, &[("docker-content-digest", "sha512:00")], MANIFEST))
            .await;
    let result = registry().at(&server.repository(), &Credential::Anonymous).manifest(&tag()).await;
    assert_eq!(result.unwrap().digest, Digest::of(MANIFEST));
}

#[tokio::test]
async fn a_manifest_over_the_limit_is_not_read_whether_announced_or_not() {
    let options = RegistryOptions { manifest_bytes_limit: 10, ..Default::default() };
    let registry = Registry::new(options).unwrap();
    for announced in [true, false] {
        let server = Server::start(move |_, _| {
            if announced { ok(vec![0; 11]) } else { ok(chunks(&[b"12345", b"67890", b"1"], false)) }
        })
        .await;
        let error = discreet(
            registry.at(&server.repository(), &Credential::Anonymous).manifest(&tag()).await,
        );
        assert!(matches!(error, RegistryError::TooLarge { limit: 10, .. }), "{error}");
    }
    let server = Server::start(|_, _| ok(vec![0; 10])).await;
    assert!(
        registry.at(&server.repository(), &Credential::Anonymous).manifest(&tag()).await.is_ok()
    );
}

fn gzip(content: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

#[tokio::test]
async fn a_manifest_that_is_gzipped_on_the_way_is_decoded_within_the_limit() {
    let digest = Digest::of(MANIFEST).to_string();
    let options = RegistryOptions { manifest_bytes_limit: 1 << 20, ..Default::default() };
    let registry = Registry::new(options).unwrap();
    for (encoding, body) in
        [("gzip", gzip(MANIFEST)), ("x-gzip", gzip(MANIFEST)), ("gzip", MANIFEST.to_vec())]
    {
        let digest = digest.clone();
        let server = Server::start(move |_, _| {
            let headers = [("content-encoding", encoding), ("docker-content-digest", &digest)];
            answer(200, &headers, body.clone())
        })
        .await;
        for name in [tag(), ManifestName::Digest(Digest::of(MANIFEST))] {
            let fetched =
                registry.at(&server.repository(), &Credential::Anonymous).manifest(&name).await;
            assert_eq!(fetched.unwrap().bytes, MANIFEST, "{encoding}");
        }
    }
    // Over the limit of small documents, and over that of all documents.
    for (size, fits) in [(1 << 20, true), ((1 << 20) + 1, false), (100 << 20, false)] {
        let body = gzip(&vec![b' '; size]);
        let server =
            Server::start(move |_, _| answer(200, &[("content-encoding", "gzip")], body.clone()))
                .await;
        let fetched =
            registry.at(&server.repository(), &Credential::Anonymous).manifest(&tag()).await;
        match fetched {
            Ok(fetched) => assert!(fits && fetched.bytes.len() == size),
            Err(error) => {
                let is_too_large =
                    matches!(error, RegistryError::TooLarge { limit, .. } if limit == 1 << 20);
                assert!(!fits && is_too_large, "{size}: {error:?}");
            }
        }
    }
    let error = manifest_error(|_, _| {
        answer(200, &[("content-encoding", "br")], &b"\x8b\x02\x80not JSON"[..])
    })
    .await;
    assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
}

#[tokio::test]
async fn the_content_encoding_of_a_blob_is_ignored() {
    let blob = gzip(b"a layer");
    for encoding in ["gzip", "x-gzip", "aws-chunked", "", "aws-chunked,gzip", "zstd", "identity"] {
        let body = blob.clone();
        let server =
            Server::start(move |_, _| answer(200, &[("content-encoding", encoding)], body.clone()))
                .await;
        let (repository, digest) = (server.repository(), Digest::of(&blob));
        let mut body =
            registry().at(&repository, &Credential::Anonymous).blob(digest, 0).await.unwrap();
        assert_eq!(read(&mut body).await.unwrap(), blob, "{encoding}");
    }
}

#[tokio::test]
async fn a_token_may_come_gzipped() {
    let server = Server::start(|seen, host| match seen.authorization() {
        _ if seen.is_token_request() => {
            answer(200, &[("content-encoding", "gzip")], gzip(br#"{"token": "t"}"#))
        }
        Some("Bearer t") => ok(MANIFEST),
        _ => challenge_at(host),
    })
    .await;
    registry().at(&server.repository(), &Credential::Anonymous).manifest(&tag()).await.unwrap();
}

#[tokio::test]
async fn a_tag_cannot_become_a_path() {
    let server = Server::start(|_, _| ok(MANIFEST)).await;
    for name in ["../x", "a/b", "a?b", "", ".a", "a b", "ä", &"a".repeat(129)] {
        let name = ManifestName::Tag(name.into());
        let result =
            registry().at(&server.repository(), &Credential::Anonymous).manifest(&name).await;
        assert!(matches!(discreet(result), RegistryError::NotFound { .. }));
    }
    assert!(server.seen().is_empty());
}

#[tokio::test]
async fn every_status_has_its_error() {
    type Check = fn(&RegistryError) -> bool;
    let cases: [(u16, Check, bool, bool); 16] = [
        (
            401,
            |e| matches!(e, RegistryError::Unauthorized { shown: ShownCredential::Nothing, .. }),
            false,
            true,
        ),
        (
            403,
            |e| matches!(e, RegistryError::Forbidden { shown: ShownCredential::Nothing, .. }),
            false,
            true,
        ),
        (402, |e| matches!(e, RegistryError::PolicyRefused { status: 402, .. }), false, false),
        (412, |e| matches!(e, RegistryError::PolicyRefused { status: 412, .. }), false, false),
        (423, |e| matches!(e, RegistryError::PolicyRefused { status: 423, .. }), false, false),
        (451, |e| matches!(e, RegistryError::PolicyRefused { status: 451, .. }), false, false),
        (404, |e| matches!(e, RegistryError::NotFound { .. }), false, true),
        (410, |e| matches!(e, RegistryError::NotFound { .. }), false, true),
        (429, |e| matches!(e, RegistryError::RateLimited { .. }), true, false),
        (408, |e| matches!(e, RegistryError::ServerError { status: 408, .. }), true, false),
        (500, |e| matches!(e, RegistryError::ServerError { status: 500, .. }), true, false),
        (503, |e| matches!(e, RegistryError::ServerError { status: 503, .. }), true, false),
        (400, |e| matches!(e, RegistryError::Protocol { .. }), false, false),
        (406, |e| matches!(e, RegistryError::Protocol { .. }), false, false),
        (304, |e| matches!(e, RegistryError::Protocol { .. }), false, false),
        (302, |e| matches!(e, RegistryError::Protocol { .. }), false, false),
    ];
    for (code, is_right, transient, of_credential) in cases {
        for error in [
            manifest_error(move |_, _| status(code)).await,
            blob_error(move |_, _| status(code)).await,
        ] {
            assert!(is_right(&error), "{code}: {error:?}");
            assert_eq!(error.is_transient(), transient, "{code}");
            assert_eq!(error.may_depend_on_credential(), of_credential, "{code}");
        }
    }
}

#[tokio::test]
async fn retry_after_is_passed_on() {
    let error = manifest_error(|_, _| answer(429, &[("retry-after", "17")], "")).await;
    assert!(matches!(error, RegistryError::RateLimited { retry_after: Some(wait), .. }
            if wait == Duration::from_secs(17)));
}

#[tokio::test]
async fn a_rate_limit_of_the_token_endpoint_or_the_api_holds_for_the_host() {
    let limit = || answer(429, &[("retry-after", "60")], "");
    // The path that answers 429, and whether the other repository still gets requests.
    for (limited_path, is_asked) in [("/v2/a/", true), ("/token", false), ("/v2/", false)] {
        let server = Server::start(move |seen, host| {
            match (&*seen.path, limited_path) {
                (path, "/v2/a/") if path.starts_with("/v2/a/") => limit(),
                (path, limited) if path == limited => limit(),
                // An anonymous request gets 404, which causes a request for the challenge of the API root.
                (path, "/v2/") if path.starts_with("/v2/a/") => status(404),
                (path, "/token") if path.starts_with("/v2/a/") => challenge_at(host),
                _ => ok(MANIFEST),
            }
        })
        .await;
        let of = |name: &str| repository(&format!("{}/{name}", server.address));
        let (registry, credential) = (registry(), basic_credential());
        let (first, second) = (of("a/app"), of("b/app"));
        let error = discreet(registry.at(&first, &credential).manifest(&tag()).await);
        assert!(matches!(error, RegistryError::RateLimited { .. }), "{limited_path}: {error:?}");
        let other = registry.at(&second, &credential).manifest(&tag()).await;
        assert_eq!(other.is_ok(), is_asked, "{limited_path}: {other:?}");
        if let Err(error) = other {
            assert!(!error.to_string().contains("a/app"), "{error}");
            assert!(!server.seen().iter().any(|seen| seen.path.starts_with("/v2/b/")));
        }
        let anonymous = registry.at(&second, &Credential::Anonymous).manifest(&tag()).await;
        assert!(anonymous.is_ok(), "another credential has a limit of its own");
    }
}

#[tokio::test]
async fn a_rate_limit_of_storage_does_not_hold_for_the_registry() {
    for code in [429, 503] {
        let storage = Server::start(move |_, _| answer(code, &[("retry-after", "60")], "")).await;
        let location = format!("http://{}/b", storage.address);
        let server = Server::start(move |seen, _| {
            if seen.path.contains("/blobs/") {
                answer(307, &[("location", &location)], "")
            } else {
                ok(MANIFEST)
            }
        })
        .await;
        let (registry, repository) = (registry(), server.repository());
        let blob = registry.at(&repository, &Credential::Anonymous).blob(Digest::of(b""), 0).await;
        let error = discreet(blob);
        assert!(
            matches!(error, RegistryError::Storage { status, retry_after: Some(wait), .. }
                if status == code && wait == Duration::from_mins(1)),
            "{error:?}"
        );
        assert!(registry.at(&repository, &Credential::Anonymous).manifest(&tag()).await.is_ok());
    }
}

#[tokio::test]
async fn a_stalled_manifest_times_out() {
    let options =
        RegistryOptions { manifest_timeout: Duration::from_millis(100), ..Default::default() };
    let server = Server::start(|_, _| ok(chunks(&[b"{"], false))).await;
    let registry = Registry::new(options).unwrap();
    let error =
        discreet(registry.at(&server.repository(), &Credential::Anonymous).manifest(&tag()).await);
    assert!(matches!(error, RegistryError::Timeout { .. }) && error.is_transient(), "{error}");
}

/// Returns a manifest of this size without a `Content-Length`.
async fn unannounced(size: usize) -> Server {
    Server::start(move |_, _| {
        let body = stream::iter([Ok::<_, Infallible>(Bytes::from(vec![b' '; size]))]);
        ok(Body::from_stream(body))
    })
    .await
}

#[tokio::test]
async fn an_ordinary_manifest_does_not_wait_for_large_documents() {
    let registry = registry();
    let (slow, other) = (repository("slow.io/a"), repository("slow.io:444/a"));
    let _held = (
        registry.reserve_memory(&slow, 16 << 20).await,
        registry.reserve_memory(&other, 8 << 20).await,
    );
    for server in [Server::start(|_, _| ok(MANIFEST)).await, unannounced(20_000).await] {
        registry.at(&server.repository(), &Credential::Anonymous).manifest(&tag()).await.unwrap();
        assert_eq!(server.seen().len(), 1);
    }
    let server = Server::start(|_, _| ok(LIST)).await;
    let found =
        registry.at(&server.repository(), &Credential::Anonymous).referrers(Digest::of(b"")).await;
    assert!(found.unwrap().is_some());
}

#[tokio::test]
async fn a_large_manifest_waits_for_memory_without_timeout() {
    let options =
        RegistryOptions { manifest_timeout: Duration::from_millis(500), ..Default::default() };
    let registry = Registry::new(options).unwrap();
    let announced = Server::start(|_, _| ok(vec![b' '; 1 << 20])).await;
    for (server, requests) in [(announced, 1), (unannounced(1 << 20).await, 2)] {
        let (slow, other) = (repository("slow.io/a"), repository("slow.io:444/a"));
        let held = (
            registry.reserve_memory(&slow, 16 << 20).await,
            registry.reserve_memory(&other, 8 << 20).await,
        );
        let (asked, name) = (server.repository(), tag());
        let mut fetched = Box::pin(registry.at(&asked, &Credential::Anonymous).manifest(&name));
        let waited = tokio::time::timeout(Duration::from_secs(1), &mut fetched).await;
        assert!(waited.is_err(), "for longer than the registry has: {waited:?}");
        drop(held);
        assert_eq!(fetched.await.unwrap().bytes.len(), 1 << 20);
        assert_eq!(server.seen().len(), requests);
    }
}

// --- probes ---

#[tokio::test]
async fn a_probe_falls_back_from_head_to_get() {
    for (code, requests) in [(200, 1), (403, 2), (405, 2), (501, 2), (400, 2)] {
        let server =
            Server::start(
                move |seen, _| {
                    if seen.method == "HEAD" { answer(code, &[], "") } else { ok(MANIFEST) }
                },
            )
            .await;
        let probed = registry()
            .at(&server.repository(), &Credential::Anonymous)
            .probe(Digest::of(b""))
            .await;
        let expected = (Ok(AnsweredBy::Registry), requests);
        assert_eq!((probed, server.seen().len()), expected, "{code}");
    }
    let server = Server::start(|_, _| status(404)).await;
    let probed =
        registry().at(&server.repository(), &Credential::Anonymous).probe(Digest::of(b"")).await;
    assert!(matches!(discreet(probed), RegistryError::NotFound { .. }));
}

#[tokio::test]
async fn a_tag_resolves_to_the_announced_digest() {
    let digest = Digest::of(MANIFEST);
    for (code, announced, expected) in [
        (200, digest.to_string(), Some(digest)),
        (200, "sha512:00".to_owned(), None),
        (200, "nonsense".to_owned(), None),
        (405, digest.to_string(), None),
    ] {
        let header = announced.clone();
        let server = Server::start(move |seen, _| {
            assert_eq!(seen.method, "HEAD");
            answer(code, &[("docker-content-digest", &header)], "")
        })
        .await;
        let resolved =
            registry().at(&server.repository(), &Credential::Anonymous).resolve_tag("v1").await;
        let expected =
            expected.map(|digest| ResolvedTag { digest, answered_by: AnsweredBy::Registry });
        assert_eq!(resolved, Ok(expected), "{code} {announced}");
    }
}

#[tokio::test]
async fn a_forbidden_head_is_followed_by_a_get() {
    let digest = Digest::of(MANIFEST).to_string();
    for announced in [Some(digest.clone()), None] {
        let header = announced.clone();
        let server = Server::start(move |seen, _| {
            let headers: Vec<_> =
                header.iter().map(|digest| ("docker-content-digest", digest.as_str())).collect();
            if seen.method == "HEAD" { status(403) } else { answer(200, &headers, MANIFEST) }
        })
        .await;
        let (registry, repository) = (registry(), server.repository());
        let resolved = registry.at(&repository, &Credential::Anonymous).resolve_tag("v1").await;
        let found = resolved.unwrap().map(|resolved| resolved.digest.to_string());
        assert_eq!(found, announced);
        let (manifest, anonymous) = (Digest::of(MANIFEST), Credential::Anonymous);
        assert!(registry.at(&repository, &anonymous).probe(manifest).await.is_ok());
        assert!(registry.at(&repository, &anonymous).probe_blob(manifest).await.is_ok());
    }
    let server = Server::start(|_, _| status(403)).await;
    let (registry, repository) = (registry(), server.repository());
    // A refusal of both is cached as one.
    for _ in 0..20 {
        let resolved = registry.at(&repository, &Credential::Anonymous).resolve_tag("v1").await;
        assert!(matches!(discreet(resolved), RegistryError::Forbidden { .. }));
    }
    assert!(server.seen().len() < 40, "{}", server.seen().len());
}

#[tokio::test]
async fn a_blob_probe_finds_present_blobs_only() {
    let here = Digest::of(b"here");
    let server = Server::start(
        move |seen, _| {
            if seen.path.ends_with(&here.hex()) { ok("") } else { status(404) }
        },
    )
    .await;
    let (registry, repository) = (registry(), server.repository());
    let found = registry.at(&repository, &Credential::Anonymous).probe_blob(here).await;
    assert_eq!(found, Ok(AnsweredBy::Registry));
    let other = Digest::of(b"gone");
    let found = registry.at(&repository, &Credential::Anonymous).probe_blob(other).await;
    assert!(matches!(found, Err(RegistryError::NotFound { .. })));
}

#[tokio::test]
async fn a_blob_probe_uses_get_if_storage_refuses_head() {
    let storage =
        Server::start(
            |seen, _| {
                if seen.method == "HEAD" { status(403) } else { answer(206, &[], "x") }
            },
        )
        .await;
    let location = format!("http://{}/blob?Signature={SIGNATURE}", storage.address);
    let server = Server::start(move |_, _| answer(307, &[("location", &location)], "")).await;
    let found = registry()
        .at(&server.repository(), &Credential::Anonymous)
        .probe_blob(Digest::of(b""))
        .await;
    assert_eq!(found, Ok(AnsweredBy::Registry));
    assert_eq!(storage.seen()[1].header("range"), Some("bytes=0-0"));
}

// --- tokens ---

#[tokio::test]
async fn a_token_is_cached_and_sent_with_later_requests() {
    let server = with_tokens(|shown| shown == "Bearer token-1", |_| ok(MANIFEST)).await;
    let (registry, repository) = (registry(), server.repository());
    for _ in 0..3 {
        registry.at(&repository, &Credential::Anonymous).manifest(&tag()).await.unwrap();
        registry.at(&repository, &Credential::Anonymous).blob(Digest::of(b""), 0).await.unwrap();
    }
    assert_eq!(server.token_requests().len(), 1);
    let token = &server.token_requests()[0];
    assert_eq!((token.method.as_str(), token.authorization()), ("GET", None));
    assert_eq!(token.query, "service=the+registry&scope=repository%3Ateam%2Fapp%3Apull");
    // The first request costs a 401, no other does.
    assert_eq!(server.registry_requests().len(), 7);
}

#[tokio::test]
async fn the_password_is_sent_to_the_token_server_only() {
    let tokens = Server::start(|_, _| ok(r#"{"access_token": "token-x"}"#)).await;
    let realm = tokens.address.to_string();
    let server = Server::start(move |seen, _| match seen.authorization() {
        Some("Bearer token-x") => ok(MANIFEST),
        _ => challenge_at(&realm),
    })
    .await;
    registry().at(&server.repository(), &basic_credential()).manifest(&tag()).await.unwrap();
    assert_eq!(tokens.seen()[0].authorization(), Some(basic_header().as_str()));
    for seen in server.seen() {
        assert!(!seen.authorization().unwrap_or_default().contains("Basic"));
    }
}

#[tokio::test]
async fn a_missing_scope_is_added_and_the_query_of_the_realm_kept() {
    let server = Server::start(|seen, host| match (seen.path.as_str(), seen.authorization()) {
        ("/token", _) => ok(r#"{"token": "t"}"#),
        (_, Some("Bearer t")) => ok(MANIFEST),
        _ => {
            let value = format!(r#"Bearer realm="http://{host}/token?a=b""#);
            answer(401, &[("www-authenticate", &value)], "")
        }
    })
    .await;
    registry().at(&server.repository(), &Credential::Anonymous).manifest(&tag()).await.unwrap();
    assert_eq!(server.token_requests()[0].query, "a=b&scope=repository%3Ateam%2Fapp%3Apull");
}

#[tokio::test]
async fn a_stale_token_is_dropped_and_the_request_repeated_once() {
    let valid = Arc::new(AtomicUsize::new(1));
    let accepted = valid.clone();
    let server = with_tokens(
        move |shown| shown == format!("Bearer token-{}", accepted.load(Ordering::Relaxed)),
        |_| ok(MANIFEST),
    )
    .await;
    let (registry, repository) = (registry(), server.repository());
    registry.at(&repository, &Credential::Anonymous).manifest(&tag()).await.unwrap();
    valid.store(2, Ordering::Relaxed);
    registry.at(&repository, &Credential::Anonymous).manifest(&tag()).await.unwrap();
    assert_eq!(server.token_requests().len(), 2);
    assert_eq!(server.registry_requests().len(), 4);
}

#[tokio::test]
async fn a_newly_granted_permission_renews_the_token() {
    let server = with_tokens(
        |_| true,
        |seen| match seen.authorization() {
            Some("Bearer token-1") if seen.path.ends_with("v1") => status(403),
            _ => ok(MANIFEST),
        },
    )
    .await;
    let (registry, repository) = (registry(), server.repository());
    let other = ManifestName::Tag("v2".into());
    registry.at(&repository, &Credential::Anonymous).manifest(&other).await.unwrap();
    registry.at(&repository, &Credential::Anonymous).manifest(&tag()).await.unwrap();
    assert_eq!(server.token_requests().len(), 2);
}

#[tokio::test]
async fn a_new_token_that_is_refused_is_not_fetched_again() {
    let server = with_tokens(|_| false, |_| ok("")).await;
    let result = registry().at(&server.repository(), &basic_credential()).manifest(&tag()).await;
    assert!(matches!(
        discreet(result),
        RegistryError::Unauthorized { shown: ShownCredential::Credential, .. }
    ));
    assert_eq!((server.token_requests().len(), server.registry_requests().len()), (1, 2));

    let server = with_tokens(|_| true, |_| status(403)).await;
    let result = registry().at(&server.repository(), &basic_credential()).manifest(&tag()).await;
    assert!(matches!(
        discreet(result),
        RegistryError::Forbidden { shown: ShownCredential::Credential, .. }
    ));
    assert_eq!((server.token_requests().len(), server.registry_requests().len()), (1, 2));
}

#[tokio::test]
async fn concurrent_requests_share_one_token() {
    let server = with_tokens(|shown| shown == "Bearer token-1", |_| ok(MANIFEST)).await;
    let (registry, repository) = (registry(), server.repository());
    let credential = basic_credential();
    let name = tag();
    let results =
        join_all((0..16).map(|_| registry.at(&repository, &credential).manifest(&name))).await;
    assert!(results.into_iter().all(|result| result.is_ok()));
    assert_eq!(server.token_requests().len(), 1);
}

#[tokio::test]
async fn concurrent_requests_share_a_refusal_and_later_ones_do_not() {
    let server = Server::start(|_, _| status(401)).await;
    let (registry, repository) = (registry(), server.repository());
    let host = repository.host();
    let endpoint =
        RegistryEndpoint::of_registry(host, registry.transport.default_connection()).unwrap();
    let credential = basic_credential();
    let name = tag();
    let client = registry.at(&repository, &credential);
    let request = &RegistryRequest::manifest(client, &name, Method::GET).unwrap();
    let exchange = Exchange { registry: &registry, request, endpoint: &endpoint, is_mirror: false };
    registry.auth_cache.cache_challenges(
        exchange,
        &[auth_challenge::Challenge::Bearer {
            realm: format!("http://{}/token", server.address),
            service: None,
            scopes: Vec::new(),
        }],
    );
    let results =
        join_all((0..8).map(|_| registry.at(&repository, &credential).manifest(&name))).await;
    for result in results {
        assert!(matches!(discreet(result), RegistryError::Unauthorized { .. }));
    }
    assert_eq!(server.seen().len(), 1, "a wrong password is tried once");
    discreet(registry.at(&repository, &credential).manifest(&name).await);
    assert_eq!(server.seen().len(), 2);
}

#[tokio::test]
async fn a_cancelled_fetch_is_taken_over_by_a_waiter() {
    let count = AtomicUsize::new(0);
    let server = Server::start(move |seen, host| match seen.authorization() {
        _ if seen.is_token_request() => {
            if count.fetch_add(1, Ordering::Relaxed) == 0 {
                ok(chunks(&[b"{"], false))
            } else {
                ok(r#"{"token": "t"}"#)
            }
        }
        Some(_) => ok(MANIFEST),
        None => challenge_at(host),
    })
    .await;
    let (registry, repository) = (registry(), server.repository());
    let name = tag();
    let mut first = Box::pin(registry.at(&repository, &Credential::Anonymous).manifest(&name));
    while server.token_requests().is_empty() {
        let _ = tokio::time::timeout(Duration::from_millis(5), &mut first).await;
    }
    let second = registry.at(&repository, &Credential::Anonymous).manifest(&name);
    drop(first);
    assert!(second.await.is_ok());
}

#[tokio::test]
async fn credentials_do_not_share_tokens() {
    let server = with_tokens(|shown| shown.starts_with("Bearer "), |_| ok(MANIFEST)).await;
    let (registry, repository) = (registry(), server.repository());
    for _ in 0..2 {
        for credential in [Credential::Anonymous, basic_credential()] {
            registry.at(&repository, &credential).manifest(&tag()).await.unwrap();
        }
    }
    let shown: Vec<_> = server
        .registry_requests()
        .iter()
        .filter_map(|seen| seen.authorization().map(str::to_owned))
        .collect();
    assert_eq!(shown, ["Bearer token-1", "Bearer token-2", "Bearer token-1", "Bearer token-2"]);
}

#[tokio::test]
async fn an_identity_token_is_posted() {
    let server = with_tokens(|shown| shown == "Bearer token-1", |_| ok(MANIFEST)).await;
    registry().at(&server.repository(), &identity_token()).manifest(&tag()).await.unwrap();
    let request = &server.token_requests()[0];
    assert_eq!((request.method.as_str(), request.query.as_str()), ("POST", ""));
    assert_eq!(request.authorization(), None);
    assert_eq!(request.header("content-type"), Some("application/x-www-form-urlencoded"));
    assert_eq!(
        request.body,
        format!(
            "grant_type=refresh_token&refresh_token={PASSWORD}&client_id=csi-driver-oci\
             &service=the+registry&scope=repository%3Ateam%2Fapp%3Apull"
        )
    );
}

#[tokio::test]
async fn a_server_without_oauth2_gets_an_identity_token_as_a_password() {
    for code in [400, 401, 404, 405] {
        let server = Server::start(move |seen, host| match seen.authorization() {
            _ if seen.method == "POST" => status(code),
            _ if seen.is_token_request() => ok(r#"{"token": "t"}"#),
            Some("Bearer t") => ok(MANIFEST),
            _ => challenge_at(host),
        })
        .await;
        registry().at(&server.repository(), &identity_token()).manifest(&tag()).await.unwrap();
        let get = &server.token_requests()[1];
        assert!(get.authorization().unwrap().starts_with("Basic "), "{code}");
    }
}

#[tokio::test]
async fn refusals_of_a_token_server_have_their_errors() {
    type Check = fn(&RegistryError) -> bool;
    let cases: [(u16, Check); 6] = [
        (400, |e| matches!(e, RegistryError::Unauthorized { .. })),
        (401, |e| matches!(e, RegistryError::Unauthorized { .. })),
        (403, |e| matches!(e, RegistryError::Forbidden { .. })),
        (404, |e| matches!(e, RegistryError::Protocol { .. })),
        (429, |e| matches!(e, RegistryError::RateLimited { .. })),
        (502, |e| matches!(e, RegistryError::ServerError { .. })),
    ];
    for (code, is_right) in cases {
        for credential in [basic_credential(), identity_token()] {
            let server = Server::start(move |seen, host| {
                if seen.is_token_request() { status(code) } else { challenge_at(host) }
            })
            .await;
            let result = registry().at(&server.repository(), &credential).manifest(&tag()).await;
            let error = discreet(result);
            assert!(is_right(&error), "{code} {credential}: {error:?}");
        }
    }
}

#[tokio::test]
async fn token_answers_are_bounded_and_checked() {
    let cases =
        ["", "{}", "[]", "<html>", r#"{"token": ""}"#, r#"{"token": 1}"#, r#"{"token": "a\nb"}"#];
    for body in cases {
        let server =
            Server::start(
                move |seen, host| {
                    if seen.is_token_request() { ok(body) } else { challenge_at(host) }
                },
            )
            .await;
        let result =
            registry().at(&server.repository(), &basic_credential()).manifest(&tag()).await;
        let error = discreet(result);
        assert!(matches!(error, RegistryError::Protocol { .. }), "{body}: {error:?}");
    }
    let server = Server::start(|seen, host| {
        if seen.is_token_request() { ok(vec![b' '; 1 << 20]) } else { challenge_at(host) }
    })
    .await;
    let result = registry().at(&server.repository(), &basic_credential()).manifest(&tag()).await;
    assert!(matches!(discreet(result), RegistryError::TooLarge { .. }));
}

#[tokio::test]
async fn a_token_server_without_tls_is_refused() {
    for realm in ["http://auth.example/token", "ftp://auth.example", "nonsense", "https://u:p@x/"] {
        let error = {
            let value = format!(r#"Bearer realm="{realm}""#);
            let server =
                Server::start(move |_, _| answer(401, &[("www-authenticate", &value)], "")).await;
            discreet(
                registry().at(&server.repository(), &basic_credential()).manifest(&tag()).await,
            )
        };
        assert!(matches!(error, RegistryError::Protocol { .. }), "{realm}: {error:?}");
    }
}

// --- other authorizations ---

#[tokio::test]
async fn basic_is_sent_after_a_challenge_and_then_with_every_request() {
    let server = Server::start(|seen, _| match seen.authorization() {
        Some(shown) if shown == basic_header() => ok(MANIFEST),
        _ => answer(401, &[("www-authenticate", r#"Basic realm="x""#)], ""),
    })
    .await;
    let (registry, repository) = (registry(), server.repository());
    for _ in 0..3 {
        registry.at(&repository, &basic_credential()).manifest(&tag()).await.unwrap();
    }
    assert_eq!(server.seen().len(), 4);
    let result = registry.at(&repository, &Credential::Anonymous).manifest(&tag()).await;
    assert!(matches!(
        discreet(result),
        RegistryError::Unauthorized { shown: ShownCredential::Nothing, .. }
    ));
    let wrong = Credential::Basic { username: "robot".into(), password: "wrong".into() };
    let result = registry.at(&repository, &wrong).manifest(&tag()).await;
    assert!(matches!(
        discreet(result),
        RegistryError::Unauthorized { shown: ShownCredential::Credential, .. }
    ));
    // Two more refused requests: each was sent once.
    assert_eq!(server.seen().len(), 6);
}

#[tokio::test]
async fn a_registry_token_is_sent_unchanged() {
    let server = Server::start(|seen, host| match seen.authorization() {
        Some("Bearer ready") => ok(MANIFEST),
        _ => challenge_at(host),
    })
    .await;
    let ready = |token: &str| Credential::RegistryToken { token: token.into() };
    let (registry, repository) = (registry(), server.repository());
    registry.at(&repository, &ready("ready")).manifest(&tag()).await.unwrap();
    assert_eq!(server.seen().len(), 1);
    let result = registry.at(&repository, &ready(PASSWORD)).manifest(&tag()).await;
    assert!(matches!(discreet(result), RegistryError::Unauthorized { .. }));
    assert!(server.token_requests().is_empty());
}

#[tokio::test]
async fn a_404_without_credentials_asks_the_api_root_for_a_challenge() {
    for hidden in [403, 404] {
        let server = Server::start(move |seen, host| match seen.authorization() {
            _ if seen.is_token_request() => ok(r#"{"token": "t"}"#),
            Some("Bearer t") => ok(MANIFEST),
            _ if seen.path == "/v2/" => challenge_at(host),
            _ => status(hidden),
        })
        .await;
        let registry = registry();
        let repository = server.repository();
        let result = registry.at(&repository, &Credential::Anonymous).manifest(&tag()).await;
        assert!(result.is_err());
        assert_eq!(server.seen().len(), 1);
        registry.at(&repository, &basic_credential()).manifest(&tag()).await.unwrap();
    }
}

#[tokio::test]
async fn a_401_without_challenge_asks_the_api_root() {
    for header in [None, Some("Negotiate"), Some("Bearer")] {
        let server = Server::start(move |seen, host| match seen.authorization() {
            _ if seen.is_token_request() => ok(r#"{"token": "t"}"#),
            Some("Bearer t") => ok(MANIFEST),
            _ if seen.path == "/v2/" => challenge_at(host),
            _ => {
                let headers: Vec<_> =
                    header.iter().map(|&value| ("www-authenticate", value)).collect();
                answer(401, &headers, "")
            }
        })
        .await;
        for credential in [Credential::Anonymous, basic_credential()] {
            registry().at(&server.repository(), &credential).manifest(&tag()).await.unwrap();
        }
    }
}

#[tokio::test]
async fn credentials_that_no_challenge_asks_for_are_not_sent_and_not_blamed() {
    for code in [401, 403] {
        for challenge in [None, Some("NTLM"), Some("Negotiate"), Some("Digest realm=\"r\"")] {
            let server = Server::start(move |_, _| match challenge {
                Some(value) => answer(code, &[("www-authenticate", value)], ""),
                None => status(code),
            })
            .await;
            let credential = basic_credential();
            let result = registry().at(&server.repository(), &credential).manifest(&tag()).await;
            let text = discreet(result).to_string();
            assert!(text.contains("were not sent"), "{text}");
            assert!(text.contains("no supported scheme (Basic, Bearer)"), "{text}");
            assert!(text.contains(&format!("({code})")), "{text}");
            assert_eq!(server.seen().len(), 2);
            assert!(server.seen().iter().all(|seen| seen.authorization().is_none()));
        }
    }
    let server = Server::start(|_, _| answer(401, &[("www-authenticate", "Basic")], "")).await;
    let result = registry().at(&server.repository(), &basic_credential()).manifest(&tag()).await;
    let text = discreet(result).to_string();
    assert!(text.contains("did not accept these credentials"), "{text}");
}

// --- redirects ---

#[tokio::test]
async fn authorization_does_not_follow_a_redirect_to_another_host() {
    let blob = b"the blob";
    let storage = Server::start(|_, _| ok(&blob[..])).await;
    let location = format!("http://{}/b?X-Amz-Signature={SIGNATURE}", storage.address);
    let server = with_tokens(
        |shown| shown == "Bearer token-1",
        move |_| answer(307, &[("location", &location)], "moved"),
    )
    .await;
    let mut body = registry()
        .at(&server.repository(), &basic_credential())
        .blob(Digest::of(blob), 0)
        .await
        .unwrap();
    assert_eq!((body.offset, body.length), (0, Some(blob.len() as u64)));
    assert_eq!(read(&mut body).await.unwrap(), blob);
    assert_eq!(body.chunk().await, Ok(None));
    assert_eq!(storage.seen()[0].query, format!("X-Amz-Signature={SIGNATURE}"));
    for name in ["authorization", "cookie", "referer"] {
        assert_eq!(storage.seen()[0].header(name), None);
    }
}

#[tokio::test]
async fn authorization_stays_on_the_same_host_and_never_comes_back() {
    let other = Server::start(|seen, _| {
        answer(302, &[("location", &format!("http://{}/back", seen.query))], "")
    })
    .await;
    let to_other = format!("http://{}/", other.address);
    let server = with_tokens(
        |_| true,
        move |seen| match seen.path.as_str() {
            "/same" => {
                let location = format!("{to_other}?{}", seen.header("host").unwrap());
                answer(302, &[("location", &location)], "")
            }
            _ => answer(308, &[("location", "/same")], ""),
        },
    )
    .await;
    let result =
        registry().at(&server.repository(), &Credential::Anonymous).blob(Digest::of(b""), 0).await;
    assert!(matches!(discreet(result), RegistryError::Storage { status: 401, .. }));
    let same = server.seen().into_iter().find(|seen| seen.path == "/same").unwrap();
    assert!(same.authorization().is_some());
    assert_eq!(other.seen()[0].authorization(), None);
    let back = server.seen().into_iter().find(|seen| seen.path == "/back").unwrap();
    assert_eq!(back.authorization(), None);
}

#[tokio::test]
async fn a_refusal_of_storage_is_transient() {
    for code in [400, 401, 403, 404] {
        let storage = Server::start(move |_, _| {
            answer(code, &[("www-authenticate", r#"Basic realm="x""#)], PASSWORD)
        })
        .await;
        let location = format!("http://{}/b?Signature={SIGNATURE}", storage.address);
        let server = Server::start(move |_, _| answer(307, &[("location", &location)], "")).await;
        let result =
            registry().at(&server.repository(), &basic_credential()).blob(Digest::of(b""), 0).await;
        let error = discreet(result);
        let host = storage.address.to_string();
        assert!(
            matches!(&error, RegistryError::Storage { host: shown, status, .. }
                if *shown == host && *status == code),
            "{error:?}"
        );
        assert!(error.is_transient() && !error.may_depend_on_credential());
        assert_eq!(storage.seen().len(), 1, "storage is never shown a credential");
    }
}

#[tokio::test]
async fn a_redirect_may_have_bytes_beyond_ascii() {
    for (location, path, query) in [
        ("/b/Größe.bin?name=é", "/b/Gr%C3%B6%C3%9Fe.bin", "name=%C3%A9"),
        ("/b/a b", "/b/a%20b", ""),
    ] {
        let location = HeaderValue::from_bytes(location.as_bytes()).unwrap();
        let server = Server::start(move |seen, _| {
            if seen.path.starts_with("/b/") {
                return ok("x");
            }
            let mut moved = answer(307, &[], "");
            moved.headers_mut().insert("location", location.clone());
            moved
        })
        .await;
        let (repository, anonymous) = (server.repository(), Credential::Anonymous);
        registry().at(&repository, &anonymous).blob(Digest::of(b""), 0).await.unwrap();
        let followed = &server.seen()[1];
        assert_eq!((followed.path.as_str(), followed.query.as_str()), (path, query));
    }
}

#[tokio::test]
async fn bad_redirects_are_not_followed() {
    let cases = [
        "http://storage.example/x",
        "ftp://storage.example/x",
        "http://user:word@127.0.0.1/x",
        "http://[",
        "",
    ];
    for location in cases {
        let error = blob_error(move |_, _| answer(307, &[("location", location)], "")).await;
        assert!(matches!(error, RegistryError::Protocol { .. }), "{location}: {error:?}");
    }
    let server = Server::start(|_, _| answer(302, &[("location", "/again")], "")).await;
    let result =
        registry().at(&server.repository(), &Credential::Anonymous).blob(Digest::of(b""), 0).await;
    assert!(matches!(discreet(result), RegistryError::Protocol { .. }));
    assert_eq!(server.seen().len(), redirect_rules::MAXIMUM_HOPS + 1);
}

// --- blobs ---

#[tokio::test]
async fn a_blob_download_continues_behind_a_redirect() {
    let storage = Server::start(|seen, _| {
        assert_eq!(seen.header("range"), Some("bytes=4-"));
        answer(206, &[("content-range", "bytes 4-7/8")], "blob")
    })
    .await;
    let location = format!("http://{}/b", storage.address);
    let server = Server::start(move |_, _| answer(307, &[("location", &location)], "")).await;
    let mut body = registry()
        .at(&server.repository(), &Credential::Anonymous)
        .blob(Digest::of(b""), 4)
        .await
        .unwrap();
    assert_eq!((body.offset, body.length), (4, Some(4)));
    assert_eq!(read(&mut body).await.unwrap(), b"blob");
}

#[tokio::test]
async fn an_ignored_or_refused_range_starts_over() {
    for refuses in [true, false] {
        let server = Server::start(move |seen, _| match seen.header("range") {
            Some(_) if refuses => status(416),
            _ => ok("the blob"),
        })
        .await;
        let mut body = registry()
            .at(&server.repository(), &Credential::Anonymous)
            .blob(Digest::of(b""), 4)
            .await
            .unwrap();
        assert_eq!((body.offset, body.length), (0, Some(8)));
        assert_eq!(read(&mut body).await.unwrap(), b"the blob");
    }
}

#[tokio::test]
async fn unrequested_parts_are_refused() {
    for header in ["bytes 3-7/8", "bytes 0-7/8", "bytes 2-9/8", "nonsense", ""] {
        let error = blob_error(move |_, _| answer(206, &[("content-range", header)], "blob")).await;
        assert!(matches!(error, RegistryError::Protocol { .. }), "{header}: {error:?}");
    }
    let server =
        Server::start(|_, _| answer(206, &[("content-range", "bytes 0-3/4")], "blob")).await;
    let result =
        registry().at(&server.repository(), &Credential::Anonymous).blob(Digest::of(b""), 0).await;
    assert!(matches!(discreet(result), RegistryError::Protocol { .. }));
    let error = blob_error(|_, _| status(204)).await;
    assert!(matches!(error, RegistryError::Protocol { .. }), "{error:?}");
}

#[tokio::test]
async fn a_stalled_blob_times_out() {
    let options =
        RegistryOptions { stall_timeout: Duration::from_millis(100), ..Default::default() };
    let server = Server::start(|_, _| ok(chunks(&[b"some"], false))).await;
    let mut body = Registry::new(options)
        .unwrap()
        .at(&server.repository(), &Credential::Anonymous)
        .blob(Digest::of(b""), 0)
        .await
        .unwrap();
    assert_eq!(body.chunk().await, Ok(Some(Bytes::from_static(b"some"))));
    let error = discreet(body.chunk().await);
    assert!(matches!(error, RegistryError::Timeout { .. }) && error.is_transient());
    assert_eq!(body.chunk().await, Err(error), "an error is no end");
}

#[tokio::test]
async fn a_broken_connection_is_an_error() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (mut connection, _) = listener.accept().await.unwrap();
        let _ = connection.read(&mut [0; 4096]).await;
        let _ = connection.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nsome").await;
    });
    let repository = repository(&format!("{address}/team/app"));
    let mut body =
        registry().at(&repository, &Credential::Anonymous).blob(Digest::of(b""), 0).await.unwrap();
    let error = discreet(read(&mut body).await);
    assert!(matches!(error, RegistryError::Unreachable { .. }) && error.is_transient());
}

#[tokio::test]
async fn a_connection_that_ends_before_a_response_is_replaced_once() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let repository = repository(&format!("{}/team/app", listener.local_addr().unwrap()));
    tokio::spawn(async move {
        let received = async |connection: &mut tokio::net::TcpStream| {
            assert_ne!(connection.read(&mut [0; 4096]).await.unwrap(), 0);
        };
        // The number of requests that each connection answers. It ends at the next one.
        for answered in [1, 1, 0] {
            let (mut connection, _) = listener.accept().await.unwrap();
            for _ in 0..answered {
                received(&mut connection).await;
                let response = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
                connection.write_all(response).await.unwrap();
            }
            received(&mut connection).await;
        }
    });
    let registry = registry();
    let fetch = async || {
        let client = registry.at(&repository, &Credential::Anonymous);
        client.manifest(&tag()).await.map(|fetched| fetched.bytes)
    };
    assert_eq!(fetch().await, Ok("{}".into()));
    assert_eq!(fetch().await, Ok("{}".into()), "the second connection");
    let error = discreet(fetch().await);
    assert!(matches!(error, RegistryError::Unreachable { .. }), "{error:?}");
}

// --- referrers ---

const LIST: &str = r#"{"schemaVersion":2,"manifests":[{}]}"#;

async fn pages_of(server: &Server) -> Result<usize, RegistryError> {
    let (registry, repository) = (registry(), server.repository());
    let found = registry.at(&repository, &Credential::Anonymous).referrers(Digest::of(b"")).await?;
    Ok(found.map_or(0, |found| found.pages.len()))
}

#[tokio::test]
async fn referrers_are_read_page_by_page() {
    let server = Server::start(|seen, _| {
        let page: usize = seen.query.strip_prefix("page=").map_or(1, |page| page.parse().unwrap());
        let link = format!("<{}?page={}>; rel=\"next\"", seen.path, page + 1);
        if page < 3 { answer(200, &[("link", &link)], LIST) } else { ok(LIST) }
    })
    .await;
    assert_eq!(pages_of(&server).await, Ok(3));
    let endless = Server::start(|seen, _| {
        let page: usize = seen.query.strip_prefix("page=").map_or(1, |page| page.parse().unwrap());
        let link = format!("<{}?page={}>; rel=\"next\"", seen.path, page + 1);
        answer(200, &[("link", &link)], LIST)
    })
    .await;
    assert_eq!(pages_of(&endless).await, Ok(32));
}

#[tokio::test]
async fn a_next_page_on_another_host_or_path_is_not_followed() {
    let elsewhere = Server::start(|_, _| ok(LIST)).await;
    let other = elsewhere.address;
    for link in [
        format!("<http://{other}/v2/team/app/referrers/{}?page=2>; rel=next", Digest::of(b"")),
        "</v2/team/app/blobs/x?page=2>; rel=next".to_owned(),
        "<?>; rel=next".to_owned(),
    ] {
        let server = Server::start(move |_, _| answer(200, &[("link", &link)], LIST)).await;
        assert!(pages_of(&server).await.unwrap() <= 2);
        assert!(server.seen().iter().all(|seen| seen.path.contains("/referrers/")));
    }
    assert!(elsewhere.seen().is_empty());
}

#[tokio::test]
async fn a_list_may_come_gzipped() {
    let encoded = |body: Vec<u8>| answer(200, &[("content-encoding", "gzip")], body);
    let server = Server::start(move |_, _| encoded(LIST.into())).await;
    assert_eq!(pages_of(&server).await, Ok(1));
    let server = Server::start(move |_, _| encoded(gzip(LIST.as_bytes()))).await;
    assert_eq!(pages_of(&server).await, Ok(1));
}

#[tokio::test]
async fn an_empty_list_of_a_mirror_is_followed_by_the_registry() {
    let mirror = Server::start(|_, _| ok(r#"{"schemaVersion":2,"manifests":[]}"#)).await;
    let server = Server::start(|_, _| ok(LIST)).await;
    let (registry, _folder) = registry_behind(&mirror);
    let repository = server.repository();
    let found = registry.at(&repository, &Credential::Anonymous).referrers(Digest::of(b"")).await;
    let found = found.unwrap().expect("a list");
    assert_eq!(found.pages, [LIST.as_bytes()]);
    assert_eq!((mirror.seen().len(), server.seen().len()), (1, 1));
}

// --- mirrors ---

/// Returns a client with this mirror for all registries.
fn registry_behind(mirror: &Server) -> (Registry, tempfile::TempDir) {
    registry_with_hosts(&format!("[host.\"http://{}\"]\n", mirror.address))
}

/// Returns a client with this `hosts.toml` for all registries.
fn registry_with_hosts(text: &str) -> (Registry, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("_default")).unwrap();
    std::fs::write(folder.path().join("_default/hosts.toml"), text).unwrap();
    let hosts_dirs = vec![folder.path().to_owned()];
    (Registry::new(RegistryOptions { hosts_dirs, ..Default::default() }).unwrap(), folder)
}

#[tokio::test]
async fn a_failed_mirror_is_avoided_unless_its_registry_fails() {
    let mirror = Server::start(|_, _| ok("mirror")).await;
    let (first, second) =
        (Server::start(|_, _| ok("first")).await, Server::start(|_, _| ok("second")).await);
    let (registry, _folder) = registry_behind(&mirror);
    let digest = Digest::of(b"");
    let ask = async |repository: &Repository| {
        let mut body = registry.at(repository, &Credential::Anonymous).blob(digest, 0).await?;
        Ok((String::from_utf8(read(&mut body).await?).unwrap(), body.mirror))
    };
    let (of_first, of_second) = (first.repository(), second.repository());
    let (text, sender) = ask(&of_first).await.unwrap();
    let sender = sender.expect("a mirror");
    assert_eq!((text.as_str(), &*sender), ("mirror", mirror.address.to_string().as_str()));
    registry.record_mirror_failure(&of_first, digest, &sender);
    assert_eq!(ask(&of_first).await, Ok(("first".to_owned(), None)));
    assert_eq!(ask(&of_second).await, Ok(("mirror".to_owned(), Some(sender.clone()))));
    registry.record_wrong_content(&of_second, digest);
    assert_eq!(ask(&of_second).await, Ok(("second".to_owned(), None)));
    drop((first, second));
    tokio::time::pause();
    for repository in [&of_first, &of_second] {
        let error = ask(repository).await.unwrap_err();
        assert!(matches!(error, RegistryError::Unreachable { .. }), "{error:?}");
    }
    tokio::time::advance(Duration::from_secs(61)).await;
    tokio::time::resume();
    for repository in [&of_first, &of_second] {
        assert_eq!(ask(repository).await, Ok(("mirror".to_owned(), Some(sender.clone()))));
    }
}

#[tokio::test]
async fn the_table_of_a_host_also_holds_for_the_same_host_as_server() {
    let server = Server::start(|seen, _| match seen.header("x-known") {
        Some(_) if seen.path.contains("/referrers/") => ok(r#"{"manifests":[]}"#),
        Some(_) => status(404),
        None => status(403),
    })
    .await;
    let address = server.address;
    let line = format!("server = \"http://{address}\"\n");
    let table = |settings: &str| {
        format!("[host.\"http://{address}\"]\n{settings}header = {{ x-known = \"1\" }}\n")
    };
    let other = "[host.\"http://127.0.0.1:1\"]\n";
    let pull = table("capabilities = [\"pull\"]\n");
    for (text, requests) in [
        (format!("{line}{}", table("")), 1),
        (table(""), 1),
        (format!("{line}{pull}"), 1),
        (format!("{line}{other}{}", table("")), 1),
        (format!("{line}{}{other}", table("")), 2),
    ] {
        let (registry, _folder) = registry_with_hosts(&text);
        let repository = server.repository();
        let before = server.seen().len();
        let error = registry.at(&repository, &Credential::Anonymous).manifest(&tag()).await;
        let error = discreet(error);
        assert!(matches!(error, RegistryError::NotFound { .. }), "{text}{error}");
        let seen = server.seen().split_off(before);
        assert!(seen.iter().all(|seen| seen.header("x-known").is_some()), "{text}");
        assert_eq!(seen.len(), requests, "{text}");
        let found =
            registry.at(&repository, &Credential::Anonymous).referrers(Digest::of(b"")).await;
        assert_eq!(found.unwrap().expect("a list").pages.len(), 1, "{text}");
    }
}

#[tokio::test]
async fn an_answer_of_the_registry_counts_more_than_a_broken_connection_to_it() {
    for code in [401, 403, 404, 412, 500] {
        let server = Server::start(move |_, _| status(code)).await;
        let address = server.address;
        let expected = discreet(
            registry().at(&server.repository(), &Credential::Anonymous).manifest(&tag()).await,
        );
        // No process listens at the proxy.
        let text = format!(
            "server = \"http://{address}\"\nproxy = \"http://127.0.0.1:1\"\n[host.\"http://{address}\"]\n"
        );
        let (registry, _folder) = registry_with_hosts(&text);
        let error =
            registry.at(&server.repository(), &Credential::Anonymous).manifest(&tag()).await;
        assert_eq!(discreet(error), expected);
    }
    // The answer of a mirror says nothing of the registry.
    let mirror = Server::start(|_, _| status(404)).await;
    let (registry, _folder) = registry_behind(&mirror);
    let repository = repository("127.0.0.1:1/team/app");
    let error = discreet(registry.at(&repository, &Credential::Anonymous).manifest(&tag()).await);
    assert!(matches!(error, RegistryError::Unreachable { .. }), "{error}");
}

// --- connections ---

#[tokio::test]
async fn unreachable_and_untrusted_hosts_have_different_errors() {
    let server = Server::start(|_, _| ok("")).await;
    let transport = Transport::new(&RegistryOptions::default()).unwrap();
    let endpoint = RegistryEndpoint::of_registry("r.io", transport.default_connection()).unwrap();
    let ask = |url: String| {
        transport.send(HttpRequest::get(&endpoint, url.parse().unwrap(), "something"))
    };
    let address = server.address;
    let error = discreet(ask(format!("https://{address}/?Signature={SIGNATURE}")).await);
    assert!(
        matches!(&error, RegistryError::Tls { host, .. } if *host == address.to_string()),
        "{error:?}"
    );
    drop(server);
    // Bound without listening, since another test could get a released port.
    let held = tokio::net::TcpSocket::new_v4().unwrap();
    held.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let free = held.local_addr().unwrap();
    for url in [
        format!("http://{free}/?Signature={SIGNATURE}"),
        format!("https://{free}/?Signature={SIGNATURE}"),
        format!("https://nowhere.invalid/?Signature={SIGNATURE}"),
    ] {
        let error = discreet(ask(url).await);
        assert!(matches!(error, RegistryError::Unreachable { .. }), "{error:?}");
        assert!(error.is_transient());
    }
}

#[test]
fn unusable_authorities_are_refused() {
    let extra_roots = vec![CertificateDer::from(vec![1, 2, 3])];
    let result = Registry::new(RegistryOptions { extra_roots, ..Default::default() });
    assert!(matches!(discreet(result.map(drop)), RegistryError::Setup { .. }));
}
