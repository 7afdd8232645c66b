//! The registries and repositories that blobs came from.
//!
//! ```text
//! access/<hash of repository>/t-<tree>.json   every blob of this tree came from here
//! access/<hash of repository>/b-<blob>.json   this blob came from this repository
//! access/<hash of host>/b-<blob>.json         ... or from another one of its host
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use super::{
    AccessFolder, AccessRecord, Proof, ProofSource, REFRESH_SECONDS, REGISTRY, RecordSubject,
    RepositorySources,
};
use crate::TreeKey;
use crate::error::StoreError;
use oci_types::{Digest, Repository};

const OF_TREE: AccessRecord = AccessRecord::new("t-", RecordSubject::Tree);
const OF_BLOB: AccessRecord = AccessRecord::new("b-", RecordSubject::Blob);
/// The kinds of records of this file.
pub(super) const KINDS: &[AccessRecord] = &[OF_TREE, OF_BLOB];

/// The origins of the content of a store.
pub struct Origins(pub(crate) Arc<AccessFolder>);

impl Origins {
    /// Returns whether the repository has provided every blob of the tree.
    pub fn tree_came_from(&self, of: &RepositorySources, tree: TreeKey) -> bool {
        let path = self.tree_path(&of.repository, tree);
        self.0.read(&path, |proof| proof.is_given_by_all(of).then_some(())).is_some()
    }

    /// Remembers that every blob of the tree has been had from the repository, each from one of
    /// these.
    pub fn put_tree(
        &self,
        repository: &Repository,
        tree: TreeKey,
        by: &BTreeSet<ProofSource>,
    ) -> Result<(), StoreError> {
        let unix_seconds = jiff::Timestamp::now().as_second();
        // The registry alone, where no mirror had a part in it.
        let mirrors = by.iter().filter(|source| **source != ProofSource::Registry);
        let mut by: BTreeMap<_, _> = mirrors.map(|source| (source.name(), unix_seconds)).collect();
        if by.is_empty() {
            by.insert(REGISTRY.to_owned(), unix_seconds);
        }
        let _turn = self.0.lock.lock();
        self.0.write_proof(
            &self.tree_path(repository, tree),
            &Proof { unix_seconds, by, ..Proof::default() },
        )
    }

    /// Returns the source that has sent the blob for the repository; none where no source counts.
    pub fn blob_came_from(&self, of: &RepositorySources, blob: Digest) -> Option<ProofSource> {
        let path = self.blob_path(&of.repository.to_string(), blob);
        self.0.read(&path, |proof| proof.source(of))
    }

    /// Returns whether any repository of the host has provided the blob.
    pub fn blob_came_from_host(&self, of: &RepositorySources, blob: Digest) -> bool {
        let path = self.blob_path(of.repository.host(), blob);
        self.0.read(&path, |proof| proof.source(of)).is_some()
    }

    /// Remembers where a blob was had from.
    pub fn put_blob(
        &self,
        repository: &Repository,
        blob: Digest,
        by: &ProofSource,
    ) -> Result<(), StoreError> {
        self.0.put_given(&self.blob_path(repository.host(), blob), by, REFRESH_SECONDS)?;
        self.0.put_given(&self.blob_path(&repository.to_string(), blob), by, REFRESH_SECONDS)
    }

    fn tree_path(&self, repository: &Repository, tree: TreeKey) -> PathBuf {
        self.0.path(&repository.to_string(), &OF_TREE.name(tree.digest()))
    }

    fn blob_path(&self, place: &str, blob: Digest) -> PathBuf {
        self.0.path(place, &OF_BLOB.name(blob))
    }
}
