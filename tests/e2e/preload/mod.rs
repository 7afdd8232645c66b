//! Tests preloads: the real controller and real node plugins, a simulated API server, and a real registry.

mod node_status;
mod rollback;
mod scheduling;

use std::fs;

use base64::Engine as _;
use jiff::Timestamp;
use serde_json::json;

use crate::support::{
    Image, Layer, Manifest, OCI_INDEX, OCI_MANIFEST, Proxy, Tar,
    api_server::{ApiServer, Fault, Kind},
    descriptor, node_architecture, noise,
    preload_cluster::{Cluster, NAMESPACE},
    private_registry, push_index, registry, unique, wait_until,
};

#[test]
fn nodes_get_what_is_applied_and_what_is_rolled_and_let_go_of_what_is_deleted() {
    let mut cluster = Cluster::new(&["one", "two"]);
    let _controller = cluster.controller();
    cluster.start_node("one");
    cluster.start_node("two");
    let repository = unique("fleet");
    let (first, first_digest) = cluster.push(&repository, "v1");
    cluster.preload("tool", json!({"reference": first}));
    cluster.wait_for("tool", "Ready");
    wait_until("the numbers follow", || cluster.status("tool")["ready"] == 2);
    let status = cluster.status("tool");
    let ready = format!("{first}@{first_digest}");
    assert_eq!(status["readyReference"], ready.as_str());
    assert_eq!((&status["desired"], &status["failed"]), (&json!(2), &json!(0)));
    let pinned = ("preload/team/tool".to_owned(), ready.clone());
    assert_eq!(cluster.pins("one"), [pinned]);

    // The tag moves: nothing happens until the reference is changed.
    cluster.push(&repository, "v1");
    let (second, second_digest) = cluster.push(&repository, "v2");
    cluster.preload("tool", json!({"reference": first, "parallelism": 1}));
    cluster.wait_for("tool", "Ready");
    assert_eq!(cluster.status("tool")["readyReference"], ready.as_str());
    cluster.preload("tool", json!({"reference": second}));
    cluster.wait_for("tool", "Ready");
    let next = format!("{second}@{second_digest}");
    assert_eq!(cluster.status("tool")["readyReference"], next.as_str());
    let pin = |reference: &str| ("preload/team/tool".to_owned(), reference.to_owned());
    assert_eq!(cluster.pins("two"), [pin(&ready), pin(&next)], "it is kept for the way back");
    let (third, third_digest) = cluster.push(&repository, "v3");
    cluster.preload("tool", json!({"reference": third}));
    cluster.wait_for("tool", "Ready");
    let (previous, next) = (next, format!("{third}@{third_digest}"));
    let kept = [pin(&previous), pin(&next)];
    wait_until("the old one is let go", || cluster.pins("two") == kept);
    let pinned = pin(&next);

    // A node that joins, and one that leaves.
    cluster.join("three");
    cluster.start_node("three");
    wait_until("the new node has it", || cluster.status("tool")["ready"] == 3);
    assert_eq!(cluster.pins("three"), [pinned]);
    cluster.api.delete(Kind::Node, "", "three");
    wait_until("the node is forgotten", || cluster.status("tool")["desired"] == 2);

    // Another preload of the same artifact is independent.
    cluster.preload("twin", json!({"reference": next}));
    cluster.wait_for("twin", "Ready");
    cluster.api.delete(Kind::Preload, NAMESPACE, "tool");
    let twin = ("preload/team/twin".to_owned(), next);
    wait_until("one pin is left", || cluster.pins("one") == [twin.clone()]);
    cluster.api.delete(Kind::Preload, NAMESPACE, "twin");
    wait_until("no pin is left", || cluster.pins("one").is_empty());
}

#[test]
fn a_killed_controller_or_node_plugin_continues() {
    let mut cluster = Cluster::new(&["one"]);
    let mut controller = cluster.controller();
    cluster.start_node("one");
    let (first, _) = cluster.artifact("v1");
    cluster.preload("tool", json!({"reference": first, "timeoutSeconds": 60}));
    cluster.wait_for("tool", "Ready");
    let before = cluster.wanted("one");
    controller.kill();
    // There is no leader, and events happen.
    let (second, digest) = cluster.artifact("v2");
    cluster.preload("tool", json!({"reference": second}));
    cluster.join("two");
    cluster.start_node("two");
    assert_eq!(cluster.wanted("one"), before);
    let mut controller = cluster.controller();
    cluster.wait_for("tool", "Ready");
    wait_until("both have it", || cluster.status("tool")["ready"] == 2);
    assert_eq!(cluster.status("tool")["readyReference"], format!("{second}@{digest}").as_str());

    // A node plugin is killed during a pull: its next process reports the content on the node, and fetches the rest.
    let node = cluster.drivers.remove(0).kill();
    let (third, _) = cluster.artifact("v3");
    cluster.preload("tool", json!({"reference": third}));
    wait_until("it is wanted", || {
        cluster
            .wanted("one")
            .iter()
            .any(|wanted| wanted["reference"].as_str().is_some_and(|text| text.starts_with(&third)))
    });
    cluster.drivers.push(node.start());
    cluster.wait_for("tool", "Ready");
    // An orderly end hands over at once.
    controller.end();
    let _controller = cluster.controller();
    let (fourth, _) = cluster.artifact("v4");
    cluster.preload("tool", json!({"reference": fourth}));
    cluster.wait_for("tool", "Ready");
    let lease = cluster.api.get(Kind::Lease, "csi-driver-oci", "csi-driver-oci-controller");
    assert_eq!(lease["spec"]["leaseTransitions"], 2);
}

#[test]
fn an_api_server_that_is_troubled_is_borne() {
    let mut cluster = Cluster::new(&["one"]);
    let _controller = cluster.controller();
    cluster.start_node("one");
    let (first, _) = cluster.artifact("v1");
    cluster.preload("tool", json!({"reference": first}));
    cluster.wait_for("tool", "Ready");
    for round in 2..5 {
        for (kind, writes, status) in [
            (Kind::Preload, true, 429),
            (Kind::Preload, true, 409),
            (Kind::NodeArtifacts, true, 500),
            (Kind::NodeArtifacts, false, 503),
        ] {
            cluster.api.fail(Fault { kind, writes, status, times: 1 });
        }
        cluster.api.forget_history();
        cluster.api.break_watches();
        let (next, digest) = cluster.artifact(&format!("v{round}"));
        cluster.preload("tool", json!({"reference": next}));
        cluster.wait_for("tool", "Ready");
        assert_eq!(cluster.status("tool")["readyReference"], format!("{next}@{digest}").as_str());
    }
}

#[test]
fn definitions_that_are_older_than_the_programs_cost_no_writes() {
    let mut cluster = Cluster::new(&["one"]);
    cluster.api.forget_field(Kind::NodeArtifacts, "capacityBytes");
    cluster.api.forget_field(Kind::NodeArtifacts, "artifacts.reference");
    cluster.api.forget_field(Kind::NodeArtifacts, "artifacts.since");
    cluster.api.forget_field(Kind::Preload, "bytes");
    let _controller = cluster.controller();
    cluster.start_node("one");
    let (reference, _) = cluster.artifact("v1");
    cluster.preload("tool", json!({"reference": reference}));
    cluster.wait_for("tool", "Ready");
    wait_until("the numbers follow", || cluster.status("tool")["ready"] == 1);
    assert!(cluster.status("tool")["bytes"].is_null(), "the field is known");
    let renewed = || {
        let lease = cluster.api.get(Kind::Lease, "csi-driver-oci", "csi-driver-oci-controller");
        let time = lease["spec"]["renewTime"].as_str().expect("a time").parse::<Timestamp>();
        time.expect("a time").as_second()
    };
    let (begun, written) = (renewed(), cluster.api.counts().writes);
    wait_until("the lease was renewed for a while", || renewed() >= begun + 12);
    let writes = cluster.api.counts().writes - written;
    // A leader that had to start again writes once more; an endless loop would be two writes a second.
    assert!(writes <= 10, "{writes} writes though nothing happens");
}

#[test]
fn private_artifacts_are_pulled_with_the_secrets_of_the_preload_and_stay_private() {
    const PASSWORD: &str = "planted-password-of-the-team";
    let private = private_registry("robot", PASSWORD);
    let mut cluster = Cluster::before(&private, &["one"]);
    let _controller = cluster.controller();
    cluster.start_node("one");
    let repository = unique("private");
    let layer = Layer::titled("secret.txt", format!("of {repository}"));
    let digest =
        Manifest::artifact([layer]).push(&private.as_user("robot", PASSWORD), &repository, "v1");
    let reference = cluster.reference(&format!("{repository}:v1"));
    let spec = |secrets: &[&str]| json!({"reference": reference, "pullSecrets": secrets});
    cluster.preload("tool", spec(&[]));
    cluster.wait_for("tool", "Unauthorized");
    assert_eq!(cluster.condition("tool", "Stalled")["status"], "True");
    cluster.preload("tool", spec(&["gone"]));
    cluster.wait_for("tool", "SecretMissing");
    secret(&cluster.api, "typeless", "Opaque", &private.host(), "robot", PASSWORD);
    cluster.preload("tool", spec(&["typeless"]));
    cluster.wait_for("tool", "SecretUnusable");
    secret(&cluster.api, "wrong", DOCKER, &private.host(), "robot", "not-it");
    cluster.preload("tool", spec(&["wrong"]));
    cluster.wait_for("tool", "Unauthorized");
    secret(&cluster.api, "other", DOCKER, "elsewhere.example.com", "robot", PASSWORD);
    cluster.preload("tool", spec(&["other"]));
    cluster.wait_for("tool", "Unauthorized");
    secret(&cluster.api, "right", DOCKER, &private.host(), "robot", PASSWORD);
    cluster.preload("tool", spec(&["other", "right"]));
    cluster.wait_for("tool", "Ready");
    assert_eq!(cluster.status("tool")["readyReference"], format!("{reference}@{digest}").as_str());
    let seen = cluster.api.list(Kind::NodeArtifacts);
    let written = format!("{seen:?}{:?}", cluster.api.list(Kind::Preload));
    let encoded = base64::engine::general_purpose::STANDARD.encode(format!("robot:{PASSWORD}"));
    let log = cluster.drivers[0].log()
        + &fs::read_to_string(cluster.sandbox.path().join("controller.log")).expect("a log");
    for text in [&written, &log] {
        assert!(!text.contains(PASSWORD) && !text.contains(&encoded));
    }
    assert!(!cluster.drivers[0].log().is_empty());
}

#[test]
fn a_plugin_that_is_restarted_waits_for_credentials_and_has_not_failed() {
    const PASSWORD: &str = "password-of-the-restarted";
    let private = private_registry("robot", PASSWORD);
    let proxy = Proxy::new(&private);
    let mut cluster = Cluster::before(&private, &["one"]);
    let mut controller = cluster.controller();
    cluster.start_node("one");
    secret(&cluster.api, "robot", DOCKER, &proxy.host(), "robot", PASSWORD);
    let repository = unique("private");
    let layer = Layer::titled("secret.txt", format!("of {repository}"));
    Manifest::artifact([layer]).push(&private.as_user("robot", PASSWORD), &repository, "v1");
    let reference = proxy.reference(&format!("{repository}:v1"));
    let gate = proxy.hold_blobs();
    let spec = json!({"reference": reference, "pullSecrets": ["robot"], "backoffLimit": 0});
    cluster.preload("tool", spec);
    wait_until("the node fetches", || gate.waiting() > 0);
    controller.end();
    let node = cluster.drivers.remove(0).kill();
    gate.open();
    cluster.drivers.push(node.start());
    let held = || {
        let object = cluster.api.get(Kind::NodeArtifacts, "", "one");
        object["status"]["artifacts"][0].clone()
    };
    wait_until("the node says what it lacks", || held()["reason"] == "WaitingForCredentials");
    assert_eq!(held()["phase"], "Waiting");
    let _controller = cluster.controller();
    cluster.wait_for("tool", "Ready");
}

#[test]
fn a_preload_with_secrets_holds_up_no_other_one_after_a_change_of_the_leader() {
    const PASSWORD: &str = "password-of-two";
    let private = private_registry("robot", PASSWORD);
    let mut cluster = Cluster::before(&private, &["one"]);
    let mut controller = cluster.controller();
    cluster.start_node("one");
    secret(&cluster.api, "robot", DOCKER, &private.host(), "robot", PASSWORD);
    let user = private.as_user("robot", PASSWORD);
    let push = |tag: &str| {
        let repository = unique("private");
        let layer = Layer::titled("secret.txt", format!("of {repository}"));
        let digest = Manifest::artifact([layer]).push(&user, &repository, tag);
        (cluster.reference(&format!("{repository}:{tag}")), digest)
    };
    let spec = |reference: &str| json!({"reference": reference, "pullSecrets": ["robot"]});
    let (first, _) = push("v1");
    cluster.preload("one", spec(&first));
    cluster.preload("two", spec(&first));
    cluster.wait_for("one", "Ready");
    cluster.wait_for("two", "Ready");
    controller.end();
    let _controller = cluster.controller();
    let (second, digest) = push("v2");
    cluster.preload("two", spec(&second));
    cluster.wait_for("two", "Ready");
    assert_eq!(cluster.status("two")["readyReference"], format!("{second}@{digest}").as_str());
    assert_eq!(cluster.condition("one", "Ready")["status"], "True");
}

const DOCKER: &str = "kubernetes.io/dockerconfigjson";

fn secret(api: &ApiServer, name: &str, kind: &str, host: &str, user: &str, password: &str) {
    let config = json!({"auths": {host: {"username": user, "password": password}}}).to_string();
    let data = base64::engine::general_purpose::STANDARD.encode(config);
    api.apply(json!({
        "kind": "Secret",
        "metadata": {"namespace": NAMESPACE, "name": name},
        "type": kind,
        "data": {".dockerconfigjson": data},
    }));
}

#[test]
fn what_is_wrong_is_said_and_the_rest_goes_on() {
    let mut cluster = Cluster::new(&["one"]);
    let _controller = cluster.controller();
    cluster.start_node("one");
    let (good, _) = cluster.artifact("v1");
    let index = index_of_another_platform(&cluster);
    let gone = cluster.reference(&format!("{}:v1", unique("gone")));
    let architecture = format!("linux/{}", node_architecture());
    cluster.preload("good", json!({"reference": good}));
    cluster.preload("gone", json!({"reference": gone}));
    cluster.preload("nonsense", json!({"reference": "UPPER/case:of:nothing"}));
    cluster.preload("unreachable", json!({"reference": "127.0.0.1:1/tool:v1"}));
    cluster.preload("nowhere", json!({"reference": good, "selector": {"names": ["gone"]}}));
    cluster.preload("index", json!({"reference": index, "backoffLimit": 0}));
    cluster.preload("platform", json!({"reference": index, "platforms": [architecture]}));
    for (name, reason, stalled) in [
        ("gone", "ReferenceNotFound", "True"),
        ("nonsense", "InvalidSpec", "True"),
        ("unreachable", "RegistryUnavailable", "False"),
        ("nowhere", "NoNodes", "False"),
        ("index", "NodesFailed", "True"),
        ("platform", "PlatformMissing", "True"),
        ("good", "Ready", "False"),
    ] {
        cluster.wait_for(name, reason);
        assert_eq!(cluster.condition(name, "Stalled")["status"], stalled, "{name}");
        let message = cluster.condition(name, "Ready")["message"].clone();
        assert!(message.as_str().is_some_and(|message| message.len() > 10), "{name}: {message}");
    }
    let bytes = &cluster.status("index")["bytes"];
    assert!(bytes.as_u64().is_some_and(|bytes| bytes > 0), "{bytes} are in the index");
    let failed = &cluster.status("index")["failedNodes"];
    assert_eq!(failed[0]["node"], "one");
    assert_eq!(failed[0]["reason"], "PlatformMissing");

    // A ready preload stays ready when a node without a driver joins.
    cluster.join("two");
    wait_until("it has its object", || {
        cluster.api.get(Kind::NodeArtifacts, "", "two")["metadata"].is_object()
    });
    assert_eq!(cluster.status("good")["desired"], 1);
    cluster.api.delete(Kind::Node, "", "two");
    // Objects that the schema refuses.
    for spec in [
        json!({}),
        json!({"reference": ""}),
        json!({"reference": good, "parallelism": 0}),
        json!({"reference": good, "parallelism": "half of them"}),
        json!({"reference": good, "backoffLimit": -1}),
        json!({"reference": good, "timeoutSeconds": "long"}),
        json!({"reference": good, "pullSecrets": ["a", "a"]}),
    ] {
        let metadata = json!({"namespace": NAMESPACE, "name": "refused"});
        let object = json!({"kind": "ArtifactPreload", "metadata": metadata, "spec": spec});
        assert!(cluster.api.try_apply(object).is_err(), "{spec}");
    }
    // Deleted during the pull, or corrected.
    for name in ["gone", "nonsense", "unreachable", "nowhere", "index", "platform"] {
        cluster.api.delete(Kind::Preload, NAMESPACE, name);
    }
    cluster.preload("good", json!({"reference": gone}));
    cluster.wait_for("good", "ReferenceNotFound");
    assert_eq!(cluster.pins("one").len(), 1, "the last good one stays");
    cluster.preload("good", json!({"reference": good}));
    cluster.wait_for("good", "Ready");
}

#[test]
fn an_index_in_an_index_is_preloaded_for_its_platforms() {
    let mut cluster = Cluster::new(&["one"]);
    let _controller = cluster.controller();
    cluster.start_node("one");
    let repository = unique("nested");
    let image = Image::new().layer(Tar::new().file("file", 0o644, "content").finish());
    image.push(registry(), &repository, "single");
    let mut inner = descriptor(OCI_MANIFEST, image.manifest().json().to_string().as_bytes());
    let architecture = format!("linux/{}", node_architecture());
    inner["platform"] = json!({"os": "linux", "architecture": node_architecture()});
    // An index as `crane index append --flatten=false` creates it, and one that names the platform of the inner one.
    for (tag, named) in [("unnamed", false), ("named", true)] {
        let bytes = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [inner]});
        push_index(registry(), &repository, "inner", std::slice::from_ref(&inner));
        let mut entry = descriptor(OCI_INDEX, bytes.to_string().as_bytes());
        if named {
            entry["platform"] = json!({"os": "linux", "architecture": node_architecture()});
        }
        push_index(registry(), &repository, tag, &[entry]);
        let reference = cluster.reference(&format!("{repository}:{tag}"));
        cluster.preload(tag, json!({"reference": reference, "platforms": [architecture]}));
        cluster.wait_for(tag, "Ready");
        assert!(cluster.status(tag)["bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{tag}");
        assert_eq!(cluster.status(tag)["platforms"], json!([architecture]), "{tag}");
        let missing = format!("missing-{tag}");
        cluster.preload(&missing, json!({"reference": reference, "platforms": ["linux/s390x"]}));
        cluster.wait_for(&missing, "PlatformMissing");
    }
}

/// Pushes an index without an entry for the nodes of this machine.
fn index_of_another_platform(cluster: &Cluster) -> String {
    let repository = unique("index");
    let other = if node_architecture() == "amd64" { "arm64" } else { "amd64" };
    let image = Image::new()
        .platform("linux", other)
        .layer(Tar::new().file("file", 0o644, "content").finish());
    let bytes = image.manifest().json().to_string();
    image.push(registry(), &repository, "single");
    let mut entry = descriptor(OCI_MANIFEST, bytes.as_bytes());
    entry["platform"] = json!({"os": "linux", "architecture": other});
    push_index(registry(), &repository, "v1", &[entry]);
    cluster.reference(&format!("{repository}:v1"))
}

/// Pushes an artifact of one file of this many MiB that do not compress.
fn large(cluster: &Cluster, mebibytes: usize) -> String {
    let repository = unique("large");
    let layer = Layer::titled("file", noise(mebibytes << 20, mebibytes as u64));
    Manifest::artifact([layer]).push(registry(), &repository, "v1");
    cluster.reference(&format!("{repository}:v1"))
}

#[test]
fn a_node_whose_disk_is_too_small_is_not_asked_and_goes_on_by_itself_when_it_grows() {
    let mut cluster = Cluster::new(&["full", "roomy"]);
    let _controller = cluster.controller();
    let disk = cluster.sandbox.filesystem_of(128 << 20, "ext4", "disk", "rw");
    let filler = disk.join("of-somebody-else");
    fs::write(&filler, noise(100 << 20, 1)).expect("a full disk");
    fs::create_dir(disk.join("state")).expect("a folder");
    let full = cluster
        .options("full")
        .state(&disk.join("state"))
        .configuration("cache: {minFreePercent: 0, minFreeInodesPercent: 0}\n");
    cluster.drivers.push(full.start());
    cluster.start_node("roomy");
    let reference = large(&cluster, 30);
    // With a parallelism of one, which the node that can never hold it does not use up.
    cluster.preload("large", json!({"reference": reference, "parallelism": 1}));
    cluster.wait_for("large", "NodesFailed");
    let status = cluster.status("large");
    assert_eq!((&status["ready"], &status["failed"]), (&json!(1), &json!(1)), "{status}");
    assert_eq!(status["bytes"], 30 << 20);
    let failed = &status["failedNodes"][0];
    assert_eq!((&failed["node"], &failed["reason"]), (&json!("full"), &json!("NoRoom")));
    let message = failed["message"].as_str().expect("a message");
    assert!(message.contains("30.0 MiB") && message.contains("enlarge its disk"), "{message}");
    assert_eq!(cluster.condition("large", "Stalled")["status"], "True");
    assert!(cluster.wanted("full").is_empty(), "it is asked for what it cannot hold");

    fs::remove_file(filler).expect("a disk with room");
    cluster.wait_for("large", "Ready");
    assert_eq!(cluster.pins("roomy").len(), 1);
    assert_eq!(cluster.wanted("full").len(), 1);
}

#[test]
fn a_namespace_holds_no_more_than_its_quota_and_is_told_so() {
    let mut cluster = Cluster::new(&["one"]);
    let _controller = cluster.controller_with(&[
        "--max-preloads-per-namespace=3",
        "--max-pinned-bytes-per-namespace=4Mi",
    ]);
    cluster.start_node("one");
    let (first, second) = (large(&cluster, 3), large(&cluster, 2));
    cluster.preload("first", json!({"reference": first}));
    cluster.wait_for("first", "Ready");
    // Fetched, and not kept.
    cluster.preload("second", json!({"reference": second, "backoffLimit": 0}));
    cluster.wait_for("second", "QuotaExceeded");
    let failed = cluster.status("second")["failedNodes"][0].clone();
    assert_eq!((&failed["node"], &failed["reason"]), (&json!("one"), &json!("QuotaExceeded")));
    let message = failed["message"].as_str().expect("a message");
    assert!(message.contains("the namespace team") && message.contains("4.0 MiB"), "{message}");
    assert_eq!(cluster.condition("second", "Stalled")["status"], "True");
    assert_eq!(cluster.pins("one").len(), 1);
    // Without a pin it is cached content like any other.
    cluster.preload("second", json!({"reference": second, "pin": false}));
    cluster.wait_for("second", "Ready");

    let (small, _) = cluster.artifact("v1");
    cluster.preload("third", json!({"reference": small}));
    cluster.wait_for("third", "Ready");
    cluster.preload("z-fourth", json!({"reference": small}));
    cluster.wait_for("z-fourth", "QuotaExceeded");
    let ready = cluster.condition("z-fourth", "Ready");
    assert!(ready["message"].as_str().is_some_and(|text| text.contains("4 preloads")), "{ready}");
    cluster.api.delete(Kind::Preload, NAMESPACE, "second");
    cluster.wait_for("z-fourth", "Ready");
}

#[test]
fn a_node_that_is_full_is_named_and_pods_are_served_without_an_api_server() {
    let mut cluster = Cluster::new(&["full", "roomy"]);
    let _controller = cluster.controller();
    let full = cluster.options("full").configuration(
        "cache: {maxBytes: 4Mi, maxPinnedBytes: 4Mi, minFreePercent: 0, minFreeInodesPercent: 0}\n",
    );
    cluster.drivers.push(full.start());
    cluster.start_node("roomy");
    // Each would fit alone, but not both.
    let (first, second) = (large(&cluster, 3), large(&cluster, 2));
    cluster.preload("first", json!({"reference": first}));
    cluster.wait_for("first", "Ready");
    cluster.preload("second", json!({"reference": second, "backoffLimit": 0}));
    cluster.wait_for("second", "NodesFailed");
    let failed = cluster.status("second")["failedNodes"].clone();
    assert_eq!(failed[0]["node"], "full", "{failed}");
    assert_eq!(failed[0]["reason"], "NoRoom", "{failed}");
    assert_eq!(cluster.status("second")["ready"], 1);
    assert_eq!(cluster.condition("first", "Ready")["status"], "True");
    let kubelet = cluster.drivers[1].kubelet();
    let (small, _) = cluster.artifact("v1");
    let volume = kubelet.new_volume(&small);
    kubelet.publish_well(&volume);
    kubelet.unpublish(&volume);
}
