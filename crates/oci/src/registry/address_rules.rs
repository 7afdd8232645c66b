//! Rules for the addresses that the author of a pod, or a registry, may make this node connect to.
//!
//! The driver runs in the node's network with rights that a pod does not have. So a host that the
//! author of a pod chose, and every host that a registry leads to, must not be the node itself, a
//! link-local network or a cloud's metadata service. The resolver checks the addresses that are
//! then connected to, so that a DNS name that changes in between gains nothing.
//!
//! Hosts that the administrator configured are exempt: those of `hosts.toml`, proxies and
//! `registries.allowedAddresses`. Registries that are written as loopback (`localhost:5000`) have a
//! rule of their own, see [`Loopback`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use serde::Deserialize;

use super::dns_lookup::DnsLookups;

/// Metadata and credential services outside the link-local range, by cloud.
const METADATA: [&str; 10] = [
    // Akamai.
    "fd00:a9fe:a9fe::1",
    // Alibaba.
    "100.100.100.200",
    "fd00:100::100:200",
    // AWS: the metadata of instances, and the credentials of EKS pods.
    "fd00:ec2::254",
    "fd00:ec2::23",
    // Azure.
    "168.63.129.16",
    // Google.
    "fd20:ce::254",
    // Oracle.
    "192.0.0.192",
    "fd00:c1::a9fe:a9fe",
    // Scaleway.
    "fd00:42::42",
];

/// Rule for references that are written as loopback.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum Loopback {
    /// Connects to a registry on this machine without TLS, as containerd does.
    #[default]
    Allow,
    /// Refuses, unless a `hosts.toml` or `allowedAddresses` permits it.
    Refuse,
}

/// Address rules of this node. Cheap to clone.
#[derive(Clone)]
pub struct AddressRules {
    /// Rule for references that are written as loopback.
    pub loopback: Loopback,
    /// Networks that are always allowed.
    pub allowed: Arc<[IpNet]>,
    /// Returns the node's own addresses. Called at every use, since they change.
    pub own: fn() -> Vec<IpAddr>,
}

/// A refused address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{address} is {what}")]
pub(super) struct AddressRefused {
    pub(super) address: IpAddr,
    pub(super) what: &'static str,
}

impl Default for AddressRules {
    fn default() -> Self {
        Self { loopback: Loopback::Allow, allowed: Arc::new([]), own: Vec::new }
    }
}

impl AddressRules {
    /// Returns whether requests to a registry that a reference writes as loopback are allowed.
    pub(super) fn allows_loopback(&self, url: &Url) -> bool {
        let allowed = || match literal(url) {
            Some(address) => self.is_allowed(address),
            // "localhost", in whichever address family it resolves.
            None => ["127.0.0.1", "::1"]
                .iter()
                .filter_map(|text| text.parse().ok())
                .any(|address| self.is_allowed(address)),
        };
        self.loopback == Loopback::Allow || allowed()
    }

    /// Checks an address that is written as a number. The resolver checks all others.
    pub(super) fn check_literal(&self, url: &Url) -> Result<(), AddressRefused> {
        literal(url).map_or(Ok(()), |address| self.check(address, &(self.own)()))
    }

    fn is_allowed(&self, address: IpAddr) -> bool {
        self.allowed.iter().any(|network| network.contains(&address))
    }

    /// Checks an address, and every address embedded in it.
    fn check(&self, address: IpAddr, own: &[IpAddr]) -> Result<(), AddressRefused> {
        if self.is_allowed(address) {
            return Ok(());
        }
        for address in std::iter::once(address).chain(carried(address)) {
            match class(address, own) {
                Some(what) if !self.is_allowed(address) => {
                    return Err(AddressRefused { address, what });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Returns the host of a URL if it is an IP address.
pub(super) fn literal(url: &Url) -> Option<IpAddr> {
    let host = url.host_str()?;
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// Returns the IPv4 addresses that are embedded in an IPv6 address. The kernel, or a translator or
/// relay in the network, sends packets for the IPv6 address to them.
///
/// NAT64 prefixes in a network's own address space cannot be known.
fn carried(address: IpAddr) -> Vec<IpAddr> {
    let IpAddr::V6(v6) = address else { return Vec::new() };
    carried_by_v6(v6).into_iter().map(IpAddr::V4).collect()
}

fn carried_by_v6(address: Ipv6Addr) -> Vec<Ipv4Addr> {
    let octets = address.octets();
    let at = |places: [usize; 4]| Ipv4Addr::from(places.map(|place| octets[place]));
    let last = at([12, 13, 14, 15]);
    match address.segments() {
        // IPv4-compatible and IPv4-mapped (RFC 4291), IPv4-translated (RFC 2765), and NAT64 with the
        // well-known prefix (RFC 6052).
        [0, 0, 0, 0, 0, 0 | 0xffff, ..]
        | [0, 0, 0, 0, 0xffff, 0, ..]
        | [0x64, 0xff9b, 0, 0, 0, 0, ..] => vec![last],
        // NAT64 with a prefix for local use (RFC 8215), of 96, 64, 56 or 48 bits, which only the
        // network knows.
        [0x64, 0xff9b, 1, ..] => {
            let found = [last, at([9, 10, 11, 12]), at([7, 9, 10, 11]), at([6, 7, 9, 10])];
            // Other prefix lengths leave zeros at these positions.
            found.into_iter().filter(|found| !found.is_unspecified()).collect()
        }
        // 6to4 (RFC 3056).
        [0x2002, ..] => vec![at([2, 3, 4, 5])],
        // Teredo (RFC 4380): the server, and the client with inverted bits.
        [0x2001, 0, ..] => vec![at([4, 5, 6, 7]), Ipv4Addr::from(!u32::from(last))],
        // ISATAP (RFC 5214).
        [_, _, _, _, 0 | 0x200, 0x5efe, _, _] => Vec::from([last]),
        _ => Vec::new(),
    }
}

/// Returns the class of an address that untrusted hosts may not resolve to.
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

/// The system's resolver with the address rules.
pub(super) struct GuardedResolver {
    pub(super) rules: AddressRules,
    pub(super) lookups: DnsLookups,
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (rules, lookups) = (self.rules.clone(), self.lookups.clone());
        Box::pin(async move {
            let found = lookups.addresses(name.as_str()).await?;
            let own = (rules.own)();
            for address in found.iter() {
                // One refused address refuses the name: an attacker could add allowed ones.
                rules.check(address.ip(), &own)?;
            }
            let found = Vec::from(&*found);
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
            "[::ffff:0:169.254.169.254]",
            "[64:ff9b::10.1.2.3]",
            "[64:ff9b:1::169.254.169.254]",
            "[64:ff9b:1:abcd:ff:ff:127.0.0.1]",
            // The same with prefixes of 64, 56 and 48 bits, and a suffix.
            "[64:ff9b:1:abcd:a9:fea9:fe00:0]",
            "[64:ff9b:1:aba9:fe:a9fe:1234:5678]",
            "[64:ff9b:1:a9fe:a9:fe00::]",
            // Teredo's client, inverted, and its server.
            "[2001:0:808:808:0:ffff:5601:5601]",
            "[2001:0:a9fe:a9fe:0:ffff:f7f7:f7f7]",
            "[2001:db8::5efe:127.0.0.1]",
            "[2001:db8::200:5efe:10.1.2.3]",
            "[fd20:ce::254]",
            "[fd00:ec2::23]",
            "[fd00:42::42]",
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
            "[64:ff9b:1::8.8.8.8]",
            "[64:ff9b:1:abcd:8:808:800:0]",
            "[64:ff9b:1:ab08:8:808::]",
            "[64:ff9b:1:808:8:800::]",
            "[::ffff:0:8.8.8.8]",
            "[2001:0:808:808:0:ffff:f7f7:f7f7]",
            "[2001:db8::5efe:8.8.8.8]",
            "[fd20:ce::255]",
            "r.io",
            "localhost",
        ] {
            assert!(!refused(&rules(&[]), host), "{host}");
        }
    }

    #[test]
    fn configured_networks_are_allowed() {
        let rules = rules(&["10.1.2.0/24", "127.0.0.0/8"]);
        assert!(!refused(&rules, "10.1.2.3") && !refused(&rules, "127.0.0.1"));
        assert!(refused(&rules, "169.254.0.1"));
        assert!(!refused(&rules, "[::ffff:10.1.2.3]"));
        let rules = self::rules(&["64:ff9b:1::/48", "fd20:ce::254/128"]);
        assert!(!refused(&rules, "[64:ff9b:1::10.1.2.3]") && !refused(&rules, "[fd20:ce::254]"));
        assert!(refused(&rules, "10.1.2.3") && refused(&rules, "[64:ff9b::10.1.2.3]"));
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
        let resolver = |rules| GuardedResolver { rules, lookups: DnsLookups::default() };
        let guarded = resolver(rules(&[]));
        let error = guarded.resolve("localhost".parse().expect("a name")).await.err();
        let error = error.expect("refused");
        assert!(error.downcast_ref::<AddressRefused>().is_some(), "{error}");
        let allowing = resolver(rules(&["127.0.0.0/8", "::1/128"]));
        assert!(allowing.resolve("localhost".parse().expect("a name")).await.is_ok());
    }
}
