//! API objects of preloading.
//!
//! ```text
//! preload      ArtifactPreload: an artifact and the nodes that it has to be on, with its progress
//! node         NodeArtifacts: the artifacts of one node, wanted and held
//! definitions  CustomResourceDefinitions of both
//! schema       parts of schemas that types alone cannot express
//! ```
//!
//! The schema bounds every list and text: no object grows with the number of nodes, and the API
//! server can estimate the cost of validation rules.

pub mod definitions;
pub mod node;
pub mod preload;
mod schema;

/// Reason of a condition or a node: the quota of the namespace is exceeded.
pub const QUOTA_EXCEEDED: &str = "QuotaExceeded";

pub use node::{
    HeldArtifact, NodeArtifacts, NodeArtifactsSpec, NodeArtifactsStatus, Phase, SealedCredentials,
    WantedArtifact,
};
pub use preload::{
    ArtifactPreload, ArtifactPreloadSpec, ArtifactPreloadStatus, FailedNode, NodeSelector,
    ResolvedReference,
};
