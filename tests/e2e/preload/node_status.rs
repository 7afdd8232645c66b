//! Tests the labels and the condition of Nodes.

use std::process::Command;

use serde_json::{Value, json};

use crate::support::{
    Proxy,
    api_server::{Fault, Kind},
    preload_cluster::{Cluster, NAMESPACE},
    registry, run, unique, wait_until,
};

const ARGUMENTS: [&str; 2] = ["--node-labels", "--node-condition-namespaces=platform,team"];

fn labels(cluster: &Cluster, node: &str) -> Vec<String> {
    let node = cluster.api.get(Kind::Node, "", node);
    let labels = node["metadata"]["labels"].as_object().cloned().unwrap_or_default();
    let ours = labels.into_iter().filter(|(key, _)| key.starts_with("oci.custom.io/"));
    ours.map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default())).collect()
}

fn condition(cluster: &Cluster, node: &str) -> Value {
    let node = cluster.api.get(Kind::Node, "", node);
    let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let mut ours =
        conditions.into_iter().filter(|one| one["type"] == "oci.custom.io/ArtifactsReady");
    ours.next().unwrap_or_default()
}

/// Returns a label as the documentation says how to find it.
fn computed(reference: &str) -> String {
    let script = format!("printf %s '{NAMESPACE}/{reference}' | sha256sum | cut -c1-32");
    format!("oci.custom.io/ready.{}", run(Command::new("sh").args(["-c", &script])).trim())
}

#[test]
fn nodes_have_labels_for_what_they_hold_and_a_condition() {
    let mut cluster = Cluster::new(&["one", "two"]);
    cluster.api.set_node_ready("one", true);
    let mut controller = cluster.controller_with(&ARGUMENTS);
    cluster.start_node("one");
    cluster.start_node("two");
    wait_until("nothing is wanted of the nodes", || {
        ["one", "two"].iter().all(|node| condition(&cluster, node)["status"] == "True")
    });
    let (first, _) = cluster.artifact("v1");
    for status in [409, 503] {
        cluster.api.fail(Fault { kind: Kind::Node, writes: true, status, times: 1 });
    }
    cluster.preload("tool", json!({"reference": first}));
    cluster.wait_for("tool", "Ready");
    let label = |reference: &str| format!("{}=true", computed(reference));
    for node in ["one", "two"] {
        wait_until("the label", || labels(&cluster, node) == [label(&first)]);
    }
    assert_eq!(cluster.status("tool")["nodeLabel"], computed(&first).as_str());

    // Labels of others stay. A label that they remove is written again.
    let node = |name: &str, labels: Value| {
        cluster.api.apply(json!({"kind": "Node", "metadata": {"name": name, "labels": labels}}));
    };
    node("one", json!({"pool": "a", computed(&first): "no", "oci.custom.io/ready.x": "true"}));
    wait_until("the label again", || labels(&cluster, "one") == [label(&first)]);
    let one = cluster.api.get(Kind::Node, "", "one");
    assert_eq!(one["metadata"]["labels"]["pool"], "a");
    assert_eq!(one["status"]["conditions"][0], json!({"type": "Ready", "status": "True"}));

    // A restarted controller has nothing to write.
    controller.end();
    let before = cluster.api.list(Kind::Node);
    let _controller = cluster.controller_with(&ARGUMENTS);
    cluster.preload("nowhere", json!({"reference": first, "selector": {"names": ["gone"]}}));
    cluster.wait_for("nowhere", "NoNodes");
    assert_eq!(cluster.api.list(Kind::Node), before);

    // A node without the driver has neither. One that joins is ready when it holds what the others hold.
    let slow = Proxy::new(registry());
    let repository = unique("slow");
    cluster.push(&repository, "v1");
    let second = slow.reference(&format!("{repository}:v1"));
    cluster.preload("tool", json!({"reference": second}));
    cluster.wait_for("tool", "Ready");
    let both = |mut labels: Vec<String>| {
        labels.sort();
        labels
    };
    let held = both(vec![label(&first), label(&second)]);
    wait_until("both versions", || both(labels(&cluster, "two")) == held);
    let gate = slow.hold_blobs();
    cluster.join("bare");
    cluster.join("late");
    cluster.start_node("late");
    wait_until("the late node fetches", || gate.waiting() > 0);
    wait_until("it is not ready", || condition(&cluster, "late")["reason"] == "ArtifactsMissing");
    assert_eq!(condition(&cluster, "late")["status"], "False");
    let since = condition(&cluster, "one")["lastTransitionTime"].clone();
    gate.open();
    wait_until("it is ready", || condition(&cluster, "late")["status"] == "True");
    assert_eq!(condition(&cluster, "one")["lastTransitionTime"], since);
    assert_eq!(labels(&cluster, "late"), [label(&second)]);
    assert_eq!((labels(&cluster, "bare"), condition(&cluster, "bare")), (vec![], Value::Null));

    cluster.api.delete(Kind::Preload, NAMESPACE, "tool");
    for node in ["one", "two", "late"] {
        wait_until("no label is left", || labels(&cluster, node).is_empty());
        assert_eq!(condition(&cluster, node)["status"], "True");
    }
}

#[test]
fn nodes_are_left_alone_by_default() {
    let mut cluster = Cluster::new(&["one"]);
    let before = cluster.api.list(Kind::Node);
    let _controller = cluster.controller();
    cluster.start_node("one");
    let (reference, _) = cluster.artifact("v1");
    cluster.preload("tool", json!({"reference": reference}));
    cluster.wait_for("tool", "Ready");
    wait_until("the numbers follow", || cluster.status("tool")["ready"] == 1);
    assert_eq!(cluster.api.list(Kind::Node), before);
    assert!(cluster.status("tool")["nodeLabel"].is_null());
}
