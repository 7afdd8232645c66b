//! Blobs that are kept as the registry sent them: manifests, indexes, configurations.

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

use serde::Deserialize;

use super::catalog::Lease;
use super::error::StoreError;
use super::room::Claim;
use super::{ObjectName, Store, durable};
use oci_types::Digest;

/// The blobs that a manifest names.
#[derive(Debug, Default)]
pub(super) struct NamedBlobs {
    pub(super) config: Option<Digest>,
    pub(super) layers: Vec<Digest>,
}

/// The part of a manifest that names blobs.
#[derive(Deserialize)]
struct RawManifest {
    #[serde(default)]
    config: Option<RawBlob>,
    #[serde(default)]
    layers: Vec<RawBlob>,
}

#[derive(Deserialize)]
struct RawBlob {
    #[serde(default)]
    digest: Option<String>,
}

impl Store {
    /// Stores a document. It stays as long as the returned lease, or as long as a tree needs it.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoRoom`] when there is no space for it even after evicting.
    ///
    /// # Panics
    ///
    /// Never with content that was verified: the name must be the content's digest.
    pub fn put_blob(&self, digest: Digest, content: &[u8]) -> Result<Lease, StoreError> {
        debug_assert_eq!(Digest::of(content), digest, "only verified content gets a name");
        let lease = self.hold_blob(digest);
        let path = self.blob_path(digest);
        let (name, entry) =
            (ObjectName::document(digest), self.units().document(content.len() as u64));
        if std::fs::read(&path).is_ok_and(|kept| kept == content) {
            // An earlier call may have failed between the rename and here.
            self.catalog().add(name, entry);
            self.blob_is_used(digest)?;
            return Ok(lease);
        }
        let claim = Claim { blob: digest, bytes: entry.bytes, inodes: entry.inodes };
        let _space = self.reserve(&[claim])?;
        durable::write(&self.staging(), &path, content)?;
        // A damaged document, which this one replaces, may have had another size.
        self.catalog().remove_document(&name);
        self.catalog().add(name, entry);
        Ok(lease)
    }

    /// Leases a document, which need not be stored yet, so that it is not evicted.
    #[must_use]
    pub fn hold_blob(&self, digest: Digest) -> Lease {
        self.catalog().lease(ObjectName::document(digest))
    }

    /// Returns the documents that a tree of a manifest needs: the manifest, and its configuration
    /// where that is stored.
    pub(super) fn documents_of(&self, manifest: Digest) -> Vec<ObjectName> {
        let config = self.named_by(manifest).config;
        let config = config.filter(|&config| self.blob_path(config).exists());
        [manifest].into_iter().chain(config).map(ObjectName::document).collect()
    }

    /// Returns the blobs that a stored manifest names. Only their digests are held in memory.
    pub(super) fn named_by(&self, manifest: Digest) -> NamedBlobs {
        let file = File::open(self.blob_path(manifest));
        let read = file.map(|file| serde_json::from_reader(BufReader::new(file)));
        let Ok(Ok(RawManifest { config, layers })) = read else { return NamedBlobs::default() };
        let digest = |named: RawBlob| named.digest?.parse().ok();
        NamedBlobs {
            config: config.and_then(digest),
            layers: layers.into_iter().filter_map(digest).collect(),
        }
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
                self.catalog().remove_document(&ObjectName::document(digest));
                Ok(None)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::io("read", &path, error)),
        }
    }

    /// Returns the size of a stored document in bytes; none where it is not stored.
    pub fn blob_size(&self, digest: Digest) -> Result<Option<u64>, StoreError> {
        let path = self.blob_path(digest);
        match path.metadata() {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::io("look at", &path, error)),
        }
    }

    /// Says that somebody begins to work with a blob that is kept: what it stands for may have no
    /// tree yet, and would else be taken for what an evicted artifact has left.
    pub fn blob_is_used(&self, digest: Digest) -> Result<(), StoreError> {
        let path = self.blob_path(digest);
        let now = jiff::Timestamp::now().as_second();
        self.catalog().used(&ObjectName::document(digest), now);
        let touched =
            File::open(&path).and_then(|file| file.set_modified(std::time::SystemTime::now()));
        match touched {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(StoreError::io("touch", &path, error))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn blob_path(&self, digest: Digest) -> PathBuf {
        self.path("blobs").join(digest.hex())
    }
}
