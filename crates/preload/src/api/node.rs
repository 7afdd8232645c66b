//! `NodeArtifacts`: what one node is to hold, and what it holds.

#![expect(clippy::duplicated_attributes, reason = "columns share types")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema;

/// Artifacts of one node: with all texts at their longest they would not fit the API server, so the controller also
/// counts their bytes.
pub const MAXIMUM_ARTIFACTS: usize = 256;
/// Bytes of a message.
pub const MAXIMUM_MESSAGE: usize = 300;

/// What preloads want of a node. Written by the controller.
#[derive(Clone, Debug, Default, PartialEq, CustomResource, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "oci.custom.io",
    version = "v1alpha1",
    kind = "NodeArtifacts",
    plural = "nodeartifacts",
    singular = "nodeartifacts",
    status = "NodeArtifactsStatus",
    doc = "What preloads want of a node, and what it holds. Made and written by the driver alone.",
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
    /// One for each preload, and one more while its previous artifact is kept.
    #[serde(default)]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "atomic"))]
    pub artifacts: Vec<WantedArtifact>,
    /// Bytes that the pins of one namespace's preloads may hold together on this node. Empty: only the node's own bound
    /// on pins holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub max_pinned_bytes_per_namespace: Option<i64>,
}

/// An artifact that the node is to hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WantedArtifact {
    /// `namespace/name` of the preload that wants it.
    #[schemars(length(min = 3, max = 317))]
    pub preload: String,
    /// With its digest; the node resolves nothing.
    #[schemars(length(min = 1, max = 700))]
    pub reference: String,
    /// Whether it is kept.
    pub pin: bool,
    /// How long a try may take.
    #[schemars(range(min = 1, max = 86400))]
    pub timeout_seconds: i32,
    /// How often it is tried again.
    #[schemars(range(min = 0, max = 20))]
    pub backoff_limit: i32,
    /// Since when it is wanted.
    #[schemars(schema_with = "schema::required_time")]
    pub since: Time,
    /// When the registry said that the tag means this digest. Pods of the preload's namespace that name the tag get it,
    /// where the node has no later answer. Empty: the preload names a digest, or the registry did not answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::time")]
    pub resolved_at: Option<Time>,
    /// What to show the registry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<SealedCredentials>,
}

/// Credentials that one process can read: the one that has told its key in this object's status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SealedCredentials {
    /// The key that they are sealed to, as it stands in the status.
    #[schemars(length(max = 64))]
    pub key: String,
    /// Changes when the secrets change.
    #[schemars(length(max = 64))]
    pub version: String,
    /// Sealed, in base64.
    #[schemars(length(max = 6144))]
    pub data: String,
}

/// What the node holds. Written by the node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeArtifactsStatus {
    /// `os/architecture` of the node.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub platform: String,
    /// The driver's version.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub version: String,
    /// The key of the running process that credentials are sealed to, in base64.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub public_key: String,
    /// Bytes of artifacts that it has room for when it holds nothing else, in coarse steps. Empty: it cannot say.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub capacity_bytes: Option<i64>,
    /// How many are held.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub ready: i32,
    /// How many are waited for.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub active: i32,
    /// How many have failed.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub failed: i32,
    /// How far each one is.
    #[serde(default)]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "atomic"))]
    pub artifacts: Vec<HeldArtifact>,
}

/// How far one artifact is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HeldArtifact {
    /// `namespace/name` of the preload that wants it.
    #[schemars(length(max = 317))]
    pub preload: String,
    /// As it is wanted. Empty of plugins that do not say it: the digest has to do then.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 700))]
    pub reference: String,
    /// Which one.
    #[schemars(length(max = 128))]
    pub digest: String,
    /// How far it is.
    pub phase: Phase,
    /// Of its bytes, in steps of 25.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub percent: Option<i32>,
    /// Since when it is being fetched, where it is not ready: also when it was ready before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::time")]
    pub since: Option<Time>,
    /// Why it is not ready, in one word.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub reason: String,
    /// The same for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 512))]
    pub message: String,
}

/// How far an artifact is on a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Its turn has not come, or it is tried again later.
    #[default]
    Waiting,
    /// It is being fetched.
    Pulling,
    /// It is here, verified.
    Ready,
    /// It was tried often enough.
    Failed,
}
