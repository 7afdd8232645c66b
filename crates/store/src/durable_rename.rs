//! Makes names durable: write everything, one barrier, then rename.
//!
//! The crash contract in one sentence: a name exists only for content that was
//! synced before the name was made.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use super::error::{IoContext as _, StoreError};
use sys::background;
use sys::fault;

/// Up to so many files and folders are synced one by one; beyond, one `syncfs`
/// is cheaper, although it flushes what others wrote to the filesystem too.
const FEW: usize = 16;

/// The most bytes of one write of large content. The kernel takes memory for its cache in blocks of
/// the size of a write, and small ones are at hand: with 400 KiB the copying took four times as
/// long on a virtual machine, whose host had to find them first.
pub const WRITE_BYTES: usize = 32 << 10;

/// A path that the kernel takes in one call, with room to spare; a deep tree's may be longer.
const LONGEST_PATH: usize = 3072;

/// Makes staged content durable. One `syncfs` runs at a time: a second one at
/// once would only wait for the same disk.
#[derive(Default)]
pub struct Barrier(Mutex<()>);

/// The files that a barrier has to make durable.
pub struct Staged {
    /// Opened before the first write, so that a write-back error since then is reported.
    filesystem: File,
    /// Every file and folder, as long as they are few. Open: the kernel may forget a file that
    /// is not open, and with it that writing it back has failed.
    few: Option<Vec<(PathBuf, File)>>,
}

impl Staged {
    /// Starts to write under `folder`.
    pub fn begin(folder: &Path) -> Result<Self, StoreError> {
        let filesystem = File::open(folder).io_context("open", folder)?;
        Ok(Self { filesystem, few: Some(Vec::new()) })
    }

    /// Takes note of a file or folder that the barrier must cover, while its writer has it open.
    pub fn wrote(&mut self, path: impl FnOnce() -> PathBuf) {
        let Some(few) = &mut self.few else { return };
        let path = path();
        let is_one_of_few = few.len() < FEW && path.as_os_str().len() < LONGEST_PATH;
        match is_one_of_few.then(|| File::open(&path)) {
            Some(Ok(file)) => few.push((path, file)),
            // The sync of the whole filesystem needs no file of its own.
            Some(Err(_)) | None => self.few = None,
        }
    }
}

impl Barrier {
    /// Returns when everything noted is on the disk.
    pub fn pass(&self, staged: &Staged) -> Result<(), StoreError> {
        background::yield_to_pods();
        if let Some(few) = &staged.few {
            return few
                .iter()
                .try_for_each(|(path, file)| file.sync_all().io_context("sync", path));
        }
        let _turn = self.0.lock();
        nix::unistd::syncfs(&staged.filesystem).io_context("sync", Path::new("the filesystem"))
    }
}

/// Syncs one file or folder.
pub fn sync(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|file| file.sync_all()).io_context("sync", path)
}

/// Renames and makes the new name durable.
pub fn rename(from: &Path, to: &Path) -> Result<(), StoreError> {
    rename_unsynced(from, to)?;
    sync_name(to)
}

/// Renames; a power loss may undo it before [`sync_name`].
pub fn rename_unsynced(from: &Path, to: &Path) -> Result<(), StoreError> {
    let failed = |error| StoreError::io("rename", to, error);
    fault::point("rename.asked").map_err(failed)?;
    std::fs::rename(from, to).map_err(failed)
}

/// Makes a new name durable.
pub fn sync_name(path: &Path) -> Result<(), StoreError> {
    let failed = |error| StoreError::io("rename", path, error);
    fault::point("rename.done").map_err(failed)?;
    sync_parent(path)?;
    fault::point("rename.durable").map_err(failed)
}

/// Writes a small file durably: a reader finds the old content or the new.
/// It is made in `staging`, where a crash leaves what the next start sweeps.
pub fn write(staging: &Path, path: &Path, content: &[u8]) -> Result<(), StoreError> {
    let temporary = write_staged(staging, path, content, true)?;
    rename(&temporary, path).inspect_err(|_| {
        // What has no name yet is worth nothing.
        let _ = std::fs::remove_file(&temporary);
    })
}

/// Writes a small file so that a reader finds the old content or the new, and
/// a power loss may leave neither: for hints.
pub fn write_unsynced(staging: &Path, path: &Path, content: &[u8]) -> Result<(), StoreError> {
    let temporary = write_staged(staging, path, content, false)?;
    let renamed = fault::point("hint.written")
        .and_then(|()| std::fs::rename(&temporary, path))
        .and_then(|()| fault::point("hint.renamed"));
    renamed.map_err(|error| {
        let _ = std::fs::remove_file(&temporary);
        StoreError::io("rename", path, error)
    })
}

/// Makes a folder and its name durable. Returns true if the folder was not there before.
pub fn create_folder(path: &Path) -> Result<bool, StoreError> {
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {
            sync_parent(path)?;
            fault::point("folder.created").io_context("create", path)?;
            Ok(true)
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(StoreError::io("create", path, error)),
    }
}

/// Makes a folder and those above it, and their names durable, as far as they are not there.
pub fn create_folders(path: &Path) -> Result<(), StoreError> {
    match (create_folder(path), path.parent()) {
        (Err(StoreError::Io { source, .. }), Some(parent))
            if source.kind() == std::io::ErrorKind::NotFound =>
        {
            create_folders(parent)?;
            create_folder(path).map(|_| ())
        }
        (created, _) => created.map(|_| ()),
    }
}

/// A name in staging that no other writer has.
pub fn temporary_name() -> String {
    let mut random = [0; 8];
    // Without randomness the process number and a clock would do; the kernel has no reason to refuse.
    if getrandom::fill(&mut random).is_err() {
        random = std::process::id().to_le_bytes().repeat(2).try_into().unwrap_or_default();
    }
    format!("{:016x}", u64::from_le_bytes(random))
}

/// Returns whether [`temporary_name`] makes such names.
pub fn is_temporary_name(name: &str) -> bool {
    name.len() == 16 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Creates a file that only its owner can read, for writing.
pub fn create_private(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

fn write_staged(
    staging: &Path,
    path: &Path,
    content: &[u8],
    synced: bool,
) -> Result<PathBuf, StoreError> {
    let temporary = staging.join(temporary_name());
    let written = create_private(&temporary).and_then(|mut file| {
        file.write_all(content)?;
        if synced {
            fault::point("record.written")?;
            file.sync_all()?;
            fault::point("record.synced")?;
        }
        Ok(())
    });
    match written {
        Ok(()) => Ok(temporary),
        Err(error) => {
            // A half-written file is swept at start; removing it now only saves room.
            let _ = std::fs::remove_file(&temporary);
            Err(StoreError::io("write", path, error))
        }
    }
}

fn sync_parent(path: &Path) -> Result<(), StoreError> {
    path.parent().map_or(Ok(()), sync)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_files_are_synced_as_they_were_written_and_not_looked_for_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut staged = Staged::begin(folder.path()).expect("begun");
        let path = folder.path().join("file");
        std::fs::write(&path, "content").expect("written");
        staged.wrote(|| path.clone());
        // Another file of that name has no write-back error of the first.
        std::fs::remove_file(&path).expect("removed");
        assert!(staged.few.is_some());
        Barrier::default().pass(&staged).expect("the file itself is synced");
        // One that cannot be opened is covered by the sync of all.
        staged.wrote(|| path.clone());
        assert!(staged.few.is_none());
        Barrier::default().pass(&staged).expect("all is synced");
    }
}
