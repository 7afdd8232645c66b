//! Builds the status of the node's artifacts.

use std::sync::Arc;

use super::assigned_artifact::AssignedArtifact;
use crate::warming::ReferenceState;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use oci::{Platform, Reference};
use preload::api::node_artifacts::{MAXIMUM_ARTIFACTS, MAXIMUM_MESSAGE};
use preload::api::{HeldArtifact, NodeArtifactsStatus, Phase, WantedArtifact};
use text::printable::truncated;

/// Returns the whole status.
pub(super) fn status(
    artifacts: &[(Arc<AssignedArtifact>, ReferenceState)],
    public_key: &str,
    capacity: Option<u64>,
) -> NodeArtifactsStatus {
    let mut status = NodeArtifactsStatus {
        platform: Platform::of_this_node().to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        public_key: public_key.to_owned(),
        capacity_bytes: capacity.and_then(|bytes| i64::try_from(bytes).ok()),
        ..NodeArtifactsStatus::default()
    };
    for (artifact, state) in artifacts.iter().take(MAXIMUM_ARTIFACTS) {
        let held = held(artifact, state);
        match held.phase {
            Phase::Ready => status.ready += 1,
            Phase::Waiting | Phase::Pulling => status.active += 1,
            Phase::Failed => status.failed += 1,
        }
        status.artifacts.push(held);
    }
    status
}

fn held(artifact: &AssignedArtifact, state: &ReferenceState) -> HeldArtifact {
    let WantedArtifact { preload, reference, .. } = &artifact.wanted;
    let digest = reference.parse::<Reference>().ok().and_then(|reference| reference.digest());
    let mut held = HeldArtifact {
        preload: preload.clone(),
        reference: reference.clone(),
        digest: digest.map(|digest| digest.to_string()).unwrap_or_default(),
        phase: state.phase(artifact.retries()),
        ..HeldArtifact::default()
    };
    if held.phase != Phase::Ready {
        held.since = Some(Time(state.since));
    }
    match (held.phase, &state.outcome.failure) {
        (Phase::Pulling, _) => held.percent = AssignedArtifact::percent(state),
        (Phase::Waiting | Phase::Failed, Some(failure)) => {
            failure.reason.clone_into(&mut held.reason);
            truncated(&failure.message, MAXIMUM_MESSAGE).clone_into(&mut held.message);
        }
        _ => {}
    }
    held
}

/// Returns whether two statuses differ in nothing but the progress of downloads.
pub(super) fn differs_in_progress_only(
    one: &NodeArtifactsStatus,
    two: &NodeArtifactsStatus,
) -> bool {
    let without = |status: &NodeArtifactsStatus| {
        let mut status = status.clone();
        status.artifacts.iter_mut().for_each(|artifact| artifact.percent = None);
        status
    };
    without(one) == without(two)
}
