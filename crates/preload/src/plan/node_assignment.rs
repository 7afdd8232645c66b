//! Assignment of one preload to nodes: those that hold it, those that may start, those that have
//! failed.

use std::fmt::Display;
use std::sync::Arc;

use super::cluster_facts::{
    AnswerOrigin, ArtifactProgress, AssignedArtifact, ClusterNode, NodeObject, NodeReport,
    ParsedSpec, PreloadFacts, PreloadId, ReferenceResolution, RegistryAccess, ResolutionFailure,
    ResolvedArtifact, SealedVersion, Seconds, mix,
};
use super::{NodeAssignment, earlier};
use crate::api::artifact_preload::MAXIMUM_FAILED_NODES;
use crate::api::{Phase, QUOTA_EXCEEDED};
use oci::{Platform, Reference};
use text::human_units::Bytes;

/// Seconds after which a node plugin counts as silent. It usually reports its platform and starts
/// an assigned artifact within seconds.
pub(super) const SILENT_AFTER: Seconds = 120;
/// Reasons of a node that does not answer.
const SILENT_REASONS: [&str; 2] = ["NoAnswer", "Overdue"];
/// Maximum pause of a node between two attempts, in seconds.
const LONGEST_PAUSE: Seconds = 300;

/// A node in the order of starts.
#[derive(Clone, Copy)]
pub(super) struct EligibleNode<'a> {
    pub(super) name: &'a Arc<str>,
    pub(super) facts: &'a ClusterNode,
    pub(super) object: &'a NodeObject,
}

/// A node that may have the driver: its object is so young that the plugin may not have reported
/// yet.
pub(super) type AwaitedNode<'a> = (&'a Arc<str>, &'a ClusterNode);

/// Result of the assignment of one preload.
#[derive(Debug, Default)]
pub(super) struct PreloadAssignment {
    /// Artifact to hold, if the reference is resolved.
    pub(super) current: Option<CurrentArtifact>,
    /// Reason why no further node starts, if any.
    pub(super) problem: Option<AssignmentProblem>,
    /// Numbers of nodes by progress.
    pub(super) counts: NodeCounts,
    /// First failed nodes, by name.
    pub(super) failed: Vec<FailedAssignment>,
    /// True if all selected nodes held it at once in this generation, now or before.
    pub(super) reached: bool,
    /// Number of nodes that may be away.
    pub(super) tolerated: usize,
    /// Nodes without the artifact whose condition Ready has to be read.
    pub(super) unchecked: Vec<Arc<str>>,
    /// True if the registry has to be asked or the secrets have to be read.
    pub(super) resolve: bool,
    /// Time of the next plan.
    pub(super) wake: Option<Seconds>,
}

impl PreloadAssignment {
    fn fail(&mut self, node: EligibleNode<'_>, reason: Arc<str>, message: Arc<str>) {
        self.counts.failed += 1;
        let node = Arc::clone(node.name);
        self.failed.push(FailedAssignment { node, reason, message });
    }
}

/// An artifact with its digest.
#[derive(Clone, Debug)]
pub(super) struct CurrentArtifact {
    pub(super) known: ResolvedArtifact,
    /// Reference as `repository:tag@digest`.
    pub(super) reference: Arc<str>,
    /// Reference that nodes are asked for; see [`asked_reference`].
    pub(super) asked: Arc<str>,
    /// True if it is in the repository that the credentials are for; they must not be used for
    /// another one.
    own: bool,
}

impl CurrentArtifact {
    /// Returns the time at which the registry resolved the tag; `None` for an earlier answer, and
    /// without a tag.
    fn tag_resolved_at(&self) -> Option<Seconds> {
        let AnswerOrigin { resolved_at, unavailable, .. } = &self.known.origin;
        resolved_at.filter(|_| unavailable.is_none() && !self.known.reference.contains('@'))
    }
}

/// Reason why nothing is assigned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AssignmentProblem {
    pub(super) reason: &'static str,
    pub(super) message: String,
    /// True if waiting may help.
    pub(super) transient: bool,
}

/// Numbers of nodes by progress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct NodeCounts {
    pub(super) desired: usize,
    pub(super) ready: usize,
    pub(super) active: usize,
    pub(super) failed: usize,
    /// Nodes without the artifact that are not Ready, or whose plugin does not answer.
    pub(super) away: usize,
}

impl NodeCounts {
    /// Returns whether every node holds the artifact, except for those that may be away. At least
    /// one node must hold it.
    pub(super) fn is_everywhere(self, tolerated: usize) -> bool {
        self.ready > 0 && self.ready + self.away.min(tolerated) >= self.desired
    }

    /// Returns the number of nodes that have not started.
    pub(super) fn waiting(self) -> usize {
        self.desired.saturating_sub(self.ready + self.active + self.failed)
    }
}

/// A failed node with the reason.
#[derive(Clone, Debug)]
pub(super) struct FailedAssignment {
    pub(super) node: Arc<str>,
    pub(super) reason: Arc<str>,
    pub(super) message: Arc<str>,
}

/// Progress of one artifact on a node.
enum NodeProgress {
    Unasked,
    Active,
    Ready,
    Failed(Arc<str>, Arc<str>),
}

/// Decides which selected nodes have to hold the artifact, and adds it to their assignments.
pub(super) fn assign(
    preload: &PreloadFacts,
    nodes: &[EligibleNode<'_>],
    awaited: &[AwaitedNode<'_>],
    assignments: &mut [NodeAssignment],
    now: Seconds,
) -> PreloadAssignment {
    let mut assignment = PreloadAssignment::default();
    let parsed = match &preload.parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            assignment.problem = Some(AssignmentProblem::new("InvalidSpec", error));
            keep_assignments(preload.id, assignments);
            return assignment;
        }
    };
    let needs_secrets = evaluate(preload, parsed, now, &mut assignment);
    if preload.resolution == ReferenceResolution::Unknown {
        // The assigned digest may still be right: nothing changes before the resolution is known.
        keep_assignments(preload.id, assignments);
        assignment.counts.desired =
            nodes.iter().filter(|node| is_selected(preload, parsed, node)).count()
                + count_awaited(preload, awaited);
        return assignment;
    }
    let selected: Vec<usize> =
        (0..nodes.len()).filter(|&at| is_selected(preload, parsed, &nodes[at])).collect();
    assignment.counts.desired = selected.len();
    // A gate that waits for all nodes must not open after the first ones. An open gate stays open.
    let was_reached =
        assignment.current.as_ref().is_some_and(|current| was_reached(preload, current));
    if !was_reached {
        assignment.counts.desired += count_awaited(preload, awaited);
    }
    // No node starts without its credentials. Without nodes, the secrets are not read.
    if preload.access == RegistryAccess::Unknown && assignment.counts.desired > 0 {
        let message = "the secrets are being read";
        assignment.problem.get_or_insert_with(|| AssignmentProblem::waiting("Resolving", message));
    }
    let missing =
        assignment.current.as_ref().and_then(|current| missing_platform(parsed, &current.known));
    let is_short = missing.is_some();
    assignment.problem = missing.or(assignment.problem.take());
    assignment.tolerated = parsed.tolerated.at_most(selected.len());
    let mut slots = parsed.parallelism.of(selected.len());
    if preload.spec.paused || assignment.problem.is_some() {
        slots = 0;
    }
    let begin = preload.status.start_time.as_ref().map(|time| time.0.as_second());
    let begin = begin.filter(|_| is_of_this_generation(preload)).unwrap_or(now);
    let mut work = AssignmentWork { preload, parsed, nodes, assignments, now, begin, slots: 0 };
    if let Some(current) = assignment.current.clone() {
        let (busy, candidates) = work.keep(&selected, &current, &mut assignment, true);
        // An artifact without a required platform is never ready.
        assignment.reached =
            was_reached || (!is_short && assignment.counts.is_everywhere(assignment.tolerated));
        let missing = assignment.counts.desired - assignment.counts.ready;
        if assignment.reached || missing > assignment.tolerated {
            // The condition Ready of these nodes would change nothing.
            assignment.unchecked.clear();
        }
        work.slots = slots.saturating_sub(busy);
        work.start_nodes(candidates, &current, &mut assignment, true);
    } else {
        work.slots = slots;
    }
    let (ready, previous) = versions_before(preload, parsed, &assignment);
    // Pods still use the previous artifact: nodes keep it until the new one is everywhere, and new
    // nodes get it.
    if let Some(previous) = ready {
        let mut ignored = PreloadAssignment::default();
        let (busy, candidates) = work.keep(&selected, &previous, &mut ignored, false);
        work.slots = work.slots.saturating_sub(busy);
        // Until the status reports the new artifact as ready, workloads roll out to the previous
        // one. Afterwards no node starts with it.
        if !assignment.reached {
            work.start_nodes(candidates, &previous, &mut ignored, false);
        }
        assignment.wake = earlier(assignment.wake, ignored.wake);
    }
    // Nodes hold the same content under its own name, too.
    let own_name = assignment.current.clone().filter(|current| current.asked != current.reference);
    for version in previous.into_iter().chain(own_name).filter(|_| preload.spec.pin) {
        work.retain(&selected, &version);
    }
    assignment.resolve |= needs_secrets && assignment.counts.ready < assignment.counts.desired;
    assignment.failed.sort_by(|one, two| one.node.cmp(&two.node));
    assignment.failed.truncate(MAXIMUM_FAILED_NODES);
    assignment
}

/// Withdraws an artifact from all nodes, with the problem as the reason.
pub(super) fn withhold(
    preload: &PreloadFacts,
    nodes: &[EligibleNode<'_>],
    awaited: &[AwaitedNode<'_>],
    problem: AssignmentProblem,
) -> PreloadAssignment {
    let mut assignment =
        PreloadAssignment { problem: Some(problem), ..PreloadAssignment::default() };
    let Ok(parsed) = &preload.parsed else { return assignment };
    if let ReferenceResolution::Known(known) = &preload.resolution
        && let Ok(reference) = pinned(&parsed.reference, &known.digest)
    {
        let asked = Arc::clone(&reference);
        let known = known.clone();
        assignment.current = Some(CurrentArtifact { known, reference, asked, own: true });
    }
    let selected = nodes.iter().filter(|node| is_selected(preload, parsed, node)).count();
    assignment.counts.desired = selected + count_awaited(preload, awaited);
    assignment
}

/// Keeps the assignments of a preload that cannot be planned.
fn keep_assignments(preload: PreloadId, assignments: &mut [NodeAssignment]) {
    for assignments in assignments {
        assignments.undecided.push(preload);
    }
}

/// Evaluates the resolution and the access of a preload. Returns whether the secrets have to be
/// read.
fn evaluate(
    preload: &PreloadFacts,
    parsed: &ParsedSpec,
    now: Seconds,
    assignment: &mut PreloadAssignment,
) -> bool {
    let refused = |refusal: &ResolutionFailure, assignment: &mut PreloadAssignment| {
        if refusal.retry_at <= now {
            assignment.resolve = true;
        } else {
            assignment.wake = earlier(assignment.wake, Some(refusal.retry_at));
        }
        assignment.problem = Some(AssignmentProblem {
            reason: refusal.reason,
            message: refusal.message.clone(),
            transient: refusal.transient,
        });
    };
    match &preload.resolution {
        // The registry is not asked without the secrets.
        ReferenceResolution::Unknown => {
            assignment.resolve = !matches!(preload.access, RegistryAccess::Refused(_));
        }
        ReferenceResolution::Refused(refusal) => refused(refusal, assignment),
        ReferenceResolution::Known(known) => match pinned(&parsed.reference, &known.digest) {
            Ok(reference) => {
                if let Some(unavailable) = known.origin.unavailable {
                    assignment.resolve |= unavailable.retry_at <= now;
                    assignment.wake =
                        earlier(assignment.wake, Some(unavailable.retry_at.max(now + 1)));
                }
                let asked = asked_reference(preload, &parsed.reference, known, &reference);
                let known = known.clone();
                assignment.current = Some(CurrentArtifact { known, reference, asked, own: true });
            }
            Err(error) => assignment.problem = Some(AssignmentProblem::new("InvalidSpec", &error)),
        },
    }
    match &preload.access {
        RegistryAccess::Unknown => true,
        RegistryAccess::Open => false,
        RegistryAccess::Sealed { until, .. } => {
            if *until > now {
                assignment.wake = earlier(assignment.wake, Some(*until));
            }
            *until <= now
        }
        RegistryAccess::Refused(refusal) => {
            refused(refusal, assignment);
            false
        }
    }
}

/// Returns the problem that the index lacks a platform of the spec.
fn missing_platform(parsed: &ParsedSpec, known: &ResolvedArtifact) -> Option<AssignmentProblem> {
    let platforms = &known.platforms;
    let lacks = |wanted: &&Platform| !platforms.iter().any(|offered| wanted.may_run(offered));
    let missing = parsed.platforms.iter().filter(|_| !platforms.is_empty()).find(lacks)?;
    let offered: Vec<_> = platforms.iter().map(ToString::to_string).collect();
    let message = format!(
        "the index {} is not for {missing}, but for {}: push one that is, or change spec.platforms",
        known.digest,
        offered.join(", ")
    );
    Some(AssignmentProblem::new("PlatformMissing", &message))
}

/// Returns the reference with its digest, as nodes get it.
pub(super) fn pinned(reference: &Reference, digest: &dyn Display) -> Result<Arc<str>, String> {
    if reference.digest().is_some() {
        return Ok(Arc::from(reference.to_string()));
    }
    let repository = reference.repository().to_string();
    let digest = digest.to_string();
    let pinned = Reference::from_parts(&repository, Some(reference.tag_or_latest()), Some(&digest));
    pinned.map(|pinned| Arc::from(pinned.to_string())).map_err(|error| error.to_string())
}

/// Returns the reference that nodes are asked for. They hold content under its own name by the
/// secrets of the time when they fetched it, which an earlier answer does not cover: under another
/// name, each node looks for its proof that the current secrets open it.
fn asked_reference(
    preload: &PreloadFacts,
    wanted: &Reference,
    known: &ResolvedArtifact,
    reference: &Arc<str>,
) -> Arc<str> {
    if known.origin.unavailable.is_none() || preload.spec.pull_secrets.is_empty() {
        return Arc::clone(reference);
    }
    let (repository, digest) = (wanted.repository(), &known.digest);
    let without_tag = format!("{repository}@{digest}");
    if without_tag == **reference {
        return Arc::from(format!("{repository}:{}@{digest}", wanted.tag_or_latest()));
    }
    Arc::from(without_tag)
}

/// Returns the artifact that was last everywhere, if it is not the current one, and the one before
/// that. With the current one they are two at most, so that a preload never takes more space of a
/// node than during a rollout.
fn versions_before(
    preload: &PreloadFacts,
    parsed: &ParsedSpec,
    assignment: &PreloadAssignment,
) -> (Option<CurrentArtifact>, Option<CurrentArtifact>) {
    let current = assignment.current.as_ref();
    let version = |text: &Option<String>| {
        let text = text.as_deref()?;
        if current.is_some_and(|current| &*current.reference == text) {
            return None;
        }
        let reference: Reference = text.parse().ok()?;
        let own = reference.repository() == parsed.reference.repository();
        let known = ResolvedArtifact {
            reference: String::new(),
            digest: reference.digest()?,
            platforms: Vec::new(),
            bytes: None,
            origin: AnswerOrigin::default(),
        };
        let reference: Arc<str> = Arc::from(text);
        Some(CurrentArtifact { known, asked: Arc::clone(&reference), reference, own })
    };
    let ready = version(&preload.status.ready_reference);
    let has_room = current.is_none() || ready.is_none();
    (ready, version(&preload.status.previous_reference).filter(|_| has_room))
}

fn is_of_this_generation(preload: &PreloadFacts) -> bool {
    preload.status.observed_generation == Some(preload.generation)
}

/// Returns whether all nodes held it at once before, in this generation.
fn was_reached(preload: &PreloadFacts, current: &CurrentArtifact) -> bool {
    is_of_this_generation(preload)
        && preload.status.ready_reference.as_deref() == Some(&current.reference)
        && super::preload_status::is_ready(&preload.status)
}

fn count_awaited(preload: &PreloadFacts, awaited: &[AwaitedNode<'_>]) -> usize {
    awaited.iter().filter(|(name, node)| selects(preload, name, node)).count()
}

fn selects(preload: &PreloadFacts, name: &str, node: &ClusterNode) -> bool {
    let selector = &preload.spec.selector;
    let named = selector.names.is_empty() || selector.names.iter().any(|other| other == name);
    let has = |(key, value): (&String, &String)| node.labels.get(key) == Some(value);
    named && selector.match_labels.iter().all(has)
}

pub(super) fn is_selected(
    preload: &PreloadFacts,
    parsed: &ParsedSpec,
    node: &EligibleNode<'_>,
) -> bool {
    let Some(report) = &node.object.report else { return false };
    let fits = |platform: &Platform| {
        parsed.platforms.is_empty()
            || parsed.platforms.iter().any(|wanted| wanted.accepts(platform))
    };
    selects(preload, node.name, node.facts) && report.platform.as_ref().is_none_or(fits)
}

struct AssignmentWork<'a, 'w> {
    preload: &'a PreloadFacts,
    parsed: &'a ParsedSpec,
    nodes: &'a [EligibleNode<'a>],
    assignments: &'w mut [NodeAssignment],
    now: Seconds,
    begin: Seconds,
    slots: usize,
}

impl AssignmentWork<'_, '_> {
    /// Keeps the artifact on nodes that it is assigned to. Returns the number of nodes that are
    /// pulling, and the nodes that it is not assigned to yet.
    fn keep(
        &mut self,
        selected: &[usize],
        current: &CurrentArtifact,
        assignment: &mut PreloadAssignment,
        counted: bool,
    ) -> (usize, Vec<usize>) {
        let digest = current.known.digest.to_string();
        let (mut busy, mut candidates) = (0, Vec::new());
        for &at in selected {
            let node = self.nodes[at];
            let wanted = find_wanted(node.object, self.preload.id, &current.asked);
            let held = find_held(node.object, self.preload.id, &current.asked, &digest);
            let state = self.state(node, wanted, held, current, assignment);
            if let Some(wanted) = wanted {
                let ready = matches!(state, NodeProgress::Ready);
                self.add_artifact(at, current, wanted.since, Some(wanted), ready);
            }
            if counted && !matches!(state, NodeProgress::Ready) {
                self.count_away(node, &state, assignment);
            }
            match state {
                NodeProgress::Unasked => candidates.push(at),
                NodeProgress::Active => {
                    busy += 1;
                    assignment.counts.active += 1;
                }
                NodeProgress::Ready => assignment.counts.ready += 1,
                NodeProgress::Failed(reason, message) if counted => {
                    assignment.fail(node, reason, message);
                }
                NodeProgress::Failed(..) => {}
            }
        }
        // A node that is known to be away would occupy a slot for two minutes.
        candidates.sort_by_key(|&at| self.readiness(self.nodes[at]) == Some(false));
        (busy, candidates)
    }

    /// Counts a node without the artifact if it is away, or requests a read of its condition.
    fn count_away(
        &self,
        node: EligibleNode<'_>,
        state: &NodeProgress,
        assignment: &mut PreloadAssignment,
    ) {
        let is_silent =
            matches!(state, NodeProgress::Failed(reason, _) if SILENT_REASONS.contains(&&**reason));
        let readiness = self.readiness(node);
        if is_silent || readiness == Some(false) {
            assignment.counts.away += 1;
        }
        match (node.facts.readiness, readiness) {
            (Some(known), Some(_)) => {
                assignment.wake = earlier(assignment.wake, Some(known.until + 1));
            }
            _ if is_silent => {}
            _ => assignment.unchecked.push(Arc::clone(node.name)),
        }
    }

    /// Returns a node's condition Ready, if it was read recently.
    fn readiness(&self, node: EligibleNode<'_>) -> Option<bool> {
        let readiness = node.facts.readiness.filter(|readiness| readiness.until >= self.now);
        readiness.map(|readiness| readiness.is_ready)
    }

    /// Lets nodes keep an artifact for a rollback. No node pulls it, and nodes with large
    /// assignments drop it.
    fn retain(&mut self, selected: &[usize], version: &CurrentArtifact) {
        let digest = version.known.digest.to_string();
        for &at in selected {
            let object = self.nodes[at].object;
            let wanted = find_wanted(object, self.preload.id, &version.reference);
            let held = find_held(object, self.preload.id, &version.reference, &digest);
            if let (Some(wanted), Some(ArtifactProgress { phase: Phase::Ready, .. })) =
                (wanted, held)
                && self.assignments[at].is_half_empty()
            {
                self.add_artifact(at, version, wanted.since, Some(wanted), true);
            }
        }
    }

    /// Assigns the artifact to as many nodes as may start, in order.
    fn start_nodes(
        &mut self,
        candidates: Vec<usize>,
        current: &CurrentArtifact,
        assignment: &mut PreloadAssignment,
        counted: bool,
    ) {
        let sealed = current.own && matches!(self.preload.access, RegistryAccess::Sealed { .. });
        for at in candidates {
            if self.slots == 0 {
                break;
            }
            let node = self.nodes[at];
            let due = self.due(node);
            if due > self.now {
                assignment.wake = earlier(assignment.wake, Some(due));
                continue;
            }
            if !self.assignments[at].fits(&current.asked, sealed) {
                if counted {
                    let message = "other preloads want more of this node than fits one object: use fewer preloads for it";
                    assignment.fail(node, Arc::from("TooManyPreloads"), Arc::from(message));
                }
                continue;
            }
            self.add_artifact(at, current, self.now, None, false);
            assignment.counts.active += 1;
            assignment.wake = earlier(assignment.wake, Some(self.now + SILENT_AFTER + 1));
            self.slots -= 1;
        }
    }

    /// Returns the time at which a node may start.
    fn due(&self, node: EligibleNode<'_>) -> Seconds {
        let spread = self.parsed.spread.as_secs();
        if spread == 0 {
            return self.now;
        }
        let delay = mix(node.name, &self.preload.uid) % spread;
        self.begin.max(node.facts.created) + Seconds::try_from(delay).unwrap_or_default()
    }

    fn state(
        &self,
        node: EligibleNode<'_>,
        wanted: Option<&AssignedArtifact>,
        held: Option<&ArtifactProgress>,
        current: &CurrentArtifact,
        assignment: &mut PreloadAssignment,
    ) -> NodeProgress {
        let platforms = &current.known.platforms;
        if let Some(NodeReport { platform: Some(platform), .. }) = &node.object.report
            && !platforms.is_empty()
            && !platforms.iter().any(|offered| platform.may_run(offered))
        {
            let message = format!(
                "the index is not for {platform}: push one that is, or leave such nodes out with spec.platforms or spec.selector"
            );
            return NodeProgress::Failed(Arc::from("PlatformMissing"), Arc::from(message));
        }
        if let (Some(_), Some(ArtifactProgress { phase: Phase::Ready, .. })) = (wanted, held) {
            return NodeProgress::Ready;
        }
        if let Some(message) = too_large(node, current) {
            return NodeProgress::Failed(Arc::from("NoRoom"), Arc::from(message));
        }
        let Some(wanted) = wanted else { return NodeProgress::Unasked };
        match held {
            Some(held) if held.phase == Phase::Failed => {
                NodeProgress::Failed(Arc::clone(&held.reason), Arc::clone(&held.message))
            }
            other => {
                let tries = Seconds::from(wanted.backoff) + 1;
                let patience = if other.is_none() {
                    SILENT_AFTER
                } else {
                    (Seconds::from(wanted.timeout) + LONGEST_PAUSE) * tries + SILENT_AFTER
                };
                // The deadline counts from the current pull, since a node may pull again or with a
                // new process. Clocks of nodes may be ahead.
                let begun = other.and_then(|held| held.since).map(|since| since.min(self.now));
                let deadline = begun.unwrap_or(wanted.since).max(wanted.since) + patience;
                if deadline < self.now {
                    let (reason, message) = overdue(other);
                    return NodeProgress::Failed(reason, message);
                }
                assignment.wake = earlier(assignment.wake, Some(deadline + 1));
                NodeProgress::Active
            }
        }
    }

    /// Adds the artifact to the assignment of a node.
    fn add_artifact(
        &mut self,
        at: usize,
        current: &CurrentArtifact,
        since: Seconds,
        before: Option<&AssignedArtifact>,
        ready: bool,
    ) {
        let report = self.nodes[at].object.report.as_ref();
        let needed = !ready && current.own;
        let sealed = match &self.preload.access {
            RegistryAccess::Sealed { version, .. } if needed => report.map(|report| {
                SealedVersion { key: Arc::clone(&report.public_key), version: Arc::clone(version) }
            }),
            // Sealed credentials stay, and can be sealed again once the secrets are read.
            RegistryAccess::Unknown if needed => before.and_then(|before| before.sealed.clone()),
            RegistryAccess::Unknown
            | RegistryAccess::Sealed { .. }
            | RegistryAccess::Open
            | RegistryAccess::Refused(_) => None,
        };
        self.assignments[at].waits |=
            sealed.is_some() && self.preload.access == RegistryAccess::Unknown;
        if let Some(before) = before {
            self.assignments[at].release(before);
        }
        let spec = &self.preload.spec;
        let reference =
            before.map_or_else(|| Arc::clone(&current.asked), |b| Arc::clone(&b.reference));
        self.assignments[at].add(AssignedArtifact {
            preload: self.preload.id,
            reference,
            pin: spec.pin,
            timeout: spec.timeout_seconds,
            backoff: spec.backoff_limit,
            since,
            resolved_at: current.tag_resolved_at(),
            sealed,
        });
    }
}

/// Returns the reason why a node could not hold the artifact even if it held nothing else.
fn too_large(node: EligibleNode<'_>, current: &CurrentArtifact) -> Option<String> {
    let capacity = node.object.report.as_ref()?.capacity?;
    let bytes = current.known.bytes.filter(|bytes| *bytes > capacity)?;
    Some(format!(
        "the artifact has {}, and the node has room for {} of artifacts at most: enlarge its disk, see cache.maxBytes and cache.minFreePercent, or leave it out with spec.selector",
        Bytes(bytes),
        Bytes(capacity)
    ))
}

fn overdue(held: Option<&ArtifactProgress>) -> (Arc<str>, Arc<str>) {
    match held {
        None => (
            Arc::from("NoAnswer"),
            Arc::from(
                "the node plugin has not taken it up in two minutes: look at the node and at the driver's pod there",
            ),
        ),
        Some(held) if held.message.is_empty() => (
            Arc::from("Overdue"),
            Arc::from(
                "the node plugin has not said for long how far it is: look at the driver's pod there",
            ),
        ),
        Some(held) => (Arc::from("Overdue"), Arc::clone(&held.message)),
    }
}

pub(super) fn find_wanted<'a>(
    object: &'a NodeObject,
    preload: PreloadId,
    reference: &str,
) -> Option<&'a AssignedArtifact> {
    let from = object.wanted.partition_point(|wanted| wanted.preload < preload);
    let of_preload = object.wanted[from..].iter().take_while(|wanted| wanted.preload == preload);
    of_preload.into_iter().find(|wanted| &*wanted.reference == reference)
}

/// Returns the progress of an artifact. The same content under another name is another artifact: it
/// is pulled with other credentials, and pinned separately.
pub(super) fn find_held<'a>(
    object: &'a NodeObject,
    preload: PreloadId,
    reference: &str,
    digest: &str,
) -> Option<&'a ArtifactProgress> {
    let held = &object.report.as_ref()?.held;
    let from = held.partition_point(|held| held.preload < preload);
    let of_preload = held[from..].iter().take_while(|held| held.preload == preload);
    of_preload.into_iter().find(|held| match &*held.reference {
        "" => &*held.digest == digest,
        said => said == reference,
    })
}

impl AssignmentProblem {
    fn new(reason: &'static str, message: &str) -> Self {
        Self { reason, message: message.to_owned(), transient: false }
    }

    /// Returns the problem that the quota of the namespace is exceeded.
    pub(super) fn exceeded(message: &str) -> Self {
        Self::new(QUOTA_EXCEEDED, message)
    }

    fn waiting(reason: &'static str, message: &str) -> Self {
        Self { reason, message: message.to_owned(), transient: true }
    }
}
