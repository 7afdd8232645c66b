//! The pins of preloads on this node.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::sync::Mutex;

use oci::{Digest, Platform, Reference};
use preload::api::{QUOTA_EXCEEDED, WantedArtifact};
use store::{PinShare, Store, StoreError, Tree};

/// The prefix of a pin's owner, before the preload's `namespace/name`.
const OWNER: &str = "preload/";

/// The pins of preloads. Clones share the wanted pins.
#[derive(Clone)]
pub(super) struct PreloadPins {
    store: Store,
    /// Held while pins are added and removed, so that a late pull pins nothing that is no longer wanted.
    wanted: Arc<Mutex<WantedPins>>,
}

/// The pins that the assignments ask for.
#[derive(Default)]
struct WantedPins {
    /// The owner and reference of each pin.
    pins: HashSet<(String, String)>,
    /// The most bytes that the pins of one namespace may hold together.
    bytes_per_namespace: Option<u64>,
}

/// A failure to pin.
pub(super) struct PinFailure {
    /// The reason, as one word.
    pub(super) reason: &'static str,
    /// The message for users.
    pub(super) message: String,
}

impl PinFailure {
    fn new(reason: &'static str, message: &(impl std::fmt::Display + ?Sized)) -> Self {
        Self { reason, message: message.to_string() }
    }
}

impl PreloadPins {
    pub(super) fn new(store: Store) -> Self {
        Self { store, wanted: Arc::default() }
    }

    /// Sets the wanted pins and the limit for each namespace, and removes the pins that are no longer wanted.
    pub(super) async fn keep(
        &self,
        wanted: impl Iterator<Item = &WantedArtifact>,
        bytes_per_namespace: Option<u64>,
    ) {
        let pinned = wanted.filter(|wanted| wanted.pin);
        let of = |wanted: &WantedArtifact| {
            let reference = wanted.reference.parse::<Reference>().ok()?;
            Some((owner(&wanted.preload), reference.to_string()))
        };
        let mut known = self.wanted.lock().await;
        *known = WantedPins { pins: pinned.filter_map(of).collect(), bytes_per_namespace };
        let (store, kept) = (self.store.clone(), known.pins.clone());
        let remove = move || {
            remove_pins(&store, |owner, reference| {
                !kept.contains(&(owner.to_owned(), reference.to_owned()))
            })
        };
        match tokio::task::spawn_blocking(remove).await {
            Ok(Ok(0)) => {}
            Ok(Ok(count)) => tracing::info!(count, "pins of preloads that are over are taken away"),
            Ok(Err(error)) => tracing::warn!(%error, "pins of preloads cannot be taken away"),
            Err(error) => tracing::warn!(%error, "pins of preloads cannot be taken away"),
        }
    }

    /// Pins the tree of a reference, if the pin is still wanted.
    pub(super) async fn pin(
        &self,
        preload: &str,
        reference: &Reference,
        tree: &Tree,
    ) -> Result<(), PinFailure> {
        let known = self.wanted.lock().await;
        let owner = owner(preload);
        if !known.pins.contains(&(owner.clone(), reference.to_string())) {
            return Ok(());
        }
        let (store, reference, manifest) =
            (self.store.clone(), reference.clone(), tree.record.manifest);
        let namespace = preload.split('/').next().unwrap_or_default().to_owned();
        let bound = known.bytes_per_namespace;
        let pin = move || {
            let owner_prefix = format!("{OWNER}{namespace}/");
            let owners = format!("the preloads of the namespace {namespace}");
            let share = bound.map(|max_bytes| PinShare {
                owner_prefix: &owner_prefix,
                owners: &owners,
                max_bytes,
            });
            let platform = Platform::of_this_node();
            store.pins().add_within(&reference, &platform, manifest, &owner, share).map(|_| ())
        };
        // The lock is held until the pin is written.
        match tokio::task::spawn_blocking(pin).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error @ StoreError::PinShareExceeded { .. })) => {
                let message = format!(
                    "{error}: delete some, or have controller.maxPinnedBytesPerNamespace of the chart raised"
                );
                Err(PinFailure::new(QUOTA_EXCEEDED, &message))
            }
            Ok(Err(error)) => Err(PinFailure::new("NotPinned", &error)),
            Err(_) => Err(PinFailure::new("NotPinned", "pinning failed internally")),
        }
    }

    /// Returns the manifest that is pinned for this preload, if the node has its whole tree.
    pub(super) async fn holds(&self, preload: &str, reference: &Reference) -> Option<Digest> {
        let (store, owner, reference) = (self.store.clone(), owner(preload), reference.clone());
        let find = move || {
            let pin = store.pins().get(&reference, &Platform::of_this_node(), &owner)?;
            let trees = store.inventory().sound_trees().ok()?;
            // A tree with patterns has only a part of the artifact.
            let whole = |tree: &Tree| {
                let view = &tree.record.view;
                tree.record.manifest == pin.manifest
                    && view.include.is_empty()
                    && view.exclude.is_empty()
            };
            trees.iter().any(whole).then_some(pin.manifest)
        };
        tokio::task::spawn_blocking(find).await.ok().flatten()
    }
}

fn owner(preload: &str) -> String {
    format!("{OWNER}{preload}")
}

/// Removes the pins of all preloads, for a node where preloads are off. Blocking.
///
/// # Errors
///
/// Errors of the store.
pub fn release_all(store: &Store) -> Result<usize, StoreError> {
    remove_pins(store, |_, _| true)
}

/// Removes the pins of preloads whose owner and reference are over. Returns their number.
fn remove_pins(store: &Store, is_over: impl Fn(&str, &str) -> bool) -> Result<usize, StoreError> {
    let mut count = 0;
    for pin in store.pins().list()? {
        if pin.owner.starts_with(OWNER) && is_over(&pin.owner, &pin.reference) {
            store.pins().remove(&pin)?;
            count += 1;
        }
    }
    Ok(count)
}
