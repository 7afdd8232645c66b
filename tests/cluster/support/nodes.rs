//! The nodes, and the driver on them.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::{kubectl, run, try_kubectl, wait_until};

/// The nodes that the cluster starts with.
pub const NODES: [&str; 2] = ["node-1", "node-2"];
/// The namespace of the chart's release.
pub const DRIVER_NAMESPACE: &str = "csi-driver-oci";

/// Runs the harness' command `node`: `add`, `crash`, `start`, `remove`, `restart`.
#[track_caller]
pub fn node(arguments: &[&str]) {
    run("node", arguments, "").unwrap_or_else(|error| panic!("node {arguments:?}: {error}"));
}

/// Runs a command in the namespaces of a node.
pub fn on_node(name: &str, command: &[&str]) -> Result<String, String> {
    run("node", &[&["enter", name], command].concat(), "")
}

/// Returns the name of the driver's running pod on a node.
pub fn driver_pod(node: &str) -> Result<String, String> {
    let selector = format!("--field-selector=spec.nodeName={node},status.phase=Running");
    let name = try_kubectl(
        &[
            "--namespace",
            DRIVER_NAMESPACE,
            "get",
            "pods",
            &selector,
            "--selector=app.kubernetes.io/name=csi-driver-oci",
            "--output=jsonpath={.items[*].metadata.name}",
        ],
        "",
    )?;
    if name.is_empty() || name.contains(' ') {
        return Err(format!("the driver's pods on {node} are: {name:?}"));
    }
    Ok(name)
}

/// Returns the log of the driver on a node.
pub fn driver_log(node: &str) -> Result<String, String> {
    try_kubectl(
        &[
            "--namespace",
            DRIVER_NAMESPACE,
            "logs",
            &driver_pod(node)?,
            "--container=csi-driver-oci",
        ],
        "",
    )
}

/// Runs one of the driver's commands in its pod on a node.
pub fn in_driver(node: &str, command: &[&str]) -> Result<String, String> {
    let pod = driver_pod(node)?;
    let arguments = [
        "--namespace",
        DRIVER_NAMESPACE,
        "exec",
        &pod,
        "--container=csi-driver-oci",
        "--",
        "csi-driver-oci",
    ];
    try_kubectl(&[&arguments, command].concat(), "")
}

/// Replaces the driver's pods, and waits until they serve.
#[track_caller]
pub fn restart_driver() {
    let namespace = ["--namespace", DRIVER_NAMESPACE];
    kubectl(&[&namespace[..], &["rollout", "restart", "daemonset/csi-driver-oci"]].concat());
    kubectl(
        &[&namespace[..], &["rollout", "status", "daemonset/csi-driver-oci", "--timeout=120s"]]
            .concat(),
    );
    for name in NODES {
        wait_until("the driver", || in_driver(name, &["status"]).is_ok());
    }
}

/// Returns the chart's package and the values of the installation, for helm.
pub fn release() -> [String; 2] {
    let folder = std::env::var("CLUSTER_RUN").expect("the cluster's folder");
    [format!("{folder}/csi-driver-oci-0.1.0.tgz"), format!("--values={folder}/values.yaml")]
}

/// Upgrades the release with more values, runs `during`, and restores the release.
#[track_caller]
pub fn upgrade(values: &[&str], during: impl FnOnce()) {
    let [chart, given] = release();
    let upgrade = |values: &[&str]| {
        let arguments = [
            "upgrade",
            "csi-driver-oci",
            &chart,
            &given,
            "--namespace",
            DRIVER_NAMESPACE,
            "--wait",
            "--timeout=3m",
        ];
        run("helm", &[&arguments, values].concat(), "").expect("an upgrade");
    };
    upgrade(values);
    let outcome = catch_unwind(AssertUnwindSafe(during));
    upgrade(&[]);
    if let Err(failure) = outcome {
        resume_unwind(failure);
    }
}
