//! Room on the state directory's filesystem: how much there is, and who has
//! been promised some.
//!
//! A node that is full harms pods that never asked for us. So room is reserved
//! before the first byte of an artifact arrives, over all that is under way:
//! each blob claims what it will take, once, however many artifacts want it. A
//! claim is met by evicting, or refused at once. Writers look at the filesystem
//! besides ([`Meter`]): an estimate may be wrong, and others write there too.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::error::{Kind, Shortage, StoreError};
use super::eviction::Goal;
use super::gc::Want;
use super::inventory::{BYTES_PER_INODE, FOLDERS_OF_A_FILE, RECORDS_OF_A_TREE};
use super::ledger::{Ledger, LedgerState, SpaceDemand};
use super::{Store, TreeKey};
use oci_types::Digest;
use unpack::merge::TreePlan;

/// The most that writers take between two looks at the filesystem, which other programs write to.
const MOST_UNSEEN: Goal = Goal { bytes: 4 << 20, inodes: 1024 };

/// How much of the filesystem the cache may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheOptions {
    /// Bytes of all content; none means as much as the filesystem allows.
    pub max_bytes: Option<u64>,
    /// Above this part of the filesystem in use, by whomever, content is evicted ...
    pub high_threshold_percent: u8,
    /// ... until no more than this part is.
    pub low_threshold_percent: u8,
    /// This part of the filesystem stays free.
    pub min_free_percent: u8,
    /// ... and this part of its inodes.
    pub min_free_inodes_percent: u8,
    /// Bytes that pins may hold together; none means half of what content may take.
    pub max_pinned_bytes: Option<u64>,
    /// How long content stays after its last publish or unpublish.
    pub minimum_age: std::time::Duration,
    /// The state directory must be a mount point: a disk that is mounted late would else be
    /// filled behind its back.
    pub require_mountpoint: bool,
}

/// Room as a process without privileges could use it, counted as `df` does: what is
/// reserved for root is neither used nor free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// What is left.
    pub free_bytes: u64,
    /// What is used or left.
    pub total_bytes: u64,
    /// Inodes that are left.
    pub free_inodes: u64,
    /// Inodes that there are; 0 where the filesystem makes them as needed.
    pub total_inodes: u64,
}

/// What one blob, or a tree, will take on the disk until its content has a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The blob; of a tree its key.
    pub blob: Digest,
    /// Bytes, those of its download and those that it unpacks to.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// A promise of room; dropping it gives the rest back.
#[derive(Debug)]
pub struct Reservation {
    ledger: Arc<Ledger>,
    /// Number of claims on each blob.
    claims: Mutex<HashMap<Digest, usize>>,
}

/// Keeps writers above the floor. All writers of a store share one meter, so that together they
/// never take more than what was free above the floor when the meter last looked.
#[derive(Debug)]
pub struct Meter {
    root: PathBuf,
    options: CacheOptions,
    /// Bytes and inodes that may be taken before the next look at the filesystem.
    left: Mutex<Goal>,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self {
            max_bytes: None,
            // The kubelet evicts images at 85 and pods at 90 (or 85) percent: we go first.
            high_threshold_percent: 75,
            low_threshold_percent: 65,
            min_free_percent: 20,
            min_free_inodes_percent: 10,
            max_pinned_bytes: None,
            minimum_age: std::time::Duration::from_mins(2),
            require_mountpoint: false,
        }
    }
}

impl CacheOptions {
    /// Returns the bytes that pins may hold together on a filesystem of this size.
    ///
    /// The default is half of `max_bytes`, or of the filesystem up to the low threshold, whichever is less: pins are
    /// never evicted, so the other half is left for what pods use.
    #[must_use]
    pub fn pinned_bytes_limit(&self, room: &Room) -> u64 {
        self.max_pinned_bytes.unwrap_or_else(|| {
            let filesystem = percent(room.total_bytes, self.low_threshold_percent);
            self.max_bytes.map_or(filesystem, |max| max.min(filesystem)) / 2
        })
    }
}

impl Room {
    /// How full the filesystem is that a folder lies on.
    pub fn of(folder: &Path) -> Result<Self, StoreError> {
        let status = nix::sys::statvfs::statvfs(folder)
            .map_err(|error| StoreError::io("look at", folder, error.into()))?;
        let bytes = |blocks: u64| blocks.saturating_mul(status.fragment_size());
        Ok(Self {
            free_bytes: bytes(status.blocks_available()),
            total_bytes: bytes(
                status.blocks().saturating_sub(status.blocks_free()) + status.blocks_available(),
            ),
            free_inodes: status.files_available(),
            total_inodes: status.files(),
        })
    }

    /// What stays free by these options.
    #[must_use]
    pub fn floor(&self, options: &CacheOptions) -> Goal {
        Goal {
            bytes: percent(self.total_bytes, options.min_free_percent),
            inodes: percent(self.total_inodes, options.min_free_inodes_percent),
        }
    }

    /// How much is missing until so much is free.
    #[must_use]
    pub fn missing_until(&self, wanted: Goal) -> Goal {
        let inodes = match self.total_inodes {
            0 => 0,
            _ => wanted.inodes.saturating_sub(self.free_inodes),
        };
        Goal { bytes: wanted.bytes.saturating_sub(self.free_bytes), inodes }
    }

    /// Returns how much more is free than this.
    fn above(&self, kept: Goal) -> Goal {
        let inodes = match self.total_inodes {
            0 => u64::MAX,
            _ => self.free_inodes,
        };
        Goal { bytes: self.free_bytes, inodes }.less(kept)
    }

    /// How much is to be freed once the high threshold is passed: down to the low one.
    #[must_use]
    pub fn above_threshold(&self, options: &CacheOptions) -> u64 {
        let used = self.total_bytes.saturating_sub(self.free_bytes);
        if used <= percent(self.total_bytes, options.high_threshold_percent) {
            return 0;
        }
        used - percent(self.total_bytes, options.low_threshold_percent)
    }
}

impl Store {
    /// How full the state directory's filesystem is.
    pub fn room(&self) -> Result<Room, StoreError> {
        Room::of(self.root())
    }

    /// Promises room, evicting what nobody needs when there is too little. Blocking.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoRoom`] with the numbers, when there is no room even so.
    pub fn reserve(&self, claims: &[Claim]) -> Result<Reservation, StoreError> {
        self.reserve_after(claims, &HashSet::new())
    }

    /// The same for whoever has written all that was claimed for some blobs, whether it has its
    /// name by now or not: it shows on the disk, and had its room of the quota.
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
            let turn = self.collecting();
            // What an earlier try has left of these blobs is no room for them.
            let own: HashSet<_> = claims.iter().map(|claim| claim.blob).collect();
            while let Some((shortage, goal)) = self.try_claim(claims, written)? {
                let shortage = self.explain(shortage, &own, &turn)?;
                // Nothing is evicted for an artifact that will not fit even so.
                let collected = if shortage.is_hopeless() {
                    None
                } else {
                    Some(self.collect_in_turn(&Want::Room(goal), &own, &turn)?)
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
        Ok(Reservation { ledger: Arc::clone(self.ledger()), claims: Mutex::new(counts) })
    }

    /// Whether there is room for claims without evicting anything. Blocking.
    pub fn has_room_for(&self, claims: &[Claim]) -> Result<bool, StoreError> {
        self.load_usage()?;
        Ok(self.shortage(&self.ledger().lock(), claims, &HashSet::new())?.is_none())
    }

    /// Claims space if there is enough of it; returns what is missing otherwise. Decisions are made
    /// one at a time, over all claims.
    fn try_claim(
        &self,
        claims: &[Claim],
        written: &HashSet<Digest>,
    ) -> Result<Option<(Shortage, Goal)>, StoreError> {
        // Not under the lock, since the first call takes long.
        self.load_usage()?;
        let mut ledger = self.ledger().lock();
        let shortage = self.shortage(&ledger, claims, written)?;
        if shortage.is_none() {
            ledger.claim(claims);
        }
        Ok(shortage)
    }

    /// Reads the sizes of all content where there is a quota.
    fn load_usage(&self) -> Result<(), StoreError> {
        self.cache_options().max_bytes.map_or(Ok(()), |_| self.load_catalog())
    }

    /// How many bytes content can have here at most, if nothing else takes any.
    pub fn capacity(&self) -> Result<u64, StoreError> {
        let (room, options) = (self.room()?, self.cache_options());
        let bytes = room.total_bytes.saturating_sub(room.floor(options).bytes);
        Ok(options.max_bytes.map_or(bytes, |max| bytes.min(max)))
    }

    /// Returns the meter that keeps all writers above the floor.
    pub(super) fn meter(&self) -> Arc<Meter> {
        Arc::clone(&self.0.meter)
    }

    /// What is missing for these claims beside all others, and how much to free for them.
    fn shortage(
        &self,
        ledger: &LedgerState,
        claims: &[Claim],
        written: &HashSet<Digest>,
    ) -> Result<Option<(Shortage, Goal)>, StoreError> {
        let options = self.cache_options();
        let SpaceDemand { needed, others, quota } = ledger.demand(claims, written);
        // Nothing to write asks for no room, however full the disk is.
        if needed.is_nothing() {
            return Ok(None);
        }
        let room = self.room()?;
        let floor = room.floor(options);
        let missing = room.missing_until(floor.plus(others).plus(needed));
        let shortage = |kind, of: fn(Goal) -> u64, missing, free| Shortage {
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
            let of = |goal: Goal| goal.bytes;
            let shortage = shortage(Kind::Bytes, of, missing.bytes, room.free_bytes);
            return Ok(Some((shortage, missing)));
        }
        if missing.inodes > 0 {
            let of = |goal: Goal| goal.inodes;
            let shortage = shortage(Kind::Inodes, of, missing.inodes, room.free_inodes);
            return Ok(Some((shortage, missing)));
        }
        let Some(max) = options.max_bytes else { return Ok(None) };
        let used = self
            .catalog()
            .usage(self.units().record())
            .bytes
            .saturating_add(ledger.unclaimed().bytes);
        let over = used.saturating_add(quota).saturating_sub(max);
        if over == 0 {
            return Ok(None);
        }
        let shortage = shortage(Kind::Quota, |goal| goal.bytes, over, max.saturating_sub(used));
        Ok(Some((shortage, Goal { bytes: over, inodes: 0 })))
    }
}

impl Claim {
    /// Returns the claim of a single file with the folders around it.
    #[must_use]
    pub fn of_file(blob: Digest, size: u64) -> Self {
        let inodes = 1 + FOLDERS_OF_A_FILE;
        Self { blob, bytes: size.saturating_add(inodes * BYTES_PER_INODE), inodes }
    }

    /// Of a tree: its folders and symbolic links, the names in its folders, and its records. Its
    /// files are other objects'.
    #[must_use]
    pub fn of_tree(tree: TreeKey, plan: &TreePlan) -> Self {
        let own = plan.totals.directories.saturating_add(plan.totals.symbolic_links);
        let inodes = own.saturating_add(RECORDS_OF_A_TREE);
        let names: u64 = plan.nodes.iter().map(|node| bytes_of_a_name(node.name_bytes)).sum();
        let bytes = inodes.saturating_mul(BYTES_PER_INODE).saturating_add(names);
        Self { blob: tree.digest(), bytes, inodes }
    }
}

impl Reservation {
    /// A blob's content has its name: what it took shows on the disk itself now.
    pub fn done(&self, blob: Digest) {
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
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
        let claims = self.claims.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (blob, count) in claims.drain() {
            for _ in 0..count {
                self.ledger.release(blob);
            }
        }
    }
}

impl Meter {
    pub(super) fn new(root: &Path, options: CacheOptions) -> Self {
        Self { root: root.to_owned(), options, left: Mutex::default() }
    }

    /// Takes bytes that are about to be written.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSpace`] when that would go below the floor.
    pub fn writes(&self, bytes: u64) -> Result<(), StoreError> {
        self.take(Goal { bytes, inodes: 0 })
    }

    /// Takes inodes for files, directories or links that are about to be made.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSpace`] when that would go below the floor.
    pub fn makes(&self, inodes: u64) -> Result<(), StoreError> {
        self.take(Goal { bytes: 0, inodes })
    }

    fn take(&self, wanted: Goal) -> Result<(), StoreError> {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        if !wanted.is_met_by(*left) {
            let room = Room::of(&self.root)?;
            let floor = room.floor(&self.options);
            if !room.missing_until(floor.plus(wanted)).is_nothing() {
                return Err(StoreError::NoSpace { action: "write below", path: self.root.clone() });
            }
            *left = MOST_UNSEEN.min(room.above(floor)).max(wanted);
        }
        *left = left.less(wanted);
        Ok(())
    }
}

/// What one more name takes of its folder: ext4 has eight bytes with each, and leaves about half
/// of a full folder's blocks empty.
pub(super) const fn bytes_of_a_name(length: u8) -> u64 {
    2 * (length as u64 + 8)
}

/// What is below the floor is as full to a writer as what is full.
pub(super) fn full(error: StoreError) -> std::io::Error {
    match error {
        StoreError::NoSpace { .. } => std::io::ErrorKind::StorageFull.into(),
        other => std::io::Error::other(other),
    }
}

fn percent(total: u64, percent: u8) -> u64 {
    let part = u128::from(total) * u128::from(percent) / 100;
    u64::try_from(part).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: Room =
        Room { free_bytes: 300, total_bytes: 1000, free_inodes: 50, total_inodes: 100 };

    #[test]
    fn thresholds_and_floor_are_parts_of_the_filesystem() {
        let options = CacheOptions::default();
        assert_eq!(ROOM.floor(&options), Goal { bytes: 200, inodes: 10 });
        assert_eq!(ROOM.above_threshold(&options), 0);
        let fuller = Room { free_bytes: 240, ..ROOM };
        assert_eq!(fuller.above_threshold(&options), 760 - 650);
        let missing = ROOM.missing_until(Goal { bytes: 310, inodes: 60 });
        assert_eq!(missing, Goal { bytes: 10, inodes: 10 });
    }

    #[test]
    fn pins_have_half_of_what_content_may_take_unless_it_is_configured() {
        let options = CacheOptions::default();
        assert_eq!(options.pinned_bytes_limit(&ROOM), 325);
        let quota = CacheOptions { max_bytes: Some(100), ..options };
        assert_eq!(quota.pinned_bytes_limit(&ROOM), 50);
        let generous = CacheOptions { max_bytes: Some(5000), ..options };
        assert_eq!(generous.pinned_bytes_limit(&ROOM), 325);
        let configured = CacheOptions { max_pinned_bytes: Some(900), ..options };
        assert_eq!(configured.pinned_bytes_limit(&ROOM), 900);
    }

    #[test]
    fn a_filesystem_that_counts_no_inodes_runs_out_of_none() {
        let btrfs = Room { free_inodes: 0, total_inodes: 0, ..ROOM };
        assert!(btrfs.missing_until(Goal { bytes: 0, inodes: 5 }).is_nothing());
    }
}
