//! Connections to one host, or to all that nothing is configured for.
//!
//! ```text
//! guarded   to hosts that strangers named: addresses are checked after resolution
//! free      to hosts that the administrator named, and to registries written as loopback
//! proxied   through a proxy, which resolves by itself
//! ```
//!
//! All speak HTTP/1.1, so that parts of a blob have connections of their own, whose windows the
//! kernel sizes as the line needs.
//!
//! Each of them twice: a connection is driven by the threads that have opened it, and pods do not
//! wait for those of the [background](sys::background).

use std::sync::Arc;
use std::time::Duration;

use reqwest::{Client, Url};

use super::address::{AddressRules, GuardedResolver};
use super::lookup::Lookups;
use super::proxy::Proxies;
use sys::background::Background;

/// Cheap to clone; clones share connections.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    foreground: Clients,
    background: Clients,
    /// Whether the host has a proxy of its own.
    pub(super) has_own_proxy: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Clients {
    pub(super) guarded: Client,
    pub(super) free: Client,
    pub(super) proxied: Client,
}

/// How connections are made.
pub(super) struct ConnectionSettings<'a> {
    pub(super) tls: rustls::ClientConfig,
    pub(super) connect_timeout: Duration,
    /// For this host alone; else the environment's.
    pub(super) proxy: Option<&'a Url>,
    pub(super) proxies: &'a Proxies,
    pub(super) rules: &'a AddressRules,
    pub(super) lookups: &'a Lookups,
}

impl Connection {
    pub(super) fn new(settings: &ConnectionSettings<'_>) -> Result<Self, reqwest::Error> {
        Ok(Self {
            foreground: Clients::new(settings)?,
            background: Clients::new(settings)?,
            has_own_proxy: settings.proxy.is_some(),
        })
    }

    /// Those of the calling thread.
    pub(super) fn clients(&self) -> &Clients {
        if Background::is_here() { &self.background } else { &self.foreground }
    }
}

impl Clients {
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
        // `Proxies::intercept` has decided already: the library reads NO_PROXY in another way than Go.
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
