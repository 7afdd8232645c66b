//! Labels and the condition of a Node, by which pods are scheduled.
//!
//! Both follow from what the node reports. A label depends on a namespace and a reference, so that
//! preloads of one namespace never decide a label of another one.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::cluster_facts::{
    ArtifactProgress, AssignedArtifact, ClusterNode, NodeObject, ParsedSpec, PreloadFacts,
    PreloadId, Seconds,
};
use super::earlier;
use super::node_assignment::{
    EligibleNode, PreloadAssignment, SILENT_AFTER, find_held, find_wanted, is_selected, pinned,
};
use super::preload_status::ConditionState;
use crate::api::Phase;
use oci::{Digest, Reference};

/// Prefix of the labels, before the hash.
pub const LABEL_PREFIX: &str = "oci.custom.io/ready.";
/// Value of the labels.
pub const LABEL_VALUE: &str = "true";
/// Type of the condition.
pub const CONDITION: &str = "oci.custom.io/ArtifactsReady";
/// Hexadecimal digits of the hash: 128 bits, so that no namespace finds the label of another one.
const HASH_DIGITS: usize = 32;
/// Seconds for which a label or a true condition stays while the node pulls: a restarted plugin
/// reports all artifacts as being pulled until it has found them.
const RESTART_GRACE: Seconds = 15;

/// Labels and condition that the controller writes to Nodes. The default is neither.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeStatusRules {
    /// True to label nodes with the artifacts that they hold.
    pub labels: bool,
    /// Namespaces whose preloads decide the condition. Without any, there is no condition.
    pub condition_namespaces: BTreeSet<String>,
}

/// Labels and condition that a Node should have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeStatus {
    /// Keys of all labels with the prefix; `None` to leave the labels alone.
    pub labels: Option<BTreeSet<Arc<str>>>,
    /// Condition; `None` to leave it alone.
    pub condition: Option<ConditionState>,
}

impl NodeStatus {
    /// Returns whether the Node has all of it, as far as it is known.
    fn is_on(&self, node: &ClusterNode) -> bool {
        let has_labels = self.labels.as_ref().is_none_or(|wanted| {
            let ours = node.labels.iter().filter(|(key, _)| key.starts_with(LABEL_PREFIX));
            ours.clone().count() == wanted.len()
                && ours
                    .clone()
                    .all(|(key, value)| value == LABEL_VALUE && wanted.contains(key.as_str()))
        });
        has_labels && (self.condition.is_none() || self.condition == node.condition)
    }
}

/// Returns the label of nodes that hold the artifact of a namespace's preload: a hash of
/// `namespace/reference`, with the reference in its full form.
pub fn ready_label(namespace: &str, reference: &Reference) -> String {
    let hash = Digest::of(format!("{namespace}/{reference}").as_bytes()).hex();
    format!("{LABEL_PREFIX}{}", &hash[..HASH_DIGITS])
}

/// Preloads that decide the labels and the conditions of nodes.
pub(super) struct NodeStatusPlan<'a> {
    rules: &'a NodeStatusRules,
    now: Seconds,
    /// Labels by preload and by the reference that nodes hold.
    labels: HashMap<(PreloadId, Arc<str>), Arc<str>>,
    counted: Vec<CountedPreload<'a>>,
}

/// A preload that decides the condition.
struct CountedPreload<'a> {
    key: &'a str,
    facts: &'a PreloadFacts,
    parsed: &'a ParsedSpec,
    /// References of which a node has to hold one: the current one, and the one that was last on
    /// all nodes, which pods use until the current one is.
    references: Vec<Arc<str>>,
}

/// Why a node lacks an artifact. The last one is the most certain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Gap {
    Silent,
    Missing,
    Failed,
}

impl<'a> NodeStatusPlan<'a> {
    pub(super) fn new(rules: &'a NodeStatusRules, now: Seconds) -> Self {
        Self { rules, now, labels: HashMap::new(), counted: Vec::new() }
    }

    /// Adds a preload. Without a pin, nodes do not notice that an artifact is evicted.
    pub(super) fn add(
        &mut self,
        key: &'a str,
        preload: &'a PreloadFacts,
        assignment: &PreloadAssignment,
    ) {
        if !preload.spec.pin {
            return;
        }
        let namespace = key.split_once('/').map_or("", |(namespace, _)| namespace);
        let (current, status) = (assignment.current.as_ref(), &preload.status);
        if self.rules.labels {
            let mut add = |held: Arc<str>, reference: &Reference| {
                let label = ready_label(namespace, reference);
                self.labels.insert((preload.id, held), Arc::from(label));
            };
            if let (Some(current), Ok(parsed)) = (current, &preload.parsed) {
                add(Arc::clone(&current.asked), &parsed.reference);
            }
            // Nodes keep these for pods of the previous version and for a rollback.
            for version in
                [&status.ready_reference, &status.previous_reference].into_iter().flatten()
            {
                if current.is_none_or(|current| *current.reference != **version)
                    && let Some(reference) = written_reference(preload, version)
                {
                    add(Arc::from(version.as_str()), &reference);
                }
            }
        }
        if let Ok(parsed) = &preload.parsed
            && self.rules.condition_namespaces.contains(namespace)
        {
            let current = current.map(|current| Arc::clone(&current.asked));
            let ready = status.ready_reference.as_deref().map(Arc::from);
            let references: Vec<_> = current.into_iter().chain(ready).collect();
            if !references.is_empty() {
                self.counted.push(CountedPreload { key, facts: preload, parsed, references });
            }
        }
    }

    /// Returns the label of a preload's current reference.
    pub(super) fn label_of(&self, key: &str, preload: &PreloadFacts) -> Option<String> {
        let (parsed, (namespace, _)) = (preload.parsed.as_ref().ok()?, key.split_once('/')?);
        (self.rules.labels && preload.spec.pin).then(|| ready_label(namespace, &parsed.reference))
    }

    /// Returns what a Node lacks: its whole labels and condition. `None` if it has both. A Node
    /// without a report has no condition, since it may be without the driver.
    pub(super) fn missing_on(
        &self,
        node: EligibleNode<'_>,
        wanted: &[AssignedArtifact],
        wake: &mut Option<Seconds>,
    ) -> Option<NodeStatus> {
        let labels = self.rules.labels.then(|| self.labels_of(node, wanted, wake));
        let has_condition =
            !self.rules.condition_namespaces.is_empty() && node.object.report.is_some();
        let condition = has_condition.then(|| self.condition(node, wake));
        let status = NodeStatus { labels, condition };
        (!status.is_on(node.facts)).then_some(status)
    }

    fn labels_of(
        &self,
        node: EligibleNode<'_>,
        wanted: &[AssignedArtifact],
        wake: &mut Option<Seconds>,
    ) -> BTreeSet<Arc<str>> {
        let mut labels = BTreeSet::new();
        for wanted in wanted {
            let key = (wanted.preload, Arc::clone(&wanted.reference));
            let Some(label) = self.labels.get(&key) else { continue };
            let Some(held) = progress(node.object, wanted.preload, &wanted.reference) else {
                continue;
            };
            let is_labelled = node.facts.labels.contains_key(&**label);
            if held.phase == Phase::Ready || (is_labelled && self.is_restarting(held, wake)) {
                labels.insert(Arc::clone(label));
            }
        }
        labels
    }

    fn condition(&self, node: EligibleNode<'_>, wake: &mut Option<Seconds>) -> ConditionState {
        let (mut desired, mut ready) = (0, 0);
        let mut first: Option<(Gap, &str, &str)> = None;
        let mut is_restarting = true;
        for preload in self.counted.iter().filter(|preload| preload.counts_for(node)) {
            desired += 1;
            let held = preload.references.iter();
            let held = held.filter_map(|text| progress(node.object, preload.facts.id, text));
            let best = held.max_by_key(|held| held.phase == Phase::Ready);
            let (gap, reason) = match best {
                Some(held) if held.phase == Phase::Ready => {
                    ready += 1;
                    continue;
                }
                Some(held) if held.phase == Phase::Failed => (Gap::Failed, &*held.reason),
                None if self.is_silent(preload, node.object) => (Gap::Silent, ""),
                Some(_) | None => (Gap::Missing, ""),
            };
            is_restarting &= best.is_some_and(|held| self.is_restarting(held, wake));
            if first.is_none_or(|(other, ..)| other < gap) {
                first = Some((gap, preload.key, reason));
            }
        }
        let Some((gap, key, reason)) = first else {
            let message = format!("the node holds {ready} of {desired} preloaded artifacts");
            return ConditionState { status: "True", reason: "ArtifactsReady", message };
        };
        if let Some(before) = &node.facts.condition
            && is_restarting
            && before.status == "True"
        {
            return before.clone();
        }
        let held = format!("the node holds {ready} of {desired} preloaded artifacts");
        let (status, reason, message) = match gap {
            Gap::Failed => {
                ("False", "ArtifactsFailed", format!("{held}, and {key} has failed: {reason}"))
            }
            Gap::Missing => {
                ("False", "ArtifactsMissing", format!("{held}, and lacks that of {key}"))
            }
            Gap::Silent => {
                let why = "the node plugin does not take up that of";
                ("Unknown", "NoAnswer", format!("{held}, and {why} {key}"))
            }
        };
        ConditionState { status, reason, message }
    }

    /// Returns whether a plugin may just have been restarted.
    fn is_restarting(&self, held: &ArtifactProgress, wake: &mut Option<Seconds>) -> bool {
        // Clocks of nodes may be ahead.
        let until = held.since.map(|since| since.min(self.now) + RESTART_GRACE);
        let until = until.filter(|until| held.phase != Phase::Failed && *until >= self.now);
        *wake = earlier(*wake, until.map(|until| until + 1));
        until.is_some()
    }

    /// Returns whether a plugin has not taken up an artifact of the preload in time.
    fn is_silent(&self, preload: &CountedPreload<'_>, object: &NodeObject) -> bool {
        let wanted = preload.references.iter();
        let mut wanted = wanted.filter_map(|text| find_wanted(object, preload.facts.id, text));
        wanted.any(|wanted| wanted.since + SILENT_AFTER < self.now)
    }
}

impl CountedPreload<'_> {
    /// Returns whether a node has to hold the artifact. A preload that was never on all its nodes
    /// counts only for nodes that are younger: it must not take the others out of service.
    fn counts_for(&self, node: EligibleNode<'_>) -> bool {
        let was_ready = self.facts.status.ready_reference.is_some();
        (was_ready || node.facts.created >= self.facts.created)
            && is_selected(self.facts, self.parsed, &node)
    }
}

fn progress<'a>(
    object: &'a NodeObject,
    preload: PreloadId,
    reference: &str,
) -> Option<&'a ArtifactProgress> {
    let (_, digest) = reference.rsplit_once('@')?;
    find_held(object, preload, reference, digest)
}

/// Returns the reference as the preload named it when it resolved to this version.
fn written_reference(preload: &PreloadFacts, version: &str) -> Option<Reference> {
    let mut answers = preload.status.history.iter();
    answers.find_map(|answer| {
        let reference: Reference = answer.reference.parse().ok()?;
        let is_it = *pinned(&reference, &answer.digest).ok()? == *version;
        is_it.then_some(reference)
    })
}
