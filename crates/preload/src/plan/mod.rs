//! What is to be done: facts in, decisions out. Nothing is asked, written or waited for here, and the time is a fact.
//!
//! ```text
//! facts     what is known
//! handout   one preload: which of its nodes hold it, which may begin
//! quota     which preloads their namespace has too many of
//! status    one preload: what its status says
//! mod       all preloads, and what each node's object is to say
//! ```
//!
//! A decision is about how things should be, not about what has changed: planned again without anything having
//! happened, nothing is decided. So it does not matter how often it is planned, what was lost before a decision was
//! carried out, or who carries it out.

pub mod facts;
mod handout;
mod quota;
mod status;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use crate::api::ArtifactPreloadStatus;
use crate::api::node::MAXIMUM_ARTIFACTS;
use facts::{Object, PreloadId, Seconds, Wanted, World};
use handout::{Awaited, Turn};

/// Bytes of a node's wishes: a third of what the API server takes, since the status comes on top, and time to notice.
const MAXIMUM_BYTES: usize = 512 << 10;
/// Bytes of one artifact's fixed parts, and of its credentials.
const FIXED_BYTES: usize = 256;
/// Of sealed credentials at their longest.
const SEALED_BYTES: usize = 6 << 10;

/// What is to be done.
#[derive(Debug, Default)]
pub struct Plan {
    /// Nodes that have no object yet.
    pub create: Vec<Arc<str>>,
    /// Nodes whose wishes change, with all of them.
    pub assign: Vec<(Arc<str>, Vec<Wanted>)>,
    /// Preloads whose status changes.
    pub report: Vec<StatusChange>,
    /// Preloads whose reference or secrets have to be looked at.
    pub look: Vec<Arc<str>>,
    /// Nodes of which has to be asked whether they are Ready.
    pub check: BTreeSet<Arc<str>>,
    /// Preloads whose time is over.
    pub delete: Vec<Arc<str>>,
    /// How many preloads and nodes are how far.
    pub totals: Totals,
    /// When to plan again though nothing happens.
    pub wake: Option<Seconds>,
}

/// A status that changes.
#[derive(Debug)]
pub struct StatusChange {
    /// Whose.
    pub preload: Arc<str>,
    /// All of it.
    pub status: ArtifactPreloadStatus,
    /// Whether it says something new, and not just other numbers.
    pub urgent: bool,
}

/// Sums over all preloads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Preloads that are ready.
    pub ready: usize,
    /// Preloads that nothing but a change will help.
    pub stalled: usize,
    /// Others.
    pub under_way: usize,
    /// Pairs of preload and node: held.
    pub nodes_ready: usize,
    /// Being fetched.
    pub nodes_active: usize,
    /// Failed.
    pub nodes_failed: usize,
    /// Waiting for their turn.
    pub nodes_waiting: usize,
}

/// What a node is to hold, while it is planned.
#[derive(Debug, Default)]
struct Wishes {
    all: Vec<Wanted>,
    bytes: usize,
    /// What the node was told before, and may stay: what is new gets none of its room.
    reserved: usize,
    reserved_bytes: usize,
    /// Of these, all that is wanted already stays: what is to be said about them is not known at the moment.
    undecided: Vec<PreloadId>,
    /// Secrets that it still needs are being read: nothing can be written before.
    waits: bool,
}

impl Wishes {
    /// Nothing yet, and room for what was told before.
    fn after(object: &Object, known: &HashSet<PreloadId>) -> Self {
        let mut wishes = Self::default();
        for wanted in object.wanted.iter().filter(|wanted| known.contains(&wanted.preload)) {
            wishes.reserved += 1;
            wishes.reserved_bytes += wanted.size();
        }
        wishes
    }

    /// Whether one more fits.
    fn fits(&self, reference: &str, sealed: bool) -> bool {
        self.all.len() + self.reserved < MAXIMUM_ARTIFACTS
            && self.bytes + self.reserved_bytes + size_of(reference, sealed) <= MAXIMUM_BYTES
    }

    /// Returns whether what is told, and was told before, takes half of the room at most.
    fn is_half_empty(&self) -> bool {
        (self.all.len() + self.reserved) * 2 <= MAXIMUM_ARTIFACTS
            && (self.bytes + self.reserved_bytes) * 2 <= MAXIMUM_BYTES
    }

    /// What was told before is told again.
    fn release(&mut self, before: &Wanted) {
        self.reserved -= 1;
        self.reserved_bytes -= before.size();
    }

    fn add(&mut self, wanted: Wanted) {
        self.bytes += wanted.size();
        self.all.push(wanted);
    }
}

impl Wanted {
    fn size(&self) -> usize {
        size_of(&self.reference, self.sealed.is_some())
    }
}

fn size_of(reference: &str, sealed: bool) -> usize {
    FIXED_BYTES + reference.len() + if sealed { SEALED_BYTES } else { 0 }
}

/// Decides.
#[must_use]
pub fn plan(world: &World, now: Seconds) -> Plan {
    let mut plan = Plan::default();
    let mut turns: Vec<Turn<'_>> = Vec::with_capacity(world.nodes.len());
    let mut awaited: Vec<Awaited<'_>> = Vec::new();
    for (name, node) in &world.nodes {
        let Some(object) = world.objects.get(name) else {
            plan.create.push(Arc::clone(name));
            awaited.push((name, node));
            continue;
        };
        // What was made for the node's predecessor goes with the garbage collector, and then it gets its own.
        let is_its_own = object.owner.as_ref().is_none_or(|owner| *owner == node.uid);
        let since = match (is_its_own, &object.report) {
            (true, Some(_)) => None,
            (true, None) => Some(object.created),
            (false, _) => Some(node.created),
        };
        if let Some(until) = since.map(|since| since + handout::PATIENCE)
            && until >= now
        {
            awaited.push((name, node));
            plan.wake = earlier(plan.wake, Some(until + 1));
        }
        if is_its_own {
            turns.push(Turn { name, node, object });
        }
    }
    turns.sort_by_key(|turn| (turn.node.turn, turn.name));
    let known: HashSet<PreloadId> = world.preloads.values().map(|preload| preload.id).collect();
    let mut wishes: Vec<Wishes> =
        turns.iter().map(|turn| Wishes::after(turn.object, &known)).collect();
    let mut exceeded = quota::exceeded(world);
    for (key, preload) in &world.preloads {
        let handed = match exceeded.remove(&preload.id) {
            Some(problem) => handout::withhold(preload, &turns, &awaited, problem),
            None => handout::hand_out(preload, &turns, &awaited, &mut wishes, now),
        };
        plan.wake = earlier(plan.wake, handed.wake);
        plan.check.extend(handed.doubtful.iter().cloned());
        if handed.look {
            plan.look.push(Arc::clone(key));
        }
        plan.totals.nodes_ready += handed.counts.ready;
        plan.totals.nodes_active += handed.counts.active;
        plan.totals.nodes_failed += handed.counts.failed;
        plan.totals.nodes_waiting += handed.counts.waiting();
        let written = status::status(preload, &handed, now);
        match (status::is_ready(&written.status), status::is_stalled(&written.status)) {
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
            let urgent = status::says_something_new(&preload.status, &written.status);
            let preload = Arc::clone(key);
            plan.report.push(StatusChange { preload, status: written.status, urgent });
        }
    }
    for (turn, wishes) in turns.iter().zip(wishes).filter(|(_, wishes)| !wishes.waits) {
        let wanted = with_what_stays(turn.object, wishes, &known);
        // A bound on nothing need not be told.
        let other_bound = turn.object.pinned_bytes_per_namespace != world.quota.pinned_bytes
            && !wanted.is_empty();
        if other_bound || !is_said(turn.object, &wanted) {
            plan.assign.push((Arc::clone(turn.name), wanted));
        }
    }
    plan
}

/// A node whose plugin has said nothing yet keeps what it has of preloads that are still there.
fn with_what_stays(object: &Object, wishes: Wishes, known: &HashSet<PreloadId>) -> Vec<Wanted> {
    let Wishes { mut all, undecided, .. } = wishes;
    let stays = |wanted: &&Wanted| match object.report {
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

/// Whether a node's object says this already. Credentials that are not needed any more may stay until something else
/// is written.
fn is_said(object: &Object, wanted: &[Wanted]) -> bool {
    let same = |one: &Wanted, two: &Wanted| {
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
