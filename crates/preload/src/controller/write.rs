//! One write, and what its failure means.
//!
//! Every change carries the version that it was decided on, so it changes nothing that somebody else has changed
//! meanwhile: not an edited spec, not what a new leader has written. What was sent then counts as what is there: a
//! definition that is older than this program drops fields, and they would be sent again and again.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::api::{
    ArtifactPreload, ArtifactPreloadStatus, NodeArtifacts, NodeArtifactsSpec, SealedCredentials,
    WantedArtifact,
};
use crate::plan::facts::Wanted;

/// Who the API server says has written.
const MANAGER: &str = "csi-driver-oci-controller";
/// A write that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Why a write failed.
#[derive(Debug)]
pub(super) enum Trouble {
    /// It was decided on what is no longer so: the watch tells what is.
    Outdated,
    /// The API server is busy or away; it may say how long.
    Busy(Option<Duration>, String),
    /// It does not want this.
    Refused(String),
}

impl Trouble {
    /// In one word, for metrics.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Self::Outdated => "conflict",
            Self::Busy(..) => "busy",
            Self::Refused(_) => "refused",
        }
    }
}

impl From<kube::Error> for Trouble {
    fn from(error: kube::Error) -> Self {
        let text = error.to_string();
        match error {
            kube::Error::Api(status) => match status.code {
                404 | 409 | 410 => Self::Outdated,
                408 | 429 | 500..=599 => {
                    let seconds = status.details.map_or(0, |details| details.retry_after_seconds);
                    let wait = (seconds > 0).then(|| Duration::from_secs(u64::from(seconds)));
                    Self::Busy(wait, status.message)
                }
                _ => Self::Refused(status.message),
            },
            _ => Self::Busy(None, text),
        }
    }
}

/// Makes a node's object; it goes with the node.
pub(super) async fn create(
    client: Client,
    node: &str,
    uid: &str,
) -> Result<NodeArtifacts, Trouble> {
    let mut object = NodeArtifacts::new(node, NodeArtifactsSpec::default());
    object.metadata.owner_references = Some(vec![owner(node, uid)]);
    let parameters =
        PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
    let api: Api<NodeArtifacts> = Api::all(client);
    in_time(api.create(&parameters, &object)).await
}

/// The node, as its object's owner.
pub(super) fn owner(node: &str, uid: &str) -> OwnerReference {
    OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node.to_owned(),
        uid: uid.to_owned(),
        ..OwnerReference::default()
    }
}

/// Says what a node is to hold.
pub(super) async fn assign(
    client: Client,
    node: &str,
    version: &str,
    spec: NodeArtifactsSpec,
) -> Result<NodeArtifacts, Trouble> {
    // All of it: in a merge patch, what is not named stays.
    let change = json!({
        "metadata": {"resourceVersion": version},
        "spec": {
            "artifacts": spec.artifacts,
            "maxPinnedBytesPerNamespace": spec.max_pinned_bytes_per_namespace,
        },
    });
    let api: Api<NodeArtifacts> = Api::all(client);
    let mut object = in_time(api.patch(node, &parameters(), &Patch::Merge(&change))).await?;
    object.spec = spec;
    Ok(object)
}

/// Says how far a preload is.
pub(super) async fn report(
    client: Client,
    preload: &str,
    version: &str,
    status: &ArtifactPreloadStatus,
) -> Result<ArtifactPreload, Trouble> {
    let change = json!({
        "metadata": {"resourceVersion": version},
        "status": whole(status),
    });
    let (namespace, name) = split(preload);
    let api: Api<ArtifactPreload> = Api::namespaced(client, namespace);
    let mut object = in_time(api.patch_status(name, &parameters(), &Patch::Merge(&change))).await?;
    object.status = Some(status.clone());
    Ok(object)
}

/// Deletes a preload whose time is over, if it is still the same.
pub(super) async fn delete(
    client: Client,
    preload: &str,
    uid: &str,
    version: &str,
) -> Result<(), Trouble> {
    let only =
        Preconditions { uid: Some(uid.to_owned()), resource_version: Some(version.to_owned()) };
    let parameters = DeleteParams::default().preconditions(only);
    let (namespace, name) = split(preload);
    let api: Api<ArtifactPreload> = Api::namespaced(client, namespace);
    in_time(api.delete(name, &parameters)).await.map(|_| ())
}

/// Splits `namespace/name` of a preload.
pub(super) fn split(preload: &str) -> (&str, &str) {
    preload.split_once('/').unwrap_or(("", preload))
}

/// A wish as the node reads it.
pub(super) fn wanted(
    preload: &str,
    wanted: &Wanted,
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

/// In a merge patch, what is not named stays: what is not there any more is named as null.
fn whole(status: &ArtifactPreloadStatus) -> Value {
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

fn parameters() -> PatchParams {
    PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() }
}

async fn in_time<T>(write: impl Future<Output = Result<T, kube::Error>>) -> Result<T, Trouble> {
    match tokio::time::timeout(TIMEOUT, write).await {
        Ok(written) => written.map_err(Trouble::from),
        Err(_) => Err(Trouble::Busy(None, "it did not answer in time".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_names_what_is_not_there_any_more() {
        let value = whole(&ArtifactPreloadStatus::default());
        for key in ["digest", "readyReference", "completionTime", "failedNodes"] {
            assert_eq!(value.get(key), Some(&Value::Null), "{key}");
        }
        let full = ArtifactPreloadStatus {
            digest: Some("sha256:00".into()),
            ..ArtifactPreloadStatus::default()
        };
        assert_eq!(whole(&full)["digest"], "sha256:00");
        assert_eq!(whole(&full)["desired"], 0);
    }
}
