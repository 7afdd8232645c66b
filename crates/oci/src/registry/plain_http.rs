//! Plain HTTP: permissions of the administrator for addresses without TLS.
//!
//! Apart from loopback, see [`redirect`](super::redirect_rules), only these allow plain HTTP:
//!
//! - a registry or mirror that a `hosts.toml` names with `http://` may redirect to its own host;
//! - every registry may redirect to the addresses in `registries.plainHTTPRedirects`, and to a host
//!   whose own `hosts.toml` names it with `http://`.

use std::path::PathBuf;
use std::sync::Arc;

use reqwest::Url;

use super::hosts;
use super::registry_endpoint::RegistryEndpoint;

/// Permissions for plain HTTP. Cheap to clone.
#[derive(Clone)]
pub(super) struct PlainHttp {
    hosts_dirs: Arc<[PathBuf]>,
    redirects: Arc<[Url]>,
}

impl PlainHttp {
    pub(super) fn new(hosts_dirs: &[PathBuf], redirects: &[Url]) -> Self {
        Self { hosts_dirs: Arc::from(hosts_dirs), redirects: Arc::from(redirects) }
    }

    /// Returns whether a response of `endpoint` may lead to `url` without TLS.
    pub(super) async fn allows(&self, endpoint: &RegistryEndpoint, url: &Url) -> bool {
        url.scheme() == "http" && (endpoint.allows_plain_http(url) || self.names(url).await)
    }

    /// Returns whether the administrator has named the address itself.
    pub(super) async fn names(&self, url: &Url) -> bool {
        if self.redirects.iter().any(|redirect| redirect.origin() == url.origin()) {
            return true;
        }
        if self.hosts_dirs.is_empty() {
            return false;
        }
        let (hosts_dirs, url) = (Arc::clone(&self.hosts_dirs), url.clone());
        let named = move || hosts::name_plain_http(&hosts_dirs, &url);
        tokio::task::spawn_blocking(named).await.unwrap_or(false)
    }
}

/// Parses an address of `registries.plainHTTPRedirects`.
///
/// # Errors
///
/// A description of the correct form.
pub fn plain_http_address(text: &str) -> Result<Url, String> {
    let parsed = Url::parse(text).ok().filter(|url| {
        let is_origin = url.path() == "/" && url.query().is_none() && url.fragment().is_none();
        let has_user = !url.username().is_empty() || url.password().is_some();
        url.scheme() == "http" && url.host_str().is_some() && is_origin && !has_user
    });
    parsed.ok_or_else(|| "an address must be http://host[:port]".to_owned())
}
