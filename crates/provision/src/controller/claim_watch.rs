//! Watches of claims, classes and volumes, which update the facts of the planner.

use std::collections::BTreeMap;
use std::sync::Arc;

use controller_runtime::ControllerMetrics;
use controller_runtime::object_watch::{ListProgress, RunningWatches, WatchedObject, key_of};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::runtime::watcher::Event;
use kube::{Api, Client};

use crate::plan::facts::{ClaimFacts, ClassFacts, ProvisionState, VolumeFacts};

/// An event of one of the watches.
#[expect(clippy::large_enum_variant, reason = "they are taken out at once, and few wait")]
pub(super) enum WatchEvent {
    Claim(Event<PersistentVolumeClaim>),
    Class(Event<StorageClass>),
    Volume(Event<PersistentVolume>),
}

/// Progress of the three watches.
#[derive(Default)]
pub(super) struct WatchProgress {
    claims: ListProgress,
    classes: ListProgress,
    volumes: ListProgress,
}

/// Starts all three watches.
pub(super) fn watch(
    client: &Client,
    metrics: &Arc<ControllerMetrics>,
) -> RunningWatches<WatchEvent> {
    let mut watches = RunningWatches::new(metrics);
    watches.start(Api::all(client.clone()), "persistentvolumeclaims", WatchEvent::Claim);
    watches.start(Api::all(client.clone()), "storageclasses", WatchEvent::Class);
    watches.start(Api::all(client.clone()), "persistentvolumes", WatchEvent::Volume);
    watches
}

impl WatchProgress {
    /// Returns whether all objects were listed once. Before that, a missing object may only not
    /// have arrived yet.
    pub(super) fn is_whole(&self) -> bool {
        self.claims.is_whole() && self.classes.is_whole() && self.volumes.is_whole()
    }

    /// Applies an event. Returns whether a new plan may be needed.
    pub(super) fn take(&mut self, state: &mut ProvisionState, event: WatchEvent) -> bool {
        match event {
            WatchEvent::Claim(event) => self.claims.take(event, state),
            WatchEvent::Class(event) => self.classes.take(event, state),
            WatchEvent::Volume(event) => self.volumes.take(event, state),
        }
    }
}

/// Replaces the facts of an object; `None` removes them. Returns whether they have changed.
fn replace<F: PartialEq>(known: &mut BTreeMap<Arc<str>, F>, key: &str, facts: Option<F>) -> bool {
    match facts {
        None => known.remove(key).is_some(),
        Some(facts) if known.get(key) == Some(&facts) => false,
        Some(facts) => {
            known.insert(Arc::from(key), facts);
            true
        }
    }
}

impl WatchedObject<ProvisionState> for PersistentVolumeClaim {
    type Facts = ClaimFacts;

    fn known(state: &mut ProvisionState) -> &mut BTreeMap<Arc<str>, ClaimFacts> {
        &mut state.claims
    }

    fn put(&self, state: &mut ProvisionState) -> bool {
        let facts = state.claim(self);
        replace(&mut state.claims, &key_of(self).unwrap_or_default(), facts)
    }
}

impl WatchedObject<ProvisionState> for StorageClass {
    type Facts = ClassFacts;

    fn known(state: &mut ProvisionState) -> &mut BTreeMap<Arc<str>, ClassFacts> {
        &mut state.classes
    }

    fn put(&self, state: &mut ProvisionState) -> bool {
        let facts = state.class(self);
        replace(&mut state.classes, &key_of(self).unwrap_or_default(), facts)
    }
}

impl WatchedObject<ProvisionState> for PersistentVolume {
    type Facts = VolumeFacts;

    fn known(state: &mut ProvisionState) -> &mut BTreeMap<Arc<str>, VolumeFacts> {
        &mut state.volumes
    }

    fn put(&self, state: &mut ProvisionState) -> bool {
        let facts = state.volume(self);
        replace(&mut state.volumes, &key_of(self).unwrap_or_default(), facts)
    }
}
