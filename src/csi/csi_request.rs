//! Parses the messages of CSI into the requests of the use cases.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;
use tonic::metadata::MetadataMap;

use crate::proto::csi::v1::{NodePublishVolumeRequest, VolumeCapability, volume_capability};
use crate::volume::volume_attributes::{self, KUBELET_PREFIX, VolumeAttributes};
use crate::volume::{PodInfo, PublishRequest, TargetPath, VolumeError};
use oci::credentials::{Keyring, WorkloadIdentity};
use pull::ProgressView;
use sys::mount::MountFlags;
use text::printable::excerpt;

/// The timeout of a call without a deadline: the one that the kubelet uses.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(115);

/// The response leaves this long before the deadline. A response in time reports the progress of the pull; an exceeded
/// deadline reports nothing.
const MARGIN: Duration = Duration::from_secs(5);

/// The CSI specification limits strings to 128 bytes. Handles of PersistentVolumes may be longer, and are never used as
/// paths here.
const MAXIMUM_VOLUME_ID: usize = 4096;

/// The facts of a node that requests are checked against.
#[derive(Clone)]
pub struct RequestContext {
    /// The kubelet's root directory, which contains all targets.
    pub kubelet_dir: std::path::PathBuf,
    /// SELinux is enabled. The container runtime would relabel a read-write volume, which fails on a read-only mount.
    pub selinux: bool,
}

impl RequestContext {
    /// Parses a publish request.
    pub fn publish(
        &self,
        metadata: &MetadataMap,
        request: NodePublishVolumeRequest,
    ) -> Result<PublishRequest, VolumeError> {
        let now = Instant::now();
        volume_id(&request.volume_id)?;
        let target = TargetPath::parse(&self.kubelet_dir, &request.target_path)?;
        let flags = capability(request.volume_capability)?;
        let attributes = VolumeAttributes::parse(&request.volume_context)?;
        let pod = verified_pod_info(&request.volume_context, &target)?;
        if self.selinux && !request.readonly {
            return Err(VolumeError::Invalid(
                "this node uses SELinux, where a volume must be read-only for the container runtime too: set readOnly: true on the volume".into(),
            ));
        }
        // A secret without a host is for the first artifact's, and never goes to those of others.
        let host = attributes.artifacts.first().map(|first| first.reference.repository().host());
        let keyring = Keyring::from_secrets(&request.secrets, host.unwrap_or_default());
        let (namespace, account) = (pod.namespace.as_deref(), pod.service_account.as_deref());
        let (secrets, context) = (&request.secrets, &request.volume_context);
        let identity = WorkloadIdentity::of(namespace, account, secrets, context);
        let timeout = grpc_timeout(metadata).unwrap_or(DEFAULT_TIMEOUT);
        let deadline = now + timeout.saturating_sub(MARGIN.min(timeout / 4));
        let volume_id = request.volume_id;
        Ok(PublishRequest {
            volume_id,
            target,
            attributes,
            readonly: request.readonly,
            flags,
            pod,
            keyring,
            identity,
            deadline,
            progress: ProgressView::default(),
        })
    }

    /// Parses an unpublish request. Returns `None` for a target that cannot be the driver's.
    pub fn unpublish(&self, id: &str, target: &str) -> Result<Option<TargetPath>, VolumeError> {
        volume_id(id)?;
        if target.is_empty() {
            return Err(VolumeError::Invalid("the target path is missing".into()));
        }
        Ok(TargetPath::parse(&self.kubelet_dir, target).ok())
    }

    /// Parses a request for statistics.
    pub fn stats(&self, id: &str, path: &str) -> Result<TargetPath, VolumeError> {
        volume_id(id)?;
        if path.is_empty() {
            return Err(VolumeError::Invalid("the volume path is missing".into()));
        }
        // Any other path is a volume that is not on this node.
        TargetPath::parse(&self.kubelet_dir, path)
            .map_err(|_| VolumeError::NotPublished(Path::new(path).into()))
    }
}

fn volume_id(id: &str) -> Result<(), VolumeError> {
    if id.is_empty() {
        return Err(VolumeError::Invalid("the volume id is missing".into()));
    }
    if id.len() > MAXIMUM_VOLUME_ID {
        let text = format!("the volume id is longer than {MAXIMUM_VOLUME_ID} bytes");
        return Err(VolumeError::Invalid(text));
    }
    Ok(())
}

fn capability(capability: Option<VolumeCapability>) -> Result<MountFlags, VolumeError> {
    use volume_capability::AccessType;
    let missing = || VolumeError::Invalid("the volume capability is missing".into());
    let mount = match capability.ok_or_else(missing)?.access_type.ok_or_else(missing)? {
        AccessType::Mount(mount) => mount,
        AccessType::Block(_) => {
            return Err(VolumeError::Invalid(
                "an artifact is a file system, not a block device: use volumeMode: Filesystem"
                    .into(),
            ));
        }
    };
    if !mount.fs_type.is_empty() {
        return Err(VolumeError::Invalid(format!(
            "the fsType \"{}\" means nothing for an artifact: remove it",
            excerpt(&mount.fs_type, 100)
        )));
    }
    volume_attributes::mount_flags(&mount.mount_flags)
}

/// Returns the pod information of a publish, if the kubelet wrote it.
///
/// The namespace and the service account decide over policy and credentials. With `podInfoOnMount: true` in the
/// `CSIDriver` object the kubelet overwrites these keys. Without it, it passes on what the pod's author wrote into
/// `volumeAttributes`. The two are told apart by the pod's uid: the kubelet always sends it, together with `ephemeral`,
/// and it equals the uid in the target path. The author cannot know the uid, which the API server draws at random when
/// it creates the pod, and volumes do not change afterwards.
///
/// Returns empty information where the request has none, as with `podInfoOnMount: false` and with callers other than
/// the kubelet.
fn verified_pod_info(
    context: &HashMap<String, String>,
    target: &TargetPath,
) -> Result<PodInfo, VolumeError> {
    let get = |key: &str| {
        let value = context.get(&format!("{KUBELET_PREFIX}{key}"));
        value.filter(|value| !value.is_empty()).cloned()
    };
    let pod = PodInfo {
        name: get("pod.name"),
        namespace: get("pod.namespace"),
        uid: get("pod.uid"),
        service_account: get("serviceAccount.name"),
    };
    if pod == PodInfo::default() {
        return Ok(pod);
    }
    match &pod.uid {
        Some(uid) if target.pod_uid() != Some(uid) => Err(VolumeError::Invalid(format!(
            "the target path {target} is not of the pod with the uid {}",
            excerpt(uid, 100)
        ))),
        Some(_) if get("ephemeral").is_some() => Ok(pod),
        _ => Err(VolumeError::Invalid(format!(
            "the volume attributes {KUBELET_PREFIX}pod.* and {KUBELET_PREFIX}serviceAccount.name are not the kubelet's, which sends them with pod.uid and ephemeral: remove them from volumeAttributes and set podInfoOnMount: true in the CSIDriver object"
        ))),
    }
}

/// Parses the `grpc-timeout` header: up to eight digits and a unit.
fn grpc_timeout(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0c7d6f3c-8f57-4c7e-9d52-6a1f6f3b1c11";

    /// Parses pod information given as `key=value` pairs without the prefix.
    fn pod_info(pairs: &[(&str, &str)]) -> Result<PodInfo, VolumeError> {
        let path = format!("/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~csi/v/mount");
        let target = TargetPath::parse(Path::new("/var/lib/kubelet"), &path).expect("a target");
        let context = pairs
            .iter()
            .map(|(key, value)| (format!("{KUBELET_PREFIX}{key}"), (*value).to_owned()))
            .collect();
        verified_pod_info(&context, &target)
    }

    #[test]
    fn the_kubelets_pod_information_is_believed() {
        let all = [
            ("pod.name", "app"),
            ("pod.namespace", "team"),
            ("pod.uid", UID),
            ("serviceAccount.name", "default"),
            ("ephemeral", "true"),
        ];
        let pod = pod_info(&all).expect("pod information");
        assert_eq!(pod.namespace.as_deref(), Some("team"));
        assert_eq!(pod.service_account.as_deref(), Some("default"));
    }

    #[test]
    fn a_request_without_pod_information_has_none() {
        let tokens = ("serviceAccount.tokens", "{}");
        for pairs in [&[][..], &[tokens], &[("ephemeral", "true")], &[("pod.uid", "")]] {
            assert_eq!(pod_info(pairs).expect("no pod information"), PodInfo::default());
        }
    }

    #[test]
    fn pod_information_that_the_pods_author_could_have_written_is_refused() {
        let namespace = ("pod.namespace", "kube-system");
        let other = ("pod.uid", "11111111-2222-3333-4444-555555555555");
        for pairs in [
            &[namespace][..],
            &[namespace, ("ephemeral", "true")],
            &[namespace, ("pod.uid", ""), ("ephemeral", "true")],
            &[namespace, other, ("ephemeral", "true")],
            &[namespace, ("pod.uid", UID)],
            &[("serviceAccount.name", "admin")],
            &[("pod.name", "app"), ("ephemeral", "false")],
        ] {
            let refused = pod_info(pairs);
            assert!(matches!(refused, Err(VolumeError::Invalid(_))), "{pairs:?}: {refused:?}");
        }
    }

    #[test]
    fn timeouts() {
        let parse = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().expect("ASCII"));
            grpc_timeout(&metadata)
        };
        assert_eq!(parse("119990m"), Some(Duration::from_millis(119_990)));
        assert_eq!(parse("2M"), Some(Duration::from_mins(2)));
        for text in ["", "m", "5", "123456789S", "-1S", "5x"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
