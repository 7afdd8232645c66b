//! One preload: what its status says.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use text::printable::truncated;

use super::facts::{Known, Origin, Preload, Seconds, Unavailable};
use super::handout::{Counts, HandedOut, Problem};
use crate::api::preload::MAXIMUM_HISTORY;
use crate::api::{ArtifactPreloadStatus, FailedNode, QUOTA_EXCEEDED, ResolvedReference};

/// Bytes of a failed node's message.
const MAXIMUM_MESSAGE: usize = 500;

/// What is to be written.
#[derive(Debug)]
pub(super) struct Written {
    /// The whole status.
    pub(super) status: ArtifactPreloadStatus,
    /// When the preload's time is over.
    pub(super) end: Option<Seconds>,
}

/// What the status says of what was handed out.
pub(super) fn status(preload: &Preload, handed: &HandedOut, now: Seconds) -> Written {
    let before = &preload.status;
    let same_generation = before.observed_generation == Some(preload.generation);
    let Counts { desired, ready, active, failed, away } = handed.counts;
    let time = |seconds| Timestamp::from_second(seconds).ok().map(Time);
    let kept = |time: &Option<Time>| time.clone().filter(|_| same_generation);
    let start_time = kept(&before.start_time).or_else(|| time(now));
    let done = handed.problem.is_none()
        && desired > 0
        && ready + failed == desired
        && (failed > 0 || handed.reached);
    let finished = handed.reached || done;
    let completion_time = match (finished, kept(&before.completion_time)) {
        (false, _) => None,
        (true, Some(before)) => Some(before),
        (true, None) => time(now),
    };
    let end = preload.spec.ttl_seconds_after_finished.zip(completion_time.as_ref());
    let end = end.map(|(ttl, time)| time.0.as_second() + Seconds::from(ttl));
    let known = handed.current.as_ref().map(|current| &current.known);
    let platforms = known.map(|known| known.platforms.iter().take(16).map(ToString::to_string));
    let ready_reference = match &handed.current {
        Some(current) if handed.reached => Some(current.reference.to_string()),
        _ => before.ready_reference.clone(),
    };
    let previous_reference = match &before.ready_reference {
        Some(previous) if ready_reference.as_ref() != Some(previous) => Some(previous.clone()),
        _ => before.previous_reference.clone(),
    };
    let unavailable = known.and_then(|known| known.origin.unavailable);
    let failed_nodes = handed.failed.iter().map(|failed| FailedNode {
        node: failed.node.to_string(),
        reason: truncated(&failed.reason, 64).to_owned(),
        message: truncated(&failed.message, MAXIMUM_MESSAGE).to_owned(),
    });
    let mut conditions = Conditions { before: &before.conditions, preload, now, all: Vec::new() };
    conditions.add("Resolved", resolved(handed));
    let mut there = is_there(preload, handed);
    there.message.extend(earlier_answer(handed));
    conditions.add("Ready", there);
    conditions.add("Stalled", stalled(handed, done));
    let number = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
    let status = ArtifactPreloadStatus {
        observed_generation: Some(preload.generation),
        reference: known.map(|_| preload.spec.reference.clone()),
        digest: known.map(|known| known.digest.to_string()),
        platforms: platforms.into_iter().flatten().collect(),
        bytes: known.and_then(|known| known.bytes).and_then(|bytes| i64::try_from(bytes).ok()),
        ready_reference,
        previous_reference,
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
    Written { status, end }
}

/// Returns the last answers of registries, with the one that is in use.
fn history(before: &[ResolvedReference], known: Option<&Known>) -> Vec<ResolvedReference> {
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

/// Returns what is kept of an answer; none where it is one that was kept.
fn answer(known: &Known) -> Option<ResolvedReference> {
    let Origin { resolved_at: Some(resolved_at), pull_secrets, unavailable: None } = &known.origin
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

/// Returns why an answer is an earlier one, as the end of a sentence.
fn earlier_answer(handed: &HandedOut) -> Option<String> {
    let origin = &handed.current.as_ref()?.known.origin;
    let Unavailable { since, .. } = origin.unavailable?;
    let shown = |seconds| Timestamp::from_second(seconds).unwrap_or_default();
    let (since, then) = (shown(since), shown(origin.resolved_at?));
    Some(format!("; the registry has not answered since {since}, this is its answer of {then}"))
}

/// The status, reason and message of a condition.
struct ConditionState {
    status: &'static str,
    reason: &'static str,
    message: String,
}

fn state(status: &'static str, reason: &'static str, message: String) -> ConditionState {
    ConditionState { status, reason, message }
}

fn resolved(handed: &HandedOut) -> ConditionState {
    match (&handed.current, &handed.problem) {
        (Some(current), _) => {
            let message = format!("it is {}", current.reference);
            match earlier_answer(handed) {
                Some(why) => state("True", "EarlierAnswer", message + &why),
                None => state("True", "Resolved", message),
            }
        }
        (None, Some(Problem { reason, message, .. })) => state("False", reason, message.clone()),
        (None, None) => state("Unknown", "Resolving", "the registry is being asked".to_owned()),
    }
}

fn is_there(preload: &Preload, handed: &HandedOut) -> ConditionState {
    let counts = handed.counts;
    let Counts { desired, ready, active, failed, away } = counts;
    let waiting = counts.waiting();
    if handed.reached && handed.current.is_some() {
        let message = if ready < desired && counts.is_everywhere(handed.tolerated) {
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
    if let Some(Problem { reason, message, .. }) = &handed.problem {
        return state("False", reason, message.clone());
    }
    if handed.current.is_none() {
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
        (_, 0) => state("False", failed_reason(handed), message),
        _ => state("False", "Preloading", message),
    }
}

/// Whether nothing but a change will help: then tools that wait need not wait on.
fn stalled(handed: &HandedOut, done: bool) -> ConditionState {
    match &handed.problem {
        Some(Problem { transient: false, reason, message }) if !handed.reached => {
            state("True", reason, message.clone())
        }
        None if done && !handed.reached => {
            let message = match handed.failed.first() {
                Some(first) => format!(
                    "{} nodes have failed, {} first: {}",
                    handed.counts.failed, first.node, first.message
                ),
                None => String::new(),
            };
            state("True", failed_reason(handed), truncated(&message, MAXIMUM_MESSAGE).to_owned())
        }
        _ => state("False", "Progressing", String::new()),
    }
}

/// The reason of a preload whose nodes are all done, some of them without success.
fn failed_reason(handed: &HandedOut) -> &'static str {
    let mut reasons = handed.failed.iter().map(|failed| &*failed.reason);
    if !handed.failed.is_empty() && reasons.all(|reason| reason == QUOTA_EXCEEDED) {
        return QUOTA_EXCEEDED;
    }
    "NodesFailed"
}

struct Conditions<'a> {
    before: &'a [Condition],
    preload: &'a Preload,
    now: Seconds,
    all: Vec<Condition>,
}

impl Conditions<'_> {
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

/// Whether a status says that all nodes hold it.
pub(super) fn is_ready(status: &ArtifactPreloadStatus) -> bool {
    is_true(status, "Ready")
}

/// Whether a status says that nothing but a change will help.
pub(super) fn is_stalled(status: &ArtifactPreloadStatus) -> bool {
    is_true(status, "Stalled")
}

fn is_true(status: &ArtifactPreloadStatus, kind: &str) -> bool {
    status.conditions.iter().any(|condition| condition.type_ == kind && condition.status == "True")
}

/// Whether more than numbers have changed.
pub(super) fn says_something_new(
    before: &ArtifactPreloadStatus,
    after: &ArtifactPreloadStatus,
) -> bool {
    let gist = |status: &ArtifactPreloadStatus| {
        let of = |condition: &Condition| (condition.status.clone(), condition.reason.clone());
        let conditions: Vec<_> = status.conditions.iter().map(of).collect();
        let known = (status.digest.clone(), status.ready_reference.clone());
        (status.observed_generation, known, conditions, status.failed_nodes.len())
    };
    gist(before) != gist(after)
}
