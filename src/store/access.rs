//! Who has been proven to open what.
//!
//! ```text
//! access/<hash of repository>/m-<manifest>-<principal>.json   this principal may read this manifest
//! access/<hash of repository>/t-<tree>.json                   every blob of this tree came from here
//! access/<hash of repository>/b-<blob>.json                   this blob came from this repository
//! access/<hash of host>/b-<blob>.json                         ... or from another one of its host
//! ```
//!
//! A manifest that one has been proven to read may name any digest. So that
//! nobody gets another's cached blob by naming it in a manifest of his own, a
//! tree is shown to readers of a repository only after each of its blobs has
//! been had from there: fetched, or, where the same registry host has sent it
//! before, confirmed to be in the repository.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::{Store, TreeKey, keys, records};
use crate::oci::{Digest, Repository};

/// Whom a proof is for: a text that is safe as a part of a file name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Principal(String);

/// A proof's file says when it was made; that it exists is what counts.
#[derive(Debug, Serialize, Deserialize)]
struct Proof {
    unix_seconds: i64,
}

impl Principal {
    /// Anybody at all.
    #[must_use]
    pub fn anonymous() -> Self {
        Self("anonymous".into())
    }

    /// The node's own credentials, which any pod could use.
    #[must_use]
    pub fn node() -> Self {
        Self("node".into())
    }

    /// A credential for a host, remembered as an HMAC under the node's key: the
    /// secret itself is never written, and the file is worth nothing elsewhere.
    #[must_use]
    pub fn credential(node_key: &[u8; 32], host: &str, material: &[u8]) -> Self {
        use hmac::{KeyInit as _, Mac as _};
        // Any length is a key for HMAC, so this cannot fail; without a key nothing would ever be proven.
        let Ok(mut mac) = hmac::Hmac::<sha2::Sha256>::new_from_slice(node_key) else {
            return Self("none".into());
        };
        mac.update(&(host.len() as u64).to_le_bytes());
        mac.update(host.as_bytes());
        mac.update(material);
        let tag: [u8; 32] = mac.finalize().into_bytes().into();
        Self(Digest::from_bytes(tag).hex())
    }
}

impl Store {
    /// Whether the principal has been proven to read the manifest.
    #[must_use]
    pub fn is_proven(&self, repository: &Repository, manifest: Digest, who: &Principal) -> bool {
        self.proof_path(repository, manifest, who).exists()
    }

    /// Remembers a proof.
    pub fn put_proof(
        &self,
        repository: &Repository,
        manifest: Digest,
        who: &Principal,
    ) -> Result<(), StoreError> {
        self.put(&self.proof_path(repository, manifest, who))
    }

    /// Whether every blob of the tree has been had from the repository.
    #[must_use]
    pub fn tree_came_from(&self, repository: &Repository, tree: TreeKey) -> bool {
        self.tree_origin_path(repository, tree).exists()
    }

    /// Remembers that every blob of the tree has been had from the repository.
    pub fn put_tree_origin(
        &self,
        repository: &Repository,
        tree: TreeKey,
    ) -> Result<(), StoreError> {
        self.put(&self.tree_origin_path(repository, tree))
    }

    /// Whether the blob has been had from the repository.
    #[must_use]
    pub fn blob_came_from(&self, repository: &Repository, blob: Digest) -> bool {
        self.origin_path(&repository.to_string(), blob).exists()
    }

    /// Whether the blob has been had from any repository of the host.
    #[must_use]
    pub fn blob_came_from_host(&self, host: &str, blob: Digest) -> bool {
        self.origin_path(host, blob).exists()
    }

    /// Remembers that a host has sent a blob, from whichever repository.
    pub fn put_host_origin(&self, host: &str, blob: Digest) -> Result<(), StoreError> {
        self.put(&self.origin_path(host, blob))
    }

    /// Remembers where a blob was had from.
    pub fn put_blob_origin(&self, repository: &Repository, blob: Digest) -> Result<(), StoreError> {
        self.put_host_origin(repository.host(), blob)?;
        self.put(&self.origin_path(&repository.to_string(), blob))
    }

    fn put(&self, path: &std::path::Path) -> Result<(), StoreError> {
        if path.exists() {
            return Ok(());
        }
        if let Some(folder) = path.parent() {
            super::durable::create_folder(folder)?;
        }
        // Losing one in a power cut costs a request, so none of them is worth a sync.
        records::write_hint(
            &self.staging(),
            path,
            &Proof { unix_seconds: jiff::Timestamp::now().as_second() },
        )
    }

    fn proof_path(&self, repository: &Repository, manifest: Digest, who: &Principal) -> PathBuf {
        self.access_path(&repository.to_string(), &format!("m-{}-{}", manifest.hex(), who.0))
    }

    fn tree_origin_path(&self, repository: &Repository, tree: TreeKey) -> PathBuf {
        self.access_path(&repository.to_string(), &format!("t-{tree}"))
    }

    fn origin_path(&self, place: &str, blob: Digest) -> PathBuf {
        self.access_path(place, &format!("b-{}", blob.hex()))
    }

    fn access_path(&self, place: &str, name: &str) -> PathBuf {
        let folder = keys::hash(&[place]).hex();
        self.path("access").join(folder).join(format!("{name}.json"))
    }
}
