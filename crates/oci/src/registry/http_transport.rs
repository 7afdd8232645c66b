//! HTTP transport: connections, redirects and errors of one exchange.
//!
//! `oci-client`'s transport has neither redirect rules nor bounds. Loopback is never reached
//! through a proxy; other hosts follow the environment, see [`proxy`](super::environment_proxy).

use std::error::Error as _;
use std::fmt::Write as _;
use std::io::Read as _;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderValue,
    LOCATION, RETRY_AFTER,
};
use reqwest::{Client, Method, Response, StatusCode, Url};

use super::RegistryOptions;
use super::address_rules::{AddressRefused, AddressRules};
use super::dns_lookup::DnsLookups;
use super::environment_proxy::EnvironmentProxies;
use super::error::{self, RegistryError, ShownCredential};
use super::hosts::HostEntry;
use super::http_clients::{Connection, ConnectionSettings};
use super::plain_http::PlainHttp;
use super::redirect_rules;
use super::registry_endpoint::RegistryEndpoint;
use super::tls::{self, TlsMaterial, TrustedCertificates};
use text::printable::excerpt;

/// Hint for handshakes that fail for want of a common algorithm.
const SUPPORTED_KEYS: &str = "the driver supports RSA, P-256, P-384 and Ed25519 keys";
/// Maximum of `Retry-After`.
const MAXIMUM_RETRY_AFTER: Duration = Duration::from_hours(1);
/// Bodies up to this size are drained, so that the connection can be reused.
const DRAINED_BYTES: u64 = 16 * 1024;
/// Maximum time for draining: a new connection takes no longer.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Sends requests to registries and to their token servers.
pub(super) struct Transport {
    /// Clients for hosts without configuration.
    default: Connection,
    /// The system's certificate authorities.
    system: TrustedCertificates,
    connect_timeout: Duration,
    pub(super) rules: AddressRules,
    lookups: DnsLookups,
    pub(super) plain_http: PlainHttp,
    /// Proxies of the environment.
    proxies: EnvironmentProxies,
}

/// A request with its endpoint.
pub(super) struct HttpRequest<'a> {
    /// Endpoint of the request: its host has the configured connection, others are untrusted.
    pub(super) endpoint: &'a RegistryEndpoint,
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    /// Authorization, sent to the scheme, host and port of `url` only.
    pub(super) authorization: Option<&'a HeaderValue>,
    /// Form body; a request with one follows no redirects.
    pub(super) form: Option<String>,
    /// Description of the object for errors.
    pub(super) what: &'a str,
}

impl<'a> HttpRequest<'a> {
    /// Returns a GET request without headers.
    pub(super) fn get(endpoint: &'a RegistryEndpoint, url: Url, what: &'a str) -> Self {
        let (method, headers) = (Method::GET, HeaderMap::new());
        Self { endpoint, method, url, headers, authorization: None, form: None, what }
    }
}

/// Head of a response, whose body was not read yet.
#[derive(Debug)]
pub(super) struct HttpResponse {
    pub(super) response: Response,
    /// Host that responded.
    pub(super) host: String,
    /// True if a redirect led to another host.
    pub(super) redirected: bool,
    /// True if the request had a credential, or a token that was made from one.
    pub(super) with_credential: bool,
    /// True if the credential was not sent, since no supported challenge asks for one.
    pub(super) unchallenged: bool,
}

impl Transport {
    pub(super) fn new(options: &RegistryOptions) -> Result<Self, RegistryError> {
        let setup = |reason: String| RegistryError::Setup { reason: error::reason(&reason) };
        let system = TrustedCertificates::of_system(&options.extra_roots).map_err(setup)?;
        let tls = TlsMaterial::default().configuration(&system).map_err(setup)?;
        let (connect_timeout, rules) = (options.connect_timeout, options.addresses.clone());
        let proxies = EnvironmentProxies::from_environment().map_err(setup)?;
        let lookups = DnsLookups::default();
        let settings = ConnectionSettings {
            tls,
            connect_timeout,
            proxy: None,
            proxies: &proxies,
            rules: &rules,
            lookups: &lookups,
        };
        let default =
            Connection::new(&settings).map_err(|error| setup(root_cause(&error.without_url())))?;
        let plain_http = PlainHttp::new(&options.hosts_dirs, &options.plain_http_redirects);
        Ok(Self { default, system, connect_timeout, rules, lookups, plain_http, proxies })
    }

    /// Returns the clients for hosts without configuration.
    pub(super) fn default_connection(&self) -> Connection {
        self.default.clone()
    }

    /// Returns clients with the settings of a `hosts.toml`.
    pub(super) fn connection(
        &self,
        entry: &HostEntry,
        material: TlsMaterial,
    ) -> Result<Connection, String> {
        if !entry.has_tls() && entry.dial_timeout.is_none() && entry.proxy.is_none() {
            return Ok(self.default_connection());
        }
        let settings = ConnectionSettings {
            tls: material.configuration(&self.system)?,
            connect_timeout: entry.dial_timeout.unwrap_or(self.connect_timeout),
            proxy: entry.proxy.as_ref(),
            proxies: &self.proxies,
            rules: &self.rules,
            lookups: &self.lookups,
        };
        Connection::new(&settings).map_err(|error| root_cause(&error.without_url()))
    }

    /// Returns the client for an address, if the rules allow it.
    async fn client<'a>(
        &self,
        endpoint: &'a RegistryEndpoint,
        url: &Url,
    ) -> Result<&'a Client, AddressRefused> {
        let clients = endpoint.connection.clients();
        let is_endpoint = endpoint.configured && url.origin() == endpoint.root.origin();
        if is_endpoint && endpoint.connection.has_own_proxy {
            return Ok(&clients.proxied);
        }
        // `RegistryEndpoint::check` and `redirect_rules::check` have already decided about loopback.
        if redirect_rules::is_loopback(url) {
            return Ok(&clients.free);
        }
        let configured = endpoint.is_configured_host(url)
            || (url.scheme() == "http" && self.plain_http.names(url).await);
        if !configured {
            self.rules.check_literal(url)?;
        }
        Ok(match (self.proxies.intercept(url), configured) {
            (true, _) => &clients.proxied,
            (false, true) => &clients.free,
            (false, false) => &clients.guarded,
        })
    }

    /// Sends a request and follows redirects by the rules of [`redirect_rules`]. Returns any other status
    /// as a response. A request whose connection ends before the response is sent once more.
    pub(super) async fn send(
        &self,
        request: HttpRequest<'_>,
    ) -> Result<HttpResponse, RegistryError> {
        let HttpRequest { endpoint, method, mut url, mut headers, mut authorization, form, what } =
            request;
        let origin = url.origin();
        let mut redirected = false;
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        for _ in 0..=redirect_rules::MAXIMUM_HOPS {
            let host = authority(&url);
            let client = self.client(endpoint, &url).await.map_err(|error| {
                RegistryError::Address { host: host.clone(), what: error.to_string() }
            })?;
            let mut headers = headers.clone();
            if url.origin() == endpoint.root.origin() {
                headers.extend(endpoint.headers.clone());
            }
            if let Some(authorization) = authorization {
                headers.insert(AUTHORIZATION, authorization.clone());
            }
            let mut builder = client.request(method.clone(), url.clone()).headers(headers);
            if let Some(form) = &form {
                builder = builder
                    .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .body(form.clone());
            }
            let again = if form.is_none() { builder.try_clone() } else { None };
            let response = match (builder.send().await, again) {
                (Err(error), Some(again)) if is_lost(&error) => again.send().await,
                (result, _) => result,
            };
            let response = response.map_err(|error| failure(error, &host, what))?;
            if !response.status().is_redirection() || form.is_some() {
                let (with_credential, unchallenged) = (false, false);
                return Ok(HttpResponse {
                    response,
                    host,
                    redirected,
                    with_credential,
                    unchallenged,
                });
            }
            let next = self.next_hop(endpoint, &url, &response).await;
            let next = next.map_err(|reason| RegistryError::protocol(&host, what, reason))?;
            drain(response).await;
            if next.origin() != origin {
                // Dropped for good: a host that redirects back has chosen the request.
                authorization = None;
                redirected = true;
            }
            url = next;
        }
        let reason = format!("more than {} redirects", redirect_rules::MAXIMUM_HOPS);
        Err(RegistryError::protocol(&authority(&url), what, reason))
    }

    /// Returns the address of a redirect, if it may be followed.
    async fn next_hop(
        &self,
        endpoint: &RegistryEndpoint,
        from: &Url,
        response: &Response,
    ) -> Result<Url, &'static str> {
        if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
            return Err("a redirect of a kind that has no meaning here");
        }
        let location = response.headers().get(LOCATION).ok_or("a redirect to nowhere")?;
        let mut to =
            from.join(&ascii(location)).map_err(|_| "a redirect to an unreadable address")?;
        to.set_fragment(None);
        let plain_http = self.plain_http.allows(endpoint, &to).await;
        redirect_rules::check(from, &to, plain_http).map_err(|reason| match reason {
            "an address without TLS" => {
                "a redirect to an address without TLS, which neither a hosts.toml nor registries.plainHTTPRedirects names"
            }
            "an address on the node's own loopback" => "a redirect to the node's own loopback",
            _ => "a redirect to an address that is not followed",
        })?;
        Ok(to)
    }
}

impl HttpResponse {
    pub(super) fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub(super) fn protocol(&self, what: &str, reason: impl Into<String>) -> RegistryError {
        RegistryError::protocol(&self.host, what, reason)
    }

    /// Returns the error for a status other than success.
    pub(super) fn refusal(&self, what: &str, anonymous: bool) -> RegistryError {
        let (host, what) = (self.host.clone(), what.to_owned());
        let status = self.status().as_u16();
        let retry_after = retry_after(self.response.headers());
        let shown = match ShownCredential::of(anonymous) {
            ShownCredential::Credential if self.unchallenged => ShownCredential::Withheld,
            shown => shown,
        };
        match status {
            // Storage failed, not the registry, which may still serve other objects.
            400..=599 if self.redirected => {
                RegistryError::Storage { host, what, status, retry_after }
            }
            429 => RegistryError::RateLimited { host, what, retry_after },
            408 | 425 | 500..=599 => RegistryError::ServerError { host, what, status, retry_after },
            401 => RegistryError::Unauthorized { host, what, shown },
            403 => RegistryError::Forbidden { host, what, shown },
            402 | 412 | 423 | 451 => RegistryError::PolicyRefused { host, what, status },
            404 | 410 => RegistryError::NotFound { what },
            _ => self.protocol(&what, format!("the status {status}")),
        }
    }

    /// Returns whether the body has a `Content-Encoding`.
    pub(super) fn is_encoded(&self) -> bool {
        content_encodings(self.response.headers()).next().is_some()
    }

    /// Returns the value of `Content-Encoding` for messages, if it changes the body.
    pub(super) fn encoding(&self) -> Option<String> {
        let encodings: Vec<_> = content_encodings(self.response.headers()).collect();
        (!encodings.is_empty()).then(|| excerpt(&encodings.join(", "), 40))
    }

    /// Reads a JSON document of at most `limit` bytes, and decodes it if it is really compressed.
    /// The caller bounds the time.
    pub(super) async fn document(self, what: &str, limit: u64) -> Result<Bytes, RegistryError> {
        let encodings: Vec<_> = content_encodings(self.response.headers()).collect();
        let host = self.host.clone();
        let body = self.body(what, limit).await?;
        decode(body, &encodings, limit).map_err(|error| match error {
            DecodeError::TooLarge => RegistryError::TooLarge { what: what.to_owned(), limit },
            DecodeError::Unusable(reason) => RegistryError::protocol(&host, what, reason),
        })
    }

    async fn body(mut self, what: &str, limit: u64) -> Result<Bytes, RegistryError> {
        let too_large = || RegistryError::TooLarge { what: what.to_owned(), limit };
        if self.response.content_length().is_some_and(|length| length > limit) {
            return Err(too_large());
        }
        let mut body = Vec::new();
        loop {
            match self.response.chunk().await {
                Ok(None) => return Ok(body.into()),
                Ok(Some(chunk)) if (body.len() + chunk.len()) as u64 > limit => {
                    return Err(too_large());
                }
                Ok(Some(chunk)) => body.extend_from_slice(&chunk),
                Err(error) => return Err(failure(error, &self.host, what)),
            }
        }
    }

    /// Ends an exchange without using its body.
    pub(super) async fn discard(self) {
        drain(self.response).await;
    }
}

enum DecodeError {
    TooLarge,
    Unusable(&'static str),
}

/// Returns the content codings of a response in lower case, in the order of their application,
/// without those that change nothing: S3 keeps `aws-chunked` of an upload, whose chunks are gone.
fn content_encodings(headers: &HeaderMap) -> impl Iterator<Item = String> {
    let values = headers.get_all(CONTENT_ENCODING).iter();
    let words = values.flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
    words
        .map(|word| String::from_utf8_lossy(word.trim_ascii()).to_ascii_lowercase())
        .filter(|word| !matches!(word.as_str(), "" | "identity" | "aws-chunked"))
}

/// Decodes a JSON document. Storage often announces codings that it has not applied, so the bytes
/// decide: no JSON starts like gzip.
fn decode(body: Bytes, encodings: &[String], limit: u64) -> Result<Bytes, DecodeError> {
    const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
    let is_json = body.trim_ascii_start().first().is_some_and(|&first| b"{[".contains(&first));
    if encodings.is_empty() || is_json {
        return Ok(body);
    }
    let [encoding] = encodings else {
        return Err(DecodeError::Unusable("several Content-Encodings that were not asked for"));
    };
    if !matches!(encoding.as_str(), "gzip" | "x-gzip") || !body.starts_with(&GZIP_MAGIC) {
        return Err(DecodeError::Unusable("a Content-Encoding that was not asked for"));
    }
    let mut decoded = Vec::new();
    flate2::read::MultiGzDecoder::new(&body[..])
        .take(limit.saturating_add(1))
        .read_to_end(&mut decoded)
        .map_err(|_| DecodeError::Unusable("a gzip encoding that cannot be undone"))?;
    if decoded.len() as u64 > limit { Err(DecodeError::TooLarge) } else { Ok(decoded.into()) }
}

/// Returns `host[:port]`, the only part of a URL that may be shown.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{}:{port}", error::host(host)),
        None => error::host(host),
    }
}

/// Converts an error of reqwest.
pub(super) fn failure(error: reqwest::Error, host: &str, what: &str) -> RegistryError {
    let (host, what) = (host.to_owned(), what.to_owned());
    // The URL may be presigned.
    let error = error.without_url();
    if let Some(refused) = causes(&error).find_map(|cause| cause.downcast_ref::<AddressRefused>()) {
        return RegistryError::Address { host, what: refused.to_string() };
    }
    let reason = error::reason(&root_cause(&error));
    if let Some(tls) = causes(&error).find_map(|cause| cause.downcast_ref::<rustls::Error>()) {
        let reason = tls_reason(tls).unwrap_or(reason);
        return RegistryError::Tls { host, what, reason };
    }
    if error.is_timeout() {
        let reason = "no connection in time".to_owned();
        return RegistryError::Unreachable { host, what, reason };
    }
    RegistryError::Unreachable { host, what, reason }
}

/// Returns whether a connection ended before its response. Registries and load balancers close idle connections at any
/// time, so one that is reused may end just when the request is sent.
fn is_lost(error: &reqwest::Error) -> bool {
    error.is_request() && !error.is_connect() && !error.is_timeout()
}

/// Percent-encodes bytes of a header beyond ASCII: storage puts file names into its URLs unencoded.
fn ascii(address: &HeaderValue) -> String {
    address.as_bytes().iter().fold(String::new(), |mut text, &byte| {
        if byte.is_ascii() {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
        text
    })
}

async fn drain(mut response: Response) {
    if response.content_length().is_some_and(|length| length <= DRAINED_BYTES) {
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, async {
            while let Ok(Some(_)) = response.chunk().await {}
        })
        .await;
    }
}

/// Parses `Retry-After`: seconds or a date. `None` if the delay is zero: the default backoff
/// applies.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = if let Ok(seconds) = text.parse() {
        Duration::from_secs(seconds)
    } else {
        let date = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
        // A date in the past, or a wrong clock, gives no delay.
        date.duration_since(jiff::Timestamp::now()).try_into().unwrap_or_default()
    };
    (!wait.is_zero()).then(|| wait.min(MAXIMUM_RETRY_AFTER))
}

/// Iterates over the causes of an error, outermost first. `source` of `io::Error` skips its inner
/// error.
fn causes(error: &reqwest::Error) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(error.source(), |&error| {
        match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            Some(inner) => Some(inner as &(dyn std::error::Error + 'static)),
            None => error.source(),
        }
    })
}

/// Explains TLS errors whose own text does not suggest a change.
fn tls_reason(error: &rustls::Error) -> Option<String> {
    use rustls::CertificateError::{
        NotValidYet, NotValidYetContext, UnsupportedSignatureAlgorithmContext,
        UnsupportedSignatureAlgorithmForPublicKeyContext,
    };
    let invalid = match error {
        rustls::Error::InvalidCertificate(invalid) => invalid,
        // A server whose key no offered algorithm fits ends the handshake.
        rustls::Error::AlertReceived(rustls::AlertDescription::HandshakeFailure)
        | rustls::Error::PeerIncompatible(rustls::PeerIncompatible::NoSignatureSchemesInCommon) => {
            return Some(format!("{}; {SUPPORTED_KEYS}", error::reason(&error.to_string())));
        }
        _ => return None,
    };
    match invalid {
        UnsupportedSignatureAlgorithmContext { .. }
        | UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            Some(format!("a certificate's signature cannot be checked; {SUPPORTED_KEYS}"))
        }
        NotValidYet | NotValidYetContext { .. } => {
            let now = jiff::Timestamp::now();
            Some(format!(
                "its certificate is not valid yet by this node's clock, which says {now:.0}: check the clock"
            ))
        }
        invalid if tls::is_of_authority(invalid) => Some(
            "its certificate is an authority's (CA:TRUE): name exactly this one as ca in hosts.toml, or issue one without CA:TRUE".to_owned(),
        ),
        _ => None,
    }
}

fn root_cause(error: &reqwest::Error) -> String {
    causes(error).last().map_or_else(|| error.to_string(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn decoded(body: &[u8], header: &str, limit: u64) -> Option<Vec<u8>> {
        let value = HeaderValue::from_str(header).unwrap();
        let encodings: Vec<_> =
            content_encodings(&HeaderMap::from_iter([(CONTENT_ENCODING, value)])).collect();
        decode(Bytes::copy_from_slice(body), &encodings, limit).ok().map(|body| body.to_vec())
    }

    #[test]
    fn a_document_is_decoded_only_where_it_is_encoded() {
        const PLAIN: &[u8] = b" {\"schemaVersion\": 2}";
        let encoded = gzip(PLAIN);
        for header in ["gzip", "x-gzip", "GZIP", "aws-chunked,gzip", "gzip, identity", " gzip ,"] {
            assert_eq!(decoded(&encoded, header, 100).as_deref(), Some(PLAIN), "{header}");
            assert_eq!(decoded(PLAIN, header, 100).as_deref(), Some(PLAIN), "{header}");
        }
        for header in ["", "identity", "aws-chunked", "br", "zstd", "deflate", "gzip, gzip"] {
            assert_eq!(decoded(PLAIN, header, 100).as_deref(), Some(PLAIN), "{header}");
        }
        for (body, header) in [
            (&encoded[..], "br"),
            (&encoded, "gzip, gzip"),
            (&encoded[..encoded.len() - 9], "gzip"),
            (b"\x1f\x8b", "gzip"),
            (b"nonsense", "gzip"),
        ] {
            assert_eq!(decoded(body, header, 100), None, "{header}");
        }
        let limit = PLAIN.len() as u64;
        assert_eq!(decoded(&encoded, "gzip", limit).as_deref(), Some(PLAIN));
        assert_eq!(decoded(&encoded, "gzip", limit - 1), None);
        assert_eq!(decoded(&gzip(&vec![b' '; 10 << 20]), "gzip", 1 << 20), None);
    }

    #[test]
    fn an_unsupported_key_of_a_server_is_named() {
        use rustls::{AlertDescription, Error, PeerIncompatible};
        for error in [
            Error::AlertReceived(AlertDescription::HandshakeFailure),
            Error::PeerIncompatible(PeerIncompatible::NoSignatureSchemesInCommon),
        ] {
            let reason = tls_reason(&error).unwrap_or_default();
            assert!(reason.contains("RSA, P-256, P-384 and Ed25519"), "{reason}");
        }
        let other = tls_reason(&Error::AlertReceived(AlertDescription::UnrecognisedName));
        assert_eq!(other, None);
    }

    #[test]
    fn addresses_may_have_bytes_beyond_ascii() {
        let of = |bytes: &[u8]| ascii(&HeaderValue::from_bytes(bytes).unwrap());
        assert_eq!(of("/b/Größe?x=é".as_bytes()), "/b/Gr%C3%B6%C3%9Fe?x=%C3%A9");
        assert_eq!(of(b"/b/\xe9%20a"), "/b/%E9%20a");
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let of = |text: &'static str| {
            retry_after(&HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static(text))]))
        };
        assert_eq!(of("7"), Some(Duration::from_secs(7)));
        assert_eq!(of("99999999999"), Some(MAXIMUM_RETRY_AFTER));
        assert_eq!(of("0"), None);
        assert_eq!(of("Wed, 21 Oct 2015 07:28:00 GMT"), None);
        assert_eq!(of("Tue, 31 Dec 2999 23:59:59 GMT"), Some(MAXIMUM_RETRY_AFTER));
        assert_eq!(of("soon"), None);
    }
}
