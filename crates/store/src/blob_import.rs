//! Blobs that an administrator brings along, in place of a registry's.
//!
//! They are written to staging, hashed on the way, and become downloads that
//! are complete: from there on they go the way of any other blob.

use std::fs::OpenOptions;
use std::io::{Read, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use sha2::Digest as _;

use super::error::{IoContext as _, StoreError};
use super::json_records;
use super::object_catalog::Lease;
use super::space_ledger::{Claim, Ledger, RegistryId, record_of};
use super::space_reservations::{Reservation, SpaceReservations};
use super::staging_folders::Staging;
use super::state_directory::StateDirectory;
use super::stored_documents::Documents;
use super::write_meter::WriteMeter;
use oci_types::Digest;

/// The blobs of one import; what is not handed on goes when this is dropped.
pub struct ImportedBlobs {
    documents: Arc<Documents>,
    space: Arc<SpaceReservations>,
    ledger: Arc<Ledger>,
    meter: Arc<WriteMeter>,
    staging: Staging,
    reservations: Vec<Reservation>,
    /// Leases of the stored documents.
    leases: Mutex<Vec<Lease>>,
}

impl ImportedBlobs {
    pub(super) fn begin(
        directory: &StateDirectory,
        documents: &Arc<Documents>,
        space: &Arc<SpaceReservations>,
        ledger: &Arc<Ledger>,
    ) -> Result<Self, StoreError> {
        Ok(Self {
            documents: Arc::clone(documents),
            space: Arc::clone(space),
            ledger: Arc::clone(ledger),
            meter: Arc::clone(&directory.meter),
            staging: directory.stage()?,
            reservations: Vec::new(),
            leases: Mutex::default(),
        })
    }

    /// Writes a blob of `size` bytes. Returns the digest of its content. The blob is kept only if that is the
    /// expected one.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoRoom`] before anything is written.
    pub fn add(
        &mut self,
        digest: Digest,
        size: u64,
        content: &mut dyn Read,
    ) -> Result<Digest, StoreError> {
        let claim = Claim { blob: digest, bytes: size, inodes: 1 };
        self.reservations.push(self.space.reserve(&[claim])?);
        let path = self.path(digest);
        let failed = |error| StoreError::io("write", &path, error);
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        let mut hasher = sha2::Sha256::new();
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let count = content.read(&mut buffer).map_err(failed)?;
            if count == 0 {
                break;
            }
            hasher.update(&buffer[..count]);
            self.meter.writes(count as u64)?;
            file.write_all(&buffer[..count]).map_err(failed)?;
        }
        let got = Digest::from_bytes(hasher.finalize().into());
        if got != digest {
            std::fs::remove_file(&path).map_err(|error| StoreError::io("remove", &path, error))?;
        }
        Ok(got)
    }

    /// Reads a small blob, at most `limit` bytes of it; none when it was not brought along.
    pub fn read(&self, digest: Digest, limit: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.path(digest);
        let file = std::fs::File::open(&path).if_there("open", &path)?;
        let Some(file) = file else { return Ok(None) };
        let mut content = Vec::new();
        let read = file.take(limit).read_to_end(&mut content);
        read.io_context("read", &path)?;
        Ok(Some(content))
    }

    /// Stores a manifest or a configuration, which stays as long as the import.
    pub fn keep(&self, digest: Digest, content: &[u8]) -> Result<(), StoreError> {
        let lease = self.documents.put(digest, content)?;
        self.leases.lock().push(lease);
        Ok(())
    }

    /// Returns whether the import has the blob.
    pub fn has(&self, digest: Digest) -> bool {
        self.path(digest).exists()
    }

    /// Makes a blob a download from `host` that has just ended.
    pub fn hand_on(&self, host: &str, digest: Digest) -> Result<(), StoreError> {
        let registry = RegistryId::of(host);
        let to = self.ledger.path(digest, registry);
        // What an earlier try has said of its ranges says nothing of this file.
        json_records::remove(&record_of(&to))?;
        std::fs::rename(self.path(digest), &to).io_context("rename", &to)?;
        self.ledger.refresh(digest, registry);
        Ok(())
    }

    fn path(&self, digest: Digest) -> PathBuf {
        self.staging.path().join(digest.hex())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Store;
    use super::super::partial_downloads::Purpose;
    use super::*;

    #[test]
    fn content_that_is_not_what_it_is_called_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path(), crate::tests::options()).expect("a store");
        let mut blobs = store.import_blobs().expect("an import");
        let digest = Digest::of(b"right");
        let found = blobs.add(digest, 5, &mut &b"wrong"[..]).expect("written");
        assert_eq!((found, blobs.has(digest)), (Digest::of(b"wrong"), false));
        blobs.add(digest, 5, &mut &b"right"[..]).expect("written");
        assert_eq!(blobs.read(digest, 3).expect("readable").as_deref(), Some(&b"rig"[..]));
        blobs.hand_on("r.io", digest).expect("handed on");
        assert!(
            store
                .downloads()
                .open("r.io", digest, 5, Purpose::Keep, &|| true)
                .expect("a download")
                .is_verified()
        );
        drop(blobs);
        assert_eq!(std::fs::read_dir(folder.path().join("staging")).expect("a folder").count(), 0);
    }
}
