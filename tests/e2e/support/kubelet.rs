//! The kubelet's steps for a volume, call by call.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use csi_driver_oci::proto::{
    csi::v1::{
        NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability,
        identity_client::IdentityClient,
        node_client::NodeClient,
        volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode},
    },
    pluginregistration::registration_client::RegistrationClient,
};
use hyper_util::rt::TokioIo;
use tonic::{
    Code, Request, Response, Status,
    transport::{Channel, Endpoint},
};

use super::{block_on, hexadecimal_sha256, mounts_at, unique};

/// The kubelet's own deadline for one mount, less the time of its other calls.
const CALL_DEADLINE: Duration = Duration::from_secs(119);

/// A stand-in for the kubelet of one node.
#[derive(Clone)]
pub struct Kubelet {
    directory: PathBuf,
    socket: PathBuf,
}

/// A pod as the kubelet knows it.
#[derive(Clone)]
pub struct Pod {
    pub name: String,
    pub namespace: String,
    pub uid: String,
}

impl Pod {
    /// Creates a unique pod.
    pub fn new() -> Self {
        let name = unique("pod");
        let hash = hexadecimal_sha256(name.as_bytes());
        let uid = format!(
            "{}-{}-{}-{}-{}",
            &hash[..8],
            &hash[8..12],
            &hash[12..16],
            &hash[16..20],
            &hash[20..32]
        );
        Self { name, namespace: "default".to_owned(), uid }
    }
}

/// A volume of one pod, ready to be published.
#[derive(Clone)]
pub struct Volume {
    pub request: NodePublishVolumeRequest,
    parent: PathBuf,
}

impl Volume {
    /// Returns the path at which the pod's containers find it.
    pub fn target(&self) -> &Path {
        Path::new(&self.request.target_path)
    }

    /// Returns the text of a file, as a container reads it.
    #[track_caller]
    pub fn text(&self, name: &str) -> String {
        fs::read_to_string(self.target().join(name)).expect("a file of the volume")
    }

    /// Returns the directory that belongs to the kubelet.
    pub fn parent(&self) -> &Path {
        &self.parent
    }

    #[must_use]
    pub fn attribute(mut self, key: &str, value: &str) -> Self {
        self.request.volume_context.insert(key.to_owned(), value.to_owned());
        self
    }

    #[must_use]
    pub fn secret(mut self, key: &str, value: &str) -> Self {
        self.request.secrets.insert(key.to_owned(), value.to_owned());
        self
    }

    #[must_use]
    pub fn mount_option(mut self, option: &str) -> Self {
        if let Some(VolumeCapability { access_type: Some(AccessType::Mount(mount)), .. }) =
            &mut self.request.volume_capability
        {
            mount.mount_flags.push(option.to_owned());
        }
        self
    }

    /// Asserts the directory's state after a final failure: it has nothing but the kubelet's own file.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        assert_eq!(mounts_at(self.target()), Vec::new(), "a mount is left at the target");
        assert!(fs::symlink_metadata(self.target()).is_err(), "the target is left");
        if let Ok(entries) = fs::read_dir(&self.parent) {
            let names: Vec<_> = entries.map(|entry| entry.expect("an entry").file_name()).collect();
            assert_eq!(
                names,
                ["vol_data.json"],
                "more than the kubelet's file is left beside the target"
            );
        }
    }

    /// Asserts one mount, read-only, without set-user-ID programs and devices.
    #[track_caller]
    pub fn assert_mounted(&self) {
        let mounts = mounts_at(self.target());
        assert_eq!(mounts.len(), 1, "one mount at the target, not {mounts:?}");
        for option in ["ro", "nosuid", "nodev"] {
            assert!(
                mounts[0].options.iter().any(|found| found == option),
                "{option} is not among {mounts:?}"
            );
        }
    }
}

/// Returns whether the kubelet takes this code for the end of a call that left nothing running.
pub fn is_final(code: Code) -> bool {
    !matches!(
        code,
        Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Unavailable
            | Code::ResourceExhausted
            | Code::Aborted
    )
}

impl Kubelet {
    pub fn new(directory: &Path, socket: &Path) -> Self {
        Self { directory: directory.to_owned(), socket: socket.to_owned() }
    }

    /// Returns a volume of `pod.spec.volumes[].csi`.
    #[track_caller]
    pub fn inline(&self, pod: &Pod, name: &str, reference: &str) -> Volume {
        let handle = format!("csi-{}", hexadecimal_sha256(format!("{}{name}", pod.uid).as_bytes()));
        self.volume(pod, name, &handle, true, Mode::SingleNodeWriter)
            .attribute("reference", reference)
    }

    /// Returns a volume of a new pod.
    #[track_caller]
    pub fn new_volume(&self, reference: &str) -> Volume {
        self.inline(&Pod::new(), "artifact", reference)
    }

    /// Returns a PersistentVolume that the pod claims.
    #[track_caller]
    pub fn persistent(&self, pod: &Pod, name: &str, handle: &str, reference: &str) -> Volume {
        self.volume(pod, name, handle, false, Mode::MultiNodeReaderOnly)
            .attribute("reference", reference)
    }

    #[track_caller]
    fn volume(&self, pod: &Pod, name: &str, handle: &str, ephemeral: bool, mode: Mode) -> Volume {
        let parent =
            self.directory.join("pods").join(&pod.uid).join("volumes/kubernetes.io~csi").join(name);
        let volume_context = [
            ("csi.storage.k8s.io/pod.name", pod.name.as_str()),
            ("csi.storage.k8s.io/pod.namespace", &pod.namespace),
            ("csi.storage.k8s.io/pod.uid", &pod.uid),
            ("csi.storage.k8s.io/serviceAccount.name", "default"),
            ("csi.storage.k8s.io/ephemeral", if ephemeral { "true" } else { "false" }),
        ];
        let request = NodePublishVolumeRequest {
            volume_id: handle.to_owned(),
            target_path: parent.join("mount").to_string_lossy().into_owned(),
            volume_capability: Some(capability(mode)),
            readonly: false,
            volume_context: volume_context
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            ..Default::default()
        };
        Volume { request, parent }
    }

    /// Prepares the directories, as the kubelet does before its call.
    #[track_caller]
    pub fn prepare(&self, volume: &Volume) {
        fs::create_dir_all(&volume.parent).expect("the volume's folder");
        fs::set_permissions(&volume.parent, fs::Permissions::from_mode(0o750))
            .expect("the folder's mode");
        let data = serde_json::json!({
            "driverName": "oci.custom.io",
            "nodeName": "test-node",
            "specVolID": volume.parent.file_name().map(|name| name.to_string_lossy().into_owned()),
            "volumeHandle": volume.request.volume_id,
            "volumeLifecycleMode": "Ephemeral",
        });
        fs::write(volume.parent.join("vol_data.json"), data.to_string()).expect("vol_data.json");
    }

    /// Publishes as the kubelet does. Asserts that a final failure leaves nothing.
    #[track_caller]
    pub fn publish(&self, volume: &Volume) -> Result<(), Status> {
        self.publish_within(volume, CALL_DEADLINE)
    }

    /// Publishes with a deadline of the test.
    #[track_caller]
    pub fn publish_within(&self, volume: &Volume, deadline: Duration) -> Result<(), Status> {
        self.prepare(volume);
        let result = self.publish_request_within(volume.request.clone(), deadline);
        match &result {
            Ok(()) => volume.assert_mounted(),
            Err(status) => {
                assert_well_worded(status);
                if is_final(status.code()) {
                    volume.assert_nothing_left();
                }
            }
        }
        result
    }

    /// Publishes again and again until the pull reports its progress. The pull continues.
    #[track_caller]
    pub fn publish_until_bytes_are_awaited(&self, volume: &Volume) {
        loop {
            // Five seconds before its deadline a call reports the progress.
            let status = self.publish_within(volume, Duration::from_secs(6)).expect_err("it waits");
            assert_eq!(status.code(), Code::Aborted, "{status}");
            if status.message().contains("% (") {
                return;
            }
        }
    }

    /// Makes the call alone.
    pub fn publish_request(&self, request: NodePublishVolumeRequest) -> Result<(), Status> {
        self.publish_request_within(request, CALL_DEADLINE)
    }

    fn publish_request_within(
        &self,
        request: NodePublishVolumeRequest,
        deadline: Duration,
    ) -> Result<(), Status> {
        let mut request = Request::new(request);
        request.set_timeout(deadline);
        self.node(async |mut client| client.node_publish_volume(request).await).map(|_| ())
    }

    /// Publishes, and expects success.
    #[track_caller]
    pub fn publish_well(&self, volume: &Volume) {
        if let Err(status) = self.publish(volume) {
            panic!("publishing failed with {:?}: {}", status.code(), status.message());
        }
    }

    /// Publishes, and expects this failure. Returns its message.
    #[track_caller]
    pub fn publish_badly(&self, volume: &Volume, code: Code) -> String {
        match self.publish(volume) {
            Ok(()) => panic!("publishing worked, and should have failed with {code:?}"),
            Err(status) => {
                assert_eq!(status.code(), code, "{}", status.message());
                status.message().to_owned()
            }
        }
    }

    /// Unpublishes and then removes the kubelet's own part, with rmdir only, as the kubelet does.
    #[track_caller]
    pub fn unpublish(&self, volume: &Volume) {
        if let Err(status) =
            self.unpublish_request(&volume.request.volume_id, &volume.request.target_path)
        {
            panic!("unpublishing failed with {:?}: {}", status.code(), status.message());
        }
        assert_eq!(mounts_at(volume.target()), Vec::new(), "unpublish left a mount");
        assert!(fs::symlink_metadata(volume.target()).is_err(), "unpublish left the target");
        let _ = fs::remove_file(volume.parent.join("vol_data.json"));
        if volume.parent.exists() {
            fs::remove_dir(&volume.parent)
                .expect("the driver left something in the kubelet's folder");
        }
    }

    /// Makes the call alone.
    pub fn unpublish_request(&self, volume_id: &str, target: &str) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: volume_id.to_owned(),
            target_path: target.to_owned(),
        };
        let mut request = Request::new(request);
        request.set_timeout(CALL_DEADLINE);
        self.node(async |mut client| client.node_unpublish_volume(request).await).map(|_| ())
    }

    /// Makes a call of the node service, on a connection of its own.
    pub fn node<T>(
        &self,
        call: impl AsyncFnOnce(NodeClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, Status> {
        block_on(async { call(NodeClient::new(connect(&self.socket).await?)).await })
            .map(Response::into_inner)
    }

    /// Makes a call of the identity service, as node-driver-registrar and livenessprobe do.
    pub fn identity<T>(
        &self,
        call: impl AsyncFnOnce(IdentityClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, Status> {
        block_on(async { call(IdentityClient::new(connect(&self.socket).await?)).await })
            .map(Response::into_inner)
    }

    /// Makes a call of the plugin watcher on a registration socket.
    pub fn registration<T>(
        &self,
        socket: &Path,
        call: impl AsyncFnOnce(RegistrationClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, Status> {
        block_on(async { call(RegistrationClient::new(connect(socket).await?)).await })
            .map(Response::into_inner)
    }

    /// Returns the kubelet's root directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

/// Returns the capability of a mounted volume with this access mode, as the kubelet sends it.
pub fn capability(mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume::default())),
        access_mode: Some(AccessMode { mode: mode.into() }),
    }
}

/// Asserts the contract's promises for every message.
#[track_caller]
fn assert_well_worded(status: &Status) {
    let message = status.message();
    assert!(!message.is_empty(), "{:?} without a message", status.code());
    assert!(message.len() < 1024, "a message of {} bytes", message.len());
    assert!(!message.contains('\n'), "a message of several lines: {message}");
    assert!(status.details().is_empty(), "status details must be empty");
}

async fn connect(socket: &Path) -> Result<Channel, Status> {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // The kubelet's authority for Unix sockets.
    Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .map_err(|error| Status::unavailable(format!("cannot connect: {error:?}")))
}
