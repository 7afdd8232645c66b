//! Signatures that were verified, so that a warm start needs no registry.
//!
//! ```text
//! access/<hash of repository>/v-<manifest>-<demand>.json   the manifest fulfils this demand there
//! ```
//!
//! The demand's name is a hash of its keys and formats: a changed policy finds no
//! verdict and has the artifact verified anew. Only what was found good is kept.

use std::path::PathBuf;

use super::Store;
use super::error::StoreError;
use oci_types::{Digest, Repository};

impl Store {
    /// Whether the manifest has been found to fulfil the demand.
    #[must_use]
    pub fn is_verified(&self, repository: &Repository, manifest: Digest, demand: Digest) -> bool {
        self.verdict_path(repository, manifest, demand).exists()
    }

    /// Remembers that the manifest fulfils the demand. Losing it costs a verification.
    pub fn put_verified(
        &self,
        repository: &Repository,
        manifest: Digest,
        demand: Digest,
    ) -> Result<(), StoreError> {
        self.put_access(&self.verdict_path(repository, manifest, demand))
    }

    fn verdict_path(&self, repository: &Repository, manifest: Digest, demand: Digest) -> PathBuf {
        let name = format!("v-{}-{}", manifest.hex(), demand.hex());
        self.access_path(&repository.to_string(), &name)
    }
}
