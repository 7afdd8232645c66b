//! What warming asks for: the artifact as a volume without attributes shows it. Volumes with
//! others share its blobs and layers.

use crate::volume::Content;
use oci::credentials::Keyring;
use oci::{Platform, Reference};
use policy::PolicyRequest;
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

/// What the node's policy demands of an artifact, whichever namespace will mount it: so that a
/// pod finds its verdict. Whether a pod may mount it at all is decided when it asks.
pub async fn with_demands(content: &Content, want: Want) -> Want {
    let (source, reference) = (content.policy.clone(), want.reference.clone());
    let decide = move || {
        let facts =
            PolicyRequest { reference: &reference, namespace: None, require_signature: false };
        source.current().ok().and_then(|policy| policy.decide(facts).ok())
    };
    let decided = tokio::task::spawn_blocking(decide).await;
    let demands = decided.ok().flatten().unwrap_or_default();
    Want { maximum_bytes: demands.maximum_bytes, signature: demands.signature, ..want }
}
