//! API objects of preloading.
//!
//! ```text
//! artifact_preload             ArtifactPreload: an artifact and the nodes that it has to be on, with its progress
//! node_artifacts               NodeArtifacts: the artifacts of one node, wanted and held
//! custom_resource_definitions  CustomResourceDefinitions of both
//! crd_schema                   parts of schemas that types alone cannot express
//! ```
//!
//! The schema bounds every list and text: no object grows with the number of nodes, and the API
//! server can estimate the cost of validation rules.

pub mod artifact_preload;
mod crd_schema;
pub mod custom_resource_definitions;
pub mod node_artifacts;

/// Reason of a condition or a node: the quota of the namespace is exceeded.
pub const QUOTA_EXCEEDED: &str = "QuotaExceeded";

pub use artifact_preload::{
    ArtifactPreload, ArtifactPreloadSpec, ArtifactPreloadStatus, FailedNode, NodeSelector,
    ResolvedReference,
};
pub use node_artifacts::{
    HeldArtifact, NodeArtifacts, NodeArtifactsSpec, NodeArtifactsStatus, Phase, SealedCredentials,
    WantedArtifact,
};
