//! HTTP clients of one host, or of all hosts without a configuration.
//!
//! ```text
//! guarded   for untrusted hosts: addresses are checked after resolution
//! free      for hosts that the administrator named, and for registries written as loopback
//! proxied   through a proxy, which resolves names itself
//! ```
//!
//! All use HTTP/1.1, so that each part of a blob has a connection of its own, whose TCP window the
//! kernel adapts to the line.
//!
//! Each of them exists twice: the threads that opened a connection drive it, and requests of pods
//! must not wait for [background](sys::background) threads.

use std::sync::Arc;
use std::time::Duration;

use reqwest::{Client, Url};

use super::address_rules::{AddressRules, GuardedResolver};
use super::dns_lookup::DnsLookups;
use super::environment_proxy::EnvironmentProxies;
use sys::background::Background;

/// Clients of one host. Cheap to clone; clones share connections.
#[derive(Clone)]
pub(super) struct Connection {
    foreground: HttpClients,
    background: HttpClients,
    /// True if a proxy is configured for this host.
    pub(super) has_own_proxy: bool,
}

#[derive(Clone)]
pub(super) struct HttpClients {
    pub(super) guarded: Client,
    pub(super) free: Client,
    pub(super) proxied: Client,
}

/// Settings for new connections.
pub(super) struct ConnectionSettings<'a> {
    pub(super) tls: rustls::ClientConfig,
    pub(super) connect_timeout: Duration,
    /// Proxy for this host only; `None` for those of the environment.
    pub(super) proxy: Option<&'a Url>,
    pub(super) proxies: &'a EnvironmentProxies,
    pub(super) rules: &'a AddressRules,
    pub(super) lookups: &'a DnsLookups,
}

impl Connection {
    pub(super) fn new(settings: &ConnectionSettings<'_>) -> Result<Self, reqwest::Error> {
        Ok(Self {
            foreground: HttpClients::new(settings)?,
            background: HttpClients::new(settings)?,
            has_own_proxy: settings.proxy.is_some(),
        })
    }

    /// Returns the clients for the calling thread.
    pub(super) fn clients(&self) -> &HttpClients {
        if Background::is_here() { &self.background } else { &self.foreground }
    }
}

impl HttpClients {
    fn new(settings: &ConnectionSettings<'_>) -> Result<Self, reqwest::Error> {
        let builder = || {
            Client::builder()
                .tls_backend_preconfigured(settings.tls.clone())
                .http1_only()
                .user_agent(concat!("csi-driver-oci/", env!("CARGO_PKG_VERSION")))
                .redirect(reqwest::redirect::Policy::none())
                .referer(false)
                .connect_timeout(settings.connect_timeout)
                .pool_idle_timeout(Duration::from_mins(1))
                .pool_max_idle_per_host(8)
                .tcp_keepalive(Duration::from_secs(30))
        };
        let resolver = Arc::new(GuardedResolver {
            rules: settings.rules.clone(),
            lookups: settings.lookups.clone(),
        });
        // `EnvironmentProxies::intercept` decides before, since reqwest reads NO_PROXY differently from Go.
        let mut proxied = builder().no_proxy();
        if let Some(proxy) = settings.proxy {
            proxied = proxied.proxy(reqwest::Proxy::all(proxy.as_str())?);
        } else {
            if let Some(proxy) = &settings.proxies.http {
                proxied = proxied.proxy(reqwest::Proxy::http(proxy.as_str())?);
            }
            if let Some(proxy) = &settings.proxies.https {
                proxied = proxied.proxy(reqwest::Proxy::https(proxy.as_str())?);
            }
        }
        Ok(Self {
            guarded: builder().no_proxy().dns_resolver(resolver).build()?,
            free: builder().no_proxy().build()?,
            proxied: proxied.build()?,
        })
    }
}
