//! Signatures that were verified, so that a warm start needs no registry.
//!
//! ```text
//! access/<hash of repository>/v-<manifest>-<demand>.json   the manifest fulfils this demand there
//! ```
//!
//! The demand's name is a hash of its keys and formats: a changed policy finds no
//! verdict and has the artifact verified anew. Only what was found good is kept.

use std::path::PathBuf;
use std::sync::Arc;

use super::{AccessFolder, AccessRecord, RecordSubject};
use crate::error::StoreError;
use oci_types::{Digest, Repository};

const OF_MANIFEST: AccessRecord = AccessRecord::new("v-", RecordSubject::Manifest);
/// The kinds of records of this file.
pub(super) const KINDS: &[AccessRecord] = &[OF_MANIFEST];

/// The records of verified signatures.
pub struct VerifiedSignatures(pub(crate) Arc<AccessFolder>);

impl VerifiedSignatures {
    /// Returns whether the manifest has been found to fulfil the demand.
    pub fn contains(&self, repository: &Repository, manifest: Digest, demand: Digest) -> bool {
        self.path(repository, manifest, demand).exists()
    }

    /// Remembers that the manifest fulfils the demand. Losing it costs a verification.
    pub fn put(
        &self,
        repository: &Repository,
        manifest: Digest,
        demand: Digest,
    ) -> Result<(), StoreError> {
        self.0.put(&self.path(repository, manifest, demand))
    }

    fn path(&self, repository: &Repository, manifest: Digest, demand: Digest) -> PathBuf {
        let name = format!("{}-{}", OF_MANIFEST.name(manifest), demand.hex());
        self.0.path(&repository.to_string(), &name)
    }
}
