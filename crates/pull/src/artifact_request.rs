//! The request of a volume for an artifact.

use serde::{Deserialize, Serialize};

use super::error::PullError;
use super::pull_tenant::{Caller, Tenant};
use super::tree_shape::Shape;
use oci::credentials::{Keyring, WorkloadIdentity};
use oci::signature::{SignatureDemand, SignatureMode};
use oci::{Platform, Reference};

/// When the registry is asked: the kubelet's words with the kubelet's meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PullPolicy {
    /// At every publish; with a digest only to prove the credentials.
    Always,
    /// When the reference has not been resolved on this node before.
    IfNotPresent,
    /// Do not use the registry.
    Never,
}

/// The behaviour of `Always` if the registry cannot be reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IfUnavailable {
    /// The publish fails, and the kubelet tries again.
    #[default]
    Fail,
    /// Use the last resolution of the reference.
    UseCached,
}

/// The order in which callers get connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// A pod waits for it.
    #[default]
    Pod,
    /// It is fetched ahead of its use.
    Warm,
}

/// A volume's request for an artifact, with its credentials.
#[derive(Clone, Debug)]
pub struct Want {
    /// The reference of the artifact.
    pub reference: Reference,
    /// The platform to choose from an index, or to compare with a single manifest's.
    pub platform: Platform,
    /// When to use the registry.
    pub policy: PullPolicy,
    /// The behaviour of `Always` without a response.
    pub if_unavailable: IfUnavailable,
    /// The settings that shape the tree.
    pub shape: Shape,
    /// The volume's own credentials.
    pub keyring: Keyring,
    /// Bytes of all blobs, and of the unpacked tree, that it may have.
    pub maximum_bytes: Option<u64>,
    /// The demanded signature.
    pub signature: Option<SignatureDemand>,
    /// The service account, and the tokens that the kubelet requested for it.
    pub identity: Option<WorkloadIdentity>,
    /// The urgency of the request.
    pub priority: Priority,
    /// The tenant that the work is charged to.
    pub tenant: Tenant,
}

impl Want {
    /// Returns the pull of a whole artifact that the node makes for no pod.
    pub fn of_node(reference: Reference, platform: Platform, tenant: Tenant) -> Self {
        Self {
            reference,
            platform,
            policy: PullPolicy::IfNotPresent,
            if_unavailable: IfUnavailable::Fail,
            shape: Shape::default(),
            keyring: Keyring::default(),
            identity: None,
            priority: Priority::Warm,
            tenant,
            maximum_bytes: None,
            signature: None,
        }
    }

    /// Returns the caller of the flights that this volume waits for.
    pub(super) fn caller(&self) -> Caller {
        Caller::new(self.priority, self.tenant.clone())
    }

    /// Returns whether a signature is demanded without which it is mounted too.
    pub(super) fn is_only_warned_of(&self) -> bool {
        self.signature.as_ref().is_some_and(|demand| demand.mode == SignatureMode::Warn)
    }

    /// Compares a size with the volume's own bound.
    pub(super) fn check_bytes(&self, bytes: u64) -> Result<(), PullError> {
        match self.maximum_bytes {
            Some(limit) if bytes > limit => Err(PullError::TooManyBytes { bytes, limit }),
            _ => Ok(()),
        }
    }
}
