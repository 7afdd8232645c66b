//! `NodeArtifacts`: the artifacts that one node has to hold, and those that it holds.

#![expect(clippy::duplicated_attributes, reason = "columns share types")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::crd_schema;

/// Maximum number of artifacts of one node. With all texts at their maximum length they would
/// exceed the limit of the API server, so the controller also counts their bytes.
pub const MAXIMUM_ARTIFACTS: usize = 256;
/// Maximum bytes of a message.
pub const MAXIMUM_MESSAGE: usize = 300;

/// Artifacts that preloads want on a node. Written by the controller.
#[derive(Clone, Debug, Default, PartialEq, CustomResource, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "oci.custom.io",
    version = "v1alpha1",
    kind = "NodeArtifacts",
    plural = "nodeartifacts",
    singular = "nodeartifacts",
    status = "NodeArtifactsStatus",
    doc = "Artifacts that preloads want on a node, and those that it holds. Created and written by the driver only.",
    derive = "PartialEq",
    printcolumn(name = "READY", type_ = "integer", json_path = ".status.ready"),
    printcolumn(name = "ACTIVE", type_ = "integer", json_path = ".status.active"),
    printcolumn(name = "FAILED", type_ = "integer", json_path = ".status.failed"),
    printcolumn(name = "PLATFORM", type_ = "string", json_path = ".status.platform"),
    printcolumn(name = "VERSION", type_ = "string", json_path = ".status.version"),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct NodeArtifactsSpec {
    /// Artifacts that the node has to hold: one for each preload, and one more while its previous
    /// artifact is kept.
    #[serde(default)]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "atomic"))]
    pub artifacts: Vec<WantedArtifact>,
    /// Bytes that the pins of one namespace's preloads may hold together on this node. Empty: only
    /// the node's own limit on pins applies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub max_pinned_bytes_per_namespace: Option<i64>,
}

/// An artifact that the node has to hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WantedArtifact {
    /// Preload that wants the artifact, as `namespace/name`.
    #[schemars(length(min = 3, max = 317))]
    pub preload: String,
    /// Reference with a digest. The node resolves nothing.
    #[schemars(length(min = 1, max = 700))]
    pub reference: String,
    /// True if the artifact is protected from eviction.
    pub pin: bool,
    /// Maximum duration of one attempt, in seconds.
    #[schemars(range(min = 1, max = 86400))]
    pub timeout_seconds: i32,
    /// Number of retries before the node counts as failed.
    #[schemars(range(min = 0, max = 20))]
    pub backoff_limit: i32,
    /// Time since which the artifact is wanted.
    #[schemars(schema_with = "crd_schema::required_time")]
    pub since: Time,
    /// Time at which the registry resolved the tag to this digest. Pods of the preload's namespace
    /// that use the tag get the digest, unless the node has a later answer. Empty: the preload
    /// names a digest, or the registry did not answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crd_schema::time")]
    pub resolved_at: Option<Time>,
    /// Credentials for the registry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<SealedCredentials>,
}

/// Credentials that only one process can decrypt: the one whose key is in the status of this
/// object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SealedCredentials {
    /// Public key that the credentials are sealed to, as in the status.
    #[schemars(length(max = 64))]
    pub key: String,
    /// Version of the secrets, which changes when they change.
    #[schemars(length(max = 64))]
    pub version: String,
    /// Sealed credentials in base64.
    #[schemars(length(max = 6144))]
    pub data: String,
}

/// Artifacts that the node holds. Written by the node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeArtifactsStatus {
    /// Platform of the node, as `os/architecture`.
    #[schemars(length(max = 64))]
    pub platform: String,
    /// Version of the driver.
    #[schemars(length(max = 64))]
    pub version: String,
    /// Public key of the running process in base64, which credentials are sealed to.
    #[schemars(length(max = 64))]
    pub public_key: String,
    /// Bytes of artifacts that the node can hold if it holds nothing else, in coarse steps. Empty:
    /// unknown.
    #[schemars(range(min = 0))]
    pub capacity_bytes: Option<i64>,
    /// Number of artifacts that the node holds.
    #[schemars(range(min = 0))]
    pub ready: i32,
    /// Number of artifacts that are not ready yet.
    #[schemars(range(min = 0))]
    pub active: i32,
    /// Number of artifacts that have failed.
    #[schemars(range(min = 0))]
    pub failed: i32,
    /// Progress of each artifact.
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "atomic"))]
    pub artifacts: Vec<HeldArtifact>,
}

/// Progress of one artifact.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HeldArtifact {
    /// Preload that wants the artifact, as `namespace/name`.
    #[schemars(length(max = 317))]
    pub preload: String,
    /// Reference as in the spec. Empty for plugins that do not report it: then the digest
    /// identifies the artifact.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 700))]
    pub reference: String,
    /// Digest of the artifact.
    #[schemars(length(max = 128))]
    pub digest: String,
    /// Phase of the artifact.
    pub phase: Phase,
    /// Progress of the download in percent, in steps of 25.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub percent: Option<i32>,
    /// Time since which the artifact is being pulled. Empty if it is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crd_schema::time")]
    pub since: Option<Time>,
    /// Reason in one word if the artifact is not ready.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub reason: String,
    /// Message with details of the reason.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 512))]
    pub message: String,
}

/// Phase of an artifact on a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Waiting for its start or for the next attempt.
    #[default]
    Waiting,
    /// Pull in progress.
    Pulling,
    /// Pulled and verified.
    Ready,
    /// Failed after all retries.
    Failed,
}
