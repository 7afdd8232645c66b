//! Tests the tables of `docs/how-to/prometheus-by-crossplane.md`, step by step, with the real controller and node
//! plugins.
//!
//! The test plays Crossplane, the controller of `StatefulSets`, and the kubelet, whose calls are real.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::{Value, json};

use super::crossplane::{ComposedObjects, reconcile};
use crate::support::{
    Driver, Gate, Layer, Manifest, Pod, Proxy, Volume,
    api_server::Kind,
    preload_cluster::{Cluster, NAMESPACE},
    registry, unique, wait_until,
};

const NAME: &str = "billing";
const GATED: &str = "customprometheus-gated";
/// The repository in the tables, in place of that of the test.
const REPOSITORY: &str = "registry.example.com/internal-tools/prometheus-custom";
const NODES: [&str; 2] = ["one", "two"];
/// The times in the tables, in place of those of the controller.
const TIMES: [&str; 2] = ["2026-11-29T10:00:00Z", "2026-11-28T10:00:00Z"];
/// Steps of the jobs that check a configuration. Only the evaluator of Compositions runs these.
const EVALUATED: [&str; 5] = [
    "scrapeConfig with a mistake",
    "promtool refuses it",
    "Prometheus does not load it either",
    "the mistake is mended",
    "promtool accepts it",
];

/// A row of a table: the step, and the output of `kubectl get -o wide` after it.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    step: String,
    columns: [String; 4],
}

/// Reads the table of a Composition.
#[track_caller]
fn documented_rows(composition: &str) -> Vec<Row> {
    let page = "docs/how-to/prometheus-by-crossplane.md";
    let text =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).expect("the page");
    let (_, section) = text.split_once(&format!("### {composition}\n")).expect("a section");
    let lines = section.lines().skip_while(|line| !line.starts_with('|'));
    let rows = lines.take_while(|line| line.starts_with('|')).skip(2).map(|line| {
        let mut cells = line.split('|').skip(1).map(|cell| cell.trim().to_owned());
        let step = cells.next().expect("a step");
        Row { step, columns: std::array::from_fn(|_| cells.next().expect("a cell")) }
    });
    rows.collect()
}

/// A pod of the `StatefulSet` on one of the nodes.
struct MountedPod {
    node: usize,
    /// The template of the pod.
    template: Value,
    volume: Volume,
    is_ready: bool,
}

/// A namespace with one `CustomPrometheus`.
struct TableRun {
    composition: &'static str,
    repository: String,
    /// The digests by version.
    digests: BTreeMap<String, String>,
    proxy: Proxy,
    blobs: Option<std::sync::Arc<Gate>>,
    cluster: Cluster,
    object: Value,
    /// The composed objects by name, without the `ArtifactPreload`, which the API server holds.
    observed: ComposedObjects,
    conditions: Value,
    pods: Vec<MountedPod>,
}

impl TableRun {
    fn start(composition: &'static str) -> Self {
        let (proxy, repository) = (Proxy::new(registry()), unique("story"));
        let mut cluster = Cluster::new(&NODES);
        for node in NODES {
            cluster.start_node(node);
        }
        let mut digests = BTreeMap::new();
        for version in ["v1", "v2", "v3"] {
            let layer = Layer::titled("version", format!("{version} of {repository}"));
            let digest = Manifest::artifact([layer]).push(registry(), &repository, version);
            digests.insert(version.to_owned(), digest);
        }
        let repository = proxy.reference(&repository);
        let object = json!({
            "apiVersion": "custom.prometheus.io/v1alpha1",
            "kind": "CustomPrometheus",
            "metadata": {"name": NAME, "namespace": NAMESPACE},
            "spec": {"ociRegistry": repository, "version": "v1", "replicas": 2, "scrapeConfig": "[]"},
        });
        Self {
            composition,
            repository,
            digests,
            proxy,
            blobs: None,
            cluster,
            object,
            observed: ComposedObjects::new(),
            conditions: Value::Null,
            pods: Vec::new(),
        }
    }

    /// Carries out a step of the tables.
    #[track_caller]
    fn act(&mut self, step: &str, artifact: &str) {
        match step {
            "created" => {}
            "the nodes fetch v1" | "the nodes fetch v2" => {
                self.blobs = Some(self.proxy.hold_blobs());
                self.control("the nodes fetch it", |run| run.preload_says() == artifact);
            }
            "all nodes hold v1"
            | "all nodes hold v2"
            | "the controller is back"
            | "the controller has looked at the new one"
            | "the controller hands out its earlier answer" => {
                if let Some(blobs) = self.blobs.take() {
                    blobs.open();
                }
                self.control_until("Ready");
            }
            "the registry is back" => {
                self.proxy.come_back();
                self.control_until("Ready");
            }
            "the registry has no v4" => self.control_until("ReferenceNotFound"),
            "the registry cannot be asked" => self.control_until("RegistryUnavailable"),
            "its pods are there" | "its pods are gone" | "five pods are there" => self.scale(),
            "its pods are ready" | "that is ready too" | "they are ready" => self.start_pods(),
            "one pod is replaced" => self.replace_pod(),
            "one pod is replaced, and starts if it can" => self.replace_and_start(1),
            "both pods are replaced, and ready" => self.replace_and_start(2),
            "the other too, and both are ready" | "the pod is replaced, and ready" => {
                self.replace_and_start(1);
                assert!(self.pods.iter().all(|pod| pod.is_ready), "{step}");
            }
            "it is ready, and the other is replaced" => {
                self.start_pods();
                self.replace_pod();
            }
            "five pods are there and ready" => {
                self.scale();
                self.start_pods();
            }
            "the ArtifactPreload is deleted by hand" => {
                self.cluster.api.delete(Kind::Preload, NAMESPACE, NAME);
            }
            "the StatefulSet is deleted by hand" => self.delete_statefulset(),
            "kubectl delete: it is gone, with all that is composed" => self.delete(),
            _ => self.change(step),
        }
    }

    /// Changes the specification by a step that begins with fields: `version: v2, which has ...`.
    #[track_caller]
    fn change(&mut self, step: &str) {
        let spec = &mut self.object["spec"];
        let mut is_known = false;
        for part in step.split(", ") {
            let Some((field, value)) = part.split_once(": ") else { continue };
            is_known = true;
            match field {
                "version" => spec["version"] = value.into(),
                "replicas" => spec["replicas"] = value.parse::<u32>().expect("a number").into(),
                "digest" => {
                    let version = value.strip_prefix("that of ").expect("a version");
                    spec["digest"] = self.digests[version].as_str().into();
                }
                other => panic!("no such field: {other}"),
            }
        }
        assert!(is_known, "nothing is known of the step {step:?}");
        if step.contains("without a digest") {
            spec.as_object_mut().expect("fields").remove("digest");
        }
        if step.starts_with("digest: ") {
            // The controller starts again in each step anyway.
            self.proxy.go_down();
            let drivers = std::mem::take(&mut self.cluster.drivers);
            self.cluster.drivers = drivers.into_iter().map(Driver::restart).collect();
        }
    }

    /// Runs the controller until the condition is true.
    #[track_caller]
    fn control(&self, what: &str, is_done: impl Fn(&Self) -> bool) {
        let mut controller = self.cluster.controller();
        wait_until(what, || is_done(self));
        controller.end();
    }

    #[track_caller]
    fn control_until(&self, reason: &str) {
        let mut controller = self.cluster.controller();
        self.cluster.wait_for(NAME, reason);
        controller.end();
    }

    fn preload_says(&self) -> String {
        let ready = self.cluster.condition(NAME, "Ready");
        let text = |field: &str| ready[field].as_str().unwrap_or_default();
        self.shorten(&format!("{}: {}", text("reason"), text("message")))
    }

    /// Composes and applies, like Crossplane.
    #[track_caller]
    fn reconcile(&mut self) {
        let preload = self.cluster.api.get(Kind::Preload, NAMESPACE, NAME);
        self.observed.remove("artifact");
        if !preload.is_null() {
            self.observed.insert("artifact".to_owned(), preload);
        }
        let mut result = reconcile(self.composition, &self.object, &self.observed);
        for (condition, said) in result["conditions"].as_object().expect("conditions") {
            self.conditions[condition] = said[0].clone();
        }
        let desired: ComposedObjects =
            serde_json::from_value(result["desired"].take()).expect("objects");
        self.observed.retain(|name, _| desired.contains_key(name));
        for (name, object) in desired {
            self.apply(name, object);
        }
        self.object["status"] = result["status"].take();
    }

    fn apply(&mut self, name: String, mut object: Value) {
        if name == "artifact" {
            return self.cluster.api.apply(object);
        }
        let before = self.observed.get(&name).unwrap_or(&Value::Null);
        let generation = before["metadata"]["generation"].as_u64().unwrap_or(0);
        let is_changed = generation == 0 || before["spec"] != object["spec"];
        object["metadata"]["generation"] = (generation + u64::from(is_changed)).into();
        if !before["status"].is_null() {
            object["status"] = before["status"].clone();
        }
        self.observed.insert(name, object);
    }

    /// Returns the template of the `StatefulSet`.
    fn template(&self) -> &Value {
        &self.observed["statefulset"]["spec"]["template"]
    }

    fn new_pod(&self, index: usize) -> MountedPod {
        let (node, template) = (index % NODES.len(), self.template().clone());
        let pod = Pod { namespace: NAMESPACE.to_owned(), ..Pod::new() };
        let mut volume = self.cluster.drivers[node].kubelet().inline(&pod, "artifact", "");
        volume.request.volume_context.remove("reference");
        let attributes = &template["spec"]["volumes"][0]["csi"]["volumeAttributes"];
        for (key, value) in attributes.as_object().expect("attributes") {
            volume = volume.attribute(key, value.as_str().expect("text"));
        }
        MountedPod { node, template, volume, is_ready: false }
    }

    fn end_pod(&self, pod: &MountedPod) {
        if pod.is_ready {
            self.cluster.drivers[pod.node].kubelet().unpublish(&pod.volume);
        }
    }

    /// Creates and deletes pods, like the controller of `StatefulSets`.
    fn scale(&mut self) {
        let replicas = self.observed["statefulset"]["spec"]["replicas"].as_u64();
        let replicas = replicas.and_then(|number| usize::try_from(number).ok()).expect("a number");
        while self.pods.len() > replicas {
            let pod = self.pods.pop().expect("a pod");
            self.end_pod(&pod);
        }
        while self.pods.len() < replicas {
            self.pods.push(self.new_pod(self.pods.len()));
        }
        self.count_pods();
    }

    /// Counts the pods, like the controller of `StatefulSets`.
    fn count_pods(&mut self) {
        let template = self.template();
        let count =
            |is: &dyn Fn(&MountedPod) -> bool| self.pods.iter().filter(|pod| is(pod)).count();
        let status = json!({
            "observedGeneration": self.observed["statefulset"]["metadata"]["generation"],
            "replicas": self.pods.len(),
            "readyReplicas": count(&|pod| pod.is_ready),
            "updatedReplicas": count(&|pod| pod.template == *template),
        });
        self.observed.get_mut("statefulset").expect("a StatefulSet")["status"] = status;
    }

    /// Replaces the last pod of an earlier template, like the controller of `StatefulSets`.
    #[track_caller]
    fn replace_pod(&mut self) {
        let template = self.template();
        let index = self.pods.iter().rposition(|pod| pod.template != *template);
        let index = index.expect("a pod of an earlier template");
        self.end_pod(&self.pods[index]);
        self.pods[index] = self.new_pod(index);
        self.count_pods();
    }

    /// Publishes the volumes of pods that are not ready, like the kubelets.
    #[track_caller]
    fn start_pods(&mut self) {
        let repository = self.repository.split_once('/').expect("a repository").1.to_owned();
        for pod in self.pods.iter_mut().filter(|pod| !pod.is_ready) {
            let published = self.cluster.drivers[pod.node].kubelet().publish(&pod.volume);
            pod.is_ready = published.is_ok();
            if pod.is_ready {
                let version = self.object["spec"]["version"].as_str().expect("a version");
                assert_eq!(pod.volume.text("version"), format!("{version} of {repository}"));
            }
        }
        self.count_pods();
    }

    #[track_caller]
    fn replace_and_start(&mut self, count: usize) {
        for _ in 0..count {
            self.replace_pod();
            self.start_pods();
        }
    }

    fn delete_statefulset(&mut self) {
        self.observed.remove("statefulset");
        for pod in std::mem::take(&mut self.pods) {
            self.end_pod(&pod);
        }
    }

    /// Deletes the composed objects, like Kubernetes, and waits until nodes have removed the artifact.
    #[track_caller]
    fn delete(&mut self) {
        self.delete_statefulset();
        self.cluster.api.delete(Kind::Preload, NAMESPACE, NAME);
        if self.composition == GATED {
            self.control("no node has anything pinned", |run| {
                let cluster = &run.cluster;
                NODES
                    .iter()
                    .all(|node| cluster.wanted(node).is_empty() && cluster.pins(node).is_empty())
            });
        }
        (self.object["status"], self.conditions) = (Value::Null, Value::Null);
    }

    /// Returns the columns SYNCED, READY, RUNNING and ARTIFACT.
    fn columns(&self) -> [String; 4] {
        let text = |value: &Value| self.shorten(value.as_str().unwrap_or_default());
        let condition = |name: &str| match self.conditions[name].as_bool() {
            Some(true) => "True".to_owned(),
            Some(false) => "False".to_owned(),
            None => String::new(),
        };
        let status = &self.object["status"];
        let running = text(&status["reference"]);
        let running = match running.find("@sha256:") {
            Some(at) => format!("{}...", &running[..at + 12]),
            None => running,
        };
        [condition("Synced"), condition("Ready"), running, text(&status["artifact"])]
    }

    /// Replaces references, digests and times by those of the tables.
    fn shorten(&self, text: &str) -> String {
        let mut text = text
            .replace(&format!("{}: ", self.repository), &format!("{REPOSITORY}: "))
            .replace(&format!("{}:", self.repository), "")
            .replace(&self.repository, REPOSITORY)
            .replace(&self.proxy.host(), "registry.example.com");
        for (version, digest) in &self.digests {
            text = text.replace(digest, &format!("sha256:{}", version[1..].repeat(64)));
        }
        if let Some((said, times)) = text.split_once("; the registry has not answered since ") {
            let shown: Vec<&str> = times.split(", this is its answer of ").collect();
            assert!(shown.len() == 2 && shown.iter().all(|time| time.ends_with('Z')), "{text}");
            text = format!(
                "{said}; the registry has not answered since {}, this is its answer of {}",
                TIMES[0], TIMES[1]
            );
        }
        text
    }
}

/// Runs the table of a Composition. Returns the number of its steps.
#[track_caller]
fn walk(composition: &'static str) -> usize {
    let mut run = TableRun::start(composition);
    let rows = documented_rows(composition);
    let rows = rows.iter().filter(|row| !EVALUATED.contains(&row.step.as_str()));
    let mut steps = 0;
    for row in rows {
        run.act(&row.step, &row.columns[3]);
        if !run.conditions.is_null() || steps == 0 {
            run.reconcile();
            // Its own changes trigger it again.
            run.reconcile();
        }
        assert_eq!(run.columns(), row.columns, "{composition}, step {}: {}", steps + 1, row.step);
        steps += 1;
    }
    steps
}

#[test]
fn the_gated_composition_does_what_its_table_says() {
    assert!(walk(GATED) > 35);
}

#[test]
fn the_composition_that_rolls_at_once_does_what_its_table_says() {
    assert!(walk("customprometheus") > 20);
}
