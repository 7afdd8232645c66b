//! Documents on the disk, and the blobs that a stored manifest names.

use std::fs::File;
use std::io::BufReader;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use serde::Deserialize;

use super::ObjectName;
use super::disk_units::DiskUnits;
use super::error::StoreError;
use super::folder_listing::names;
use super::object_catalog::Entry;
use super::state_directory::StateDirectory;
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
    config: Option<RawBlob>,
    #[serde(default)]
    layers: Vec<RawBlob>,
}

#[derive(Deserialize)]
struct RawBlob {
    digest: Option<String>,
}

/// Returns the entry of a document of this size.
pub(super) fn document_entry(units: DiskUnits, size: u64) -> Entry {
    Entry::new(units.blocks(size), 1)
}

impl StateDirectory {
    /// Returns the path of a document.
    pub(super) fn document_path(&self, digest: Digest) -> PathBuf {
        self.path("blobs").join(digest.hex())
    }

    /// Returns the documents that a tree of a manifest needs: the manifest, and its configuration
    /// where that is stored.
    pub(super) fn documents_of(&self, manifest: Digest) -> Vec<ObjectName> {
        let config = self.named_by(manifest).config;
        let config = config.filter(|&config| self.document_path(config).exists());
        [manifest].into_iter().chain(config).map(ObjectName::document).collect()
    }

    /// Returns the blobs that a stored manifest names. Only their digests are held in memory.
    pub(super) fn named_by(&self, manifest: Digest) -> NamedBlobs {
        let file = File::open(self.document_path(manifest));
        let read = file.map(|file| serde_json::from_reader(BufReader::new(file)));
        let Ok(Ok(RawManifest { config, layers })) = read else { return NamedBlobs::default() };
        let digest = |named: RawBlob| named.digest?.parse().ok();
        NamedBlobs {
            config: config.and_then(digest),
            layers: layers.into_iter().filter_map(digest).collect(),
        }
    }

    /// Adds all documents to the catalog.
    pub(super) fn load_documents(&self) -> Result<(), StoreError> {
        let folder = self.path("blobs");
        for name in names(&folder)? {
            let Some(digest) = Digest::from_hex(&name) else { continue };
            let Ok(metadata) = folder.join(name).symlink_metadata() else { continue };
            if metadata.is_file() {
                let entry = document_entry(self.units, metadata.len());
                let entry = Entry { last_used: metadata.mtime(), ..entry };
                self.catalog.add(ObjectName::document(digest), entry);
            }
        }
        Ok(())
    }
}
