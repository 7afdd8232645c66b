//! Claimed disk space and downloads in `partial/`, as running totals in memory.
//!
//! A reservation compares its own claims with these totals. Its cost does not depend on the number
//! of other claims, and `partial/` is listed only when the store is opened. A claim shrinks while its
//! blob is downloaded, because written bytes reduce the free space of the filesystem.
//!
//! A download without a claim and without an open handle is idle. Idle downloads are kept so that a
//! later pull can continue them, within a bound per registry and one for the node. The oldest ones
//! are removed first.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use super::error::StoreError;
use super::folder_listing::names;
use super::space_amount::SpaceAmount;
use super::{durable_rename, object_keys};
use oci_types::Digest;

/// Idle downloads of one registry, at most. A broken pull leaves up to four of them.
const IDLE_PER_REGISTRY: usize = 256;
/// Idle downloads of all registries, at most.
const IDLE: usize = 2048;
/// A download that nothing goes on with is dropped after so long.
const AGE_SECONDS: i64 = 24 * 3600;

/// The disk space that one blob, or a tree, will take until its content has a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The blob; of a tree its key.
    pub blob: Digest,
    /// Bytes, those of its download and those that it unpacks to.
    pub bytes: u64,
    /// The number of inodes.
    pub inodes: u64,
}

/// A registry's host in the name of a download: the first eight bytes of its hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct RegistryId(u64);

/// All claims and downloads of this process.
pub(super) struct Ledger {
    partial: PathBuf,
    staging: PathBuf,
    state: Mutex<LedgerState>,
}

/// The locked state of a ledger.
#[derive(Default)]
pub(super) struct LedgerState {
    blobs: HashMap<Digest, BlobSpace>,
    totals: SpaceTotals,
    /// Idle downloads by their last use, the oldest first.
    idle: HashMap<RegistryId, BTreeSet<(i64, Digest)>>,
    idle_count: usize,
}

#[derive(Default)]
struct BlobSpace {
    claimed: SpaceAmount,
    claims: usize,
    handles: usize,
    downloads: Vec<PartialDownload>,
}

#[derive(Clone, Copy, Debug)]
struct PartialDownload {
    registry: RegistryId,
    bytes: u64,
    /// Seconds since 1970.
    last_used: i64,
}

/// Disk space of the claims and downloads of one blob or of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct SpaceTotals {
    /// Claimed space that is not written yet.
    outstanding: SpaceAmount,
    /// Bytes of all claims, written or not.
    claimed: u64,
    /// Space of downloads without a claim.
    unclaimed: SpaceAmount,
}

/// Disk space that new claims and all others demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SpaceDemand {
    /// Space still to be written for the new claims.
    pub(super) needed: SpaceAmount,
    /// Space still to be written for all others.
    pub(super) others: SpaceAmount,
    /// Bytes that all of them add to the usage that a quota is compared with.
    pub(super) quota: u64,
}

/// An idle download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IdleDownload {
    pub(super) blob: Digest,
    pub(super) registry: RegistryId,
    pub(super) bytes: u64,
    pub(super) last_used: i64,
}

/// A handle that keeps a download from being removed until it is dropped.
pub(super) struct OpenDownload {
    ledger: Arc<Ledger>,
    blob: Digest,
    registry: RegistryId,
}

impl RegistryId {
    pub(super) fn of(host: &str) -> Self {
        let hash = object_keys::hash(&[host]);
        Self(u64::from_be_bytes(hash.as_bytes().first_chunk().copied().unwrap_or_default()))
    }

    fn of_name(text: &str) -> Option<Self> {
        let is_hex = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_hex.then(|| u64::from_str_radix(text, 16).ok().map(Self)).flatten()
    }
}

impl SpaceTotals {
    fn plus(self, other: Self) -> Self {
        Self {
            outstanding: self.outstanding.plus(other.outstanding),
            claimed: self.claimed.saturating_add(other.claimed),
            unclaimed: self.unclaimed.plus(other.unclaimed),
        }
    }

    fn less(self, other: Self) -> Self {
        Self {
            outstanding: self.outstanding.less(other.outstanding),
            claimed: self.claimed.saturating_sub(other.claimed),
            unclaimed: self.unclaimed.less(other.unclaimed),
        }
    }
}

impl BlobSpace {
    fn written(&self) -> SpaceAmount {
        let sum = |sum: u64, download: &PartialDownload| sum.saturating_add(download.bytes);
        SpaceAmount { bytes: self.downloads.iter().fold(0, sum), inodes: 0 }
    }

    fn totals(&self) -> SpaceTotals {
        let written = self.written();
        if self.claims > 0 {
            let outstanding = self.claimed.less(written);
            return SpaceTotals {
                outstanding,
                claimed: self.claimed.bytes,
                ..SpaceTotals::default()
            };
        }
        let inodes = self.downloads.len() as u64;
        SpaceTotals { unclaimed: SpaceAmount { inodes, ..written }, ..SpaceTotals::default() }
    }

    fn is_idle(&self) -> bool {
        self.claims == 0 && self.handles == 0
    }

    fn is_nothing(&self) -> bool {
        self.is_idle() && self.downloads.is_empty()
    }
}

impl LedgerState {
    /// Updates a blob, and the totals with it.
    fn update(&mut self, blob: Digest, change: impl FnOnce(&mut BlobSpace)) {
        let known = self.blobs.entry(blob).or_default();
        let before = known.totals();
        if known.is_idle() {
            for download in &known.downloads {
                if let Some(idle) = self.idle.get_mut(&download.registry) {
                    self.idle_count -= usize::from(idle.remove(&(download.last_used, blob)));
                    if idle.is_empty() {
                        self.idle.remove(&download.registry);
                    }
                }
            }
        }
        change(known);
        if known.is_idle() {
            for download in &known.downloads {
                let idle = self.idle.entry(download.registry).or_default();
                self.idle_count += usize::from(idle.insert((download.last_used, blob)));
            }
        }
        self.totals = self.totals.less(before).plus(known.totals());
        if known.is_nothing() {
            self.blobs.remove(&blob);
        }
    }

    /// Returns the disk space that new claims demand beside those of this process. Blobs in `written`
    /// have their claimed space written in full.
    pub(super) fn demand(&self, claims: &[Claim], written: &HashSet<Digest>) -> SpaceDemand {
        let mut wanted = HashMap::<Digest, SpaceAmount>::new();
        for claim in claims {
            let goal = SpaceAmount { bytes: claim.bytes, inodes: claim.inodes };
            let known = wanted.entry(claim.blob).or_default();
            *known = known.max(goal);
        }
        let mut others = self.totals;
        for blob in written.iter().filter_map(|blob| self.blobs.get(blob)) {
            others =
                others.less(SpaceTotals { unclaimed: SpaceAmount::default(), ..blob.totals() });
        }
        let (mut needed, mut quota) = (SpaceAmount::default(), others.claimed);
        for (blob, goal) in wanted {
            let known = self.blobs.get(&blob);
            let promised = known.filter(|known| known.claims > 0).map(|known| known.claimed);
            // Bytes of an earlier try are on the disk, and counted, already.
            let here = match promised {
                Some(promised) => promised,
                None => known.map(BlobSpace::written).unwrap_or_default(),
            };
            let added = goal.less(here);
            needed = needed.plus(added);
            quota = quota.saturating_add(added.bytes);
        }
        SpaceDemand { needed, others: others.outstanding, quota }
    }

    /// Returns the disk space of downloads without a claim.
    pub(super) fn unclaimed(&self) -> SpaceAmount {
        self.totals.unclaimed
    }

    /// Adds claims, of which each is released once.
    pub(super) fn claim(&mut self, claims: &[Claim]) {
        for claim in claims {
            let goal = SpaceAmount { bytes: claim.bytes, inodes: claim.inodes };
            self.update(claim.blob, |blob| {
                blob.claimed = blob.claimed.max(goal);
                blob.claims += 1;
            });
        }
    }

    /// Releases one claim. Returns the registries whose downloads of the blob may be idle now.
    fn release(&mut self, blob: Digest) -> Vec<RegistryId> {
        let mut registries = Vec::new();
        self.update(blob, |blob| {
            blob.claims = blob.claims.saturating_sub(1);
            if blob.claims == 0 {
                blob.claimed = SpaceAmount::default();
                registries.extend(blob.downloads.iter().map(|download| download.registry));
            }
        });
        registries
    }

    /// Returns an idle download beyond the bounds: the oldest of one of these registries, or of the
    /// registry with the most.
    fn excess_download(&self, registries: &[RegistryId]) -> Option<(Digest, RegistryId)> {
        let idle = |registry: &RegistryId| self.idle.get(registry).map_or(0, BTreeSet::len);
        let of = registries.iter().copied().find(|registry| idle(registry) > IDLE_PER_REGISTRY);
        let most = || self.idle.keys().copied().max_by_key(idle);
        let registry = of.or_else(|| (self.idle_count > IDLE).then(most).flatten())?;
        self.idle.get(&registry)?.first().map(|&(_, blob)| (blob, registry))
    }
}

impl Ledger {
    /// Reads the downloads of an earlier process from `partial/`.
    pub(super) fn load(partial: PathBuf, staging: PathBuf) -> Result<Self, StoreError> {
        let mut state = LedgerState::default();
        let names: HashSet<_> = names(&partial)?.into_iter().collect();
        for name in &names {
            if let Some(of) = name.strip_suffix(".ranges")
                && parse(of).is_some()
                && !names.contains(of)
            {
                // A record of ranges has no use without its download. A failure is tried again at the next start.
                let _ = std::fs::remove_file(partial.join(name));
            }
            let Some((blob, registry)) = parse(name) else { continue };
            if let Some(download) = read_download(&partial.join(name), registry) {
                state.update(blob, |blob| blob.downloads.push(download));
            }
        }
        Ok(Self { partial, staging, state: Mutex::new(state) })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, LedgerState> {
        // The totals are consistent after every update, so a panic elsewhere breaks nothing.
        self.state.lock()
    }

    /// Returns the path of the download of a blob from a registry.
    pub(super) fn path(&self, blob: Digest, registry: RegistryId) -> PathBuf {
        self.partial.join(format!("{}-{:016x}", blob.hex(), registry.0))
    }

    /// Registers a download that is about to be opened.
    pub(super) fn open(self: &Arc<Self>, blob: Digest, registry: RegistryId) -> OpenDownload {
        self.lock().update(blob, |known| known.handles += 1);
        let opened = OpenDownload { ledger: Arc::clone(self), blob, registry };
        opened.refresh();
        opened
    }

    /// Reads the size of a download again, which was moved to its path.
    pub(super) fn refresh(&self, blob: Digest, registry: RegistryId) {
        let found = read_download(&self.path(blob, registry), registry);
        self.lock().update(blob, |blob| blob.set(registry, found));
    }

    /// Releases one claim on a blob.
    pub(super) fn release(&self, blob: Digest) {
        let registries = self.lock().release(blob);
        self.trim(&registries);
    }

    /// Returns all idle downloads.
    pub(super) fn idle(&self) -> Vec<IdleDownload> {
        let state = self.lock();
        let blobs = state.idle.values().flatten().map(|&(_, blob)| blob);
        let blobs: BTreeSet<_> = blobs.collect();
        let of_blob = |blob: Digest| {
            let downloads = state.blobs.get(&blob).into_iter().flat_map(|known| &known.downloads);
            downloads.map(move |&PartialDownload { registry, bytes, last_used }| IdleDownload {
                blob,
                registry,
                bytes,
                last_used,
            })
        };
        blobs.into_iter().flat_map(of_blob).collect()
    }

    /// Returns idle downloads that may go: old ones, or all when space is wanted, but for those of
    /// the blobs `own`.
    pub(super) fn stale(
        &self,
        is_wanted: bool,
        own: &HashSet<Digest>,
        unix_seconds: i64,
    ) -> Vec<IdleDownload> {
        let mut stale = self.idle();
        stale.retain(|download| {
            let age = unix_seconds.saturating_sub(download.last_used);
            !own.contains(&download.blob) && (is_wanted || age > AGE_SECONDS)
        });
        stale
    }

    /// Returns the disk space of downloads without a claim.
    pub(super) fn unclaimed(&self) -> SpaceAmount {
        self.lock().unclaimed()
    }

    /// Removes a download, unless it is claimed or open. Returns whether it was removed. The names of
    /// the download and of its record are removed under the lock, so that they cannot be those of the
    /// next download; the content is removed after that.
    pub(super) fn remove(&self, blob: Digest, registry: RegistryId) -> std::io::Result<bool> {
        let path = self.path(blob, registry);
        let grave = self.staging.join(durable_rename::temporary_name());
        let mut state = self.lock();
        if state.blobs.get(&blob).is_none_or(|known| !known.is_idle()) {
            return Ok(false);
        }
        let is_here = match std::fs::rename(&path, &grave) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
            renamed => renamed.map(|()| true)?,
        };
        // A record without its download is removed at the next start.
        let _ = std::fs::remove_file(record_of(&path));
        state.update(blob, |blob| blob.set(registry, None));
        drop(state);
        if is_here {
            std::fs::remove_file(&grave)?;
        }
        Ok(is_here)
    }

    /// Removes the oldest idle downloads of all registries beyond the bounds.
    pub(super) fn trim_all(&self) {
        let registries: Vec<_> = self.lock().idle.keys().copied().collect();
        self.trim(&registries);
    }

    fn trim(&self, registries: &[RegistryId]) {
        loop {
            let Some((blob, registry)) = self.lock().excess_download(registries) else { return };
            match self.remove(blob, registry) {
                Ok(_) => {}
                Err(error) => {
                    let path = self.path(blob, registry);
                    tracing::warn!(path = %path.display(), %error, "a download cannot be removed");
                    return;
                }
            }
        }
    }
}

impl BlobSpace {
    fn set(&mut self, registry: RegistryId, found: Option<PartialDownload>) {
        self.downloads.retain(|download| download.registry != registry);
        self.downloads.extend(found);
    }
}

impl OpenDownload {
    /// Returns the path of the download.
    pub(super) fn path(&self) -> PathBuf {
        self.ledger.path(self.blob, self.registry)
    }

    /// Records how many bytes of the download are there.
    pub(super) fn set_bytes(&self, bytes: u64) {
        let (registry, last_used) = (self.registry, now());
        let download = PartialDownload { registry, bytes, last_used };
        self.ledger.lock().update(self.blob, |blob| blob.set(registry, Some(download)));
    }

    /// Reads the size of the download from the disk again.
    pub(super) fn refresh(&self) {
        self.ledger.refresh(self.blob, self.registry);
    }
}

impl Drop for OpenDownload {
    fn drop(&mut self) {
        let found = read_download(&self.path(), self.registry);
        self.ledger.lock().update(self.blob, |blob| {
            blob.set(self.registry, found);
            blob.handles -= 1;
        });
        self.ledger.trim(&[self.registry]);
    }
}

/// Reads the size of a download from the disk; none where there is none.
fn read_download(path: &Path, registry: RegistryId) -> Option<PartialDownload> {
    let metadata = path.symlink_metadata().ok().filter(std::fs::Metadata::is_file)?;
    Some(PartialDownload { registry, bytes: metadata.blocks() * 512, last_used: metadata.mtime() })
}

/// Parses the file name `<digest>-<registry>` of a download.
fn parse(name: &str) -> Option<(Digest, RegistryId)> {
    let (digest, registry) = name.split_once('-')?;
    Some((Digest::from_hex(digest)?, RegistryId::of_name(registry)?))
}

/// Returns the path of the record of a download's ranges.
pub(super) fn record_of(download: &Path) -> PathBuf {
    download.with_extension("ranges")
}

fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

#[cfg(test)]
mod tests;
