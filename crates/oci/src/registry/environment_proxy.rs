//! Proxies of the environment, by the rules of clients written in Go: the container runtime of the
//! same node is configured with the same variables.
//!
//! `HTTP_PROXY` is for plain HTTP, `HTTPS_PROXY` for TLS; each also in lower case. `ALL_PROXY` is
//! the default of both, as in most clients except Go: it is never set for the driver alone by
//! accident. Empty variables count as unset. `NO_PROXY` is a comma-separated list of exceptions:
//!
//! ```text
//! corp.example          this host and all below it
//! .corp.example         all hosts below it, as is *.corp.example
//! 10.1.2.3, fd00::1     an address, if the reference is written with it
//! 10.0.0.0/8            a network, likewise
//! corp.example:5000     one port only, as are 10.1.2.3:5000 and [fd00::1]:5000
//! *                     everything
//! ```

use std::net::IpAddr;

use ipnet::IpNet;
use reqwest::Url;

/// Proxies of the environment, with their exceptions.
#[derive(Debug, Default)]
pub(super) struct EnvironmentProxies {
    pub(super) http: Option<Url>,
    pub(super) https: Option<Url>,
    exceptions: Vec<NoProxyEntry>,
}

/// An entry of `NO_PROXY`. An empty port matches all ports.
#[derive(Debug, PartialEq, Eq)]
enum NoProxyEntry {
    All,
    Network(IpNet),
    Address {
        address: IpAddr,
        port: String,
    },
    /// Hosts that end in a suffix, which starts with a dot.
    Domain {
        suffix: String,
        includes_itself: bool,
        port: String,
    },
}

impl EnvironmentProxies {
    /// Reads the environment of this process.
    ///
    /// # Errors
    ///
    /// The name of a variable with an unusable address. Its value may contain a password, and is
    /// not shown.
    pub(super) fn from_environment() -> Result<Self, String> {
        Self::read(|name| std::env::var(name).ok())
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let set = |name: &str| {
            let found = [name.to_owned(), name.to_lowercase()].into_iter().find_map(|name| {
                let value = variable(&name)?.trim().to_owned();
                (!value.is_empty()).then_some((name, value))
            })?;
            Some(found)
        };
        let proxy = |name: &str| {
            let found = set(name).or_else(|| set("ALL_PROXY"));
            found
                .map(|(name, value)| parse(&value).map_err(|reason| format!("{name} {reason}")))
                .transpose()
        };
        let exceptions = set("NO_PROXY").map_or_else(Vec::new, |(_, list)| exceptions(&list));
        Ok(Self { http: proxy("HTTP_PROXY")?, https: proxy("HTTPS_PROXY")?, exceptions })
    }

    /// Returns whether an address is reached through a proxy.
    pub(super) fn intercept(&self, url: &Url) -> bool {
        let proxy = match url.scheme() {
            "http" => &self.http,
            "https" => &self.https,
            _ => &None,
        };
        proxy.is_some() && !self.exceptions.iter().any(|exception| exception.matches(url))
    }
}

impl NoProxyEntry {
    fn parse(entry: &str) -> Option<Self> {
        let entry = entry.trim().to_ascii_lowercase();
        if entry == "*" {
            return Some(Self::All);
        }
        if let Some(network) = network(&entry) {
            return Some(Self::Network(network));
        }
        let (host, port) = split_port(&entry);
        if let Ok(address) = host.parse::<IpAddr>() {
            return Some(Self::Address { address: address.to_canonical(), port: port.to_owned() });
        }
        let host = host.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(host);
        let (name, includes_itself) = match host.strip_prefix('.') {
            Some(name) => (name, false),
            None => (host, true),
        };
        let suffix = format!(".{}", to_ascii(name));
        (!host.is_empty()).then(|| Self::Domain { suffix, includes_itself, port: port.to_owned() })
    }

    fn matches(&self, url: &Url) -> bool {
        let is_port = |wanted: &str| {
            wanted.is_empty()
                || url.port_or_known_default().is_some_and(|port| port.to_string() == wanted)
        };
        let address = super::address_rules::literal(url).map(|address| address.to_canonical());
        match self {
            Self::All => true,
            Self::Network(network) => address.is_some_and(|address| network.contains(&address)),
            Self::Address { address: excepted, port } => {
                address == Some(*excepted) && is_port(port)
            }
            Self::Domain { suffix, includes_itself, port } => {
                let host = url.host_str().unwrap_or_default();
                let is_itself = *includes_itself && host == &suffix[1..];
                let is_within = is_itself || host.ends_with(suffix.as_str());
                address.is_none() && is_within && is_port(port)
            }
        }
    }
}

/// Parses the address of a proxy; without a scheme, it is HTTP. SOCKS proxies always resolve names
/// themselves.
pub(super) fn parse(text: &str) -> Result<Url, &'static str> {
    const WRONG: &str = "is no proxy's address: write it as http://proxy:3128, https or socks5";
    let has_host = |url: &Url| url.host_str().is_some_and(|host| !host.is_empty());
    let parsed = Url::parse(text).ok().filter(has_host);
    let mut url = match parsed {
        Some(url) => url,
        None if text.contains("://") => return Err(WRONG),
        None => Url::parse(&format!("http://{text}")).ok().filter(has_host).ok_or(WRONG)?,
    };
    match url.scheme() {
        "http" | "https" | "socks5h" => Ok(url),
        "socks5" => url.set_scheme("socks5h").map(|()| url).map_err(|()| WRONG),
        _ => Err(WRONG),
    }
}

fn exceptions(list: &str) -> Vec<NoProxyEntry> {
    list.split(',').filter_map(NoProxyEntry::parse).collect()
}

/// Parses `address/length` like Go: numbers of IPv4 never start with a zero, and a network of
/// IPv4-mapped addresses is one of IPv4.
fn network(entry: &str) -> Option<IpNet> {
    let (address, length) = entry.split_once('/')?;
    let (address, length): (IpAddr, u8) = (address.parse().ok()?, length.parse().ok()?);
    let is_mapped = address.is_ipv6() && address.to_canonical().is_ipv4();
    match length.checked_sub(96) {
        Some(length) if is_mapped => IpNet::new(address.to_canonical(), length).ok(),
        _ => IpNet::new(address, length).ok(),
    }
}

/// Splits `host:port` and `[address]:port`. Other texts are hosts without a port.
fn split_port(entry: &str) -> (&str, &str) {
    if let Some((address, port)) = entry.strip_prefix('[').and_then(|rest| rest.split_once("]:")) {
        return (address, port);
    }
    match entry.split_once(':') {
        Some((host, port)) if !port.contains(':') => (host, port),
        _ => (entry, ""),
    }
}

/// Returns a name in punycode, as in URLs.
fn to_ascii(name: &str) -> String {
    let is_name = !name.is_ascii() && !name.contains(['/', '?', '#', '@', ':', '\\']);
    let parsed = is_name.then(|| Url::parse(&format!("http://{name}/")).ok()).flatten();
    let host = parsed.as_ref().and_then(Url::host_str);
    host.unwrap_or(name).to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn proxies(variables: &[(&str, &str)]) -> Result<EnvironmentProxies, String> {
        EnvironmentProxies::read(|name| {
            let found = variables.iter().find(|(variable, _)| *variable == name)?;
            Some(found.1.to_owned())
        })
    }

    fn is_excepted(list: &str, url: &str) -> bool {
        let variables = [("HTTPS_PROXY", "p:1"), ("HTTP_PROXY", "p:1"), ("NO_PROXY", list)];
        !proxies(&variables).unwrap().intercept(&url.parse().unwrap())
    }

    #[test]
    fn exceptions_are_read_as_by_go() {
        for (list, url, excepted) in [
            ("corp.example", "https://corp.example/", true),
            ("corp.example", "https://r.corp.example/", true),
            ("corp.example", "https://rcorp.example/", false),
            ("corp.example", "https://corp.example.evil/", false),
            (".corp.example", "https://r.corp.example/", true),
            (".corp.example", "https://corp.example/", false),
            ("*.corp.example", "https://a.r.corp.example/", true),
            ("*.corp.example", "https://corp.example/", false),
            ("*corp.example", "https://r.corp.example/", false),
            ("CORP.example", "https://R.Corp.Example/", true),
            ("a, ,corp.example ,b", "https://corp.example/", true),
            ("corp.example other.example", "https://corp.example/", false),
            ("corp.example:5000", "https://corp.example:5000/", true),
            ("corp.example:5000", "https://r.corp.example:5000/", true),
            ("corp.example:5000", "https://corp.example/", false),
            ("corp.example:443", "https://corp.example/", true),
            ("corp.example:80", "http://corp.example/", true),
            ("corp.example:https", "https://corp.example/", false),
            ("*.corp.example:5000", "http://r.corp.example:5000/", true),
            ("*.corp.example:5000", "http://r.corp.example:5001/", false),
            ("10.1.2.3", "https://10.1.2.3:5000/", true),
            ("10.1.2.3", "https://10.1.2.30/", false),
            ("10.1.2.3:5000", "https://10.1.2.3:5000/", true),
            ("10.1.2.3:5000", "https://10.1.2.3:5001/", false),
            ("10.0.0.0/8", "https://10.1.2.3:5000/", true),
            ("10.1.2.3/8", "https://10.9.9.9/", true),
            ("10.0.0.0/8", "https://11.1.2.3/", false),
            ("10.0.0.0/8", "https://10.example/", false),
            ("fd00::1", "https://[fd00::1]/", true),
            ("fd00::1", "https://[fd00::1]:5000/", true),
            ("[fd00::1]:5000", "https://[fd00::1]:5000/", true),
            ("[fd00::1]:5000", "https://[fd00::1]/", false),
            ("[FD00::1]:443", "https://[fd00:0::1]/", true),
            ("[fd00::1]", "https://[fd00::1]/", false),
            ("fd00::/8", "https://[fd12::1]/", true),
            ("10.1.2.3", "https://[::ffff:10.1.2.3]/", true),
            ("1.2.3", "https://10.1.2.3/", false),
            (".2.3", "https://10.1.2.3/", false),
            ("10.1.2.03/8", "https://10.1.2.3/", false),
            ("::ffff:10.0.0.0/104", "https://10.1.2.3/", true),
            ("::ffff:10.0.0.0/0", "https://[fd00::1]/", true),
            ("bücher.example/24", "https://bücher.example/", false),
            ("*", "https://anything/", true),
            ("a,*", "https://10.1.2.3/", true),
            ("bücher.example", "https://r.bücher.example/", true),
            ("", "https://r.io/", false),
            (".,:5000,*.,[]", "https://r.io:5000/", false),
        ] {
            assert_eq!(is_excepted(list, url), excepted, "NO_PROXY={list} for {url}");
        }
    }

    #[test]
    fn an_empty_variable_is_an_unset_one() {
        let found = |variables: &[(&str, &str)]| {
            let proxies = proxies(variables).unwrap();
            let text = |url: Option<Url>| url.map_or(String::new(), String::from);
            (text(proxies.http), text(proxies.https))
        };
        let both = |http: &str, https: &str| (http.to_owned(), https.to_owned());
        assert_eq!(found(&[("HTTPS_PROXY", ""), ("HTTP_PROXY", " ")]), both("", ""));
        assert_eq!(
            found(&[("HTTPS_PROXY", ""), ("https_proxy", "http://low:1")]),
            both("", "http://low:1/")
        );
        assert_eq!(
            found(&[("ALL_PROXY", "all:1"), ("HTTP_PROXY", "plain:2")]),
            both("http://plain:2/", "http://all:1/")
        );
        let list = [("HTTPS_PROXY", "p:1"), ("NO_PROXY", ""), ("no_proxy", "r.io")];
        assert!(!proxies(&list).unwrap().intercept(&"https://r.io".parse().unwrap()));
    }

    #[test]
    fn proxies_speak_http_or_socks() {
        for (text, url) in [
            ("proxy:3128", "http://proxy:3128/"),
            ("10.0.0.1:3128", "http://10.0.0.1:3128/"),
            ("user:word@proxy:3128", "http://user:word@proxy:3128/"),
            ("https://proxy", "https://proxy/"),
            ("socks5://proxy", "socks5h://proxy"),
            ("socks5h://user:word@proxy:1080", "socks5h://user:word@proxy:1080"),
        ] {
            assert_eq!(parse(text).map(String::from), Ok(url.to_owned()), "{text}");
        }
        for text in ["ftp://proxy", "socks4://proxy", "http://", "a b", "://"] {
            assert!(parse(text).is_err(), "{text}");
        }
        let error = proxies(&[("https_proxy", "ftp://user:hunter2@proxy")]).unwrap_err();
        assert!(error.starts_with("https_proxy ") && !error.contains("hunter2"), "{error}");
    }

    proptest! {
        #[test]
        fn a_name_excepts_itself_and_what_is_below(
            name in "[a-z]{1,8}(\\.[a-z]{1,8}){0,3}", below in "[a-z]{1,8}", port in 1u16..
        ) {
            let (own, lower) = (format!("https://{name}:{port}"), format!("https://{below}.{name}:{port}"));
            prop_assert!(is_excepted(&name, &own) && is_excepted(&name, &lower));
            let other = format!("https://{below}{name}:{port}");
            prop_assert!(!is_excepted(&name, &other));
            for list in [format!(".{name}"), format!("*.{name}")] {
                prop_assert!(!is_excepted(&list, &own) && is_excepted(&list, &lower));
                let with_port = format!("{list}:{port}");
                let other_port = format!("https://{below}.{name}:{}", port ^ 1);
                prop_assert!(is_excepted(&with_port, &lower));
                prop_assert!(!is_excepted(&with_port, &other_port));
            }
        }

        #[test]
        fn an_address_is_in_its_network(address: std::net::Ipv4Addr, length in 0u8..=32, other: std::net::Ipv4Addr) {
            let url = |address| format!("http://{address}/");
            let list = format!("{address}/{length}");
            prop_assert!(is_excepted(&list, &url(address)));
            let shift = 32 - u32::from(length);
            let is_same = u64::from(u32::from(address)) >> shift == u64::from(u32::from(other)) >> shift;
            prop_assert_eq!(is_excepted(&list, &url(other)), is_same);
        }

        #[test]
        fn nothing_makes_it_panic(list in "(?s).{0,60}", text in "(?s).{0,40}") {
            let _ = exceptions(&list);
            let _ = parse(&text);
        }
    }
}
