//! A cluster with preloads or claims: a simulated API server, the real controller and real node plugins.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

use serde_json::{Value, json};

use super::{
    Driver, DriverOptions, Layer, Manifest, Registry, Sandbox,
    api_server::{ApiServer, Kind},
    clean_environment, ending_with_this_thread, registry, unique, wait_until,
};

/// The namespace of all preloads here.
pub const NAMESPACE: &str = "team";

/// A cluster: an API server, and the processes that use it.
pub struct Cluster {
    pub drivers: Vec<Driver>,
    pub api: ApiServer,
    pub sandbox: Sandbox,
    registry: String,
    kubeconfig: PathBuf,
}

impl Cluster {
    /// Creates a cluster with these nodes, without drivers yet.
    pub fn new(nodes: &[&str]) -> Self {
        Self::before(registry(), nodes)
    }

    /// Creates a cluster with a registry of its own.
    pub fn before(registry: &Registry, nodes: &[&str]) -> Self {
        let (sandbox, api) = (Sandbox::new(), ApiServer::new());
        let address = api.listen();
        let kubeconfig = sandbox.path().join("kubeconfig");
        let text = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("http://{address}")}}],
            "users": [{"name": "test", "user": {"token": "none"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        fs::write(&kubeconfig, text.to_string()).expect("a kubeconfig");
        let cluster =
            Self { drivers: Vec::new(), api, registry: registry.host(), sandbox, kubeconfig };
        for node in nodes {
            cluster.join(node);
        }
        cluster
    }

    pub fn join(&self, node: &str) {
        self.api.apply(json!({
            "kind": "Node",
            "metadata": {"name": node, "labels": {"kubernetes.io/hostname": node}},
        }));
    }

    pub fn options(&self, node: &str) -> DriverOptions {
        let room = self.sandbox.folder(node);
        let mut options = DriverOptions::new(&self.sandbox)
            .in_folder(&room)
            .argument("--preload")
            .argument(&format!("--node-id={node}"))
            .argument(&format!("--admin-endpoint=unix://{}/admin.sock", room.display()));
        options = options.environment("KUBECONFIG", &self.kubeconfig.to_string_lossy());
        options
    }

    pub fn start_node(&mut self, node: &str) {
        let driver = self.options(node).start();
        self.drivers.push(driver);
    }

    pub fn controller(&self) -> Controller {
        self.controller_with(&[])
    }

    pub fn controller_with(&self, arguments: &[&str]) -> Controller {
        let log = self.sandbox.path().join("controller.log");
        Controller::start(&self.kubeconfig, &log, arguments)
    }

    pub fn preload(&self, name: &str, spec: Value) {
        let metadata = json!({"namespace": NAMESPACE, "name": name});
        self.api.apply(json!({"kind": "ArtifactPreload", "metadata": metadata, "spec": spec}));
    }

    pub fn status(&self, name: &str) -> Value {
        self.api.get(Kind::Preload, NAMESPACE, name)["status"].clone()
    }

    pub fn condition(&self, name: &str, kind: &str) -> Value {
        let object = self.api.get(Kind::Preload, NAMESPACE, name);
        let generation = &object["metadata"]["generation"];
        let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let is = |one: &Value| one["type"] == kind && one["observedGeneration"] == *generation;
        conditions.into_iter().find(is).unwrap_or_default()
    }

    #[track_caller]
    pub fn wait_for(&self, name: &str, reason: &str) {
        let mut last = String::new();
        wait_until(&format!("{name} is {reason}"), || {
            let condition = self.condition(name, "Ready");
            let said = condition.to_string();
            if said != last {
                eprintln!("{name}: {said}");
                last = said;
            }
            condition["reason"] == reason
        });
    }

    pub fn wanted(&self, node: &str) -> Vec<Value> {
        let object = self.api.get(Kind::NodeArtifacts, "", node);
        object["spec"]["artifacts"].as_array().cloned().unwrap_or_default()
    }

    /// Returns owners and references of a node's pins for preloads.
    pub fn pins(&self, node: &str) -> Vec<(String, String)> {
        let folder = self.sandbox.path().join(node).join("state/pins");
        let mut pins = Vec::new();
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let Ok(bytes) = fs::read(entry.path()) else { continue };
            let pin: Value = serde_json::from_slice(&bytes).unwrap_or_default();
            let text = |field: &str| pin[field].as_str().unwrap_or_default().to_owned();
            if text("owner").starts_with("preload/") {
                pins.push((text("owner"), text("reference")));
            }
        }
        pins.sort();
        pins
    }

    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.registry)
    }

    pub fn artifact(&self, tag: &str) -> (String, String) {
        let repository = unique("fleet");
        self.push(&repository, tag)
    }

    /// Pushes a new artifact. Returns its reference and digest.
    pub fn push(&self, repository: &str, tag: &str) -> (String, String) {
        let layer = Layer::titled("file.txt", format!("{repository} {tag} {}", unique("v")));
        let digest = Manifest::artifact([layer]).push(registry(), repository, tag);
        (self.reference(&format!("{repository}:{tag}")), digest)
    }
}

/// The controller's process.
pub struct Controller(Child, PathBuf);

impl Controller {
    fn start(kubeconfig: &Path, log: &Path, arguments: &[&str]) -> Self {
        let file = fs::File::options().create(true).append(true).open(log).expect("a log");
        let mut command = ending_with_this_thread(env!("CARGO_BIN_EXE_csi-driver-oci"));
        clean_environment(&mut command);
        let child = command
            .args(["controller", "--health-endpoint=", "--metrics-endpoint=", "--log-level=debug"])
            .arg(format!("--identity={}", unique("controller")))
            .arg("--namespace=csi-driver-oci")
            .args(arguments)
            .env("KUBECONFIG", kubeconfig)
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("the log twice"))
            .stderr(file)
            .spawn()
            .expect("the controller");
        Self(child, log.to_owned())
    }

    /// Terminates it, as an update does: it releases its lease.
    pub fn end(&mut self) {
        let process = i32::try_from(self.0.id()).expect("a process");
        let process = nix::unistd::Pid::from_raw(process);
        nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGTERM).expect("a signal");
        assert!(self.0.wait().expect("its end").success());
    }

    pub fn kill(&mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("its end");
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        if std::thread::panicking() {
            eprintln!("the controller's log:\n{}", fs::read_to_string(&self.1).unwrap_or_default());
        }
    }
}
