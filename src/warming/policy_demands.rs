//! The demands of the node's policy on an artifact that is fetched for no volume.

use crate::volume::NodeContent;
use oci::Reference;
use policy::{PolicyDemands, PolicyError, PolicyRequest};
use pull::Want;

/// A failure to decide on an artifact.
pub enum DemandsError {
    /// The policy does not allow it.
    Refused(PolicyError),
    /// The policy cannot be read.
    Unreadable(String),
}

/// Returns the demands of the node's policy on an artifact, for one namespace or, without one, for any that may mount
/// it.
pub async fn demands(
    content: &NodeContent,
    reference: &Reference,
    namespace: Option<&str>,
) -> Result<PolicyDemands, DemandsError> {
    let policy = content.policy.load().await.map_err(DemandsError::Unreadable)?;
    let facts = PolicyRequest { reference, namespace, require_signature: false };
    policy.decide(facts).map_err(DemandsError::Refused)
}

/// Adds the demands of the node's policy to a pull, so that its checks are done before a pod needs them. Whether a pod
/// may mount the artifact is decided at its publish.
pub async fn with_demands(content: &NodeContent, want: Want) -> Want {
    let demands = demands(content, &want.reference, None).await.unwrap_or_default();
    Want { maximum_bytes: demands.maximum_bytes, signature: demands.signature, ..want }
}
