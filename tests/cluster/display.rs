//! Checks texts and numbers for users: events, statistics, descriptions, notes.

use crate::support::{
    Artifact, DRIVER_NAMESPACE, Pod, TestNamespace, kubectl, object, run, wait_until,
};

#[test]
fn a_first_start_gives_no_warning() {
    let namespace = TestNamespace::new("first");
    // The API server learns a moment after the kubelet which pods a node has, and refuses their tokens until then. A slow
    // kubelet waits in vain for its own cache.
    let of_kubelet = ["no relationship found between node", "failed to sync configmap cache"];
    let is_ours = |line: &&str| !of_kubelet.iter().any(|known| line.contains(known));
    let warnings: Vec<_> = namespace.first_warnings().lines().filter(is_ours).collect();
    assert_eq!(warnings, [""; 0], "warnings of the driver's first start");
}

#[test]
fn a_pod_is_told_what_is_pulled() {
    let namespace = TestNamespace::new("events");
    let artifact = Artifact::push_large("tests/events", 1 << 20);
    namespace.output(&Pod::new("reader", &artifact.reference(), "wc -c /artifact/large"));
    namespace.wait_for_event("reader", "Pulled");
    let described = namespace.kubectl(&["describe", "pod", "reader"]);
    assert!(
        described.contains("oci.custom.io") && described.contains(&artifact.reference()),
        "{described}"
    );
}

#[test]
fn the_kubelet_counts_what_a_volume_holds_and_no_alert_of_full_volumes_fires() {
    let namespace = TestNamespace::new("statistics");
    let artifact = Artifact::push_large("tests/statistics", 3 << 20);
    let pod = Pod::holding("reader", &artifact.reference()).on("node-1");
    namespace.run(&pod);
    namespace.wait_for_phase("reader", "Running");
    let mut volume = serde_json::Value::Null;
    wait_until("statistics of the volume", || {
        let text = kubectl(&["get", "--raw", "/api/v1/nodes/node-1/proxy/stats/summary"]);
        let summary: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let pods = summary["pods"].as_array().cloned().unwrap_or_default();
        let pod = pods.iter().find(|pod| pod["podRef"]["namespace"] == namespace.name.as_str());
        let volumes = pod.and_then(|pod| pod["volume"].as_array().cloned()).unwrap_or_default();
        volume =
            volumes.into_iter().find(|volume| volume["name"] == "artifact").unwrap_or_default();
        !volume.is_null()
    });
    let bytes = |name: &str| volume[name].as_u64().unwrap_or_else(|| panic!("{name} of {volume}"));
    assert!(bytes("usedBytes") >= 3 << 20, "{volume}");
    // Common alerts fire below 15 percent available.
    assert!(bytes("availableBytes") * 100 > bytes("capacityBytes") * 15, "{volume}");
    assert!(bytes("inodesFree") * 100 > bytes("inodes") * 15, "{volume}");
}

#[test]
fn the_notes_of_the_chart_work_as_they_are_written() {
    let namespace = TestNamespace::new("notes");
    let notes =
        run("helm", &["--namespace", DRIVER_NAMESPACE, "get", "notes", "csi-driver-oci"], "")
            .expect("the notes");
    let pod = notes
        .split("<<'END'\n")
        .nth(1)
        .and_then(|rest| rest.split("  END\n").next())
        .expect("a pod");
    namespace.apply(pod);
    namespace.wait_for_phase("artifact-inline", "Succeeded");
    assert!(namespace.logs("artifact-inline").contains("/artifact/bin/busybox"));
    let paragraphs = notes.split("\n\n");
    let commands = paragraphs.filter(|paragraph| {
        let first = paragraph.trim_start();
        first.starts_with("kubectl -n")
            || first.starts_with("NODE=")
            || first.starts_with("kubectl label")
    });
    // The commands of the notes name no namespace for the pod.
    let pod = format!("kubectl -n {} get pod artifact-inline", namespace.name);
    let scripts: Vec<_> =
        commands.map(|lines| lines.replace("kubectl get pod artifact-inline", &pod)).collect();
    assert_eq!(scripts.len(), 3, "{notes}");
    for script in scripts {
        run("sh", &["-euc", &script], "").unwrap_or_else(|error| panic!("{script}: {error}"));
    }
    let drivers = object(&["get", "csinodes"]);
    assert_eq!(drivers["items"].as_array().map(Vec::len), Some(2));
}
