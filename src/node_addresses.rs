//! The addresses of this node, as the kernel knows them.

use std::net::IpAddr;

/// Where kube-proxy in IPVS mode puts the addresses of all Services: they are the cluster's.
const OF_SERVICES: &str = "kube-ipvs0";

/// All addresses of all interfaces; empty when the kernel does not say.
#[must_use]
pub fn own() -> Vec<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return Vec::new() };
    interfaces
        .filter(|interface| interface.interface_name != OF_SERVICES)
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn loopback_is_among_them() {
        assert!(super::own().iter().any(std::net::IpAddr::is_loopback));
    }
}
