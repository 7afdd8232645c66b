//! What must stay: `pins/<hash of reference, platform and owner>.json`.
//!
//! A pin holds what a reference meant for a platform when it was pinned, for an
//! owner: `admin`, `config`, `preload/<namespace>/<name>`. One owner's going leaves
//! another's pin. Pinned content is never evicted.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::eviction::Goal;
use super::gc::Now;
use super::record_index::RecordTarget;
use super::{Store, keys, records};
use oci_types::{Digest, Platform, Reference};

/// A reference that stays on the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The reference as it was pinned.
    pub reference: String,
    /// The platform that it was resolved for.
    pub platform: String,
    /// What it meant.
    pub manifest: Digest,
    /// Who wants it.
    pub owner: String,
    /// Seconds since 1970.
    pub since: i64,
}

/// A bound on what the pins of some owners hold together, beside the bound on all pins.
#[derive(Clone, Copy, Debug)]
pub struct PinShare<'a> {
    /// The beginning of these owners' names.
    pub owner_prefix: &'a str,
    /// What a message calls them.
    pub owners: &'a str,
    /// Bytes.
    pub max_bytes: u64,
}

impl Store {
    /// Pins what a reference means. Pinned again, an owner's pin moves to the new meaning.
    ///
    /// # Errors
    ///
    /// [`StoreError::TooMuchPinned`] when pins would hold more than they may.
    pub fn pin(
        &self,
        reference: &Reference,
        platform: &Platform,
        manifest: Digest,
        owner: &str,
    ) -> Result<Pin, StoreError> {
        self.pin_within(reference, platform, manifest, owner, None)
    }

    /// Pins as [`Self::pin`] does, within a share of its owner.
    ///
    /// # Errors
    ///
    /// As [`Self::pin`], and [`StoreError::PinShareExceeded`] when pins of these owners would hold more than they may.
    pub fn pin_within(
        &self,
        reference: &Reference,
        platform: &Platform,
        manifest: Digest,
        owner: &str,
        share: Option<PinShare<'_>>,
    ) -> Result<Pin, StoreError> {
        // Pins are counted one at a time, and nothing goes meanwhile.
        let _turn = self.collecting();
        let now = Now::read();
        let path = self.pin_path(&reference.to_string(), &platform.to_string(), owner);
        self.load_catalog()?;
        // None where this one is pinned already: it takes nothing more.
        let wanted_with = |mut pinned: HashSet<Digest>| {
            let is_new = pinned.insert(manifest);
            is_new.then(|| self.catalog().space_of_manifests(&pinned).bytes)
        };
        let max = self.cache_options().pinned_bytes_limit(&self.room()?);
        if let Some(wanted) = wanted_with(self.catalog().pinned())
            && wanted > max
        {
            return Err(StoreError::TooMuchPinned { wanted, max });
        }
        if let Some(PinShare { owner_prefix, owners, max_bytes: max }) = share {
            let pins = self.pins()?;
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
        records::write_durable(&self.staging(), &path, &pin)?;
        self.index_pin(&path, &pin);
        Ok(pin)
    }

    /// Takes an owner's pins of a reference away, for one platform or for all; says which.
    pub fn unpin(
        &self,
        reference: &Reference,
        platform: Option<&Platform>,
        owner: &str,
    ) -> Result<Vec<Pin>, StoreError> {
        let (reference, platform) = (reference.to_string(), platform.map(ToString::to_string));
        let matching = |pin: &Pin| {
            pin.owner == owner && platform.as_ref().is_none_or(|platform| *platform == pin.platform)
        };
        let pins: Vec<_> =
            self.pins_of_reference(&reference).into_iter().filter(matching).collect();
        for pin in &pins {
            self.drop_pin(pin)?;
        }
        Ok(pins)
    }

    /// Takes one pin away.
    pub fn drop_pin(&self, pin: &Pin) -> Result<(), StoreError> {
        let path = self.pin_path(&pin.reference, &pin.platform, &pin.owner);
        records::remove(&path)?;
        self.catalog().unpin(&path);
        self.pin_index().remove(&path);
        Ok(())
    }

    /// Returns the pins of a reference as it was pinned, for every platform and owner.
    #[must_use]
    pub fn pins_of_reference(&self, reference: &str) -> Vec<Pin> {
        let records = self.pin_index().of_reference(reference);
        let pins = records.iter().filter_map(|record| records::read::<Pin>(record));
        pins.filter(|pin| pin.reference == reference).collect()
    }

    /// Returns the pins that hold a manifest.
    #[must_use]
    pub fn pins_of_manifest(&self, manifest: Digest) -> Vec<Pin> {
        let records = self.pin_index().of_manifest(manifest);
        let pins = records.iter().filter_map(|record| records::read::<Pin>(record));
        pins.filter(|pin| pin.manifest == manifest).collect()
    }

    /// Returns the disk space of all pinned content.
    ///
    /// # Errors
    ///
    /// Those of reading the sizes, at the first call.
    pub fn pinned_takes(&self) -> Result<Goal, StoreError> {
        self.load_catalog()?;
        Ok(self.catalog().space_of_manifests(&self.catalog().pinned()))
    }

    fn index_pin(&self, path: &Path, pin: &Pin) {
        self.catalog().pin(path, pin.manifest);
        let target = RecordTarget { manifest: pin.manifest, index: None };
        self.pin_index().insert(path, &pin.reference, target);
    }

    /// An owner's pin of a reference for a platform.
    #[must_use]
    pub fn pin_of(&self, reference: &Reference, platform: &Platform, owner: &str) -> Option<Pin> {
        records::read(&self.pin_path(&reference.to_string(), &platform.to_string(), owner))
    }

    /// All readable pins.
    pub fn pins(&self) -> Result<Vec<Pin>, StoreError> {
        Ok(records::list(&self.path("pins"))?.into_iter().map(|(_, pin)| pin).collect())
    }

    /// Tells the catalog what the records say.
    pub(super) fn load_pins(&self) -> Result<(), StoreError> {
        for (path, pin) in records::list::<Pin>(&self.path("pins"))? {
            self.index_pin(&path, &pin);
        }
        Ok(())
    }

    fn pin_path(&self, reference: &str, platform: &str, owner: &str) -> PathBuf {
        let key = keys::hash(&[reference, platform, owner]);
        self.path("pins").join(records::name(key))
    }
}
