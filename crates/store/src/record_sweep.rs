//! Small records that nothing needs any more: what an evicted artifact leaves.
//!
//! Resolutions and proofs are small, but a node that lives for years sees many, and one that is
//! attacked sees many in an hour. Old ones are removed when no tree, no pin and no running pull uses
//! their manifest. When space is needed, a minute is old. For one manifest only the newest ones are
//! kept, up to a bound.
//!
//! Each kind of records says itself what its files are called, when one is old, and what needs it
//! ([`SweptRecords`]).

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use super::error::StoreError;
use super::eviction::Facts;
use super::object_name::{ObjectKind, ObjectName};
use super::space_amount::SpaceAmount;
use super::state_directory::StateDirectory;
use oci_types::Digest;

/// Age of a record that is removed when space is needed. It is longer than a publish takes from
/// resolving its reference to pulling, which leases the manifest.
const AGE_UNDER_PRESSURE: Duration = Duration::from_mins(1);
/// Least time between two sweeps for want of space.
const PAUSE_SECONDS: i64 = 60;
/// Records of a tree in normal use, at most. Where there are more, most belong to no tree.
const RECORDS_OF_AN_ARTIFACT: u64 = 32;

/// Records of one folder that lose their use when content goes.
pub(super) trait SweptRecords: Send + Sync {
    /// Reads which records there are. Returns the number of files and folders.
    fn load(&self) -> Result<usize, StoreError>;

    /// Removes old records that nothing needs. Returns how many were removed.
    fn sweep(&self, sweep: &mut Sweep<'_>) -> Result<usize, StoreError>;
}

/// One sweep of all records.
pub(super) struct Sweep<'a> {
    directory: &'a StateDirectory,
    facts: &'a Facts,
    unix_seconds: i64,
    longest_age: Duration,
    /// Manifests whose records are kept: of trees, pins and running pulls. A kind of records may
    /// add others for those that are swept after it.
    pub(super) manifests: HashSet<Digest>,
}

/// Sweeps all kinds of records.
pub(super) struct RecordSweeper {
    pub(super) directory: Arc<StateDirectory>,
    /// In the order in which they are swept.
    pub(super) kinds: Vec<Arc<dyn SweptRecords>>,
    /// Time of the last sweep for want of space, in seconds since 1970.
    pub(super) swept: AtomicI64,
}

impl<'a> Sweep<'a> {
    fn new(
        directory: &'a StateDirectory,
        facts: &'a Facts,
        unix_seconds: i64,
        longest_age: Duration,
    ) -> Self {
        let mut manifests = facts.store.manifests();
        manifests.extend(&facts.store.pinned);
        // Manifests of running pulls.
        manifests.extend(facts.store.leased.iter().filter_map(ObjectName::document_digest));
        Self { directory, facts, unix_seconds, longest_age, manifests }
    }

    /// Returns whether a file has not been written for an age, or for the age that is old to this
    /// sweep.
    pub(super) fn is_old(&self, path: &Path, age: Duration) -> bool {
        let limit = i64::try_from(age.min(self.longest_age).as_secs()).unwrap_or(i64::MAX);
        path.symlink_metadata()
            .is_ok_and(|metadata| self.unix_seconds.saturating_sub(metadata.mtime()) >= limit)
    }

    /// Returns whether a document is there and not old.
    pub(super) fn is_young_document(&self, digest: Digest, age: Duration) -> bool {
        let path = self.directory.document_path(digest);
        path.is_file() && !self.is_old(&path, age)
    }

    /// Returns the blobs whose origins stay recorded.
    pub(super) fn origins(&self) -> HashSet<Digest> {
        // The origins of blobs stay recorded as long as a manifest that names them is kept, so that a
        // node without its registry can make other trees of it.
        let mut origins = self.manifests.clone();
        for &manifest in &self.manifests {
            let named = self.directory.named_by(manifest);
            origins.extend(named.config.into_iter().chain(named.layers));
        }
        // The same is true of the indexes that a kept manifest was chosen from.
        origins.extend(self.facts.indexes.iter().filter_map(ObjectName::document_digest));
        origins
    }
}

impl RecordSweeper {
    /// Counts the records on the disk.
    pub(super) fn load(&self) -> Result<(), StoreError> {
        let counts = self.kinds.iter().map(|kind| kind.load());
        let count = counts.sum::<Result<usize, _>>()?;
        let space = self.directory.units.record().times(count as u64);
        self.directory.catalog.set_records(space);
        Ok(())
    }

    /// Removes old records that lead nowhere. Returns how many were removed.
    pub(super) fn sweep(&self, facts: &Facts, unix_seconds: i64) -> Result<usize, StoreError> {
        let swept = self.sweep_older(facts, unix_seconds, Duration::MAX)?;
        // The running count may have drifted from the number of files.
        self.load()?;
        Ok(swept)
    }

    /// Removes unused records, young ones included, since space is needed. Returns the space that is
    /// freed. Does nothing while the number of trees explains the number of records, unless an
    /// administrator has asked (`is_asked`).
    pub(super) fn sweep_under_pressure(
        &self,
        facts: &Facts,
        unix_seconds: i64,
        is_asked: bool,
    ) -> Result<SpaceAmount, StoreError> {
        let trees = facts.store.objects.keys().filter(|name| name.kind() == ObjectKind::Tree);
        let explained = (trees.count() as u64 + 1).saturating_mul(RECORDS_OF_AN_ARTIFACT);
        let before = self.swept.load(Ordering::Relaxed);
        let is_due = !(0..PAUSE_SECONDS).contains(&unix_seconds.saturating_sub(before));
        let records = self.directory.catalog.records().inodes;
        if !is_asked && (records <= explained || !is_due) {
            return Ok(SpaceAmount::default());
        }
        self.swept.store(unix_seconds, Ordering::Relaxed);
        let age = if is_asked { Duration::ZERO } else { AGE_UNDER_PRESSURE };
        let swept = self.sweep_older(facts, unix_seconds, age)?;
        Ok(self.directory.units.record().times(swept as u64))
    }

    fn sweep_older(
        &self,
        facts: &Facts,
        unix_seconds: i64,
        longest_age: Duration,
    ) -> Result<usize, StoreError> {
        let mut sweep = Sweep::new(&self.directory, facts, unix_seconds, longest_age);
        self.kinds.iter().map(|kind| kind.sweep(&mut sweep)).sum()
    }
}

/// Returns all but the newest `count` of some files.
pub(super) fn all_but_newest(mut paths: Vec<PathBuf>, count: usize) -> Vec<PathBuf> {
    if paths.len() <= count {
        return Vec::new();
    }
    paths.sort_by_cached_key(|path| {
        let changed = path.symlink_metadata().map_or(0, |metadata| metadata.mtime());
        std::cmp::Reverse(changed)
    });
    paths.split_off(count)
}
