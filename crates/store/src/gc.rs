//! Garbage collection: frees space without touching content in use.
//!
//! ```text
//! facts     the catalog, the kernel's mounts, the clock
//! plan      a pure decision (see `eviction`)
//! remove    condemned one by one, looked at again at that moment; the object's name goes first,
//!           with a rename into staging, so that a crash leaves either all of it or leftovers
//!           that the next start sweeps
//! ```

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

use super::durable_rename;
use super::error::{IoContext as _, Kind, Shortage, StoreError};
use super::eviction::{Facts, Plan, Reason};
use super::object_catalog::{Condemned, Entry};
use super::object_inventory::Inventory;
use super::object_name::{ObjectKind, ObjectName};
use super::record_sweep::RecordSweeper;
use super::resolution_records::Resolutions;
use super::space_amount::SpaceAmount;
use super::space_ledger::{IdleDownload, Ledger};
use super::state_directory::StateDirectory;
use super::trees::mounted_tree::MountedTree;
use oci_types::Digest;
use sys::fault;
use sys::mount::MountTable;

/// Files and layers that no tree links wait so long for the pull that made them to go on.
const UNLINKED_AGE: Duration = Duration::from_hours(1);
/// After a boot pods come back for what they had: nothing goes meanwhile, unless room is wanted.
const BOOT_GRACE: Duration = Duration::from_mins(10);
/// So many objects that cannot be removed end a collection: a disk that takes nothing back would
/// be asked for each of them.
const MANY_THAT_RESIST: u32 = 8;

/// The aim of a collection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Meets the thresholds, the floor and the quota.
    Upkeep,
    /// So much more room, now.
    Room(SpaceAmount),
    /// Content of at most so many bytes.
    AtMost(u64),
}

/// The outcome of a collection, or of a plan of one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// The objects that were removed, in this order.
    pub victims: Vec<Victim>,
    /// Downloads that were dropped.
    pub partials: u64,
    /// Proofs and resolutions that were removed because nothing referred to their manifest.
    pub records: u64,
    /// Bytes of all that.
    pub bytes: u64,
    /// Bytes of objects that a plan would remove as well if they were older.
    pub young_bytes: u64,
}

/// Something that went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Victim {
    /// The name of the object.
    pub name: ObjectName,
    /// The manifest of a tree; none for other objects.
    pub manifest: Option<Digest>,
    /// Bytes that it took on the disk.
    pub bytes: u64,
    /// Why it went.
    pub reason: Reason,
    /// Seconds since 1970 of its last use.
    pub last_used: i64,
}

/// Counts of removed objects since the process began.
#[derive(Default)]
pub struct Evictions {
    counts: [AtomicU64; Reason::ALL.len()],
    bytes: AtomicU64,
}

/// The right to decide what goes; there is one.
pub type Turn<'a> = MutexGuard<'a, ()>;

/// The clocks, for tests to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Seconds since 1970.
    pub unix_seconds: i64,
    /// Time since the kernel started.
    pub since_boot: Duration,
}

impl Evictions {
    /// Returns the number of objects that were removed for a reason.
    pub fn count(&self, reason: Reason) -> u64 {
        self.counts[reason as usize].load(Ordering::Relaxed)
    }

    /// Returns the number of objects that were removed.
    pub fn total(&self) -> u64 {
        Reason::ALL.iter().map(|&reason| self.count(reason)).sum()
    }

    /// Bytes of all that went.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn add(&self, victim: &Victim) {
        self.counts[victim.reason as usize].fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(victim.bytes, Ordering::Relaxed);
        // A line for each artifact; what it linked goes with it.
        if let Some(manifest) = victim.manifest {
            tracing::info!(
                %manifest,
                tree = %victim.name,
                bytes = victim.bytes,
                last_used = victim.last_used,
                reason = victim.reason.name(),
                "evicted"
            );
        }
    }
}

impl Victim {
    fn new(name: &ObjectName, entry: &Entry, reason: Reason) -> Self {
        let &Entry { manifest, bytes, last_used, .. } = entry;
        Self { name: name.clone(), manifest, bytes, reason, last_used }
    }
}

impl Now {
    /// Reads the clocks of the kernel.
    pub fn read() -> Self {
        let boot = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
        Self {
            unix_seconds: jiff::Timestamp::now().as_second(),
            // A kernel without that clock has been up for long enough.
            since_boot: boot.map_or(Duration::MAX, Duration::from),
        }
    }
}

/// Decides what goes, and removes it.
pub struct GarbageCollector {
    pub(super) directory: Arc<StateDirectory>,
    pub(super) inventory: Arc<Inventory>,
    pub(super) ledger: Arc<Ledger>,
    pub(super) resolutions: Arc<Resolutions>,
    pub(super) records: Arc<RecordSweeper>,
    /// Held while it is decided what goes.
    pub(super) turn: Mutex<()>,
    /// Counts of removed objects since the process began.
    pub evictions: Evictions,
}

impl GarbageCollector {
    /// Frees what is wanted, and what no publish asks for. Blocking.
    pub fn collect(&self, want: &Want) -> Result<Collected, StoreError> {
        self.collect_for(want, &HashSet::new())
    }

    /// Collects for a caller that continues the downloads of the blobs `own`, which stay.
    pub fn collect_for(&self, want: &Want, own: &HashSet<Digest>) -> Result<Collected, StoreError> {
        let turn = self.collecting();
        self.collect_in_turn(want, own, &turn)
    }

    /// Plans a collection, and removes nothing.
    pub fn plan(&self, want: &Want) -> Result<Collected, StoreError> {
        let turn = self.collecting();
        let now = Now::read();
        let mut facts = self.facts(now)?;
        let goal = self.goal(want, now)?;
        let partials = self.ledger.stale(!goal.is_nothing(), &HashSet::new(), now.unix_seconds);
        let left = goal.less(SpaceAmount { bytes: total(&partials), inodes: 0 });
        let plan = facts.plan(left);
        drop(turn);
        let mut collected = Collected::of_partials(&partials);
        for (name, reason) in &plan.victims {
            if let Some(entry) = facts.store.objects.get(name) {
                collected.add(Victim::new(name, entry, *reason));
            }
        }
        facts.minimum_age = 0;
        collected.young_bytes = facts.plan(left).frees.bytes.saturating_sub(plan.frees.bytes);
        Ok(collected)
    }

    /// Removes forgotten trees at once, and the objects that only they have linked. Trees in use
    /// stay, and are removed after their last unpublish. Blocking.
    pub fn collect_trees(&self, trees: &[ObjectName]) -> Result<Collected, StoreError> {
        let mut collected = Collected::default();
        if trees.is_empty() {
            return Ok(collected);
        }
        let _turn = self.collecting();
        self.inventory.load()?;
        // The mounts first: a tree that is mounted later has a lease or a record in the catalog.
        let mounted = mounted_trees()?;
        let trees = trees.iter().filter(|tree| !mounted.contains(*tree));
        let mut waiting: Vec<_> = trees.map(|tree| (tree.clone(), Reason::Forgotten)).collect();
        let mut resisted = None;
        while let Some((name, reason)) = waiting.pop() {
            match self.evict(&name, reason) {
                Ok(Some((victim, entry))) => {
                    collected.add(victim);
                    waiting.extend(entry.links.iter().map(|link| (link.clone(), Reason::Unlinked)));
                }
                Ok(None) => {}
                Err(error) => resisted = Some(error),
            }
        }
        match resisted {
            Some(error) if collected.is_nothing() => Err(error),
            _ => Ok(collected),
        }
    }

    /// Removes records that lead nowhere. Returns how many were removed. Blocking.
    pub fn sweep_records(&self, now: Now) -> Result<usize, StoreError> {
        self.records.sweep(&self.facts(now)?, now.unix_seconds)
    }

    /// Removes an object unless something needs it. Returns it with its entry if it was removed.
    fn evict(
        &self,
        name: &ObjectName,
        reason: Reason,
    ) -> Result<Option<(Victim, Arc<Entry>)>, StoreError> {
        let Some(entry) = self.directory.catalog.entry(name) else { return Ok(None) };
        let Some(condemned) = self.directory.catalog.condemn(name) else { return Ok(None) };
        self.remove(condemned, name).inspect_err(|error| {
            tracing::warn!(object = %name, %error, "it cannot be removed, and stays");
        })?;
        let victim = Victim::new(name, &entry, reason);
        self.evictions.add(&victim);
        Ok(Some((victim, entry)))
    }

    /// Returns what the catalog, the kernel and the clock say.
    pub fn facts(&self, now: Now) -> Result<Facts, StoreError> {
        let catalog = self.inventory.catalog()?;
        // The mounts first: a tree that is mounted later has a lease or a record in the catalog.
        let mounted = mounted_trees()?;
        let store = catalog.snapshot();
        let manifests = store.manifests();
        Ok(Facts {
            store,
            indexes: self.resolutions.indexes_of(&manifests)?,
            mounted,
            now: now.unix_seconds,
            minimum_age: seconds(self.directory.cache.minimum_age),
            unlinked_age: seconds(UNLINKED_AGE),
        })
    }

    pub(super) fn collecting(&self) -> Turn<'_> {
        self.turn.lock()
    }

    /// Downloads of the blobs `own` stay: the room is for them.
    pub(super) fn collect_in_turn(
        &self,
        want: &Want,
        own: &HashSet<Digest>,
        _turn: &Turn<'_>,
    ) -> Result<Collected, StoreError> {
        let now = Now::read();
        let goal = self.goal(want, now)?;
        let upkeep_waits = *want == Want::Upkeep && now.since_boot < BOOT_GRACE;
        if upkeep_waits && goal.is_nothing() {
            return Ok(Collected::default());
        }
        let mut facts = self.facts(now)?;
        let partials = self.ledger.stale(!goal.is_nothing(), own, now.unix_seconds);
        let mut removed = Vec::new();
        for partial in partials {
            let IdleDownload { blob, registry, .. } = partial;
            match self.ledger.remove(blob, registry) {
                Ok(true) => removed.push(partial),
                Ok(false) => {}
                Err(error) => {
                    let path = self.ledger.path(blob, registry);
                    tracing::warn!(path = %path.display(), %error, "a download cannot be removed");
                }
            }
        }
        let mut collected = Collected::of_partials(&removed);
        let failed = |error| StoreError::io("evict from", &self.directory.root, error);
        fault::point("gc.planned").map_err(failed)?;
        let mut left = goal.less(SpaceAmount { bytes: collected.bytes, inodes: 0 });
        if !left.is_nothing() {
            let swept = self.records.sweep_under_pressure(&facts, now.unix_seconds, false)?;
            collected.records = swept.inodes;
            collected.bytes = collected.bytes.saturating_add(swept.bytes);
            left = left.less(swept);
        }
        let mut resisting = 0;
        loop {
            let Plan { victims, .. } = facts.plan(left);
            let mut resisted = false;
            for (name, reason) in victims {
                match self.evict(&name, reason) {
                    Ok(Some((victim, entry))) => {
                        collected.add(victim);
                        facts.store.objects.remove(&name);
                        left = left.less(entry.space());
                    }
                    // It was leased or published since the plan was made.
                    Ok(None) => {}
                    Err(error) => {
                        // An object that cannot be removed must not stop the eviction of others.
                        facts.store.leased.insert(name);
                        resisted = true;
                        resisting += 1;
                        if resisting == MANY_THAT_RESIST {
                            // So many failures are the disk's and not those of single objects.
                            return if collected.is_nothing() { Err(error) } else { Ok(collected) };
                        }
                    }
                }
            }
            // What stayed frees nothing: something else may have to go for it.
            if !resisted {
                break;
            }
        }
        if matches!(want, Want::AtMost(_)) {
            // Evicted content leaves records, and the administrator asked for all that can be removed.
            let now = Now::read();
            let swept =
                self.records.sweep_under_pressure(&self.facts(now)?, now.unix_seconds, true)?;
            collected.records += swept.inodes;
            collected.bytes = collected.bytes.saturating_add(swept.bytes);
        }
        Ok(collected)
    }

    /// Explains in numbers why a claim cannot be met.
    pub(super) fn explain(
        &self,
        shortage: Shortage,
        own: &HashSet<Digest>,
        _turn: &Turn<'_>,
    ) -> Result<Shortage, StoreError> {
        let now = Now::read();
        let facts = self.facts(now)?;
        let partials = SpaceAmount {
            bytes: total(&self.ledger.stale(true, own, now.unix_seconds)),
            inodes: 0,
        };
        let evictable = facts.plan(SpaceAmount::EVERYTHING).frees.plus(partials);
        let pinned = self.inventory.pinned_space()?;
        let of = |goal: SpaceAmount| match shortage.kind {
            Kind::Inodes => goal.inodes,
            Kind::Bytes | Kind::Quota => goal.bytes,
        };
        Ok(Shortage { evictable: of(evictable), pinned: of(pinned), ..shortage })
    }

    fn goal(&self, want: &Want, now: Now) -> Result<SpaceAmount, StoreError> {
        let options = &self.directory.cache;
        match want {
            Want::Room(goal) => Ok(*goal),
            Want::AtMost(bytes) => Ok(SpaceAmount {
                bytes: self.inventory.usage()?.bytes.saturating_sub(*bytes),
                inodes: 0,
            }),
            Want::Upkeep => {
                let room = self.directory.disk_space()?;
                let wanted = room.missing_until(room.floor(options));
                if now.since_boot < BOOT_GRACE {
                    return Ok(wanted);
                }
                let over_quota = match options.max_bytes {
                    Some(max) => self.inventory.usage()?.bytes.saturating_sub(max),
                    None => 0,
                };
                let bytes = over_quota.max(room.above_threshold(options));
                Ok(wanted.max(SpaceAmount { bytes, inodes: 0 }))
            }
        }
    }

    /// Takes an object's name away, then its content.
    fn remove(&self, condemned: Condemned, name: &ObjectName) -> Result<(), StoreError> {
        let path = self.directory.root.join(name.as_str());
        if path
            .ancestors()
            .skip(1)
            .take_while(|folder| *folder != self.directory.root.as_path())
            .any(Path::is_symlink)
        {
            return Err(StoreError::Foreign { path, what: "lies behind a symbolic link" });
        }
        let grave = self.directory.staging().join(durable_rename::temporary_name());
        fault::point("gc.condemned").io_context("remove", &path)?;
        // The removal of a single file is atomic, so that it needs no rename.
        let is_file = matches!(name.kind(), ObjectKind::File | ObjectKind::Document);
        let removed = if is_file { fs::remove_file(&path) } else { fs::rename(&path, &grave) };
        removed.if_there("remove", &path)?;
        condemned.removed();
        fault::point("gc.renamed").io_context("remove", &path)?;
        // A mark without its generation marks nothing; the folders of a key go when they are empty.
        if name.kind() != ObjectKind::Document {
            let _ = fs::remove_file(path.with_extension("damaged"));
        }
        let keys = path.ancestors().skip(1).take(name.as_str().matches('/').count() - 1);
        for folder in keys {
            if fs::remove_dir(folder).is_err() {
                break;
            }
        }
        // What resists is swept at the next start.
        if !is_file
            && let Err(error) = fs::remove_dir_all(&grave)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %grave.display(), %error, "a removed object leaves something behind");
        }
        fault::point("gc.removed").io_context("remove", &path)
    }
}

impl Collected {
    /// Returns whether nothing was removed.
    pub fn is_nothing(&self) -> bool {
        self.victims.is_empty() && self.partials == 0 && self.records == 0
    }

    fn of_partials(partials: &[IdleDownload]) -> Self {
        let bytes = total(partials);
        Self { partials: partials.len() as u64, bytes, ..Self::default() }
    }

    fn add(&mut self, victim: Victim) {
        self.bytes = self.bytes.saturating_add(victim.bytes);
        self.victims.push(victim);
    }
}

fn total(partials: &[IdleDownload]) -> u64 {
    partials.iter().map(|partial| partial.bytes).sum()
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

/// The trees that are mounted anywhere in sight, whatever the records say.
fn mounted_trees() -> Result<HashSet<ObjectName>, StoreError> {
    let table = MountTable::read().io_context("read", Path::new("/proc/self/mountinfo"))?;
    let trees = table.iter().filter_map(|mount| MountedTree::containing(&mount.origin));
    Ok(trees.map(|tree| ObjectName::tree(tree.key, tree.generation)).collect())
}
