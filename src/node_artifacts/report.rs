//! Builds the status of the node's artifacts.

use super::job::PreloadJob;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use oci::{Platform, Reference};
use preload::api::node_artifacts::{MAXIMUM_ARTIFACTS, MAXIMUM_MESSAGE};
use preload::api::{HeldArtifact, NodeArtifactsStatus, Phase};
use text::printable::truncated;

/// Returns the whole status.
pub(super) fn status<'a>(
    jobs: impl Iterator<Item = &'a PreloadJob>,
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
    for job in jobs.take(MAXIMUM_ARTIFACTS) {
        match job.phase() {
            Phase::Ready => status.ready += 1,
            Phase::Waiting | Phase::Pulling => status.active += 1,
            Phase::Failed => status.failed += 1,
        }
        status.artifacts.push(artifact(job));
    }
    status
}

fn artifact(job: &PreloadJob) -> HeldArtifact {
    let digest = job.wanted.reference.parse::<Reference>().ok();
    let digest = digest.and_then(|reference| reference.digest());
    let is_over = matches!(job.phase(), Phase::Ready);
    let message = job.message();
    HeldArtifact {
        preload: job.wanted.preload.clone(),
        reference: job.wanted.reference.clone(),
        digest: digest.map(|digest| digest.to_string()).unwrap_or_default(),
        phase: job.phase(),
        percent: job.percent(),
        since: (!is_over).then(|| Time(job.since())),
        reason: if is_over { String::new() } else { job.reason().to_owned() },
        message: if is_over {
            String::new()
        } else {
            truncated(message, MAXIMUM_MESSAGE).to_owned()
        },
    }
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
