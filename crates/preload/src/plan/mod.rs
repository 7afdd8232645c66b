//! The planner: facts in, decisions out. It does no I/O and never waits, and the time is a fact.
//!
//! ```text
//! cluster_facts    the facts
//! node_assignment  the assignment of one preload to nodes
//! namespace_quota  preloads beyond the quota of their namespace
//! preload_status   status of one preload
//! node_status      labels and condition of each Node
//! mod              all preloads, and the object of each node
//! ```
//!
//! A decision describes the desired state, not a change: a second plan of the same facts decides
//! nothing. So it does not matter how often it runs, whether decisions were lost before they were
//! written, or which process writes them.

pub mod cluster_facts;
mod namespace_quota;
mod node_assignment;
pub mod node_status;
pub mod preload_status;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use crate::api::ArtifactPreloadStatus;
use crate::api::node_artifacts::MAXIMUM_ARTIFACTS;
use cluster_facts::{AssignedArtifact, ClusterState, NodeObject, PreloadId, Seconds};
use node_assignment::{AwaitedNode, EligibleNode};
use node_status::{NodeStatus, NodeStatusPlan};

/// Maximum bytes of a node's assignment: a third of the limit of the API server, since the status
/// is in the same object.
const MAXIMUM_BYTES: usize = 512 << 10;
/// Bytes of the fixed fields of one artifact.
const FIXED_BYTES: usize = 256;
/// Maximum bytes of sealed credentials.
const SEALED_BYTES: usize = 6 << 10;

/// Decisions of the planner.
#[derive(Debug, Default)]
pub struct PreloadPlan {
    /// Nodes without an object.
    pub create: Vec<Arc<str>>,
    /// Nodes whose assignment changes, with the whole new assignment.
    pub assign: Vec<(Arc<str>, Vec<AssignedArtifact>)>,
    /// Nodes whose labels or condition change.
    pub node_status: Vec<(Arc<str>, NodeStatus)>,
    /// Preloads whose status changes.
    pub report: Vec<StatusChange>,
    /// Preloads whose reference or secrets have to be resolved.
    pub resolve: Vec<Arc<str>>,
    /// Nodes whose condition Ready has to be read.
    pub check: BTreeSet<Arc<str>>,
    /// Preloads whose TTL has passed.
    pub delete: Vec<Arc<str>>,
    /// Numbers of preloads and nodes by progress.
    pub totals: PlanTotals,
    /// Time of the next plan if no event occurs.
    pub wake: Option<Seconds>,
}

/// A changed status of a preload.
#[derive(Debug)]
pub struct StatusChange {
    /// Preload as `namespace/name`.
    pub preload: Arc<str>,
    /// Whole new status.
    pub status: ArtifactPreloadStatus,
    /// True for a transition, false for changed counts.
    pub urgent: bool,
}

/// Sums over all preloads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlanTotals {
    /// Number of ready preloads.
    pub ready: usize,
    /// Number of preloads that only a change can help.
    pub stalled: usize,
    /// Number of other preloads.
    pub under_way: usize,
    /// Pairs of preload and node whose artifact is ready.
    pub nodes_ready: usize,
    /// Pairs that are being pulled.
    pub nodes_active: usize,
    /// Pairs that have failed.
    pub nodes_failed: usize,
    /// Pairs that have not started.
    pub nodes_waiting: usize,
}

/// Assignment of a node, while it is planned.
#[derive(Debug, Default)]
struct NodeAssignment {
    all: Vec<AssignedArtifact>,
    bytes: usize,
    /// Artifacts of the previous assignment that may stay: new ones must not take their space.
    reserved: usize,
    reserved_bytes: usize,
    /// Preloads that cannot be planned now, whose previous assignments stay.
    undecided: Vec<PreloadId>,
    /// True if needed secrets are being read: the assignment cannot be written before.
    waits: bool,
}

impl NodeAssignment {
    /// Creates an empty assignment that reserves space for the previous one.
    fn after(object: &NodeObject, known: &HashSet<PreloadId>) -> Self {
        let mut assignments = Self::default();
        for wanted in object.wanted.iter().filter(|wanted| known.contains(&wanted.preload)) {
            assignments.reserved += 1;
            assignments.reserved_bytes += wanted.size();
        }
        assignments
    }

    /// Returns whether one more artifact fits.
    fn fits(&self, reference: &str, sealed: bool) -> bool {
        self.all.len() + self.reserved < MAXIMUM_ARTIFACTS
            && self.bytes + self.reserved_bytes + size_of(reference, sealed) <= MAXIMUM_BYTES
    }

    /// Returns whether the assignment, with the reserved space, takes at most half of the maximum.
    fn is_half_empty(&self) -> bool {
        (self.all.len() + self.reserved) * 2 <= MAXIMUM_ARTIFACTS
            && (self.bytes + self.reserved_bytes) * 2 <= MAXIMUM_BYTES
    }

    /// Releases the reserved space of an artifact that is assigned again.
    fn release(&mut self, before: &AssignedArtifact) {
        self.reserved -= 1;
        self.reserved_bytes -= before.size();
    }

    fn add(&mut self, wanted: AssignedArtifact) {
        self.bytes += wanted.size();
        self.all.push(wanted);
    }
}

impl AssignedArtifact {
    fn size(&self) -> usize {
        size_of(&self.reference, self.sealed.is_some())
    }
}

fn size_of(reference: &str, sealed: bool) -> usize {
    FIXED_BYTES + reference.len() + if sealed { SEALED_BYTES } else { 0 }
}

/// Plans all preloads and nodes.
pub fn plan(state: &ClusterState, now: Seconds) -> PreloadPlan {
    let mut plan = PreloadPlan::default();
    let mut nodes: Vec<EligibleNode<'_>> = Vec::with_capacity(state.nodes.len());
    let mut awaited: Vec<AwaitedNode<'_>> = Vec::new();
    for (name, node) in &state.nodes {
        let Some(object) = state.objects.get(name) else {
            plan.create.push(Arc::clone(name));
            awaited.push((name, node));
            continue;
        };
        // The garbage collector deletes an object of a previous node of this name; then the node
        // gets its own.
        let is_its_own = object.owner.as_ref().is_none_or(|owner| *owner == node.uid);
        let since = match (is_its_own, &object.report) {
            (true, Some(_)) => None,
            (true, None) => Some(object.created),
            (false, _) => Some(node.created),
        };
        if let Some(until) = since.map(|since| since + node_assignment::SILENT_AFTER)
            && until >= now
        {
            awaited.push((name, node));
            plan.wake = earlier(plan.wake, Some(until + 1));
        }
        if is_its_own {
            nodes.push(EligibleNode { name, facts: node, object });
        }
    }
    nodes.sort_by_key(|node| (node.facts.start_order, node.name));
    let known: HashSet<PreloadId> = state.preloads.values().map(|preload| preload.id).collect();
    let mut assignments: Vec<NodeAssignment> =
        nodes.iter().map(|node| NodeAssignment::after(node.object, &known)).collect();
    let mut exceeded = namespace_quota::exceeded(state);
    let mut node_status = NodeStatusPlan::new(&state.node_status, now);
    for (key, preload) in &state.preloads {
        let assignment = if let Some(problem) = exceeded.remove(&preload.id) {
            node_assignment::withhold(preload, &nodes, &awaited, problem)
        } else {
            let assignment =
                node_assignment::assign(preload, &nodes, &awaited, &mut assignments, now);
            node_status.add(key, preload, &assignment);
            assignment
        };
        plan.wake = earlier(plan.wake, assignment.wake);
        plan.check.extend(assignment.unchecked.iter().cloned());
        if assignment.resolve {
            plan.resolve.push(Arc::clone(key));
        }
        plan.totals.nodes_ready += assignment.counts.ready;
        plan.totals.nodes_active += assignment.counts.active;
        plan.totals.nodes_failed += assignment.counts.failed;
        plan.totals.nodes_waiting += assignment.counts.waiting();
        let label = node_status.label_of(key, preload);
        let written = preload_status::status(preload, &assignment, label, now);
        match (
            preload_status::is_ready(&written.status),
            preload_status::is_stalled(&written.status),
        ) {
            (true, _) => plan.totals.ready += 1,
            (false, true) => plan.totals.stalled += 1,
            (false, false) => plan.totals.under_way += 1,
        }
        if let Some(end) = written.end {
            if end <= now {
                plan.delete.push(Arc::clone(key));
            } else {
                plan.wake = earlier(plan.wake, Some(end));
            }
        }
        if written.status != preload.status {
            let urgent = preload_status::is_transition(&preload.status, &written.status);
            let preload = Arc::clone(key);
            plan.report.push(StatusChange { preload, status: written.status, urgent });
        }
    }
    for (node, assignments) in nodes.iter().zip(assignments) {
        let waits = assignments.waits;
        let wanted = with_kept_artifacts(node.object, assignments, &known);
        let status = node_status.missing_on(*node, &wanted, &mut plan.wake);
        plan.node_status.extend(status.map(|status| (Arc::clone(node.name), status)));
        if waits {
            continue;
        }
        // A limit without any artifact need not be written.
        let other_bound = node.object.pinned_bytes_per_namespace != state.quota.pinned_bytes
            && !wanted.is_empty();
        if other_bound || !is_assigned(node.object, &wanted) {
            plan.assign.push((Arc::clone(node.name), wanted));
        }
    }
    plan
}

/// Adds the artifacts that stay. If the plugin has not reported yet, the node keeps all artifacts
/// of existing preloads.
fn with_kept_artifacts(
    object: &NodeObject,
    assignments: NodeAssignment,
    known: &HashSet<PreloadId>,
) -> Vec<AssignedArtifact> {
    let NodeAssignment { mut all, undecided, .. } = assignments;
    let stays = |wanted: &&AssignedArtifact| match object.report {
        None => known.contains(&wanted.preload),
        Some(_) => undecided.contains(&wanted.preload),
    };
    if object.report.is_none() {
        all.clear();
    }
    all.extend(object.wanted.iter().filter(stays).cloned());
    all.sort_by(|one, two| (one.preload, &one.reference).cmp(&(two.preload, &two.reference)));
    all
}

/// Returns whether the object of a node already has this assignment. Credentials that are no longer
/// needed may stay until the next write.
fn is_assigned(object: &NodeObject, wanted: &[AssignedArtifact]) -> bool {
    let same = |one: &AssignedArtifact, two: &AssignedArtifact| {
        let sealed = two.sealed.is_none() || one.sealed == two.sealed;
        sealed
            && one.resolved_at == two.resolved_at
            && (one.preload, &one.reference, one.pin, one.timeout, one.backoff, one.since)
                == (two.preload, &two.reference, two.pin, two.timeout, two.backoff, two.since)
    };
    object.wanted.len() == wanted.len()
        && object.wanted.iter().zip(wanted).all(|(one, two)| same(one, two))
}

fn earlier(one: Option<Seconds>, two: Option<Seconds>) -> Option<Seconds> {
    match (one, two) {
        (Some(one), Some(two)) => Some(one.min(two)),
        (one, two) => one.or(two),
    }
}
