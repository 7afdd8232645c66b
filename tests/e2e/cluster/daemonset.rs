//! The rendered DaemonSet on a node: its own command line, mounts and environment start the binary, and a pod's volume
//! is published through it.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::Child,
};

use csi_driver_oci::proto::{csi::v1::NodeGetInfoRequest, pluginregistration::InfoRequest};
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    batch::v1::Job,
    core::v1::{Container, PodSpec, Probe},
};
use serde_json::Value;

use super::{
    container::{Image, Machine, NODE_NAME},
    only, rendered,
};
use crate::support::{Kubelet, Layer, Manifest, Volume, accepts, own_registry, wait_until};

/// The driver of one rendered DaemonSet, on a node of its own.
struct Deployed {
    machine: Machine,
    pod: PodSpec,
    container: Container,
    process: Child,
    driver_name: String,
    kubelet_dir: String,
}

impl Deployed {
    #[track_caller]
    fn start(objects: &[Value]) -> Self {
        let daemonset: DaemonSet =
            serde_json::from_value(only(objects, "DaemonSet").clone()).expect("a DaemonSet");
        let pod = daemonset.spec.and_then(|spec| spec.template.spec).expect("a pod");
        let container = pod.containers[0].clone();
        let flag = |name: &str| {
            let prefix = format!("--{name}=");
            let mut arguments = container.args.iter().flatten();
            arguments.find_map(|argument| argument.strip_prefix(&prefix)).map(str::to_owned)
        };
        let kubelet_dir = flag("kubelet-dir").expect("a kubelet's folder");
        let mut machine = Machine::new();
        for folder in ["plugins_registry", "pods"] {
            fs::create_dir_all(machine.path(&kubelet_dir).join(folder)).expect("the kubelet's");
        }
        let bundle = machine.path("/etc/ssl/certs/ca-certificates.crt");
        fs::create_dir_all(bundle.parent().expect("a folder")).expect("the node's certificates");
        fs::write(bundle, "").expect("the node's certificates");
        machine.files = files(&pod, objects);
        let process = machine.start(&pod, &container, &Image::of_the_driver());
        let driver_name = flag("driver-name").expect("a name");
        let mut deployed = Self { machine, pod, container, process, driver_name, kubelet_dir };
        deployed.wait_until_ready();
        deployed
    }

    fn restart(&mut self) {
        self.process.kill().expect("kill the driver");
        self.process.wait().expect("its end");
        self.process = self.machine.start(&self.pod, &self.container, &Image::of_the_driver());
        self.wait_until_ready();
    }

    /// Until its own probe says what the kubelet wants to hear, or, without registration, until it serves.
    fn wait_until_ready(&mut self) {
        let sidecar = self.pod.containers.len() > 1;
        let socket = if sidecar { self.socket() } else { self.registration_socket() };
        wait_until("the driver serves", || {
            let ended = self.process.try_wait().expect("the driver's state");
            assert!(ended.is_none(), "the driver ended:\n{}", self.machine.log(&self.container));
            accepts(&socket)
        });
    }

    /// Paths that the kubelet knows, as this process sees them.
    fn socket(&self) -> PathBuf {
        let folder = format!("{}/plugins/{}/csi.sock", self.kubelet_dir, self.driver_name);
        self.machine.path(&folder)
    }

    fn registration_socket(&self) -> PathBuf {
        let folder = format!("{}/plugins_registry/{}@reg.sock", self.kubelet_dir, self.driver_name);
        self.machine.path(&folder)
    }

    fn kubelet(&self) -> Kubelet {
        Kubelet::new(&self.machine.path(&self.kubelet_dir), &self.socket())
    }

    /// Publishes at the path that the kubelet has on the node, which this process sees below the node's folder.
    #[track_caller]
    fn publish(&self, volume: &Volume) {
        self.kubelet().prepare(volume);
        let mut request = volume.request.clone();
        request.target_path = self.on_the_node(volume);
        if let Err(status) = self.kubelet().publish_request(request) {
            let log = self.machine.log(&self.container);
            panic!("publishing failed with {:?}: {}\n{log}", status.code(), status.message());
        }
        volume.assert_mounted();
    }

    fn on_the_node(&self, volume: &Volume) -> String {
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

/// What the API server would give the kubelet for the pod's configuration maps and secrets.
fn files(pod: &PodSpec, objects: &[Value]) -> BTreeMap<String, BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for volume in pod.volumes.iter().flatten() {
        if let Some(source) = &volume.config_map {
            let map = objects.iter().find(|object| {
                object["kind"] == "ConfigMap" && object["metadata"]["name"] == source.name
            });
            let data = map.map_or_else(
                // Somebody else's.
                || serde_json::json!({"config.yaml": "apiVersion: oci.custom.io/v1alpha1\nkind: NodeConfiguration\n"}),
                |map| map["data"].clone(),
            );
            files.insert(volume.name.clone(), serde_json::from_value(data).expect("texts"));
        }
        if let Some(source) = &volume.secret {
            let items = source.items.iter().flatten();
            let content = items.map(|item| (item.path.clone(), r#"{"auths": {}}"#.to_owned()));
            files.insert(volume.name.clone(), content.collect());
        }
    }
    files
}

/// Asks what the kubelet would ask, from the node: the status line.
fn ask(probe: &Probe) -> String {
    let http = probe.http_get.as_ref().expect("an HTTP probe");
    let k8s_openapi::apimachinery::pkg::util::intstr::IntOrString::Int(port) = http.port else {
        panic!("a port by name");
    };
    let port = u16::try_from(port).expect("a port");
    // Without a host the kubelet asks the pod's address, where the loopback stands for it.
    let host = http.host.as_deref().unwrap_or("127.0.0.1");
    let path = http.path.as_deref().unwrap_or("/");
    let mut answer = String::new();
    let asked = TcpStream::connect((host, port)).and_then(|mut stream| {
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
        stream.read_to_string(&mut answer)
    });
    asked.map_or_else(
        |error| error.to_string(),
        |_| answer.lines().next().unwrap_or_default().to_owned(),
    )
}

/// Registration, probes, a volume that outlives the driver, and its end.
#[track_caller]
fn serves(objects: &[Value]) {
    let mut deployed = Deployed::start(objects);
    let sidecars = deployed.pod.containers.len() > 1;
    let kubelet = deployed.kubelet();
    let info = kubelet.node(async |mut client| client.node_get_info(NodeGetInfoRequest {}).await);
    assert_eq!(info.expect("NodeGetInfo").node_id, NODE_NAME);
    if sidecars {
        assert!(!deployed.registration_socket().exists(), "two would register");
    } else {
        let registration = kubelet
            .registration(&deployed.registration_socket(), async |mut client| {
                client.get_info(InfoRequest {}).await
            });
        let info = registration.expect("GetInfo");
        assert_eq!(info.name, deployed.driver_name);
        assert_eq!(deployed.machine.path(&info.endpoint), deployed.socket());
        let liveness = deployed.container.liveness_probe.as_ref().expect("a liveness probe");
        let mut answer = String::new();
        wait_until("the liveness probe is answered", || {
            answer = ask(liveness);
            answer.contains("200")
        });
        // Ready is more: the kubelet has to say that it has registered the driver.
        let readiness = deployed.container.readiness_probe.as_ref().expect("a readiness probe");
        assert!(ask(readiness).contains("503"), "{}", ask(readiness));
    }

    let registry = own_registry();
    Manifest::artifact([Layer::titled("tool", "#!/bin/sh\necho hello\n")]).push(
        &registry,
        "team/tool",
        "v1",
    );
    let volume = kubelet.new_volume(&format!("{}/team/tool:v1", registry.host()));
    deployed.publish(&volume);
    let file = volume.target().join("tool");
    assert_eq!(fs::metadata(&file).expect("the file").permissions().mode() & 0o777, 0o555);

    deployed.restart();
    volume.assert_mounted();
    assert!(file.exists());
    deployed.publish(&volume);
    let target = deployed.on_the_node(&volume);
    kubelet.unpublish_request(&volume.request.volume_id, &target).expect("unpublish");
    assert!(!volume.target().exists());
}

/// A test for each row, so that rows run side by side and each failure has its row's name.
macro_rules! rows {
    ($group:literal: $($test:ident $row:literal),+ $(,)?) => {
        $(
            #[test]
            fn $test() {
                serves(&rendered($group)[$row]);
            }
        )+
    };
}

rows! { "chart":
    the_defaults_serve "defaults",
    everything_switched_on_serves "everything",
    the_pod_network_serves "pod-network",
    a_pod_with_sidecars_serves "sidecars",
    more_certificate_authorities_serve "tls",
    what_others_make_serves "given",
}

rows! { "kustomize":
    the_plain_manifests_serve "deploy",
    another_kubelets_folder_serves "deploy__overlays__k0s",
    a_snaps_folder_serves "deploy__overlays__microk8s",
}

#[test]
fn every_row_is_started_by_a_test() {
    let rows: Vec<String> = rendered("chart").into_keys().collect();
    assert_eq!(rows, ["defaults", "everything", "given", "pod-network", "sidecars", "tls"]);
}

#[test]
fn a_purge_deletes_content_but_not_under_a_driver_or_a_pod() {
    let objects = &rendered("chart")["everything"];
    let mut deployed = Deployed::start(objects);
    let job = objects.iter().find(|object| object["kind"] == "Job").expect("a job");
    let job: Job = serde_json::from_value(job.clone()).expect("a job");
    let pod = job.spec.and_then(|spec| spec.template.spec).expect("a pod");
    let container = pod.containers[0].clone();
    let programs = ["sh", "grep", "flock", "find", "rm"];
    let image = Image::of_libraries(&[]).with_programs(&programs);
    let purges = |deployed: &Deployed| {
        let mut process = deployed.machine.start(&pod, &container, &image);
        process.wait().expect("the job's end").success()
    };
    let state = deployed.machine.path("/data/artifacts");
    let names = || -> Vec<_> {
        let entries = fs::read_dir(&state).expect("the state");
        entries.map(|entry| entry.expect("an entry").file_name()).collect()
    };
    assert!(names().len() > 1, "the driver made its store");

    assert!(!purges(&deployed), "the driver runs");
    deployed.process.kill().expect("kill the driver");
    deployed.process.wait().expect("its end");
    let pods = deployed.machine.path(&deployed.kubelet_dir).join("pods");
    let volume = pods.join("uid/volumes/kubernetes.io~csi/artifact");
    fs::create_dir_all(&volume).expect("a pod's volume");
    let data = volume.join("vol_data.json");
    fs::write(&data, format!(r#"{{"driverName":"{}"}}"#, deployed.driver_name)).expect("its data");
    assert!(!purges(&deployed), "a pod has a volume");
    assert!(names().len() > 1, "nothing is deleted so far");
    fs::remove_file(data).expect("the volume's end");
    assert!(purges(&deployed), "{}", deployed.machine.log(&container));
    assert_eq!(names(), ["lock"]);
}
