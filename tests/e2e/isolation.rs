//! Tests that knowing a digest gives no access to content of others.

use std::fs;

use tonic::Code;

use crate::support::{FakeRegistry, Image, Layer, Manifest, Node, Tar, digest, registry, unique};

const SECRET: &[u8] = b"what only the first repository holds";

#[test]
fn naming_anothers_blob_in_a_manifest_of_ones_own_gets_nothing() {
    let node = Node::start();
    let repository = unique("owner");
    let manifest = Manifest::artifact([Layer::titled("secret", SECRET)]);
    manifest.push(registry(), &repository, "v1");
    let (owner, _) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    // The same manifest on a registry of the attacker, which knows the digest and not the content.
    let attacker = FakeRegistry::new();
    attacker.put_json("v1", &manifest.json());
    let volume = node.kubelet.new_volume(&attacker.reference("v1"));
    node.kubelet.publish_badly(&volume, Code::NotFound);
    volume.assert_nothing_left();
    // Nor with a promise to have it.
    let blob = format!("/blobs/{}", digest(SECRET));
    attacker.put_lying_blob(&digest(SECRET), vec![b'x'; SECRET.len()]);
    node.kubelet.publish_badly(&volume, Code::Internal);
    volume.assert_nothing_left();
    assert!(attacker.requests().iter().any(|request| request.path.ends_with(&blob)));
    node.kubelet.unpublish(&owner);
}

#[test]
fn naming_a_blob_of_another_repository_of_the_same_registry_gets_nothing() {
    let node = Node::start();
    let registry = FakeRegistry::new();
    let manifest = Manifest::artifact([Layer::titled("secret", SECRET)]);
    manifest.push(&registry, "owner", "v1");
    // A registry decides for each repository; this one has the blob in one of them alone.
    let of_owner = registry.reference("v1").replace("/hostile:", "/owner:");
    let (owner, _) = node.mount(&of_owner);
    let blob = digest(SECRET);
    registry.script(move |request| {
        let elsewhere = !request.path.contains("/owner/") && request.path.ends_with(&blob);
        elsewhere.then(|| crate::support::Answer::error(404, "BLOB_UNKNOWN"))
    });
    let volume = node.kubelet.new_volume(&registry.reference("v1"));
    node.kubelet.publish_badly(&volume, Code::NotFound);
    node.kubelet.unpublish(&owner);
}

#[test]
fn a_registry_that_sends_the_same_content_shares_it() {
    let node = Node::start();
    let repository = unique("first");
    let manifest = Manifest::artifact([Layer::titled("file", SECRET)]);
    manifest.push(registry(), &repository, "v1");
    let (first, tree) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    let other = FakeRegistry::new();
    manifest.push(&other, "hostile", "v1");
    let (second, same) = node.mount(&other.reference("v1"));
    assert_eq!(tree, same);
    let fetches =
        |path: &str| other.requests().iter().filter(|request| request.path.contains(path)).count();
    assert_eq!(fetches("/blobs/"), 1, "the blob is fetched once, as a proof");
    node.kubelet.unpublish(&second);
    let before = other.requests().len();
    let (third, _) = node.mount(&other.reference("v1"));
    assert_eq!(other.requests().len(), before, "proven once, nothing is asked again");
    node.kubelet.unpublish(&first);
    node.kubelet.unpublish(&third);
}

#[test]
fn a_damaged_layer_is_fetched_again_and_what_is_mounted_stays() {
    let node = Node::start();
    let repository = unique("damaged");
    let archive = Tar::new().file("a", 0o644, "A").file("b", 0o644, "B");
    Image::new().layer(archive.finish()).push(registry(), &repository, "v1");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let (whole, tree) = node.mount(&reference);
    // One flipped byte in the layer's index, which another selection of the same layer reads.
    let layer = fs::read_dir(node.driver.state().join("layers")).expect("layers").next();
    let index = layer.expect("a layer").expect("a layer").path().join("1/index");
    let mut bytes = fs::read(&index).expect("the index");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&index, bytes).expect("damaged");
    let part = node.kubelet.new_volume(&reference).attribute("include", "a");
    node.kubelet.publish_badly(&part, Code::Internal);
    node.kubelet.publish_well(&part);
    assert_eq!(fs::read_to_string(part.target().join("a")).expect("readable"), "A");
    assert_eq!(crate::support::Tree::of(whole.target()), tree);
    node.kubelet.unpublish(&part);
    node.kubelet.unpublish(&whole);
}

#[test]
fn a_yes_to_a_digest_does_not_open_what_another_registry_sent_inline() {
    let node = Node::start();
    let first = FakeRegistry::new();
    let manifest = Manifest::artifact([Layer::titled("secret", SECRET).inline()]);
    let pinned = manifest.push(&first, "hostile", "v1");
    let (owner, _) = node.mount(&first.reference("v1"));
    // Confirms every HEAD request, and has nothing to send.
    let attacker = FakeRegistry::new();
    attacker
        .script(|request| (request.method == "HEAD").then(|| crate::support::Answer::status(200)));
    let reference = attacker.reference("v1").replace(":v1", &format!("@{pinned}"));
    let volume = node.kubelet.new_volume(&reference);
    node.kubelet.publish_badly(&volume, Code::NotFound);
    volume.assert_nothing_left();
    node.kubelet.unpublish(&owner);
}

#[test]
fn a_registry_that_lies_fails_its_own_pods_and_no_others() {
    let node = Node::start();
    let repository = unique("honest");
    let manifest = Manifest::artifact([Layer::titled("file", SECRET)]);
    manifest.push(registry(), &repository, "v1");
    let liar = FakeRegistry::new();
    liar.put_json("v1", &manifest.json());
    liar.put_lying_blob(&digest(SECRET), vec![b'x'; SECRET.len()]);
    let honest = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    let lied_to: Vec<_> = (0..4).map(|_| node.kubelet.new_volume(&liar.reference("v1"))).collect();
    std::thread::scope(|scope| {
        // They need the same content at once, from both registries, in any order.
        for volume in &lied_to {
            scope.spawn(|| node.kubelet.publish_badly(volume, Code::Internal));
        }
        scope.spawn(|| node.kubelet.publish_well(&honest));
    });
    assert_eq!(fs::read(honest.target().join("file")).expect("the file"), SECRET);
    node.kubelet.unpublish(&honest);
}

#[test]
fn a_mode_that_one_volume_asked_for_is_not_another_volumes_default() {
    let node = Node::start();
    let repository = unique("modes");
    let manifest =
        Manifest::artifact([Layer::titled("run", "#!/bin/sh\n"), Layer::titled("text", "t")]);
    manifest.push(registry(), &repository, "v1");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let mode = |volume: &crate::support::Volume, name: &str| {
        use std::os::unix::fs::PermissionsExt as _;
        let metadata = fs::metadata(volume.target().join(name)).expect("a file");
        metadata.permissions().mode() & 0o777
    };
    let (plain, _) = node.mount_with(&reference, |volume| {
        volume.attribute("fileMode", "0444").attribute("include", "run")
    });
    let (executable, _) = node.mount_with(&reference, |volume| {
        volume.attribute("fileMode", "0555").attribute("include", "text")
    });
    assert_eq!((mode(&plain, "run"), mode(&executable, "text")), (0o444, 0o555));
    let (by_content, _) = node.mount(&reference);
    assert_eq!((mode(&by_content, "run"), mode(&by_content, "text")), (0o555, 0o444));
    for volume in [plain, executable, by_content] {
        node.kubelet.unpublish(&volume);
    }
}

#[test]
fn never_asks_no_registry_whatever_is_missing() {
    let node = Node::start();
    let artifact = node.small_artifact();
    let reference = node.proxy.reference(&artifact.name);
    let (volume, _) = node.mount(&reference);
    let before = node.proxy.requests().len();
    let never = |volume: crate::support::Volume| volume.attribute("pullPolicy", "Never");
    let (same, _) = node.mount_with(&reference, never);
    let other = never(node.kubelet.new_volume(&reference)).attribute("permissions", "Preserve");
    node.kubelet.publish_badly(&other, Code::NotFound);
    assert_eq!(node.proxy.requests().len(), before);
    node.kubelet.unpublish(&same);
    node.kubelet.unpublish(&volume);
}
