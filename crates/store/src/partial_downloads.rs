//! Downloads on their way, written in place and hashed in order behind, unsynced.
//!
//! ```text
//! partial/<digest>-<host>          the blob's bytes, each at its place
//! partial/<digest>-<host>.ranges   which of them are there, as JSON; missing while they are a prefix
//! ```
//!
//! Nothing in it is trusted: a pull that continues one hashes what is there again, and a
//! record that lies is found out by the blob's digest. The registry's host is part
//! of the name, so that no pod can complete, and thereby see, what another
//! host has sent of a blob whose digest the pod knows.
//!
//! A download that becomes a file of the store is written to the disk as it comes. That
//! of an archive is not: it goes when its layer is synced, mostly before the kernel has
//! written any of it.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::Digest as _;

use super::byte_ranges::Ranges;
use super::durable_rename::WRITE_BYTES;
use super::error::{IoContext as _, StoreError};
use super::growing_download::{Follower, Growth};
use super::json_records;
use super::space_ledger::{Ledger, OpenDownload, RegistryId, record_of};
use super::state_directory::StateDirectory;
use super::write_meter::WriteMeter;
use oci_types::Digest;
use sys::mount::syscalls;

/// Read back at once.
const BUFFER: usize = 256 << 10;
/// After so many bytes the kernel is told to write them: then the last sync has little left to
/// do, and few pages are dirty when memory is short.
const WRITE_BACK: u64 = 8 << 20;
/// After so many bytes the record of ranges is written again: as much is fetched twice after a crash.
const RECORD: u64 = 4 << 20;

/// The use of a download after it is verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A file of the store.
    Keep,
    /// It is unpacked, and goes.
    Unpack,
}

/// A blob's bytes so far. One flight owns it.
pub struct Partial {
    digest: Digest,
    size: u64,
    purpose: Purpose,
    path: PathBuf,
    staging: PathBuf,
    file: Arc<File>,
    written: Ranges,
    /// Bytes from the start that went into the hasher.
    hashed: u64,
    hasher: sha2::Sha256,
    growth: Arc<Growth>,
    meter: Arc<WriteMeter>,
    /// Bytes since the kernel was told to write, and since the record was written.
    unflushed: u64,
    unrecorded: u64,
    has_record: bool,
    /// It stays as long as this.
    open: OpenDownload,
}

/// The downloads of a store.
pub struct Downloads {
    pub(super) directory: Arc<StateDirectory>,
    pub(super) ledger: Arc<Ledger>,
}

impl Downloads {
    /// Opens the download of a blob of `size` bytes, and hashes the prefix that an earlier one left.
    /// Ends early once the download is not wanted any more, since a large prefix takes long to hash;
    /// the prefix stays.
    pub fn open(
        &self,
        host: &str,
        digest: Digest,
        size: u64,
        purpose: Purpose,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<Partial, StoreError> {
        let open = self.ledger.open(digest, RegistryId::of(host));
        let path = open.path();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .io_context("open", &path)?;
        let length = file.metadata().map_or(0, |metadata| metadata.len());
        let record: Option<Vec<(u64, u64)>> = json_records::read(&record_of(&path));
        let has_record = record.is_some();
        let ranges = record.unwrap_or_else(|| vec![(0, length)]);
        let mut partial = Partial {
            digest,
            size,
            purpose,
            path,
            staging: self.directory.staging(),
            file: Arc::new(file),
            written: ranges.into_iter().map(|(start, end)| start..end.min(length)).collect(),
            hashed: 0,
            hasher: sha2::Sha256::new(),
            growth: Arc::default(),
            meter: Arc::clone(&self.directory.meter),
            unflushed: 0,
            unrecorded: 0,
            has_record,
            open,
        };
        // Unreadable bytes are as good as none, and so is what is longer than the blob.
        if length > size {
            partial.restart()?;
            return Ok(partial);
        }
        match partial.catch_up(is_wanted) {
            Ok(true) => {}
            Ok(false) => {
                let unwanted = std::io::ErrorKind::Interrupted.into();
                return Err(StoreError::io("hash", &partial.path, unwanted));
            }
            Err(_) => partial.restart()?,
        }
        Ok(partial)
    }
}

impl Partial {
    /// Bytes that are there, wherever.
    pub fn length(&self) -> u64 {
        self.written.bytes()
    }

    /// Returns the ranges that are missing, in order.
    pub fn missing(&self) -> Vec<Range<u64>> {
        self.written.missing(self.size)
    }

    /// Puts bytes in their place. What follows the hashed prefix is hashed from memory; what lies
    /// beyond is read back when the prefix reaches it.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let end = offset + bytes.len() as u64;
        self.meter.writes(bytes.len() as u64)?;
        if offset > self.hashed && !self.has_record {
            // Before the file's length says more than is there.
            self.record()?;
        }
        let is_next = offset == self.hashed;
        let mut position = offset;
        for piece in bytes.chunks(WRITE_BYTES) {
            self.file.write_all_at(piece, position).io_context("write", &self.path)?;
            position += piece.len() as u64;
            if is_next {
                // It is in the processor's cache now.
                self.hasher.update(piece);
            }
        }
        self.written.insert(offset..end);
        self.open.set_bytes(self.length());
        self.unflushed += bytes.len() as u64;
        self.unrecorded += bytes.len() as u64;
        if is_next {
            self.hashed = end;
            self.catch_up(&|| true).io_context("read", &self.path)?;
            self.growth.grow(self.hashed);
        }
        if self.unflushed >= WRITE_BACK && self.purpose == Purpose::Keep {
            self.unflushed = 0;
            // Where the filesystem cannot, the sync at the end does all the work.
            let _ = syscalls::start_write_back(self.file.as_fd());
        }
        if self.has_record && self.unrecorded >= RECORD {
            self.record()?;
        }
        Ok(())
    }

    /// Hashes what is there behind the prefix; false when that was no longer wanted.
    fn catch_up(&mut self, is_wanted: &dyn Fn() -> bool) -> std::io::Result<bool> {
        let end = self.written.end_from(self.hashed);
        if end == self.hashed {
            return Ok(true);
        }
        let mut buffer = vec![0; BUFFER];
        while self.hashed < end {
            if !is_wanted() {
                return Ok(false);
            }
            let wanted = usize::try_from(end - self.hashed).unwrap_or(BUFFER).min(BUFFER);
            match self.file.read_at(&mut buffer[..wanted], self.hashed)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                read => {
                    self.hasher.update(&buffer[..read]);
                    self.hashed += read as u64;
                    self.growth.grow(self.hashed);
                }
            }
        }
        Ok(true)
    }

    /// Forgets all bytes.
    pub fn restart(&mut self) -> Result<(), StoreError> {
        self.growth.restart();
        self.file.set_len(0).io_context("truncate", &self.path)?;
        self.open.set_bytes(0);
        json_records::remove(&record_of(&self.path))?;
        self.has_record = false;
        self.written = Ranges::default();
        self.hashed = 0;
        self.hasher = sha2::Sha256::new();
        Ok(())
    }

    /// Records the ranges that are there, for the next pull.
    pub fn record(&mut self) -> Result<(), StoreError> {
        let ranges: Vec<_> = self.written.iter().map(|range| (range.start, range.end)).collect();
        json_records::write_hint(&self.staging, &record_of(&self.path), &ranges)?;
        self.has_record = true;
        self.unrecorded = 0;
        Ok(())
    }

    /// The digest of the prefix so far.
    pub fn digest(&self) -> Digest {
        Digest::from_bytes(self.hasher.clone().finalize().into())
    }

    /// Returns whether the bytes are those of the blob.
    pub fn is_verified(&self) -> bool {
        self.hashed == self.size && self.digest() == self.digest
    }

    /// A reader from the start that waits for what is not there yet.
    pub fn follow(&self) -> Follower {
        Follower::new(Arc::clone(&self.file), &self.growth, self.size)
    }

    /// The file, for reading from its start.
    pub fn reader(&self) -> Result<File, StoreError> {
        File::open(&self.path).io_context("open", &self.path)
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the bytes another name: they are a file of the store now.
    pub(super) fn move_to(&self, path: &Path) -> Result<(), StoreError> {
        std::fs::rename(&self.path, path).io_context("rename", path)?;
        json_records::remove(&record_of(&self.path))
    }

    /// Removes it: its content has another name now, or is worth nothing.
    pub fn discard(self) -> Result<(), StoreError> {
        json_records::remove(&record_of(&self.path))?;
        json_records::remove(&self.path)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        self.growth.end();
        // A full disk or a lost power costs what is not written down, and no more.
        if self.has_record && self.unrecorded > 0 && self.path.exists() {
            let _ = self.record();
        }
    }
}
