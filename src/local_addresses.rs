//! The addresses of this node, from the kernel's list of interfaces.

use std::net::IpAddr;

/// Interfaces that hold addresses of the cluster's Services and not of the node: kube-proxy's in IPVS mode,
/// kube-router's, and that of the DNS cache on each node, which shares the address of the cluster's DNS.
const OF_SERVICES: [&str; 3] = ["kube-ipvs0", "kube-dummy-if", "nodelocaldns"];

/// Returns all addresses of all interfaces of this node. Empty if the kernel does not list them.
pub fn own() -> Vec<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return Vec::new() };
    interfaces
        .filter(|interface| is_of_node(&interface.interface_name))
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        })
        .collect()
}

/// Returns whether an interface's addresses are the node's. The kernel lists further addresses of an interface under
/// labels, `<interface>:<label>`.
fn is_of_node(interface: &str) -> bool {
    let name = interface.split(':').next().unwrap_or(interface);
    !OF_SERVICES.contains(&name)
}

#[cfg(test)]
mod tests {
    #[test]
    fn loopback_is_among_them() {
        assert!(super::own().iter().any(std::net::IpAddr::is_loopback));
    }

    #[test]
    fn interfaces_of_services_do_not_count() {
        for name in ["kube-ipvs0", "kube-dummy-if", "nodelocaldns", "kube-ipvs0:1"] {
            assert!(!super::is_of_node(name), "{name}");
        }
        for name in ["lo", "eth0", "eth0:vip", "kube-bridge", "kube-ipvs01", "cni0", "dummy0"] {
            assert!(super::is_of_node(name), "{name}");
        }
    }
}
