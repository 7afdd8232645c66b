//! Endpoints: hosts that serve a registry, the registry itself or a mirror.

use std::sync::Arc;

use reqwest::Url;
use reqwest::header::HeaderMap;

use super::address_rules::AddressRules;
use super::error::{self, RegistryError};
use super::http_clients::Connection;
use super::redirect_rules;
use crate::Repository;
use crate::reference::DOCKER_HUB;

/// Host of Docker Hub's registry, which differs from the name in references.
const DOCKER_HUB_HOST: &str = "registry-1.docker.io";

/// An endpoint with its capabilities and connections.
#[expect(
    clippy::struct_excessive_bools,
    reason = "four facts that have nothing to do with each other"
)]
#[derive(Clone)]
pub(super) struct RegistryEndpoint {
    /// Root of the API: `<scheme>://<host[:port]>/v2/`, or another path that ends in a slash.
    pub(super) root: Url,
    /// Name of the registry for the query parameter `ns`; `None` for the registry itself.
    pub(super) namespace: Option<String>,
    /// Capability `pull`: serves content by digest.
    pub(super) pull: bool,
    /// Capability `resolve`: serves tags.
    pub(super) resolve: bool,
    /// True if credentials of the registry may be sent to it.
    pub(super) takes_credentials: bool,
    /// True if the administrator named the host, which exempts it from the address rules.
    pub(super) configured: bool,
    /// Headers that are added to every request.
    pub(super) headers: HeaderMap,
    pub(super) connection: Connection,
}

impl RegistryEndpoint {
    /// Returns the endpoint of a registry without configuration: `https`, except on loopback, where
    /// registries of developers and of the node itself have no certificate. Port 443 means TLS
    /// there too.
    pub(super) fn of_registry(host: &str, connection: Connection) -> Result<Self, RegistryError> {
        Ok(Self {
            root: registry_root(host)?,
            namespace: None,
            pull: true,
            resolve: true,
            takes_credentials: true,
            configured: false,
            headers: HeaderMap::new(),
            connection,
        })
    }

    /// Checks the address rules as far as the URL alone allows.
    pub(super) fn check(&self, rules: &AddressRules) -> Result<(), RegistryError> {
        if self.configured {
            return Ok(());
        }
        let refused = |what: &str| RegistryError::Address {
            host: super::http_transport::authority(&self.root),
            what: error::reason(what),
        };
        if redirect_rules::is_loopback(&self.root) {
            let allowed = rules.allows_loopback(&self.root);
            return if allowed { Ok(()) } else { Err(refused("the node's loopback")) };
        }
        rules.check_literal(&self.root).map_err(|error| refused(&error.to_string()))
    }

    /// Returns whether a URL is on the host that the administrator named.
    pub(super) fn is_configured_host(&self, url: &Url) -> bool {
        self.configured && url.host() == self.root.host()
    }

    /// Returns whether a URL is on this host, and the administrator named it with `http://`.
    pub(super) fn allows_plain_http(&self, url: &Url) -> bool {
        self.root.scheme() == "http" && self.is_configured_host(url)
    }

    /// Returns whether this is the registry of the references, not a mirror.
    pub(super) fn is_registry(&self) -> bool {
        self.namespace.is_none()
    }

    /// Returns the root of the API, which identifies a mirror in records.
    pub(super) fn address(&self) -> Arc<str> {
        self.root.as_str().into()
    }

    /// Returns the name of the host as `host[:port]`.
    pub(super) fn name(&self) -> Arc<str> {
        super::http_transport::authority(&self.root).into()
    }

    /// Returns the URL of the API root, whose response carries the challenge.
    pub(super) fn api(&self) -> Url {
        self.at("")
    }

    /// Returns the URL of an object of a repository. `object` is `manifests/..`, `blobs/..` or
    /// `referrers/..` with a checked name.
    pub(super) fn object(&self, repository: &Repository, object: &str) -> Url {
        self.at(&format!("{}/{object}", repository.path()))
    }

    /// Returns the URL of a path below the root.
    pub(super) fn at(&self, path: &str) -> Url {
        let mut url = self.root.clone();
        url.set_path(&format!("{}{path}", self.root.path()));
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        url
    }
}

/// Returns other spellings of a registry's `host[:port]` that lead to the same place: lower case,
/// with or without the default port, normalised numbers, Docker Hub's own name.
pub fn other_spellings(host: &str) -> Vec<String> {
    let Ok(root) = registry_root(host) else { return Vec::new() };
    // `Url` drops the default port of the scheme.
    let plain = root.host_str().unwrap_or_default();
    let plain = if plain == DOCKER_HUB_HOST { DOCKER_HUB } else { plain };
    let spellings = match root.port() {
        Some(port) => vec![format!("{plain}:{port}")],
        None if root.scheme() == "http" => vec![plain.to_owned(), format!("{plain}:80")],
        None => vec![plain.to_owned(), format!("{plain}:443")],
    };
    spellings.into_iter().filter(|spelling| spelling != host).collect()
}

/// Returns the API root of a registry without configuration.
pub(super) fn registry_root(host: &str) -> Result<Url, RegistryError> {
    let host = if host == DOCKER_HUB { DOCKER_HUB_HOST } else { host };
    let unusable =
        || RegistryError::protocol(&error::host(host), "the registry", "its name is no host");
    let mut root = Url::parse(&format!("https://{host}/")).map_err(|_| unusable())?;
    // The name must be the whole authority: no part of it may become a user name or a path.
    if root.path() != "/" || root.query().is_some() || !root.username().is_empty() {
        return Err(unusable());
    }
    if redirect_rules::is_loopback(&root) && !host.ends_with(":443") {
        root = Url::parse(&format!("http://{host}/")).map_err(|_| unusable())?;
    }
    root.set_path("/v2/");
    Ok(root)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reference;

    fn address(reference: &str) -> String {
        let reference: Reference = reference.parse().unwrap();
        registry_root(reference.repository().host()).unwrap().to_string()
    }

    #[test]
    fn docker_hub_answers_elsewhere() {
        assert_eq!(address("busybox"), "https://registry-1.docker.io/v2/");
    }

    #[test]
    fn spellings_of_one_host_are_known() {
        for (host, others) in [
            ("r.io", &["r.io:443"][..]),
            ("R.io:0443", &["r.io", "r.io:443"]),
            ("r.io:5000", &[]),
            ("R.IO:05000", &["r.io:5000"]),
            ("docker.io", &["docker.io:443"]),
            ("registry-1.docker.io", &["docker.io", "docker.io:443"]),
            ("localhost", &["localhost:80"]),
            ("0x7f.1:5000", &["127.0.0.1:5000"]),
            ("no host", &[]),
        ] {
            assert_eq!(other_spellings(host), others, "{host}");
        }
    }

    #[test]
    fn only_loopback_is_spoken_to_without_tls() {
        for plain in ["localhost/a", "localhost:5000/a", "127.0.0.1:5000/a", "127.8.8.8:80/a"] {
            assert!(address(plain).starts_with("http://"), "{plain}");
        }
        for tls in [
            "r.io/a",
            "r.io:5000/a",
            "localhost:443/a",
            "127.0.0.1:443/a",
            "127.0.0.1.r.io/a",
            "localhost.r.io/a",
            "10.0.0.1:5000/a",
            "0.0.0.0:5000/a",
        ] {
            assert!(address(tls).starts_with("https://"), "{tls}");
        }
    }
}
