//! Writes to the API server.
//!
//! Every change carries the version that it was decided on, so that it never overwrites a
//! concurrent change, such as an edited spec or the write of a new leader. After a write, the sent
//! value counts as the current one: an older CustomResourceDefinition drops fields, which would
//! otherwise be sent again and again.

use std::collections::BTreeMap;

use controller_runtime::object_write::{
    ObjectWriteError, patch_parameters, post_parameters, with_timeout,
};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use kube::api::{DeleteParams, Patch, Preconditions};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::api::{
    ArtifactPreload, ArtifactPreloadStatus, NodeArtifacts, NodeArtifactsSpec, SealedCredentials,
    WantedArtifact,
};
use crate::plan::cluster_facts::AssignedArtifact;
use crate::plan::node_status::{CONDITION, LABEL_PREFIX, LABEL_VALUE, NodeStatus};

/// Creates the object of a node. It is deleted with the node.
pub(super) async fn create(
    client: Client,
    node: &str,
    uid: &str,
) -> Result<NodeArtifacts, ObjectWriteError> {
    let mut object = NodeArtifacts::new(node, NodeArtifactsSpec::default());
    object.metadata.owner_references = Some(vec![owner(node, uid)]);
    let api: Api<NodeArtifacts> = Api::all(client);
    with_timeout(api.create(&post_parameters(), &object)).await
}

/// Returns the node as the owner of its object.
pub(super) fn owner(node: &str, uid: &str) -> OwnerReference {
    OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node.to_owned(),
        uid: uid.to_owned(),
        ..OwnerReference::default()
    }
}

/// Writes the assignment of a node.
pub(super) async fn assign(
    client: Client,
    node: &str,
    version: &str,
    spec: NodeArtifactsSpec,
) -> Result<NodeArtifacts, ObjectWriteError> {
    // A merge patch keeps fields that are not named, so this names all of them.
    let change = json!({
        "metadata": {"resourceVersion": version},
        "spec": {
            "artifacts": spec.artifacts,
            "maxPinnedBytesPerNamespace": spec.max_pinned_bytes_per_namespace,
        },
    });
    let api: Api<NodeArtifacts> = Api::all(client);
    let mut object =
        with_timeout(api.patch(node, &patch_parameters(), &Patch::Merge(&change))).await?;
    object.spec = spec;
    Ok(object)
}

/// Writes labels and condition of a Node. Returns the Node as it is then.
pub(super) async fn write_node_status(
    client: Client,
    node: &str,
    uid: &str,
    status: &NodeStatus,
) -> Result<Node, ObjectWriteError> {
    let api: Api<Node> = Api::all(client);
    let before = with_timeout(api.get(node)).await?;
    if before.metadata.uid.as_deref() != Some(uid) {
        return Err(ObjectWriteError::Outdated);
    }
    let Some(change) = node_change(&before, status, Timestamp::now()) else { return Ok(before) };
    // Labels can be changed with the status, and the spec cannot.
    with_timeout(api.patch_status(node, &patch_parameters(), &Patch::Strategic(&change))).await
}

/// Returns the patch that gives a Node these labels and this condition; `None` if it has them.
fn node_change(node: &Node, status: &NodeStatus, now: Timestamp) -> Option<Value> {
    let empty = BTreeMap::new();
    let known = node.metadata.labels.as_ref().unwrap_or(&empty);
    let mut labels: BTreeMap<&str, Option<&str>> = BTreeMap::new();
    if let Some(wanted) = &status.labels {
        let ours = known.keys().filter(|key| key.starts_with(LABEL_PREFIX));
        labels.extend(ours.map(|key| (key.as_str(), None)));
        labels.extend(wanted.iter().map(|key| (&**key, Some(LABEL_VALUE))));
        labels.retain(|key, value| known.get(*key).map(String::as_str) != *value);
    }
    let mut conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let before = conditions.find(|condition| condition.type_ == CONDITION);
    let condition = status.condition.as_ref().filter(|wanted| {
        before.is_none_or(|before| {
            before.status != wanted.status
                || before.reason.as_deref() != Some(wanted.reason)
                || before.message.as_ref() != Some(&wanted.message)
        })
    });
    if labels.is_empty() && condition.is_none() {
        return None;
    }
    let version = &node.metadata.resource_version;
    let mut change = json!({"metadata": {"resourceVersion": version, "labels": labels}});
    if let Some(wanted) = condition {
        let unchanged = before.filter(|before| before.status == wanted.status);
        let since = unchanged.and_then(|before| before.last_transition_time.clone());
        change["status"] = json!({"conditions": [{
            "type": CONDITION,
            "status": wanted.status,
            "reason": wanted.reason,
            "message": wanted.message,
            "lastHeartbeatTime": Time(now),
            "lastTransitionTime": since.unwrap_or(Time(now)),
        }]});
    }
    Some(change)
}

/// Writes the status of a preload.
pub(super) async fn report(
    client: Client,
    preload: &str,
    version: &str,
    status: &ArtifactPreloadStatus,
) -> Result<ArtifactPreload, ObjectWriteError> {
    let change = json!({
        "metadata": {"resourceVersion": version},
        "status": all_fields(status),
    });
    let (namespace, name) = split(preload);
    let api: Api<ArtifactPreload> = Api::namespaced(client, namespace);
    let mut object =
        with_timeout(api.patch_status(name, &patch_parameters(), &Patch::Merge(&change))).await?;
    object.status = Some(status.clone());
    Ok(object)
}

/// Deletes a preload after its TTL, if it is still the same.
pub(super) async fn delete(
    client: Client,
    preload: &str,
    uid: &str,
    version: &str,
) -> Result<(), ObjectWriteError> {
    let only =
        Preconditions { uid: Some(uid.to_owned()), resource_version: Some(version.to_owned()) };
    let parameters = DeleteParams::default().preconditions(only);
    let (namespace, name) = split(preload);
    let api: Api<ArtifactPreload> = Api::namespaced(client, namespace);
    with_timeout(api.delete(name, &parameters)).await.map(|_| ())
}

/// Splits `namespace/name` of a preload.
pub(super) fn split(preload: &str) -> (&str, &str) {
    preload.split_once('/').unwrap_or(("", preload))
}

/// Returns an assignment in its API form.
pub(super) fn wanted(
    preload: &str,
    wanted: &AssignedArtifact,
    credentials: Option<SealedCredentials>,
) -> WantedArtifact {
    WantedArtifact {
        preload: preload.to_owned(),
        reference: wanted.reference.to_string(),
        pin: wanted.pin,
        timeout_seconds: wanted.timeout,
        backoff_limit: wanted.backoff,
        since: Time(Timestamp::from_second(wanted.since).unwrap_or_default()),
        resolved_at: wanted
            .resolved_at
            .and_then(|seconds| Timestamp::from_second(seconds).ok().map(Time)),
        credentials,
    }
}

/// Returns all fields of a status. A merge patch keeps fields that are not named, so removed ones
/// are null.
fn all_fields(status: &ArtifactPreloadStatus) -> Value {
    let mut value = json!({
        "reference": null,
        "digest": null,
        "platforms": null,
        "bytes": null,
        "readyReference": null,
        "previousReference": null,
        "nodeLabel": null,
        "registryUnavailableSince": null,
        "history": null,
        "failedNodes": null,
        "startTime": null,
        "completionTime": null,
        "conditions": null,
    });
    let said = serde_json::to_value(status).unwrap_or_default();
    if let (Some(value), Value::Object(said)) = (value.as_object_mut(), said) {
        value.extend(said);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::preload_status::ConditionState;

    #[test]
    fn removed_fields_of_a_status_are_null() {
        let value = all_fields(&ArtifactPreloadStatus::default());
        for key in ["digest", "readyReference", "completionTime", "failedNodes"] {
            assert_eq!(value.get(key), Some(&Value::Null), "{key}");
        }
        let full = ArtifactPreloadStatus {
            digest: Some("sha256:00".into()),
            ..ArtifactPreloadStatus::default()
        };
        assert_eq!(all_fields(&full)["digest"], "sha256:00");
        assert_eq!(all_fields(&full)["desired"], 0);
    }

    #[test]
    fn a_change_of_a_node_has_only_what_differs() {
        let node = |labels: Value, conditions: Value| -> Node {
            let metadata = json!({"name": "one", "resourceVersion": "7", "labels": labels});
            let node = json!({"metadata": metadata, "status": {"conditions": conditions}});
            serde_json::from_value(node).expect("a node")
        };
        let wanted = |status: &'static str, labels: &[&str]| NodeStatus {
            labels: Some(
                labels.iter().map(|label| format!("{LABEL_PREFIX}{label}").into()).collect(),
            ),
            condition: Some(ConditionState { status, reason: "Why", message: "so".to_owned() }),
        };
        let (then, now) = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
        let change = |node: &Node, wanted: &NodeStatus| {
            node_change(node, wanted, now.parse().expect("a time"))
        };
        let ours = |status: &str, reason: &str| {
            json!({"type": CONDITION, "status": status, "reason": reason, "message": "so",
                "lastHeartbeatTime": then, "lastTransitionTime": then})
        };
        let ready = json!({"type": "Ready", "status": "True"});
        let new = node(json!({"pool": "a"}), json!([ready]));
        let changed = change(&new, &wanted("True", &["a"])).expect("a change");
        assert_eq!(
            changed["metadata"],
            json!({"resourceVersion": "7", "labels": {"oci.custom.io/ready.a": "true"}})
        );
        let condition = json!({"type": CONDITION, "status": "True", "reason": "Why", "message": "so",
            "lastHeartbeatTime": now, "lastTransitionTime": now});
        assert_eq!(changed["status"], json!({"conditions": [condition]}));

        let labels =
            json!({"pool": "a", "oci.custom.io/ready.a": "true", "oci.custom.io/ready.b": "no"});
        let known = node(labels, json!([ours("True", "Why"), ready]));
        let changed = change(&known, &wanted("True", &["b"])).expect("a change");
        assert_eq!(
            changed["metadata"]["labels"],
            json!({"oci.custom.io/ready.a": null, "oci.custom.io/ready.b": "true"})
        );
        assert!(changed.get("status").is_none(), "{changed}");
        let known = node(json!({"oci.custom.io/ready.a": "true"}), json!([ours("True", "Other")]));
        let changed = change(&known, &wanted("True", &["a"])).expect("a change");
        assert_eq!(changed["metadata"]["labels"], json!({}));
        let condition = &changed["status"]["conditions"][0];
        assert_eq!(
            (&condition["lastTransitionTime"], &condition["lastHeartbeatTime"]),
            (&json!(then), &json!(now))
        );

        let same = node(json!({"oci.custom.io/ready.a": "true"}), json!([ours("True", "Why")]));
        assert_eq!(change(&same, &wanted("True", &["a"])), None);
        // Labels and a condition that are turned off stay as they are.
        let nothing = NodeStatus { labels: None, condition: None };
        assert_eq!(change(&same, &nothing), None);
    }
}
