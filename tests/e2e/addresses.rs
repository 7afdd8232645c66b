//! Tests which addresses a pod's author, and a registry, can make the node call.

use std::{fs, net::IpAddr};

use nix::mount::{MsFlags, mount};
use tonic::Code;

use crate::support::{
    Answer, FakeRegistry, Layer, Manifest, Node, Sandbox, enter_network_namespace, registry, run,
    small_artifact, tool,
};

/// This machine's address on a network.
fn own_address() -> Option<IpAddr> {
    let interfaces = nix::ifaddrs::getifaddrs().expect("the interfaces");
    interfaces
        .filter_map(|interface| Some(IpAddr::V4(interface.address?.as_sockaddr_in()?.ip())))
        .find(|address| !address.is_loopback())
}

#[track_caller]
fn assert_refused(node: &Node, reference: &str, named: &str) {
    let volume = node.kubelet.new_volume(reference);
    let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
    assert!(message.contains(named), "{reference}: {message}");
}

#[test]
fn the_node_and_its_links_are_not_asked() {
    let node = Node::start();
    for (host, named) in [
        ("169.254.169.254", "link-local"),
        ("169.254.169.254:80", "link-local"),
        ("0.0.0.0:5000", "the node itself"),
        ("100.100.100.200", "metadata"),
        ("168.63.129.16", "metadata"),
    ] {
        assert_refused(&node, &format!("{host}/team/app:v1"), named);
    }
    if let Some(own) = own_address() {
        assert_refused(&node, &format!("{own}:5000/team/app:v1"), "the node itself");
        let allowed = format!("registries:\n  allowedAddresses: [\"{own}\"]\n");
        let node = Node::start_configured(|_| {}, &allowed);
        let volume = node.kubelet.new_volume(&format!("{own}:1/team/app:v1"));
        node.kubelet.publish_badly(&volume, Code::Unavailable);
    }
}

#[test]
fn addresses_of_the_clusters_services_are_not_the_nodes() {
    // The registry that all tests share stays in their common network.
    registry();
    enter_network_namespace();
    let bridges = ["kube-ipvs0", "kube-dummy-if", "nodelocaldns", "kube-bridge"];
    for (number, bridge) in bridges.iter().enumerate() {
        run(tool("ip").args(["link", "add", bridge, "type", "bridge"]));
        run(tool("ip").args(["address", "add", &format!("10.96.0.{number}/32"), "dev", bridge]));
    }
    let node = Node::start_with(|_, options| options);
    for number in 0..3 {
        let volume = node.kubelet.new_volume(&format!("10.96.0.{number}:1/team/app:v1"));
        node.kubelet.publish_badly(&volume, Code::Unavailable);
    }
    assert_refused(&node, "10.96.0.3:1/team/app:v1", "the node itself");
}

#[test]
fn a_name_that_means_the_node_is_not_asked() {
    let prepare = |sandbox: &Sandbox| {
        let hosts = sandbox.path().join("hosts");
        let names = "127.0.0.1 localhost inner.example\n169.254.169.254 metadata.example\n";
        fs::write(&hosts, names).expect("the names");
        let none = None::<&str>;
        mount(Some(&hosts), "/etc/hosts", none, MsFlags::MS_BIND, none).expect("names of its own");
    };
    let node = Node::start_configured(prepare, "");
    assert_refused(&node, "inner.example:5000/team/app:v1", "the node's loopback");
    assert_refused(&node, "metadata.example/team/app:v1", "link-local");
}

#[test]
fn redirects_and_token_servers_cannot_lead_to_the_node() {
    let node = Node::start();
    let target = "https://169.254.169.254/latest/meta-data";
    for lure in [
        Answer::status(307).with_header("location", target),
        Answer::status(401)
            .with_header("www-authenticate", &format!("Bearer realm=\"{target}\",service=\"s\"")),
    ] {
        let registry = FakeRegistry::new();
        registry.script(move |_| Some(lure.clone()));
        assert_refused(&node, &registry.reference("v1"), "link-local");
    }
}

#[test]
fn loopback_can_be_forbidden_and_a_configured_registry_is_excepted() {
    let node = Node::start_with_hosts("  loopback: Refuse\n");
    let artifact = small_artifact();
    let reference = format!("{}/{}", registry().host(), artifact.name);
    assert_refused(&node, &reference, "the node's loopback");
    let port = registry().address().port();
    assert_refused(&node, &format!("localhost:{port}/{}", artifact.name), "the node's loopback");
    node.hosts_toml(&registry().host(), &format!("server = \"http://{}\"\n", registry().host()));
    let (volume, _) = node.mount(&reference);
    node.kubelet.unpublish(&volume);
}

#[test]
fn what_stands_in_an_answers_body_is_never_told() {
    let node = Node::start();
    let inner = FakeRegistry::new();
    Manifest::artifact([Layer::titled("file", "x")]).push(&inner, "any", "v1");
    inner.script(|_| Some(Answer::bytes("planted-in-a-body").with_status(418)));
    let volume = node.kubelet.new_volume(&inner.reference("v1"));
    let message = node.kubelet.publish_badly(&volume, Code::Internal);
    assert!(!message.contains("planted") && !node.driver.log().contains("planted"), "{message}");
}
