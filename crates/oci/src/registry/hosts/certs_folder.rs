//! The folder of a registry below `certs.d`, and its files.

use std::path::{Path, PathBuf};

use super::super::tls::TlsMaterial;
use super::hosts_toml::{HostEntry, HostsFile};
use sys::reload::FileVersions;

/// Maximum size in bytes: a `hosts.toml` has a few lines for each mirror.
const MAXIMUM_HOSTS_BYTES: u64 = 256 * 1024;
/// Maximum size in bytes: all authorities of Mozilla together have 220 KiB.
const MAXIMUM_PEM_BYTES: u64 = 4 * 1024 * 1024;

/// Returns the folder of a host (`host[:port]`) in the first root that has one, in containerd's
/// order: `host_port_`, `host:port`, `_default`.
pub(super) fn find(roots: &[PathBuf], host: &str, seen: &mut FileVersions) -> Option<PathBuf> {
    // Hosts come from references: they must not escape the root.
    if host.is_empty() || host.contains('/') || host.starts_with('.') || host.starts_with('_') {
        return None;
    }
    // An IPv6 address without a port ends in a bracket.
    let with_port = host.rsplit_once(':').filter(|_| !host.ends_with(']'));
    let underlined = with_port.map(|(name, port)| format!("{name}_{port}_"));
    for root in roots {
        for name in underlined.iter().map(String::as_str).chain([host, "_default"]) {
            let folder = root.join(name);
            seen.record(&folder);
            if folder.exists() {
                return Some(folder);
            }
        }
    }
    None
}

/// Reads the hosts of a folder. Without a `hosts.toml`, returns the registry itself with the
/// certificates in the folder, named as in Docker.
pub(super) fn load(folder: &Path, seen: &mut FileVersions) -> Result<HostsFile, String> {
    let path = folder.join("hosts.toml");
    let bytes = match seen.read(&path, MAXIMUM_HOSTS_BYTES) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(format!("{} cannot be read: {error}", path.display())),
    };
    if bytes.is_empty() {
        let hosts = vec![certificates(folder)?];
        return Ok(HostsFile { hosts, unknown: Vec::new() });
    }
    let text = String::from_utf8(bytes).map_err(|_| format!("{} is no text", path.display()))?;
    HostsFile::parse(&text, folder).map_err(|reason| format!("{}: {reason}", path.display()))
}

/// Returns the certificates of a folder: `*.crt` are authorities, `*.cert` client certificates,
/// each with its `*.key`.
fn certificates(folder: &Path) -> Result<HostEntry, String> {
    let mut entry = HostEntry::of_registry();
    let listed = std::fs::read_dir(folder)
        .map_err(|error| format!("{} cannot be read: {error}", folder.display()))?;
    let mut paths: Vec<PathBuf> = listed.flatten().map(|file| file.path()).collect();
    paths.sort();
    for path in paths {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => entry.ca.push(path),
            Some("cert") => {
                let key = path.with_extension("key");
                let key = key.exists().then_some(key);
                entry.client.push((path, key));
            }
            _ => {}
        }
    }
    Ok(entry)
}

/// Reads the certificates and keys of an entry.
pub(super) fn material(entry: &HostEntry, seen: &mut FileVersions) -> Result<TlsMaterial, String> {
    let mut read = |path: &Path| {
        seen.read(path, MAXIMUM_PEM_BYTES)
            .map_err(|error| format!("{} cannot be read: {error}", path.display()))
    };
    let wrong = |path: &Path| {
        let path = path.display().to_string();
        move |reason: &'static str| format!("{path} {reason}")
    };
    let mut material =
        TlsMaterial { skip_verify: entry.skip_verify == Some(true), ..TlsMaterial::default() };
    for path in &entry.ca {
        material.add_authorities(&read(path)?).map_err(wrong(path))?;
    }
    for (certificate, key) in &entry.client {
        let chain = read(certificate)?;
        let key = key.as_deref().map(&mut read).transpose()?;
        material.add_client(&chain, key.as_ref().unwrap_or(&chain)).map_err(wrong(certificate))?;
    }
    Ok(material)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_looked_for_in_containerds_order() {
        let root = tempfile::tempdir().expect("a folder");
        let roots = [root.path().join("one"), root.path().join("two")];
        let found = |host: &str| {
            let folder = find(&roots, host, &mut FileVersions::new())?;
            Some(folder.strip_prefix(root.path()).expect("below").display().to_string())
        };
        let make = |name: &str| std::fs::create_dir_all(root.path().join(name)).expect("made");
        assert_eq!(found("r.io:5000"), None);
        make("two/r.io:5000");
        assert_eq!(found("r.io:5000").as_deref(), Some("two/r.io:5000"));
        make("one/_default");
        assert_eq!(found("r.io:5000").as_deref(), Some("one/_default"));
        make("one/r.io:5000");
        assert_eq!(found("r.io:5000").as_deref(), Some("one/r.io:5000"));
        make("one/r.io_5000_");
        assert_eq!(found("r.io:5000").as_deref(), Some("one/r.io_5000_"));
        make("one/[::1]_5000_");
        assert_eq!(found("[::1]:5000").as_deref(), Some("one/[::1]_5000_"));
        make("one/[::1]");
        assert_eq!(found("[::1]").as_deref(), Some("one/[::1]"));
        for odd in ["..", "_default", "", "a/b"] {
            assert_eq!(found(odd), None, "{odd}");
        }
    }
}
