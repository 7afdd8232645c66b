//! One exchange over HTTP: connections, redirects, and what can go wrong on the way.
//!
//! A transport of our own, as `oci-client`'s has neither redirect rules nor
//! bounds. Loopback is never reached through a proxy; everything else follows
//! `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY`.

use std::error::Error as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderValue,
    LOCATION, RETRY_AFTER,
};
use reqwest::{Client, Method, Response, StatusCode, Url};

use super::RegistryOptions;
use super::error::{self, RegistryError};
use super::redirect;

/// A server that asks for more patience gets asked again after this anyway.
const MAXIMUM_RETRY_AFTER: Duration = Duration::from_hours(1);
/// A body up to this size is read to its end so that its connection can be used again.
const DRAINED_BYTES: u64 = 16 * 1024;
/// Not worth more waiting than a new connection takes.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// Buffered for one blob at most while its reader is busy.
const STREAM_WINDOW: u32 = 1024 * 1024;
/// Enough streams may stand still before they hold up the others on one connection.
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;

/// Sends requests. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Transport {
    direct: Client,
    proxied: Client,
}

/// A request and whom it is for.
pub(super) struct Request<'a> {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    /// Sent to `url`'s own scheme, host and port only.
    pub(super) authorization: Option<&'a HeaderValue>,
    /// A form; a request with one follows no redirects.
    pub(super) form: Option<String>,
    /// Names the thing in errors.
    pub(super) what: &'a str,
}

/// The head of an answer; its body is still to come.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response,
    /// Who answered.
    pub(super) host: String,
    /// Whether another host than the one that was asked had a part in it.
    pub(super) redirected: bool,
}

impl Transport {
    pub(super) fn new(options: &RegistryOptions) -> Result<Self, RegistryError> {
        let tls = tls_configuration(options)?;
        let build = |proxied: bool| {
            let mut builder = Client::builder()
                .tls_backend_preconfigured(tls.clone())
                .user_agent(concat!("csi-driver-oci/", env!("CARGO_PKG_VERSION")))
                .redirect(reqwest::redirect::Policy::none())
                .referer(false)
                .connect_timeout(options.connect_timeout)
                .pool_idle_timeout(Duration::from_mins(1))
                .pool_max_idle_per_host(8)
                .tcp_keepalive(Duration::from_secs(30))
                .http2_initial_stream_window_size(STREAM_WINDOW)
                .http2_initial_connection_window_size(CONNECTION_WINDOW);
            if !proxied {
                builder = builder.no_proxy();
            }
            builder.build().map_err(|error| RegistryError::Setup {
                reason: error::reason(&root_cause(&error.without_url())),
            })
        };
        Ok(Self { direct: build(false)?, proxied: build(true)? })
    }

    /// Sends a request and follows redirects by the rules of [`redirect`]. Any
    /// other status is an answer.
    pub(super) async fn send(&self, request: Request<'_>) -> Result<Answer, RegistryError> {
        let Request { method, mut url, mut headers, mut authorization, form, what } = request;
        let origin = url.origin();
        let mut redirected = false;
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        for _ in 0..=redirect::MAXIMUM_HOPS {
            let client = if redirect::is_loopback(&url) { &self.direct } else { &self.proxied };
            let mut builder = client.request(method.clone(), url.clone()).headers(headers.clone());
            if let Some(authorization) = authorization {
                builder = builder.header(AUTHORIZATION, authorization);
            }
            if let Some(form) = &form {
                builder = builder
                    .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .body(form.clone());
            }
            let host = authority(&url);
            let response = builder.send().await.map_err(|error| failure(error, &host, what))?;
            if !response.status().is_redirection() || form.is_some() {
                return Ok(Answer { response, host, redirected });
            }
            let next = next_hop(&url, &response).map_err(|reason| RegistryError::Protocol {
                host: host.clone(),
                what: what.to_owned(),
                reason: reason.to_owned(),
            })?;
            drain(response).await;
            if next.origin() != origin {
                // For good: whoever sends us back has chosen what would be asked for.
                authorization = None;
                redirected = true;
            }
            url = next;
        }
        Err(RegistryError::Protocol {
            host: authority(&url),
            what: what.to_owned(),
            reason: format!("more than {} redirects", redirect::MAXIMUM_HOPS),
        })
    }
}

impl Answer {
    pub(super) fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub(super) fn protocol(&self, what: &str, reason: impl Into<String>) -> RegistryError {
        RegistryError::Protocol {
            host: self.host.clone(),
            what: what.to_owned(),
            reason: reason.into(),
        }
    }

    /// What a status that is not the wanted one means.
    pub(super) fn refusal(&self, what: &str, anonymous: bool) -> RegistryError {
        let (host, what) = (self.host.clone(), what.to_owned());
        let status = self.status().as_u16();
        match status {
            429 => RegistryError::RateLimited {
                host,
                what,
                retry_after: retry_after(self.response.headers()),
            },
            408 | 425 | 500..=599 => RegistryError::ServerError { host, what, status },
            400..=499 if self.redirected => RegistryError::Storage { host, what, status },
            401 => RegistryError::Unauthorized { host, what, anonymous },
            403 => RegistryError::Forbidden { host, what, anonymous },
            404 | 410 => RegistryError::NotFound { what },
            _ => self.protocol(&what, format!("the status {status}")),
        }
    }

    /// Refuses a body that would have to be decoded before its digest means anything.
    pub(super) fn check_encoding(&self, what: &str) -> Result<(), RegistryError> {
        let encoded = self
            .response
            .headers()
            .get_all(CONTENT_ENCODING)
            .iter()
            .any(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"identity"));
        if encoded {
            return Err(self.protocol(what, "a Content-Encoding that was not asked for"));
        }
        Ok(())
    }

    /// Reads the whole body, `limit` bytes at most. The caller bounds the time.
    pub(super) async fn body(mut self, what: &str, limit: u64) -> Result<Bytes, RegistryError> {
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

    /// Ends an exchange whose body says nothing of use.
    pub(super) async fn discard(self) {
        drain(self.response).await;
    }
}

/// `host[:port]` of an address: all of it that may be shown.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{}:{port}", error::host(host)),
        None => error::host(host),
    }
}

/// What an error of the HTTP library means.
pub(super) fn failure(error: reqwest::Error, host: &str, what: &str) -> RegistryError {
    let (host, what) = (host.to_owned(), what.to_owned());
    // The address may be presigned.
    let error = error.without_url();
    let reason = error::reason(&root_cause(&error));
    if is_tls(&error) {
        return RegistryError::Tls { host, what, reason };
    }
    if error.is_timeout() {
        let reason = "no connection in time".to_owned();
        return RegistryError::Unreachable { host, what, reason };
    }
    RegistryError::Unreachable { host, what, reason }
}

fn next_hop(from: &Url, response: &Response) -> Result<Url, &'static str> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Err("a redirect of a kind that has no meaning here");
    }
    let location = response.headers().get(LOCATION).ok_or("a redirect to nowhere")?;
    let location = location.to_str().map_err(|_| "a redirect to an unreadable address")?;
    let mut to = from.join(location).map_err(|_| "a redirect to an unreadable address")?;
    to.set_fragment(None);
    redirect::check(from, &to).map_err(|reason| match reason {
        "an address without TLS" => "a redirect to an address without TLS",
        "an address on the node's own loopback" => "a redirect to the node's own loopback",
        _ => "a redirect to an address that is not followed",
    })?;
    Ok(to)
}

async fn drain(mut response: Response) {
    if response.content_length().is_some_and(|length| length <= DRAINED_BYTES) {
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, async {
            while let Ok(Some(_)) = response.chunk().await {}
        })
        .await;
    }
}

/// `Retry-After`: seconds or a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = if let Ok(seconds) = text.parse() {
        Duration::from_secs(seconds)
    } else {
        let date = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
        // A date that has passed, or a clock that is wrong, means now.
        date.duration_since(jiff::Timestamp::now()).try_into().unwrap_or_default()
    };
    Some(wait.min(MAXIMUM_RETRY_AFTER))
}

fn tls_configuration(options: &RegistryOptions) -> Result<rustls::ClientConfig, RegistryError> {
    let setup = |reason: String| RegistryError::Setup { reason };
    let mut roots = rustls::RootCertStore::empty();
    // Reads SSL_CERT_FILE and SSL_CERT_DIR too. A node without roots still speaks
    // to registries on loopback and to those whose authority is configured.
    let native = rustls_native_certs::load_native_certs();
    for error in &native.errors {
        tracing::warn!(%error, "some of the system's certificate authorities cannot be read");
    }
    let (usable, _) = roots.add_parsable_certificates(native.certs);
    if usable == 0 && options.extra_roots.is_empty() {
        tracing::warn!("no certificate authorities found: no registry's certificate is trusted");
    }
    for root in &options.extra_roots {
        roots.add(root.clone()).map_err(|error| {
            setup(format!(
                "a certificate authority is unusable: {}",
                error::reason(&error.to_string())
            ))
        })?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| setup(error::reason(&error.to_string())))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(tls)
}

/// All errors below one, outermost first. `io::Error` hides what it carries from `source`.
fn causes(error: &reqwest::Error) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(error.source(), |&error| {
        match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            Some(inner) => Some(inner as &(dyn std::error::Error + 'static)),
            None => error.source(),
        }
    })
}

fn is_tls(error: &reqwest::Error) -> bool {
    causes(error).any(<dyn std::error::Error>::is::<rustls::Error>)
}

fn root_cause(error: &reqwest::Error) -> String {
    causes(error).last().map_or_else(|| error.to_string(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let of = |text: &'static str| {
            retry_after(&HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static(text))]))
        };
        assert_eq!(of("7"), Some(Duration::from_secs(7)));
        assert_eq!(of("99999999999"), Some(MAXIMUM_RETRY_AFTER));
        assert_eq!(of("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        assert_eq!(of("Tue, 31 Dec 2999 23:59:59 GMT"), Some(MAXIMUM_RETRY_AFTER));
        assert_eq!(of("soon"), None);
    }
}
