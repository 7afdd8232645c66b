//! Watches of the API server, which update the facts of the planner.
//!
//! kube resumes a broken watch where it stopped. If that version is too old, it lists all objects
//! again, and objects that are no longer in the list are removed.

use std::collections::{BTreeMap, HashSet};
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
use crate::plan::cluster_facts::{
    ClusterNode, ClusterState, NodeObject, PreloadFacts, key_of, start_order,
};

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
trait WatchedObject: Resource {
    type Facts;

    /// Returns all facts of this kind.
    fn known(state: &mut ClusterState) -> &mut BTreeMap<Arc<str>, Self::Facts>;

    /// Adds or updates an object. Returns whether a new plan may be needed.
    fn put(&self, state: &mut ClusterState) -> bool;

    /// Prepares for a new list. A restored API server has lower versions than the known ones.
    fn relist(_: &mut Self::Facts) {}
}

impl ListProgress {
    fn take<K: WatchedObject>(&mut self, event: Event<K>, state: &mut ClusterState) -> bool {
        match event {
            Event::Init => {
                self.listed.clear();
                K::known(state).values_mut().for_each(K::relist);
                false
            }
            Event::InitApply(object) => {
                self.listed.extend(key_of(object.meta()));
                object.put(state)
            }
            Event::Apply(object) => object.put(state),
            Event::Delete(object) => {
                if let Some(name) = key_of(object.meta()) {
                    K::known(state).remove(name.as_str());
                }
                true
            }
            Event::InitDone => {
                let listed = std::mem::take(&mut self.listed);
                K::known(state).retain(|name, _| listed.contains(&**name));
                self.whole = true;
                true
            }
        }
    }
}

impl WatchedObject for ArtifactPreload {
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

impl WatchedObject for NodeMetadata {
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

impl WatchedObject for NodeArtifacts {
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
