//! Tests requests that no kubelet should send.

use std::{fs, os::unix::fs::symlink};

use csi_driver_oci::proto::csi::v1::{
    NodePublishVolumeRequest, VolumeCapability,
    volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume, access_mode::Mode},
};
use tonic::Code;

use crate::support::{Node, Volume};

/// Publishes a request that differs from a good one, and returns the message of its refusal.
#[track_caller]
fn refusal(change: impl FnOnce(&Node, &mut NodePublishVolumeRequest)) -> String {
    let node = Node::start();
    let volume = node.kubelet.new_volume(&node.proxy.reference(&node.small_artifact().name));
    node.kubelet.prepare(&volume);
    let mut request = volume.request.clone();
    change(&node, &mut request);
    let target = request.target_path.clone();
    let status = node.kubelet.publish_request(request).expect_err("a bad request is refused");
    assert_eq!(status.code(), Code::InvalidArgument, "{}", status.message());
    volume.assert_nothing_left();
    if !target.is_empty() {
        assert!(fs::symlink_metadata(&target).is_err(), "{target} is left");
    }
    assert_eq!(node.proxy.requests(), [], "the registry was asked for a bad request");
    status.message().to_owned()
}

fn mount_capability(change: impl FnOnce(&mut MountVolume)) -> VolumeCapability {
    let mut mount = MountVolume::default();
    change(&mut mount);
    VolumeCapability {
        access_type: Some(AccessType::Mount(mount)),
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
    }
}

#[test]
fn a_missing_volume_id_is_refused() {
    refusal(|_, request| request.volume_id.clear());
}

#[test]
fn a_missing_target_is_refused() {
    refusal(|_, request| request.target_path.clear());
}

#[test]
fn a_missing_capability_is_refused() {
    refusal(|_, request| request.volume_capability = None);
}

#[test]
fn a_missing_access_type_is_refused() {
    refusal(|_, request| {
        if let Some(capability) = &mut request.volume_capability {
            capability.access_type = None;
        }
    });
}

#[test]
fn a_block_volume_is_refused() {
    let message = refusal(|_, request| {
        if let Some(capability) = &mut request.volume_capability {
            capability.access_type = Some(AccessType::Block(BlockVolume {}));
        }
    });
    assert!(message.to_lowercase().contains("block"), "{message}");
}

#[test]
fn a_filesystem_type_is_refused() {
    let message = refusal(|_, request| {
        request.volume_capability =
            Some(mount_capability(|mount| mount.fs_type = "ext4".to_owned()));
    });
    assert!(message.contains("fsType"), "{message}");
}

#[test]
fn unknown_mount_options_are_refused() {
    for option in ["rw", "exec", "suid", "uid=1000", "bind"] {
        let message = refusal(|_, request| {
            request.volume_capability =
                Some(mount_capability(|mount| mount.mount_flags.push(option.to_owned())));
        });
        assert!(message.contains(option), "{message}");
    }
}

#[test]
fn a_target_outside_the_kubelets_folder_is_refused() {
    refusal(|node, request| {
        request.target_path =
            node.sandbox.path().join("elsewhere/mount").to_string_lossy().into_owned();
    });
    // The kubelet's directory is compared by path component, not as a text prefix.
    refusal(|node, request| {
        request.target_path = format!("{}-other/pods/mount", node.kubelet.directory().display());
    });
}

#[test]
fn a_relative_target_is_refused() {
    refusal(|_, request| {
        request.target_path = "pods/uid/volumes/kubernetes.io~csi/v/mount".to_owned();
    });
}

#[test]
fn a_target_with_parent_folders_in_it_is_refused() {
    refusal(|node, request| {
        request.target_path = format!("{}/pods/../../escaped", node.kubelet.directory().display());
    });
}

#[test]
fn a_target_through_a_link_out_of_the_kubelets_folder_is_refused() {
    let node = Node::start();
    let elsewhere = node.sandbox.folder("elsewhere");
    let reference = node.proxy.reference(&node.small_artifact().name);
    let volume = node.kubelet.new_volume(&reference);
    fs::create_dir_all(volume.parent().parent().expect("a folder")).expect("folders");
    symlink(&elsewhere, volume.parent()).expect("a link");
    let answer = node.kubelet.publish_request(volume.request.clone());
    assert!(answer.is_err(), "mounted through a link");
    assert!(!elsewhere.join("mount").exists());
}

#[test]
fn a_pod_uid_that_is_not_the_targets_is_refused() {
    refusal(|_, request| {
        let other = "00000000-0000-0000-0000-000000000000".to_owned();
        request.volume_context.insert("csi.storage.k8s.io/pod.uid".to_owned(), other);
    });
}

/// The kubelet adds nothing to the attributes of the pod's author with `podInfoOnMount: false`.
#[test]
fn pod_information_of_the_pods_author_is_refused() {
    let written: [&[(&str, &str)]; 3] = [
        &[("pod.namespace", "kube-system")],
        &[("pod.namespace", "kube-system"), ("pod.name", "x"), ("ephemeral", "true")],
        &[("serviceAccount.name", "admin")],
    ];
    for pairs in written {
        refusal(|_, request| {
            request.volume_context.retain(|key, _| !key.starts_with("csi.storage.k8s.io/"));
            for (key, value) in pairs {
                let key = format!("csi.storage.k8s.io/{key}");
                request.volume_context.insert(key, (*value).to_owned());
            }
        });
    }
}

#[test]
fn the_pod_uid_is_not_asked_for_when_the_kubelet_does_not_send_it() {
    let node = Node::start();
    let mut volume = node.kubelet.new_volume(&node.proxy.reference(&node.small_artifact().name));
    volume.request.volume_context.retain(|key, _| !key.starts_with("csi.storage.k8s.io/"));
    node.kubelet.publish_well(&volume);
    node.kubelet.unpublish(&volume);
}

#[test]
fn unpublish_without_volume_or_target_is_refused() {
    let node = Node::start();
    let volume: Volume = node.kubelet.new_volume("127.0.0.1/a:b");
    let no_volume = node.kubelet.unpublish_request("", &volume.request.target_path);
    let no_target = node.kubelet.unpublish_request(&volume.request.volume_id, "");
    for status in [no_volume, no_target] {
        assert_eq!(status.expect_err("a bad request").code(), Code::InvalidArgument);
    }
}

#[test]
fn a_huge_volume_id_or_attribute_harms_no_other_volume() {
    let node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    let mut volume = node.kubelet.new_volume(&reference);
    volume.request.volume_id = "v".repeat(100_000);
    let _ = node.kubelet.publish_request(volume.request.clone());
    let volume = node.kubelet.new_volume(&reference).attribute("include", &"x".repeat(1 << 20));
    let _ = node.kubelet.publish_request(volume.request.clone());
    node.mount(&reference);
}

#[test]
fn a_volume_id_is_never_a_path() {
    let node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    for id in ["../../../escape", "/etc/escape", ".", "..", "a/b"] {
        let mut volume = node.kubelet.new_volume(&reference);
        volume.request.volume_id = id.to_owned();
        if node.kubelet.publish(&volume).is_ok() {
            node.kubelet.unpublish(&volume);
        }
    }
    assert!(!node.sandbox.path().join("escape").exists());
}
