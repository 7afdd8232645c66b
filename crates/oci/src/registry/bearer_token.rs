//! Bearer tokens of token servers: concurrent requests share one fetch, tokens are cached until
//! shortly before they expire, and credentials never share tokens.
//!
//! Implements both flows of the distribution specification: a `GET` with the credential as `Basic`
//! (or without), and for identity tokens the `OAuth2` `POST`, with a fallback to `GET` for servers
//! that do not support it.
//!
//! The credential is sent to the realm that the registry names, which may be on another host. This
//! gives it to no new party: the owner of the registry can read it anyway. But it must not cross
//! the network in plain text, and a registry must not make this node connect to itself:
//! [`redirect_rules::check`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use base64::Engine as _;
use hmac::{Hmac, KeyInit as _, Mac as _};
use parking_lot::Mutex;
use reqwest::header::{ACCEPT, HeaderMap, HeaderValue};
use reqwest::{Method, Url};
use serde::Deserialize;
use tokio::time::Instant;

use super::error::{self, RegistryError, ShownCredential};
use super::exchange::Exchange;
use super::http_transport::{HttpRequest, HttpResponse, Transport};
use super::redirect_rules;
use super::registry_endpoint::RegistryEndpoint;
use crate::Repository;
use crate::credentials::Credential;
use sys::lru_map::LruMap;

/// Maximum number of cached tokens: pods with distinct credentials and repositories in use at a
/// time.
const MAXIMUM_TOKENS: usize = 1024;
/// Maximum size of a response: tokens of Azure and Google have a few KiB.
const MAXIMUM_ANSWER_BYTES: u64 = 128 * 1024;
/// Lifetime of a token without `expires_in`, by the specification.
const DEFAULT_LIFETIME: Duration = Duration::from_mins(1);
/// Maximum time that a token is used, even if it lives longer: a revoked permission may seem to
/// work for this long.
const MAXIMUM_LIFETIME: Duration = Duration::from_mins(15);
/// Time before expiry at which a token is renewed, so that it is still valid when the request
/// arrives.
const RENEWAL_MARGIN: Duration = Duration::from_secs(10);

/// Key of a token. Requests with equal keys may share a token.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct TokenKey {
    realm: Url,
    service: Option<String>,
    scopes: Vec<String>,
    principal: CredentialHash,
}

/// Keyed hash of a credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct CredentialHash([u8; 32]);

/// A token as a header value.
#[derive(Clone, Debug)]
pub(super) struct BearerToken {
    pub(super) header: HeaderValue,
    renew_at: Instant,
    /// Number of the token among those of its key.
    serial: u64,
}

/// A token with its key and origin.
#[derive(Clone, Debug)]
pub(super) struct FetchedToken {
    pub(super) key: TokenKey,
    pub(super) token: BearerToken,
    /// True if it was fetched before this request began: a refusal may only mean that it is stale.
    pub(super) cached: bool,
}

/// Cache of all tokens.
pub(super) struct TokenCache {
    slots: Mutex<LruMap<TokenKey, Arc<TokenSlot>>>,
    principal_key: [u8; 64],
}

/// Cache slot of one token. The holder of the lock fetches it, others wait; if the fetch is
/// cancelled, the next waiter fetches.
#[derive(Default)]
struct TokenSlot {
    outcome: tokio::sync::Mutex<Option<Result<BearerToken, RegistryError>>>,
    /// Number of completed fetches.
    fetches: AtomicU64,
}

impl TokenCache {
    pub(super) fn new() -> Result<Self, RegistryError> {
        let mut principal_key = [0; 64];
        getrandom::fill(&mut principal_key)
            .map_err(|_| RegistryError::Setup { reason: "the kernel has no randomness".into() })?;
        Ok(Self { slots: Mutex::new(LruMap::new(MAXIMUM_TOKENS)), principal_key })
    }

    pub(super) fn key(
        &self,
        realm: Url,
        service: Option<String>,
        scopes: Vec<String>,
        credential: &Credential,
    ) -> TokenKey {
        TokenKey { realm, service, scopes, principal: self.principal(credential) }
    }

    fn principal(&self, credential: &Credential) -> CredentialHash {
        // Keyed, so that a memory dump does not help to guess a weak password.
        let mut mac = Hmac::<sha2::Sha256>::new(&self.principal_key.into());
        mac.update(&credential.principal_material());
        CredentialHash(mac.finalize().into_bytes().into())
    }

    /// Returns a cached token, or fetches a new one.
    pub(super) async fn get(
        &self,
        exchange: Exchange<'_>,
        key: TokenKey,
    ) -> Result<FetchedToken, RegistryError> {
        let what = describe(exchange.request.repository);
        let slot = self.slot(&key);
        let before = slot.fetches.load(Ordering::Acquire);
        let mut outcome = slot.outcome.lock().await;
        let waited = slot.fetches.load(Ordering::Acquire) != before;
        match &*outcome {
            Some(Ok(token)) if token.is_fresh(Instant::now()) => {
                return Ok(FetchedToken { key, token: token.clone(), cached: !waited });
            }
            // Waiters share a refusal, since one request for each could lock the account. The error
            // does not reveal the object of another request.
            Some(Err(error)) if waited => return Err(error.clone().about(&what)),
            _ => {}
        }
        *outcome = None;
        let serial = slot.fetches.load(Ordering::Acquire).wrapping_add(1);
        let request = TokenRequest { exchange, key: &key, what: &what };
        let fetched = request.fetch(serial).await;
        *outcome = Some(fetched.clone());
        slot.fetches.fetch_add(1, Ordering::Release);
        Ok(FetchedToken { key, token: fetched?, cached: false })
    }

    /// Drops a refused token, unless it was replaced.
    pub(super) async fn forget(&self, fetched: &FetchedToken) {
        let slot = self.slot(&fetched.key);
        let mut outcome = slot.outcome.lock().await;
        if matches!(&*outcome, Some(Ok(token)) if token.serial == fetched.token.serial) {
            *outcome = None;
        }
    }

    fn slot(&self, key: &TokenKey) -> Arc<TokenSlot> {
        let mut slots = self.slots.lock();
        if let Some(slot) = slots.get(key) {
            return slot;
        }
        let slot = Arc::new(TokenSlot::default());
        slots.insert(key.clone(), slot.clone());
        slot
    }
}

impl BearerToken {
    fn is_fresh(&self, now: Instant) -> bool {
        now < self.renew_at
    }
}

/// Response of a token server, as far as it is used.
#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    /// A number by the specification; some servers send a text.
    expires_in: Option<serde_json::Value>,
}

/// Request for a new token.
struct TokenRequest<'a> {
    exchange: Exchange<'a>,
    key: &'a TokenKey,
    /// Description of the token for errors.
    what: &'a str,
}

impl TokenRequest<'_> {
    async fn fetch(&self, serial: u64) -> Result<BearerToken, RegistryError> {
        let what = self.what;
        // The lifetime starts before the server creates the token.
        let asked_at = Instant::now();
        let answer = self.send().await?;
        let status = answer.status();
        if !status.is_success() {
            let anonymous = self.exchange.credential().is_anonymous();
            let host = answer.host.clone();
            return Err(match status.as_u16() {
                // Some servers answer a wrong password with 400.
                400 if !anonymous => {
                    let shown = ShownCredential::of(anonymous);
                    RegistryError::Unauthorized { host, what: what.to_owned(), shown }
                }
                404 | 410 => {
                    answer.protocol(what, format!("the status {status}", status = status.as_u16()))
                }
                _ => answer.refusal(what, anonymous),
            });
        }
        let host = answer.host.clone();
        let unusable = |reason: &str| RegistryError::protocol(&host, what, reason);
        let body = answer.document(what, MAXIMUM_ANSWER_BYTES).await?;
        let answer: TokenAnswer =
            serde_json::from_slice(&body).map_err(|_| unusable("it is not the JSON of a token"))?;
        let token = [answer.token, answer.access_token]
            .into_iter()
            .flatten()
            .find(|token| !token.is_empty())
            .ok_or_else(|| unusable("there is no token in it"))?;
        let header = bearer(&token).ok_or_else(|| unusable("its token fits in no header"))?;
        let lifetime = lifetime(answer.expires_in.as_ref());
        Ok(BearerToken { header, renew_at: asked_at + lifetime - margin(lifetime), serial })
    }

    /// Sends the request, or up to two for an identity token.
    async fn send(&self) -> Result<HttpResponse, RegistryError> {
        let Self { exchange, key, what } = *self;
        let (transport, credential) = (&exchange.registry.transport, exchange.credential());
        let accepted = HeaderValue::from_static("application/json");
        let request = || HttpRequest {
            headers: HeaderMap::from_iter([(ACCEPT, accepted.clone())]),
            ..HttpRequest::get(exchange.endpoint, key.realm.clone(), what)
        };
        if let Credential::IdentityToken { token, .. } = credential {
            let form = Some(form(key, token));
            let answer =
                transport.send(HttpRequest { method: Method::POST, form, ..request() }).await?;
            // Servers without this flow answer 404 or 405, others 400 or 401: seen with Google,
            // Artifactory and Azure.
            if !matches!(answer.status().as_u16(), 300..=399 | 400 | 401 | 404 | 405) {
                return Ok(answer);
            }
            answer.discard().await;
        }
        let mut url = key.realm.clone();
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = &key.service {
                query.append_pair("service", service);
            }
            for scope in &key.scopes {
                query.append_pair("scope", scope);
            }
        }
        let authorization = basic(credential);
        let authorization = authorization.as_ref();
        transport.send(HttpRequest { url, authorization, ..request() }).await
    }
}

fn form(key: &TokenKey, refresh_token: &str) -> String {
    // The query of a URL has the encoding of a form.
    let mut form = key.realm.clone();
    form.set_query(None);
    {
        let mut pairs = form.query_pairs_mut();
        pairs.append_pair("grant_type", "refresh_token");
        pairs.append_pair("refresh_token", refresh_token);
        pairs.append_pair("client_id", "csi-driver-oci");
        if let Some(service) = &key.service {
            pairs.append_pair("service", service);
        }
        pairs.append_pair("scope", &key.scopes.join(" "));
    }
    form.query().unwrap_or_default().to_owned()
}

/// Describes a token for a repository.
pub(super) fn describe(repository: &Repository) -> String {
    error::describe("a token", repository)
}

/// Returns a `Bearer` header, marked as sensitive for logs.
pub(super) fn bearer(token: &str) -> Option<HeaderValue> {
    let mut header = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
    header.set_sensitive(true);
    Some(header)
}

/// Returns a `Basic` header for credentials with a user name and a secret.
pub(super) fn basic(credential: &Credential) -> Option<HeaderValue> {
    let (username, password) = match credential {
        Credential::Basic { username, password } => (username, password),
        Credential::IdentityToken { username, token } => (username, token),
        Credential::Anonymous | Credential::RegistryToken { .. } => return None,
    };
    let pair = base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}"));
    let mut header = HeaderValue::from_str(&format!("Basic {pair}")).ok()?;
    header.set_sensitive(true);
    Some(header)
}

/// Parses and checks the address of a token server. Plain HTTP is allowed only if the registry
/// itself uses it.
pub(super) async fn realm(
    transport: &Transport,
    endpoint: &RegistryEndpoint,
    realm: &str,
) -> Result<Url, &'static str> {
    let mut realm = Url::parse(realm).map_err(|_| "the token server's address is unreadable")?;
    realm.set_fragment(None);
    let is_plain = endpoint.root.scheme() == "http";
    let plain_http = is_plain && transport.plain_http.allows(endpoint, &realm).await;
    redirect_rules::check(&endpoint.root, &realm, plain_http).map_err(|_| {
        "the token server's address must be https (or one that a hosts.toml names as http), without a user name, and not this node's own"
    })?;
    Ok(realm)
}

fn lifetime(expires_in: Option<&serde_json::Value>) -> Duration {
    let seconds = match expires_in {
        Some(serde_json::Value::Number(number)) => number.as_f64(),
        Some(serde_json::Value::String(text)) => text.parse().ok(),
        _ => None,
    };
    seconds
        .filter(|&seconds| seconds > 0.0)
        .map_or(DEFAULT_LIFETIME, |seconds: f64| {
            Duration::try_from_secs_f64(seconds).unwrap_or(MAXIMUM_LIFETIME)
        })
        .min(MAXIMUM_LIFETIME)
}

/// Returns the renewal margin, which is shorter for short-lived tokens.
fn margin(lifetime: Duration) -> Duration {
    RENEWAL_MARGIN.min(lifetime / 5)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::registry::RegistryOptions;

    #[test]
    fn the_lifetime_defaults_to_a_minute_and_is_bounded() {
        let of = |value: serde_json::Value| lifetime(Some(&value)).as_secs();
        assert_eq!(lifetime(None), DEFAULT_LIFETIME);
        assert_eq!(of(json!(300)), 300);
        assert_eq!(of(json!("300")), 300);
        assert_eq!(of(json!(1.5e300)), 900);
        assert_eq!(of(json!(43200)), 900);
        for nonsense in [json!(0), json!(-5), json!("NaN"), json!(null), json!([])] {
            assert_eq!(of(nonsense.clone()), 60, "{nonsense}");
        }
    }

    #[test]
    fn a_token_is_renewed_before_it_expires() {
        let now = Instant::now();
        let made = |lifetime: Duration| BearerToken {
            header: HeaderValue::from_static("x"),
            renew_at: now + lifetime - margin(lifetime),
            serial: 1,
        };
        let token = made(Duration::from_mins(1));
        assert!(token.is_fresh(now + Duration::from_secs(49)));
        assert!(!token.is_fresh(now + Duration::from_secs(51)));
        let short = made(Duration::from_secs(5));
        assert!(short.is_fresh(now + Duration::from_secs(3)));
        assert!(!short.is_fresh(now + Duration::from_secs(4)));
    }

    #[tokio::test]
    async fn a_realm_is_https_or_beside_a_registry_that_is_not() {
        let named = "http://named.example:5001".parse().unwrap();
        let options = RegistryOptions { plain_http_redirects: vec![named], ..Default::default() };
        let transport = Transport::new(&options).unwrap();
        let made = |root: &str, configured: bool| RegistryEndpoint {
            root: root.parse().unwrap(),
            configured,
            ..RegistryEndpoint::of_registry("r.io", transport.default_connection()).unwrap()
        };
        let remote = made("https://r.io/v2/", true);
        let local = made("http://127.0.0.1:5000/v2/", false);
        let plain = made("http://r.io:5000/v2/", true);
        let is_asked = async |endpoint, text| realm(&transport, endpoint, text).await.is_ok();
        for (endpoint, text) in [
            (&remote, "https://auth.other/token"),
            (&local, "http://127.0.0.1:5001/token"),
            (&plain, "http://r.io:5000/token"),
            (&plain, "http://r.io/token"),
            (&plain, "http://R.io:5001/token"),
            (&plain, "http://named.example:5001/token"),
            (&plain, "https://auth.other/token"),
        ] {
            assert!(is_asked(endpoint, text).await, "{text}");
        }
        for (endpoint, text) in [
            (&remote, "http://r.io/token"),
            (&remote, "http://named.example:5001/token"),
            (&remote, "https://127.0.0.1/token"),
            (&remote, "https://me:word@auth.other/token"),
            (&remote, "/token"),
            (&local, "http://auth.other/token"),
            (&plain, "http://auth.other/token"),
            (&plain, "http://named.example/token"),
            (&plain, "http://r.io.evil.example/token"),
            (&plain, "http://r.io@evil.example/token"),
            (&plain, "http://127.0.0.1:5000/token"),
        ] {
            assert!(!is_asked(endpoint, text).await, "{text}");
        }
        // The scheme of a host that is not configured is a guess.
        let guessed = made("http://r.io:5000/v2/", false);
        assert!(!is_asked(&guessed, "http://r.io:5001/token").await);
    }

    #[test]
    fn equal_credentials_have_equal_hashes() {
        let tokens = TokenCache::new().unwrap();
        let basic = |username: &str, password: &str| {
            tokens.principal(&Credential::Basic {
                username: username.into(),
                password: password.into(),
            })
        };
        assert_eq!(basic("ab", "c"), basic("ab", "c"));
        assert_ne!(basic("ab", "c"), basic("a", "bc"));
        assert_ne!(basic("", ""), tokens.principal(&Credential::Anonymous));
    }
}
