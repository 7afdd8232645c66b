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
    let forward = EventForwarder { client: client.clone(), sender, metrics: Arc::clone(metrics) };
    tasks.spawn(forward.clone().run("artifactpreloads", WatchEvent::Preload));
    tasks.spawn(forward.clone().run("nodes", WatchEvent::Node));
    tasks.spawn(forward.run("nodeartifacts", WatchEvent::Object));
    RunningWatches { events, tasks }
}

/// Forwards the events of a watch to the queue.
#[derive(Clone)]
struct EventForwarder {
    client: Client,
    sender: mpsc::Sender<WatchEvent>,
    metrics: Arc<ControllerMetrics>,
}

impl EventForwarder {
    async fn run<K>(self, what: &'static str, wrap: fn(Event<K>) -> WatchEvent)
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
    {
        let watched = watcher(Api::all(self.client), watcher::Config::default());
        let mut events = std::pin::pin!(watched.default_backoff());
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => {
                    if self.sender.send(wrap(event)).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    self.metrics.record_watch_error();
                    tracing::warn!(what, %error, "a watch broke and is begun again");
                }
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
            WatchEvent::Preload(event) => self.preloads.take(event, state),
            WatchEvent::Node(event) => self.nodes.take(event, state),
            WatchEvent::Object(event) => self.objects.take(event, state),
        }
    }
}

/// Operations on one kind of object in the facts.
trait WatchedObject {
    fn name(&self) -> Option<String>;
    /// Adds or updates an object. Returns whether a new plan may be needed.
    fn put(&self, state: &mut ClusterState) -> bool;
    fn remove(state: &mut ClusterState, name: &str);
    fn names(state: &ClusterState) -> Vec<Arc<str>>;
    /// Prepares for a new list. A restored API server has lower versions than the known ones.
    fn relist(state: &mut ClusterState);
}

impl ListProgress {
    fn take<K: WatchedObject>(&mut self, event: Event<K>, state: &mut ClusterState) -> bool {
        match event {
            Event::Init => {
                self.listed.clear();
                K::relist(state);
                false
            }
            Event::InitApply(object) => {
                self.listed.extend(object.name());
                object.put(state)
            }
            Event::Apply(object) => object.put(state),
            Event::Delete(object) => {
                if let Some(name) = object.name() {
                    K::remove(state, &name);
                }
                true
            }
            Event::InitDone => {
                for name in K::names(state) {
                    if !self.listed.contains(&*name) {
                        K::remove(state, &name);
                    }
                }
                self.listed = HashSet::new();
                self.whole = true;
                true
            }
        }
    }
}

impl WatchedObject for ArtifactPreload {
    fn name(&self) -> Option<String> {
        key_of(self)
    }

    fn put(&self, state: &mut ClusterState) -> bool {
        state.put_preload(self);
        true
    }

    fn remove(state: &mut ClusterState, name: &str) {
        state.preloads.remove(name);
    }

    fn names(state: &ClusterState) -> Vec<Arc<str>> {
        state.preloads.keys().cloned().collect()
    }

    fn relist(state: &mut ClusterState) {
        state.preloads.values_mut().for_each(|preload| preload.relisted = true);
    }
}

impl WatchedObject for NodeMetadata {
    fn name(&self) -> Option<String> {
        self.metadata.name.clone()
    }

    fn put(&self, state: &mut ClusterState) -> bool {
        let metadata = &self.metadata;
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

    fn remove(state: &mut ClusterState, name: &str) {
        state.nodes.remove(name);
    }

    fn names(state: &ClusterState) -> Vec<Arc<str>> {
        state.nodes.keys().cloned().collect()
    }

    fn relist(_: &mut ClusterState) {}
}

impl WatchedObject for NodeArtifacts {
    fn name(&self) -> Option<String> {
        self.metadata.name.clone()
    }

    fn put(&self, state: &mut ClusterState) -> bool {
        state.put_object(self);
        true
    }

    fn remove(state: &mut ClusterState, name: &str) {
        state.objects.remove(name);
    }

    fn names(state: &ClusterState) -> Vec<Arc<str>> {
        state.objects.keys().cloned().collect()
    }

    fn relist(state: &mut ClusterState) {
        state.objects.values_mut().for_each(|object| object.relisted = true);
    }
}
