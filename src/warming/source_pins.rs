//! The pins of one source of references.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use oci::{Digest, Platform, Reference};
use store::pin_records::Pin;
use store::{PinShare, Store, StoreError};

/// The pins of one source. Clones share the wanted pins. Methods block.
#[derive(Clone)]
pub struct SourcePins {
    store: Store,
    /// The beginning of the names of their owners.
    owners: &'static str,
    /// Held while pins are added and removed, so that a late pull pins nothing that is no longer wanted.
    wanted: Arc<Mutex<WantedPins>>,
}

/// The pins that a source wants.
#[derive(Clone, Default)]
pub struct WantedPins {
    /// The owner and reference of each pin.
    pub pins: HashSet<(String, String)>,
    /// The most bytes that the pins of one namespace may hold together. Their owners are `<kind>/<namespace>/<name>`.
    pub bytes_per_namespace: Option<u64>,
}

impl WantedPins {
    fn contains(&self, owner: &str, reference: &Reference) -> bool {
        self.pins.contains(&(owner.to_owned(), reference.to_string()))
    }
}

impl SourcePins {
    /// Returns the pins of the owners whose names begin with `owners`. None is wanted yet.
    pub fn new(store: Store, owners: &'static str) -> Self {
        Self { store, owners, wanted: Arc::default() }
    }

    /// Sets the wanted pins, and removes the others of the source. A pin of a tag's manifest is kept for the tag. Returns
    /// these manifests.
    pub fn keep(&self, wanted: WantedPins) -> HashMap<Reference, Digest> {
        let mut known = self.wanted();
        *known = wanted;
        let mut of_tags = HashMap::new();
        let swept = self.store.pins().list().and_then(|pins| {
            for pin in pins.iter().filter(|pin| pin.owner.starts_with(self.owners)) {
                let reference = pin.reference.parse::<Reference>().ok();
                let is_wanted = |reference: &Reference| known.contains(&pin.owner, reference);
                if reference.as_ref().is_some_and(is_wanted) {
                    continue;
                }
                match reference.map(|reference| reference.floating()).filter(is_wanted) {
                    Some(tag) if !of_tags.contains_key(&tag) => {
                        of_tags.insert(tag, pin.manifest);
                    }
                    _ => self.remove(pin)?,
                }
            }
            Ok(())
        });
        if let Err(error) = swept {
            tracing::warn!(%error, owners = self.owners, "pins cannot be taken away");
        }
        of_tags
    }

    /// Pins a manifest for a wanted reference: under its name, or under that of the manifest of its tag. Writes nothing
    /// if it is pinned already, or no longer wanted.
    pub fn add(&self, owner: &str, name: &Reference, manifest: Digest) -> Result<(), StoreError> {
        let (wanted, platform) = (self.wanted(), Platform::of_this_node());
        let is_wanted = wanted.contains(owner, name) || wanted.contains(owner, &name.floating());
        let held = self.store.pins().get(name, &platform, owner);
        if !is_wanted || held.is_some_and(|held| held.manifest == manifest) {
            return Ok(());
        }
        let namespace = owner.split('/').nth(1).unwrap_or_default();
        let owner_prefix = format!("{}{namespace}/", self.owners);
        let owners = format!("the preloads of the namespace {namespace}");
        let share = wanted.bytes_per_namespace.map(|max_bytes| PinShare {
            owner_prefix: &owner_prefix,
            owners: &owners,
            max_bytes,
        });
        self.store.pins().add_within(name, &platform, manifest, owner, share).map(|_| ())
    }

    /// Removes the pin of a manifest that its tag no longer resolves to, unless it is wanted for itself.
    pub fn remove_stale(&self, owner: &str, name: &Reference) -> Result<(), StoreError> {
        let wanted = self.wanted();
        match self.store.pins().get(name, &Platform::of_this_node(), owner) {
            Some(pin) if !wanted.contains(owner, name) => self.remove(&pin),
            _ => Ok(()),
        }
    }

    fn remove(&self, pin: &Pin) -> Result<(), StoreError> {
        self.store.pins().remove(pin)?;
        let Pin { reference, manifest, owner, .. } = pin;
        tracing::info!(reference, digest = %manifest, owner, "no longer pinned");
        Ok(())
    }

    fn wanted(&self) -> MutexGuard<'_, WantedPins> {
        self.wanted.lock()
    }
}
