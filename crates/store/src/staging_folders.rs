//! Folders in which objects are made before they have a name.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::durable_rename::{self, Staged};
use super::error::{IoContext as _, StoreError};
use super::folder_listing::{names, newest_generation};
use super::object_catalog::{Entry, Lease};
use super::state_directory::StateDirectory;
use sys::fault;

/// A folder for one object on its way; dropping it abandons the object.
pub struct Staging {
    path: PathBuf,
    /// The files that the barrier has to cover.
    pub staged: Staged,
    committed: bool,
    /// A verified download that was moved here, and where it came from.
    borrowed: Option<(PathBuf, PathBuf)>,
}

impl StateDirectory {
    /// Makes a new, empty folder for an object.
    pub(super) fn stage(&self) -> Result<Staging, StoreError> {
        let path = self.staging().join(durable_rename::temporary_name());
        std::fs::create_dir(&path).io_context("create", &path)?;
        let staged = Staged::begin(&path)?;
        Ok(Staging { path, staged, committed: false, borrowed: None })
    }

    /// Gives what was staged the next generation of a name: the commit point. The lease is
    /// taken before, so that what was just made is not evicted.
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
        if let Err(error) = staged.and_then(|()| self.barrier.pass(&staging.staged)) {
            // What the kernel could not write it calls written from then on, and the next sync
            // finds nothing wrong with it: no download again, whatever its digest.
            staging.borrowed = None;
            return Err(error);
        }
        tracing::debug!(object = %key_folder.display(), took = ?since.elapsed(), "synced");
        fault::point("commit.synced").map_err(failed)?;
        let (generation, path, name, lease) = loop {
            durable_rename::create_folders(key_folder)?;
            let generation = newest_generation(key_folder)?.map_or(1, |newest| newest + 1);
            let path = key_folder.join(generation.to_string());
            let name = self.object_at(&path).ok_or(std::io::ErrorKind::InvalidInput);
            let name = name.map_err(|kind| StoreError::io("name", &path, kind.into()))?;
            let lease = self.catalog.lease(name.clone());
            match durable_rename::rename_unsynced(what, &path) {
                // A flight without waiters may end beside its successor; and the folder
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
        self.catalog.add(name.clone(), entry);
        self.read_back.was_read(&name);
        durable_rename::sync_name(&path)?;
        Ok((generation, lease))
    }
}

impl Staging {
    /// Returns the path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Notes that the file at `here` was the download at `there`, and becomes it again without a name.
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

fn is_taken(error: &std::io::Error) -> bool {
    let kind = error.kind();
    matches!(kind, std::io::ErrorKind::DirectoryNotEmpty | std::io::ErrorKind::AlreadyExists)
}

/// Returns whether it was the new name's folder that was not there.
fn is_gone(error: &std::io::Error, what: &Path) -> bool {
    error.kind() == std::io::ErrorKind::NotFound && what.symlink_metadata().is_ok()
}

/// Removes what earlier processes left. What has not a name of theirs is foreign: a folder
/// that was there before this driver may be called like one of ours.
pub(super) fn sweep(folder: &Path) -> Result<(), StoreError> {
    for name in names(folder)? {
        let path = folder.join(&name);
        if !durable_rename::is_temporary_name(&name) {
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
