//! Tests the configuration's list of references to keep on a node.

use std::fs;

use serde_json::{Value, json};
use tonic::Code;

use crate::support::{
    Admin, Layer, Manifest, Node, SmallArtifact, Volume, metrics, registry, unique, wait_until,
};

const ROOMY: &str = "cache: {minFreePercent: 0, minFreeInodesPercent: 0, highThresholdPercent: 100, \
                     lowThresholdPercent: 100, minimumAge: 0s}\n";

/// Starts a node with an empty list, which it checks as often as it can.
fn node() -> (Node, Admin) {
    Admin::start(ROOMY)
}

/// Replaces the list's file, as an editor or the kubelet would.
fn keep(node: &Node, references: &[&str], more: &str) {
    let head = "apiVersion: oci.custom.io/v1alpha1\nkind: NodeConfiguration\n";
    let warm = format!("warm: {{references: {}, {more}}}\n", json!(references));
    let path = node.sandbox.path().join("node.yaml");
    fs::write(path.with_extension("new"), format!("{head}{ROOMY}{warm}")).expect("written");
    fs::rename(path.with_extension("new"), path).expect("renamed");
}

fn state(admin: &Admin, reference: &str) -> Value {
    let status = admin.json(&["status"]);
    let list = status["warm"].as_array().expect("a list").clone();
    list.into_iter().find(|warm| warm["reference"] == reference).unwrap_or_default()
}

#[track_caller]
fn wait_for(admin: &Admin, reference: &str, phase: &str) -> Value {
    let what = format!("{reference} is {phase}");
    wait_until(&what, || state(admin, reference)["state"] == phase);
    state(admin, reference)
}

/// Moves a tag to other content. Returns its digest.
fn move_tag(artifact: &SmallArtifact) -> String {
    let content = unique("moved");
    Manifest::artifact([Layer::titled("file.txt", content)]).push(
        registry(),
        &artifact.repository,
        "v1",
    )
}

fn unpublish(node: &Node, admin: &Admin, volume: &Volume) {
    node.kubelet.unpublish(volume);
    wait_until("the record is gone", || admin.json(&["status"])["published"] == 0);
}

#[test]
fn what_is_listed_comes_without_a_restart_and_stays_pinned() {
    let (node, admin) = node();
    let artifact = node.small_artifact();
    let (reference, missing) =
        (node.proxy.reference(&artifact.name), node.proxy.reference("there/is/none:v1"));
    keep(&node, &[&missing, &reference], "spread: 0s");
    let here = wait_for(&admin, &reference, "present");
    assert_eq!(here["digest"], artifact.digest.as_str());
    let failed = wait_for(&admin, &missing, "failed");
    assert!(failed["reason"].as_str().expect("text").contains("there/is/none"), "{failed}");
    assert_eq!(admin.json(&["ls"])["artifacts"][0]["pins"], json!(["config"]));
    let told = admin.text(&["status"]);
    assert!(told.contains("1 of 2 references present, 1 failed"), "{told}");
    assert!(told.contains(&format!("{missing}: failed; again in ")), "{told}");
    let told = admin.text(&["inspect", &missing]);
    assert!(told.starts_with("kept warm by the configuration: failed"), "{told}");
    admin.text(&["gc", "--target", "0"]);
    assert!(admin.refused(&["rm", &reference]).contains("pinned by config"));
    // A pod finds it.
    node.proxy.go_down();
    let (volume, _) = node.mount(&reference);
    assert_eq!(
        fs::read_to_string(volume.target().join("file.txt")).expect("the file"),
        artifact.content
    );
}

#[test]
fn a_reference_removed_from_the_list_loses_only_the_pin_of_the_list() {
    let (node, admin) = node();
    let [one, two, three] = [(); 3].map(|()| node.proxy.reference(&node.small_artifact().name));
    keep(&node, &[&one, &two, &three], "spread: 0s");
    for reference in [&one, &two, &three] {
        wait_for(&admin, reference, "present");
    }
    admin.text(&["pin", &one]);
    keep(&node, &[&three], "spread: 0s");
    wait_until("two are gone from the list", || {
        admin.json(&["status"])["warm"].as_array().map(Vec::len) == Some(1)
    });
    wait_until("their pins are gone", || {
        let list = admin.json(&["gc", "--target", "0"]);
        drop(list);
        !admin.holds(&two)
    });
    assert!(admin.holds(&one) && admin.holds(&three));
    // A restart keeps listed references, and removes those that are no longer listed.
    node.driver.terminate();
    let Node { driver, sandbox, .. } = node;
    let options = driver.wait();
    let text = fs::read_to_string(sandbox.path().join("node.yaml")).expect("the configuration");
    let (head, _) = text.split_once("warm:").expect("a section");
    fs::write(sandbox.path().join("node.yaml"), head).expect("written");
    let _driver = options.start();
    wait_until("the last one is not pinned any more", || {
        admin.text(&["gc", "--target", "0"]);
        !admin.holds(&three)
    });
    assert!(admin.holds(&one));
}

#[test]
fn a_tag_that_moves_is_fetched_and_means_what_it_meant_for_pods_that_do_not_ask() {
    let (node, admin) = node();
    let artifact = node.small_artifact();
    let reference = node.proxy.reference(&artifact.name);
    keep(&node, &[&reference], "spread: 0s, interval: 1s");
    wait_for(&admin, &reference, "present");
    let moved = move_tag(&artifact);
    wait_until("the new one is here", || {
        state(&admin, &reference)["newerDigest"] == moved.as_str()
    });
    assert_eq!(state(&admin, &reference)["digest"], artifact.digest.as_str());
    let told = admin.text(&["status"]);
    assert!(told.contains("its tag means") && told.contains("IfNotPresent"), "{told}");
    // Both stay, and each pod gets the digest of its policy.
    admin.text(&["gc", "--target", "0"]);
    let content = |policy: &str| {
        let (volume, _) = node.mount_with(&reference, |v| v.attribute("pullPolicy", policy));
        let content = fs::read_to_string(volume.target().join("file.txt")).expect("the file");
        unpublish(&node, &admin, &volume);
        content
    };
    node.proxy.take_requests();
    assert_eq!(content("IfNotPresent"), artifact.content);
    assert_eq!(node.proxy.fetches("/blobs/"), 0);
    assert_ne!(content("Always"), artifact.content);
    assert_eq!(node.proxy.fetches("/blobs/"), 0, "what Always means was here too");
    // A pod's pull has moved it for the others: the old pin is removed.
    wait_until("the old one is let go", || {
        let known = state(&admin, &reference);
        known["digest"] == moved.as_str() && known["newerDigest"].is_null()
    });
    wait_until("it may be evicted", || {
        admin.text(&["gc", "--target", "0"]);
        admin.json(&["ls"])["artifacts"].as_array().map(Vec::len) == Some(1)
    });
}

#[test]
fn a_followed_tag_moves_for_pods_once_its_content_is_here() {
    let (node, admin) = node();
    let artifact = node.small_artifact();
    let reference = node.proxy.reference(&artifact.name);
    keep(&node, &[&reference], "spread: 0s, interval: 1s, followTag: true");
    wait_for(&admin, &reference, "present");
    let gate = node.proxy.hold_blobs();
    let moved = move_tag(&artifact);
    wait_until("the new one is on its way", || gate.waiting() > 0);
    let (volume, _) = node.mount(&reference);
    assert_eq!(
        fs::read_to_string(volume.target().join("file.txt")).expect("the file"),
        artifact.content,
        "until it is here, the old one is shown"
    );
    unpublish(&node, &admin, &volume);
    gate.open();
    wait_until("it has moved", || state(&admin, &reference)["digest"] == moved.as_str());
    node.proxy.go_down();
    let (volume, _) = node.mount(&reference);
    assert_ne!(
        fs::read_to_string(volume.target().join("file.txt")).expect("the file"),
        artifact.content
    );
}

#[test]
fn a_registry_that_is_down_at_the_start_is_asked_again() {
    let (node, admin) = node();
    let (here, new) = (node.small_artifact(), node.small_artifact());
    let (here, new) = (node.proxy.reference(&here.name), node.proxy.reference(&new.name));
    keep(&node, &[&here], "spread: 0s");
    wait_for(&admin, &here, "present");
    node.proxy.go_down();
    keep(&node, &[&here, &new], "spread: 0s");
    let Node { driver, kubelet: _kubelet, proxy, sandbox: _sandbox } = node;
    let _driver = driver.restart();
    wait_for(&admin, &here, "present");
    let failed = wait_for(&admin, &new, "failed");
    assert!(failed["nextSeconds"].as_u64() <= Some(5), "{failed}");
    proxy.come_back();
    wait_for(&admin, &new, "present");
}

#[test]
fn a_node_waits_its_part_of_the_spread_and_a_pod_does_not() {
    let (node, admin) = node();
    let reference = node.proxy.reference(&node.small_artifact().name);
    keep(&node, &[&reference], "spread: 100h");
    let waiting = wait_for(&admin, &reference, "waiting");
    assert!(waiting["nextSeconds"].as_u64() > Some(60), "{waiting}");
    assert_eq!(node.proxy.requests().len(), 0, "no registry was asked");
    node.mount(&reference);
    // Another list: content on the node is pinned at once.
    let other = node.proxy.reference(&node.small_artifact().name);
    keep(&node, &[&other], "spread: 100h");
    wait_for(&admin, &other, "waiting");
    keep(&node, &[&reference], "spread: 100h");
    wait_for(&admin, &reference, "present");
    assert_eq!(admin.json(&["ls"])["artifacts"][0]["pins"], json!(["config"]));
}

#[test]
fn a_bad_change_keeps_the_last_good_list() {
    let port = crate::support::Port::new();
    let address = port.address();
    let mut endpoint = String::new();
    let node = Node::start_with(|sandbox, options| {
        endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
        options
            .configuration(ROOMY)
            .argument(&format!("--admin-endpoint={endpoint}"))
            .argument(&format!("--metrics-endpoint={address}"))
    });
    let admin = Admin::at(&endpoint);
    let reference = node.proxy.reference(&node.small_artifact().name);
    keep(&node, &[&reference], "spread: 0s");
    wait_for(&admin, &reference, "present");
    let has = |line: &str| metrics(address).lines().any(|found| found == line);
    assert!(has("csi_oci_warm_references{state=\"present\"} 1"), "{}", metrics(address));
    assert!(has("csi_oci_configuration_error 0"));
    keep(&node, &["r.io/NOT a reference"], "spread: 0s");
    wait_until("the mistake is told", || has("csi_oci_configuration_error 1"));
    assert_eq!(state(&admin, &reference)["state"], "present");
    keep(&node, &[&reference], "spread: 0s");
    wait_until("the mistake is gone", || has("csi_oci_configuration_error 0"));
    // At a start there is no last good list.
    keep(&node, &["r.io/NOT a reference"], "spread: 0s");
    let driver = node.driver.restart();
    let volume = driver.kubelet().new_volume(&reference);
    let message = driver.kubelet().publish_badly(&volume, Code::Unavailable);
    assert!(message.contains("line 4") && message.contains("r.io/NOT"), "{message}");
}
