//! Tests commands that call a running node plugin.

use std::process::{Command, Output};

use serde_json::Value;

use crate::support::{Node, clean_environment, tool, wait_until};

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
fn json(endpoint: &str, command: &str) -> Value {
    let output = ask(endpoint, &[command, "--output", "json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn status_and_ls_tell_what_the_node_has() {
    let (node, endpoint) = node();
    assert_eq!(json(&endpoint, "ls"), serde_json::json!([]));
    let artifact = node.small_artifact();
    let reference = node.proxy.reference(&artifact.name);
    let (volume, _) = node.mount(&reference);
    let status = json(&endpoint, "status");
    assert_eq!(status["ready"], true);
    assert_eq!(status["nodeId"], "test-node");
    assert_eq!(status["published"], 1);
    assert!(status["freeBytes"].as_u64() <= status["totalBytes"].as_u64());
    let list = json(&endpoint, "ls");
    assert_eq!(list[0]["manifest"], artifact.digest.as_str());
    assert_eq!(list[0]["references"], serde_json::json!([reference]));
    assert_eq!(list[0]["bytes"], artifact.content.len());
    assert_eq!(list[0]["volumes"].as_array().map(Vec::len), Some(1));
    let table = String::from_utf8(ask(&endpoint, &["ls"]).stdout).expect("text");
    assert!(table.starts_with("REFERENCE") && table.contains(&reference), "{table}");
    node.kubelet.unpublish(&volume);
    wait_until("the record is gone", || {
        json(&endpoint, "ls")[0]["volumes"] == serde_json::json!([])
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
