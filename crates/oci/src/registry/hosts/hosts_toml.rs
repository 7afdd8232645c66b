//! The text of a `hosts.toml`, by containerd's rules (`core/remotes/docker/config/hosts.go`).
//!
//! Hosts keep the order of the file. The keys at the root configure `server`, which comes last. As
//! in containerd, unknown keys and capabilities are ignored; they are returned for a log message.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use toml::{Table, Value};

use crate::registry::environment_proxy;
use text::duration::GoDuration;
use text::printable::excerpt;

/// Maximum number of hosts: each costs a request before the last one is tried.
const MAXIMUM_HOSTS: usize = 64;

/// A parsed `hosts.toml`.
#[derive(Clone, Debug, PartialEq)]
pub struct HostsFile {
    /// Mirrors in order, then the server.
    pub hosts: Vec<HostEntry>,
    /// Unknown keys and capabilities, which are ignored.
    pub unknown: Vec<String>,
}

/// One host with its settings.
#[derive(Clone, Debug, PartialEq)]
pub struct HostEntry {
    /// Root of the API; `None` for the registry itself: a root table without `server`.
    pub root: Option<Url>,
    /// Capability `pull`: serves content by digest.
    pub pull: bool,
    /// Capability `resolve`: serves tags.
    pub resolve: bool,
    /// Files of certificate authorities.
    pub ca: Vec<PathBuf>,
    /// Files of a certificate and of its key. Without the second, the first has both.
    pub client: Vec<(PathBuf, Option<PathBuf>)>,
    /// True if certificates are not verified; `None` if the file does not say.
    pub skip_verify: Option<bool>,
    /// Headers of every request.
    pub headers: HeaderMap,
    /// Connection timeout of the host.
    pub dial_timeout: Option<Duration>,
    /// Proxy for this host only.
    pub proxy: Option<Url>,
}

impl HostsFile {
    /// Parses a file in `folder`, the base of its relative paths.
    ///
    /// # Errors
    ///
    /// One line with the defect and its place.
    pub fn parse(text: &str, folder: &Path) -> Result<Self, String> {
        let root: Table = toml::from_str(text).map_err(|error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            format!("line {line}: {}", error.message().lines().next().unwrap_or_default())
        })?;
        let mut unknown = Vec::new();
        let mut hosts = Vec::new();
        let tables = match root.get("host") {
            None => Vec::new(),
            Some(Value::Table(tables)) => tables.iter().collect(),
            Some(_) => return Err("\"host\" is no table: write [host.\"https://...\"]".to_owned()),
        };
        if tables.len() > MAXIMUM_HOSTS {
            return Err(format!("it names more than {MAXIMUM_HOSTS} hosts"));
        }
        for (address, table) in tables {
            let place = format!("host.\"{}\"", excerpt(address, 80));
            let Value::Table(table) = table else { return Err(format!("{place} is no table")) };
            hosts.push(entry(Some(address), table, folder, &place, &mut unknown)?);
        }
        let server = match root.get("server") {
            None => None,
            Some(Value::String(server)) if server.is_empty() => None,
            Some(Value::String(server)) => Some(server.as_str()),
            Some(_) => return Err("\"server\" is no text".to_owned()),
        };
        hosts.push(entry(server, &root, folder, "the root", &mut unknown)?);
        Ok(Self { hosts, unknown })
    }
}

fn entry(
    address: Option<&str>,
    table: &Table,
    folder: &Path,
    place: &str,
    unknown: &mut Vec<String>,
) -> Result<HostEntry, String> {
    let wrong = |key: &str, wanted: &str| format!("\"{key}\" of {place} must be {wanted}");
    let mut entry = HostEntry { root: None, ..HostEntry::of_registry() };
    let mut override_path = false;
    for (key, value) in table {
        match (key.as_str(), value) {
            ("host" | "server", _) if place == "the root" => {}
            ("capabilities", value) => {
                let words = texts(value).ok_or_else(|| wrong(key, "a list of texts"))?;
                if !words.is_empty() {
                    (entry.pull, entry.resolve) = (false, false);
                }
                for word in words {
                    match word.to_ascii_lowercase().as_str() {
                        "pull" => entry.pull = true,
                        "resolve" => entry.resolve = true,
                        "push" | "referrers" => {}
                        _ => {
                            let word = excerpt(&word, 80);
                            unknown.push(format!("the capability \"{word}\" of {place}"));
                        }
                    }
                }
            }
            ("ca", value) => {
                let files = texts(value).ok_or_else(|| wrong(key, "a text or a list of texts"))?;
                entry.ca = files.iter().map(|file| folder.join(file)).collect();
            }
            ("client", value) => {
                let pairs = "a text, a list of texts, or a list of pairs of them";
                entry.client = client(value, folder).ok_or_else(|| wrong(key, pairs))?;
            }
            ("skip_verify", Value::Boolean(skip)) => entry.skip_verify = Some(*skip),
            ("override_path", Value::Boolean(set)) => override_path = *set,
            ("skip_verify" | "override_path", _) => return Err(wrong(key, "true or false")),
            ("dial_timeout", Value::String(text)) if text.is_empty() => {}
            ("dial_timeout", Value::String(text)) => {
                let timeout = GoDuration::try_from(text.clone());
                entry.dial_timeout = Some(timeout.map_err(|_| wrong(key, "as \"200ms\""))?.0);
            }
            ("header", Value::Table(headers)) => entry.headers = header_map(headers, place)?,
            ("proxy", Value::String(text)) => {
                let wrong = |_| wrong(key, "an address with http, https or socks5");
                entry.proxy = Some(environment_proxy::parse(text).map_err(wrong)?);
            }
            ("dial_timeout" | "proxy", _) => return Err(wrong(key, "a text")),
            ("header", _) => return Err(wrong(key, "a table")),
            _ => unknown.push(format!("{} of {place}", excerpt(key, 80))),
        }
    }
    entry.root = address.map(|address| root(address, override_path, place)).transpose()?;
    Ok(entry)
}

impl HostEntry {
    /// Returns the registry itself with default settings.
    pub(in crate::registry) fn of_registry() -> Self {
        Self {
            root: None,
            pull: true,
            resolve: true,
            ca: Vec::new(),
            client: Vec::new(),
            skip_verify: None,
            headers: HeaderMap::new(),
            dial_timeout: None,
            proxy: None,
        }
    }

    /// Returns whether the entry has settings of its connections or requests.
    pub(in crate::registry) fn has_settings(&self) -> bool {
        let is_plain =
            self.headers.is_empty() && self.dial_timeout.is_none() && self.proxy.is_none();
        self.has_tls() || !is_plain
    }

    /// Returns whether the entry has TLS settings.
    pub(in crate::registry) fn has_tls(&self) -> bool {
        !self.ca.is_empty() || !self.client.is_empty() || self.skip_verify.is_some()
    }
}

/// Returns the root of the API with a trailing slash. Appends `/v2` unless it is there or
/// `override_path` is set.
fn root(address: &str, override_path: bool, place: &str) -> Result<Url, String> {
    let full =
        if address.starts_with("http") { address.to_owned() } else { format!("https://{address}") };
    let wrong =
        || format!("the address of {place} is unreadable: write https://host[:port][/path]");
    let mut url = Url::parse(&full).map_err(|_| wrong())?;
    let has_user = !url.username().is_empty() || url.password().is_some();
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() || has_user {
        return Err(wrong());
    }
    url.set_query(None);
    url.set_fragment(None);
    let path = url.path().trim_end_matches('/').to_owned();
    let path = if path.ends_with("/v2") || override_path { path } else { format!("{path}/v2") };
    url.set_path(&format!("{path}/"));
    Ok(url)
}

fn texts(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(items) => {
            items.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<_>>()
        }
        _ => None,
    }
}

fn client(value: &Value, folder: &Path) -> Option<Vec<(PathBuf, Option<PathBuf>)>> {
    let both = |file: &str| (folder.join(file), None);
    match value {
        Value::String(file) => Some(vec![both(file)]),
        Value::Array(items) => items
            .iter()
            .map(|item| match item {
                Value::String(file) => Some(both(file)),
                pair => match texts(pair)?.as_slice() {
                    [certificate, key] => Some((folder.join(certificate), Some(folder.join(key)))),
                    _ => None,
                },
            })
            .collect(),
        _ => None,
    }
}

/// Parses headers. Errors never show their values, which may be secrets.
fn header_map(table: &Table, place: &str) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, value) in table {
        let wrong = |what: &str| format!("the header \"{}\" of {place} {what}", excerpt(name, 80));
        let parsed =
            HeaderName::try_from(name.as_str()).map_err(|_| wrong("has no possible name"))?;
        let values = texts(value).ok_or_else(|| wrong("must be a text or a list of texts"))?;
        for value in values {
            let mut value =
                HeaderValue::try_from(value).map_err(|_| wrong("has an impossible value"))?;
            value.set_sensitive(true);
            headers.append(parsed.clone(), value);
        }
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<HostsFile, String> {
        HostsFile::parse(text, Path::new("/certs.d/r.io"))
    }

    fn roots(file: &HostsFile) -> Vec<String> {
        let root = |entry: &HostEntry| entry.root.as_ref().map_or("-".to_owned(), Url::to_string);
        file.hosts.iter().map(root).collect()
    }

    #[test]
    fn hosts_keep_the_files_order_and_the_server_comes_last() {
        let file = parse(
            "server = \"https://registry-1.docker.io\"\n\
             [host.\"https://z.example\"]\n[host.\"http://a.example:5000/proxy\"]\n\
             [host.\"m.example\"]\n[host.\"https://b.example/v2\"]\n\
             [host.\"https://c.example/api/\"]\noverride_path = true\n",
        );
        assert_eq!(
            roots(&file.expect("valid")),
            [
                "https://z.example/v2/",
                "http://a.example:5000/proxy/v2/",
                "https://m.example/v2/",
                "https://b.example/v2/",
                "https://c.example/api/",
                "https://registry-1.docker.io/v2/",
            ]
        );
        assert_eq!(roots(&parse("").expect("valid")), ["-"]);
        let bare = "[host.\"https://c.example\"]\noverride_path = true\n";
        assert_eq!(roots(&parse(bare).expect("valid")), ["https://c.example/", "-"]);
    }

    #[test]
    fn every_key_is_read() {
        let file = parse(
            "ca = \"root.pem\"\nskip_verify = false\n[host.\"https://m.example\"]\n\
             capabilities = [\"Pull\"]\nca = [\"a.pem\", \"/abs.pem\"]\n\
             client = [[\"c.cert\", \"c.key\"], \"both.pem\"]\ndial_timeout = \"200ms\"\n\
             proxy = \"http://p:3128\"\n[host.\"https://m.example\".header]\nX-A = [\"1\", \"2\"]\nX-B = \"3\"\n",
        )
        .expect("valid");
        let [mirror, server] = &file.hosts[..] else { panic!("two hosts") };
        assert!(mirror.pull && !mirror.resolve && server.pull && server.resolve);
        assert_eq!(mirror.ca, [Path::new("/certs.d/r.io/a.pem"), Path::new("/abs.pem")]);
        assert_eq!(mirror.client[0].1.as_deref(), Some(Path::new("/certs.d/r.io/c.key")));
        assert_eq!(mirror.client[1], ("/certs.d/r.io/both.pem".into(), None));
        assert_eq!(mirror.dial_timeout, Some(Duration::from_millis(200)));
        assert_eq!(mirror.headers.get_all("x-a").iter().count(), 2);
        assert!(mirror.proxy.is_some() && mirror.has_tls());
        assert_eq!((server.skip_verify, server.ca.len()), (Some(false), 1));
    }

    #[test]
    fn errors_name_the_defect_and_its_place() {
        for (text, named) in [
            ("[host.\"https://m\"]\ncapabilities = [5]", "capabilities"),
            ("server = \"https://m\"\n\nserver =", "line 3"),
            ("[host.\"https://m\"]\nca = 5", "ca"),
            ("[host.\"https://m\"]\nclient = [[\"a\"]]", "client"),
            ("[host.\"https://m\"]\nskip_verify = \"yes\"", "skip_verify"),
            ("[host.\"https://m\"]\ndial_timeout = \"soon\"", "dial_timeout"),
            ("[host.\"https://m\"]\nproxy = \"ftp://p\"", "proxy"),
            ("[host.\"https://\"]", "address"),
            ("[host.\"httpx://m\"]", "address"),
            ("[host.\"https://u:p@m\"]", "address"),
            ("[host.\"https://m\".header]\nX = 5", "header"),
            ("host = 3", "host"),
            ("server = 3", "server"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(named) && !error.contains('\n'), "{text}: {error}");
        }
    }

    #[test]
    fn unknown_keys_are_reported_and_ignored() {
        let file = parse("colour = 1\n[host.\"https://m\"]\nsize = 2\n").expect("valid");
        assert_eq!(file.unknown, ["size of host.\"https://m\"", "colour of the root"]);
    }

    #[test]
    fn unknown_capabilities_are_reported_and_ignored() {
        let file = parse(
            "[host.\"https://m\"]\ncapabilities = [\"pull\", \"Referrers\", \"fetch\"]\n\
             [host.\"https://n\"]\ncapabilities = [\"fetch\"]\n",
        )
        .expect("valid");
        let [pulls, none, _] = &file.hosts[..] else { panic!("three hosts") };
        assert!(pulls.pull && !pulls.resolve && !none.pull && !none.resolve);
        assert_eq!(
            file.unknown,
            [
                "the capability \"fetch\" of host.\"https://m\"",
                "the capability \"fetch\" of host.\"https://n\""
            ]
        );
    }

    #[test]
    fn a_headers_value_is_never_printed() {
        let file = parse("[host.\"https://m\".header]\nAuthorization = \"Bearer planted\"")
            .expect("valid");
        assert!(!format!("{file:?}").contains("planted"));
    }
}
