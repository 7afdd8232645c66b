//! A `CustomPrometheus` from its artifact to its running process: pushed by our script, composed, published by the
//! deployed driver, and rolled forth and back.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Child,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use k8s_openapi::api::{
    apps::v1::StatefulSet,
    core::v1::{Container, PodSpec},
};
use serde_json::{Value, json};

use super::{
    check,
    container::Image,
    deployed::{Deployed, ask, request},
    python, rendered, said,
};
use crate::support::{Registry, Volume, own_registry, run, tool, wait_until};

#[test]
fn wrong_objects_are_refused_and_right_ones_get_defaults() {
    check("crossplane_schema");
}

#[test]
fn both_compositions_make_the_same() {
    check("crossplane_compositions");
}

#[test]
fn the_gated_composition_rolls_only_to_what_every_node_has() {
    check("crossplane_gate");
    check("crossplane_preload");
}

#[test]
fn crossplane_may_make_what_is_composed() {
    check("crossplane_rights");
}

/// What the Composition makes of a `CustomPrometheus`.
#[track_caller]
fn compose(composition: &str, specification: Value) -> BTreeMap<String, Value> {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("xr.json");
    let object = json!({
        "apiVersion": "custom.prometheus.io/v1alpha1",
        "kind": "CustomPrometheus",
        "metadata": {"name": "billing", "namespace": "billing-services"},
        "spec": specification,
    });
    fs::write(&file, object.to_string()).expect("the object");
    let output = python("compose.py").arg(composition).arg(&file).output().expect("python");
    assert!(output.status.success(), "{}", said(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Debian's Prometheus: the program itself, not the wrapper that finds its libraries.
fn program(name: &str) -> PathBuf {
    let tools = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("tools");
    let unpacked = tools.join("root/usr/bin").join(name);
    if unpacked.exists() {
        return unpacked;
    }
    run(tool("sh").args(["-c", &format!("command -v {name}")])).trim().into()
}

/// Pushes this folder for this machine's platform; returns what the script prints.
#[track_caller]
fn push(registry: &Registry, tag: &str, build: &Path) -> String {
    let reference = format!("{}/team/prometheus:{tag}", registry.host());
    let architecture = crate::support::node_architecture();
    let pair = format!("linux/{architecture}={}", build.display());
    run(super::publish::push(&reference, build).arg(pair)).trim().to_owned()
}

/// The pod of the `StatefulSet`, as its controller and the kubelet make it.
fn pod_of(composed: &BTreeMap<String, Value>) -> PodSpec {
    let statefulset: StatefulSet =
        serde_json::from_value(composed["statefulset"].clone()).expect("a StatefulSet");
    let specification = statefulset.spec.expect("a specification");
    let mut pod = specification.template.spec.expect("a pod");
    for claim in specification.volume_claim_templates.iter().flatten() {
        // What the claim is bound to does not matter here.
        let name = claim.metadata.name.clone().expect("a name");
        let volume = json!({"name": name, "emptyDir": {}});
        pod.volumes.get_or_insert_default().push(serde_json::from_value(volume).expect("a volume"));
    }
    pod
}

/// Publishes the pod's artifact through the driver, with the attributes that the pod has.
#[track_caller]
fn publish(deployed: &mut Deployed, pod: &PodSpec) -> Volume {
    let source =
        pod.volumes.iter().flatten().find_map(|volume| volume.csi.as_ref()).expect("an artifact");
    assert_eq!(source.driver, deployed.driver_name);
    let mut volume = deployed.kubelet().new_volume("");
    volume.request.volume_context.remove("reference");
    volume.request.volume_context.extend(source.volume_attributes.clone().unwrap_or_default());
    volume.request.readonly = source.read_only == Some(true);
    deployed.publish(&volume);
    deployed.machine.published.insert("artifact".to_owned(), volume.target().to_owned());
    volume
}

struct Running<'a> {
    container: &'a Container,
    process: Child,
}

impl<'a> Running<'a> {
    #[track_caller]
    fn start(deployed: &Deployed, pod: &PodSpec, container: &'a Container) -> Self {
        let image = Image::of_libraries(&[&program("prometheus")]);
        let process = deployed.machine.start(pod, container, &image);
        let mut running = Self { container, process };
        let probe = container.startup_probe.as_ref().expect("a startup probe");
        let mut answer = String::new();
        wait_until("Prometheus is ready", || {
            let ended = running.process.try_wait().expect("its state");
            let log = deployed.machine.log(container);
            assert!(ended.is_none(), "Prometheus ended:\n{log}");
            answer = ask(probe, running.container);
            answer.contains("200")
        });
        let liveness = container.liveness_probe.as_ref().expect("a liveness probe");
        assert!(ask(liveness, container).contains("200"));
        running
    }

    /// Waits until it scrapes this job, in whichever file that is configured.
    #[track_caller]
    fn wait_until_it_scrapes(&self, job: &str) {
        wait_until("Prometheus scrapes the job", || {
            request("GET", "127.0.0.1", self.port(), "/api/v1/scrape_pools").contains(job)
        });
    }

    fn port(&self) -> i32 {
        self.container.ports.as_ref().expect("ports")[0].container_port
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Ends the reader, also when the test fails before it would.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_prometheus_runs_from_its_artifact_and_rolls_forth_and_back() {
    let mut deployed = Deployed::start(&rendered("chart")["defaults"]);
    let registry = own_registry();
    let build = tempfile::tempdir_in("/var/tmp").expect("a folder");
    fs::create_dir_all(build.path().join("bin")).expect("a folder");
    fs::create_dir_all(build.path().join("config")).expect("a folder");
    // A symbolic link would be packed as one.
    fs::copy(program("prometheus"), build.path().join("bin/prometheus")).expect("Prometheus");
    let version = build.path().join("config/version");
    for tag in ["v1", "v2"] {
        fs::write(&version, tag).expect("a version");
        let pinned = push(&registry, tag, build.path());
        assert!(pinned.contains(&format!(":{tag}@sha256:")), "{pinned}");
    }

    let repository = format!("{}/team/prometheus", registry.host());
    let specification = |tag: &str| {
        json!({
            "ociRegistry": repository,
            "version": tag,
            "scrapeConfig": "- job_name: users-own\n  static_configs:\n    - targets: [localhost:1]\n",
        })
    };
    let composed = compose("customprometheus", specification("v1"));
    let pod = pod_of(&composed);
    let container = &pod.containers[0];
    let configuration: BTreeMap<String, String> =
        serde_json::from_value(composed["config"]["data"].clone()).expect("texts");
    deployed.machine.files.insert("config".to_owned(), configuration);
    let first = publish(&mut deployed, &pod);

    let mut promtool = container.clone();
    "promtool".clone_into(&mut promtool.name);
    let words = ["/usr/bin/promtool", "check", "config", "/etc/prometheus/prometheus.yml"];
    promtool.command = Some(words.map(str::to_owned).to_vec());
    promtool.args = None;
    let image = Image::of_libraries(&[&program("promtool")])
        .with_file("/usr/bin/promtool", &program("promtool"));
    let checked = deployed.machine.start(&pod, &promtool, &image).wait().expect("promtool");
    let said = deployed.machine.log(&promtool);
    assert!(checked.success() && said.contains("SUCCESS"), "{said}");

    let running = Running::start(&deployed, &pod, container);
    running.wait_until_it_scrapes("users-own");
    let jobs = deployed.machine.volume("config").join("user-scrape.yml");
    fs::write(jobs, "scrape_configs:\n- job_name: changed\n").expect("a changed configuration");
    let reloaded = request("POST", "127.0.0.1", running.port(), "/-/reload");
    assert!(reloaded.starts_with("HTTP/1.1 200"), "{reloaded}");
    running.wait_until_it_scrapes("changed");

    // Forth, and back while the registry is down: whoever reads the first version all the while does not notice.
    let (reads, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let file = first.target().join("config/version");
    std::thread::scope(|scope| {
        // The thread is in this thread's mount namespace, being started by it.
        let reader = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert_eq!(fs::read_to_string(&file).expect("the file"), "v1");
                reads.fetch_add(1, Ordering::Relaxed);
            }
        });
        let done = Done(&done);
        let newer = compose("customprometheus-gated", specification("v2"));
        // The gate's DaemonSet brings it onto the node.
        let warm = newer["warm"]["spec"]["template"]["spec"].clone();
        publish(&mut deployed, &serde_json::from_value(warm).expect("a pod"));
        let newer = pod_of(&compose("customprometheus", specification("v2")));
        drop(running);
        let second = publish(&mut deployed, &newer);
        let container = &newer.containers[0];
        let running = Running::start(&deployed, &newer, container);
        let shown = fs::read_to_string(second.target().join("config/version"));
        assert_eq!(shown.expect("the file"), "v2");
        drop(running);
        drop(registry);
        deployed.restart();
        let back = publish(&mut deployed, &pod);
        let shown = fs::read_to_string(back.target().join("config/version"));
        assert_eq!(shown.expect("the file"), "v1");
        drop(Running::start(&deployed, &pod, &pod.containers[0]));
        drop(done);
        reader.join().expect("the reader");
    });
    assert!(reads.into_inner() > 0);
}
