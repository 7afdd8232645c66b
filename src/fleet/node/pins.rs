//! What is kept on the node for preloads, and what is not any more.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::sync::Mutex;

use crate::fleet::api::WantedArtifact;
use crate::oci::{Platform, Reference};
use crate::store::{Store, StoreError, Tree};

/// In front of `namespace/name` of the preload that owns a pin.
const OWNER: &str = "preload/";

/// The pins of preloads. Clones share what is wanted.
#[derive(Clone)]
pub(super) struct Pins {
    store: Store,
    /// Owner and reference of what is to be kept. Held while pins are made and taken away, so that a pull that ends
    /// late pins nothing that is not wanted any more.
    wanted: Arc<Mutex<HashSet<(String, String)>>>,
}

impl Pins {
    pub(super) fn new(store: Store) -> Self {
        Self { store, wanted: Arc::default() }
    }

    /// Takes away what is not among these.
    pub(super) async fn keep(&self, wanted: impl Iterator<Item = &WantedArtifact>) {
        let pinned = wanted.filter(|wanted| wanted.pin);
        let of = |wanted: &WantedArtifact| {
            let reference = wanted.reference.parse::<Reference>().ok()?;
            Some((owner(&wanted.preload), reference.to_string()))
        };
        let mut known = self.wanted.lock().await;
        *known = pinned.filter_map(of).collect();
        let (store, kept) = (self.store.clone(), known.clone());
        let taken = move || {
            take_away(&store, |owner, reference| {
                !kept.contains(&(owner.to_owned(), reference.to_owned()))
            })
        };
        match tokio::task::spawn_blocking(taken).await {
            Ok(Ok(0)) => {}
            Ok(Ok(count)) => tracing::info!(count, "pins of preloads that are over are taken away"),
            Ok(Err(error)) => tracing::warn!(%error, "pins of preloads cannot be taken away"),
            Err(error) => tracing::warn!(%error, "pins of preloads cannot be taken away"),
        }
    }

    /// Pins what a reference has led to, if it is still wanted.
    pub(super) async fn pin(
        &self,
        preload: &str,
        reference: &Reference,
        tree: &Tree,
    ) -> Result<(), String> {
        let known = self.wanted.lock().await;
        let owner = owner(preload);
        if !known.contains(&(owner.clone(), reference.to_string())) {
            return Ok(());
        }
        let (store, reference, manifest) =
            (self.store.clone(), reference.clone(), tree.record.manifest);
        let pin =
            move || store.pin(&reference, &Platform::of_this_node(), manifest, &owner).map(|_| ());
        // The guard is held until it is written.
        match tokio::task::spawn_blocking(pin).await {
            Ok(pinned) => pinned.map_err(|error| error.to_string()),
            Err(_) => Err("pinning failed internally".to_owned()),
        }
    }

    /// Whether it is pinned for this preload, and there.
    pub(super) async fn holds(&self, preload: &str, reference: &Reference) -> bool {
        let (store, owner, reference) = (self.store.clone(), owner(preload), reference.clone());
        let look = move || {
            let pin = store.pin_of(&reference, &Platform::of_this_node(), &owner)?;
            let trees = store.sound_trees().ok()?;
            // A pod's part of it is not all of it.
            let whole = |tree: &Tree| {
                let view = &tree.record.view;
                tree.record.manifest == pin.manifest
                    && view.include.is_empty()
                    && view.exclude.is_empty()
            };
            trees.iter().any(whole).then_some(())
        };
        tokio::task::spawn_blocking(look).await.ok().flatten().is_some()
    }
}

fn owner(preload: &str) -> String {
    format!("{OWNER}{preload}")
}

/// Takes away the pins of all preloads: nobody looks after them any more on this node.
///
/// # Errors
///
/// The store's. Blocking.
pub fn release_all(store: &Store) -> Result<usize, StoreError> {
    take_away(store, |_, _| true)
}

/// Takes away those pins of preloads whose owner and reference are over.
fn take_away(store: &Store, is_over: impl Fn(&str, &str) -> bool) -> Result<usize, StoreError> {
    let mut count = 0;
    for pin in store.pins()? {
        if pin.owner.starts_with(OWNER) && is_over(&pin.owner, &pin.reference) {
            store.drop_pin(&pin)?;
            count += 1;
        }
    }
    Ok(count)
}
