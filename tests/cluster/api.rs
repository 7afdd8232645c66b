//! Definitions, policies, the chart and the manifests before a real API server.

use std::path::Path;

use crate::support::{TestNamespace, run};

/// Runs one of the checks of `api_checks.py`, which shares its cases with `make validate`.
#[track_caller]
fn check(name: &str) {
    let python = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join(option_env!("CARGO_TARGET_DIR").unwrap_or("target"))
        .join("tools/python/bin/python");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cluster/api_checks.py");
    let python = python.to_str().expect("a path");
    run(python, &[script, name], "").unwrap_or_else(|problems| panic!("{problems}"));
}

#[test]
fn definitions_are_established() {
    let _namespace = TestNamespace::new("definitions");
    check("definitions");
}

#[test]
fn a_wrong_preload_is_refused_with_a_reason() {
    let _namespace = TestNamespace::new("preloads");
    check("preloads");
}

#[test]
fn every_row_of_the_chart_and_every_manifest_is_applied_strictly() {
    let _namespace = TestNamespace::new("manifests");
    check("manifests");
}

#[test]
fn what_is_composed_of_a_custom_prometheus_is_taken() {
    // While its definition is there, others would apply examples of it.
    let _namespace = TestNamespace::alone("custom-prometheus");
    check("custom_prometheus");
}

#[test]
fn a_node_writes_the_status_of_its_own_object_only() {
    let _namespace = TestNamespace::new("node-objects");
    check("node_objects");
}

#[test]
fn a_node_changes_nothing_but_its_startup_taint() {
    // Nodes without a kubelet would hold up rollouts.
    let _namespace = TestNamespace::alone("node-taints");
    check("node_taints");
}

#[test]
fn the_controller_writes_volumes_of_its_driver_only() {
    let _namespace = TestNamespace::new("provisioner");
    check("provisioner_volumes");
}

#[test]
fn the_controller_changes_nothing_on_nodes_but_its_labels_and_condition() {
    // Nodes without a kubelet would hold up rollouts.
    let _namespace = TestNamespace::alone("node-status");
    check("node_status");
}

#[test]
fn a_wrong_volume_is_refused_in_every_kind_of_object() {
    // The policy is about PersistentVolumes of all namespaces.
    let _namespace = TestNamespace::alone("policies");
    check("volumes");
}

#[test]
fn a_pods_pull_secret_is_written_into_its_volumes_and_nowhere_else() {
    // The policy is about pods of all namespaces.
    let _namespace = TestNamespace::alone("mutations");
    check("pods_pull_secrets");
}
