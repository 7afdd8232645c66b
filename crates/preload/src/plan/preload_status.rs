//! Status of one preload.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use text::printable::truncated;

use super::cluster_facts::{AnswerOrigin, PreloadFacts, RegistryOutage, ResolvedArtifact, Seconds};
use super::node_assignment::{AssignmentProblem, NodeCounts, PreloadAssignment};
use crate::api::artifact_preload::MAXIMUM_HISTORY;
use crate::api::{ArtifactPreloadStatus, FailedNode, QUOTA_EXCEEDED, ResolvedReference};

/// Maximum bytes of a failed node's message.
const MAXIMUM_MESSAGE: usize = 500;

/// A computed status.
#[derive(Debug)]
pub(super) struct ComputedStatus {
    /// Whole new status.
    pub(super) status: ArtifactPreloadStatus,
    /// Time at which the TTL of the preload ends.
    pub(super) end: Option<Seconds>,
}

/// Computes the status of a preload from its assignment.
pub(super) fn status(
    preload: &PreloadFacts,
    assignment: &PreloadAssignment,
    node_label: Option<String>,
    now: Seconds,
) -> ComputedStatus {
    let before = &preload.status;
    let same_generation = before.observed_generation == Some(preload.generation);
    let NodeCounts { desired, ready, active, failed, away } = assignment.counts;
    let time = |seconds| Timestamp::from_second(seconds).ok().map(Time);
    let kept = |time: &Option<Time>| time.clone().filter(|_| same_generation);
    let start_time = kept(&before.start_time).or_else(|| time(now));
    let done = assignment.problem.is_none()
        && desired > 0
        && ready + failed == desired
        && (failed > 0 || assignment.reached);
    let finished = assignment.reached || done;
    let completion_time = match (finished, kept(&before.completion_time)) {
        (false, _) => None,
        (true, Some(before)) => Some(before),
        (true, None) => time(now),
    };
    let end = preload.spec.ttl_seconds_after_finished.zip(completion_time.as_ref());
    let end = end.map(|(ttl, time)| time.0.as_second() + Seconds::from(ttl));
    let known = assignment.current.as_ref().map(|current| &current.known);
    let platforms = known.map(|known| known.platforms.iter().take(16).map(ToString::to_string));
    let ready_reference = match &assignment.current {
        Some(current) if assignment.reached => Some(current.reference.to_string()),
        _ => before.ready_reference.clone(),
    };
    let previous_reference = match &before.ready_reference {
        Some(previous) if ready_reference.as_ref() != Some(previous) => Some(previous.clone()),
        _ => before.previous_reference.clone(),
    };
    let unavailable = known.and_then(|known| known.origin.unavailable);
    let failed_nodes = assignment.failed.iter().map(|failed| FailedNode {
        node: failed.node.to_string(),
        reason: truncated(&failed.reason, 64).to_owned(),
        message: truncated(&failed.message, MAXIMUM_MESSAGE).to_owned(),
    });
    let mut conditions =
        ConditionList { before: &before.conditions, preload, now, all: Vec::new() };
    conditions.add("Resolved", resolved(assignment));
    let mut ready_state = ready_condition(preload, assignment);
    ready_state.message.extend(earlier_answer(assignment));
    conditions.add("Ready", ready_state);
    conditions.add("Stalled", stalled(assignment, done));
    let number = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
    let status = ArtifactPreloadStatus {
        observed_generation: Some(preload.generation),
        reference: known.map(|_| preload.spec.reference.clone()),
        digest: known.map(|known| known.digest.to_string()),
        platforms: platforms.into_iter().flatten().collect(),
        bytes: known.and_then(|known| known.bytes).and_then(|bytes| i64::try_from(bytes).ok()),
        ready_reference,
        previous_reference,
        node_label,
        registry_unavailable_since: unavailable.and_then(|unavailable| time(unavailable.since)),
        history: history(&before.history, known),
        desired: number(desired),
        ready: number(ready),
        active: number(active),
        failed: number(failed),
        away: number(away),
        failed_nodes: failed_nodes.collect(),
        start_time,
        completion_time,
        conditions: conditions.all,
    };
    ComputedStatus { status, end }
}

/// Returns the last answers of registries, with the one that is in use.
fn history(
    before: &[ResolvedReference],
    known: Option<&ResolvedArtifact>,
) -> Vec<ResolvedReference> {
    let mut history = before.to_vec();
    if let Some(answer) = known.and_then(answer)
        && !history.contains(&answer)
    {
        let same = |kept: &ResolvedReference| {
            (&kept.reference, &kept.digest) == (&answer.reference, &answer.digest)
        };
        history.retain(|kept| !same(kept));
        history.insert(0, answer);
        history.truncate(MAXIMUM_HISTORY);
    }
    history
}

/// Returns the record of an answer; `None` if it is a recorded one.
fn answer(known: &ResolvedArtifact) -> Option<ResolvedReference> {
    let AnswerOrigin { resolved_at: Some(resolved_at), pull_secrets, unavailable: None } =
        &known.origin
    else {
        return None;
    };
    Some(ResolvedReference {
        reference: known.reference.clone(),
        digest: known.digest.to_string(),
        platforms: known.platforms.iter().take(16).map(ToString::to_string).collect(),
        bytes: known.bytes.and_then(|bytes| i64::try_from(bytes).ok()),
        resolved_at: Time(Timestamp::from_second(*resolved_at).ok()?),
        pull_secrets: pull_secrets.clone(),
    })
}

/// Returns the reason for an earlier answer, as the end of a sentence.
fn earlier_answer(assignment: &PreloadAssignment) -> Option<String> {
    let origin = &assignment.current.as_ref()?.known.origin;
    let RegistryOutage { since, .. } = origin.unavailable?;
    let shown = |seconds| Timestamp::from_second(seconds).unwrap_or_default();
    let (since, then) = (shown(since), shown(origin.resolved_at?));
    Some(format!("; the registry has not answered since {since}, this is its answer of {then}"))
}

/// Status, reason and message of a condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConditionState {
    /// True, False or Unknown.
    pub status: &'static str,
    /// Reason in one word.
    pub reason: &'static str,
    /// Message with details of the reason.
    pub message: String,
}

fn state(status: &'static str, reason: &'static str, message: String) -> ConditionState {
    ConditionState { status, reason, message }
}

fn resolved(assignment: &PreloadAssignment) -> ConditionState {
    match (&assignment.current, &assignment.problem) {
        (Some(current), _) => {
            let message = format!("it is {}", current.reference);
            match earlier_answer(assignment) {
                Some(why) => state("True", "EarlierAnswer", message + &why),
                None => state("True", "Resolved", message),
            }
        }
        (None, Some(AssignmentProblem { reason, message, .. })) => {
            state("False", reason, message.clone())
        }
        (None, None) => state("Unknown", "Resolving", "the registry is being asked".to_owned()),
    }
}

fn ready_condition(preload: &PreloadFacts, assignment: &PreloadAssignment) -> ConditionState {
    let counts = assignment.counts;
    let NodeCounts { desired, ready, active, failed, away } = counts;
    let waiting = counts.waiting();
    if assignment.reached && assignment.current.is_some() {
        let message = if ready < desired && counts.is_everywhere(assignment.tolerated) {
            format!(
                "{ready} of {desired} nodes hold it; spec.toleratedNodes allows for {away} that are not Ready or do not answer"
            )
        } else if ready < desired {
            format!(
                "{ready} of {desired} nodes hold it; it was on all of them before: {active} fetch it, {waiting} wait, {failed} failed"
            )
        } else {
            format!("{ready} of {desired} nodes hold it")
        };
        return state("True", "Ready", message);
    }
    if let Some(AssignmentProblem { reason, message, .. }) = &assignment.problem {
        return state("False", reason, message.clone());
    }
    if assignment.current.is_none() {
        return state("False", "Resolving", "the registry is being asked".to_owned());
    }
    if desired == 0 {
        let message = "no node with the driver is selected: look at spec.selector, spec.platforms and kubectl get nodeartifacts";
        return state("False", "NoNodes", message.to_owned());
    }
    let message = format!(
        "{ready} of {desired} nodes hold it, {active} fetch it, {waiting} wait, {failed} failed"
    );
    match (preload.spec.paused, active + waiting) {
        (true, _) if waiting > 0 => state("False", "Paused", message),
        (_, 0) => state("False", failed_reason(assignment), message),
        _ => state("False", "Preloading", message),
    }
}

/// Returns the condition `Stalled`: true if only a change can help, so that tools need not wait
/// longer.
fn stalled(assignment: &PreloadAssignment, done: bool) -> ConditionState {
    match &assignment.problem {
        Some(AssignmentProblem { transient: false, reason, message }) if !assignment.reached => {
            state("True", reason, message.clone())
        }
        None if done && !assignment.reached => {
            let message = match assignment.failed.first() {
                Some(first) => format!(
                    "{} nodes have failed, {} first: {}",
                    assignment.counts.failed, first.node, first.message
                ),
                None => String::new(),
            };
            state(
                "True",
                failed_reason(assignment),
                truncated(&message, MAXIMUM_MESSAGE).to_owned(),
            )
        }
        _ => state("False", "Progressing", String::new()),
    }
}

/// Returns the reason of a preload whose nodes are all done, some of them without success.
fn failed_reason(assignment: &PreloadAssignment) -> &'static str {
    let mut reasons = assignment.failed.iter().map(|failed| &*failed.reason);
    if !assignment.failed.is_empty() && reasons.all(|reason| reason == QUOTA_EXCEEDED) {
        return QUOTA_EXCEEDED;
    }
    "NodesFailed"
}

struct ConditionList<'a> {
    before: &'a [Condition],
    preload: &'a PreloadFacts,
    now: Seconds,
    all: Vec<Condition>,
}

impl ConditionList<'_> {
    fn add(&mut self, kind: &str, state: ConditionState) {
        let ConditionState { status, reason, message } = state;
        let before = self.before.iter().find(|condition| condition.type_ == kind);
        let unchanged = before.filter(|before| before.status == status);
        let since = unchanged.map(|before| before.last_transition_time.clone());
        let now = || Time(Timestamp::from_second(self.now).unwrap_or_default());
        self.all.push(Condition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message,
            observed_generation: Some(self.preload.generation),
            last_transition_time: since.unwrap_or_else(now),
        });
    }
}

/// Returns whether a status has the condition `Ready`.
pub(super) fn is_ready(status: &ArtifactPreloadStatus) -> bool {
    is_true(status, "Ready")
}

/// Returns whether a status has the condition `Stalled`.
pub(super) fn is_stalled(status: &ArtifactPreloadStatus) -> bool {
    is_true(status, "Stalled")
}

fn is_true(status: &ArtifactPreloadStatus, kind: &str) -> bool {
    status.conditions.iter().any(|condition| condition.type_ == kind && condition.status == "True")
}

/// Returns whether a change of the status is more than changed counts.
pub(super) fn is_transition(before: &ArtifactPreloadStatus, after: &ArtifactPreloadStatus) -> bool {
    let gist = |status: &ArtifactPreloadStatus| {
        let of = |condition: &Condition| (condition.status.clone(), condition.reason.clone());
        let conditions: Vec<_> = status.conditions.iter().map(of).collect();
        let known = (status.digest.clone(), status.ready_reference.clone());
        (status.observed_generation, known, conditions, status.failed_nodes.len())
    };
    gist(before) != gist(after)
}
