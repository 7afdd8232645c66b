//! What a volume asks for.

use serde::{Deserialize, Serialize};

use super::error::PullError;
use super::shape::Shape;
use super::tenant::{Caller, Tenant};
use oci::credentials::{Keyring, WorkloadIdentity};
use oci::signature::SignatureDemand;
use oci::{Platform, Reference};

/// When the registry is asked: the kubelet's words with the kubelet's meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PullPolicy {
    /// At every publish; with a digest only to prove the credentials.
    Always,
    /// When the reference has not been resolved on this node before.
    IfNotPresent,
    /// Not at all.
    Never,
}

/// What `Always` does when the registry cannot be reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IfUnavailable {
    /// The publish fails, and the kubelet tries again.
    #[default]
    Fail,
    /// What the reference last resolved to is used.
    UseCached,
}

/// Which of those who wait for the network goes first; in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// A pod waits for it.
    #[default]
    Pod,
    /// It is fetched ahead of its use.
    Warm,
}

/// What a volume asks for, and with what it may.
#[derive(Clone, Debug)]
pub struct Want {
    /// The artifact.
    pub reference: Reference,
    /// For an index, or to be compared with a single manifest's.
    pub platform: Platform,
    /// Whether the registry is asked.
    pub policy: PullPolicy,
    /// What `Always` does without an answer.
    pub if_unavailable: IfUnavailable,
    /// The settings that shape the tree.
    pub shape: Shape,
    /// The volume's own credentials.
    pub keyring: Keyring,
    /// Bytes of all blobs, and of the unpacked tree, that it may have.
    pub maximum_bytes: Option<u64>,
    /// Whose signature it must have.
    pub signature: Option<SignatureDemand>,
    /// Whom it is for, and the tokens that the kubelet got for that.
    pub identity: Option<WorkloadIdentity>,
    /// How urgent it is.
    pub priority: Priority,
    /// The tenant that the work is charged to.
    pub tenant: Tenant,
}

impl Want {
    /// Returns the pull of a whole artifact that the node makes for no pod.
    #[must_use]
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

    /// Compares a size with the volume's own bound.
    pub(super) fn check_bytes(&self, bytes: u64) -> Result<(), PullError> {
        match self.maximum_bytes {
            Some(limit) if bytes > limit => Err(PullError::TooManyBytes { bytes, limit }),
            _ => Ok(()),
        }
    }
}
