//! Writes to the API server.
//!
//! Every change carries the version that it was decided on, so that it never overwrites a
//! concurrent change, such as an edited spec or the write of a new leader. After a write, the sent
//! value counts as the current one: an older CustomResourceDefinition drops fields, which would
//! otherwise be sent again and again.

use controller_runtime::object_write::{
    ObjectWriteError, patch_parameters, post_parameters, with_timeout,
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use kube::api::{DeleteParams, Patch, Preconditions};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::api::{
    ArtifactPreload, ArtifactPreloadStatus, NodeArtifacts, NodeArtifactsSpec, SealedCredentials,
    WantedArtifact,
};
use crate::plan::cluster_facts::AssignedArtifact;

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
}
