//! Tests when nodes start to fetch, and changes of a preload meanwhile.

use std::time::Duration;

use jiff::Timestamp;
use preload::plan::facts::mix;
use serde_json::{Value, json};

use super::{DOCKER, index_of_another_platform, secret};
use crate::support::{
    Layer, Manifest, Proxy,
    api_server::Kind,
    fleet::{Cluster, Controller, NAMESPACE},
    private_registry, registry, unique, wait_at_most, wait_until,
};

/// Nodes whose plugins have reported, and a registry that can hold artifacts back.
struct Fleet {
    cluster: Cluster,
    controller: Controller,
    registry: Proxy,
    nodes: Vec<String>,
}

impl Fleet {
    #[track_caller]
    fn start(nodes: &[&str]) -> Self {
        let mut cluster = Cluster::new(nodes);
        let controller = cluster.controller();
        for node in nodes {
            cluster.start_node(node);
        }
        let told = |object: &Value| object["status"]["platform"].is_string();
        wait_until("all plugins have told who they are", || {
            cluster.api.list(Kind::NodeArtifacts).iter().filter(|one| told(one)).count()
                == nodes.len()
        });
        let nodes = nodes.iter().map(|node| (*node).to_owned()).collect();
        Self { cluster, controller, registry: Proxy::new(registry()), nodes }
    }

    /// Returns the reference at the proxy, and the digest, of a new artifact.
    fn artifact(&self) -> (String, String) {
        let repository = unique("turns");
        let (_, digest) = self.cluster.push(&repository, "v1");
        (self.registry.reference(&format!("{repository}:v1")), digest)
    }

    /// Returns the nodes that have an assignment.
    fn asked(&self) -> Vec<&str> {
        let asked = self.nodes.iter().filter(|node| !self.cluster.wanted(node).is_empty());
        asked.map(String::as_str).collect()
    }

    fn pins(&self) -> Vec<(String, String)> {
        self.nodes.iter().flat_map(|node| self.cluster.pins(node)).collect()
    }
}

#[test]
fn a_percentage_of_the_nodes_fetches_at_once() {
    let fleet = Fleet::start(&["one", "two", "three", "four"]);
    let gate = fleet.registry.hold_blobs();
    let (reference, _) = fleet.artifact();
    fleet.cluster.preload("tool", json!({"reference": reference, "parallelism": "50%"}));
    wait_until("two nodes fetch", || {
        gate.waiting() >= 2 && fleet.cluster.status("tool")["active"] == 2
    });
    assert_eq!(fleet.asked().len(), 2, "{:?} were asked", fleet.asked());
    assert_eq!(fleet.cluster.status("tool")["desired"], 4);
    gate.open();
    fleet.cluster.wait_for("tool", "Ready");
    assert_eq!(fleet.pins().len(), 4);
}

#[test]
fn nodes_begin_one_after_the_other_over_the_spread() {
    let fleet = Fleet::start(&["one", "two", "three"]);
    let (reference, _) = fleet.artifact();
    fleet.cluster.preload("tool", json!({"reference": reference, "spread": "6s"}));
    fleet.cluster.wait_for("tool", "Ready");
    let object = fleet.cluster.api.get(Kind::Preload, NAMESPACE, "tool");
    let seconds = |value: &Value| {
        let time = value.as_str().expect("a time").parse::<Timestamp>();
        time.expect("a time").as_second()
    };
    let begun = seconds(&object["status"]["startTime"]);
    let uid = object["metadata"]["uid"].as_str().expect("a uid");
    for node in &fleet.nodes {
        let delay = i64::try_from(mix(node, uid) % 6).expect("a delay");
        let asked = seconds(&fleet.cluster.wanted(node)[0]["since"]) - begun;
        assert!(asked >= delay, "{node} was asked after {asked} s, before its {delay} s were over");
    }
}

#[test]
fn a_pause_lets_nobody_begin_and_those_that_have_begun_go_on() {
    let fleet = Fleet::start(&["one", "two"]);
    let gate = fleet.registry.hold_blobs();
    let (reference, _) = fleet.artifact();
    let spec = |paused: bool| json!({"reference": reference, "parallelism": 1, "paused": paused});
    fleet.cluster.preload("tool", spec(true));
    fleet.cluster.wait_for("tool", "Paused");
    assert_eq!(fleet.asked(), [] as [&str; 0]);
    fleet.cluster.preload("tool", spec(false));
    wait_until("one node fetches", || gate.waiting() > 0);
    fleet.cluster.preload("tool", spec(true));
    fleet.cluster.wait_for("tool", "Paused");
    gate.open();
    wait_until("the node that has begun holds it", || fleet.cluster.status("tool")["ready"] == 1);
    fleet.cluster.wait_for("tool", "Paused");
    assert_eq!(fleet.asked().len(), 1, "somebody began in the pause");
    fleet.cluster.preload("tool", spec(false));
    fleet.cluster.wait_for("tool", "Ready");
    assert_eq!(fleet.pins().len(), 2);
}

#[test]
fn what_is_finished_goes_after_its_time_well_or_not() {
    let fleet = Fleet::start(&["one", "two"]);
    let (reference, digest) = fleet.artifact();
    let index = index_of_another_platform(&fleet.cluster);
    fleet.cluster.preload("stays", json!({"reference": reference}));
    fleet.cluster.wait_for("stays", "Ready");
    let soon = |reference: &str| json!({"reference": reference, "backoffLimit": 0, "ttlSecondsAfterFinished": 1});
    fleet.cluster.preload("well", soon(&reference));
    fleet.cluster.preload("failed", soon(&index));
    for name in ["well", "failed"] {
        wait_until(&format!("{name} is gone"), || {
            fleet.cluster.api.get(Kind::Preload, NAMESPACE, name).is_null()
        });
    }
    // Nothing of the deleted preload remains on the nodes; the artifact stays for others.
    let stays = ("preload/team/stays".to_owned(), format!("{reference}@{digest}"));
    wait_until("its pins are gone", || fleet.pins() == [stays.clone(), stays.clone()]);
    fleet.cluster.wait_for("stays", "Ready");
}

#[test]
fn a_tag_that_moves_in_the_middle_is_still_what_it_was_on_every_node() {
    let mut fleet = Fleet::start(&["one", "two"]);
    let gate = fleet.registry.hold_blobs();
    let (reference, digest) = fleet.artifact();
    fleet.cluster.preload("tool", json!({"reference": reference, "parallelism": 1}));
    wait_until("one node fetches", || gate.waiting() > 0);
    let (_, name) = reference.split_once('/').expect("a host");
    let (repository, tag) = name.split_once(':').expect("a tag");
    let (_, moved) = fleet.cluster.push(repository, tag);
    assert_ne!(moved, digest);
    // The next leader does not resolve it again either.
    fleet.controller.kill();
    fleet.controller = fleet.cluster.controller();
    gate.open();
    fleet.cluster.wait_for("tool", "Ready");
    let pinned = ("preload/team/tool".to_owned(), format!("{reference}@{digest}"));
    assert_eq!(fleet.cluster.status("tool")["readyReference"], pinned.1.as_str());
    assert_eq!(fleet.pins(), [pinned.clone(), pinned]);
}

#[test]
fn a_preload_that_is_deleted_in_the_middle_leaves_nothing_and_others_go_on() {
    let fleet = Fleet::start(&["one", "two"]);
    let gate = fleet.registry.hold_blobs();
    let (reference, _) = fleet.artifact();
    fleet.cluster.preload("tool", json!({"reference": reference}));
    wait_until("both nodes fetch", || gate.waiting() >= 2);
    fleet.cluster.api.delete(Kind::Preload, NAMESPACE, "tool");
    wait_until("nobody is asked any more", || fleet.asked().is_empty());
    gate.open();
    let (other, digest) = fleet.artifact();
    fleet.cluster.preload("other", json!({"reference": other}));
    fleet.cluster.wait_for("other", "Ready");
    let pinned = ("preload/team/other".to_owned(), format!("{other}@{digest}"));
    assert_eq!(fleet.pins(), [pinned.clone(), pinned]);
    for object in fleet.cluster.api.list(Kind::NodeArtifacts) {
        assert_eq!(object["status"]["artifacts"].as_array().map_or(0, Vec::len), 1, "{object}");
    }
}

#[test]
fn an_object_edited_to_nonsense_changes_nothing_on_any_node() {
    let fleet = Fleet::start(&["one", "two"]);
    let (reference, digest) = fleet.artifact();
    fleet.cluster.preload("tool", json!({"reference": reference}));
    fleet.cluster.wait_for("tool", "Ready");
    let (ready, pins) = (format!("{reference}@{digest}"), fleet.pins());
    for nonsense in ["UPPER/case:of:nothing", "a:b:c/d"] {
        fleet.cluster.preload("tool", json!({"reference": nonsense}));
        fleet.cluster.wait_for("tool", "InvalidSpec");
        assert_eq!(fleet.cluster.condition("tool", "Stalled")["status"], "True");
        assert_eq!(fleet.cluster.status("tool")["readyReference"], ready.as_str());
        assert_eq!((fleet.asked().len(), fleet.pins()), (2, pins.clone()));
    }
    fleet.cluster.preload("tool", json!({"reference": reference}));
    fleet.cluster.wait_for("tool", "Ready");

    // Fields of the controller are written again.
    let wanted = fleet.cluster.wanted("one");
    for artifacts in [
        json!([]),
        json!([{
            "preload": "nobody/nothing", "reference": "???", "pin": true, "timeoutSeconds": 1,
            "backoffLimit": 0, "since": "1970-01-01T00:00:00Z",
        }]),
    ] {
        let spec = json!({"artifacts": artifacts});
        fleet
            .cluster
            .api
            .apply(json!({"kind": "NodeArtifacts", "metadata": {"name": "one"}, "spec": spec}));
        wait_until("it is as it was", || {
            let now = fleet.cluster.wanted("one");
            now.len() == 1 && now[0]["reference"] == wanted[0]["reference"]
        });
        wait_until("it is pinned again", || fleet.pins() == pins);
    }
}

#[test]
fn a_node_that_is_labelled_is_selected_and_one_that_is_not_any_more_lets_go() {
    let fleet = Fleet::start(&["one", "two"]);
    let (reference, _) = fleet.artifact();
    let selector = json!({"matchLabels": {"pool": "tools"}});
    fleet.cluster.preload("tool", json!({"reference": reference, "selector": selector}));
    fleet.cluster.wait_for("tool", "NoNodes");
    assert_eq!(fleet.cluster.condition("tool", "Stalled")["status"], "False");
    let label = |labels: Value| {
        let metadata = json!({"name": "one", "labels": labels});
        fleet.cluster.api.apply(json!({"kind": "Node", "metadata": metadata}));
    };
    label(json!({"pool": "tools"}));
    fleet.cluster.wait_for("tool", "Ready");
    assert_eq!(fleet.asked(), ["one"]);
    label(json!({}));
    wait_until("it lets go", || fleet.asked().is_empty() && fleet.pins().is_empty());
    wait_until("it is not counted", || fleet.cluster.status("tool")["desired"] == 0);
}

#[test]
fn a_secret_that_is_made_later_is_found_without_a_change_of_the_object() {
    let private = private_registry("robot", "password-of-the-robot");
    let mut cluster = Cluster::before(&private, &["one"]);
    let _controller = cluster.controller();
    cluster.start_node("one");
    let repository = unique("private");
    let layer = Layer::titled("secret.txt", format!("of {repository}"));
    let user = private.as_user("robot", "password-of-the-robot");
    Manifest::artifact([layer]).push(&user, &repository, "v1");
    let reference = cluster.reference(&format!("{repository}:v1"));
    cluster.preload("tool", json!({"reference": reference, "pullSecrets": ["late"]}));
    cluster.wait_for("tool", "SecretMissing");
    let message = cluster.condition("tool", "Ready")["message"].clone();
    assert!(message.as_str().is_some_and(|text| text.contains("team/late")), "{message}");
    secret(&cluster.api, "late", DOCKER, &private.host(), "robot", "password-of-the-robot");
    // It is read again every minute.
    wait_at_most(Duration::from_mins(2), "the secret is found", || {
        cluster.condition("tool", "Ready")["status"] == "True"
    });
    assert_eq!(cluster.pins("one").len(), 1);
}
