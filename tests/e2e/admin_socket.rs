//! Tests commands that call a running node plugin.

use std::{
    process::{Command, Output, Stdio},
    time::Duration,
};

use csi_driver_oci::proto::pluginregistration::RegistrationStatus;
use serde_json::{Value, json};
use tonic::Code;

use crate::support::{
    Layer, Manifest, Node, Port, clean_environment, get, noise, registry, tool, unique, wait_until,
};

/// Starts a node with an admin socket. Returns its endpoint.
fn node() -> (Node, String) {
    let mut endpoint = String::new();
    let node = Node::start_with(|sandbox, options| {
        endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
        options.argument(&format!("--admin-endpoint={endpoint}"))
    });
    (node, endpoint)
}

fn ask(endpoint: &str, arguments: &[&str]) -> Output {
    let mut command: Command = tool(env!("CARGO_BIN_EXE_csi-driver-oci"));
    clean_environment(&mut command);
    command.args(arguments).arg("--admin-endpoint").arg(endpoint).output().expect("the binary")
}

#[track_caller]
fn document(endpoint: &str, command: &str) -> Value {
    let output = ask(endpoint, &[command, "--output", "json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn status_and_ls_tell_what_the_node_has() {
    let (node, endpoint) = node();
    assert_eq!(document(&endpoint, "ls"), json!({"artifacts": [], "pulls": [], "followed": []}));
    let artifact = node.small_artifact();
    let reference = node.proxy.reference(&artifact.name);
    let (volume, _) = node.mount(&reference);
    let status = document(&endpoint, "status");
    assert_eq!(status["nodeId"], "test-node");
    assert_eq!(status["published"], 1);
    assert!(status["freeBytes"].as_u64() <= status["totalBytes"].as_u64());
    let list = document(&endpoint, "ls")["artifacts"].clone();
    assert_eq!(list[0]["digest"], artifact.digest.as_str());
    assert_eq!(list[0]["references"], json!([reference]));
    assert_eq!(list[0]["bytes"], artifact.content.len());
    assert_eq!(list[0]["volumes"].as_array().map(Vec::len), Some(1));
    let table = String::from_utf8(ask(&endpoint, &["ls"]).stdout).expect("text");
    assert!(table.starts_with("REFERENCE") && table.contains(&reference), "{table}");
    node.kubelet.unpublish(&volume);
    wait_until("the record is gone", || {
        document(&endpoint, "ls")["artifacts"][0]["volumes"] == json!([])
    });
}

#[test]
fn a_node_plugin_that_does_not_answer_is_named_in_one_line() {
    let output = ask("unix:///nonexistent/admin.sock", &["status"]);
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).expect("text");
    assert_eq!(told.lines().count(), 1, "{told}");
    assert!(told.contains("/nonexistent/admin.sock"), "{told}");
    assert_eq!(ask("unix:///x.sock", &["status", "--nonsense"]).status.code(), Some(2));
}

#[test]
fn a_node_is_ready_when_its_readiness_probe_says_so() {
    let port = Port::new();
    let address = port.address();
    let mut endpoint = String::new();
    let node = Node::start_with(|sandbox, options| {
        endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
        options
            .argument(&format!("--admin-endpoint={endpoint}"))
            .argument(&format!("--health-endpoint={address}"))
    });
    let told = || {
        let (code, said) = get(address, "/readyz").expect("an answer");
        (code == 200, said.trim().to_owned())
    };
    let status = document(&endpoint, "status");
    assert_eq!(
        (status["ready"].as_bool(), status["reason"].as_str()),
        (Some(false), Some(told().1.as_str()))
    );
    let registered = RegistrationStatus { plugin_registered: true, error: String::new() };
    node.kubelet
        .registration(&node.driver.options.registration_socket(), async |mut client| {
            client.notify_registration_status(registered).await
        })
        .expect("NotifyRegistrationStatus");
    wait_until("it is ready", || told().0);
    let status = document(&endpoint, "status");
    assert_eq!((&status["ready"], &status["reason"]), (&true.into(), &Value::Null));
}

#[test]
fn a_node_plugin_that_dies_during_a_command_is_named() {
    let (node, endpoint) = node();
    let repository = unique("held");
    Manifest::artifact([Layer::titled("big", noise(8 << 20, 9))]).push(
        registry(),
        &repository,
        "v1",
    );
    let gate = node.proxy.hold_blobs();
    let mut command = tool(env!("CARGO_BIN_EXE_csi-driver-oci"));
    clean_environment(&mut command);
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    command.args(["warm", &reference, "--admin-endpoint", &endpoint]).stderr(Stdio::piped());
    let child = command.stdout(Stdio::piped()).spawn().expect("it");
    wait_until("the pull is under way", || gate.waiting() > 0);
    let _options = node.driver.kill();
    let output = child.wait_with_output().expect("its end");
    let told = String::from_utf8(output.stderr).expect("text");
    assert_eq!((output.status.code(), told.lines().count()), (Some(1), 1), "{told}");
    assert!(
        told.contains("admin.sock ended during the command; its log says why: `kubectl logs"),
        "{told}"
    );
}

/// Starts a node that pulls an artifact whose blob is half there. Returns its gate, and the digest.
fn pulling() -> (Node, String, std::sync::Arc<crate::support::Gate>, String) {
    let (node, endpoint) = node();
    let repository = unique("held");
    let manifest = Manifest::artifact([Layer::titled("big", noise(8 << 20, 9))]);
    let digest = manifest.push(registry(), &repository, "v1");
    let gate = node.proxy.hold_blobs();
    let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    // The pull goes on after the call.
    let answer = node.kubelet.publish_within(&volume, Duration::from_secs(1));
    assert_eq!(answer.expect_err("it takes longer").code(), Code::Aborted);
    wait_until("the blob is half there", || gate.waiting() > 0);
    (node, endpoint, gate, digest)
}

#[test]
fn running_pulls_are_listed() {
    let (_node, endpoint, gate, digest) = pulling();
    for command in ["ls", "status"] {
        let pulls = document(&endpoint, command)["pulls"].clone();
        assert_eq!(pulls[0]["digest"], digest.as_str(), "{command}: {pulls}");
        assert_eq!(pulls[0]["totalBytes"], 8 << 20);
        assert_eq!(pulls[0]["tenants"], json!(["namespace default"]));
        let text = String::from_utf8(ask(&endpoint, &[command]).stdout).expect("text");
        let line = text.lines().find(|line| line.contains(&digest[..19])).expect("a line");
        assert!(line.contains('%'), "{line}");
    }
    gate.open();
    wait_until("it is here", || {
        let listed = document(&endpoint, "ls");
        listed["pulls"] == json!([]) && listed["artifacts"][0]["digest"] == digest.as_str()
    });
}

#[test]
fn status_is_watched_until_its_reader_goes() {
    let (_node, endpoint, gate, digest) = pulling();
    let mut command = tool(env!("CARGO_BIN_EXE_csi-driver-oci"));
    clean_environment(&mut command);
    command.args(["status", "-w", "-o", "json", "--admin-endpoint", &endpoint]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("it");
    let lines = std::io::BufReader::new(child.stdout.take().expect("its output"));
    let mut documents = std::io::BufRead::lines(lines)
        .map(|line| serde_json::from_str::<Value>(&line.expect("a line")).expect("JSON"));
    assert_eq!(documents.next().expect("one")["pulls"][0]["digest"], digest.as_str());
    gate.open();
    let ended = documents.by_ref().find(|status| status["pulls"] == json!([]));
    assert!(ended.expect("a later one")["cacheObjects"].as_u64() > Some(0));
    child.kill().expect("killed");
    child.wait().expect("its end");
}
