//! Manifests that an administrator has imported.
//!
//! ```text
//! access/<hash of repository>/i-<manifest>.json   the administrator imported this manifest
//! ```

use std::path::PathBuf;
use std::sync::Arc;

use super::{AccessFolder, AccessRecord, RecordSubject};
use crate::error::StoreError;
use oci_types::{Digest, Repository};

const OF_MANIFEST: AccessRecord = AccessRecord::new("i-", RecordSubject::Manifest);
/// The kinds of records of this file.
pub(super) const KINDS: &[AccessRecord] = &[OF_MANIFEST];

/// The records of imports.
pub struct ImportRecords(pub(crate) Arc<AccessFolder>);

impl ImportRecords {
    /// Returns whether the administrator has imported the manifest as one of the repository.
    pub fn contains(&self, repository: &Repository, manifest: Digest) -> bool {
        self.path(repository, manifest).exists()
    }

    /// Remembers that the administrator has imported the manifest as one of the repository: its
    /// content counts as preloaded. The import also records where each blob came from
    /// ([`put_blob`](super::blob_origins::Origins::put_blob)).
    pub fn put(&self, repository: &Repository, manifest: Digest) -> Result<(), StoreError> {
        self.0.put(&self.path(repository, manifest))
    }

    fn path(&self, repository: &Repository, manifest: Digest) -> PathBuf {
        self.0.path(&repository.to_string(), &OF_MANIFEST.name(manifest))
    }
}
