//! Tests the calls that the csi-sanity suite makes to a node plugin without a controller, with its expected responses.
//!
//! Its volumes belong to no pod. The volume context, which a controller would return, is given here.

use std::{collections::HashMap, fs, path::Path};

use csi_driver_oci::proto::csi::v1::{
    GetPluginCapabilitiesRequest, GetPluginInfoRequest, NodeGetCapabilitiesRequest,
    NodeGetInfoRequest, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, ProbeRequest, VolumeCapability, node_service_capability::Type,
    node_service_capability::rpc, volume_capability::access_mode::Mode,
};
use tonic::{Code, Status};

use crate::support::{Node, capability, mounts_at};

const VOLUME: &str = "sanity-node-full-35";

fn publish(
    node: &Node,
    volume: &str,
    target: &str,
    capability: Option<VolumeCapability>,
) -> Result<(), Status> {
    let reference = node.proxy.reference(&node.small_artifact().name);
    node.kubelet.publish_request(request(volume, target, capability, &reference))
}

fn request(
    volume: &str,
    target: &str,
    capability: Option<VolumeCapability>,
    reference: &str,
) -> NodePublishVolumeRequest {
    NodePublishVolumeRequest {
        volume_id: volume.to_owned(),
        target_path: target.to_owned(),
        volume_capability: capability,
        volume_context: HashMap::from([("reference".to_owned(), reference.to_owned())]),
        ..NodePublishVolumeRequest::default()
    }
}

fn stats(node: &Node, volume: &str, path: &str) -> Result<NodeGetVolumeStatsResponse, Status> {
    let request = NodeGetVolumeStatsRequest {
        volume_id: volume.to_owned(),
        volume_path: path.to_owned(),
        ..NodeGetVolumeStatsRequest::default()
    };
    node.kubelet.node(async |mut client| client.node_get_volume_stats(request).await)
}

#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code) {
    let status = answer.expect_err("csi-sanity wants an error");
    assert_eq!(status.code(), code, "{}", status.message());
    assert!(status.details().is_empty() && !status.message().is_empty());
}

#[test]
fn the_identity_service_answers_as_csi_sanity_wants_it() {
    let node = Node::start();
    let info = node
        .kubelet
        .identity(async |mut client| client.get_plugin_info(GetPluginInfoRequest {}).await)
        .expect("GetPluginInfo");
    let (first, last) = (info.name.chars().next(), info.name.chars().last());
    assert!([first, last].iter().all(|end| end.is_some_and(|end| end.is_ascii_alphanumeric())));
    assert!(info.name.len() <= 63 && !info.vendor_version.is_empty());
    assert!(info.name.chars().all(|c| c.is_ascii_alphanumeric() || "-.".contains(c)));
    node.kubelet
        .identity(async |mut client| {
            client.get_plugin_capabilities(GetPluginCapabilitiesRequest {}).await
        })
        .expect("GetPluginCapabilities");
    let probe = node.kubelet.identity(async |mut client| client.probe(ProbeRequest {}).await);
    assert_ne!(probe.expect("Probe").ready, Some(false));
}

#[test]
fn the_node_service_announces_what_csi_sanity_knows() {
    let node = Node::start();
    let answer = node
        .kubelet
        .node(async |mut client| client.node_get_capabilities(NodeGetCapabilitiesRequest {}).await);
    for announced in answer.expect("NodeGetCapabilities").capabilities {
        let Some(Type::Rpc(rpc)) = announced.r#type else { panic!("no capability of a call") };
        assert_eq!(rpc.r#type(), rpc::Type::GetVolumeStats);
    }
    let info =
        node.kubelet.node(async |mut client| client.node_get_info(NodeGetInfoRequest {}).await);
    let info = info.expect("NodeGetInfo");
    assert!(!info.node_id.is_empty() && info.node_id.len() <= 256);
    assert!(info.max_volumes_per_node >= 0 && info.accessible_topology.is_none());
}

#[test]
fn what_is_missing_or_unknown_gets_the_codes_of_csi_sanity() {
    let node = Node::start();
    let target = node.sandbox.folder("kubelet/csi-sanity").join("target");
    let target = target.to_str().expect("a path");
    let mount = || Some(capability(Mode::SingleNodeWriter));
    refused(publish(&node, "", target, mount()), Code::InvalidArgument);
    refused(publish(&node, VOLUME, "", mount()), Code::InvalidArgument);
    refused(publish(&node, VOLUME, target, None), Code::InvalidArgument);
    refused(node.kubelet.unpublish_request("", target), Code::InvalidArgument);
    refused(node.kubelet.unpublish_request(VOLUME, ""), Code::InvalidArgument);
    refused(stats(&node, "", target), Code::InvalidArgument);
    refused(stats(&node, VOLUME, ""), Code::InvalidArgument);
    refused(stats(&node, "foobar", "some/path"), Code::NotFound);
    node.kubelet.unpublish_request("never-published", target).expect("done already");
    assert!(!Path::new(target).exists());
}

#[test]
fn a_volume_lives_as_csi_sanity_lets_it_live() {
    let node = Node::start();
    let target = node.sandbox.folder("kubelet/csi-sanity").join("target");
    let path = target.to_str().expect("a path");
    let reference = node.proxy.reference(&node.small_artifact().name);
    // The suite repeats the same call ten times.
    for _ in 0..10 {
        let mount = Some(capability(Mode::SingleNodeWriter));
        node.kubelet.publish_request(request(VOLUME, path, mount, &reference)).expect("published");
        assert_eq!(mounts_at(&target).len(), 1);
    }
    let usage = stats(&node, VOLUME, path).expect("stats").usage;
    assert!(!usage.is_empty() && usage.iter().all(|usage| usage.total >= usage.used));
    refused(stats(&node, VOLUME, "some/path"), Code::NotFound);
    for _ in 0..10 {
        node.kubelet.unpublish_request(VOLUME, path).expect("unpublished");
        assert!(fs::symlink_metadata(&target).is_err(), "the target is to be removed");
    }
    refused(stats(&node, VOLUME, path), Code::NotFound);
}
