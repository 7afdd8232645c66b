//! Proofs that a principal may read a manifest.
//!
//! ```text
//! access/<hash of repository>/m-<manifest>-<principal>.json   this principal may read this manifest
//! access/<hash of repository>/a-<manifest>-<account>.json     ... when a pod of this account last did
//! ```

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::{
    AccessFolder, AccessRecord, ProofSource, REFRESH_SECONDS, RecordSubject, RepositorySources,
};
use crate::error::StoreError;
use oci_types::{Digest, Repository};

const OF_PRINCIPAL: AccessRecord = AccessRecord::new("m-", RecordSubject::Manifest);
const OF_ACCOUNT: AccessRecord = AccessRecord::new("a-", RecordSubject::Manifest);
/// The kinds of records of this file.
pub(super) const KINDS: &[AccessRecord] = &[OF_PRINCIPAL, OF_ACCOUNT];

/// A proof of an account is written again when it is older than this: its age is not counted in minutes.
const RENEWAL_SECONDS: i64 = 60;

/// The principal of a proof: a text that is safe as a part of a file name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Principal(String);

/// The proofs of a store.
pub struct Proofs(pub(crate) Arc<AccessFolder>);

impl Proofs {
    /// Returns whether the principal has been proven to read the manifest.
    pub fn is_proven(&self, of: &RepositorySources, manifest: Digest, who: &Principal) -> bool {
        let path = self.path(&OF_PRINCIPAL, &of.repository, manifest, who);
        self.0.read(&path, |proof| proof.given(of)).is_some()
    }

    /// Remembers a proof.
    pub fn put(
        &self,
        repository: &Repository,
        manifest: Digest,
        who: &Principal,
        by: &ProofSource,
    ) -> Result<(), StoreError> {
        self.0.put_given(&self.path(&OF_PRINCIPAL, repository, manifest, who), by, REFRESH_SECONDS)
    }

    /// Returns whether the account has been proven to read the manifest within `age`.
    pub fn is_proven_for_account(
        &self,
        of: &RepositorySources,
        manifest: Digest,
        account: &Principal,
        age: Duration,
    ) -> bool {
        let path = self.path(&OF_ACCOUNT, &of.repository, manifest, account);
        let given = self.0.read(&path, |proof| proof.given(of));
        let Some(unix_seconds) = given else { return false };
        let seconds = jiff::Timestamp::now().as_second().saturating_sub(unix_seconds);
        // A clock that was set back makes a proof of the future, which says nothing.
        u64::try_from(seconds).is_ok_and(|seconds| seconds <= age.as_secs())
    }

    /// Remembers that a pod of the account has just been proven to read the manifest.
    pub fn put_for_account(
        &self,
        repository: &Repository,
        manifest: Digest,
        account: &Principal,
        by: &ProofSource,
    ) -> Result<(), StoreError> {
        self.0.put_given(
            &self.path(&OF_ACCOUNT, repository, manifest, account),
            by,
            RENEWAL_SECONDS,
        )
    }

    fn path(
        &self,
        kind: &AccessRecord,
        repository: &Repository,
        manifest: Digest,
        who: &Principal,
    ) -> PathBuf {
        let name = format!("{}-{}", kind.name(manifest), who.0);
        self.0.path(&repository.to_string(), &name)
    }
}

impl Principal {
    /// Returns the principal of an anonymous request.
    pub fn anonymous() -> Self {
        Self("anonymous".into())
    }

    /// The node's own credentials, which any pod could use.
    pub fn node() -> Self {
        Self("node".into())
    }

    /// A credential for a host, remembered as an HMAC under the node's key: the
    /// secret itself is never written, and the file is worth nothing elsewhere.
    pub fn credential(node_key: &[u8; 32], host: &str, material: &[u8]) -> Self {
        Self(keyed(node_key, host, material))
    }

    /// A service account of a namespace, for which a credential provider made a credential.
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
