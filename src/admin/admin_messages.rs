//! Converts results of operations into messages of the admin interface.

use std::collections::BTreeSet;

use crate::following::FollowedTag;
use crate::proto::admin as wire;
use crate::scrub::ScrubSnapshot;
use crate::warming::{DesiredReference as _, ListedReference, ReferenceState};
use oci::Digest;
use oci::manifest::Descriptor;
use preload::api::Phase;
use pull::{ProgressView, UnderWay};
use store::content_verification::Finding;
use store::gc::{Collected, Victim};
use store::resolution_records::Resolution;
use store::trees::{TreePart, View};

pub(crate) fn collected(
    collected: &Collected,
    cache_bytes: u64,
    dry_run: bool,
) -> wire::CollectResponse {
    wire::CollectResponse {
        victims: collected.victims.iter().map(victim).collect(),
        partial_downloads: collected.partials,
        freed_bytes: collected.bytes,
        cache_bytes,
        young_bytes: collected.young_bytes,
        dry_run,
    }
}

pub(super) fn pull(pull: &UnderWay) -> wire::Pull {
    let (repository, digest) = pull.name.split_once('@').unwrap_or((&pull.name, ""));
    wire::Pull {
        repository: repository.to_owned(),
        digest: digest.to_owned(),
        done_bytes: pull.progress.done,
        total_bytes: pull.progress.total,
        bytes_per_second: pull.progress.rate,
        progress: pull.progress.to_string(),
        tenants: pull.tenants.iter().map(ToString::to_string).collect(),
    }
}

pub(super) fn finding(finding: Finding) -> wire::Finding {
    wire::Finding {
        kind: finding.kind.name().to_owned(),
        digest: finding.digest.map(|digest| digest.to_string()).unwrap_or_default(),
        path: finding.path.to_string_lossy().into_owned(),
        detail: finding.detail,
    }
}

pub(super) fn warm_reference(
    listed: &ListedReference,
    state: ReferenceState,
) -> wire::WarmReference {
    let shown = |digest: Option<Digest>| digest.map(|digest| digest.to_string());
    let progress = state.pulling.as_ref().map(ProgressView::snapshot);
    wire::WarmReference {
        reference: listed.key(),
        state: phase(ListedReference::phase(&state)).into(),
        digest: shown(state.outcome.manifest).unwrap_or_default(),
        newer_digest: shown(state.outcome.newer).unwrap_or_default(),
        next_seconds: state.next_seconds(),
        reason: state.outcome.failure.map(|failure| failure.message).unwrap_or_default(),
        done_bytes: progress.as_ref().map_or(0, |progress| progress.done),
        total_bytes: progress.as_ref().map_or(0, |progress| progress.total),
    }
}

pub(super) fn followed(tag: &FollowedTag, state: ReferenceState) -> wire::FollowedVolume {
    wire::FollowedVolume {
        volume: tag.volume.name(),
        reference: tag.volume.reference().to_string(),
        digest: state.outcome.manifest.map(|digest| digest.to_string()).unwrap_or_default(),
        interval_seconds: tag.volume.interval().as_secs(),
        next_seconds: state.next_seconds(),
        reason: state.outcome.failure.map(|failure| failure.message).unwrap_or_default(),
        versions: tag.versions() as u64,
    }
}

pub(super) fn scrub(scrub: ScrubSnapshot) -> wire::ScrubStatus {
    wire::ScrubStatus {
        interval_seconds: scrub.interval.map_or(0, |interval| interval.as_secs()),
        lag_seconds: scrub.lag.map(|lag| lag.as_secs()),
        objects: scrub.counts.verified.objects,
        bytes: scrub.counts.verified.bytes,
        findings: scrub.counts.findings,
        repaired: scrub.counts.repaired,
        unrepaired: scrub.counts.unrepaired,
        reading: scrub.reading.unwrap_or_default(),
        unread_objects: 0,
    }
}

fn phase(phase: Phase) -> wire::warm_reference::State {
    match phase {
        Phase::Waiting => wire::warm_reference::State::Waiting,
        Phase::Pulling => wire::warm_reference::State::Pulling,
        Phase::Ready => wire::warm_reference::State::Present,
        Phase::Failed => wire::warm_reference::State::Failed,
    }
}

pub(super) fn victim(victim: &Victim) -> wire::Victim {
    wire::Victim {
        path: victim.name.to_string(),
        digest: victim.manifest.map(|digest| digest.to_string()).unwrap_or_default(),
        bytes: victim.bytes,
        reason: victim.reason.name().to_owned(),
        last_used: victim.last_used,
    }
}

pub(super) fn resolution(
    resolution: Resolution,
    layers: Vec<Descriptor>,
    signed_by: BTreeSet<String>,
) -> wire::Resolution {
    let layers = layers.into_iter().map(|layer| wire::Layer {
        digest: layer.digest.to_string(),
        media_type: layer.media_type,
        title: layer.annotations.get("org.opencontainers.image.title").cloned().unwrap_or_default(),
        bytes: layer.size,
    });
    wire::Resolution {
        platform: resolution.platform.unwrap_or_default(),
        resolved_digest: resolution.resolved.to_string(),
        digest: resolution.manifest.to_string(),
        layers: layers.collect(),
        signed_by: signed_by.into_iter().collect(),
    }
}

pub(super) fn part(part: &TreePart) -> wire::Part {
    wire::Part {
        path: part.path.clone(),
        digest: part.manifest.to_string(),
        view: Some(view(&part.view)),
    }
}

pub(super) fn view(view: &View) -> wire::View {
    wire::View {
        include: view.include.clone(),
        exclude: view.exclude.clone(),
        permissions: view.permissions.name().to_owned(),
        file_mode: view.file_mode.map(|mode| format!("{mode:04o}")).unwrap_or_default(),
        unpack: if view.unpack.is_auto() { "" } else { view.unpack.name() }.to_owned(),
        sub_path: view.sub_path.clone(),
    }
}
