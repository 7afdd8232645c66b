//! Downloads on their way: `partial/<digest>-<host>`, a prefix of the blob, unsynced.
//!
//! Nothing in it is trusted: whoever continues one hashes its prefix again. The
//! registry's host is part of the name, so that nobody completes, and thereby
//! gets to see, what another host has sent of a blob whose digest he knows.

use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use sha2::Digest as _;

use super::error::StoreError;
use super::{Store, keys};
use crate::oci::Digest;

/// A blob's bytes so far. One flight owns it.
#[derive(Debug)]
pub struct Partial {
    digest: Digest,
    path: PathBuf,
    file: File,
    length: u64,
    hasher: sha2::Sha256,
}

impl Store {
    /// Opens the download of a blob, hashing what an earlier one left. At most
    /// `size` bytes of that count.
    pub fn partial(&self, host: &str, digest: Digest, size: u64) -> Result<Partial, StoreError> {
        let name = format!("{}-{}", digest.hex(), &keys::hash(&[host]).hex()[..16]);
        let path = self.path("partial").join(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|error| StoreError::io("open", &path, error))?;
        let mut partial = Partial { digest, path, file, length: 0, hasher: sha2::Sha256::new() };
        let length = partial.file.metadata().map_or(0, |metadata| metadata.len());
        if length > size {
            partial.restart()?;
            return Ok(partial);
        }
        let mut buffer = vec![0; 256 * 1024];
        loop {
            match partial.file.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    partial.hasher.update(&buffer[..count]);
                    partial.length += count as u64;
                }
                // Unreadable bytes are as good as none.
                Err(_) => {
                    partial.restart()?;
                    break;
                }
            }
        }
        Ok(partial)
    }
}

impl Partial {
    /// Bytes so far.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Adds bytes.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        use std::os::unix::fs::FileExt as _;
        self.file
            .write_all_at(bytes, self.length)
            .map_err(|error| StoreError::io("write", &self.path, error))?;
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Forgets all bytes.
    pub fn restart(&mut self) -> Result<(), StoreError> {
        self.file.set_len(0).map_err(|error| StoreError::io("truncate", &self.path, error))?;
        self.length = 0;
        self.hasher = sha2::Sha256::new();
        Ok(())
    }

    /// The digest of the bytes so far.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::from_bytes(self.hasher.clone().finalize().into())
    }

    /// Whether the bytes are the blob.
    #[must_use]
    pub fn is_verified(&self) -> bool {
        self.digest() == self.digest
    }

    /// The file, for reading from its start.
    pub fn reader(&self) -> Result<File, StoreError> {
        File::open(&self.path).map_err(|error| StoreError::io("open", &self.path, error))
    }

    /// Where it lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes it: its content has another name now, or is worth nothing.
    pub fn discard(self) -> Result<(), StoreError> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(StoreError::io("remove", &self.path, error))
            }
            _ => Ok(()),
        }
    }
}
