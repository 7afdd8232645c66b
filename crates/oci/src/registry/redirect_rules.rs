//! Rules for the addresses that a registry may redirect this node to.
//!
//! A redirect or the address of a token server is untrusted input, which could aim requests and
//! credentials at another host. The rules:
//!
//! - `https` anywhere but on this node itself; plain `http` from loopback to loopback, and where
//!   the administrator allows it, see [`plain_http`](super::plain_http). So no credential and no
//!   presigned URL crosses a network in plain text unintentionally, and the metadata services of
//!   clouds, which use `http`, are out of reach.
//! - Only a registry on loopback may lead to loopback.
//! - URLs with user names or passwords are refused.
//! - `Authorization` is sent to the scheme, host and port that it is for, and is dropped for good
//!   after the first redirect to another one. (A token server on another host gets the credential:
//!   Docker Hub works that way, and the registry that names it could have kept the credential
//!   anyway.)

use reqwest::Url;

/// Maximum number of redirects, as in docker clients.
pub(super) const MAXIMUM_HOPS: usize = 10;

/// Returns whether a URL is on loopback, the only place that needs no TLS.
pub(super) fn is_loopback(url: &Url) -> bool {
    // `Url` has already normalised spellings such as 127.1 or 0x7f000001.
    match url.host_str() {
        Some("localhost" | "[::1]") => true,
        Some(host) => host.parse::<std::net::Ipv4Addr>().is_ok_and(|address| address.is_loopback()),
        None => false,
    }
}

/// Checks that a response of `from` may lead to `to`. The error is the reason. `plain_http` is true
/// if the administrator allows `to` to be without TLS.
pub(super) fn check(from: &Url, to: &Url, plain_http: bool) -> Result<(), &'static str> {
    if !to.username().is_empty() || to.password().is_some() {
        return Err("an address with a user name in it");
    }
    // A host may redirect to itself.
    if to.origin().is_tuple() && to.origin() == from.origin() {
        return Ok(());
    }
    let (from_here, to_here) = (is_loopback(from), is_loopback(to) || is_this_node(to));
    match to.scheme() {
        "https" if to_here && !from_here => Err("an address on the node's own loopback"),
        "https" => Ok(()),
        "http" if is_loopback(to) && from_here && from.scheme() == "http" => Ok(()),
        "http" if to_here && plain_http => Err("an address on the node's own loopback"),
        "http" if plain_http => Ok(()),
        "http" => Err("an address without TLS"),
        _ => Err("an address that is not https"),
    }
}

/// Returns whether the kernel would connect to this node, in other spellings than loopback.
fn is_this_node(url: &Url) -> bool {
    let Some(host) = url.host_str() else { return false };
    let host = host.trim_end_matches('.');
    if host == "localhost" || host.ends_with(".localhost") {
        return true;
    }
    let address = host.trim_start_matches('[').trim_end_matches(']');
    address.parse::<std::net::IpAddr>().is_ok_and(|address| {
        let address = address.to_canonical();
        address.is_loopback() || address.is_unspecified()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(from: &str, to: &str) -> bool {
        check(&from.parse().unwrap(), &to.parse().unwrap(), false).is_ok()
    }

    fn allowed_plain(from: &str, to: &str) -> bool {
        check(&from.parse().unwrap(), &to.parse().unwrap(), true).is_ok()
    }

    #[test]
    fn plain_http_is_for_where_it_is_allowed_and_never_for_loopback() {
        for from in ["http://r.io/", "https://r.io/", "http://127.0.0.1:5000/"] {
            assert!(allowed_plain(from, "http://storage.example:9000/b"), "{from}");
            assert!(!allowed(from, "http://storage.example:9000/b"), "{from}");
        }
        for to in ["http://127.0.0.1/", "http://a.localhost/", "http://[::ffff:127.0.0.1]/"] {
            assert!(!allowed_plain("http://r.io/", to), "{to}");
        }
        assert!(!allowed_plain("http://r.io/", "http://user:word@storage.example/"));
        assert!(!allowed_plain("http://r.io/", "ftp://storage.example/"));
        assert!(allowed("http://a.localhost:5000/", "http://a.localhost:5000/token"));
        assert!(!allowed("http://a.localhost:5000/", "http://a.localhost:5001/token"));
    }

    #[test]
    fn a_registry_leads_to_https_only() {
        assert!(allowed("https://r.io/", "https://storage.example/b?sig=1"));
        assert!(allowed("https://r.io/", "https://r.io/other"));
        assert!(!allowed("https://r.io/", "http://r.io/"));
        assert!(!allowed("https://r.io/", "http://169.254.169.254/latest"));
        assert!(!allowed("https://r.io/", "ftp://r.io/"));
        assert!(!allowed("https://r.io/", "file:///etc/passwd"));
        assert!(!allowed("https://r.io/", "https://user:word@r.io/"));
    }

    #[test]
    fn only_loopback_leads_to_loopback() {
        assert!(allowed("http://127.0.0.1:5000/", "http://localhost:5001/"));
        assert!(allowed("http://[::1]:5000/", "http://127.1:5001/"));
        assert!(allowed("http://127.0.0.1:5000/", "https://r.io/"));
        assert!(!allowed("http://127.0.0.1:5000/", "http://r.io/"));
        assert!(!allowed("http://127.0.0.1:5000/", "http://127.0.0.1.r.io/"));
        for to in [
            "https://127.0.0.1/",
            "https://127.9.9.9/",
            "https://localhost/",
            "https://localhost./",
            "https://a.localhost/",
            "https://[::1]/",
            "https://[::ffff:127.0.0.1]/",
            "https://0.0.0.0/",
            "https://0x7f000001/",
            "http://127.0.0.1/",
        ] {
            assert!(!allowed("https://r.io/", to), "{to}");
        }
    }
}
