//! A parsed publish. No message of CSI comes further than the edge.

use tokio::time::Instant;

use super::target_path::TargetPath;
use super::volume_attributes::VolumeAttributes;
use oci::credentials::{Keyring, SecretError, WorkloadIdentity};
use policy::PolicyDemands;
use pull::{Caller, PlacedWant, Priority, ProgressView, Tenant};
use sys::mount::MountFlags;

/// A publish of one volume at one target.
#[derive(Clone, Debug)]
pub struct PublishRequest {
    /// The CSI volume id.
    pub volume_id: String,
    /// The target of the mount.
    pub target: TargetPath,
    /// The attributes of the volume.
    pub attributes: VolumeAttributes,
    /// Set if the container runtime makes the container's mount read-only. Decides the form of the mount; the volume is
    /// the same.
    pub readonly: bool,
    /// The mount options of a PersistentVolume.
    pub flags: MountFlags,
    /// The pod that mounts the volume.
    pub pod: PodInfo,
    /// The pod's credentials. A malformed secret matters only if something has to be fetched.
    pub keyring: Result<Keyring, SecretError>,
    /// The pod's service account with its tokens, for credential plugins.
    pub identity: Option<WorkloadIdentity>,
    /// The time when the caller must have a response.
    pub deadline: Instant,
    /// The progress of a pull, if there is one, for the caller.
    pub progress: ProgressView,
}

impl PublishRequest {
    /// Returns the tenant that a pull for this volume counts for.
    pub fn tenant(&self) -> Tenant {
        let uid = self.pod.uid.as_deref().or_else(|| self.target.pod_uid());
        Tenant::of_pod(self.pod.namespace.as_deref(), uid)
    }

    /// Returns the pulls that this volume needs, with these credentials.
    pub fn wants(&self, demands: &[PolicyDemands], keyring: &Keyring) -> Vec<PlacedWant> {
        self.attributes.wants(demands, keyring, self.identity.as_ref(), &self.tenant())
    }

    /// Returns the caller of such a pull.
    pub fn caller(&self) -> Caller {
        Caller::new(Priority::Pod, self.tenant())
    }
}

/// The kubelet's information about the pod. All of it may be missing.
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
    /// Returns `namespace/name` if both are known.
    pub fn full_name(&self) -> Option<String> {
        Some(format!("{}/{}", self.namespace.as_ref()?, self.name.as_ref()?))
    }
}
