//! What is kept on the node for preloads, and what is not any more.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::sync::Mutex;

use oci::{Digest, Platform, Reference};
use preload::api::{QUOTA_EXCEEDED, WantedArtifact};
use store::{PinShare, Store, StoreError, Tree};

/// In front of `namespace/name` of the preload that owns a pin.
const OWNER: &str = "preload/";

/// The pins of preloads. Clones share what is wanted.
#[derive(Clone)]
pub(super) struct Pins {
    store: Store,
    /// Held while pins are made and taken away, so that a pull that ends late pins nothing that is not wanted any more.
    wanted: Arc<Mutex<WantedPins>>,
}

/// What is to be kept.
#[derive(Default)]
struct WantedPins {
    /// Owner and reference of each.
    pins: HashSet<(String, String)>,
    /// Bytes that pins of one namespace may hold together.
    bytes_per_namespace: Option<u64>,
}

/// Why something is not pinned.
pub(super) struct PinFailure {
    /// In one word.
    pub(super) reason: &'static str,
    /// For people.
    pub(super) message: String,
}

impl PinFailure {
    fn new(reason: &'static str, message: &(impl std::fmt::Display + ?Sized)) -> Self {
        Self { reason, message: message.to_string() }
    }
}

impl Pins {
    pub(super) fn new(store: Store) -> Self {
        Self { store, wanted: Arc::default() }
    }

    /// Takes away what is not among these, and bounds what pins of one namespace may hold from now on.
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
            store.pin_within(&reference, &platform, manifest, &owner, share).map(|_| ())
        };
        // The guard is held until it is written.
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

    /// Returns the manifest that is pinned for this preload, where it is here.
    pub(super) async fn holds(&self, preload: &str, reference: &Reference) -> Option<Digest> {
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
            trees.iter().any(whole).then_some(pin.manifest)
        };
        tokio::task::spawn_blocking(look).await.ok().flatten()
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
