//! Claimed disk space and downloads in `partial/`, as running totals in memory.
//!
//! A reservation compares its own claims with these totals: it costs the same however many others
//! there are, and nothing lists `partial/` after the store was opened. A claim shrinks while its
//! blob is downloaded, since what is written shows on the filesystem itself.
//!
//! A download without a claim and without an open handle is idle. It stays for whoever continues it,
//! within a bound per registry and one for the node; the oldest goes first.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::error::StoreError;
use super::eviction::Goal;
use super::partial::record_of;
use super::room::Claim;
use super::staging::names;
use super::{durable, keys};
use crate::oci::Digest;

/// Idle downloads of one registry. A pull leaves at most four; more than this many broken pulls of
/// one registry are rather fetched again than kept.
const IDLE_PER_REGISTRY: usize = 256;
/// Idle downloads of all registries.
const IDLE: usize = 2048;

/// A registry's host in the name of a download: the first eight bytes of its hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct RegistryId(u64);

/// All claims and downloads of this process.
#[derive(Debug)]
pub(super) struct Ledger {
    partial: PathBuf,
    staging: PathBuf,
    state: Mutex<State>,
}

/// The totals at one moment; nothing changes while it is held.
#[derive(Debug, Default)]
pub(super) struct State {
    blobs: HashMap<Digest, Blob>,
    totals: Totals,
    /// By last use, the oldest first.
    idle: HashMap<RegistryId, BTreeSet<(i64, Digest)>>,
    idle_count: usize,
}

#[derive(Debug, Default)]
struct Blob {
    claimed: Goal,
    claims: usize,
    handles: usize,
    downloads: Vec<Download>,
}

#[derive(Clone, Copy, Debug)]
struct Download {
    registry: RegistryId,
    bytes: u64,
    /// Seconds since 1970.
    last_used: i64,
}

/// What a blob, or all of them, adds up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    /// Claimed and not written yet.
    outstanding: Goal,
    /// Claimed, written or not.
    claimed: u64,
    /// Downloads without a claim.
    unclaimed: Goal,
}

/// What claims come to beside all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sums {
    /// Still to be written for these.
    pub(super) needed: Goal,
    /// Still to be written for all others.
    pub(super) others: Goal,
    /// Bytes that all of them add to what a quota counts already.
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

/// An open download: it stays until this is dropped.
#[derive(Debug)]
pub(super) struct OpenDownload {
    ledger: Arc<Ledger>,
    blob: Digest,
    registry: RegistryId,
}

impl RegistryId {
    pub(super) fn of(host: &str) -> Self {
        let hash = keys::hash(&[host]);
        Self(u64::from_be_bytes(hash.as_bytes().first_chunk().copied().unwrap_or_default()))
    }

    fn of_name(text: &str) -> Option<Self> {
        let is_hex = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_hex.then(|| u64::from_str_radix(text, 16).ok().map(Self)).flatten()
    }
}

impl Totals {
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

impl Blob {
    fn written(&self) -> Goal {
        let sum = |sum: u64, download: &Download| sum.saturating_add(download.bytes);
        Goal { bytes: self.downloads.iter().fold(0, sum), inodes: 0 }
    }

    fn totals(&self) -> Totals {
        let written = self.written();
        if self.claims > 0 {
            let outstanding = self.claimed.less(written);
            return Totals { outstanding, claimed: self.claimed.bytes, ..Totals::default() };
        }
        let inodes = self.downloads.len() as u64;
        Totals { unclaimed: Goal { inodes, ..written }, ..Totals::default() }
    }

    fn is_idle(&self) -> bool {
        self.claims == 0 && self.handles == 0
    }

    fn is_nothing(&self) -> bool {
        self.is_idle() && self.downloads.is_empty()
    }
}

impl State {
    /// Changes what is known of a blob, and the totals with it.
    fn change(&mut self, blob: Digest, change: impl FnOnce(&mut Blob)) {
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

    /// Returns what claims add to those of this process. `written` are blobs whose claimed space is
    /// written in full.
    pub(super) fn sums(&self, claims: &[Claim], written: &HashSet<Digest>) -> Sums {
        let mut wanted = HashMap::<Digest, Goal>::new();
        for claim in claims {
            let goal = Goal { bytes: claim.bytes, inodes: claim.inodes };
            let known = wanted.entry(claim.blob).or_default();
            *known = known.max(goal);
        }
        let mut others = self.totals;
        for blob in written.iter().filter_map(|blob| self.blobs.get(blob)) {
            others = others.less(Totals { unclaimed: Goal::default(), ..blob.totals() });
        }
        let (mut needed, mut quota) = (Goal::default(), others.claimed);
        for (blob, goal) in wanted {
            let known = self.blobs.get(&blob);
            let promised = known.filter(|known| known.claims > 0).map(|known| known.claimed);
            // What an earlier try has left is on the disk, and counted, already.
            let here = match promised {
                Some(promised) => promised,
                None => known.map(Blob::written).unwrap_or_default(),
            };
            let added = goal.less(here);
            needed = needed.plus(added);
            quota = quota.saturating_add(added.bytes);
        }
        Sums { needed, others: others.outstanding, quota }
    }

    /// Returns what downloads without a claim take on the disk.
    pub(super) fn unclaimed(&self) -> Goal {
        self.totals.unclaimed
    }

    /// Adds claims.
    pub(super) fn claim(&mut self, claims: &[Claim]) {
        for claim in claims {
            let goal = Goal { bytes: claim.bytes, inodes: claim.inodes };
            self.change(claim.blob, |blob| {
                blob.claimed = blob.claimed.max(goal);
                blob.claims += 1;
            });
        }
    }

    /// Gives one claim back; returns the registries whose downloads of the blob may be idle now.
    fn release(&mut self, blob: Digest) -> Vec<RegistryId> {
        let mut registries = Vec::new();
        self.change(blob, |blob| {
            blob.claims = blob.claims.saturating_sub(1);
            if blob.claims == 0 {
                blob.claimed = Goal::default();
                registries.extend(blob.downloads.iter().map(|download| download.registry));
            }
        });
        registries
    }

    /// Returns the oldest idle download of one of these registries, or of the registry that has
    /// most, when there are more than the bounds allow.
    fn surplus(&self, registries: &[RegistryId]) -> Option<(Digest, RegistryId)> {
        let idle = |registry: &RegistryId| self.idle.get(registry).map_or(0, BTreeSet::len);
        let of = registries.iter().copied().find(|registry| idle(registry) > IDLE_PER_REGISTRY);
        let most = || self.idle.keys().copied().max_by_key(idle);
        let registry = of.or_else(|| (self.idle_count > IDLE).then(most).flatten())?;
        self.idle.get(&registry)?.first().map(|&(_, blob)| (blob, registry))
    }
}

impl Ledger {
    /// Learns what an earlier process has left in `partial/`.
    pub(super) fn load(partial: PathBuf, staging: PathBuf) -> Result<Self, StoreError> {
        let mut state = State::default();
        let names: HashSet<_> = names(&partial)?.into_iter().collect();
        for name in &names {
            if let Some(of) = name.strip_suffix(".ranges")
                && parse(of).is_some()
                && !names.contains(of)
            {
                // Without its download it says nothing; one that resists is tried again at the next start.
                let _ = std::fs::remove_file(partial.join(name));
            }
            let Some((blob, registry)) = parse(name) else { continue };
            if let Some(download) = look(&partial.join(name), registry) {
                state.change(blob, |blob| blob.downloads.push(download));
            }
        }
        Ok(Self { partial, staging, state: Mutex::new(state) })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Every change leaves the totals true: a panic elsewhere spoils nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns where the download of a blob from a registry lies.
    pub(super) fn path(&self, blob: Digest, registry: RegistryId) -> PathBuf {
        self.partial.join(format!("{}-{:016x}", blob.hex(), registry.0))
    }

    /// Announces that a download is about to be opened.
    pub(super) fn open(self: &Arc<Self>, blob: Digest, registry: RegistryId) -> OpenDownload {
        self.lock().change(blob, |known| known.handles += 1);
        let opened = OpenDownload { ledger: Arc::clone(self), blob, registry };
        opened.look();
        opened
    }

    /// Takes note of a download that was put at its place.
    pub(super) fn added(&self, blob: Digest, registry: RegistryId) {
        let found = look(&self.path(blob, registry), registry);
        self.lock().change(blob, |blob| blob.set(registry, found));
    }

    /// Gives one claim on a blob back.
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
            downloads.map(move |&Download { registry, bytes, last_used }| IdleDownload {
                blob,
                registry,
                bytes,
                last_used,
            })
        };
        blobs.into_iter().flat_map(of_blob).collect()
    }

    /// Returns what downloads without a claim take on the disk.
    pub(super) fn unclaimed(&self) -> Goal {
        self.lock().unclaimed()
    }

    /// Removes a download, unless it is claimed or open; says whether it did. Its name goes under
    /// the lock, so that it is opened either before or not at all; its content after that.
    pub(super) fn remove(&self, blob: Digest, registry: RegistryId) -> std::io::Result<bool> {
        let path = self.path(blob, registry);
        let grave = self.staging.join(durable::temporary_name());
        let mut state = self.lock();
        if state.blobs.get(&blob).is_none_or(|known| !known.is_idle()) {
            return Ok(false);
        }
        let renamed = std::fs::rename(&path, &grave);
        match &renamed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {}
            _ => state.change(blob, |blob| blob.set(registry, None)),
        }
        drop(state);
        let is_here = match renamed {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
            renamed => renamed.map(|()| true)?,
        };
        // Without its download it says nothing. What stays in staging the next start sweeps.
        let _ = std::fs::remove_file(record_of(&path));
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
            let Some((blob, registry)) = self.lock().surplus(registries) else { return };
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

impl Blob {
    fn set(&mut self, registry: RegistryId, found: Option<Download>) {
        self.downloads.retain(|download| download.registry != registry);
        self.downloads.extend(found);
    }
}

impl OpenDownload {
    /// Where it lies.
    pub(super) fn path(&self) -> PathBuf {
        self.ledger.path(self.blob, self.registry)
    }

    /// Takes note of how many bytes of it are there.
    pub(super) fn has(&self, bytes: u64) {
        let (registry, last_used) = (self.registry, now());
        let download = Download { registry, bytes, last_used };
        self.ledger.lock().change(self.blob, |blob| blob.set(registry, Some(download)));
    }

    /// Takes note of what is on the disk.
    pub(super) fn look(&self) {
        self.ledger.added(self.blob, self.registry);
    }
}

impl Drop for OpenDownload {
    fn drop(&mut self) {
        let found = look(&self.path(), self.registry);
        self.ledger.lock().change(self.blob, |blob| {
            blob.set(self.registry, found);
            blob.handles -= 1;
        });
        self.ledger.trim(&[self.registry]);
    }
}

/// Reads what a download takes on the disk; none where there is none.
fn look(path: &Path, registry: RegistryId) -> Option<Download> {
    let metadata = path.symlink_metadata().ok().filter(std::fs::Metadata::is_file)?;
    Some(Download { registry, bytes: metadata.blocks() * 512, last_used: metadata.mtime() })
}

/// Parses `<digest>-<registry>`.
fn parse(name: &str) -> Option<(Digest, RegistryId)> {
    let (digest, registry) = name.split_once('-')?;
    Some((Digest::from_hex(digest)?, RegistryId::of_name(registry)?))
}

fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

#[cfg(test)]
mod tests;
