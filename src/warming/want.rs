//! What warming asks for: the artifact as a volume without attributes shows it. Volumes with
//! others share its blobs and layers.

use crate::volume::Content;
use oci::credentials::Keyring;
use oci::{Platform, Reference};
use policy::{PolicyDemands, PolicyError, PolicyRequest};
use pull::{IfUnavailable, Priority, PullPolicy, Tenant, Want};
use unpack::{PermissionsRule, Selection, UnpackMode};

/// The want of nobody's volume.
#[must_use]
pub fn want(
    reference: Reference,
    platform: Platform,
    policy: PullPolicy,
    keyring: Keyring,
    tenant: Tenant,
) -> Want {
    Want {
        reference,
        platform,
        policy,
        if_unavailable: IfUnavailable::Fail,
        selection: Selection::default(),
        permissions: PermissionsRule::default(),
        file_mode: None,
        unpack: UnpackMode::Auto,
        keyring,
        identity: None,
        priority: Priority::Warm,
        tenant,
        maximum_bytes: None,
        signature: None,
    }
}

/// Why there is no decision on an artifact.
pub enum DemandsError {
    /// The policy does not allow it.
    Refused(PolicyError),
    /// There is no policy that can be read.
    Unreadable(String),
}

/// Returns what the node's policy demands of an artifact, of one namespace or, without one, of whichever will mount it.
pub async fn demands(
    content: &Content,
    reference: &Reference,
    namespace: Option<&str>,
) -> Result<PolicyDemands, DemandsError> {
    let (source, reference) = (content.policy.clone(), reference.clone());
    let namespace = namespace.map(str::to_owned);
    let decide = move || {
        let policy = source.current().map_err(DemandsError::Unreadable)?;
        let namespace = namespace.as_deref();
        let facts = PolicyRequest { reference: &reference, namespace, require_signature: false };
        policy.decide(facts).map_err(DemandsError::Refused)
    };
    let decided = tokio::task::spawn_blocking(decide).await;
    decided.unwrap_or_else(|error| Err(DemandsError::Unreadable(error.to_string())))
}

/// Adds what the node's policy demands, so that a pod finds its verdict. Whether a pod may mount it at all is decided
/// when it asks.
pub async fn with_demands(content: &Content, want: Want) -> Want {
    let demands = demands(content, &want.reference, None).await.unwrap_or_default();
    Want { maximum_bytes: demands.maximum_bytes, signature: demands.signature, ..want }
}
