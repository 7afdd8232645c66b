//! Tests when the registry is asked, and when it is not.

use tonic::Code;

use crate::support::{ForwardedRequest, Layer, Manifest, Node, digest, registry, unique};

/// Moves the tag of a repository to an artifact of one file of this name.
fn push(repository: &str, tag: &str, file: &str) -> String {
    Manifest::artifact([Layer::titled(file, file)]).push(registry(), repository, tag)
}

fn of_manifests(requests: &[ForwardedRequest]) -> usize {
    requests.iter().filter(|request| request.path.contains("/manifests/")).count()
}

fn of_blobs(requests: &[ForwardedRequest]) -> usize {
    requests.iter().filter(|request| request.path.contains("/blobs/")).count()
}

#[test]
fn a_cached_tag_is_mounted_without_a_request() {
    let node = Node::start();
    let repository = unique("cached");
    push(&repository, "v1", "first");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    node.mount(&reference);
    node.proxy.take_requests();
    push(&repository, "v1", "second");
    assert_eq!(node.mount(&reference).1.names(), ["first"]);
    assert_eq!(node.proxy.requests(), []);
}

#[test]
fn latest_is_always_asked_for_and_content_that_is_there_is_not_fetched_again() {
    let node = Node::start();
    let repository = unique("latest");
    push(&repository, "latest", "first");
    let reference = node.proxy.reference(&format!("{repository}:latest"));
    node.mount(&reference);
    node.proxy.take_requests();
    node.mount(&reference);
    let requests = node.proxy.take_requests();
    assert!(of_manifests(&requests) >= 1, "{requests:?}");
    assert_eq!(of_blobs(&requests), 0, "{requests:?}");
    push(&repository, "latest", "second");
    assert_eq!(node.mount(&reference).1.names(), ["second"]);
}

#[test]
fn always_follows_a_tag_that_moved() {
    let node = Node::start();
    let repository = unique("moved");
    push(&repository, "v1", "first");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let (old, _) = node.mount(&reference);
    push(&repository, "v1", "second");
    let (_, tree) = node.mount_with(&reference, |volume| volume.attribute("pullPolicy", "Always"));
    assert_eq!(tree.names(), ["second"]);
    assert_eq!(
        crate::support::Tree::of(old.target()).names(),
        ["first"],
        "a mounted volume never changes"
    );
    // IfNotPresent finds what Always resolved.
    assert_eq!(node.mount(&reference).1.names(), ["second"]);
}

#[test]
fn always_with_a_digest_asks_only_for_proof() {
    let node = Node::start();
    let repository = unique("digest");
    let manifest = push(&repository, "v1", "file");
    let reference = node.proxy.reference(&format!("{repository}@{manifest}"));
    node.mount(&reference);
    node.proxy.take_requests();
    node.mount_with(&reference, |volume| volume.attribute("pullPolicy", "Always"));
    let requests = node.proxy.take_requests();
    assert!(of_manifests(&requests) >= 1, "{requests:?}");
    assert_eq!(of_blobs(&requests), 0, "{requests:?}");
}

#[test]
fn a_digest_is_fetched_once_whatever_tags_name_it() {
    let node = Node::start();
    let repository = unique("tags");
    push(&repository, "v1", "file");
    push(&repository, "v2", "file");
    node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    node.mount(&node.proxy.reference(&format!("{repository}:v2")));
    assert_eq!(node.proxy.fetches(&digest(b"file")), 1);
}

#[test]
fn never_mounts_what_is_cached_and_nothing_else() {
    let node = Node::start();
    let repository = unique("never");
    push(&repository, "v1", "file");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let volume = node.kubelet.new_volume(&reference).attribute("pullPolicy", "Never");
    node.kubelet.publish_badly(&volume, Code::NotFound);
    assert_eq!(node.proxy.requests(), []);
    node.mount(&reference);
    node.proxy.take_requests();
    node.kubelet.publish_well(&volume);
    assert_eq!(node.proxy.requests(), []);
}

#[test]
fn always_fails_without_its_registry_unless_told_to_use_the_cache() {
    let node = Node::start();
    let repository = unique("down");
    push(&repository, "v1", "file");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    node.mount(&reference);
    node.proxy.go_down();
    let always = node.kubelet.new_volume(&reference).attribute("pullPolicy", "Always");
    node.kubelet.publish_badly(&always, Code::Unavailable);
    let explicit = node
        .kubelet
        .new_volume(&reference)
        .attribute("pullPolicy", "Always")
        .attribute("ifUnavailable", "Fail");
    node.kubelet.publish_badly(&explicit, Code::Unavailable);
    let cached = always.clone().attribute("ifUnavailable", "UseCached");
    node.kubelet.publish_well(&cached);
    node.kubelet.unpublish(&cached);
}

#[test]
fn use_cached_cannot_use_what_was_never_there() {
    let node = Node::start();
    node.proxy.go_down();
    let volume = node
        .kubelet
        .new_volume(&node.proxy.reference("never/pulled:v1"))
        .attribute("pullPolicy", "Always")
        .attribute("ifUnavailable", "UseCached");
    node.kubelet.publish_badly(&volume, Code::Unavailable);
}

#[test]
fn use_cached_is_no_answer_to_a_registry_that_says_no() {
    let node = Node::start();
    let repository = unique("deleted");
    let manifest = push(&repository, "v1", "file");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    node.mount(&reference);
    registry().delete_manifest(&repository, &manifest);
    let volume = node
        .kubelet
        .new_volume(&reference)
        .attribute("pullPolicy", "Always")
        .attribute("ifUnavailable", "UseCached");
    node.kubelet.publish_badly(&volume, Code::NotFound);
    // Without a request, the cached content still serves.
    node.mount(&reference);
}

#[test]
fn a_tag_that_does_not_exist_is_not_found_and_found_once_pushed() {
    let node = Node::start();
    let repository = unique("later");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let volume = node.kubelet.new_volume(&reference);
    let message = node.kubelet.publish_badly(&volume, Code::NotFound);
    assert!(message.contains(&repository), "{message}");
    push(&repository, "v1", "file");
    node.kubelet.publish_well(&volume);
}
