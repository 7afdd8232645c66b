//! Tests when nodes start to fetch, and changes of a preload meanwhile.

use std::time::Duration;

use jiff::Timestamp;
use preload::plan::cluster_facts::mix;
use serde_json::{Value, json};

use super::{DOCKER, index_of_another_platform, secret};
use crate::support::{
    Layer, Manifest, Proxy,
    api_server::Kind,
    preload_cluster::{Cluster, Controller, NAMESPACE},
    private_registry, registry, unique, wait_at_most, wait_until,
};

/// Nodes whose plugins have reported, and a registry that can hold artifacts back.
struct Setup {
    cluster: Cluster,
    controller: Controller,
    registry: Proxy,
    nodes: Vec<String>,
}

impl Setup {
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
    let setup = Setup::start(&["one", "two", "three", "four"]);
    let gate = setup.registry.hold_blobs();
    let (reference, _) = setup.artifact();
    setup.cluster.preload("tool", json!({"reference": reference, "parallelism": "50%"}));
    wait_until("two nodes fetch", || {
        gate.waiting() >= 2 && setup.cluster.status("tool")["active"] == 2
    });
    assert_eq!(setup.asked().len(), 2, "{:?} were asked", setup.asked());
    assert_eq!(setup.cluster.status("tool")["desired"], 4);
    gate.open();
    setup.cluster.wait_for("tool", "Ready");
    assert_eq!(setup.pins().len(), 4);
}

#[test]
fn nodes_begin_one_after_the_other_over_the_spread() {
    let setup = Setup::start(&["one", "two", "three"]);
    let (reference, _) = setup.artifact();
    setup.cluster.preload("tool", json!({"reference": reference, "spread": "6s"}));
    setup.cluster.wait_for("tool", "Ready");
    let object = setup.cluster.api.get(Kind::Preload, NAMESPACE, "tool");
    let seconds = |value: &Value| {
        let time = value.as_str().expect("a time").parse::<Timestamp>();
        time.expect("a time").as_second()
    };
    let begun = seconds(&object["status"]["startTime"]);
    let uid = object["metadata"]["uid"].as_str().expect("a uid");
    for node in &setup.nodes {
        let delay = i64::try_from(mix(node, uid) % 6).expect("a delay");
        let asked = seconds(&setup.cluster.wanted(node)[0]["since"]) - begun;
        assert!(asked >= delay, "{node} was asked after {asked} s, before its {delay} s were over");
    }
}

#[test]
fn a_pause_starts_no_node_and_lets_started_nodes_finish() {
    let setup = Setup::start(&["one", "two"]);
    let gate = setup.registry.hold_blobs();
    let (reference, _) = setup.artifact();
    let spec = |paused: bool| json!({"reference": reference, "parallelism": 1, "paused": paused});
    setup.cluster.preload("tool", spec(true));
    setup.cluster.wait_for("tool", "Paused");
    assert_eq!(setup.asked(), [] as [&str; 0]);
    setup.cluster.preload("tool", spec(false));
    wait_until("one node fetches", || gate.waiting() > 0);
    setup.cluster.preload("tool", spec(true));
    setup.cluster.wait_for("tool", "Paused");
    gate.open();
    wait_until("the node that has begun holds it", || setup.cluster.status("tool")["ready"] == 1);
    setup.cluster.wait_for("tool", "Paused");
    assert_eq!(setup.asked().len(), 1, "a node began in the pause");
    setup.cluster.preload("tool", spec(false));
    setup.cluster.wait_for("tool", "Ready");
    assert_eq!(setup.pins().len(), 2);
}

#[test]
fn what_is_finished_goes_after_its_time_well_or_not() {
    let setup = Setup::start(&["one", "two"]);
    let (reference, digest) = setup.artifact();
    let index = index_of_another_platform(&setup.cluster);
    setup.cluster.preload("stays", json!({"reference": reference}));
    setup.cluster.wait_for("stays", "Ready");
    let soon = |reference: &str| json!({"reference": reference, "backoffLimit": 0, "ttlSecondsAfterFinished": 1});
    setup.cluster.preload("well", soon(&reference));
    setup.cluster.preload("failed", soon(&index));
    for name in ["well", "failed"] {
        wait_until(&format!("{name} is gone"), || {
            setup.cluster.api.get(Kind::Preload, NAMESPACE, name).is_null()
        });
    }
    // Nothing of the deleted preload remains on the nodes; the artifact stays for others.
    let stays = ("preload/team/stays".to_owned(), format!("{reference}@{digest}"));
    wait_until("its pins are gone", || setup.pins() == [stays.clone(), stays.clone()]);
    setup.cluster.wait_for("stays", "Ready");
}

#[test]
fn a_tag_that_moves_in_the_middle_is_still_what_it_was_on_every_node() {
    let mut setup = Setup::start(&["one", "two"]);
    let gate = setup.registry.hold_blobs();
    let (reference, digest) = setup.artifact();
    setup.cluster.preload("tool", json!({"reference": reference, "parallelism": 1}));
    wait_until("one node fetches", || gate.waiting() > 0);
    let (_, name) = reference.split_once('/').expect("a host");
    let (repository, tag) = name.split_once(':').expect("a tag");
    let (_, moved) = setup.cluster.push(repository, tag);
    assert_ne!(moved, digest);
    // The next leader does not resolve it again either.
    setup.controller.kill();
    setup.controller = setup.cluster.controller();
    gate.open();
    setup.cluster.wait_for("tool", "Ready");
    let pinned = ("preload/team/tool".to_owned(), format!("{reference}@{digest}"));
    assert_eq!(setup.cluster.status("tool")["readyReference"], pinned.1.as_str());
    assert_eq!(setup.pins(), [pinned.clone(), pinned]);
}

#[test]
fn a_preload_that_is_deleted_in_the_middle_leaves_nothing_and_others_go_on() {
    let setup = Setup::start(&["one", "two"]);
    let gate = setup.registry.hold_blobs();
    let (reference, _) = setup.artifact();
    setup.cluster.preload("tool", json!({"reference": reference}));
    wait_until("both nodes fetch", || gate.waiting() >= 2);
    setup.cluster.api.delete(Kind::Preload, NAMESPACE, "tool");
    wait_until("no node is assigned any more", || setup.asked().is_empty());
    gate.open();
    let (other, digest) = setup.artifact();
    setup.cluster.preload("other", json!({"reference": other}));
    setup.cluster.wait_for("other", "Ready");
    let pinned = ("preload/team/other".to_owned(), format!("{other}@{digest}"));
    assert_eq!(setup.pins(), [pinned.clone(), pinned]);
    for object in setup.cluster.api.list(Kind::NodeArtifacts) {
        assert_eq!(object["status"]["artifacts"].as_array().map_or(0, Vec::len), 1, "{object}");
    }
}

#[test]
fn an_object_edited_to_nonsense_changes_nothing_on_any_node() {
    let setup = Setup::start(&["one", "two"]);
    let (reference, digest) = setup.artifact();
    setup.cluster.preload("tool", json!({"reference": reference}));
    setup.cluster.wait_for("tool", "Ready");
    let (ready, pins) = (format!("{reference}@{digest}"), setup.pins());
    for nonsense in ["UPPER/case:of:nothing", "a:b:c/d"] {
        setup.cluster.preload("tool", json!({"reference": nonsense}));
        setup.cluster.wait_for("tool", "InvalidSpec");
        assert_eq!(setup.cluster.condition("tool", "Stalled")["status"], "True");
        assert_eq!(setup.cluster.status("tool")["readyReference"], ready.as_str());
        assert_eq!((setup.asked().len(), setup.pins()), (2, pins.clone()));
    }
    setup.cluster.preload("tool", json!({"reference": reference}));
    setup.cluster.wait_for("tool", "Ready");

    // Fields of the controller are written again.
    let wanted = setup.cluster.wanted("one");
    for artifacts in [
        json!([]),
        json!([{
            "preload": "nobody/nothing", "reference": "???", "pin": true, "timeoutSeconds": 1,
            "backoffLimit": 0, "since": "1970-01-01T00:00:00Z",
        }]),
    ] {
        let spec = json!({"artifacts": artifacts});
        setup
            .cluster
            .api
            .apply(json!({"kind": "NodeArtifacts", "metadata": {"name": "one"}, "spec": spec}));
        wait_until("it is as it was", || {
            let now = setup.cluster.wanted("one");
            now.len() == 1 && now[0]["reference"] == wanted[0]["reference"]
        });
        wait_until("it is pinned again", || setup.pins() == pins);
    }
}

#[test]
fn a_node_that_is_labelled_is_selected_and_one_that_is_not_any_more_lets_go() {
    let setup = Setup::start(&["one", "two"]);
    let (reference, _) = setup.artifact();
    let selector = json!({"matchLabels": {"pool": "tools"}});
    setup.cluster.preload("tool", json!({"reference": reference, "selector": selector}));
    setup.cluster.wait_for("tool", "NoNodes");
    assert_eq!(setup.cluster.condition("tool", "Stalled")["status"], "False");
    let label = |labels: Value| {
        let metadata = json!({"name": "one", "labels": labels});
        setup.cluster.api.apply(json!({"kind": "Node", "metadata": metadata}));
    };
    label(json!({"pool": "tools"}));
    setup.cluster.wait_for("tool", "Ready");
    assert_eq!(setup.asked(), ["one"]);
    label(json!({}));
    wait_until("it lets go", || setup.asked().is_empty() && setup.pins().is_empty());
    wait_until("it is not counted", || setup.cluster.status("tool")["desired"] == 0);
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
