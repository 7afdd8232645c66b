//! The real binary, run as on a node.

use std::{
    fs,
    os::unix::{fs::FileTypeExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use super::{Kubelet, Sandbox, registry::ending_with_this_thread, wait_until};

/// The default name of the driver.
pub const DRIVER_NAME: &str = "oci.custom.io";

/// The options of a driver.
#[derive(Clone)]
pub struct DriverOptions {
    pub state: PathBuf,
    pub kubelet: PathBuf,
    pub socket: PathBuf,
    pub arguments: Vec<String>,
    /// Variables of the environment of the driver alone.
    pub environment: Vec<(String, String)>,
    log: PathBuf,
}

impl DriverOptions {
    /// Creates options with all directories in the sandbox.
    pub fn new(sandbox: &Sandbox) -> Self {
        let kubelet = sandbox.folder("kubelet");
        Self {
            state: sandbox.folder("state"),
            socket: sandbox.folder("kubelet/plugins/oci.custom.io").join("csi.sock"),
            kubelet,
            arguments: Vec::new(),
            environment: Vec::new(),
            log: sandbox.path().join("driver.log"),
        }
    }

    /// Moves all directories into this one, for a sandbox with several nodes.
    #[must_use]
    pub fn in_folder(mut self, folder: &Path) -> Self {
        let make = |name: &str| {
            let path = folder.join(name);
            fs::create_dir_all(&path).expect("a folder");
            path
        };
        self.kubelet = make("kubelet");
        self.state = make("state");
        self.socket = make("kubelet/plugins/oci.custom.io").join("csi.sock");
        self.log = folder.join("driver.log");
        self
    }

    #[must_use]
    pub fn state(mut self, state: &Path) -> Self {
        state.clone_into(&mut self.state);
        self
    }

    #[must_use]
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    /// Adds these sections of a configuration file.
    #[must_use]
    pub fn configuration(self, sections: &str) -> Self {
        let path = self.log.with_file_name("node.yaml");
        let head = "apiVersion: oci.custom.io/v1alpha1\nkind: NodeConfiguration\n";
        fs::write(&path, format!("{head}{sections}")).expect("a configuration");
        self.argument(&format!("--config={}", path.display()))
    }

    #[must_use]
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn registration_socket(&self) -> PathBuf {
        self.kubelet.join("plugins_registry").join(format!("{DRIVER_NAME}@reg.sock"))
    }

    fn defaults(&self) -> Vec<String> {
        vec![
            "--node-id=test-node".to_owned(),
            "--log-level=debug".to_owned(),
            "--admin-endpoint=".to_owned(),
            "--health-endpoint=".to_owned(),
            "--metrics-endpoint=".to_owned(),
            format!("--endpoint=unix://{}", self.socket.display()),
            format!("--state-dir={}", self.state.display()),
            format!("--kubelet-dir={}", self.kubelet.display()),
            format!("--registration-dir={}", self.kubelet.join("plugins_registry").display()),
        ]
    }

    /// Returns the arguments. The configuration is the test's own, or none. A developer's disk may be fuller than a
    /// node's may be, so limits on free space are off unless the test sets them.
    fn arguments(&self) -> Vec<String> {
        const HEAD: &str = "apiVersion: oci.custom.io/v1alpha1\nkind: NodeConfiguration\n";
        const ROOMY: &str = "\ncache:\n  minFreePercent: 0\n  minFreeInodesPercent: 0\n  \
                             highThresholdPercent: 100\n  lowThresholdPercent: 100\n";
        let path = self.log.with_file_name("roomy.yaml");
        let roomy = format!("--config={}", path.display());
        let mut arguments = self.arguments.clone();
        let given = arguments.iter_mut().find(|argument| argument.starts_with("--config="));
        let text = given.as_ref().map(|given| fs::read_to_string(&given["--config=".len()..]));
        match (given, text) {
            (Some(given), Some(Ok(text))) if text.starts_with(HEAD) && !text.contains("cache:") => {
                fs::write(&path, text + ROOMY).expect("a configuration");
                *given = roomy;
            }
            (Some(_), _) => {}
            (None, _) => {
                fs::write(&path, format!("{HEAD}{ROOMY}")).expect("a configuration");
                arguments.push(roomy);
            }
        }
        arguments
    }

    /// Returns whether the test has set this flag.
    fn is_given(&self, default: &str) -> bool {
        let flag = default.split('=').next();
        self.arguments.iter().any(|argument| argument.split('=').next() == flag)
    }

    /// Starts it without waiting for anything.
    #[track_caller]
    pub fn spawn(&self) -> Driver {
        fs::create_dir_all(self.kubelet.join("plugins_registry")).expect("the kubelet's folder");
        fs::create_dir_all(self.kubelet.join("pods")).expect("the kubelet's folder");
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .expect("the driver's log");
        let mut command = ending_with_this_thread(env!("CARGO_BIN_EXE_csi-driver-oci"));
        clean_environment(&mut command);
        let child = command
            .arg("node")
            .args(self.defaults().iter().filter(|default| !self.is_given(default)))
            .args(self.arguments())
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log twice"))
            .stderr(log)
            .spawn()
            .expect("the driver's binary");
        Driver { options: self.clone(), child }
    }

    /// Starts it and waits until its registration socket exists.
    #[track_caller]
    pub fn start(&self) -> Driver {
        let mut driver = self.spawn();
        driver.wait_until_registered();
        driver
    }
}

/// A process of the driver.
pub struct Driver {
    pub options: DriverOptions,
    child: Child,
}

impl Driver {
    /// Starts it with defaults, in this sandbox.
    #[track_caller]
    pub fn start(sandbox: &Sandbox) -> Self {
        DriverOptions::new(sandbox).start()
    }

    pub fn kubelet(&self) -> Kubelet {
        Kubelet::new(&self.options.kubelet, &self.options.socket)
    }

    pub fn state(&self) -> &Path {
        &self.options.state
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.options.log).unwrap_or_default()
    }

    #[track_caller]
    pub fn wait_until_registered(&mut self) {
        let socket = self.options.registration_socket();
        wait_until("the driver offers itself for registration", || {
            assert!(self.is_running(), "the driver ended at its start:\n{}", self.log());
            accepts(&socket)
        });
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns the number of threads of its process.
    pub fn threads(&self) -> usize {
        fs::read_dir(format!("/proc/{}/task", self.id())).expect("a process").count()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("the driver's state").is_none()
    }

    /// Kills it, as the kernel does when memory is short.
    pub fn kill(mut self) -> DriverOptions {
        self.child.kill().expect("kill the driver");
        self.child.wait().expect("the driver's end");
        self.options.clone()
    }

    /// Terminates it, as Kubernetes ends a container.
    pub fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Kills it while callers still wait for its responses. Afterwards none of its sockets accepts connections.
    pub fn terminate_hard(&self) {
        self.signal(Signal::SIGKILL);
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        waitid(Id::Pid(self.process()), flags).expect("the driver's end");
    }

    fn process(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a process id"))
    }

    fn signal(&self, signal: Signal) {
        kill(self.process(), signal).expect("a signal to the driver");
    }

    /// Waits for its orderly end after [`Self::terminate`].
    #[track_caller]
    pub fn wait(mut self) -> DriverOptions {
        let mut status = None;
        wait_until("the driver ends", || {
            status = self.child.try_wait().expect("the driver's state");
            status.is_some()
        });
        let status = status.expect("a status");
        assert!(status.success(), "the driver ended with {status}");
        self.options.clone()
    }

    /// Restarts it, as an update does.
    #[track_caller]
    pub fn restart(self) -> Self {
        self.terminate();
        self.wait().start()
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the driver's log:\n{}", self.log());
        }
    }
}

/// Returns whether a process listens on this socket.
pub fn accepts(socket: &Path) -> bool {
    fs::metadata(socket).is_ok_and(|metadata| metadata.file_type().is_socket())
        && UnixStream::connect(socket).is_ok()
}

/// Removes variables that the driver would use: its options, and proxies for HTTP.
pub fn clean_environment(command: &mut Command) {
    for name in [
        "NO_COLOR",
        "REGISTRY_AUTH_FILE",
        "XDG_CONFIG_HOME",
        "XDG_RUNTIME_DIR",
        "CSI_ENDPOINT",
        "NODE_NAME",
        "DRIVER_NAME",
        "STATE_DIR",
        "KUBELET_DIR",
        "REGISTRATION_DIR",
        "KUBELET_ENDPOINT",
        "ADMIN_ENDPOINT",
        "HEALTH_ENDPOINT",
        "METRICS_ENDPOINT",
        "CONFIG",
        "FLEET",
        "KUBECONFIG",
        "KUBERNETES_SERVICE_HOST",
        "LEASE_NAME",
        "POD_NAME",
        "POD_NAMESPACE",
        "EVENTS",
        "STARTUP_TAINT",
        "LOG_LEVEL",
        "LOG_FORMAT",
        "http_proxy",
        "HTTP_PROXY",
        "https_proxy",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
        "no_proxy",
        "NO_PROXY",
    ] {
        command.env_remove(name);
    }
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CSI_OCI_")) {
        command.env_remove(name);
    }
}
