//! Promises of space on the state directory's filesystem.
//!
//! A node that is full harms pods that never asked for us. So space is reserved
//! before the first byte of an artifact arrives, over all that is under way:
//! each blob claims what it will take, once, however many artifacts want it. A
//! claim is met by evicting, or refused at once. Writers look at the filesystem
//! besides ([`WriteMeter`](super::write_meter::WriteMeter)): an estimate may be wrong, and other
//! programs write there too.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;

use super::disk_space::{CacheOptions, DiskSpace};
use super::error::{Kind, Shortage, StoreError};
use super::gc::{GarbageCollector, Want};
use super::object_inventory::Inventory;
use super::space_amount::SpaceAmount;
pub use super::space_ledger::Claim;
use super::space_ledger::{Ledger, LedgerState, SpaceDemand};
use super::state_directory::StateDirectory;
use oci_types::Digest;

/// A promise of room; dropping it gives the rest back.
pub struct Reservation {
    ledger: Arc<Ledger>,
    /// Number of claims on each blob.
    claims: Mutex<HashMap<Digest, usize>>,
}

/// The space of a store's filesystem, and the promises of it.
pub struct SpaceReservations {
    pub(super) directory: Arc<StateDirectory>,
    pub(super) inventory: Arc<Inventory>,
    pub(super) ledger: Arc<Ledger>,
    pub(super) collector: Arc<GarbageCollector>,
}

impl SpaceReservations {
    /// Returns how much of the filesystem content may take.
    pub fn options(&self) -> &CacheOptions {
        &self.directory.cache
    }

    /// Reads how full the state directory's filesystem is.
    pub fn disk(&self) -> Result<DiskSpace, StoreError> {
        self.directory.disk_space()
    }

    /// Promises room, evicting what nothing needs when there is too little. Blocking.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoRoom`] with the numbers, when there is no room even so.
    pub fn reserve(&self, claims: &[Claim]) -> Result<Reservation, StoreError> {
        self.reserve_after(claims, &HashSet::new())
    }

    /// Promises room to a caller that has written all that was claimed for some blobs, whether it has
    /// its name by now or not: it shows on the disk, and had its room of the quota.
    ///
    /// # Errors
    ///
    /// As [`Self::reserve`].
    pub fn reserve_after(
        &self,
        claims: &[Claim],
        written: &HashSet<Digest>,
    ) -> Result<Reservation, StoreError> {
        // A claim that fits does not wait for the evictions of others.
        if self.try_claim(claims, written)?.is_some() {
            let turn = self.collector.collecting();
            // Evicting partial downloads of the same blobs would free nothing: they are continued.
            let own: HashSet<_> = claims.iter().map(|claim| claim.blob).collect();
            while let Some((shortage, goal)) = self.try_claim(claims, written)? {
                let shortage = self.collector.explain(shortage, &own, &turn)?;
                // Nothing is evicted for an artifact that will not fit even so.
                let collected = if shortage.is_hopeless() {
                    None
                } else {
                    Some(self.collector.collect_in_turn(&Want::Room(goal), &own, &turn)?)
                };
                if collected.is_none_or(|collected| collected.is_nothing()) {
                    return Err(StoreError::NoRoom(Box::new(shortage)));
                }
            }
        }
        let mut counts = HashMap::new();
        for claim in claims {
            *counts.entry(claim.blob).or_default() += 1;
        }
        Ok(Reservation { ledger: Arc::clone(&self.ledger), claims: Mutex::new(counts) })
    }

    /// Returns whether there is room for claims without evicting anything. Blocking.
    pub fn has_room_for(&self, claims: &[Claim]) -> Result<bool, StoreError> {
        self.load_usage()?;
        Ok(self.shortage(&self.ledger.lock(), claims, &HashSet::new())?.is_none())
    }

    /// Claims space if there is enough of it; returns what is missing otherwise. Decisions are made
    /// one at a time, over all claims.
    fn try_claim(
        &self,
        claims: &[Claim],
        written: &HashSet<Digest>,
    ) -> Result<Option<(Shortage, SpaceAmount)>, StoreError> {
        // Not under the lock, since the first call takes long.
        self.load_usage()?;
        let mut ledger = self.ledger.lock();
        let shortage = self.shortage(&ledger, claims, written)?;
        if shortage.is_none() {
            ledger.claim(claims);
        }
        Ok(shortage)
    }

    /// Reads the sizes of all content where there is a quota.
    fn load_usage(&self) -> Result<(), StoreError> {
        self.options().max_bytes.map_or(Ok(()), |_| self.inventory.load())
    }

    /// Returns the most bytes that content can have here, if nothing else takes any.
    pub fn capacity(&self) -> Result<u64, StoreError> {
        let (room, options) = (self.disk()?, self.options());
        let bytes = room.total_bytes.saturating_sub(room.floor(options).bytes);
        Ok(options.max_bytes.map_or(bytes, |max| bytes.min(max)))
    }

    /// Returns the shortage for these claims beside all others, and the space to free for them.
    fn shortage(
        &self,
        ledger: &LedgerState,
        claims: &[Claim],
        written: &HashSet<Digest>,
    ) -> Result<Option<(Shortage, SpaceAmount)>, StoreError> {
        let options = self.options();
        let SpaceDemand { needed, others, quota } = ledger.demand(claims, written);
        // Nothing to write asks for no room, however full the disk is.
        if needed.is_nothing() {
            return Ok(None);
        }
        let room = self.disk()?;
        let floor = room.floor(options);
        let missing = room.missing_until(floor.plus(others).plus(needed));
        let shortage = |kind, of: fn(SpaceAmount) -> u64, missing, free| Shortage {
            kind,
            needed: of(needed),
            promised: of(others),
            missing,
            free,
            floor: of(floor),
            evictable: 0,
            pinned: 0,
        };
        if missing.bytes > 0 {
            let of = |goal: SpaceAmount| goal.bytes;
            let shortage = shortage(Kind::Bytes, of, missing.bytes, room.free_bytes);
            return Ok(Some((shortage, missing)));
        }
        if missing.inodes > 0 {
            let of = |goal: SpaceAmount| goal.inodes;
            let shortage = shortage(Kind::Inodes, of, missing.inodes, room.free_inodes);
            return Ok(Some((shortage, missing)));
        }
        let Some(max) = options.max_bytes else { return Ok(None) };
        let used = self
            .directory
            .catalog
            .usage(self.directory.units.record())
            .bytes
            .saturating_add(ledger.unclaimed().bytes);
        let over = used.saturating_add(quota).saturating_sub(max);
        if over == 0 {
            return Ok(None);
        }
        let shortage = shortage(Kind::Quota, |goal| goal.bytes, over, max.saturating_sub(used));
        Ok(Some((shortage, SpaceAmount { bytes: over, inodes: 0 })))
    }
}

impl Reservation {
    /// A blob's content has its name: what it took shows on the disk itself now.
    pub fn done(&self, blob: Digest) {
        let mut claims = self.claims.lock();
        let Some(count) = claims.get_mut(&blob) else { return };
        *count -= 1;
        if *count == 0 {
            claims.remove(&blob);
        }
        drop(claims);
        self.ledger.release(blob);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let claims = self.claims.get_mut();
        for (blob, count) in claims.drain() {
            for _ in 0..count {
                self.ledger.release(blob);
            }
        }
    }
}
