//! Tests the identity service, and the capabilities of the node service.

use csi_driver_oci::proto::csi::v1::{
    GetPluginCapabilitiesRequest, GetPluginInfoRequest, NodeExpandVolumeRequest,
    NodeGetCapabilitiesRequest, NodeGetInfoRequest, NodeStageVolumeRequest,
    NodeUnstageVolumeRequest, ProbeRequest,
    node_service_capability::{Type, rpc},
};
use tonic::Code;

use crate::support::{Driver, DriverOptions, Sandbox};

#[test]
fn the_plugin_has_a_name_and_a_version() {
    let sandbox = Sandbox::new();
    let driver = Driver::start(&sandbox);
    let call = driver
        .kubelet()
        .identity(async |mut client| client.get_plugin_info(GetPluginInfoRequest {}).await);
    let info = call.expect("GetPluginInfo");
    assert_eq!(info.name, "oci.custom.io");
    assert!(!info.vendor_version.is_empty());
}

#[test]
fn another_name_is_used_everywhere() {
    let sandbox = Sandbox::new();
    let options = DriverOptions::new(&sandbox).argument("--driver-name=other.example.org");
    let driver = options.spawn();
    let socket = options.kubelet.join("plugins_registry/other.example.org@reg.sock");
    crate::support::wait_until("the driver registers under its other name", || {
        crate::support::accepts(&socket)
    });
    let call = driver
        .kubelet()
        .identity(async |mut client| client.get_plugin_info(GetPluginInfoRequest {}).await);
    assert_eq!(call.expect("GetPluginInfo").name, "other.example.org");
}

#[test]
fn the_probe_is_ready_once_registered() {
    let sandbox = Sandbox::new();
    let driver = Driver::start(&sandbox);
    let call = driver.kubelet().identity(async |mut client| client.probe(ProbeRequest {}).await);
    assert_ne!(call.expect("Probe").ready, Some(false));
}

#[test]
fn no_plugin_capability_is_announced() {
    let sandbox = Sandbox::new();
    let driver = Driver::start(&sandbox);
    let call = driver.kubelet().identity(async |mut client| {
        client.get_plugin_capabilities(GetPluginCapabilitiesRequest {}).await
    });
    assert!(call.expect("GetPluginCapabilities").capabilities.is_empty());
}

#[test]
fn volume_stats_are_the_only_capability_of_the_node() {
    let sandbox = Sandbox::new();
    let driver = Driver::start(&sandbox);
    let call = driver
        .kubelet()
        .node(async |mut client| client.node_get_capabilities(NodeGetCapabilitiesRequest {}).await);
    let announced: Vec<_> = call
        .expect("NodeGetCapabilities")
        .capabilities
        .into_iter()
        .map(|capability| match capability.r#type {
            Some(Type::Rpc(rpc)) => rpc.r#type(),
            None => rpc::Type::Unknown,
        })
        .collect();
    assert_eq!(announced, [rpc::Type::GetVolumeStats]);
}

#[test]
fn the_node_has_the_name_it_was_given_and_no_limit() {
    let sandbox = Sandbox::new();
    let driver = Driver::start(&sandbox);
    let call =
        driver.kubelet().node(async |mut client| client.node_get_info(NodeGetInfoRequest {}).await);
    let info = call.expect("NodeGetInfo");
    assert_eq!(info.node_id, "test-node");
    assert_eq!(info.max_volumes_per_node, 0);
    assert_eq!(info.accessible_topology, None);
}

#[test]
fn calls_that_are_not_announced_are_unimplemented() {
    let sandbox = Sandbox::new();
    let driver = Driver::start(&sandbox);
    let kubelet = driver.kubelet();
    let stage = kubelet
        .node(async |mut client| client.node_stage_volume(NodeStageVolumeRequest::default()).await);
    let unstage = kubelet.node(async |mut client| {
        client.node_unstage_volume(NodeUnstageVolumeRequest::default()).await
    });
    let expand = kubelet.node(async |mut client| {
        client.node_expand_volume(NodeExpandVolumeRequest::default()).await
    });
    for status in [stage.err(), unstage.err(), expand.err()] {
        assert_eq!(status.map(|status| status.code()), Some(Code::Unimplemented));
    }
}
