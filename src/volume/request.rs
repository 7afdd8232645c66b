//! A publish, parsed: nothing of the wire comes further than the edge.

use tokio::time::Instant;

use super::attributes::VolumeAttributes;
use super::target_path::TargetPath;
use oci::credentials::{Keyring, SecretError, WorkloadIdentity};
use policy::PolicyDemands;
use pull::{Caller, Priority, ProgressView, Tenant, Want};
use sys::mount::MountFlags;

/// A publish of one volume at one target.
#[derive(Clone, Debug)]
pub struct PublishRequest {
    /// The CSI volume id.
    pub volume_id: String,
    /// Where.
    pub target: TargetPath,
    /// What.
    pub attributes: VolumeAttributes,
    /// Whether the container runtime is told to make the container's mount read-only. Decides
    /// the form of the mount; the volume is the same.
    pub readonly: bool,
    /// The mount options of a PersistentVolume.
    pub flags: MountFlags,
    /// For whom.
    pub pod: PodInfo,
    /// With what; a malformed secret matters only when something has to be fetched.
    pub keyring: Result<Keyring, SecretError>,
    /// The pod's service account with its tokens, for credential plugins.
    pub identity: Option<WorkloadIdentity>,
    /// When the caller must have an answer.
    pub deadline: Instant,
    /// Where the caller sees how far a pull is, if there is one.
    pub progress: ProgressView,
}

impl PublishRequest {
    /// Returns the tenant that a pull for this volume works for.
    #[must_use]
    pub fn tenant(&self) -> Tenant {
        let uid = self.pod.uid.as_deref().or_else(|| self.target.pod_uid());
        Tenant::of_pod(self.pod.namespace.as_deref(), uid)
    }

    /// Returns what is to be pulled for this volume, with these credentials.
    #[must_use]
    pub fn want(&self, demands: PolicyDemands, keyring: Keyring) -> Want {
        self.attributes.want(demands, keyring, self.identity.clone(), self.tenant())
    }

    /// Returns the caller that waits for such a pull.
    #[must_use]
    pub fn caller(&self) -> Caller {
        Caller::new(Priority::Pod, self.tenant())
    }
}

/// What the kubelet says of the pod; all of it may be missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodInfo {
    /// The pod's name.
    pub name: Option<String>,
    /// The pod's namespace.
    pub namespace: Option<String>,
    /// The pod's uid.
    pub uid: Option<String>,
    /// The pod's service account.
    pub service_account: Option<String>,
}

impl PodInfo {
    /// `namespace/name`, where both are known.
    #[must_use]
    pub fn full_name(&self) -> Option<String> {
        Some(format!("{}/{}", self.namespace.as_ref()?, self.name.as_ref()?))
    }
}
