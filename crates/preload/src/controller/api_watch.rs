//! Watches of the API server, which update the facts of the planner.

use std::collections::BTreeMap;
use std::sync::Arc;

use controller_runtime::ControllerMetrics;
use controller_runtime::object_watch::{ListProgress, RunningWatches, WatchedObject};
use k8s_openapi::api::core::v1::Node as ApiNode;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::Event;
use kube::{Api, Client};

use crate::api::{ArtifactPreload, NodeArtifacts};
use crate::plan::cluster_facts::{
    ClusterNode, ClusterState, NodeObject, PreloadFacts, start_order,
};

/// Metadata of a node, its name and labels: the status, which changes every few seconds, is not
/// transferred.
type NodeMetadata = PartialObjectMeta<ApiNode>;

/// An event of one of the watches.
#[expect(clippy::large_enum_variant, reason = "they are taken out at once, and few wait")]
pub(super) enum WatchEvent {
    Preload(Event<ArtifactPreload>),
    Node(Event<NodeMetadata>),
    Object(Event<NodeArtifacts>),
}

/// Progress of the three watches.
#[derive(Default)]
pub(super) struct WatchProgress {
    preloads: ListProgress,
    nodes: ListProgress,
    objects: ListProgress,
}

/// Starts all three watches.
pub(super) fn watch(
    client: &Client,
    metrics: &Arc<ControllerMetrics>,
) -> RunningWatches<WatchEvent> {
    let mut watches = RunningWatches::new(metrics);
    watches.start(Api::all(client.clone()), "artifactpreloads", WatchEvent::Preload);
    watches.start(Api::all(client.clone()), "nodes", WatchEvent::Node);
    watches.start(Api::all(client.clone()), "nodeartifacts", WatchEvent::Object);
    watches
}

impl WatchProgress {
    /// Returns whether all objects were listed once. Before that, a missing object may only not
    /// have arrived yet.
    pub(super) fn is_whole(&self) -> bool {
        self.preloads.is_whole() && self.nodes.is_whole() && self.objects.is_whole()
    }

    /// Applies an event. Returns whether a new plan may be needed.
    pub(super) fn take(&mut self, state: &mut ClusterState, event: WatchEvent) -> bool {
        match event {
            WatchEvent::Preload(event) => self.preloads.take(event, state),
            WatchEvent::Node(event) => self.nodes.take(event, state),
            WatchEvent::Object(event) => self.objects.take(event, state),
        }
    }
}

impl WatchedObject<ClusterState> for ArtifactPreload {
    type Facts = PreloadFacts;

    fn known(state: &mut ClusterState) -> &mut BTreeMap<Arc<str>, PreloadFacts> {
        &mut state.preloads
    }

    fn put(&self, state: &mut ClusterState) -> bool {
        state.put_preload(self);
        true
    }

    fn relist(facts: &mut PreloadFacts) {
        facts.relisted = true;
    }
}

impl WatchedObject<ClusterState> for NodeMetadata {
    type Facts = ClusterNode;

    fn known(state: &mut ClusterState) -> &mut BTreeMap<Arc<str>, ClusterNode> {
        &mut state.nodes
    }

    fn put(&self, state: &mut ClusterState) -> bool {
        let metadata = &self.metadata;
        let (Some(name), Some(uid)) = (&metadata.name, &metadata.uid) else { return false };
        let known = state.nodes.get(name.as_str()).filter(|known| known.uid == *uid);
        let node = ClusterNode {
            readiness: known.and_then(|known| known.readiness),
            condition: known.and_then(|known| known.condition.clone()),
            uid: uid.clone(),
            labels: metadata.labels.clone().unwrap_or_default(),
            created: metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
            start_order: start_order(name),
        };
        // The kubelet updates a node every few minutes without a relevant change.
        if state.nodes.get(name.as_str()) == Some(&node) {
            return false;
        }
        let name = state.text(name);
        state.nodes.insert(name, node);
        true
    }
}

impl WatchedObject<ClusterState> for NodeArtifacts {
    type Facts = NodeObject;

    fn known(state: &mut ClusterState) -> &mut BTreeMap<Arc<str>, NodeObject> {
        &mut state.objects
    }

    fn put(&self, state: &mut ClusterState) -> bool {
        state.put_object(self);
        true
    }

    fn relist(facts: &mut NodeObject) {
        facts.relisted = true;
    }
}
