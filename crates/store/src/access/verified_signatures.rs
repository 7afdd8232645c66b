//! Signatures that were verified, so that a warm start needs no registry.
//!
//! ```text
//! access/<hash of repository>/v-<manifest>-<demand>.json   the manifest fulfils this demand there
//! ```
//!
//! The demand's name is a hash of its keys, identities, trust roots and formats: a changed policy finds no
//! verdict and has the artifact verified anew. Only what was found good is kept.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use super::{AccessFolder, AccessRecord, Proof, RecordSubject};
use crate::error::StoreError;
use crate::folder_listing::names;
use crate::json_records;
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

    /// Remembers that the manifest fulfils the demand, and who signed. Losing it costs a verification.
    pub fn put(
        &self,
        repository: &Repository,
        manifest: Digest,
        demand: Digest,
        signed_by: Vec<String>,
    ) -> Result<(), StoreError> {
        self.0.put_signed(&self.path(repository, manifest, demand), signed_by)
    }

    /// Returns the signers of the manifest by all demands that it was found to fulfil.
    pub fn signers(
        &self,
        repository: &Repository,
        manifest: Digest,
    ) -> Result<BTreeSet<String>, StoreError> {
        let place = self.path(repository, manifest, manifest);
        let Some(place) = place.parent() else { return Ok(BTreeSet::new()) };
        let prefix = format!("{}-", OF_MANIFEST.name(manifest));
        let records = names(place)?.into_iter().filter(|name| name.starts_with(&prefix));
        let proofs = records.filter_map(|name| json_records::read::<Proof>(&place.join(name)));
        Ok(proofs.flat_map(|proof| proof.signed_by).collect())
    }

    fn path(&self, repository: &Repository, manifest: Digest, demand: Digest) -> PathBuf {
        let name = format!("{}-{}", OF_MANIFEST.name(manifest), demand.hex());
        self.0.path(&repository.to_string(), &name)
    }
}
