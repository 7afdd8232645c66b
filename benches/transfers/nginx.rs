//! nginx in front of a registry: with TLS, or with a limited rate for each connection.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use crate::common::support::{Authority, Port, Registry, ending_with_this_thread, wait_until};

/// The rate of one connection to real registries, within an order of magnitude.
pub const LIMIT_MEBIBYTES: u64 = 40;

pub struct Nginx {
    port: Port,
    child: Child,
    authority: Option<PathBuf>,
    _folder: tempfile::TempDir,
}

impl Nginx {
    pub fn limiting(registry: &Registry) -> Self {
        Self::start(registry, folder(), None, &format!("limit_rate {LIMIT_MEBIBYTES}m;"))
    }

    /// Serves with TLS, HTTP/1.1 and HTTP/2.
    pub fn with_tls(registry: &Registry) -> Self {
        let folder = folder();
        let authority = Authority::new(&folder.path().join("authority"));
        Self::start(registry, folder, Some(&authority), "")
    }

    fn start(
        registry: &Registry,
        folder: tempfile::TempDir,
        authority: Option<&Authority>,
        line: &str,
    ) -> Self {
        let port = Port::new();
        let address = port.address();
        let tls = authority.map(|authority| {
            let (certificate, key) = authority.issue("nginx", &["127.0.0.1"]);
            let (certificate, key) = (certificate.display(), key.display());
            format!(" ssl http2; ssl_certificate {certificate}; ssl_certificate_key {key}")
        });
        let (path, upstream) = (folder.path().display(), registry.host());
        let configuration = format!(
            "daemon off; pid {path}/pid; error_log {path}/log; user root; worker_processes 1;\n\
             events {{ worker_connections 256; }}\n\
             http {{ access_log off; client_body_temp_path {path}/body; proxy_temp_path {path}/proxy;\n\
             fastcgi_temp_path {path}/f; uwsgi_temp_path {path}/u; scgi_temp_path {path}/s;\n\
             server {{ listen {address}{};\n\
             location / {{ proxy_pass http://{upstream}; proxy_http_version 1.1;\n\
             proxy_set_header Host $http_host; proxy_set_header Connection \"\";\n\
             proxy_max_temp_file_size 0; {line} }} }} }}\n",
            tls.unwrap_or_default()
        );
        let file = folder.path().join("nginx.conf");
        fs::write(&file, configuration).expect("nginx's configuration");
        let child = ending_with_this_thread("nginx")
            .arg("-e")
            .arg(folder.path().join("log"))
            .arg("-c")
            .arg(&file)
            .stdin(Stdio::null())
            .spawn()
            .expect("nginx, which `make bench` installs");
        wait_until("nginx listens", || TcpStream::connect(address).is_ok());
        let authority = authority.map(Authority::certificate);
        Self { port, child, authority, _folder: folder }
    }

    pub fn host(&self) -> String {
        self.port.address().to_string()
    }

    /// Returns the certificate authority; `None` without TLS.
    pub fn authority(&self) -> Option<&Path> {
        self.authority.as_deref()
    }
}

fn folder() -> tempfile::TempDir {
    let builder = tempfile::Builder::new().prefix("bench-nginx").tempdir_in("/var/tmp");
    builder.expect("a folder")
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let id = i32::try_from(self.child.id()).expect("a process id");
        // The master ends its workers when it is asked to end.
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(id),
            nix::sys::signal::Signal::SIGTERM,
        );
        let _ = self.child.wait();
    }
}
