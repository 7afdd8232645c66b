//! Finds the pods of a cluster with volumes of the driver. Removing the driver first would leave them in Terminating.

use std::collections::HashSet;

use serde_json::Value;

use super::{KubernetesClient, KubernetesError};

/// Returns the namespace and name of every pod with a volume of the driver, sorted.
///
/// Pods that have ended do not count: the kubelet has unmounted their volumes.
pub async fn pods_using_driver(
    client: &KubernetesClient,
    driver_name: &str,
) -> Result<Vec<String>, KubernetesError> {
    let volumes = client.list("/api/v1/persistentvolumes").await?;
    let pods = client.list("/api/v1/pods").await?;
    Ok(pods_with_volumes(driver_name, &volumes, &pods))
}

fn pods_with_volumes(driver_name: &str, volumes: &[Value], pods: &[Value]) -> Vec<String> {
    let claims: HashSet<(&str, &str)> = volumes
        .iter()
        .map(|volume| &volume["spec"])
        .filter(|volume| volume["csi"]["driver"] == driver_name)
        .filter_map(|volume| {
            let claim = &volume["claimRef"];
            Some((claim["namespace"].as_str()?, claim["name"].as_str()?))
        })
        .collect();
    let uses = |pod: &&Value| {
        let namespace = pod["metadata"]["namespace"].as_str().unwrap_or_default();
        let is_ours = |volume: &Value| {
            volume["csi"]["driver"] == driver_name
                || volume["persistentVolumeClaim"]["claimName"]
                    .as_str()
                    .is_some_and(|claim| claims.contains(&(namespace, claim)))
        };
        let ended = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        !ended && pod["spec"]["volumes"].as_array().is_some_and(|all| all.iter().any(is_ours))
    };
    let mut names: Vec<String> = pods
        .iter()
        .filter(uses)
        .filter_map(|pod| {
            let metadata = &pod["metadata"];
            Some(format!("{}/{}", metadata["namespace"].as_str()?, metadata["name"].as_str()?))
        })
        .collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn inline_volumes_and_claims_count_and_ended_pods_do_not() {
        let inline = json!([{"name": "a", "csi": {"driver": "oci.custom.io"}}]);
        let claim = json!([{"name": "a", "persistentVolumeClaim": {"claimName": "tool"}}]);
        let pod = |namespace: &str, name: &str, phase: &str, volumes: &Value| {
            json!({
                "metadata": {"namespace": namespace, "name": name},
                "spec": {"volumes": volumes},
                "status": {"phase": phase},
            })
        };
        let pods = [
            pod("b", "inline", "Running", &inline),
            pod("b", "waiting", "Pending", &inline),
            pod("b", "done", "Succeeded", &inline),
            pod("a", "claim", "Running", &claim),
            pod("c", "another-claim-of-this-name", "Running", &claim),
            pod("c", "other", "Running", &json!([{"csi": {"driver": "other"}}])),
            json!({"metadata": {"namespace": "d", "name": "none"}, "spec": {}}),
        ];
        let volumes = [
            json!({"spec": {"csi": {"driver": "oci.custom.io"}, "claimRef": {"namespace": "a", "name": "tool"}}}),
            json!({"spec": {"csi": {"driver": "other"}, "claimRef": {"namespace": "c", "name": "tool"}}}),
            json!({"spec": {"csi": {"driver": "oci.custom.io"}}}),
        ];
        assert_eq!(
            pods_with_volumes("oci.custom.io", &volumes, &pods),
            ["a/claim", "b/inline", "b/waiting"]
        );
    }
}
