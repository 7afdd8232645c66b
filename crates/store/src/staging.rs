//! Where objects are made before they have a name.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::Instant;

use super::catalog::{Entry, Lease};
use super::durable::{self, Staged};
use super::error::StoreError;
use super::{ObjectKind, ObjectName, Store};
use std::sync::atomic::Ordering;
use sys::fault;

/// Damaged trees that wait to be reported; a node has fewer that are shown.
const UNREPORTED: usize = 4096;

/// A folder for one object on its way; dropping it abandons the object.
#[derive(Debug)]
pub struct Staging {
    path: PathBuf,
    /// What the barrier has to cover.
    pub staged: Staged,
    committed: bool,
    /// A verified download that was moved here, and where it came from.
    borrowed: Option<(PathBuf, PathBuf)>,
}

impl Store {
    /// Makes a new, empty folder for an object.
    pub(super) fn stage(&self) -> Result<Staging, StoreError> {
        let path = self.staging().join(durable::temporary_name());
        std::fs::create_dir(&path).map_err(|error| StoreError::io("create", &path, error))?;
        let staged = Staged::begin(&path)?;
        Ok(Staging { path, staged, committed: false, borrowed: None })
    }

    /// Whether anything can be made here: an empty file is, and goes again.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn probe(&self) -> Result<(), StoreError> {
        let path = self.staging().join(durable::temporary_name());
        std::fs::write(&path, b"x").map_err(|error| StoreError::io("write", &path, error))?;
        std::fs::remove_file(&path).map_err(|error| StoreError::io("remove", &path, error))
    }

    /// Where small records are made.
    pub(super) fn staging(&self) -> PathBuf {
        self.path("staging")
    }

    /// Marks a generation of an object (`<key>/<n>`), and of every tree that links it: it is
    /// never published or linked again, the next one is made afresh, and whoever has it mounted
    /// keeps it. Returns the trees that were sound until now.
    pub fn mark_damaged(&self, generation: &Path) -> Result<Vec<ObjectName>, StoreError> {
        self.mark(generation)?;
        let Some(name) = self.object_at(generation) else { return Ok(Vec::new()) };
        if name.kind() == ObjectKind::Tree {
            return Ok(vec![name]);
        }
        self.mark_trees_of(&name)
    }

    /// Marks the trees that link a damaged object; says which were not marked before.
    pub(super) fn mark_trees_of(&self, object: &ObjectName) -> Result<Vec<ObjectName>, StoreError> {
        if object.kind() == ObjectKind::Tree {
            return Ok(Vec::new());
        }
        self.load_catalog()?;
        let trees = self.catalog().sound_trees_of(object);
        for tree in &trees {
            self.mark(&self.root().join(tree.as_str()))?;
        }
        Ok(trees)
    }

    fn mark(&self, generation: &Path) -> Result<(), StoreError> {
        durable::write(&self.staging(), &mark_of(generation), b"")?;
        self.0.damages.fetch_add(1, Ordering::Relaxed);
        if let Some(name) = self.object_at(generation) {
            self.catalog().damaged(&name);
            let mut trees = self.0.damaged_trees.lock().unwrap_or_else(PoisonError::into_inner);
            if name.kind() == ObjectKind::Tree && trees.len() < UNREPORTED {
                trees.push(name);
            }
        }
        Ok(())
    }

    /// Takes the trees that were found damaged since the last call.
    #[must_use]
    pub fn take_damaged_trees(&self) -> Vec<ObjectName> {
        let mut trees = self.0.damaged_trees.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *trees)
    }

    /// Whether a generation was marked.
    #[must_use]
    pub fn is_damaged(&self, object: &ObjectName) -> bool {
        mark_of(&self.root().join(object.as_str())).symlink_metadata().is_ok()
    }

    /// Gives what was staged the next generation of a name: the commit point. The lease is
    /// taken before, so that nobody evicts what was just made.
    pub(super) fn commit(
        &self,
        mut staging: Staging,
        what: &Path,
        key_folder: &Path,
        entry: Entry,
    ) -> Result<(u32, Lease), StoreError> {
        let failed = |error| StoreError::io("name", key_folder, error);
        let since = Instant::now();
        let staged = fault::point("commit.staged").map_err(failed);
        if let Err(error) = staged.and_then(|()| self.barrier().pass(&staging.staged)) {
            // What the kernel could not write it calls written from then on, and the next sync
            // finds nothing wrong with it: no download again, whatever its digest.
            staging.borrowed = None;
            return Err(error);
        }
        tracing::debug!(object = %key_folder.display(), took = ?since.elapsed(), "synced");
        fault::point("commit.synced").map_err(failed)?;
        let (generation, path, name, lease) = loop {
            durable::create_folders(key_folder)?;
            let generation = newest_generation(key_folder)?.map_or(1, |newest| newest + 1);
            let path = key_folder.join(generation.to_string());
            let name = self.object_at(&path).ok_or(std::io::ErrorKind::InvalidInput);
            let name = name.map_err(|kind| StoreError::io("name", &path, kind.into()))?;
            let lease = self.catalog().lease(name.clone());
            match durable::rename_unsynced(what, &path) {
                // A flight that nobody waited for may end beside its successor; and the folder
                // of a key goes with the last generation that is evicted from it.
                Err(StoreError::Io { source, .. })
                    if is_taken(&source) || is_gone(&source, what) => {}
                renamed => break renamed.map(|()| (generation, path, name, lease))?,
            }
        };
        // What was staged is the object now, or an emptied folder around it.
        staging.committed = what == staging.path;
        // Others find it from here on, also if the name cannot be made durable: its content is,
        // so they may use it, and what they may use has to be known, to be counted and to go.
        self.catalog().add(name.clone(), entry);
        self.was_read(&name);
        durable::sync_name(&path)?;
        Ok((generation, lease))
    }

    /// The object that lies there.
    pub(super) fn object_at(&self, path: &Path) -> Option<ObjectName> {
        ObjectName::parse(path.strip_prefix(self.root()).ok()?.to_str()?)
    }
}

impl Staging {
    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What lies at `here` was a download at `there`, and is one again if it gets no name.
    pub(super) fn borrow(&mut self, here: &Path, there: &Path) {
        self.borrowed = Some((here.to_owned(), there.to_owned()));
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.committed {
            if let Some((here, there)) = &self.borrowed
                && here.symlink_metadata().is_ok()
            {
                // What cannot be given back is fetched again.
                let _ = std::fs::set_permissions(here, std::fs::Permissions::from_mode(0o600));
                let _ = std::fs::rename(here, there);
            }
            // What stays for any reason is swept at the next start.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

fn mark_of(generation: &Path) -> PathBuf {
    generation.with_extension("damaged")
}

fn is_taken(error: &std::io::Error) -> bool {
    let kind = error.kind();
    matches!(kind, std::io::ErrorKind::DirectoryNotEmpty | std::io::ErrorKind::AlreadyExists)
}

/// Whether it was the new name's folder that was not there.
fn is_gone(error: &std::io::Error, what: &Path) -> bool {
    error.kind() == std::io::ErrorKind::NotFound && what.symlink_metadata().is_ok()
}

/// The newest generation that may be published: the highest that is not marked damaged.
pub(super) fn current_generation(key_folder: &Path) -> Result<Option<u32>, StoreError> {
    // Nearly every object has one generation; one look saves a listing on the hot path.
    let exists = |name: &str| key_folder.join(name).symlink_metadata().is_ok();
    if exists("1") && !exists("1.damaged") && !exists("2") {
        return Ok(Some(1));
    }
    let names = names(key_folder)?;
    let damaged = |number: u32| names.iter().any(|name| *name == format!("{number}.damaged"));
    let numbers = names.iter().filter_map(|name| name.parse::<u32>().ok());
    Ok(numbers.filter(|&number| !damaged(number)).max())
}

fn newest_generation(key_folder: &Path) -> Result<Option<u32>, StoreError> {
    let number = |name: &String| name.split('.').next()?.parse::<u32>().ok();
    Ok(names(key_folder)?.iter().filter_map(number).max())
}

fn is_no_folder(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory)
}

/// The names in a folder; none where there is no folder.
pub(super) fn names(folder: &Path) -> Result<Vec<String>, StoreError> {
    let failed = |error| StoreError::io("list", folder, error);
    let entries = match std::fs::read_dir(folder) {
        // Whatever is not a folder holds nothing of ours.
        Err(error) if is_no_folder(&error) => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        Ok(entry.map_err(failed)?.file_name().to_string_lossy().into_owned())
    };
    entries.map(name).collect()
}

/// Removes what earlier processes left. What has not a name of theirs is somebody else's: a folder
/// that was there before this driver may be called like one of ours.
pub(super) fn sweep(folder: &Path) -> Result<(), StoreError> {
    for name in names(folder)? {
        let path = folder.join(&name);
        if !durable::is_temporary_name(&name) {
            tracing::warn!(path = %path.display(), "this is not the driver's own, and stays");
            continue;
        }
        // A leftover costs room, never correctness: one that resists is left for the next start.
        if let Err(error) = std::fs::remove_dir_all(&path).or_else(|_| std::fs::remove_file(&path))
        {
            tracing::warn!(path = %path.display(), %error, "a leftover in staging stays");
        }
    }
    Ok(())
}
