//! Who has been proven to open what.
//!
//! ```text
//! access/<hash of repository>/m-<manifest>-<principal>.json   this principal may read this manifest
//! access/<hash of repository>/a-<manifest>-<account>.json     ... when somebody of this account last did
//! access/<hash of repository>/i-<manifest>.json               the administrator imported this manifest
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
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::{Store, TreeKey, keys, records};
use crate::oci::{Digest, Repository};

/// Whom a proof is for: a text that is safe as a part of a file name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Principal(String);

/// A proof of an account is written again when it is older than this: nobody counts it in minutes.
const RENEWAL_SECONDS: i64 = 60;

/// A proof's file says when it was made. Of an account that counts; of others, that it exists.
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
        Self(keyed(node_key, host, material))
    }

    /// A service account of a namespace, for which a credential provider made a credential.
    #[must_use]
    pub fn service_account(node_key: &[u8; 32], namespace: &str, name: &str) -> Self {
        // No host looks like this, so no credential's name does either.
        Self(keyed(node_key, &format!("/service-account/{namespace}"), name.as_bytes()))
    }
}

/// HMAC under the node's key, of a context and what is hidden in it.
fn keyed(node_key: &[u8; 32], context: &str, material: &[u8]) -> String {
    use hmac::{KeyInit as _, Mac as _};
    // Any length is a key for HMAC, so this cannot fail; without a key nothing would ever be proven.
    let Ok(mut mac) = hmac::Hmac::<sha2::Sha256>::new_from_slice(node_key) else {
        return "none".into();
    };
    mac.update(&(context.len() as u64).to_le_bytes());
    mac.update(context.as_bytes());
    mac.update(material);
    let tag: [u8; 32] = mac.finalize().into_bytes().into();
    Digest::from_bytes(tag).hex()
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
        self.put_access(&self.proof_path(repository, manifest, who))
    }

    /// Whether somebody of the account has been proven to read the manifest within `age`.
    #[must_use]
    pub fn is_proven_for_account(
        &self,
        repository: &Repository,
        manifest: Digest,
        account: &Principal,
        age: Duration,
    ) -> bool {
        let path = self.account_path(repository, manifest, account);
        let Some(Proof { unix_seconds }) = records::read(&path) else { return false };
        let seconds = jiff::Timestamp::now().as_second().saturating_sub(unix_seconds);
        // A clock that was set back makes a proof of the future, which says nothing.
        u64::try_from(seconds).is_ok_and(|seconds| seconds <= age.as_secs())
    }

    /// Remembers that somebody of the account has just been proven to read the manifest.
    pub fn put_account_proof(
        &self,
        repository: &Repository,
        manifest: Digest,
        account: &Principal,
    ) -> Result<(), StoreError> {
        let path = self.account_path(repository, manifest, account);
        let now = jiff::Timestamp::now().as_second();
        let recent = |proof: Proof| (0..RENEWAL_SECONDS).contains(&(now - proof.unix_seconds));
        if records::read(&path).is_some_and(recent) {
            return Ok(());
        }
        self.write_proof(&path)
    }

    /// Whether the administrator has imported the manifest as one of the repository.
    #[must_use]
    pub fn is_imported(&self, repository: &Repository, manifest: Digest) -> bool {
        self.imported_path(repository, manifest).exists()
    }

    /// Remembers that the administrator has imported the manifest as one of the repository: its
    /// content counts as preloaded. Whoever imports also says where each blob came from
    /// ([`Self::put_blob_origin`]).
    pub fn put_imported(
        &self,
        repository: &Repository,
        manifest: Digest,
    ) -> Result<(), StoreError> {
        self.put_access(&self.imported_path(repository, manifest))
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
        self.put_access(&self.tree_origin_path(repository, tree))
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
        self.put_access(&self.origin_path(host, blob))
    }

    /// Remembers where a blob was had from.
    pub fn put_blob_origin(&self, repository: &Repository, blob: Digest) -> Result<(), StoreError> {
        self.put_host_origin(repository.host(), blob)?;
        self.put_access(&self.origin_path(&repository.to_string(), blob))
    }

    pub(super) fn put_access(&self, path: &std::path::Path) -> Result<(), StoreError> {
        if path.exists() {
            return Ok(());
        }
        self.write_proof(path)
    }

    fn write_proof(&self, path: &std::path::Path) -> Result<(), StoreError> {
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

    fn account_path(&self, repository: &Repository, manifest: Digest, who: &Principal) -> PathBuf {
        self.access_path(&repository.to_string(), &format!("a-{}-{}", manifest.hex(), who.0))
    }

    fn imported_path(&self, repository: &Repository, manifest: Digest) -> PathBuf {
        self.access_path(&repository.to_string(), &format!("i-{}", manifest.hex()))
    }

    fn tree_origin_path(&self, repository: &Repository, tree: TreeKey) -> PathBuf {
        self.access_path(&repository.to_string(), &format!("t-{tree}"))
    }

    fn origin_path(&self, place: &str, blob: Digest) -> PathBuf {
        self.access_path(place, &format!("b-{}", blob.hex()))
    }

    pub(super) fn access_path(&self, place: &str, name: &str) -> PathBuf {
        let folder = keys::hash(&[place]).hex();
        self.path("access").join(folder).join(format!("{name}.json"))
    }
}
