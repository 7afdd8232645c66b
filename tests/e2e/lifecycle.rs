//! Tests publish, unpublish and stats of good volumes, in every order and at every point of failure.

use std::{fs, os::unix::fs::symlink, path::Path};

use csi_driver_oci::proto::csi::v1::{
    NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, volume_usage::Unit,
};
use nix::mount::{MsFlags, mount};
use tonic::{Code, Status};

use crate::support::{
    Layer, Manifest, Node, Pod, Tree, Volume, mounts_at, noise, registry, unique,
};

fn stats(node: &Node, volume_id: &str, path: &str) -> Result<NodeGetVolumeStatsResponse, Status> {
    let request = NodeGetVolumeStatsRequest {
        volume_id: volume_id.to_owned(),
        volume_path: path.to_owned(),
        staging_target_path: String::new(),
    };
    node.kubelet.node(async |mut client| client.node_get_volume_stats(request).await)
}

pub fn bind(source: &Path, target: &Path) {
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .expect("a bind mount");
}

#[test]
fn a_volume_shows_its_artifact_and_goes_without_a_trace() {
    let node = Node::start();
    let artifact = node.small_artifact();
    let (volume, tree) = node.mount(&node.proxy.reference(&artifact.name));
    assert_eq!(tree.names(), ["file.txt"]);
    assert_eq!(
        fs::read_to_string(volume.target().join("file.txt")).expect("the file"),
        artifact.content
    );
    node.kubelet.unpublish(&volume);
}

#[test]
fn publishing_ten_times_is_publishing_once() {
    let node = Node::start();
    let artifact = node.small_artifact();
    let volume = node.kubelet.new_volume(&node.proxy.reference(&artifact.name));
    for _ in 0..10 {
        node.kubelet.publish_well(&volume);
    }
    assert_eq!(mounts_at(volume.target()).len(), 1);
    node.kubelet.unpublish(&volume);
}

#[test]
fn unpublishing_twice_is_unpublishing_once() {
    let node = Node::start();
    let (volume, _) = node.mount(&node.proxy.reference(&node.small_artifact().name));
    node.kubelet.unpublish(&volume);
    node.kubelet.unpublish(&volume);
}

#[test]
fn unpublishing_what_was_never_published_is_done() {
    let node = Node::start();
    let volume = node.kubelet.new_volume("127.0.0.1/never:v1");
    node.kubelet.unpublish(&volume);
    node.kubelet.prepare(&volume);
    node.kubelet.unpublish(&volume);
    node.kubelet.prepare(&volume);
    fs::create_dir(volume.target()).expect("a folder as a reboot leaves it");
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_foreign_mount_at_the_target_is_left_alone_by_unpublish() {
    let node = Node::start();
    let volume = node.kubelet.new_volume("127.0.0.1/never:v1");
    node.kubelet.prepare(&volume);
    fs::create_dir(volume.target()).expect("a target");
    let foreign = node.sandbox.folder("foreign");
    fs::write(foreign.join("precious"), "data").expect("a file");
    bind(&foreign, volume.target());
    let answer =
        node.kubelet.unpublish_request(&volume.request.volume_id, &volume.request.target_path);
    assert!(answer.is_ok(), "{answer:?}");
    assert_eq!(mounts_at(volume.target()).len(), 1);
    assert!(foreign.join("precious").exists());
}

#[test]
fn a_volume_that_a_foreign_mount_covers_is_not_called_unpublished() {
    let node = Node::start();
    let (volume, _) = node.mount(&node.proxy.reference(&node.small_artifact().name));
    bind(&node.sandbox.folder("foreign"), volume.target());
    let (id, target) = (&volume.request.volume_id, &volume.request.target_path);
    let status = node.kubelet.unpublish_request(id, target).expect_err("a volume is still there");
    assert_eq!(status.code(), Code::Aborted, "{status}");
    assert!(status.message().contains("another mount covers it"), "{status}");
    assert_eq!(mounts_at(volume.target()).len(), 2);
    nix::mount::umount(volume.target()).expect("unmounted");
    node.kubelet.unpublish(&volume);
    volume.assert_nothing_left();
}

#[test]
fn foreign_content_at_the_target_is_left_alone() {
    let node = Node::start();
    let volume = node.kubelet.new_volume(&node.proxy.reference(&node.small_artifact().name));
    node.kubelet.prepare(&volume);
    fs::create_dir(volume.target()).expect("a target");
    fs::write(volume.target().join("precious"), "data").expect("a file");
    let published = node.kubelet.publish_request(volume.request.clone());
    assert_eq!(published.expect_err("a target in use").code(), Code::AlreadyExists);
    let _ = node.kubelet.unpublish_request(&volume.request.volume_id, &volume.request.target_path);
    assert_eq!(fs::read_to_string(volume.target().join("precious")).expect("the file"), "data");
}

#[test]
fn a_foreign_mount_at_the_target_is_not_covered() {
    let node = Node::start();
    let volume = node.kubelet.new_volume(&node.proxy.reference(&node.small_artifact().name));
    node.kubelet.prepare(&volume);
    fs::create_dir(volume.target()).expect("a target");
    bind(&node.sandbox.folder("foreign"), volume.target());
    let published = node.kubelet.publish_request(volume.request.clone());
    assert_eq!(published.expect_err("a target in use").code(), Code::AlreadyExists);
    assert_eq!(mounts_at(volume.target()).len(), 1);
}

#[test]
fn an_empty_folder_at_the_target_is_used() {
    let node = Node::start();
    let artifact = node.small_artifact();
    let volume = node.kubelet.new_volume(&node.proxy.reference(&artifact.name));
    node.kubelet.prepare(&volume);
    fs::create_dir(volume.target()).expect("a folder as a reboot leaves it");
    node.kubelet.publish_well(&volume);
    assert_eq!(Tree::of(volume.target()).names(), ["file.txt"]);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_symbolic_link_at_the_target_is_never_followed() {
    let node = Node::start();
    let volume = node.kubelet.new_volume(&node.proxy.reference(&node.small_artifact().name));
    node.kubelet.prepare(&volume);
    let elsewhere = node.sandbox.folder("elsewhere");
    symlink(&elsewhere, volume.target()).expect("a link");
    let published = node.kubelet.publish_request(volume.request.clone());
    assert!(published.is_err());
    assert_eq!(mounts_at(&elsewhere), []);
    // The driver must not remove it, but an unpublish must not hang the pod.
    let _ = node.kubelet.unpublish_request(&volume.request.volume_id, &volume.request.target_path);
    assert!(elsewhere.exists());
}

#[test]
fn mounts_of_ours_on_top_of_each_other_are_all_undone() {
    let node = Node::start();
    let (volume, _) = node.mount(&node.proxy.reference(&node.small_artifact().name));
    // A state that an older driver, or a lost mount table entry, could leave.
    for _ in 0..3 {
        bind(volume.target(), volume.target());
    }
    assert_eq!(mounts_at(volume.target()).len(), 4);
    node.kubelet.unpublish(&volume);
}

#[test]
fn other_attributes_for_a_mounted_target_are_refused() {
    let node = Node::start();
    let (volume, tree) = node.mount(&node.proxy.reference(&node.small_artifact().name));
    let other = node.proxy.reference(&node.small_artifact().name);
    let changed = volume.clone().attribute("reference", &other);
    let status = node
        .kubelet
        .publish_request(changed.request)
        .expect_err("another artifact on the same target");
    assert_eq!(status.code(), Code::AlreadyExists);
    assert_eq!(Tree::of(volume.target()), tree);
    node.kubelet.unpublish(&volume);
}

#[test]
fn what_changes_between_calls_does_not_make_another_volume() {
    let node = Node::start();
    let (volume, _) = node.mount(&node.proxy.reference(&node.small_artifact().name));
    let mut again = volume
        .clone()
        .attribute(
            "csi.storage.k8s.io/serviceAccount.tokens",
            r#"{"a":{"token":"new","expirationTimestamp":"2030-01-01T00:00:00Z"}}"#,
        )
        .attribute("csi.storage.k8s.io/something.new", "value")
        .secret("username", "someone")
        .secret("password", "else");
    again.request.readonly = true;
    node.kubelet.publish_well(&again);
    node.kubelet.unpublish(&volume);
}

#[test]
fn one_persistent_volume_serves_many_pods() {
    let node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    let volumes: Vec<Volume> = (0..3)
        .map(|_| node.kubelet.persistent(&Pod::new(), "the-pv", "a-volume-handle", &reference))
        .collect();
    for volume in &volumes {
        node.kubelet.publish_well(volume);
    }
    node.kubelet.unpublish(&volumes[0]);
    for volume in &volumes[1..] {
        assert_eq!(Tree::of(volume.target()).names(), ["file.txt"]);
        node.kubelet.unpublish(volume);
    }
}

#[test]
fn one_pod_mounts_one_artifact_twice() {
    let node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    let pod = Pod::new();
    let volumes = ["one", "two"].map(|name| node.kubelet.inline(&pod, name, &reference));
    for volume in &volumes {
        node.kubelet.publish_well(volume);
    }
    node.kubelet.unpublish(&volumes[0]);
    assert_eq!(Tree::of(volumes[1].target()).names(), ["file.txt"]);
    node.kubelet.unpublish(&volumes[1]);
}

#[test]
fn stats_tell_what_the_volume_holds() {
    let node = Node::start();
    let repository = unique("stats");
    Manifest::artifact([
        Layer::titled("a", noise(100_000, 1)),
        Layer::titled("folder/b", noise(50_000, 2)),
    ])
    .push(registry(), &repository, "v1");
    let (volume, _) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    let answer =
        stats(&node, &volume.request.volume_id, &volume.request.target_path).expect("stats");
    assert!(answer.usage.iter().any(|usage| usage.unit() == Unit::Bytes && usage.used >= 150_000));
    assert!(answer.usage.iter().any(|usage| usage.unit() == Unit::Inodes && usage.used >= 3));
    // Alerts about volumes that fill up compare these two values: they are the filesystem's.
    for usage in &answer.usage {
        assert!(usage.available > 0, "{usage:?}");
        assert!(usage.total >= usage.used + usage.available, "{usage:?}");
    }
    assert_eq!(answer.usage.len(), 2);
    node.kubelet.unpublish(&volume);
    let gone = stats(&node, &volume.request.volume_id, &volume.request.target_path);
    assert_eq!(gone.expect_err("stats of a volume that is gone").code(), Code::NotFound);
}

#[test]
fn stats_of_unknown_paths_are_not_found() {
    let node = Node::start();
    let folder = node.sandbox.folder("kubelet/pods/some/folder");
    for path in ["/no/such/path", &folder.to_string_lossy()] {
        let status = stats(&node, "some-volume", path).expect_err("stats of nothing");
        assert_eq!(status.code(), Code::NotFound, "{path}");
    }
    assert_eq!(stats(&node, "", "/path").expect_err("no volume").code(), Code::InvalidArgument);
    assert_eq!(stats(&node, "volume", "").expect_err("no path").code(), Code::InvalidArgument);
}

#[test]
fn a_target_path_may_be_long() {
    let node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    let volume = node.kubelet.inline(&Pod::new(), &"n".repeat(63), &reference);
    assert!(volume.request.target_path.len() > 128);
    node.kubelet.publish_well(&volume);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_target_shows_one_volume_and_no_other_of_the_same_content() {
    let node = Node::start();
    let artifact = node.small_artifact();
    let (volume, tree) = node.mount(&node.proxy.reference(&artifact.name));
    let mut other = volume.request.clone();
    other.volume_id = "csi-another".to_owned();
    let refused = node.kubelet.publish_request(other).expect_err("another volume");
    assert_eq!(refused.code(), tonic::Code::AlreadyExists, "{}", refused.message());
    assert_eq!(crate::support::Tree::of(volume.target()), tree);
    node.kubelet.unpublish(&volume);
}
