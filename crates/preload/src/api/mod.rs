//! The objects, as the API server keeps them.
//!
//! ```text
//! preload      ArtifactPreload: what a user wants on which nodes, and how far that is
//! node         NodeArtifacts: what one node is to hold, and what it holds
//! definitions  both as CustomResourceDefinitions
//! schema       parts of schemas that types alone do not say
//! ```
//!
//! Every list and text has a bound, in the schema and so in the store of the API server: no object grows with the
//! fleet, and a rule's cost can be estimated.

pub mod definitions;
pub mod node;
pub mod preload;
mod schema;

/// The reason, of a condition or of a node, that a namespace's quota leaves no room for a preload.
pub const QUOTA_EXCEEDED: &str = "QuotaExceeded";

pub use node::{
    HeldArtifact, NodeArtifacts, NodeArtifactsSpec, NodeArtifactsStatus, Phase, SealedCredentials,
    WantedArtifact,
};
pub use preload::{
    ArtifactPreload, ArtifactPreloadSpec, ArtifactPreloadStatus, FailedNode, NodeSelector,
    ResolvedReference,
};
