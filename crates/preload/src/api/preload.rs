//! `ArtifactPreload`: what is to be on which nodes, and how far that is.

#![expect(clippy::duplicated_attributes, reason = "columns share types")]

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema;

/// Failed nodes that a status names; its `failed` counts them all.
pub const MAXIMUM_FAILED_NODES: usize = 20;
/// Answers of the registry that a status keeps.
pub const MAXIMUM_HISTORY: usize = 10;

/// An artifact that is to be on nodes before a pod asks for it.
#[derive(Clone, Debug, PartialEq, CustomResource, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "oci.custom.io",
    version = "v1alpha1",
    kind = "ArtifactPreload",
    namespaced,
    status = "ArtifactPreloadStatus",
    shortname = "apl",
    doc = "An artifact that is to be on nodes before a pod asks for it.",
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
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactPreloadSpec {
    /// `host[:port]/repository[:tag][@digest]`. A tag is resolved once for all nodes, and again only when the
    /// reference is changed.
    #[schemars(schema_with = "schema::reference")]
    pub reference: String,
    /// Secrets of this namespace, of type `kubernetes.io/dockerconfigjson` or `kubernetes.io/dockercfg`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::secrets")]
    pub pull_secrets: Vec<String>,
    /// `os/architecture[/variant]` that the artifact must be for; nodes of others are left out. Empty: nodes of any
    /// platform.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::platforms")]
    pub platforms: Vec<String>,
    /// Which nodes; empty: all that have the driver.
    #[serde(default)]
    pub selector: NodeSelector,
    /// How many nodes fetch at once: a number, or a percentage of the selected ones.
    #[serde(default = "default_parallelism")]
    #[schemars(schema_with = "schema::parallelism")]
    pub parallelism: IntOrString,
    /// The number of nodes that may stay away, because they are not Ready or their plugins do not answer, while it counts as ready on
    /// all nodes: a number, or a percentage of the selected ones, rounded down. They fetch it when they are back.
    #[serde(default = "default_tolerated_nodes")]
    #[schemars(schema_with = "schema::tolerated_nodes")]
    pub tolerated_nodes: IntOrString,
    /// Nodes begin over so long a time, each at a moment of its own, as `10m`. Empty: at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::spread")]
    pub spread: Option<String>,
    /// Whether it is kept on the nodes as long as this object is there.
    #[serde(default = "yes")]
    pub pin: bool,
    /// How long one try of one node may take. What has been downloaded by then stays for the next try.
    #[serde(default = "default_timeout_seconds")]
    #[schemars(range(min = 1, max = 86400))]
    pub timeout_seconds: i32,
    /// How often a node tries again before it counts as failed. It goes on trying, at longer intervals.
    #[serde(default = "default_backoff_limit")]
    #[schemars(range(min = 0, max = 20))]
    pub backoff_limit: i32,
    /// After so long this object is deleted once all nodes are done, well or not. Empty: it stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub ttl_seconds_after_finished: Option<i32>,
    /// No further node begins while this is true; nodes that have begun go on.
    #[serde(default)]
    pub paused: bool,
}

/// Which nodes. Both must fit; without either, all do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeSelector {
    /// Names of nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::node_names")]
    pub names: Vec<String>,
    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "schema::labels")]
    pub match_labels: BTreeMap<String, String>,
}

/// How far it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactPreloadStatus {
    /// The generation that the rest is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,
    /// `spec.reference` as it was when it was resolved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub reference: Option<String>,
    /// What that meant: a manifest or an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub digest: Option<String>,
    /// What the index has; empty where it is no index.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::platforms")]
    pub platforms: Vec<String>,
    /// Bytes of its layers in the registry; of an index, for the platform with the fewest. Empty: that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub bytes: Option<i64>,
    /// `repository:tag@digest` that last was on all selected nodes. It stays until the next one is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 700))]
    pub ready_reference: Option<String>,
    /// `repository:tag@digest` that was on all selected nodes before `readyReference`. Nodes that hold it keep it, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 700))]
    pub previous_reference: Option<String>,
    /// The time since which the registry does not answer, where `digest` is one of its earlier answers to this object.
    /// Empty: it has answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::time")]
    pub registry_unavailable_since: Option<Time>,
    /// The last answers of registries to this object, the newest one first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10), extend("x-kubernetes-list-type" = "atomic"))]
    pub history: Vec<ResolvedReference>,
    /// Nodes that are selected and have the driver, or are so new to the controller that they may have it.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub desired: i32,
    /// Nodes that hold it.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub ready: i32,
    /// Nodes that fetch it.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub active: i32,
    /// Nodes that have tried often enough.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub failed: i32,
    /// Nodes that stay away: they do not hold it, and are not Ready or do not answer.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub away: i32,
    /// The first failed ones, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 20))]
    pub failed_nodes: Vec<FailedNode>,
    /// When this generation was begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::time")]
    pub start_time: Option<Time>,
    /// When no node had anything more to do, well or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::time")]
    pub completion_time: Option<Time>,
    /// `Resolved`, `Ready`, `Stalled`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,
}

/// An answer of a registry: what a reference meant at that time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ResolvedReference {
    /// `spec.reference` at that time.
    #[schemars(length(max = 512))]
    pub reference: String,
    /// The manifest or index that it meant.
    #[schemars(length(max = 128))]
    pub digest: String,
    /// Platforms of the index; empty where it is no index.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::platforms")]
    pub platforms: Vec<String>,
    /// Bytes of its layers, as in `bytes` of the status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub bytes: Option<i64>,
    /// When the registry was asked.
    #[schemars(schema_with = "schema::required_time")]
    pub resolved_at: Time,
    /// Names of the secrets that it was asked with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::secrets")]
    pub pull_secrets: Vec<String>,
}

/// A node that has failed, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailedNode {
    /// Its name.
    #[schemars(length(max = 253))]
    pub node: String,
    /// In one word.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// For people.
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
