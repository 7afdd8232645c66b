//! Debian's docker-registry, on a free port of the loopback.

use std::{
    fmt::Write as _,
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{OnceLock, mpsc},
};

use super::{Port, run, tool, wait_until};

/// A running registry. Its process ends with the value, or with this process at the latest.
pub struct Registry {
    port: Port,
    child: Child,
    directory: tempfile::TempDir,
}

/// Returns the registry that all tests of this process share. Each test uses repositories of its own.
pub fn registry() -> &'static Registry {
    static SHARED: OnceLock<Registry> = OnceLock::new();
    SHARED.get_or_init(|| {
        // `setpriv --pdeathsig` ends the child with the thread that started it: this one never ends by itself.
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            let registry = Registry::start(&RegistryKind::default());
            remove_with_this_process(registry.directory.path());
            let _ = sender.send(registry);
            loop {
                std::thread::park();
            }
        });
        receiver.recv().expect("the shared registry's thread")
    })
}

/// Starts a registry for the calling test, for one that has a network of its own.
pub fn own_registry() -> Registry {
    Registry::start(&RegistryKind::default())
}

/// Starts a registry for the calling test that requires this user and password.
pub fn private_registry(user: &str, password: &str) -> Registry {
    Registry::start(&RegistryKind {
        credentials: Some((user, password)),
        ..RegistryKind::default()
    })
}

/// The properties of a registry.
#[derive(Clone, Copy, Default)]
pub struct RegistryKind<'a> {
    /// User and password; `None` lets everyone in.
    pub credentials: Option<(&'a str, &'a str)>,
    /// Certificate, key, and the authority of the permitted clients.
    pub tls: Option<(&'a Path, &'a Path, Option<&'a Path>)>,
    /// The registry of which it is a pull-through mirror.
    pub mirror_of: Option<&'a str>,
    /// A registry whose content it shares.
    pub content_of: Option<&'a Registry>,
}

impl Registry {
    #[track_caller]
    pub fn start(kind: &RegistryKind<'_>) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("e2e-registry")
            .tempdir_in("/var/tmp")
            .expect("a folder");
        let port = Port::new();
        let address = port.address();
        let configuration = configuration(directory.path(), address, kind);
        let path = directory.path().join("config.yml");
        fs::write(&path, configuration).expect("the registry's configuration");
        let log = fs::File::create(directory.path().join("log")).expect("the registry's log");
        let mut command = ending_with_this_thread("docker-registry");
        command.arg("serve").arg(&path);
        // Variables of the environment would change the configuration.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("REGISTRY_")) {
            command.env_remove(name);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log twice"))
            .stderr(log)
            .spawn()
            .expect("docker-registry, which `make test` installs");
        wait_until("the registry listens", || {
            let ended = child.try_wait().expect("the registry's state");
            assert!(ended.is_none(), "docker-registry does not start; `make test` installs it");
            TcpStream::connect(address).is_ok()
        });
        Self { port, child, directory }
    }

    /// Returns `127.0.0.1:port`, as in references.
    pub fn host(&self) -> String {
        self.address().to_string()
    }

    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// Ends its process. Its port stays reserved.
    pub fn go_down(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.go_down();
    }
}

/// Returns a command whose process is killed when the thread that starts it ends, however it ends.
pub fn ending_with_this_thread(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = tool("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(program);
    command
}

/// Removes a directory when this process ends. Statics are never dropped, so another process does it: one that sees
/// this one's end of a pipe close.
#[expect(clippy::zombie_processes, reason = "it ends after this process does")]
fn remove_with_this_process(directory: &Path) {
    let mut remover = Command::new("sh")
        .args(["-c", "cat && rm -rf \"$1\"", "sh"])
        .arg(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("sh");
    std::mem::forget(remover.stdin.take());
}

fn configuration(directory: &Path, address: SocketAddr, kind: &RegistryKind<'_>) -> String {
    let storage: PathBuf =
        kind.content_of.map_or(directory, |other| other.directory.path()).join("storage");
    let mut text = format!(
        "version: 0.1\n\
         log: {{level: error, accesslog: {{disabled: true}}}}\n\
         storage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: true}}}}\n\
         http:\n  addr: \"{address}\"\n  secret: tests\n",
        storage.display()
    );
    if let Some((certificate, key, clients)) = kind.tls {
        let (certificate, key) = (certificate.display(), key.display());
        let _ = writeln!(text, "  tls:\n    certificate: {certificate}\n    key: {key}");
        if let Some(clients) = clients {
            let _ = writeln!(text, "    clientcas: [{}]", clients.display());
        }
    }
    if let Some((user, password)) = kind.credentials {
        let passwords = directory.join("htpasswd");
        fs::write(&passwords, run(tool("htpasswd").args(["-nbB", user, password])))
            .expect("the passwords");
        let path = passwords.display();
        let _ = writeln!(text, "auth: {{htpasswd: {{realm: tests, path: {path}}}}}");
    }
    if let Some(upstream) = kind.mirror_of {
        let _ = writeln!(text, "proxy: {{remoteurl: \"{upstream}\"}}");
    }
    text
}
