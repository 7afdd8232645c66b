//! Tests health, metrics and configuration from an operator's view.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use csi_driver_oci::proto::pluginregistration::RegistrationStatus;
use tonic::Code;

use crate::support::{DriverOptions, Node, Port, Sandbox, get, wait_until};

#[test]
fn health_and_readiness_answer_over_http() {
    let sandbox = Sandbox::new();
    let port = Port::new();
    let address = port.address();
    let driver =
        DriverOptions::new(&sandbox).argument(&format!("--health-endpoint={address}")).start();
    let is_well = |path| get(address, path).is_some_and(|(status, _)| status == 200);
    wait_until("the driver is healthy", || is_well("/healthz"));
    // Readiness requires registration with the kubelet.
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
fn a_disk_that_cannot_be_written_is_not_ready_and_no_reason_to_restart() {
    use nix::mount::{MsFlags, mount};
    let port = Port::new();
    let address = port.address();
    let node = Node::start_with(|sandbox, options| {
        let disk = sandbox.filesystem("ext4", "disk", "rw");
        options.state(&disk.join("state")).argument(&format!("--health-endpoint={address}"))
    });
    let registered = RegistrationStatus { plugin_registered: true, error: String::new() };
    node.kubelet
        .registration(&node.driver.options.registration_socket(), async |mut client| {
            client.notify_registration_status(registered).await
        })
        .expect("NotifyRegistrationStatus");
    let status = |path| get(address, path).map(|(status, _)| status);
    wait_until("it is ready", || status("/readyz") == Some(200));
    let (volume, _) = node.mount(&node.proxy.reference(&node.small_artifact().name));
    let disk = node.sandbox.path().join("disk");
    let remount = |flags: MsFlags| {
        mount(None::<&str>, &disk, None::<&str>, MsFlags::MS_REMOUNT | flags, None::<&str>)
    };
    // No file may be open for writing at that moment.
    wait_until("the disk is read-only", || remount(MsFlags::MS_RDONLY).is_ok());
    let (code, said) = get(address, "/readyz").expect("an answer");
    assert_eq!(code, 503, "{said}");
    assert!(said.contains("Read-only"), "{said}");
    assert_eq!(status("/healthz"), Some(200));
    // An unreachable registry does not affect readiness, and unpublishing works.
    node.proxy.go_down();
    assert_eq!(status("/healthz"), Some(200));
    node.kubelet.unpublish(&volume);
    remount(MsFlags::empty()).expect("writable");
    wait_until("it is ready again", || status("/readyz") == Some(200));
}

#[test]
fn one_line_tells_a_publish() {
    let node = Node::start_with(|_, options| options.argument("--log-level=info"));
    let artifact = node.small_artifact();
    let reference = node.proxy.reference(&artifact.name);
    let lines = |pod: &str| -> Vec<serde_json::Value> {
        let log = node.driver.log();
        let lines = log.lines().map(|line| serde_json::from_str(line).expect("JSON"));
        lines.filter(|line: &serde_json::Value| line["span"]["volume"] == pod).collect()
    };
    for path in ["miss", "hit"] {
        let (volume, _) = node.mount(&reference);
        let id = volume.request.volume_id.clone();
        let told = lines(&id);
        assert_eq!(told.len(), 1, "{told:?}");
        let (line, span) = (&told[0], &told[0]["span"]);
        assert_eq!((&line["message"], &line["path"]), (&"published".into(), &path.into()));
        assert_eq!(line["bytes"], artifact.content.len());
        assert!(line["milliseconds"].as_f64() > Some(0.0), "{line}");
        assert!(span["request"].as_u64() > Some(0), "{line}");
        assert_eq!(span["reference"], reference.as_str());
        assert_eq!(span["digest"], artifact.digest.as_str());
        assert!(span["pod"].as_str().is_some_and(|pod| pod.starts_with("default/")), "{line}");
        node.kubelet.unpublish(&volume);
        let told = lines(&id);
        assert_eq!(told.len(), 2, "{told:?}");
        assert_eq!(told[1]["message"], "unpublished");
        assert!(told[1]["span"]["request"].as_u64() > span["request"].as_u64());
    }
}

#[test]
fn metrics_have_the_prefix_and_no_secret() {
    let port = Port::new();
    let address = port.address();
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

/// Opens a connection whose client sends this and then waits. A read that takes a minute fails.
fn waiting(address: SocketAddr, sent: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_mins(1))).expect("an option");
    stream.write_all(sent.as_bytes()).expect("sent");
    stream
}

#[test]
fn clients_that_wait_keep_no_other_from_health_and_metrics() {
    let (health, metrics) = (Port::new(), Port::new());
    let node = Node::start_with(|_, options| {
        options
            .argument(&format!("--health-endpoint={}", health.address()))
            .argument(&format!("--metrics-endpoint={}", metrics.address()))
    });
    for (address, path) in [(health.address(), "/healthz"), (metrics.address(), "/metrics")] {
        // As many connections as are served at once, and more.
        let mut clients: Vec<_> = (0..64).map(|_| waiting(address, "GET ")).collect();
        clients.extend((0..64).map(|_| waiting(address, "")));
        let request = format!("GET {path} HTTP/1.0\r\n\r\n");
        let mut answer = String::new();
        let read = waiting(address, &request).read_to_string(&mut answer);
        assert!(read.is_ok() && answer.contains("200 OK"), "{path}: {read:?}: {answer}");
        // The oldest was closed.
        let closed = clients[0].read(&mut [0; 16]);
        let is_reset = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;
        assert!(
            closed.as_ref().is_ok_and(|&bytes| bytes == 0) || closed.is_err_and(|e| is_reset(&e))
        );
    }
    node.mount(&node.proxy.reference(&node.small_artifact().name));
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

/// A JSON document in which an object with a key twice is an error.
struct UniqueKeys;

impl<'de> serde::Deserialize<'de> for UniqueKeys {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = ();
            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object")
            }
            fn visit_map<M: serde::de::MapAccess<'de>>(self, mut map: M) -> Result<(), M::Error> {
                let mut keys = std::collections::BTreeSet::new();
                while let Some((key, _)) = map.next_entry::<String, serde_json::Value>()? {
                    if !keys.insert(key.clone()) {
                        return Err(serde::de::Error::custom(format!("{key} is there twice")));
                    }
                }
                Ok(())
            }
        }
        from.deserialize_map(Visitor).map(|()| Self)
    }
}

#[test]
fn lines_of_the_log_have_each_key_once() {
    let node = Node::start_with(|_, options| options.argument("--log-level=debug"));
    let (volume, _) = node.mount(&node.proxy.reference(&node.small_artifact().name));
    node.kubelet.unpublish(&volume);
    // The log of an unpublish that leaves a foreign mount in place.
    let foreign = node.kubelet.new_volume("r.io/app:v1");
    node.kubelet.prepare(&foreign);
    fs::create_dir(foreign.target()).expect("a folder");
    crate::lifecycle::bind(&node.sandbox.folder("foreign"), foreign.target());
    let request = &foreign.request;
    let answer = node.kubelet.unpublish_request(&request.volume_id, &request.target_path);
    assert!(answer.is_ok(), "{answer:?}");
    nix::mount::umount(foreign.target()).expect("unmounted");
    let log = node.driver.log();
    assert!(log.contains("a mount that is not this driver's stays"), "{log}");
    for line in log.lines() {
        serde_json::from_str::<UniqueKeys>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    }
}
