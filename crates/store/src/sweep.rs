//! Small records that nothing needs any more: what an evicted artifact leaves.
//!
//! Resolutions and proofs are small, but a node that lives for years sees many, and one that is
//! attacked sees many in an hour. Old ones are removed when no tree, no pin and no running pull uses
//! their manifest. When space is needed, a minute is old. For one manifest only the newest ones are
//! kept, up to a bound.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Store;
use super::error::StoreError;
use super::eviction::{Facts, Goal};
use super::gc::Now;
use super::object::{ObjectKind, ObjectName};
use super::resolutions::Resolution;
use super::staging::names;
use super::{TreeKey, records};
use oci_types::Digest;

/// Longer than any pull that is still wanted goes on between two of its records.
const AGE: Duration = Duration::from_hours(24);
/// Age of a record that is removed when space is needed. It is longer than a publish takes from
/// resolving its reference to pulling, which leases the manifest.
const AGE_UNDER_PRESSURE: Duration = Duration::from_mins(1);
/// Least time between two sweeps for want of space.
const PAUSE_SECONDS: i64 = 60;
/// Resolutions that are kept for one manifest, at most.
const RESOLUTIONS_OF_A_MANIFEST: usize = 64;
/// Proofs that are kept for one manifest of one repository, at most.
const PROOFS_OF_A_MANIFEST: usize = 1024;
/// Records of a tree in normal use, at most. Where there are more, most belong to no tree.
const RECORDS_OF_AN_ARTIFACT: u64 = 32;

/// Content whose records are kept.
struct KeptContent {
    manifests: HashSet<Digest>,
    /// Blobs whose origins stay recorded.
    origins: HashSet<Digest>,
}

impl Store {
    /// Removes records that lead nowhere; says how many. Blocking.
    pub fn sweep_records(&self, now: Now) -> Result<usize, StoreError> {
        let facts = self.facts(now)?;
        let swept = self.sweep_older(&facts, now, AGE)?;
        // The running count may have drifted from the number of files.
        self.count_records()?;
        Ok(swept)
    }

    /// Removes unused records, young ones included, since space is needed. Returns the space that is
    /// freed. Does nothing while the number of trees explains the number of records, unless an
    /// administrator has asked (`is_asked`).
    pub(super) fn sweep_under_pressure(
        &self,
        facts: &Facts,
        now: Now,
        is_asked: bool,
    ) -> Result<Goal, StoreError> {
        let trees = facts.store.objects.keys().filter(|name| name.kind() == ObjectKind::Tree);
        let explained = (trees.count() as u64 + 1).saturating_mul(RECORDS_OF_AN_ARTIFACT);
        let before = self.0.swept.load(Ordering::Relaxed);
        let is_due = !(0..PAUSE_SECONDS).contains(&now.unix_seconds.saturating_sub(before));
        if !is_asked && (self.catalog().records().inodes <= explained || !is_due) {
            return Ok(Goal::default());
        }
        self.0.swept.store(now.unix_seconds, Ordering::Relaxed);
        let age = if is_asked { Duration::ZERO } else { AGE_UNDER_PRESSURE };
        let swept = self.sweep_older(facts, now, age)?;
        Ok(self.units().record().times(swept as u64))
    }

    fn sweep_older(&self, facts: &Facts, now: Now, age: Duration) -> Result<usize, StoreError> {
        let objects = facts.store.objects.iter();
        let mut manifests: HashSet<_> = objects.filter_map(|(_, entry)| entry.manifest).collect();
        manifests.extend(&facts.store.pinned);
        // Manifests of running pulls.
        manifests.extend(facts.store.leased.iter().filter_map(ObjectName::document_digest));
        let limit = i64::try_from(age.as_secs()).unwrap_or(i64::MAX);
        let is_old = |path: &Path| {
            let age = |metadata: fs::Metadata| now.unix_seconds.saturating_sub(metadata.mtime());
            path.symlink_metadata().is_ok_and(|metadata| age(metadata) >= limit)
        };
        let mut swept = 0;
        let mut by_manifest = HashMap::<_, Vec<PathBuf>>::new();
        for (path, resolution) in records::list::<Resolution>(&self.path("resolutions"))? {
            let manifest = resolution.manifest;
            // A manifest that was used just now is one of a pull that is under way.
            let is_young = !is_old(&path) || self.blob_is_young(manifest, &is_old);
            if manifests.contains(&manifest) || is_young {
                manifests.insert(manifest);
                by_manifest.entry(manifest).or_default().push(path);
            } else {
                swept += usize::from(self.remove_resolution(&path)?);
            }
        }
        for paths in by_manifest.into_values() {
            for path in all_but_newest(paths, RESOLUTIONS_OF_A_MANIFEST) {
                if is_old(&path) {
                    swept += usize::from(self.remove_resolution(&path)?);
                }
            }
        }
        // The origins of blobs stay recorded as long as a manifest that names them is kept, so that a
        // node without its registry can make other trees of it.
        let mut origins = manifests.clone();
        for &manifest in &manifests {
            let named = self.named_by(manifest);
            origins.extend(named.config.into_iter().chain(named.layers));
        }
        // The same is true of the indexes that a kept manifest was chosen from.
        let indexes = facts.indexes.iter().filter_map(ObjectName::document_digest);
        origins.extend(indexes);
        Ok(swept + self.sweep_access(&KeptContent { manifests, origins }, &is_old)?)
    }

    fn blob_is_young(&self, blob: Digest, is_old: &impl Fn(&Path) -> bool) -> bool {
        let path = self.blob_path(blob);
        path.is_file() && !is_old(&path)
    }

    /// Proofs of manifests and trees that are not here. Where a blob came from that no manifest names
    /// stays known only while it is young: asking again costs one request.
    fn sweep_access(
        &self,
        kept: &KeptContent,
        is_old: &impl Fn(&Path) -> bool,
    ) -> Result<usize, StoreError> {
        let access = self.path("access");
        let mut swept = 0;
        for place in names(&access)? {
            let place = access.join(place);
            // What is behind a link is not the store's.
            if place.is_symlink() {
                continue;
            }
            let mut is_used = false;
            let mut by_manifest = HashMap::<_, Vec<PathBuf>>::new();
            for name in names(&place)? {
                let key = |kind: &str| Some(name.strip_prefix(kind)?.get(..64)?.to_owned());
                let digest = |kind: &str| Digest::from_hex(&key(kind)?);
                let manifest = ["m-", "a-", "i-", "v-"].into_iter().find_map(digest);
                let tree = key("t-").and_then(|text| TreeKey::from_hex(&text));
                let needed = match (manifest, tree, digest("b-")) {
                    (Some(manifest), ..) => {
                        by_manifest.entry(manifest).or_default().push(place.join(&name));
                        kept.manifests.contains(&manifest)
                    }
                    (_, Some(tree), _) => self.path("trees").join(tree.to_string()).exists(),
                    (.., Some(blob)) => kept.origins.contains(&blob),
                    // What is known of the repository itself goes with the last of the others.
                    _ if name == "refuses-anonymous.json" => continue,
                    _ => !name.starts_with("b-"),
                };
                if needed || !self.sweep_proof(&place.join(&name), is_old)? {
                    is_used = true;
                } else {
                    swept += 1;
                }
            }
            for proofs in by_manifest.into_values() {
                for path in all_but_newest(proofs, PROOFS_OF_A_MANIFEST) {
                    swept += usize::from(self.sweep_proof(&path, is_old)?);
                }
            }
            if !is_used {
                swept +=
                    usize::from(self.sweep_proof(&place.join("refuses-anonymous.json"), is_old)?);
            }
            let _turn = self.proofs().hold();
            // Empty ones go; the others refuse.
            if fs::remove_dir(&place).is_ok() {
                self.catalog().count_records(Goal::default(), self.units().record());
                swept += 1;
            }
        }
        Ok(swept)
    }

    /// Removes a record if it is old. One that is being renewed at this moment is not.
    fn sweep_proof(
        &self,
        path: &Path,
        is_old: &impl Fn(&Path) -> bool,
    ) -> Result<bool, StoreError> {
        let _turn = self.proofs().hold();
        if !is_old(path) {
            return Ok(false);
        }
        self.remove_proof(path)
    }
}

/// Returns all but the newest `count` of some files.
fn all_but_newest(mut paths: Vec<PathBuf>, count: usize) -> Vec<PathBuf> {
    if paths.len() <= count {
        return Vec::new();
    }
    paths.sort_by_cached_key(|path| {
        let changed = path.symlink_metadata().map_or(0, |metadata| metadata.mtime());
        std::cmp::Reverse(changed)
    });
    paths.split_off(count)
}
