//! A real nginx as a mirror with configured responses.

use std::{
    fs,
    net::TcpStream,
    path::Path,
    process::{Child, Stdio},
};

use super::{Port, registry::ending_with_this_thread, wait_until};

/// A running nginx with one server.
pub struct Nginx {
    port: Port,
    child: Child,
}

impl Nginx {
    /// Starts nginx. `answer` stands in `location /`, such as `return 503;` or `proxy_pass http://...;`.
    #[track_caller]
    pub fn start(folder: &Path, answer: &str) -> Self {
        Self::start_server(folder, "", answer)
    }

    /// Starts nginx also on the loopback of IPv6, with the same port.
    #[track_caller]
    pub fn start_with_ipv6(folder: &Path, answer: &str) -> Self {
        Self::start_server(folder, "; listen [::1]:{port}", answer)
    }

    /// Starts nginx with TLS, with this certificate and key.
    #[track_caller]
    pub fn start_with_tls(folder: &Path, (certificate, key): (&Path, &Path), answer: &str) -> Self {
        let lines = Self::tls("ssl", certificate, key);
        Self::start_server(folder, &lines, answer)
    }

    /// Starts nginx with TLS, HTTP/1.1 and HTTP/2.
    #[track_caller]
    pub fn start_with_http2(
        folder: &Path,
        (certificate, key): (&Path, &Path),
        answer: &str,
    ) -> Self {
        let lines = Self::tls("ssl http2", certificate, key);
        Self::start_server(folder, &lines, answer)
    }

    fn tls(protocols: &str, certificate: &Path, key: &Path) -> String {
        let (certificate, key) = (certificate.display(), key.display());
        format!(" {protocols}; ssl_certificate {certificate}; ssl_certificate_key {key}")
    }

    #[track_caller]
    fn start_server(folder: &Path, listens: &str, answer: &str) -> Self {
        let port = Port::new();
        let address = port.address();
        let listens = listens.replace("{port}", &address.port().to_string());
        let folder = folder.join(format!("nginx-{}", address.port()));
        fs::create_dir_all(&folder).expect("nginx's folder");
        let own = folder.display();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {own}/{kind};\n"))
            .concat();
        let configuration = format!(
            "daemon off;\nmaster_process off;\npid {own}/pid;\nerror_log {own}/error.log;\n\
             events {{}}\nhttp {{\naccess_log off;\n{temporary}\
             server {{ listen {address}{listens}; location / {{ {answer} }} }}\n}}\n"
        );
        fs::write(folder.join("nginx.conf"), configuration).expect("nginx's configuration");
        let mut child = ending_with_this_thread("nginx")
            .args(["-p", &own.to_string(), "-e", "error.log", "-c", "nginx.conf"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("nginx, which `make test` installs");
        wait_until("nginx listens", || {
            let ended = child.try_wait().expect("nginx's state");
            assert!(ended.is_none(), "nginx does not start; `make test` installs it");
            TcpStream::connect(address).is_ok()
        });
        Self { port, child }
    }

    pub fn port(&self) -> u16 {
        self.port.address().port()
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.port.address())
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
