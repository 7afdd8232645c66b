//! Which addresses a pod's author, or a registry, may aim this node at.
//!
//! The driver runs in the node's network with rights that a pod does not have.
//! So a host that a pod's author named, and every host that a registry leads to,
//! must not be the node itself, its links' own network, or a cloud's metadata
//! service. It is looked at after resolution, by the resolver whose answer is
//! connected to: a name that changes its mind in between gains nothing.
//!
//! What the administrator configured is not asked about: hosts of `hosts.toml`,
//! proxies, and `registries.allowedAddresses`. A registry that is written as
//! loopback (`localhost:5000`) is a rule of its own, see [`Loopback`].

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use serde::Deserialize;

/// Metadata services outside the link-local range: AWS over IPv6, Alibaba, Azure, Oracle.
const METADATA: [&str; 4] = ["fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"];

/// What a reference that is written as loopback means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum Loopback {
    /// As for containerd: a registry on this machine, spoken to without TLS.
    #[default]
    Allow,
    /// Refused, unless a `hosts.toml` or `allowedAddresses` says otherwise.
    Refuse,
}

/// The rules of this node. Cheap to clone.
#[derive(Clone)]
pub struct AddressRules {
    /// References that are written as loopback.
    pub loopback: Loopback,
    /// Networks that are always allowed.
    pub allowed: Arc<[IpNet]>,
    /// The node's own addresses, asked for at every use: they change.
    pub own: fn() -> Vec<IpAddr>,
}

/// An address that is not connected to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{address} is {what}")]
pub(super) struct AddressRefused {
    pub(super) address: IpAddr,
    pub(super) what: &'static str,
}

impl fmt::Debug for AddressRules {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("AddressRules")
            .field("allowed", &self.allowed)
            .finish_non_exhaustive()
    }
}

impl Default for AddressRules {
    fn default() -> Self {
        Self { loopback: Loopback::Allow, allowed: Arc::new([]), own: Vec::new }
    }
}

impl AddressRules {
    /// Whether a registry may be asked that a pod's author wrote as loopback.
    pub(super) fn allows_loopback(&self, url: &Url) -> bool {
        let allowed = || match literal(url) {
            Some(address) => self.is_allowed(address),
            // "localhost", in whichever family it resolves.
            None => ["127.0.0.1", "::1"]
                .iter()
                .filter_map(|text| text.parse().ok())
                .any(|address| self.is_allowed(address)),
        };
        self.loopback == Loopback::Allow || allowed()
    }

    /// Checks an address that is written as a number; the resolver does the rest.
    pub(super) fn check_literal(&self, url: &Url) -> Result<(), AddressRefused> {
        literal(url).map_or(Ok(()), |address| self.check(address, &(self.own)()))
    }

    fn is_allowed(&self, address: IpAddr) -> bool {
        let address = meant(address);
        self.allowed.iter().any(|network| network.contains(&address))
    }

    fn check(&self, address: IpAddr, own: &[IpAddr]) -> Result<(), AddressRefused> {
        let address = meant(address);
        match class(address, own) {
            Some(what) if !self.is_allowed(address) => Err(AddressRefused { address, what }),
            _ => Ok(()),
        }
    }
}

/// The host of an address, where it is a number.
pub(super) fn literal(url: &Url) -> Option<IpAddr> {
    let host = url.host_str()?;
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// The address that is reached in the end: IPv6 has forms that carry one of IPv4, and a gateway of the
/// network (NAT64, 6to4) sends there what is sent to them.
fn meant(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    let of = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    };
    match v6.segments() {
        // ::1 and :: are addresses of IPv6 itself.
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => address,
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
            of(high, low)
        }
        [0x2002, high, low, ..] => of(high, low),
        _ => address,
    }
}

/// What makes an address one that strangers may not aim at.
fn class(address: IpAddr, own: &[IpAddr]) -> Option<&'static str> {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if address.is_loopback() {
        Some("the node's loopback")
    } else if address.is_unspecified() || own.contains(&address) {
        Some("the node itself")
    } else if link_local {
        Some("a link-local address")
    } else if METADATA.iter().any(|text| text.parse() == Ok(address)) {
        Some("a cloud's metadata service")
    } else if address.is_multicast() {
        Some("a multicast address")
    } else {
        None
    }
}

/// The system's resolver, with the rules behind it.
pub(super) struct GuardedResolver(pub(super) AddressRules);

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let rules = self.0.clone();
        Box::pin(async move {
            // Port 0 stands for the address's own.
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let found: Vec<SocketAddr> = found.collect();
            let own = (rules.own)();
            for address in &found {
                // One bad address among good ones is how a name is made to slip through.
                rules.check(address.ip(), &own)?;
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Vec<IpAddr> {
        vec!["10.1.2.3".parse().expect("an address")]
    }

    fn rules(allowed: &[&str]) -> AddressRules {
        let allowed = allowed.iter().map(|text| text.parse().expect("a network")).collect();
        AddressRules { loopback: Loopback::Allow, allowed, own }
    }

    fn refused(rules: &AddressRules, host: &str) -> bool {
        rules.check_literal(&format!("https://{host}/").parse().expect("an address")).is_err()
    }

    #[test]
    fn the_node_its_links_and_metadata_services_are_refused() {
        for host in [
            "127.0.0.1",
            "127.9.9.9",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "0.0.0.0",
            "[::]",
            "169.254.169.254",
            "0xa9fea9fe",
            "[fe80::1]",
            "10.1.2.3",
            "[::ffff:10.1.2.3]",
            "[fd00:ec2::254]",
            "100.100.100.200",
            "[64:ff9b::169.254.169.254]",
            "[::127.0.0.1]",
            "[2002:a9fe:a9fe::1]",
            "[2002:7f00:1::]",
            "224.0.0.1",
            "255.255.255.255",
        ] {
            assert!(refused(&rules(&[]), host), "{host}");
        }
        for host in [
            "10.1.2.4",
            "192.168.0.1",
            "8.8.8.8",
            "[2001:db8::1]",
            "[64:ff9b::8.8.8.8]",
            "r.io",
            "localhost",
        ] {
            assert!(!refused(&rules(&[]), host), "{host}");
        }
    }

    #[test]
    fn what_is_allowed_is_allowed() {
        let rules = rules(&["10.1.2.0/24", "127.0.0.0/8"]);
        assert!(!refused(&rules, "10.1.2.3") && !refused(&rules, "127.0.0.1"));
        assert!(refused(&rules, "169.254.0.1"));
    }

    #[test]
    fn loopback_can_be_refused_and_allowed_again() {
        let strict =
            |allowed: &[&str]| AddressRules { loopback: Loopback::Refuse, ..rules(allowed) };
        let url: Url = "http://localhost:5000/".parse().expect("an address");
        assert!(rules(&[]).allows_loopback(&url));
        assert!(!strict(&[]).allows_loopback(&url));
        assert!(strict(&["127.0.0.0/8"]).allows_loopback(&url));
    }

    #[tokio::test]
    async fn a_name_that_resolves_to_the_node_is_refused() {
        let resolver = GuardedResolver(rules(&[]));
        let error = resolver.resolve("localhost".parse().expect("a name")).await.err();
        let error = error.expect("refused");
        assert!(error.downcast_ref::<AddressRefused>().is_some(), "{error}");
        let resolver = GuardedResolver(rules(&["127.0.0.0/8", "::1/128"]));
        assert!(resolver.resolve("localhost".parse().expect("a name")).await.is_ok());
    }
}
