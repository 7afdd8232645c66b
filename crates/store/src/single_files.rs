//! Single-file layers: one inode for each (blob, mode, owner), linked into every
//! tree that shows it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::Digest as _;

use super::disk_units::{BYTES_PER_INODE, DiskUnits};
use super::durable_rename;
use super::error::{IoContext as _, StoreError};
use super::folder_listing::{current_generation, names};
use super::inode_metadata::set_owner_and_mode;
use super::object_catalog::{Entry, Lease};
use super::partial_downloads::Partial;
use super::space_ledger::Claim;
use super::staging_folders::Staging;
use super::state_directory::StateDirectory;
use super::write_meter::WriteMeter;
use super::{FileKey, ObjectName};
use oci_types::Digest;
use sys::fault;
use unpack::Permissions;

/// Folders around a file: of its blob, and of its mode and owner.
const FOLDERS_OF_A_FILE: u64 = 2;

/// Content that starts so is meant to be executed.
const EXECUTABLE_MAGIC: [&[u8]; 2] = [b"\x7fELF", b"#!"];

/// A single-file layer in the store; it stays there as long as this value lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredFile {
    /// The key of the file.
    pub key: FileKey,
    /// The number of its generation.
    pub generation: u32,
    /// The path of the file.
    pub path: PathBuf,
    pub(super) lease: Lease,
}

/// The single-file layers of a store.
pub struct Files {
    pub(super) directory: Arc<StateDirectory>,
}

impl Claim {
    /// Returns the claim of a single file with the folders around it.
    pub fn of_file(blob: Digest, size: u64) -> Self {
        let inodes = 1 + FOLDERS_OF_A_FILE;
        Self { blob, bytes: size.saturating_add(inodes * BYTES_PER_INODE), inodes }
    }
}

/// Returns the entry of a file of this size.
fn entry(units: DiskUnits, size: u64) -> Entry {
    let bytes = units.blocks(size).saturating_add(FOLDERS_OF_A_FILE * units.folder);
    Entry::new(bytes, 1 + FOLDERS_OF_A_FILE)
}

/// Reads the entry of a file on the disk; none where there is no file.
pub(super) fn read_entry(units: DiskUnits, path: &Path) -> Option<Entry> {
    let metadata = path.symlink_metadata().ok().filter(std::fs::Metadata::is_file)?;
    // Content may have any modification time that its author chose.
    Some(Entry { last_used: metadata.ctime(), ..entry(units, metadata.len()) })
}

impl Files {
    /// The file's current inode, if it is in the store.
    pub fn get(&self, key: FileKey) -> Result<Option<StoredFile>, StoreError> {
        let current = current_generation(&self.file_folder(key))?;
        let Some(generation) = current else { return Ok(None) };
        let held = self.directory.hold(&ObjectName::file(key, generation));
        Ok(held.map(|(lease, path)| StoredFile { key, generation, path, lease }))
    }

    /// Any inode with a blob's content, whatever its mode.
    pub fn any_of(&self, digest: Digest) -> Result<Option<StoredFile>, StoreError> {
        for variant in names(&self.directory.path("files").join(digest.hex()))? {
            let Some(permissions) = permissions_of(&variant) else { continue };
            if let Some(file) = self.get(FileKey { digest, permissions })? {
                return Ok(Some(file));
            }
        }
        Ok(None)
    }

    /// Makes a verified download a file of the store.
    pub fn commit(&self, key: FileKey, partial: &Partial) -> Result<StoredFile, StoreError> {
        debug_assert!(partial.is_verified(), "only verified content gets a name");
        let mut staging = self.directory.stage()?;
        let path = staging.path().join("file");
        partial.move_to(&path)?;
        staging.borrow(&path, partial.path());
        fault::point("file.moved").io_context("rename", &path)?;
        self.finish_file(key, &path)?;
        staging.staged.wrote(|| path.clone());
        self.name_file(key, staging, &path)
    }

    /// Makes a small blob that the manifest carried inline a file of the store.
    pub fn commit_inline(&self, key: FileKey, content: &[u8]) -> Result<StoredFile, StoreError> {
        debug_assert_eq!(Digest::of(content), key.digest, "only verified content gets a name");
        let mut staging = self.directory.stage()?;
        let path = staging.path().join("file");
        let failed = |error| StoreError::io("write", &path, error);
        let mut file = File::create_new(&path).map_err(failed)?;
        file.write_all(content).map_err(failed)?;
        staging.staged.wrote(|| path.clone());
        drop(file);
        self.finish_file(key, &path)?;
        self.name_file(key, staging, &path)
    }

    /// Makes a second inode of content that is here with another mode or owner.
    /// The copy is hashed: what the source's disk has lost since is not passed on.
    pub fn copy(&self, key: FileKey, source: &Path) -> Result<StoredFile, StoreError> {
        let mut staging = self.directory.stage()?;
        let path = staging.path().join("file");
        let to = durable_rename::create_private(&path).io_context("create", &path)?;
        staging.staged.wrote(|| path.clone());
        let copied = copy(source, &path, to, &self.directory.meter)?;
        if copied != key.digest {
            let what = format!("its content has the digest {copied}");
            return Err(StoreError::Damaged { path: source.to_owned(), what });
        }
        self.finish_file(key, &path)?;
        self.name_file(key, staging, &path)
    }

    fn finish_file(&self, key: FileKey, path: &Path) -> Result<(), StoreError> {
        let finish = || -> std::io::Result<()> {
            let file = File::open(path)?;
            set_owner_and_mode(&file, key.permissions)?;
            self.directory.label.as_ref().map_or(Ok(()), |label| label.apply(file.as_fd()))
        };
        finish().io_context("finish", path)
    }

    fn name_file(
        &self,
        key: FileKey,
        staging: Staging,
        path: &Path,
    ) -> Result<StoredFile, StoreError> {
        let folder = self.file_folder(key);
        let size = path.metadata().io_context("look at", path)?.len();
        if let Some(content) = folder.parent() {
            durable_rename::create_folder(content)?;
        }
        let (generation, lease) =
            self.directory.commit(staging, path, &folder, entry(self.directory.units, size))?;
        Ok(StoredFile { key, generation, path: folder.join(generation.to_string()), lease })
    }

    fn file_folder(&self, key: FileKey) -> PathBuf {
        let FileKey { digest, permissions: Permissions { mode, uid, gid } } = key;
        self.directory.path("files").join(digest.hex()).join(format!("{mode:04o}-{uid}-{gid}"))
    }
}

/// The inverse of how a key's folder is called.
pub(super) fn permissions_of(variant: &str) -> Option<Permissions> {
    let mut parts = variant.split('-');
    let mode = u32::from_str_radix(parts.next()?, 8).ok()?;
    Some(Permissions { mode, uid: parts.next()?.parse().ok()?, gid: parts.next()?.parse().ok()? })
}

/// Returns whether content starts as something to execute.
pub fn is_executable(file: &mut File) -> std::io::Result<bool> {
    use std::os::unix::fs::FileExt as _;
    let mut start = [0; 4];
    let mut length = 0;
    while length < start.len() {
        match file.read_at(&mut start[length..], length as u64)? {
            0 => break,
            count => length += count,
        }
    }
    Ok(starts_executable(&start[..length]))
}

/// As [`is_executable`], for content in memory.
pub fn starts_executable(content: &[u8]) -> bool {
    EXECUTABLE_MAGIC.iter().any(|magic| content.starts_with(magic))
}

fn copy(
    source: &Path,
    path: &Path,
    mut to: File,
    meter: &WriteMeter,
) -> Result<Digest, StoreError> {
    let mut from = File::open(source).io_context("open", source)?;
    let mut hasher = sha2::Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let count = from.read(&mut buffer).io_context("read", source)?;
        if count == 0 {
            return Ok(Digest::from_bytes(hasher.finalize().into()));
        }
        hasher.update(&buffer[..count]);
        meter.writes(count as u64)?;
        to.write_all(&buffer[..count]).io_context("write", path)?;
    }
}
