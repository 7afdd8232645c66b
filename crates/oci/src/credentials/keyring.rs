//! Keyrings: match credentials with repositories by the rules of the kubelet.
//!
//! The rules are those of `pkg/credentialprovider/keyring.go`: a key is `host[:port][/path]`, without its scheme and
//! a leading `/v1/` or `/v2/`. It matches a repository if the ports are equal as texts (none equals
//! none), the hosts have the same number of dot-separated parts and each part matches as a glob,
//! and the path of the key is a plain prefix of the repository's. Keys are tried in reverse lexical
//! order, so that longer paths come first. If none matches a repository of Docker Hub, the key
//! `index.docker.io` does.
//!
//! A key is parsed as an address before it is a glob, by the kubelet and here: `?` starts a query,
//! and a key with `\` or `^` in its host is not an address. The remaining glob syntax is `*` and
//! `[a-z]`.
//!
//! A plain prefix means that `r.io/team` also matches `r.io/team-b/app`. This is kept, since a
//! secret that works for `imagePullSecrets` must work here.

use super::Credential;
use super::docker_config::ConfigEntries;
use crate::Repository;
use crate::reference::DOCKER_HUB;

/// Key that docker clients write for Docker Hub.
const DOCKER_HUB_KEY: &str = "index.docker.io";

/// The maximum number of credentials that are tried for one repository. The author of a pod writes
/// the secret, and a registry may block the address of a node after many failed logins.
const ATTEMPTS: usize = 16;

/// Credentials with the repositories that they are for.
#[derive(Clone, Default, Debug)]
pub struct Keyring {
    /// Entries in the order in which they are tried.
    entries: Vec<KeyringEntry>,
}

#[derive(Clone, Debug)]
struct KeyringEntry {
    /// Normalised key: `host[:port][/path]`.
    key: String,
    pattern: KeyPattern,
    credential: Credential,
}

#[derive(Clone, Debug)]
enum KeyPattern {
    /// Exactly this `host[:port]`.
    Host(String),
    Url {
        parts: Vec<HostGlob>,
        port: String,
        path: String,
    },
}

/// One part of a host name, with the syntax of Go's `filepath.Match`.
#[derive(Clone, Debug)]
struct HostGlob(Vec<GlobItem>);

#[derive(Clone, Debug)]
enum GlobItem {
    Literal(char),
    Star,
    Class(Vec<(char, char)>),
}

impl Keyring {
    /// Returns a keyring without credentials.
    pub fn empty() -> Self {
        Self::default()
    }

    /// Returns a keyring with credentials for one registry (`host[:port]`), to be tried in this
    /// order.
    pub fn of_host(host: &str, credentials: Vec<Credential>) -> Self {
        let mut keyring = Self::empty();
        for credential in credentials {
            keyring.add_for_host(host, credential);
        }
        keyring
    }

    /// Returns whether the keyring has no credentials.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns the credentials to try for a repository, in this order, until one works:
    /// [`ATTEMPTS`] at most, those of the most specific keys. If there are none, the request is
    /// anonymous. If all of them fail, no anonymous request is made.
    pub fn matching(&self, repository: &Repository) -> Vec<Credential> {
        let fitting = self.credentials(|entry| entry.pattern.matches(repository));
        if fitting.is_empty() && repository.host() == DOCKER_HUB {
            return self.credentials(|entry| entry.key == DOCKER_HUB_KEY);
        }
        fitting
    }

    fn credentials(&self, mut chosen: impl FnMut(&KeyringEntry) -> bool) -> Vec<Credential> {
        let mut credentials: Vec<Credential> = Vec::new();
        for entry in &self.entries {
            if credentials.len() == ATTEMPTS {
                break;
            }
            // One credential under two spellings of a host is tried once.
            if chosen(entry) && !credentials.contains(&entry.credential) {
                credentials.push(entry.credential.clone());
            }
        }
        credentials
    }

    pub(super) fn add_entries(&mut self, entries: ConfigEntries) {
        for (name, credential) in entries {
            // Keys that cannot be parsed match nothing, and are ignored as in the kubelet.
            if let Some((key, pattern)) = parse_key(&name) {
                self.entries.push(KeyringEntry { key, pattern, credential });
            }
        }
        self.sort();
    }

    pub(super) fn add_for_host(&mut self, host: &str, credential: Credential) {
        let host = if host == DOCKER_HUB_KEY { DOCKER_HUB } else { host };
        self.entries.push(KeyringEntry {
            key: host.to_owned(),
            pattern: KeyPattern::Host(host.to_owned()),
            credential,
        });
        self.sort();
    }

    fn sort(&mut self) {
        // A stable sort keeps the order of credentials with the same key.
        self.entries.sort_by(|left, right| right.key.cmp(&left.key));
    }
}

/// A pattern of `matchImages` of a plugin, with the rules of a key.
#[derive(Clone, Debug)]
pub(super) struct ImagePattern(KeyPattern);

impl ImagePattern {
    pub(super) fn parse(text: &str) -> Option<Self> {
        parse_key(text).map(|(_, pattern)| Self(pattern))
    }

    pub(super) fn matches(&self, repository: &Repository) -> bool {
        self.0.matches(repository)
    }
}

impl KeyPattern {
    fn matches(&self, repository: &Repository) -> bool {
        match self {
            Self::Host(host) => host == repository.host(),
            Self::Url { parts, port, path } => {
                let (host, repository_port) = split_port(repository.host());
                port == repository_port
                    && path.strip_prefix('/').is_none_or(|path| repository.path().starts_with(path))
                    && parts.len() == host.split('.').count()
                    && parts.iter().zip(host.split('.')).all(|(glob, part)| glob.matches(part))
            }
        }
    }
}

/// Normalises a key of a configuration. `None` if it has no host.
fn parse_key(name: &str) -> Option<(String, KeyPattern)> {
    let url =
        name.strip_prefix("https://").or_else(|| name.strip_prefix("http://")).unwrap_or(name);
    if url.chars().any(char::is_control) {
        return None;
    }
    // A query or fragment is not part of the path.
    let url = url.split(['?', '#']).next().unwrap_or_default();
    let (authority, path) = match url.find('/') {
        Some(slash) => url.split_at(slash),
        None => (url, ""),
    };
    // Text before an "@" is a user name.
    let authority = authority.rsplit('@').next().unwrap_or_default();
    let path = match path {
        versioned if versioned.starts_with("/v1/") || versioned.starts_with("/v2/") => {
            &versioned["/v1".len()..]
        }
        path => path,
    };
    let path = if path == "/" { "" } else { path };
    let (host, port) = split_port(authority);
    if host.is_empty()
        || !host.bytes().all(is_host_byte)
        || !port.bytes().all(|byte| byte.is_ascii_digit())
    {
        return None;
    }
    let parts = host.split('.').map(HostGlob::parse).collect::<Option<_>>()?;
    Some((
        format!("{authority}{path}"),
        KeyPattern::Url { parts, port: port.to_owned(), path: path.to_owned() },
    ))
}

/// Returns whether Go's `url.Parse` accepts a byte in a host.
fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || !byte.is_ascii() || b"-_.~!$&'()*+,;=:[]<>\"".contains(&byte)
}

/// Splits `host[:port]`. An IPv6 address keeps its brackets.
fn split_port(authority: &str) -> (&str, &str) {
    match authority.rsplit_once(':') {
        Some((host, port))
            if !port.contains(']') && (!host.contains(':') || host.ends_with(']')) =>
        {
            (host, port)
        }
        _ => (authority, ""),
    }
}

impl HostGlob {
    /// Parses one part of a host. `None` if it is malformed: such a key matches nothing.
    fn parse(pattern: &str) -> Option<Self> {
        let mut items = Vec::new();
        let mut rest = pattern.chars().peekable();
        while let Some(character) = rest.next() {
            items.push(match character {
                '*' => GlobItem::Star,
                '[' => {
                    let mut ranges = Vec::new();
                    loop {
                        let low = match rest.next()? {
                            ']' if ranges.is_empty() => return None,
                            ']' => break,
                            '-' => return None,
                            low => low,
                        };
                        let high = if rest.next_if_eq(&'-').is_some() {
                            match rest.next()? {
                                '-' | ']' => return None,
                                high => high,
                            }
                        } else {
                            low
                        };
                        ranges.push((low, high));
                    }
                    GlobItem::Class(ranges)
                }
                literal => GlobItem::Literal(literal),
            });
        }
        Some(Self(items))
    }

    /// Matches with backtracking to the last star only: linear in the length of the pattern times
    /// that of the text.
    fn matches(&self, text: &str) -> bool {
        let text: Vec<char> = text.chars().collect();
        let (mut item, mut position) = (0, 0);
        let mut retry: Option<(usize, usize)> = None;
        loop {
            match self.0.get(item) {
                Some(GlobItem::Star) => {
                    retry = Some((item + 1, position));
                    item += 1;
                    continue;
                }
                Some(glob) => {
                    if let Some(&character) = text.get(position)
                        && glob.matches(character)
                    {
                        item += 1;
                        position += 1;
                        continue;
                    }
                }
                None if position == text.len() => return true,
                None => {}
            }
            match retry {
                Some((after_star, start)) if start < text.len() => {
                    retry = Some((after_star, start + 1));
                    (item, position) = (after_star, start + 1);
                }
                _ => return false,
            }
        }
    }
}

impl GlobItem {
    fn matches(&self, character: char) -> bool {
        match self {
            Self::Literal(literal) => *literal == character,
            Self::Star => false,
            Self::Class(ranges) => {
                ranges.iter().any(|&(low, high)| (low..=high).contains(&character))
            }
        }
    }
}
