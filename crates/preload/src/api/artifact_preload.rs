//! `ArtifactPreload`: an artifact and the nodes that it has to be on, with its progress.

#![expect(clippy::duplicated_attributes, reason = "columns share types")]

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::crd_schema;

/// Maximum number of failed nodes that a status lists. Its field `failed` counts all of them.
pub const MAXIMUM_FAILED_NODES: usize = 20;
/// Maximum number of registry answers that a status keeps.
pub const MAXIMUM_HISTORY: usize = 10;

/// An artifact to put on nodes before a pod uses it.
#[derive(Clone, Debug, PartialEq, CustomResource, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "oci.custom.io",
    version = "v1alpha1",
    kind = "ArtifactPreload",
    namespaced,
    status = "ArtifactPreloadStatus",
    shortname = "apl",
    doc = "An artifact to put on nodes before a pod uses it.",
    derive = "PartialEq",
    printcolumn(name = "DESIRED", type_ = "integer", json_path = ".status.desired"),
    printcolumn(name = "READY", type_ = "integer", json_path = ".status.ready"),
    printcolumn(name = "FAILED", type_ = "integer", json_path = ".status.failed"),
    printcolumn(
        name = "STATUS",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
    ),
    printcolumn(name = "DIGEST", type_ = "string", json_path = ".status.digest", priority = 1),
    printcolumn(
        name = "MESSAGE",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = 1
    ),
    printcolumn(
        name = "NODE LABEL",
        type_ = "string",
        json_path = ".status.nodeLabel",
        priority = 1
    ),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactPreloadSpec {
    /// Reference of the artifact: `host[:port]/repository[:tag][@digest]`. A tag is resolved once
    /// for all nodes, and again only when the reference changes.
    #[schemars(schema_with = "crd_schema::reference")]
    pub reference: String,
    /// Secrets of this namespace, of type `kubernetes.io/dockerconfigjson` or
    /// `kubernetes.io/dockercfg`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "crd_schema::secrets")]
    pub pull_secrets: Vec<String>,
    /// Platforms `os/architecture[/variant]` that the artifact must support. Nodes of other
    /// platforms are left out. Empty: nodes of any platform.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "crd_schema::platforms")]
    pub platforms: Vec<String>,
    /// Nodes that the artifact has to be on. Empty: all nodes with the driver.
    #[serde(default)]
    pub selector: NodeSelector,
    /// Number of nodes that pull at once: a number, or a percentage of the selected nodes.
    #[serde(default = "default_parallelism")]
    #[schemars(schema_with = "crd_schema::parallelism")]
    pub parallelism: IntOrString,
    /// Number of nodes that may be away, because they are not Ready or their plugins do not answer,
    /// while the artifact counts as ready on all nodes: a number, or a percentage of the selected
    /// nodes, rounded down. They pull it when they are back.
    #[serde(default = "default_tolerated_nodes")]
    #[schemars(schema_with = "crd_schema::tolerated_nodes")]
    pub tolerated_nodes: IntOrString,
    /// Duration over which the start of the nodes is spread, such as `10m`. Each node starts at a
    /// fixed random time. Empty: at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crd_schema::spread")]
    pub spread: Option<String>,
    /// True to protect the artifact from eviction on the nodes as long as this object exists.
    #[serde(default = "yes")]
    pub pin: bool,
    /// Maximum duration of one attempt of one node, in seconds. The next attempt continues the
    /// download.
    #[serde(default = "default_timeout_seconds")]
    #[schemars(range(min = 1, max = 86400))]
    pub timeout_seconds: i32,
    /// Number of retries before a node counts as failed. It continues to retry at longer intervals.
    #[serde(default = "default_backoff_limit")]
    #[schemars(range(min = 0, max = 20))]
    pub backoff_limit: i32,
    /// Seconds after which this object is deleted once all nodes are done, with or without success.
    /// Empty: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub ttl_seconds_after_finished: Option<i32>,
    /// True to start no further node. Nodes that have started continue.
    #[serde(default)]
    pub paused: bool,
}

/// Selects nodes. Both fields must match; without either, all nodes match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeSelector {
    /// Names of the nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "crd_schema::node_names")]
    pub names: Vec<String>,
    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "crd_schema::labels")]
    pub match_labels: BTreeMap<String, String>,
}

/// Progress of a preload.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ArtifactPreloadStatus {
    /// Generation of the spec that this status describes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,
    /// Value of `spec.reference` when it was resolved.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub reference: Option<String>,
    /// Digest that the reference resolved to, of a manifest or an index.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub digest: Option<String>,
    /// Platforms of the index; empty if it is not an index.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "crd_schema::platforms")]
    pub platforms: Vec<String>,
    /// Bytes of the layers in the registry; for an index, those of the platform with the fewest.
    /// Empty: unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub bytes: Option<i64>,
    /// Artifact that was last on all selected nodes, as `repository:tag@digest`. It stays until the
    /// next one is.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 700))]
    pub ready_reference: Option<String>,
    /// Artifact that was on all selected nodes before `readyReference`, as `repository:tag@digest`.
    /// Nodes that hold it keep it, too.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 700))]
    pub previous_reference: Option<String>,
    /// Label of the nodes that hold the artifact of `spec.reference`, if the controller labels nodes:
    /// `oci.custom.io/ready.` and the first 32 digits of the SHA-256 of `namespace/reference`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub node_label: Option<String>,
    /// Time since which the registry does not answer, if `digest` is one of its earlier answers to
    /// this object. Empty: it has answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crd_schema::time")]
    pub registry_unavailable_since: Option<Time>,
    /// Last answers of registries to this object, newest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10), extend("x-kubernetes-list-type" = "atomic"))]
    pub history: Vec<ResolvedReference>,
    /// Number of selected nodes that have the driver, or that are so new to the controller that
    /// they may have it.
    #[schemars(range(min = 0))]
    pub desired: i32,
    /// Number of nodes that hold the artifact.
    #[schemars(range(min = 0))]
    pub ready: i32,
    /// Number of nodes that are pulling it.
    #[schemars(range(min = 0))]
    pub active: i32,
    /// Number of nodes that have failed after all retries.
    #[schemars(range(min = 0))]
    pub failed: i32,
    /// Number of nodes that are away: they do not hold the artifact, and are not Ready or do not
    /// answer.
    #[schemars(range(min = 0))]
    pub away: i32,
    /// First failed nodes, by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 20))]
    pub failed_nodes: Vec<FailedNode>,
    /// Time at which this generation was started.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crd_schema::time")]
    pub start_time: Option<Time>,
    /// Time at which all nodes were done, with or without success.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crd_schema::time")]
    pub completion_time: Option<Time>,
    /// Conditions of type `Resolved`, `Ready` and `Stalled`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "crd_schema::conditions")]
    pub conditions: Vec<Condition>,
}

/// Answer of a registry: the digest of a reference at that time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ResolvedReference {
    /// Value of `spec.reference` at that time.
    #[schemars(length(max = 512))]
    pub reference: String,
    /// Digest of the manifest or index.
    #[schemars(length(max = 128))]
    pub digest: String,
    /// Platforms of the index; empty if it is not an index.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "crd_schema::platforms")]
    pub platforms: Vec<String>,
    /// Bytes of the layers, as in `bytes` of the status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub bytes: Option<i64>,
    /// Time of the request to the registry.
    #[schemars(schema_with = "crd_schema::required_time")]
    pub resolved_at: Time,
    /// Names of the secrets of the request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "crd_schema::secrets")]
    pub pull_secrets: Vec<String>,
}

/// A failed node with the reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailedNode {
    /// Name of the node.
    #[schemars(length(max = 253))]
    pub node: String,
    /// Reason in one word.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// Message with details of the reason.
    #[serde(default)]
    #[schemars(length(max = 512))]
    pub message: String,
}

fn default_parallelism() -> IntOrString {
    IntOrString::Int(10)
}

fn default_tolerated_nodes() -> IntOrString {
    IntOrString::Int(0)
}

fn default_timeout_seconds() -> i32 {
    600
}

fn default_backoff_limit() -> i32 {
    3
}

fn yes() -> bool {
    true
}
