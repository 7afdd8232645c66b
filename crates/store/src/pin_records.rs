//! Pins, which keep content in the store: `pins/<hash of reference, platform and owner>.json`.
//!
//! A pin holds what a reference meant for a platform when it was pinned, for an
//! owner: `admin`, `config`, `preload/<namespace>/<name>`. One owner's going leaves
//! another's pin. Pinned content is never evicted.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::gc::{GarbageCollector, Now};
use super::object_inventory::Inventory;
use super::record_index::{RecordIndex, RecordTarget};
use super::state_directory::StateDirectory;
use super::{json_records, object_keys};
use oci_types::{Digest, Platform, Reference};

/// Below the state directory.
pub(super) const FOLDER: &str = "pins";

/// A reference that stays on the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The reference as it was pinned.
    pub reference: String,
    /// The platform that it was resolved for.
    pub platform: String,
    /// The manifest that the reference meant.
    pub manifest: Digest,
    /// The owner of the pin.
    pub owner: String,
    /// Seconds since 1970.
    pub since: i64,
}

/// A bound on what the pins of some owners hold together, beside the bound on all pins.
#[derive(Clone, Copy, Debug)]
pub struct PinShare<'a> {
    /// The beginning of these owners' names.
    pub owner_prefix: &'a str,
    /// The owners as a message names them.
    pub owners: &'a str,
    /// The limit in bytes.
    pub max_bytes: u64,
}

/// The pins of a store.
pub struct Pins {
    directory: Arc<StateDirectory>,
    inventory: Arc<Inventory>,
    collector: Arc<GarbageCollector>,
    index: RecordIndex,
}

impl Pins {
    /// Reads the pins of earlier processes into the catalog.
    pub(super) fn open(
        directory: Arc<StateDirectory>,
        inventory: Arc<Inventory>,
        collector: Arc<GarbageCollector>,
    ) -> Result<Self, StoreError> {
        let pins = Self { directory, inventory, collector, index: RecordIndex::default() };
        for (path, pin) in json_records::list::<Pin>(&pins.directory.path(FOLDER))? {
            pins.index(&path, &pin);
        }
        Ok(pins)
    }

    /// Pins what a reference means. Pinned again, an owner's pin moves to the new meaning.
    ///
    /// # Errors
    ///
    /// [`StoreError::TooMuchPinned`] when pins would hold more than they may.
    pub fn add(
        &self,
        reference: &Reference,
        platform: &Platform,
        manifest: Digest,
        owner: &str,
    ) -> Result<Pin, StoreError> {
        self.add_within(reference, platform, manifest, owner, None)
    }

    /// Pins as [`Self::add`] does, within a share of its owner.
    ///
    /// # Errors
    ///
    /// As [`Self::add`], and [`StoreError::PinShareExceeded`] when pins of these owners would hold more than they may.
    pub fn add_within(
        &self,
        reference: &Reference,
        platform: &Platform,
        manifest: Digest,
        owner: &str,
        share: Option<PinShare<'_>>,
    ) -> Result<Pin, StoreError> {
        // Pins are counted one at a time, and nothing goes meanwhile.
        let _turn = self.collector.collecting();
        let now = Now::read();
        let path = self.record_path(&reference.to_string(), &platform.to_string(), owner);
        let catalog = self.inventory.catalog()?;
        // None where this one is pinned already: it takes nothing more.
        let wanted_with = |mut pinned: HashSet<Digest>| {
            let is_new = pinned.insert(manifest);
            is_new.then(|| catalog.space_of_manifests(&pinned).bytes)
        };
        let max = self.directory.cache.pinned_bytes_limit(&self.directory.disk_space()?);
        if let Some(wanted) = wanted_with(catalog.pinned())
            && wanted > max
        {
            return Err(StoreError::TooMuchPinned { wanted, max });
        }
        if let Some(PinShare { owner_prefix, owners, max_bytes: max }) = share {
            let pins = self.list()?;
            let own = pins.iter().filter(|pin| pin.owner.starts_with(owner_prefix));
            if let Some(wanted) = wanted_with(own.map(|pin| pin.manifest).collect())
                && wanted > max
            {
                return Err(StoreError::PinShareExceeded { owners: owners.into(), wanted, max });
            }
        }
        let pin = Pin {
            reference: reference.to_string(),
            platform: platform.to_string(),
            manifest,
            owner: owner.to_owned(),
            since: now.unix_seconds,
        };
        json_records::write_durable(&self.directory.staging(), &path, &pin)?;
        self.index(&path, &pin);
        Ok(pin)
    }

    /// Takes an owner's pins of a reference away, for one platform or for all; says which.
    pub fn remove_all(
        &self,
        reference: &Reference,
        platform: Option<&Platform>,
        owner: &str,
    ) -> Result<Vec<Pin>, StoreError> {
        let (reference, platform) = (reference.to_string(), platform.map(ToString::to_string));
        let matching = |pin: &Pin| {
            pin.owner == owner && platform.as_ref().is_none_or(|platform| *platform == pin.platform)
        };
        let pins: Vec<_> = self.of_reference(&reference).into_iter().filter(matching).collect();
        for pin in &pins {
            self.remove(pin)?;
        }
        Ok(pins)
    }

    /// Takes one pin away.
    pub fn remove(&self, pin: &Pin) -> Result<(), StoreError> {
        let path = self.record_path(&pin.reference, &pin.platform, &pin.owner);
        json_records::remove(&path)?;
        self.directory.catalog.unpin(&path);
        self.index.remove(&path);
        Ok(())
    }

    /// Returns the pins of a reference as it was pinned, for every platform and owner.
    pub fn of_reference(&self, reference: &str) -> Vec<Pin> {
        let records = self.index.of_reference(reference);
        let pins = records.iter().filter_map(|record| json_records::read::<Pin>(record));
        pins.filter(|pin| pin.reference == reference).collect()
    }

    /// Returns the pins that hold a manifest.
    pub fn of_manifest(&self, manifest: Digest) -> Vec<Pin> {
        let records = self.index.of_manifest(manifest);
        let pins = records.iter().filter_map(|record| json_records::read::<Pin>(record));
        pins.filter(|pin| pin.manifest == manifest).collect()
    }

    fn index(&self, path: &Path, pin: &Pin) {
        self.directory.catalog.pin(path, pin.manifest);
        let target = RecordTarget { manifest: pin.manifest, index: None };
        self.index.insert(path, &pin.reference, target);
    }

    /// An owner's pin of a reference for a platform.
    pub fn get(&self, reference: &Reference, platform: &Platform, owner: &str) -> Option<Pin> {
        json_records::read(&self.record_path(&reference.to_string(), &platform.to_string(), owner))
    }

    /// All readable pins.
    pub fn list(&self) -> Result<Vec<Pin>, StoreError> {
        Ok(json_records::list(&self.directory.path(FOLDER))?
            .into_iter()
            .map(|(_, pin)| pin)
            .collect())
    }

    fn record_path(&self, reference: &str, platform: &str, owner: &str) -> PathBuf {
        let key = object_keys::hash(&[reference, platform, owner]);
        self.directory.path(FOLDER).join(json_records::name(key))
    }
}
