//! Hosts of registries: containerd's `hosts.toml`, one folder for each registry.
//!
//! ```text
//! hosts_toml    the text of a hosts.toml -> hosts in order
//! certs_folder  the folder of a registry, and its files
//! ```
//!
//! Files are checked at every use and read again when they have changed. A broken file stops pulls
//! from its registry, with an error that names it; other registries continue. (containerd logs the
//! error and uses the registry itself, which would bypass a mirror that has to be used.)

mod certs_folder;
mod hosts_toml;

use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use reqwest::Url;

pub use hosts_toml::{HostEntry, HostsFile};

use super::error::{self, RegistryError};
use super::http_transport::Transport;
use super::redirect_rules;
use super::registry_endpoint::{self, RegistryEndpoint};
use sys::lru_map::LruMap;
use sys::reload::{FileBacked, FileVersions};

/// Maximum number of registries with cached endpoints. Evicting one costs a read of its files.
const MAXIMUM_ROUTES: usize = 256;

/// Endpoints of a registry, in the order in which they are tried.
pub(super) type HostRoute = Result<Vec<Arc<RegistryEndpoint>>, RegistryError>;

/// Routes of all registries.
pub(super) struct RegistryHosts {
    roots: Vec<PathBuf>,
    /// Mirrors that may get credentials of the registry.
    with_credentials: Vec<Url>,
    routes: Mutex<LruMap<String, Arc<FileBacked<HostRoute>>>>,
}

impl RegistryHosts {
    pub(super) fn new(roots: Vec<PathBuf>, with_credentials: Vec<Url>) -> Self {
        let routes = Mutex::new(LruMap::new(MAXIMUM_ROUTES));
        Self { roots, with_credentials, routes }
    }

    /// Returns the current endpoints of a registry.
    pub(super) async fn route(
        self: &Arc<Self>,
        transport: &Arc<Transport>,
        host: &str,
    ) -> Arc<HostRoute> {
        // Without folders, no file is read.
        if self.roots.is_empty() {
            return self.route_blocking(transport, host);
        }
        let (hosts, transport, host) = (self.clone(), transport.clone(), host.to_owned());
        let look = move || hosts.route_blocking(&transport, &host);
        tokio::task::spawn_blocking(look).await.unwrap_or_else(|_| {
            let reason = "the reader of hosts.toml failed".to_owned();
            Arc::new(Err(RegistryError::Configuration { reason }))
        })
    }

    /// Works like [`Self::route`], on a thread that may block.
    pub(super) fn route_blocking(&self, transport: &Transport, host: &str) -> Arc<HostRoute> {
        let route = {
            let mut routes = self.routes.lock();
            let known = routes.get(&host.to_owned());
            known.unwrap_or_else(|| {
                let route = Arc::default();
                routes.insert(host.to_owned(), Arc::clone(&route));
                route
            })
        };
        route.get(|seen| self.read(transport, host, seen))
    }

    fn read(&self, transport: &Transport, host: &str, seen: &mut FileVersions) -> HostRoute {
        let Some(found) = certs_folder::find(&self.roots, host, seen) else {
            let connection = transport.default_connection();
            return Ok(vec![Arc::new(RegistryEndpoint::of_registry(host, connection)?)]);
        };
        let broken = |reason: String| {
            tracing::error!(registry = host, reason, "nothing is pulled from this registry");
            RegistryError::Configuration { reason: error::long_reason(&reason) }
        };
        let file = certs_folder::load(&found, seen).map_err(broken)?;
        for word in &file.unknown {
            tracing::warn!(folder = %found.display(), word, "hosts.toml has a word that means nothing here");
        }
        // A folder of its own exempts the registry from the address rules.
        let named = found.file_name().is_none_or(|name| name != "_default");
        let mut endpoints = Vec::new();
        for entry in &merge_server(&file.hosts, host)? {
            let is_registry = entry.root.is_none();
            let root = match &entry.root {
                Some(root) => root.clone(),
                None => registry_endpoint::registry_root(host)?,
            };
            let material = certs_folder::material(entry, seen).map_err(broken)?;
            let connection = transport.connection(entry, material).map_err(broken)?;
            let namespace = (!is_same_host(&root, host)).then(|| host.to_owned());
            let marked = self.with_credentials.iter().any(|url| url.origin() == root.origin());
            let endpoint = RegistryEndpoint {
                takes_credentials: namespace.is_none() || marked,
                namespace,
                pull: entry.pull,
                resolve: entry.resolve,
                configured: named || !is_registry,
                headers: entry.headers.clone(),
                connection,
                root,
            };
            // As in containerd: TLS settings for plain HTTP with an explicit port mean that TLS is
            // tried first.
            if entry.has_tls() && endpoint.root.scheme() == "http" && endpoint.root.port().is_some()
            {
                let mut with_tls = endpoint.clone();
                if with_tls.root.set_scheme("https").is_ok() {
                    endpoints.push(Arc::new(with_tls));
                }
            }
            endpoints.push(Arc::new(endpoint));
        }
        Ok(endpoints)
    }
}

/// Gives the server, which comes last, the settings of the last table for the same address, if it
/// has none of its own. A host that is named twice would otherwise be asked again without its
/// certificate authority. The table itself is left out if no other host is asked between the two.
fn merge_server(hosts: &[HostEntry], host: &str) -> Result<Vec<HostEntry>, RegistryError> {
    let mut merged = hosts.to_vec();
    let Some(server) = merged.pop() else { return Ok(merged) };
    let default = registry_endpoint::registry_root(host)?;
    let is_server = |root: &Url| match &server.root {
        Some(server) => root == server,
        // One port speaks one protocol: a table says which.
        None if root.port().is_some() => is_same_host(root, host) && root.path() == default.path(),
        None => *root == default,
    };
    let table = merged.iter().rposition(|entry| entry.root.as_ref().is_some_and(is_server));
    let Some(table) = table.filter(|_| !server.has_settings()) else { return Ok(hosts.to_vec()) };
    let entry = merged[table].clone();
    if table + 1 == merged.len() {
        merged.pop();
    }
    let (pull, resolve) = (entry.pull || server.pull, entry.resolve || server.resolve);
    merged.push(HostEntry { pull, resolve, ..entry });
    Ok(merged)
}

/// Returns whether the `hosts.toml` of an address's host names it with `http://`. Blocking.
pub(super) fn name_plain_http(roots: &[PathBuf], url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let with_port = format!("{host}:{}", url.port_or_known_default().unwrap_or_default());
    let without = (url.port().is_none()).then_some(host);
    [Some(with_port.as_str()), without].into_iter().flatten().any(|host| {
        let mut seen = FileVersions::new();
        let file = certs_folder::find(roots, host, &mut seen)
            .and_then(|found| certs_folder::load(&found, &mut seen).ok());
        file.is_some_and(|file| {
            let roots = file.hosts.iter().filter_map(|entry| entry.root.as_ref());
            roots.into_iter().any(|root| root.origin() == url.origin())
        })
    })
}

/// Parses the address of a mirror that may get credentials: over TLS, or on this node.
///
/// # Errors
///
/// A description of the correct form.
pub fn mirror_address(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).ok().filter(|url| url.host_str().is_some());
    let url = url.ok_or_else(|| format!("\"{text}\" is no address: write https://host[:port]"))?;
    match url.scheme() {
        "https" => Ok(url),
        "http" if redirect_rules::is_loopback(&url) => Ok(url),
        _ => Err(format!(
            "\"{text}\" would get credentials without TLS: use https, or a mirror on loopback"
        )),
    }
}

/// Returns whether a URL is the registry of a reference, not a mirror.
fn is_same_host(root: &Url, host: &str) -> bool {
    registry_endpoint::registry_root(host).is_ok_and(|registry| {
        registry.host_str() == root.host_str() && registry.port() == root.port()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_what_a_hosts_file_says_of_its_own_host() {
        let roots = [tempfile::tempdir().expect("a folder")];
        for (folder, text) in [
            ("plain.example", "server = \"http://plain.example\"\n"),
            ("plain.example_9000_", "[host.\"http://plain.example:9000/v2\"]\n"),
            ("tls.example", "server = \"https://tls.example\"\n"),
            ("silent.example", ""),
            ("broken.example", "server = \"http://broken.example\"\n="),
            ("moved.example", "server = \"http://plain.example\"\n"),
            ("_default", "[host.\"http://mirror.example:5000\"]\n"),
        ] {
            let folder = roots[0].path().join(folder);
            std::fs::create_dir(&folder).expect("a folder");
            std::fs::write(folder.join("hosts.toml"), text).expect("a file");
        }
        let roots = [roots[0].path().to_owned()];
        let named = |url: &str| name_plain_http(&roots, &url.parse().expect("an address"));
        for url in [
            "http://plain.example/x",
            "http://plain.example:80/x",
            "http://plain.example:9000/x",
            "http://mirror.example:5000/x",
        ] {
            assert!(named(url), "{url}");
        }
        for url in [
            "http://plain.example:9001/",
            "https://plain.example/",
            "http://tls.example/",
            "http://silent.example/",
            "http://broken.example/",
            "http://moved.example/",
            "http://other.example/",
            "http://mirror.example/",
        ] {
            assert!(!named(url), "{url}");
        }
        assert!(!name_plain_http(&[], &"http://plain.example/".parse().expect("an address")));
    }

    #[test]
    fn a_registry_is_told_from_its_mirrors() {
        let same = |root: &str, host: &str| is_same_host(&root.parse().expect("an address"), host);
        assert!(same("https://r.io/v2/", "r.io") && same("https://r.io/v2/", "r.io:443"));
        assert!(same("http://r.io:5000/v2/", "r.io:5000") && same("http://r.io/v2/", "r.io"));
        assert!(same("https://registry-1.docker.io/v2/", "docker.io"));
        for (root, host) in [
            ("https://r.io:5000/v2/", "r.io"),
            ("https://mirror.r.io/v2/", "r.io"),
            ("https://docker.io/v2/", "docker.io"),
        ] {
            assert!(!same(root, host), "{root}");
        }
    }
}
