//! Volumes that follow a tag: the only ones whose content changes while they are mounted.
//!
//! ```text
//! followed/<key>/volume.json              whose volume it is, and what it follows
//! followed/<key>/shown/                   what the pod sees, as a read-only bind
//! followed/<key>/shown/..<v>.<tree>.<n>   version v: its files are hard links of generation n of the tree
//! followed/<key>/shown/..data             leads to the version that is shown
//! followed/<key>/shown/<name>             leads to ..data/<name>, for each name at the top of that version
//! ```
//!
//! A switch renames `..data` over. A version is complete before it has its name here, and never changes afterwards.
//! Names at the top that come are made before the switch, and names that go are removed after it.
//!
//! Nothing here is synced, and nothing outlives a boot: a mount does not either. A process that finds the volumes of
//! its own boot finds every name as the kernel has it, and brings the names at the top in line with `..data`. The
//! volumes of another boot are removed, and made anew from their trees at the next publish.
//!
//! A version holds its tree with a lease, so that content which a pod sees is counted, and read back. Its hard links
//! would outlive the tree.

mod followed_mount;
mod top_names;
mod version_name;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::disk_units::BYTES_PER_INODE;
use super::error::{IoContext as _, StoreError};
use super::folder_listing::names;
use super::object_catalog::Lease;
use super::publication_records::boot_id;
use super::space_amount::SpaceAmount;
use super::space_reservations::{Claim, SpaceReservations};
use super::staging_folders::Staging;
use super::state_directory::StateDirectory;
use super::trees::{Tree, Trees};
use super::{ObjectName, SecurityLabel, TreeKey, durable_rename, json_records};
use followed_mount::FollowedPart;
pub use followed_mount::{FollowKey, MountedContent};
use oci_types::Digest;
use sys::fault;
use sys::mount::MountTable;
use top_names::TopNames;
use version_name::VersionName;

/// Below the state directory.
pub(super) const FOLDER: &str = "followed";
/// The folder of a volume that its pod sees.
const SHOWN: &str = "shown";
/// The link to the version that is shown.
const DATA: &str = "..data";
/// The name of that link before it is renamed over.
const NEXT_DATA: &str = "..data_tmp";
/// The record of a volume.
const RECORD: &str = "volume.json";
/// The most versions of one volume: more than a volume with the shortest interval replaces within [`KEPT`].
pub const MAXIMUM_VERSIONS: usize = 100;
/// The time for which a version stays after it was replaced.
const KEPT: Duration = Duration::from_mins(10);

/// The record of a followed volume: what a later process needs in order to follow it. It holds no secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FollowRecord {
    /// The CSI volume id.
    pub volume_id: String,
    /// The target path.
    pub target: PathBuf,
    /// The hash of the volume's attributes and mount flags.
    pub fingerprint: Digest,
    /// The kernel's boot id when the volume was made.
    pub boot_id: String,
    /// The attributes that the volume's author has set.
    pub attributes: BTreeMap<String, String>,
    /// The pod's namespace, name and uid, as far as the kubelet sent them.
    pub namespace: Option<String>,
    /// The pod's name.
    pub pod: Option<String>,
    /// The pod's uid.
    pub uid: Option<String>,
    /// True if the volume had credentials of its own, which no file holds.
    pub had_credentials: bool,
}

impl FollowRecord {
    /// Returns the key of the volume.
    pub fn key(&self) -> FollowKey {
        FollowKey::new(&self.volume_id, &self.target, self.fingerprint)
    }
}

/// A version that is linked in staging and has no name yet. Dropping it abandons it.
pub struct LinkedVersion {
    staging: Staging,
    root: PathBuf,
    names: TopNames,
    tree: Tree,
    space: SpaceAmount,
}

/// The followed volumes of a store.
pub struct FollowedVolumes {
    directory: Arc<StateDirectory>,
    trees: Arc<Trees>,
    space: Arc<SpaceReservations>,
    /// Held for renames and links at the top alone.
    volumes: Mutex<HashMap<FollowKey, Volume>>,
}

struct Volume {
    target: PathBuf,
    versions: BTreeMap<VersionName, Version>,
    current: Option<VersionName>,
}

struct Version {
    space: SpaceAmount,
    /// The time since which another version is shown.
    replaced: Option<Instant>,
    _tree: Lease,
}

impl FollowedVolumes {
    /// Finds the volumes of earlier processes.
    pub(super) fn open(
        directory: Arc<StateDirectory>,
        trees: Arc<Trees>,
        space: Arc<SpaceReservations>,
    ) -> Result<Self, StoreError> {
        let followed = Self { directory, trees, space, volumes: Mutex::default() };
        let boot = boot_id();
        for key in names(&followed.directory.path(FOLDER))?.iter().filter_map(FollowKey::from_hex) {
            let Some(record) = followed.record(key).filter(|record| record.boot_id == boot) else {
                continue;
            };
            match followed.load(key, record.target) {
                Ok(volume) => drop(followed.volumes.lock().insert(key, volume)),
                Err(error) => tracing::warn!(%error, "a followed volume is not followed any more"),
            }
        }
        Ok(followed)
    }

    fn load(&self, key: FollowKey, target: PathBuf) -> Result<Volume, StoreError> {
        let shown = self.shown(key);
        let current = fs::read_link(shown.join(DATA)).if_there("read", &shown.join(DATA))?;
        let current = current.and_then(|link| VersionName::parse(link.to_str()?));
        let mut versions = BTreeMap::new();
        for name in names(&shown)?.iter().filter_map(|name| VersionName::parse(name)) {
            let tree = self.trees.generation(name.tree, name.generation);
            let units = self.directory.units;
            let space = tree.as_ref().map(|tree| tree.own_space(units)).unwrap_or_default();
            let version = self.version(name, space);
            versions.insert(name, Version { replaced: Some(Instant::now()), ..version });
        }
        let current = current.filter(|name| versions.contains_key(name));
        if let Some(version) = current.and_then(|current| versions.get_mut(&current)) {
            version.replaced = None;
        }
        let volume = Volume { target, versions, current };
        volume.mend(&shown, self.directory.label.as_ref())?;
        Ok(volume)
    }

    fn version(&self, name: VersionName, space: SpaceAmount) -> Version {
        self.directory.catalog.count_followed(space, SpaceAmount::default());
        let tree = ObjectName::tree(name.tree, name.generation);
        Version { space, replaced: None, _tree: self.directory.catalog.lease(tree) }
    }

    /// Returns the record of a volume.
    pub fn record(&self, key: FollowKey) -> Option<FollowRecord> {
        let record: FollowRecord = json_records::read(&self.folder(key).join(RECORD))?;
        (record.key() == key).then_some(record)
    }

    /// Writes the record of a volume that is mounted and has lost it.
    pub fn put_record(&self, record: &FollowRecord) -> Result<(), StoreError> {
        let path = self.folder(record.key()).join(RECORD);
        json_records::write_hint(&self.directory.staging(), &path, record)
    }

    /// Returns the tree that a volume shows now.
    pub fn current(&self, key: FollowKey) -> Option<Tree> {
        let name = self.volumes.lock().get(&key)?.current?;
        self.trees.generation(name.tree, name.generation)
    }

    /// Returns the number of versions of a volume.
    pub fn versions(&self, key: FollowKey) -> usize {
        self.volumes.lock().get(&key).map_or(0, |volume| volume.versions.len())
    }

    /// Links a version that shows a tree. Nothing of it is visible yet. Blocking, and slow for large trees.
    ///
    /// # Errors
    ///
    /// [`StoreError::CannotFollow`] if names at the top of the tree are names of the volume itself, or too many.
    pub fn link(&self, tree: &Tree) -> Result<LinkedVersion, StoreError> {
        let names = TopNames::of_tree(tree)?;
        let record = &tree.record;
        let inodes = record.own_inodes.saturating_add(names.len());
        let bytes = inodes.saturating_mul(BYTES_PER_INODE).saturating_add(record.own_bytes);
        let claim = Claim { blob: tree.key.digest(), bytes, inodes };
        let _room = self.space.reserve(&[claim])?;
        let staging = self.directory.stage()?;
        let (root, space) = tree.copy(&self.directory, &staging)?;
        fault::point("follow.linked").io_context("link", &root)?;
        let links = SpaceAmount { bytes: 0, inodes: names.len() };
        Ok(LinkedVersion { staging, root, names, tree: tree.clone(), space: space.plus(links) })
    }

    /// Makes a volume show a tree before it is mounted. Returns the open folder to mount. The catalog knows the
    /// volume's publication already, so that nothing removes what is made here. Blocking.
    pub fn publish(&self, record: &FollowRecord, tree: &Tree) -> Result<OwnedFd, StoreError> {
        let key = record.key();
        let is_shown =
            |name: VersionName| (name.tree, name.generation) == (tree.key, tree.generation);
        let current = self.volumes.lock().get(&key).and_then(|volume| volume.current);
        if !current.is_some_and(is_shown) {
            let version = self.link(tree)?;
            self.create(record)?;
            self.switch(key, version)?;
        }
        if self.record(key).as_ref() != Some(record) {
            self.put_record(record)?;
        }
        let shown = self.shown(key);
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        open(&shown, flags, Mode::empty()).io_context("open", &shown)
    }

    /// Makes the folder of a volume, in place of one that an earlier boot left.
    fn create(&self, record: &FollowRecord) -> Result<(), StoreError> {
        let key = record.key();
        let mut volumes = self.volumes.lock();
        if volumes.contains_key(&key) {
            return Ok(());
        }
        let (folder, shown) = (self.folder(key), self.shown(key));
        if folder.symlink_metadata().is_ok() {
            if mounted_parts()?.iter().any(|part| part.key == key) {
                let what = "is still mounted, and cannot be read";
                return Err(StoreError::Foreign { path: folder, what });
            }
            drop(self.take_away(&folder)?);
        }
        fs::create_dir(&folder).io_context("create", &folder)?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700))
            .io_context("create", &folder)?;
        fs::create_dir(&shown).io_context("create", &shown)?;
        fs::set_permissions(&shown, fs::Permissions::from_mode(0o755))
            .io_context("create", &shown)?;
        if let Some(label) = self.directory.label.as_ref() {
            let labelled = fs::File::open(&shown).and_then(|folder| {
                use std::os::fd::AsFd as _;
                label.apply(folder.as_fd())
            });
            labelled.io_context("label", &shown)?;
        }
        let target = record.target.clone();
        volumes.insert(key, Volume { target, versions: BTreeMap::new(), current: None });
        Ok(())
    }

    /// Shows a version from now on. Returns false if its tree is shown already. Blocking.
    ///
    /// # Errors
    ///
    /// [`StoreError::CannotFollow`] if the volume has too many versions, or is gone. The earlier version stays then, as
    /// after any failure.
    pub fn switch(&self, key: FollowKey, version: LinkedVersion) -> Result<bool, StoreError> {
        let shown = self.shown(key);
        let LinkedVersion { staging, root, names, tree, space } = version;
        // Before the lock, which other volumes wait for.
        let is_full = |volume: &Volume| volume.versions.len() >= MAXIMUM_VERSIONS;
        if self.volumes.lock().get(&key).is_some_and(is_full) {
            self.sweep()?;
        }
        let mut volumes = self.volumes.lock();
        let gone = || StoreError::CannotFollow { what: "it is not mounted any more".to_owned() };
        let volume = volumes.get_mut(&key).ok_or_else(gone)?;
        if is_full(volume) {
            let what = format!(
                "it has {MAXIMUM_VERSIONS} versions that are mounted or were replaced less than \
                 {} minutes ago: push the tag less often, or use a longer interval",
                KEPT.as_secs() / 60
            );
            return Err(StoreError::CannotFollow { what });
        }
        let before = volume.current;
        let number =
            volume.versions.keys().map(|name| name.number).max().map_or(1, |last| last + 1);
        let name = VersionName { number, tree: tree.key, generation: tree.generation };
        if before
            .is_some_and(|before| (before.tree, before.generation) == (name.tree, name.generation))
        {
            return Ok(false);
        }
        let failed = |error| StoreError::io("switch", &shown, error);
        fs::rename(&root, shown.join(name.to_string())).map_err(failed)?;
        let replaced = Some(Instant::now());
        let version = self.version(name, space);
        volume.versions.insert(name, Version { replaced, ..version });
        let switched = (|| -> std::io::Result<()> {
            fault::point("follow.named")?;
            names.add(&shown, self.directory.label.as_ref())?;
            fault::point("follow.added")?;
            names_next(&shown, &name.to_string(), self.directory.label.as_ref())?;
            fs::rename(shown.join(NEXT_DATA), shown.join(DATA))
        })();
        if let Err(error) = switched {
            // The next switch removes names that stay after this.
            let _ = volume.mend(&shown, self.directory.label.as_ref());
            if fs::rename(shown.join(name.to_string()), &root).is_ok()
                && let Some(version) = volume.versions.remove(&name)
            {
                self.uncount(&version);
            }
            return Err(failed(error));
        }
        volume.current = Some(name);
        for (of, version) in &mut volume.versions {
            version.replaced = if *of == name { None } else { version.replaced.or(replaced) };
        }
        // Shown. A name that should have gone leads nowhere, and goes with the next switch.
        let removed = fault::point("follow.switched").and_then(|()| names.remove_others(&shown));
        let removed = removed.and_then(|()| fault::point("follow.removed"));
        drop(volumes);
        if let Err(error) = removed {
            tracing::warn!(%error, path = %shown.display(), "old names of a followed volume stay");
        }
        drop(staging);
        Ok(true)
    }

    /// Removes old versions, and volumes that nothing shows and no record names. Returns how many versions and volumes
    /// are gone. Blocking.
    pub fn sweep(&self) -> Result<usize, StoreError> {
        self.sweep_older(kept())
    }

    fn sweep_older(&self, kept: Duration) -> Result<usize, StoreError> {
        let keys: Vec<_> =
            names(&self.directory.path(FOLDER))?.iter().filter_map(FollowKey::from_hex).collect();
        if keys.is_empty() {
            return Ok(0);
        }
        // The mounts first: what is mounted later was replaced later, or has a record.
        let parts = mounted_parts()?;
        let mounted: HashSet<_> = parts.iter().map(|part| part.key).collect();
        let mut leftovers = Vec::new();
        for key in keys {
            let mut volumes = self.volumes.lock();
            let is_published =
                |volume: &Volume| self.directory.catalog.is_published(&volume.target);
            let is_needed = mounted.contains(&key) || volumes.get(&key).is_some_and(is_published);
            if !is_needed {
                leftovers.push(self.take_away(&self.folder(key))?);
                if let Some(volume) = volumes.remove(&key) {
                    volume.versions.values().for_each(|version| self.uncount(version));
                }
                continue;
            }
            let Some(volume) = volumes.get_mut(&key) else { continue };
            let shown = self.shown(key);
            let is_mounted = |name: &VersionName| {
                parts.iter().any(|part| part.key == key && part.version == Some(*name))
            };
            let old = volume.versions.iter().filter(|(name, version)| {
                version.replaced.is_some_and(|since| since.elapsed() >= kept) && !is_mounted(name)
            });
            let old: Vec<_> = old.map(|(name, _)| *name).collect();
            for name in old {
                leftovers.push(self.take_away(&shown.join(name.to_string()))?);
                if let Some(version) = volume.versions.remove(&name) {
                    self.uncount(&version);
                }
            }
        }
        // Removed under no lock.
        let count = leftovers.len();
        drop(leftovers);
        Ok(count)
    }

    /// Moves a folder to staging, whose end removes it.
    fn take_away(&self, folder: &Path) -> Result<Staging, StoreError> {
        let staging = self.directory.stage()?;
        let grave = staging.path().join(durable_rename::temporary_name());
        fs::rename(folder, grave).if_there("remove", folder)?;
        Ok(staging)
    }

    fn uncount(&self, version: &Version) {
        self.directory.catalog.count_followed(SpaceAmount::default(), version.space);
    }

    fn folder(&self, key: FollowKey) -> PathBuf {
        self.directory.path(FOLDER).join(key.to_string())
    }

    fn shown(&self, key: FollowKey) -> PathBuf {
        self.folder(key).join(SHOWN)
    }
}

impl Volume {
    /// Makes the names at the top those of the version that is shown.
    fn mend(&self, shown: &Path, label: Option<&SecurityLabel>) -> Result<(), StoreError> {
        let next = shown.join(NEXT_DATA);
        fs::remove_file(&next).if_there("remove", &next)?;
        let names = match self.current {
            Some(name) => TopNames::of_folder(&shown.join(name.to_string()))?,
            None => TopNames::default(),
        };
        let mended = names.add(shown, label).and_then(|()| names.remove_others(shown));
        mended.io_context("mend", shown)
    }
}

impl LinkedVersion {
    /// Returns the tree that it shows.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }
}

/// Reads the tree that a volume shows now, from a state directory that may not be open as a store.
pub fn shown_tree(state: &Path, key: FollowKey) -> Option<(TreeKey, u32)> {
    let shown = state.join(FOLDER).join(key.to_string()).join(SHOWN);
    let name = VersionName::parse(fs::read_link(shown.join(DATA)).ok()?.to_str()?)?;
    Some((name.tree, name.generation))
}

/// Makes the link that a rename puts in the place of `..data`.
fn names_next(shown: &Path, version: &str, label: Option<&SecurityLabel>) -> std::io::Result<()> {
    let next = shown.join(NEXT_DATA);
    match fs::remove_file(&next) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    top_names::symbolic_link(version, &next, label)
}

/// Returns the time for which a version stays after it was replaced.
fn kept() -> Duration {
    fault::milliseconds("CSI_OCI_FOLLOW_KEPT").map_or(KEPT, Duration::from_millis)
}

/// Returns the parts of followed volumes that the kernel says are mounted, whatever the records say.
fn mounted_parts() -> Result<Vec<FollowedPart>, StoreError> {
    let table = MountTable::read().io_context("read", Path::new("/proc/self/mountinfo"))?;
    Ok(table.iter().filter_map(|mount| FollowedPart::of(&mount.origin)).collect())
}

#[cfg(test)]
mod tests;
