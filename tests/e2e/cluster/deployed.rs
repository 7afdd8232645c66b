//! The driver as a rendered `DaemonSet` deploys it, on a node of its own.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::PathBuf,
    process::Child,
};

use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1::{Container, PodSpec, Probe},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use serde_json::Value;
use tonic::Status;

use super::container::{Image, Machine};
use crate::support::{Kubelet, Volume, accepts, wait_until};

/// The node's files that the chart mounts: certificates, credentials and plugins for them.
const FILES_OF_THE_NODE: [(&str, &str); 4] = [
    ("/etc/ssl/certs/ca-certificates.crt", ""),
    ("/var/lib/kubelet/config.json", r#"{"auths": {}}"#),
    (
        "/etc/kubernetes/credential-provider.yaml",
        "apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: example
  matchImages: [registry.example.com]
  defaultCacheDuration: 1h
  apiVersion: credentialprovider.kubelet.k8s.io/v1
",
    ),
    ("/usr/libexec/kubernetes/credential-provider/example", "#!/bin/sh\n"),
];

/// The driver of one rendered DaemonSet, on a node of its own.
pub struct Deployed {
    pub machine: Machine,
    pub pod: PodSpec,
    pub container: Container,
    pub process: Child,
    pub driver_name: String,
    pub kubelet_dir: String,
}

impl Deployed {
    #[track_caller]
    pub fn start(objects: &[Value]) -> Self {
        let machine = Machine::new();
        // A disk of its own, since this machine's may be too full for a node's floor of free space.
        machine.mount_disk(&flag(&driver_of(objects).1, "state-dir"));
        Self::start_on(machine, objects)
    }

    /// Starts it on an existing node.
    #[track_caller]
    pub fn start_on(mut machine: Machine, objects: &[Value]) -> Self {
        let (pod, container) = driver_of(objects);
        let kubelet_dir = flag(&container, "kubelet-dir");
        for folder in ["plugins_registry", "pods"] {
            fs::create_dir_all(machine.path(&kubelet_dir).join(folder)).expect("the kubelet's");
        }
        for (path, content) in FILES_OF_THE_NODE {
            let path = machine.path(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder of the node");
            fs::write(path, content).expect("a file of the node");
        }
        machine.files = files(&pod, objects);
        let process = machine.start(&pod, &container, &Image::of_the_driver());
        let driver_name = flag(&container, "driver-name");
        let mut deployed = Self { machine, pod, container, process, driver_name, kubelet_dir };
        deployed.wait_until_ready();
        deployed
    }

    pub fn restart(&mut self) {
        self.process.kill().expect("kill the driver");
        self.process.wait().expect("its end");
        self.process = self.machine.start(&self.pod, &self.container, &Image::of_the_driver());
        self.wait_until_ready();
    }

    /// Waits until the readiness probe succeeds or, without registration, until CSI is served.
    fn wait_until_ready(&mut self) {
        let sidecar = self.pod.containers.len() > 1;
        let socket = if sidecar { self.socket() } else { self.registration_socket() };
        wait_until("the driver serves", || {
            let ended = self.process.try_wait().expect("the driver's state");
            assert!(ended.is_none(), "the driver ended:\n{}", self.machine.log(&self.container));
            accepts(&socket)
        });
    }

    /// Returns the socket's path as this process sees it.
    pub fn socket(&self) -> PathBuf {
        let folder = format!("{}/plugins/{}/csi.sock", self.kubelet_dir, self.driver_name);
        self.machine.path(&folder)
    }

    pub fn registration_socket(&self) -> PathBuf {
        let folder = format!("{}/plugins_registry/{}@reg.sock", self.kubelet_dir, self.driver_name);
        self.machine.path(&folder)
    }

    /// Returns the port of the metrics, if they are on.
    pub fn metrics_port(&self) -> Option<i32> {
        let endpoint = flag(&self.container, "metrics-endpoint");
        endpoint
            .rsplit(':')
            .next()
            .filter(|port| !port.is_empty())
            .map(|port| port.parse().expect("a port"))
    }

    pub fn kubelet(&self) -> Kubelet {
        Kubelet::new(&self.machine.path(&self.kubelet_dir), &self.socket())
    }

    #[track_caller]
    pub fn publish(&self, volume: &Volume) {
        // The kubelet calls again while the driver starts.
        wait_until("an answer of a driver that has started", || match self.try_publish(volume) {
            Err(status) if status.message().contains("it is still starting") => false,
            Err(status) => {
                let log = self.machine.log(&self.container);
                panic!("publishing failed with {:?}: {}\n{log}", status.code(), status.message());
            }
            Ok(()) => true,
        });
        volume.assert_mounted();
    }

    /// Publishes at the kubelet's path on the node, which this process sees below the node's directory.
    pub fn try_publish(&self, volume: &Volume) -> Result<(), Status> {
        self.kubelet().prepare(volume);
        let mut request = volume.request.clone();
        request.target_path = self.on_the_node(volume);
        self.kubelet().publish_request(request)
    }

    pub fn on_the_node(&self, volume: &Volume) -> String {
        let path = volume.target().strip_prefix(&self.machine.root).expect("a path of the node");
        format!("/{}", path.display())
    }
}

impl Drop for Deployed {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("the container's log:\n{}", self.machine.log(&self.container));
        }
    }
}

/// Returns the pod of the rendered `DaemonSet`, and the driver's container in it.
fn driver_of(objects: &[Value]) -> (PodSpec, Container) {
    let name = "/spec/template/spec/containers/0/name";
    let is_the_drivers = |object: &&Value| {
        object["kind"] == "DaemonSet"
            && object.pointer(name).is_some_and(|name| name == "csi-driver-oci")
    };
    let daemonset = objects.iter().find(is_the_drivers).expect("the driver's DaemonSet");
    let daemonset: DaemonSet = serde_json::from_value(daemonset.clone()).expect("a DaemonSet");
    let pod = daemonset.spec.and_then(|spec| spec.template.spec).expect("a pod");
    let container = pod.containers[0].clone();
    (pod, container)
}

/// Returns the value of a flag on the container's command line.
pub fn flag(container: &Container, name: &str) -> String {
    let prefix = format!("--{name}=");
    let mut arguments = container.args.iter().flatten();
    let value = arguments.find_map(|argument| argument.strip_prefix(&prefix));
    value.unwrap_or_else(|| panic!("no --{name}")).to_owned()
}

/// Returns the files that the kubelet gets from the API server for the pod's config maps and secrets.
pub fn files(pod: &PodSpec, objects: &[Value]) -> BTreeMap<String, BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for volume in pod.volumes.iter().flatten() {
        if let Some(source) = &volume.config_map {
            let map = objects.iter().find(|object| {
                object["kind"] == "ConfigMap" && object["metadata"]["name"] == source.name
            });
            let data = map.map_or_else(
                // An object of another author.
                || serde_json::json!({"config.yaml": "apiVersion: oci.custom.io/v1alpha1\nkind: NodeConfiguration\n"}),
                |map| map["data"].clone(),
            );
            // The job that writes a map of the chart has not run yet.
            let data: Option<_> = serde_json::from_value(data).expect("texts");
            files.insert(volume.name.clone(), data.unwrap_or_default());
        }
        if let Some(source) = &volume.secret {
            let items = source.items.iter().flatten();
            let content = items.map(|item| (item.path.clone(), r#"{"auths": {}}"#.to_owned()));
            files.insert(volume.name.clone(), content.collect());
        }
    }
    files
}

/// Runs a probe from the node as the kubelet does. Returns the status line, or the error.
pub fn ask(probe: &Probe, container: &Container) -> String {
    let http = probe.http_get.as_ref().expect("an HTTP probe");
    let port = match &http.port {
        IntOrString::Int(port) => *port,
        IntOrString::String(name) => {
            let mut ports = container.ports.iter().flatten();
            let port = ports.find(|port| port.name.as_ref() == Some(name));
            port.unwrap_or_else(|| panic!("no port {name}")).container_port
        }
    };
    // Without a host the kubelet calls the pod's address, which is the loopback here.
    let host = http.host.as_deref().unwrap_or("127.0.0.1");
    let answer = request("GET", host, port, http.path.as_deref().unwrap_or("/"));
    answer.lines().next().unwrap_or_default().to_owned()
}

/// Returns a whole response, or the error.
pub fn request(method: &str, host: &str, port: i32, path: &str) -> String {
    let port = u16::try_from(port).expect("a port");
    let mut answer = String::new();
    let asked = TcpStream::connect((host, port)).and_then(|mut stream| {
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )?;
        stream.read_to_string(&mut answer)
    });
    asked.map_or_else(|error| error.to_string(), |_| answer)
}
