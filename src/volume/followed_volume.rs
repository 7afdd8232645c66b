//! Volumes that follow a tag: their credentials in memory, and their switch to another tree.
//!
//! A volume is in the [`FollowList`] while it is mounted: from its publish or, after a restart of the driver, from the
//! comparison of records and mounts. `following` asks the registry for each, and calls [`VolumeManager::switch`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::error::VolumeError;
use super::publish_request::{PodInfo, PublishRequest};
use super::publish_volume::decide;
use super::target_path::TargetPath;
use super::volume_attributes::VolumeAttributes;
use super::{Follow, NodeContent, VolumeManager};
use oci::credentials::{Keyring, WorkloadIdentity};
use oci::{Digest, Reference};
use policy::PolicyDemands;
use pull::{Priority, PullPolicy, Tenant, Want};
use store::followed_volumes::FollowRecord;
use store::publication_records::boot_id;
use store::{FollowKey, MountedContent, StoreError, Tree};
use sys::mount::TargetState;

/// A mounted volume that follows a tag.
pub struct FollowedVolume {
    /// The key of the volume.
    pub key: FollowKey,
    /// The CSI volume id.
    pub volume_id: String,
    /// The target of its mount.
    pub target: TargetPath,
    /// Its attributes, with the interval.
    pub attributes: VolumeAttributes,
    follow: Follow,
    /// The hash of its attributes and mount flags.
    pub fingerprint: Digest,
    /// The pod that mounts it.
    pub pod: PodInfo,
    /// The volume had credentials of its own when it was published.
    had_credentials: bool,
    credentials: Mutex<Option<Credentials>>,
}

/// Credentials of a volume. They are in memory alone.
#[derive(Clone)]
struct Credentials {
    keyring: Keyring,
    identity: Option<WorkloadIdentity>,
}

/// The volumes that follow a tag, by target.
#[derive(Default)]
pub struct FollowList {
    volumes: Mutex<BTreeMap<PathBuf, Arc<FollowedVolume>>>,
    /// Woken when a volume comes, goes, or gets the credentials that it lacked.
    changed: Notify,
}

impl FollowList {
    /// Returns all volumes.
    pub fn all(&self) -> Vec<Arc<FollowedVolume>> {
        self.volumes.lock().values().cloned().collect()
    }

    /// Waits for a volume that comes, goes or gets the credentials that it lacked.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    fn get(&self, target: &Path) -> Option<Arc<FollowedVolume>> {
        self.volumes.lock().get(target).cloned()
    }

    fn insert(&self, volume: FollowedVolume) {
        self.volumes.lock().insert(volume.target.full(), Arc::new(volume));
        self.changed.notify_one();
    }

    /// Stops to follow what was at a target.
    pub(super) fn remove(&self, target: &Path) {
        if self.volumes.lock().remove(target).is_some() {
            self.changed.notify_one();
        }
    }
}

impl FollowedVolume {
    fn of(request: &PublishRequest, follow: &Follow) -> Self {
        let (keyring, identity) = (request.keyring.clone().ok(), request.identity.clone());
        let fingerprint = request.attributes.fingerprint(request.flags);
        let had_credentials = keyring.as_ref().is_none_or(|keyring| !keyring.is_empty());
        Self {
            key: FollowKey::new(&request.volume_id, &request.target.full(), fingerprint),
            volume_id: request.volume_id.clone(),
            target: request.target.clone(),
            attributes: request.attributes.clone(),
            follow: follow.clone(),
            fingerprint,
            pod: request.pod.clone(),
            had_credentials: had_credentials
                || identity.as_ref().is_some_and(WorkloadIdentity::has_tokens),
            credentials: Mutex::new(keyring.map(|keyring| Credentials { keyring, identity })),
        }
    }

    /// Returns a volume that an earlier process published. Its credentials are lost.
    fn of_record(record: FollowRecord, target: TargetPath) -> Result<Self, VolumeError> {
        let attributes = VolumeAttributes::parse(&record.attributes.clone().into_iter().collect())?;
        let follow = attributes.follow.clone().ok_or_else(|| {
            VolumeError::Invalid("the record of a followed volume has no interval".to_owned())
        })?;
        let (name, namespace, uid) =
            (record.pod.clone(), record.namespace.clone(), record.uid.clone());
        Ok(Self {
            key: record.key(),
            volume_id: record.volume_id,
            target,
            attributes,
            follow,
            fingerprint: record.fingerprint,
            pod: PodInfo { name, namespace, uid, service_account: None },
            had_credentials: record.had_credentials,
            credentials: Mutex::new(None),
        })
    }

    fn record(&self) -> FollowRecord {
        FollowRecord {
            volume_id: self.volume_id.clone(),
            target: self.target.full(),
            fingerprint: self.fingerprint,
            boot_id: boot_id(),
            attributes: self.follow.attributes.clone(),
            namespace: self.pod.namespace.clone(),
            pod: self.pod.name.clone(),
            uid: self.pod.uid.clone(),
            had_credentials: self.had_credentials,
        }
    }

    /// Returns whether the volume had credentials that a restart of the driver has lost.
    pub fn lacks_credentials(&self) -> bool {
        self.had_credentials && self.credentials.lock().is_none()
    }

    /// Returns `namespace/name` of the pod, or the volume id.
    pub fn name(&self) -> String {
        self.pod.full_name().unwrap_or_else(|| self.volume_id.clone())
    }

    /// Returns the interval between two requests for the digest of its tag.
    pub const fn interval(&self) -> Duration {
        self.follow.interval
    }

    /// Returns the reference whose tag it follows.
    pub const fn reference(&self) -> &Reference {
        &self.follow.artifact.reference
    }

    /// Returns the tenant that its pulls count for.
    pub fn tenant(&self) -> Tenant {
        let uid = self.pod.uid.as_deref().or_else(|| self.target.pod_uid());
        Tenant::of_pod(self.pod.namespace.as_deref(), uid)
    }

    /// Returns the demands of the node's policy, as of now. Blocking.
    pub fn demands(&self, content: &NodeContent) -> Result<PolicyDemands, VolumeError> {
        let (artifact, namespace) = (&self.follow.artifact, self.pod.namespace.as_deref());
        decide(content, artifact, self.attributes.require_signature, namespace)
    }

    /// Returns the pull of what its tag means now. No pod waits for it.
    pub fn want(&self, demands: &PolicyDemands) -> Want {
        let credentials = self.credentials.lock().clone();
        let (keyring, identity) = credentials
            .map(|Credentials { keyring, identity }| (keyring, identity))
            .unwrap_or_default();
        let (artifact, identity) = (&self.follow.artifact, identity.as_ref());
        let want = self.attributes.want(artifact, demands, &keyring, identity, &self.tenant());
        Want { policy: PullPolicy::Always, priority: Priority::Warm, ..want }
    }
}

impl PublishRequest {
    /// Returns the key of the volume if it follows a tag.
    pub(super) fn follow_key(&self) -> Option<FollowKey> {
        self.attributes.follow.as_ref()?;
        let fingerprint = self.attributes.fingerprint(self.flags);
        Some(FollowKey::new(&self.volume_id, &self.target.full(), fingerprint))
    }

    /// Returns the record of the volume if it follows a tag.
    pub(super) fn follow_record(&self) -> Option<FollowRecord> {
        let follow = self.attributes.follow.as_ref()?;
        Some(FollowedVolume::of(self, follow).record())
    }
}

impl VolumeManager {
    /// Returns the volumes that follow a tag.
    pub fn followed(&self) -> &Arc<FollowList> {
        &self.0.followed
    }

    /// Follows a volume that is mounted, with the credentials of this request: a later call of the kubelet renews them.
    pub(super) fn follow(&self, request: &PublishRequest) {
        let Some(follow) = &request.attributes.follow else { return };
        let volume = FollowedVolume::of(request, follow);
        let known = self.0.followed.get(&request.target.full());
        let Some(known) = known.filter(|known| known.key == volume.key) else {
            return self.0.followed.insert(volume);
        };
        // A malformed secret renews nothing.
        let Ok(keyring) = request.keyring.clone() else { return };
        let credentials = Credentials { keyring, identity: request.identity.clone() };
        if known.credentials.lock().replace(credentials).is_none() {
            self.0.followed.changed.notify_one();
        }
    }

    /// Follows a mounted volume that an earlier process published. Blocking.
    pub(super) fn follow_again(&self, content: &NodeContent, key: FollowKey, target: TargetPath) {
        if self.0.followed.get(&target.full()).is_some() {
            return;
        }
        let record = content.store.followed().record(key);
        let Some(record) = record.filter(|record| record.target == target.full()) else { return };
        match FollowedVolume::of_record(record, target) {
            Ok(volume) => {
                // A crash may have come between a switch and the record of it.
                let known = content.store.publications().get(&volume.target.full());
                if let (Some(mut known), Some(tree)) =
                    (known, content.store.followed().current(key))
                    && known.manifest != tree.record.manifest
                {
                    known.shows(&tree);
                    let _ = content.store.publications().put(&known);
                }
                self.0.followed.insert(volume);
            }
            Err(error) => tracing::warn!(%error, "a volume is not followed any more"),
        }
    }

    /// Makes a volume show another tree. Returns false if it shows it already.
    pub async fn switch(
        &self,
        content: &NodeContent,
        volume: &Arc<FollowedVolume>,
        tree: &Tree,
    ) -> Result<bool, VolumeError> {
        let (volumes, content) = (self.clone(), content.clone());
        let (volume, tree) = (Arc::clone(volume), tree.clone());
        // A task of its own: it changes the disk also if the caller has gone.
        let switch = self.0.tracker.spawn(async move {
            let (store, key) = (content.store.clone(), volume.key);
            let of_job = tree.clone();
            let link = move || {
                let shown = store.followed().current(key);
                let is_shown = shown.is_some_and(|shown| {
                    (shown.key, shown.generation) == (of_job.key, of_job.generation)
                });
                if is_shown { Ok(None) } else { store.followed().link(&of_job).map(Some) }
            };
            // Linking may take long, and holds no lock.
            let linked = tokio::task::spawn_blocking(link).await;
            let linked: Result<_, StoreError> = linked.map_err(|_| VolumeError::Crashed)?;
            let Some(version) = linked? else { return Ok(false) };
            let turn = volumes.0.target_locks.begin_publish(&volume.target.full());
            let held = turn.lock().await;
            let switch = move || {
                let _held = held;
                if !volumes.is_mounted(&volume) {
                    return Ok(false);
                }
                let switched = content.store.followed().switch(volume.key, version)?;
                if switched {
                    let publications = content.store.publications();
                    if let Some(mut record) = publications.get(&volume.target.full()) {
                        record.shows(&tree);
                        if let Err(error) = publications.put(&record) {
                            tracing::warn!(%error, "the record of a followed volume is stale");
                        }
                    }
                    content.store.trees().mark_published(&tree);
                }
                Ok(switched)
            };
            tokio::task::spawn_blocking(switch).await.unwrap_or(Err(VolumeError::Crashed))
        });
        switch.await.unwrap_or(Err(VolumeError::Crashed))
    }

    /// Returns whether a volume is still mounted, and followed. Under the target's lock.
    fn is_mounted(&self, volume: &Arc<FollowedVolume>) -> bool {
        let target = &volume.target;
        let is_listed =
            self.0.followed.get(&target.full()).is_some_and(|known| Arc::ptr_eq(&known, volume));
        let state = target.open().and_then(|target| target.state());
        let is_shown = |state| match state {
            TargetState::Mounted(origin) => {
                MountedContent::of(&origin) == Some(MountedContent::Followed(volume.key))
            }
            _ => false,
        };
        is_listed && state.is_ok_and(is_shown)
    }
}
