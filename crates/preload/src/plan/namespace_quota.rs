//! Quota of namespaces: preloads beyond the maximum number.

use std::collections::HashMap;

use super::cluster_facts::{ClusterState, PreloadFacts, PreloadId};
use super::node_assignment::AssignmentProblem;

/// Returns the preloads beyond the number that a namespace may have, each with the problem for its
/// status.
///
/// The oldest preloads count first, so that a new one takes nothing away from others. The bytes of
/// pins are limited by each node, which alone knows the unpacked size of content.
pub(super) fn exceeded(state: &ClusterState) -> HashMap<PreloadId, AssignmentProblem> {
    let Some(allowed) = state.quota.preloads else { return HashMap::new() };
    let mut namespaces: HashMap<&str, Vec<(&str, &PreloadFacts)>> = HashMap::new();
    for (key, preload) in &state.preloads {
        let namespace = key.split('/').next().unwrap_or_default();
        namespaces.entry(namespace).or_default().push((key, preload));
    }
    let mut exceeded = HashMap::new();
    for (namespace, mut preloads) in namespaces {
        let count = preloads.len();
        if count <= allowed {
            continue;
        }
        preloads.sort_by_key(|(key, preload)| (preload.created, *key));
        let message = format!(
            "the namespace {namespace} has {count} preloads, of which the oldest {allowed} count: delete some, or have controller.maxPreloadsPerNamespace of the chart raised"
        );
        for (_, preload) in &preloads[allowed..] {
            exceeded.insert(preload.id, AssignmentProblem::exceeded(&message));
        }
    }
    exceeded
}
