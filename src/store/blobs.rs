//! Blobs that are kept as the registry sent them: manifests, indexes, configurations.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{MutexGuard, PoisonError};

use super::error::StoreError;
use super::{Store, durable, records};
use crate::oci::Digest;

impl Store {
    /// Keeps a small blob.
    ///
    /// # Panics
    ///
    /// Never with content that was verified: the name must be the content's digest.
    pub fn put_blob(&self, digest: Digest, content: &[u8]) -> Result<(), StoreError> {
        debug_assert_eq!(Digest::of(content), digest, "only verified content gets a name");
        let path = self.blob_path(digest);
        // What is kept already is kept for as long as what is new; what has become damaged is replaced.
        self.blob_is_used(digest)?;
        if std::fs::read(&path).is_ok_and(|kept| kept == content) {
            return Ok(());
        }
        durable::write(&self.staging(), &path, content)
    }

    /// Reads a blob back and verifies it; none when it is not there or damaged.
    pub fn blob(&self, digest: Digest) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.blob_path(digest);
        match std::fs::read(&path) {
            Ok(content) if Digest::of(&content) == digest => Ok(Some(content)),
            Ok(_) => {
                tracing::warn!(%digest, "a kept manifest is damaged and will be fetched again");
                std::fs::remove_file(&path)
                    .map_err(|error| StoreError::io("remove", &path, error))?;
                Ok(None)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::io("read", &path, error)),
        }
    }

    /// Says that somebody begins to work with a blob that is kept: what it stands for may have no
    /// tree yet, and would else be taken for what an evicted artifact has left.
    pub fn blob_is_used(&self, digest: Digest) -> Result<(), StoreError> {
        let path = self.blob_path(digest);
        let _turn = self.blob_ages();
        let touched =
            File::open(&path).and_then(|file| file.set_modified(std::time::SystemTime::now()));
        match touched {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(StoreError::io("touch", &path, error))
            }
            _ => Ok(()),
        }
    }

    /// Removes a blob that was not used for a while. One that is being used again at this moment stays.
    pub(super) fn remove_old_blob(
        &self,
        path: &Path,
        is_old: &impl Fn(&Path) -> bool,
    ) -> Result<bool, StoreError> {
        let _turn = self.blob_ages();
        if !is_old(path) {
            return Ok(false);
        }
        records::remove(path)?;
        Ok(true)
    }

    fn blob_ages(&self) -> MutexGuard<'_, ()> {
        self.0.blob_ages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn blob_path(&self, digest: Digest) -> PathBuf {
        self.path("blobs").join(digest.hex())
    }
}
