//! Tests a `CustomPrometheus` from its artifact to its running process: pushed by the script, composed, published by
//! the deployed driver, and rolled forth and back.

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
use crate::support::{
    Driver, Proxy, Registry, Volume,
    api_server::Kind,
    own_registry,
    preload_cluster::{Cluster, NAMESPACE},
    registry, run, tool, unique, wait_until,
};

#[test]
fn wrong_objects_are_refused_and_right_ones_get_defaults() {
    check("crossplane_schema");
}

#[test]
fn the_evaluator_counts_as_ready_what_the_real_functions_do() {
    check("crossplane_functions");
}

#[test]
fn an_object_is_ready_when_and_only_when_what_is_wanted_runs() {
    check("crossplane_ready");
}

#[test]
fn the_documentation_shows_each_step_of_an_objects_life() {
    check("crossplane_story");
}

#[test]
fn both_compositions_make_the_same() {
    check("crossplane_compositions");
}

#[test]
fn prometheus_takes_the_configuration_and_replicas_have_labels_of_their_own() {
    check("crossplane_configuration");
}

#[test]
fn a_changed_configuration_is_checked_by_the_artifact_that_runs() {
    check("crossplane_check");
}

#[test]
fn service_discovery_beyond_the_own_namespace_is_warned_of() {
    check("crossplane_warning");
}

#[test]
fn the_gated_composition_rolls_only_to_what_every_node_has() {
    check("crossplane_gate");
}

#[test]
fn crossplane_may_make_what_is_composed() {
    check("crossplane_rights");
}

/// The objects of a Composition by name.
pub(super) type ComposedObjects = BTreeMap<String, Value>;

/// Returns the objects that the Composition creates for a `CustomPrometheus` with these existing objects.
#[track_caller]
fn compose(composition: &str, specification: Value, observed: &ComposedObjects) -> ComposedObjects {
    let object = json!({
        "apiVersion": "custom.prometheus.io/v1alpha1",
        "kind": "CustomPrometheus",
        "metadata": {"name": "billing", "namespace": "billing-services"},
        "spec": specification,
    });
    let mut result = reconcile(composition, &object, observed);
    assert_eq!(result["conditions"]["Synced"][0], true, "{result}");
    serde_json::from_value(result["desired"].take()).expect("objects")
}

/// Runs one reconciliation of an object with these existing objects. Returns `desired`, `status`, and `conditions`,
/// each with its status and message.
#[track_caller]
pub(super) fn reconcile(composition: &str, object: &Value, observed: &ComposedObjects) -> Value {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, others) = (folder.path().join("xr.json"), folder.path().join("observed.json"));
    fs::write(&others, json!(observed).to_string()).expect("the objects");
    fs::write(&file, object.to_string()).expect("the object");
    let mut script = python("compose.py");
    let output = script.arg(composition).args([&file, &others]).output().expect("python");
    assert!(output.status.success(), "{}", said(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Returns Debian's Prometheus: the program itself, not the wrapper that finds its libraries.
fn program(name: &str) -> PathBuf {
    let tools = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("tools");
    let unpacked = tools.join("root/usr/bin").join(name);
    if unpacked.exists() {
        return unpacked;
    }
    run(tool("sh").args(["-c", &format!("command -v {name}")])).trim().into()
}

/// Pushes this directory for this machine's platform. Returns the script's output.
#[track_caller]
fn push(registry: &Registry, tag: &str, build: &Path) -> String {
    let reference = format!("{}/team/prometheus:{tag}", registry.host());
    let architecture = crate::support::node_architecture();
    let pair = format!("linux/{architecture}={}", build.display());
    run(super::publish::push(&reference, build).arg(pair)).trim().to_owned()
}

/// Returns the pod of the `StatefulSet`, as its controller and the kubelet create it.
fn pod_of(composed: &ComposedObjects) -> PodSpec {
    let statefulset: StatefulSet =
        serde_json::from_value(composed["statefulset"].clone()).expect("a StatefulSet");
    let specification = statefulset.spec.expect("a specification");
    let mut pod = specification.template.spec.expect("a pod");
    for claim in specification.volume_claim_templates.iter().flatten() {
        // The claim's volume does not matter here.
        let name = claim.metadata.name.clone().expect("a name");
        let volume = json!({"name": name, "emptyDir": {}});
        pod.volumes.get_or_insert_default().push(serde_json::from_value(volume).expect("a volume"));
    }
    pod
}

/// Publishes the pod's artifact through the driver, with the attributes of the pod.
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

    /// Waits until it scrapes this job, whichever file configures it.
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

/// Ends the reader, also if the test fails early.
struct StopReader<'a>(&'a AtomicBool);

impl Drop for StopReader<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_prometheus_runs_from_its_artifact_and_rolls_forth_and_back() {
    let mut deployed = Deployed::start(&rendered("chart")["defaults"]);
    let mut registry = own_registry();
    let build = tempfile::tempdir_in("/var/tmp").expect("a folder");
    fs::create_dir_all(build.path().join("bin")).expect("a folder");
    fs::create_dir_all(build.path().join("config")).expect("a folder");
    // A symbolic link would be packed as one.
    fs::copy(program("prometheus"), build.path().join("bin/prometheus")).expect("Prometheus");
    let version = build.path().join("config/version");
    let mut pinned = String::new();
    for tag in ["v1", "v2"] {
        fs::write(&version, tag).expect("a version");
        pinned = push(&registry, tag, build.path());
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
    let composed = compose("customprometheus", specification("v1"), &ComposedObjects::new());
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

    // Forth, and back while the registry is down: a reader of the first version does not notice.
    let (reads, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let file = first.target().join("config/version");
    std::thread::scope(|scope| {
        // The thread is in this thread's mount namespace, which started it.
        let reader = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert_eq!(fs::read_to_string(&file).expect("the file"), "v1");
                reads.fetch_add(1, Ordering::Relaxed);
            }
        });
        let done = StopReader(&done);
        // The gate opens, and names the artifact by its digest.
        let is = json!({"type": "Ready", "status": "True", "reason": "Ready", "message": ""});
        let wanted = format!("{repository}:v2");
        let status = json!({
            "observedGeneration": 1,
            "reference": wanted,
            "readyReference": pinned,
            "conditions": [is],
        });
        let mut observed = composed.clone();
        let preload = json!({
            "metadata": {"generation": 1},
            "spec": {"reference": wanted},
            "status": status,
        });
        observed.insert("artifact".to_owned(), preload);
        let newer = compose("customprometheus-gated", specification("v2"), &observed);
        let newer = pod_of(&newer);
        drop(running);
        let second = publish(&mut deployed, &newer);
        let container = &newer.containers[0];
        let running = Running::start(&deployed, &newer, container);
        let shown = fs::read_to_string(second.target().join("config/version"));
        assert_eq!(shown.expect("the file"), "v2");
        drop(running);
        registry.go_down();
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

/// A `CustomPrometheus` with a gate, reconciled as by Crossplane.
struct GatedRelease<'a> {
    cluster: &'a Cluster,
    repository: &'a str,
    statefulset: Option<Value>,
}

impl GatedRelease<'_> {
    /// Applies the objects that are composed of the existing ones. Returns the attributes of the pod's artifact, once
    /// it may run.
    #[track_caller]
    fn reconcile(&mut self, version: &str) -> Option<Value> {
        self.reconcile_with(json!({"version": version}))
    }

    /// Reconciles like [`Self::reconcile`], with these fields of the specification.
    #[track_caller]
    fn reconcile_with(&mut self, fields: Value) -> Option<Value> {
        let preload = self.cluster.api.get(Kind::Preload, NAMESPACE, "billing");
        let observed = [("artifact", Some(preload)), ("statefulset", self.statefulset.clone())];
        let observed = observed.into_iter().filter_map(|(name, object)| {
            Some((name.to_owned(), object.filter(|object| !object.is_null())?))
        });
        let mut specification = json!({"ociRegistry": self.repository, "scrapeConfig": "[]"});
        let fields = fields.as_object().expect("fields").clone();
        specification.as_object_mut().expect("an object").extend(fields);
        let mut composed = compose("customprometheus-gated", specification, &observed.collect());
        let mut preload = composed.remove("artifact").expect("a preload");
        preload["metadata"]["namespace"] = NAMESPACE.into();
        self.cluster.api.apply(preload);
        self.statefulset = composed.remove("statefulset");
        let statefulset = self.statefulset.as_ref()?;
        let volume = &statefulset["spec"]["template"]["spec"]["volumes"][0];
        Some(volume["csi"]["volumeAttributes"].clone())
    }
}

#[test]
fn the_gate_opens_when_the_controller_has_the_artifact_on_every_node() {
    let mut cluster = Cluster::new(&["one", "two"]);
    let _controller = cluster.controller();
    cluster.start_node("one");
    cluster.start_node("two");
    let name = unique("gated");
    let (first, first_digest) = cluster.push(&name, "v1");
    let repository = cluster.reference(&name);
    let mut gated = GatedRelease { cluster: &cluster, repository: &repository, statefulset: None };

    assert_eq!(gated.reconcile("v1"), None, "it runs before its artifact is anywhere");
    cluster.wait_for("billing", "Ready");
    let used = gated.reconcile("v1").expect("a StatefulSet");
    assert_eq!(used["reference"], format!("{first}@{first_digest}").as_str());
    // The pod uses the artifact that the nodes hold.
    let kubelet = cluster.drivers[1].kubelet();
    let reference = used["reference"].as_str().expect("a reference");
    let volume = kubelet.new_volume(reference).attribute("pullPolicy", "Never");
    kubelet.publish_well(&volume);

    // A version that does not exist, and one that does: the running version stays until the nodes have another one.
    assert_eq!(gated.reconcile("gone").as_ref(), Some(&used), "rolled on an old status");
    cluster.wait_for("billing", "ReferenceNotFound");
    assert_eq!(gated.reconcile("gone").as_ref(), Some(&used), "rolled to what does not exist");
    let (second, second_digest) = cluster.push(&name, "v2");
    assert_eq!(gated.reconcile("v2").as_ref(), Some(&used), "rolled to what is nowhere yet");
    cluster.wait_for("billing", "Ready");
    let newer = gated.reconcile("v2").expect("a StatefulSet");
    assert_eq!(newer["reference"], format!("{second}@{second_digest}").as_str());

    // The preload is deleted: nothing rolls, and it is created again.
    cluster.api.delete(Kind::Preload, NAMESPACE, "billing");
    assert_eq!(gated.reconcile("v2").as_ref(), Some(&newer), "rolled for want of a preload");
    cluster.wait_for("billing", "Ready");

    // The rollback.
    assert_eq!(gated.reconcile("v1").as_ref(), Some(&newer), "rolled back too early");
    cluster.wait_for("billing", "Ready");
    assert_eq!(gated.reconcile("v1"), Some(used));
    kubelet.unpublish(&volume);
}

#[test]
fn the_gate_opens_for_the_way_back_while_the_registry_is_down() {
    let proxy = Proxy::new(registry());
    let mut cluster = Cluster::new(&["one", "two"]);
    let mut controller = cluster.controller();
    cluster.start_node("one");
    cluster.start_node("two");
    let name = unique("gated");
    let repository = proxy.reference(&name);
    let mut pinned = Vec::new();
    for tag in ["v1", "v2"] {
        let (_, digest) = cluster.push(&name, tag);
        pinned.push((format!("{repository}:{tag}@{digest}"), digest));
    }
    let mut gated = GatedRelease { cluster: &cluster, repository: &repository, statefulset: None };
    for (tag, (reference, _)) in ["v1", "v2"].into_iter().zip(&pinned) {
        gated.reconcile(tag);
        cluster.wait_for("billing", "Ready");
        assert_eq!(gated.reconcile(tag).expect("a StatefulSet")["reference"], reference.as_str());
    }
    let statefulset = gated.statefulset.take();
    proxy.go_down();
    controller.end();
    let drivers = std::mem::take(&mut cluster.drivers);
    cluster.drivers = drivers.into_iter().map(Driver::restart).collect();
    let _controller = cluster.controller();

    let mut gated = GatedRelease { cluster: &cluster, repository: &repository, statefulset };
    let by_digest = json!({"version": "v1", "digest": pinned[0].1});
    for (fields, wanted) in [
        (json!({"version": "v1"}), &pinned[0].0),
        (json!({"version": "v2"}), &pinned[1].0),
        (by_digest, &pinned[0].0),
    ] {
        let running = gated.reconcile_with(fields.clone()).expect("a StatefulSet");
        assert_ne!(
            running["reference"],
            wanted.as_str(),
            "rolled before the controller has looked"
        );
        cluster.wait_for("billing", "Ready");
        let running = gated.reconcile_with(fields).expect("a StatefulSet");
        assert_eq!(running["reference"], wanted.as_str());
        for driver in &cluster.drivers {
            let volume = driver.kubelet().new_volume(wanted);
            driver.kubelet().publish_well(&volume);
            driver.kubelet().unpublish(&volume);
        }
    }
    let held = gated.reconcile("v3").expect("a StatefulSet");
    cluster.wait_for("billing", "RegistryUnavailable");
    assert_eq!(gated.reconcile("v3"), Some(held), "rolled to what it never had");
}
