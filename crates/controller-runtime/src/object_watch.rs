//! Watches of the API server, which update the facts of a planner.
//!
//! kube resumes a broken watch where it stopped. If that version is too old, it lists all objects
//! again, and objects that are no longer in the list are removed.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Debug;
use std::sync::Arc;

use futures_util::StreamExt as _;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::ControllerMetrics;

/// Capacity of the event queue. Further events wait in the connection.
const QUEUE: usize = 256;

/// Running watches, which end when dropped. `E` is an event of any of them.
#[derive(Debug)]
pub struct RunningWatches<E> {
    /// Events of all watches.
    pub events: mpsc::Receiver<E>,
    /// One task for each watch. None of them ends by itself.
    pub tasks: JoinSet<()>,
    sender: mpsc::Sender<E>,
    metrics: Arc<ControllerMetrics>,
}

/// Operations on one kind of object in the facts `S`.
pub trait WatchedObject<S>: Resource {
    /// Facts of one object.
    type Facts;

    /// Returns all facts of this kind.
    fn known(state: &mut S) -> &mut BTreeMap<Arc<str>, Self::Facts>;

    /// Adds or updates an object. Returns whether a new plan may be needed.
    fn put(&self, state: &mut S) -> bool;

    /// Prepares for a new list. A restored API server has lower versions than the known ones.
    fn relist(_: &mut Self::Facts) {}
}

/// Progress of one watch: the names in the current list, and whether a list was ever complete.
#[derive(Debug, Default)]
pub struct ListProgress {
    listed: HashSet<String>,
    whole: bool,
}

impl<E: Send + 'static> RunningWatches<E> {
    /// Creates a queue without any watch.
    pub fn new(metrics: &Arc<ControllerMetrics>) -> Self {
        let (sender, events) = mpsc::channel(QUEUE);
        Self { events, tasks: JoinSet::new(), sender, metrics: Arc::clone(metrics) }
    }

    /// Starts a watch of all objects of one kind. `what` names the kind in the log.
    pub fn start<K>(&mut self, api: Api<K>, what: &'static str, wrap: fn(Event<K>) -> E)
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
    {
        let (sender, metrics) = (self.sender.clone(), Arc::clone(&self.metrics));
        self.tasks.spawn(async move {
            let watched = watcher(api, watcher::Config::default());
            let mut events = std::pin::pin!(watched.default_backoff());
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
        });
    }
}

impl ListProgress {
    /// Returns whether all objects were listed once. Before that, a missing object may only not
    /// have arrived yet.
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// Applies an event. Returns whether a new plan may be needed.
    pub fn take<S, K>(&mut self, event: Event<K>, state: &mut S) -> bool
    where
        K: WatchedObject<S>,
    {
        match event {
            Event::Init => {
                self.listed.clear();
                K::known(state).values_mut().for_each(K::relist);
                false
            }
            Event::InitApply(object) => {
                self.listed.extend(key_of(&object));
                object.put(state)
            }
            Event::Apply(object) => object.put(state),
            Event::Delete(object) => {
                if let Some(name) = key_of(&object) {
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

/// Returns `namespace/name` of an object, or the name of one without a namespace.
pub fn key_of(object: &impl Resource) -> Option<String> {
    let name = object.meta().name.clone()?;
    Some(match &object.meta().namespace {
        Some(namespace) => format!("{namespace}/{name}"),
        None => name,
    })
}
