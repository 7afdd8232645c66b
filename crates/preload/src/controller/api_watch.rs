//! Watches of the API server, which update the facts of the planner.
//!
//! kube resumes a broken watch where it stopped. If that version is too old, it lists all objects
//! again, and objects that are no longer in the list are removed.

use std::collections::HashSet;
use std::sync::Arc;

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Node as ApiNode;
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::ControllerMetrics;
use crate::api::{ArtifactPreload, NodeArtifacts};
use crate::plan::cluster_facts::{ClusterNode, ClusterState, key_of, start_order};

/// Capacity of the event queue. Further events wait in the connection.
const QUEUE: usize = 256;

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

/// Running watches, which end when dropped.
pub(super) struct RunningWatches {
    pub(super) events: mpsc::Receiver<WatchEvent>,
    pub(super) tasks: JoinSet<()>,
}

/// Progress of the three watches.
#[derive(Default)]
pub(super) struct WatchProgress {
    preloads: ListProgress,
    nodes: ListProgress,
    objects: ListProgress,
}

/// Progress of one watch: the names in the current list, and whether a list was ever complete.
#[derive(Default)]
struct ListProgress {
    listed: HashSet<String>,
    whole: bool,
}

/// Starts all three watches.
pub(super) fn watch(client: &Client, metrics: &Arc<ControllerMetrics>) -> RunningWatches {
    let (sender, events) = mpsc::channel(QUEUE);
    let mut tasks = JoinSet::new();
    let (preloads, nodes) = (Api::all(client.clone()), Api::all(client.clone()));
    let objects = Api::all(client.clone());
    tasks.spawn(forward_events(
        "artifactpreloads",
        preloads,
        WatchEvent::Preload,
        sender.clone(),
        Arc::clone(metrics),
    ));
    tasks.spawn(forward_events(
        "nodes",
        nodes,
        WatchEvent::Node,
        sender.clone(),
        Arc::clone(metrics),
    ));
    tasks.spawn(forward_events(
        "nodeartifacts",
        objects,
        WatchEvent::Object,
        sender,
        Arc::clone(metrics),
    ));
    RunningWatches { events, tasks }
}

async fn forward_events<K>(
    what: &'static str,
    api: Api<K>,
    wrap: fn(Event<K>) -> WatchEvent,
    sender: mpsc::Sender<WatchEvent>,
    metrics: Arc<ControllerMetrics>,
) where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let mut events = std::pin::pin!(watcher(api, watcher::Config::default()).default_backoff());
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                if sender.send(wrap(event)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                metrics.record_watch_error();
                tracing::warn!(what, %error, "a watch broke and is begun again");
            }
        }
    }
}

impl WatchProgress {
    /// Returns whether all objects were listed once. Before that, a missing object may only not
    /// have arrived yet.
    pub(super) fn is_whole(&self) -> bool {
        self.preloads.whole && self.nodes.whole && self.objects.whole
    }

    /// Applies an event. Returns whether a new plan may be needed.
    pub(super) fn take(&mut self, state: &mut ClusterState, event: WatchEvent) -> bool {
        match event {
            WatchEvent::Preload(event) => self.preloads.take(event, state, &PreloadObjects),
            WatchEvent::Node(event) => self.nodes.take(event, state, &NodeObjects),
            WatchEvent::Object(event) => self.objects.take(event, state, &AssignmentObjects),
        }
    }
}

/// Operations on one kind of object in the facts.
trait WatchedKind<K> {
    fn name(&self, object: &K) -> Option<String>;
    /// Adds or updates an object. Returns whether a new plan may be needed.
    fn put(&self, state: &mut ClusterState, object: &K) -> bool;
    fn remove(&self, state: &mut ClusterState, name: &str);
    fn names(&self, state: &ClusterState) -> Vec<Arc<str>>;
    /// Prepares for a new list. A restored API server has lower versions than the known ones.
    fn relist(&self, state: &mut ClusterState);
}

impl ListProgress {
    fn take<K>(
        &mut self,
        event: Event<K>,
        state: &mut ClusterState,
        kind: &impl WatchedKind<K>,
    ) -> bool {
        match event {
            Event::Init => {
                self.listed.clear();
                kind.relist(state);
                false
            }
            Event::InitApply(object) => {
                self.listed.extend(kind.name(&object));
                kind.put(state, &object)
            }
            Event::Apply(object) => kind.put(state, &object),
            Event::Delete(object) => {
                if let Some(name) = kind.name(&object) {
                    kind.remove(state, &name);
                }
                true
            }
            Event::InitDone => {
                for name in kind.names(state) {
                    if !self.listed.contains(&*name) {
                        kind.remove(state, &name);
                    }
                }
                self.listed = HashSet::new();
                self.whole = true;
                true
            }
        }
    }
}

struct PreloadObjects;
struct NodeObjects;
struct AssignmentObjects;

impl WatchedKind<ArtifactPreload> for PreloadObjects {
    fn name(&self, object: &ArtifactPreload) -> Option<String> {
        key_of(object)
    }

    fn put(&self, state: &mut ClusterState, object: &ArtifactPreload) -> bool {
        state.put_preload(object);
        true
    }

    fn remove(&self, state: &mut ClusterState, name: &str) {
        state.preloads.remove(name);
    }

    fn names(&self, state: &ClusterState) -> Vec<Arc<str>> {
        state.preloads.keys().cloned().collect()
    }

    fn relist(&self, state: &mut ClusterState) {
        state.preloads.values_mut().for_each(|preload| preload.relisted = true);
    }
}

impl WatchedKind<NodeMetadata> for NodeObjects {
    fn name(&self, object: &NodeMetadata) -> Option<String> {
        object.metadata.name.clone()
    }

    fn put(&self, state: &mut ClusterState, object: &NodeMetadata) -> bool {
        let metadata = &object.metadata;
        let (Some(name), Some(uid)) = (&metadata.name, &metadata.uid) else { return false };
        let known = state.nodes.get(name.as_str()).filter(|known| known.uid == *uid);
        let node = ClusterNode {
            readiness: known.and_then(|known| known.readiness),
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

    fn remove(&self, state: &mut ClusterState, name: &str) {
        state.nodes.remove(name);
    }

    fn names(&self, state: &ClusterState) -> Vec<Arc<str>> {
        state.nodes.keys().cloned().collect()
    }

    fn relist(&self, _: &mut ClusterState) {}
}

impl WatchedKind<NodeArtifacts> for AssignmentObjects {
    fn name(&self, object: &NodeArtifacts) -> Option<String> {
        object.metadata.name.clone()
    }

    fn put(&self, state: &mut ClusterState, object: &NodeArtifacts) -> bool {
        state.put_object(object);
        true
    }

    fn remove(&self, state: &mut ClusterState, name: &str) {
        state.objects.remove(name);
    }

    fn names(&self, state: &ClusterState) -> Vec<Arc<str>> {
        state.objects.keys().cloned().collect()
    }

    fn relist(&self, state: &mut ClusterState) {
        state.objects.values_mut().for_each(|object| object.relisted = true);
    }
}
