//! Health, metrics and configuration, as an operator meets them.

use std::{fs, net::TcpListener};

use csi_driver_oci::proto::pluginregistration::RegistrationStatus;
use tonic::Code;

use crate::support::{DriverOptions, Node, Sandbox, free_address, get, wait_until};

#[test]
fn health_and_readiness_answer_over_http() {
    let sandbox = Sandbox::new();
    let address = free_address();
    let driver =
        DriverOptions::new(&sandbox).argument(&format!("--health-endpoint={address}")).start();
    let is_well = |path| get(address, path).is_some_and(|(status, _)| status == 200);
    wait_until("the driver is healthy", || is_well("/healthz"));
    // Ready to serve pods is who the kubelet has taken.
    let registered = RegistrationStatus { plugin_registered: true, error: String::new() };
    driver
        .kubelet()
        .registration(&driver.options.registration_socket(), async |mut client| {
            client.notify_registration_status(registered).await
        })
        .expect("NotifyRegistrationStatus");
    wait_until("the driver is ready", || is_well("/readyz"));
}

#[test]
fn metrics_have_the_prefix_and_no_secret() {
    let address = free_address();
    let node =
        Node::start_with(|_, options| options.argument(&format!("--metrics-endpoint={address}")));
    let reference = node.proxy.reference(&node.small_artifact().name);
    node.mount_with(&reference, |volume| {
        volume.secret("username", "u").secret("password", "metrics-secret")
    });
    let (status, text) = get(address, "/metrics").expect("the metrics");
    assert_eq!(status, 200);
    assert!(text.lines().any(|line| line.starts_with("csi_oci_")), "{text}");
    assert!(
        text.lines()
            .all(|line| line.starts_with('#') || line.is_empty() || line.starts_with("csi_oci_")),
        "{text}"
    );
    assert!(!text.contains("metrics-secret"));
}

#[test]
fn a_metrics_port_in_use_is_not_fatal() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let mut node =
        Node::start_with(|_, options| options.argument(&format!("--metrics-endpoint={address}")));
    node.mount(&node.proxy.reference(&node.small_artifact().name));
    assert!(node.driver.is_running());
}

#[test]
fn an_invalid_configuration_stops_publishing_with_its_reason_and_not_unpublishing() {
    let mut node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    let (volume, _) = node.mount(&reference);
    let path = node.sandbox.path().join("config.yaml");
    fs::write(&path, "apiVersion: oci.custom.io/v1alpha1\nkind: NodeConfiguration\nlimitz: {}\n")
        .expect("a file");
    let options = node.driver.kill().argument(&format!("--config={}", path.display()));
    node.driver = options.start();
    let refused = node.kubelet.new_volume(&reference);
    let message = node.kubelet.publish_badly(&refused, Code::Unavailable);
    assert!(message.contains("limitz"), "{message}");
    // A mounted volume needs no configuration.
    node.kubelet.publish_well(&volume);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_valid_configuration_is_taken() {
    let node = Node::start_with(|sandbox, options| {
        let path = sandbox.path().join("config.yaml");
        fs::write(&path, crate::support::configuration_head()).expect("a file");
        options.argument(&format!("--config={}", path.display()))
    });
    node.mount(&node.proxy.reference(&node.small_artifact().name));
}
