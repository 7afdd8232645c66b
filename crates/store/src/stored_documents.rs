//! Blobs that are kept as the registry sent them: manifests, indexes, configurations.

use std::fs::File;
use std::sync::Arc;

use super::error::{IoContext as _, StoreError};
use super::object_catalog::Lease;
use super::space_ledger::Claim;
use super::space_reservations::SpaceReservations;
use super::state_directory::StateDirectory;
use super::stored_manifests::document_entry;
use super::{ObjectName, durable_rename};
use oci_types::Digest;

/// Documents of a store: manifests, indexes and configurations.
pub struct Documents {
    pub(super) directory: Arc<StateDirectory>,
    pub(super) space: Arc<SpaceReservations>,
}

impl Documents {
    /// Stores a document. It stays as long as the returned lease, or as long as a tree needs it.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoRoom`] when there is no space for it even after evicting.
    ///
    /// # Panics
    ///
    /// Never with content that was verified: the name must be the content's digest.
    pub fn put(&self, digest: Digest, content: &[u8]) -> Result<Lease, StoreError> {
        debug_assert_eq!(Digest::of(content), digest, "only verified content gets a name");
        let lease = self.hold(digest);
        let path = self.directory.document_path(digest);
        let name = ObjectName::document(digest);
        let entry = document_entry(self.directory.units, content.len() as u64);
        if std::fs::read(&path).is_ok_and(|kept| kept == content) {
            // An earlier call may have failed between the rename and here.
            self.directory.catalog.add(name, entry);
            self.mark_used(digest)?;
            return Ok(lease);
        }
        let claim = Claim { blob: digest, bytes: entry.bytes, inodes: entry.inodes };
        let _space = self.space.reserve(&[claim])?;
        durable_rename::write(&self.directory.staging(), &path, content)?;
        // A damaged document, which this one replaces, may have had another size.
        self.directory.catalog.remove_document(&name);
        self.directory.catalog.add(name, entry);
        Ok(lease)
    }

    /// Leases a document, which need not be stored yet, so that it is not evicted.
    #[must_use]
    pub fn hold(&self, digest: Digest) -> Lease {
        self.directory.catalog.lease(ObjectName::document(digest))
    }

    /// Reads a blob back and verifies it; none when it is not there or damaged.
    pub fn get(&self, digest: Digest) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.directory.document_path(digest);
        let content = std::fs::read(&path).if_there("read", &path)?;
        if content.as_ref().is_some_and(|content| Digest::of(content) != digest) {
            tracing::warn!(%digest, "a kept manifest is damaged and will be fetched again");
            std::fs::remove_file(&path).io_context("remove", &path)?;
            self.directory.catalog.remove_document(&ObjectName::document(digest));
            return Ok(None);
        }
        Ok(content)
    }

    /// Returns the size of a stored document in bytes; none where it is not stored.
    pub fn size(&self, digest: Digest) -> Result<Option<u64>, StoreError> {
        let path = self.directory.document_path(digest);
        Ok(path.metadata().if_there("look at", &path)?.map(|metadata| metadata.len()))
    }

    /// Notes that work with a kept blob begins: what it stands for may have no
    /// tree yet, and would else be taken for what an evicted artifact has left.
    pub fn mark_used(&self, digest: Digest) -> Result<(), StoreError> {
        let path = self.directory.document_path(digest);
        let now = jiff::Timestamp::now().as_second();
        self.directory.catalog.used(&ObjectName::document(digest), now);
        let touched =
            File::open(&path).and_then(|file| file.set_modified(std::time::SystemTime::now()));
        touched.if_there("touch", &path).map(|_| ())
    }
}
