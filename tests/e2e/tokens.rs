//! Tests a strict token server, and a registry that accepts only its tokens.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use base64::Engine as _;
use serde_json::json;
use tonic::Code;

use crate::support::{
    Answer, FakeRegistry, Layer, Manifest, Node, Request, Volume, digest, wait_until,
};

const USER: &str = "someone";
const PASSWORD: &str = "strict-password";
const IDENTITY: &str = "strict-identity-token";
const SERVICE: &str = "strict service, with = and &";
const SCOPE: &str = "repository:hostile:pull";
const CONTENT: &[u8] = b"behind strict tokens";

/// The time, and the number of requests, for which a token is valid.
#[derive(Clone, Copy)]
struct TokenLife {
    time: Duration,
    requests: u64,
}

const LONG: TokenLife = TokenLife { time: Duration::from_mins(5), requests: u64::MAX };

struct Issued {
    token: String,
    ends: Instant,
    left: u64,
}

/// A registry, its token server and its storage: three hosts.
struct TokenRegistry {
    registry: FakeRegistry,
    server: FakeRegistry,
    storage: FakeRegistry,
    expired: Arc<AtomicU64>,
}

impl TokenRegistry {
    /// Starts a registry that demands a token of this service with this scope.
    fn new(life: TokenLife, service: &'static str, scope: &'static str) -> Self {
        let (registry, server, storage) =
            (FakeRegistry::new(), FakeRegistry::new(), FakeRegistry::new());
        Manifest::artifact([Layer::titled("file", CONTENT)]).push(&registry, "hostile", "v1");
        storage.put_blob(CONTENT);
        let issued: Arc<Mutex<Vec<Issued>>> = Arc::default();
        let expired = Arc::new(AtomicU64::new(0));
        let tokens = Arc::clone(&issued);
        server.script(move |request| Some(issue(request, life, &tokens)));
        let count = Arc::clone(&expired);
        let challenge = format!(
            r#"Bearer realm="http://{}/token",service="{service}",scope="{scope}""#,
            server.host()
        );
        let blob = format!("/blobs/{}", digest(CONTENT));
        let elsewhere = format!("http://{}/v2/x{blob}", storage.host());
        registry.script(move |request| {
            let shown = request.header("authorization").and_then(|it| it.strip_prefix("Bearer "));
            let mut issued = issued.lock().expect("the tokens");
            let known = issued.iter_mut().find(|known| Some(known.token.as_str()) == shown);
            let opens = known.is_some_and(|known| {
                let opens = Instant::now() < known.ends && known.left > 0;
                known.left = known.left.saturating_sub(1);
                count.fetch_add(u64::from(!opens), Ordering::SeqCst);
                opens
            });
            if !opens {
                let refusal = Answer::error(401, "UNAUTHORIZED");
                return Some(refusal.with_header("www-authenticate", &challenge));
            }
            request
                .path
                .ends_with(&blob)
                .then(|| Answer::status(307).with_header("location", &elsewhere))
        });
        Self { registry, server, storage, expired }
    }

    fn volume(&self, node: &Node, auth: serde_json::Value) -> Volume {
        let config = json!({"auths": {self.registry.host(): auth}}).to_string();
        node.kubelet
            .new_volume(&self.registry.reference("v1"))
            .attribute("pullPolicy", "Always")
            .secret(".dockerconfigjson", &config)
    }

    fn token_requests(&self) -> usize {
        self.server.requests().len()
    }

    /// Asserts that each secret was sent only to its host.
    #[track_caller]
    fn assert_nothing_went_astray(&self) {
        let holds = |request: &Request, secret: &str| {
            let body = String::from_utf8_lossy(&request.body);
            let headers = format!("{:?}", request.headers);
            [&request.path, &request.query, &headers, body.as_ref()]
                .iter()
                .any(|text| text.contains(secret))
        };
        for request in self.registry.requests() {
            for secret in [PASSWORD, IDENTITY, &basic(PASSWORD), &basic(IDENTITY)] {
                assert!(!holds(&request, secret), "the registry got a credential: {request:?}");
            }
        }
        for request in self.server.requests() {
            assert!(!holds(&request, "a-token-"), "the token server got a token: {request:?}");
        }
        assert!(!self.storage.requests().is_empty());
        for request in self.storage.requests() {
            assert_eq!(request.header("authorization"), None);
            for secret in [PASSWORD, IDENTITY, "a-token-"] {
                assert!(!holds(&request, secret), "storage got a secret: {request:?}");
            }
        }
    }
}

fn basic(password: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{password}"))
}

fn pairs(encoded: &str) -> Vec<(String, String)> {
    let url = reqwest::Url::parse(&format!("http://any/?{encoded}")).expect("a query");
    url.query_pairs().into_owned().collect()
}

/// Issues a token for a request that follows the specification exactly.
fn issue(request: &Request, life: TokenLife, issued: &Mutex<Vec<Issued>>) -> Answer {
    let of = |pairs: &[(String, String)], name: &str| {
        let values =
            pairs.iter().filter(|(known, _)| known == name).map(|(_, value)| value.clone());
        values.collect::<Vec<_>>()
    };
    let is_form = request.header("content-type") == Some("application/x-www-form-urlencoded");
    let (asked, knows, kind) = match request.method.as_str() {
        "GET" => {
            let shown = request.header("authorization");
            let expected = format!("Basic {}", basic(PASSWORD));
            (pairs(&request.query), shown == Some(&expected), "token")
        }
        "POST" if is_form && request.query.is_empty() => {
            let form = pairs(&String::from_utf8_lossy(&request.body));
            let knows = of(&form, "grant_type") == ["refresh_token"]
                && of(&form, "refresh_token") == [IDENTITY]
                && of(&form, "client_id").iter().any(|client| !client.is_empty())
                && request.header("authorization").is_none();
            (form, knows, "access_token")
        }
        _ => return Answer::error(400, "UNSUPPORTED"),
    };
    if request.path != "/token"
        || !knows
        || of(&asked, "service") != [SERVICE]
        || of(&asked, "scope") != [SCOPE]
    {
        return Answer::error(401, "UNAUTHORIZED");
    }
    let mut issued = issued.lock().expect("the tokens");
    let token = format!("a-token-{}", issued.len());
    let ends = Instant::now() + life.time;
    issued.push(Issued { token: token.clone(), ends, left: life.requests });
    Answer::bytes(json!({kind: token, "expires_in": life.time.as_secs()}).to_string())
}

fn with_password() -> serde_json::Value {
    json!({"username": USER, "password": PASSWORD})
}

fn with_identity_token() -> serde_json::Value {
    json!({"username": USER, "identitytoken": IDENTITY})
}

#[test]
fn a_strict_token_server_is_asked_as_the_specification_says_in_both_flows() {
    let node = Node::start();
    for (auth, method) in [(with_password(), "GET"), (with_identity_token(), "POST")] {
        let setup = TokenRegistry::new(LONG, SERVICE, SCOPE);
        for _ in 0..2 {
            let volume = setup.volume(&node, auth.clone());
            node.kubelet.publish_well(&volume);
            node.kubelet.unpublish(&volume);
        }
        let asked = setup.server.requests();
        assert_eq!(asked.len(), 1, "one token does for all: {asked:?}");
        assert_eq!(asked[0].method, method);
        setup.assert_nothing_went_astray();
    }
}

#[test]
fn a_token_for_another_service_or_scope_is_not_given_and_not_insisted_on() {
    let node = Node::start();
    for (service, scope) in [
        ("another service", SCOPE),
        (SERVICE, "repository:another:pull"),
        (SERVICE, "repository:hostile:pull,push"),
    ] {
        for auth in [with_password(), with_identity_token()] {
            let setup = TokenRegistry::new(LONG, service, scope);
            let volume = setup.volume(&node, auth);
            node.kubelet.publish_badly(&volume, Code::Unauthenticated);
            let asked = setup.token_requests();
            // An identity token is tried in both flows.
            assert!((1..=2).contains(&asked), "{asked} requests for {service}, {scope}");
            assert_eq!(setup.storage.requests().len(), 0);
        }
    }
}

#[test]
fn a_token_that_expires_early_is_renewed_once_in_the_middle_of_a_pull() {
    let node = Node::start();
    // Announced as valid for minutes, but each opens one request only.
    let setup = TokenRegistry::new(TokenLife { requests: 1, ..LONG }, SERVICE, SCOPE);
    let volume = setup.volume(&node, with_password());
    node.kubelet.publish_well(&volume);
    node.kubelet.unpublish(&volume);
    let expired = setup.expired.load(Ordering::SeqCst);
    assert!(expired >= 1, "no token was refused, so none was renewed");
    let renewed = setup.token_requests() as u64 - 1;
    assert!(renewed <= expired, "{renewed} renewals for {expired} refusals");
    setup.assert_nothing_went_astray();
    // Tokens that open nothing at all: requested once more, then the pull fails.
    let never = TokenRegistry::new(TokenLife { requests: 0, ..LONG }, SERVICE, SCOPE);
    node.kubelet.publish_badly(&never.volume(&node, with_password()), Code::Unauthenticated);
    assert!(never.token_requests() <= 2, "{} tokens", never.token_requests());
}

#[test]
fn a_token_is_renewed_when_its_time_is_over() {
    let node = Node::start();
    let life = TokenLife { time: Duration::from_secs(2), ..LONG };
    let setup = TokenRegistry::new(life, SERVICE, SCOPE);
    for auth in [with_password(), with_identity_token()] {
        let first = setup.volume(&node, auth.clone());
        node.kubelet.publish_well(&first);
        let (before, published) = (setup.token_requests(), Instant::now());
        wait_until("the token has expired", || published.elapsed() > life.time);
        let second = setup.volume(&node, auth);
        node.kubelet.publish_well(&second);
        assert!(setup.token_requests() > before, "an expired token was enough");
        node.kubelet.unpublish(&first);
        node.kubelet.unpublish(&second);
    }
    setup.assert_nothing_went_astray();
}
