//! The startup taint. A node that joins a cluster with it gets no pods until the driver is registered there and has
//! removed the taint. The taint is set by the component that creates nodes; the driver only removes it.

use std::time::Duration;

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{KubernetesClient, KubernetesError};

/// The interval of requests for the node's `CSINode`.
const INTERVAL: Duration = Duration::from_secs(2);

/// Waits until the node's `CSINode` lists the driver, and removes the taint.
///
/// Continues after failures: a node that keeps the taint is of no use.
pub async fn remove_startup_taint(
    node: String,
    driver_name: String,
    taint: String,
    shutdown: CancellationToken,
) {
    let mut logged = String::new();
    loop {
        match try_remove(&node, &driver_name, &taint).await {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => {
                let error = error.to_string();
                if error != logged {
                    tracing::warn!(taint, error, "the node's startup taint stays: trying again");
                    logged = error;
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

/// Runs one attempt. Returns whether the driver is registered and the node is free of the taint.
async fn try_remove(node: &str, driver_name: &str, taint: &str) -> Result<bool, KubernetesError> {
    let client = KubernetesClient::in_cluster()?;
    let registered = client.get(&format!("/apis/storage.k8s.io/v1/csinodes/{node}")).await?;
    if !registered.is_some_and(|csi_node| lists_driver(&csi_node, driver_name)) {
        return Ok(false);
    }
    let path = format!("/api/v1/nodes/{node}");
    let Some(object) = client.get(&path).await? else { return Ok(false) };
    if let Some(patch) = removal_patch(&object["spec"]["taints"], taint) {
        client.patch(&path, &patch).await?;
        tracing::info!(taint, "the node's startup taint is taken away");
    }
    Ok(true)
}

fn lists_driver(csi_node: &Value, driver_name: &str) -> bool {
    let drivers = csi_node["spec"]["drivers"].as_array();
    drivers.is_some_and(|drivers| drivers.iter().any(|driver| driver["name"] == driver_name))
}

/// Returns the patch that removes only this taint, or `None` if the node does not have it.
///
/// The patch tests that the taints are as they were read, so that it never undoes another client's change.
fn removal_patch(taints: &Value, taint: &str) -> Option<Value> {
    let all = taints.as_array()?;
    let kept: Vec<&Value> = all.iter().filter(|each| each["key"] != taint).collect();
    (kept.len() < all.len()).then(|| {
        json!([
            {"op": "test", "path": "/spec/taints", "value": taints},
            {"op": "replace", "path": "/spec/taints", "value": kept},
        ])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_taint_is_taken_and_only_where_it_is() {
        let ours = json!({"key": "oci.custom.io/agent-not-ready", "effect": "NoExecute"});
        let other = json!({"key": "other", "effect": "NoSchedule"});
        let key = "oci.custom.io/agent-not-ready";
        let change = removal_patch(&json!([other, ours]), key).expect("a change");
        assert_eq!(change[0]["value"], json!([other, ours]));
        assert_eq!(change[1]["value"], json!([other]));
        assert_eq!(removal_patch(&json!([other]), key), None);
        assert_eq!(removal_patch(&Value::Null, key), None);
    }

    #[test]
    fn a_node_without_drivers_lists_none() {
        assert!(!lists_driver(&json!({"spec": {"drivers": null}}), "oci.custom.io"));
        assert!(lists_driver(
            &json!({"spec": {"drivers": [{"name": "oci.custom.io"}]}}),
            "oci.custom.io"
        ));
    }
}
