//! Which preloads their namespace has too many of.

use std::collections::HashMap;

use super::facts::{Preload, PreloadId, World};
use super::handout::Problem;

/// Returns the preloads beyond the number that a namespace may have, each with what its status says.
///
/// The oldest count first, so that a new one takes nothing away from others. What the pins of a namespace hold is
/// bounded by each node, which alone knows how large content is once it is unpacked.
pub(super) fn exceeded(world: &World) -> HashMap<PreloadId, Problem> {
    let Some(allowed) = world.quota.preloads else { return HashMap::new() };
    let mut namespaces: HashMap<&str, Vec<(&str, &Preload)>> = HashMap::new();
    for (key, preload) in &world.preloads {
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
            exceeded.insert(preload.id, Problem::exceeded(&message));
        }
    }
    exceeded
}
