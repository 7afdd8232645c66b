//! Checks whether a repository has a blob, before a blob of the store takes part in anything for that repository.
//!
//! A blob that the repository has not been proven to have is treated for its readers as if it were not in the store:
//! the same space is claimed, the same requests are made, in the same order, and a refusal of the registry has the same
//! words. Only if the registry host has sent the blob before does the head of its response decide; from another host
//! all bytes are fetched again, hashed, and dropped.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;

use super::blocking;
use super::error::PullError;
use oci::registry::{AnsweredBy, Registry};
use oci::{Digest, Repository};
use store::Store;
use store::access::{ProofSource, RepositorySources};

/// The knowledge about the origin of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlobOrigin {
    /// The repository has given it.
    Repository,
    /// Another repository of the same host has.
    Host,
    /// Another host has, or none.
    Elsewhere,
}

/// Knows which repositories have given which content. Cheap to clone.
#[derive(Clone)]
pub(super) struct BlobOrigins {
    pub(super) store: Store,
    pub(super) registry: Registry,
}

impl BlobOrigins {
    /// The mirrors whose proofs count for a repository now. Blocking.
    pub(super) fn sources(&self, repository: &Repository) -> RepositorySources {
        let is_private = self.store.anonymous_refusals().contains(repository);
        let (repository, mirrors) = (repository.clone(), self.registry.mirrors(repository));
        RepositorySources { repository, mirrors, is_private }
    }

    /// Returns where a blob came from. Blocking.
    pub(super) fn of(&self, sources: &RepositorySources, blob: Digest) -> BlobOrigin {
        if self.store.origins().blob_came_from(sources, blob).is_some() {
            return BlobOrigin::Repository;
        }
        if self.store.origins().blob_came_from_host(sources, blob) {
            return BlobOrigin::Host;
        }
        BlobOrigin::Elsewhere
    }

    /// The same, off the async threads.
    pub(super) async fn look_up(
        &self,
        repository: &Repository,
        blob: Digest,
    ) -> Result<BlobOrigin, PullError> {
        let (origins, repository) = (self.clone(), repository.clone());
        blocking(move || Ok(origins.of(&origins.sources(&repository), blob))).await
    }

    /// Records who has given a blob for a repository. Blocking.
    pub(super) fn record(
        &self,
        repository: &Repository,
        blob: Digest,
        given_by: &BTreeSet<ProofSource>,
    ) -> Result<(), PullError> {
        for source in given_by {
            self.store.origins().put_blob(repository, blob, source)?;
        }
        Ok(())
    }

    /// Stores a document that was checked, and the source that it came from.
    pub(super) async fn keep_document(
        &self,
        repository: &Repository,
        digest: Digest,
        bytes: Bytes,
        sent_by: &AnsweredBy,
    ) -> Result<(), PullError> {
        let (store, repository) = (self.store.clone(), repository.clone());
        let by = content_source(sent_by);
        blocking(move || {
            store.documents().put(digest, &bytes)?;
            Ok(store.origins().put_blob(&repository, digest, &by)?)
        })
        .await
    }
}

/// Returns the source of content: a mirror's response counts as content whether the mirror got a credential or not.
pub(super) fn content_source(answered_by: &AnsweredBy) -> ProofSource {
    match answered_by {
        AnsweredBy::Registry => ProofSource::Registry,
        AnsweredBy::Mirror { address, .. } => {
            ProofSource::Mirror { address: Arc::clone(address), is_anonymous: false }
        }
    }
}

/// Returns the sources of a blob. If mirrors sent a part of it, the registry's own part proves nothing: it may have
/// sent content that it does not know.
pub(super) fn content_sources(answered_by: &BTreeSet<ProofSource>) -> BTreeSet<ProofSource> {
    let mirrors: BTreeSet<_> =
        answered_by.iter().filter(|source| **source != ProofSource::Registry).cloned().collect();
    if mirrors.is_empty() { answered_by.clone() } else { mirrors }
}
