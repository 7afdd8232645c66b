//! What the API server tells, as the planner's facts.
//!
//! A watch that breaks is begun again where it stopped, by the library; where that is too long ago, with a new list,
//! and what is not in it any more is gone.

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

use super::FleetMetrics;
use crate::api::{ArtifactPreload, NodeArtifacts};
use crate::plan::facts::{Node, World, key_of, turn};

/// Events that wait to be taken; more wait in the connection.
const QUEUE: usize = 256;

/// Of a node, its name and labels: what it says every few seconds is not asked for.
type NodeMetadata = PartialObjectMeta<ApiNode>;

/// What was told.
#[expect(clippy::large_enum_variant, reason = "they are taken out at once, and few wait")]
pub(super) enum Told {
    Preload(Event<ArtifactPreload>),
    Node(Event<NodeMetadata>),
    Object(Event<NodeArtifacts>),
}

/// Watches, until dropped.
pub(super) struct Watching {
    pub(super) told: mpsc::Receiver<Told>,
    pub(super) tasks: JoinSet<()>,
}

/// The state of three watches.
#[derive(Default)]
pub(super) struct Gathering {
    preloads: Gathered,
    nodes: Gathered,
    objects: Gathered,
}

/// One watch: which names the list under way has had, and whether one was ever whole.
#[derive(Default)]
struct Gathered {
    listed: HashSet<String>,
    whole: bool,
}

/// Begins all three.
pub(super) fn watch(client: &Client, metrics: &Arc<FleetMetrics>) -> Watching {
    let (sender, told) = mpsc::channel(QUEUE);
    let mut tasks = JoinSet::new();
    let (preloads, nodes) = (Api::all(client.clone()), Api::all(client.clone()));
    let objects = Api::all(client.clone());
    tasks.spawn(tell(
        "artifactpreloads",
        preloads,
        Told::Preload,
        sender.clone(),
        Arc::clone(metrics),
    ));
    tasks.spawn(tell("nodes", nodes, Told::Node, sender.clone(), Arc::clone(metrics)));
    tasks.spawn(tell("nodeartifacts", objects, Told::Object, sender, Arc::clone(metrics)));
    Watching { told, tasks }
}

async fn tell<K>(
    what: &'static str,
    api: Api<K>,
    wrap: fn(Event<K>) -> Told,
    sender: mpsc::Sender<Told>,
    metrics: Arc<FleetMetrics>,
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
                metrics.watch_broke();
                tracing::warn!(what, %error, "a watch broke and is begun again");
            }
        }
    }
}

impl Gathering {
    /// Whether all that there is has been told: before that, what seems missing may only not have come yet.
    pub(super) fn is_whole(&self) -> bool {
        self.preloads.whole && self.nodes.whole && self.objects.whole
    }

    /// Takes in what was told; whether it matters.
    pub(super) fn take(&mut self, world: &mut World, told: Told) -> bool {
        match told {
            Told::Preload(event) => self.preloads.take(event, world, &Preloads),
            Told::Node(event) => self.nodes.take(event, world, &Nodes),
            Told::Object(event) => self.objects.take(event, world, &Objects),
        }
    }
}

/// How one kind of object gets into the world, and out of it.
trait Kind<K> {
    fn name(&self, object: &K) -> Option<String>;
    /// Whether it matters.
    fn put(&self, world: &mut World, object: &K) -> bool;
    fn remove(&self, world: &mut World, name: &str);
    fn names(&self, world: &World) -> Vec<Arc<str>>;
    /// A list begins. A server that was set back has lower versions than what is known.
    fn relist(&self, world: &mut World);
}

impl Gathered {
    fn take<K>(&mut self, event: Event<K>, world: &mut World, kind: &impl Kind<K>) -> bool {
        match event {
            Event::Init => {
                self.listed.clear();
                kind.relist(world);
                false
            }
            Event::InitApply(object) => {
                self.listed.extend(kind.name(&object));
                kind.put(world, &object)
            }
            Event::Apply(object) => kind.put(world, &object),
            Event::Delete(object) => {
                if let Some(name) = kind.name(&object) {
                    kind.remove(world, &name);
                }
                true
            }
            Event::InitDone => {
                for name in kind.names(world) {
                    if !self.listed.contains(&*name) {
                        kind.remove(world, &name);
                    }
                }
                self.listed = HashSet::new();
                self.whole = true;
                true
            }
        }
    }
}

struct Preloads;
struct Nodes;
struct Objects;

impl Kind<ArtifactPreload> for Preloads {
    fn name(&self, object: &ArtifactPreload) -> Option<String> {
        key_of(object)
    }

    fn put(&self, world: &mut World, object: &ArtifactPreload) -> bool {
        world.put_preload(object);
        true
    }

    fn remove(&self, world: &mut World, name: &str) {
        world.preloads.remove(name);
    }

    fn names(&self, world: &World) -> Vec<Arc<str>> {
        world.preloads.keys().cloned().collect()
    }

    fn relist(&self, world: &mut World) {
        world.preloads.values_mut().for_each(|preload| preload.relisted = true);
    }
}

impl Kind<NodeMetadata> for Nodes {
    fn name(&self, object: &NodeMetadata) -> Option<String> {
        object.metadata.name.clone()
    }

    fn put(&self, world: &mut World, object: &NodeMetadata) -> bool {
        let metadata = &object.metadata;
        let (Some(name), Some(uid)) = (&metadata.name, &metadata.uid) else { return false };
        let known = world.nodes.get(name.as_str()).filter(|known| known.uid == *uid);
        let node = Node {
            readiness: known.and_then(|known| known.readiness),
            uid: uid.clone(),
            labels: metadata.labels.clone().unwrap_or_default(),
            created: metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
            turn: turn(name),
        };
        // A node is written every few minutes by its kubelet; nothing of that matters here.
        if world.nodes.get(name.as_str()) == Some(&node) {
            return false;
        }
        let name = world.text(name);
        world.nodes.insert(name, node);
        true
    }

    fn remove(&self, world: &mut World, name: &str) {
        world.nodes.remove(name);
    }

    fn names(&self, world: &World) -> Vec<Arc<str>> {
        world.nodes.keys().cloned().collect()
    }

    fn relist(&self, _: &mut World) {}
}

impl Kind<NodeArtifacts> for Objects {
    fn name(&self, object: &NodeArtifacts) -> Option<String> {
        object.metadata.name.clone()
    }

    fn put(&self, world: &mut World, object: &NodeArtifacts) -> bool {
        world.put_object(object);
        true
    }

    fn remove(&self, world: &mut World, name: &str) {
        world.objects.remove(name);
    }

    fn names(&self, world: &World) -> Vec<Arc<str>> {
        world.objects.keys().cloned().collect()
    }

    fn relist(&self, world: &mut World) {
        world.objects.values_mut().for_each(|object| object.relisted = true);
    }
}
