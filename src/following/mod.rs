//! Follows the tags of mounted volumes: a third source of references for `warming`'s engine.
//!
//! At the interval of its volume each task asks the registry what the tag means, fetches it as a publish would, with
//! the node's policy and signatures, and makes the volume show it. Whatever fails, the volume shows what it showed, and
//! says so: in `ls`, in metrics, and in an Event of its pod.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::kubernetes::{EventRecorder, PodReference};
use crate::volume::{FollowedVolume, NodeContent, VolumeError, VolumeManager};
use crate::warming::{
    Attempt, DesiredReference, Reconciler, ReferenceState, RefreshError, RefreshOutcome, Schedule,
    blocking,
};
use oci::backoff::{RetryBackoff, jittered};
use oci::{Digest, Platform};
use pull::{PullError, Tenant};
use store::resolution_records::Resolution;
use store::{FollowKey, StoreError, Tree};
use sys::fault;
use sys::weak_map::WeakMap;
use text::human_units::Bytes;

/// The most volumes of one tenant that fetch at once. Others have places left while a registry of one does not answer.
const AT_ONCE_BY_TENANT: usize = 2;
/// The pauses after failures. The longest one is also the longest until a registry that is back is noticed, unless the
/// interval is longer.
const BACKOFF: RetryBackoff =
    RetryBackoff { first: Duration::from_secs(10), longest: Duration::from_mins(10) };

/// Follows the tags of all mounted volumes that ask for it.
pub struct TagFollower {
    /// The content to fetch.
    pub content: NodeContent,
    /// The volumes, and their switch.
    pub volumes: VolumeManager,
    /// The followed tags, for `ls` and metrics.
    pub state: FollowState,
    /// Reports on pods; `None` if Events are off.
    pub events: Option<EventRecorder>,
}

/// The followed tags and their counts. Clones share them.
#[derive(Clone, Default)]
pub struct FollowState {
    /// The tags of all volumes.
    pub tags: Arc<Reconciler<FollowedTag>>,
    switches: Arc<AtomicU64>,
}

impl FollowState {
    /// Returns the number of switches since the start.
    pub fn switches(&self) -> u64 {
        self.switches.load(Ordering::Relaxed)
    }
}

/// The tag of one volume.
pub struct FollowedTag {
    /// The volume that shows what the tag means.
    pub volume: Arc<FollowedVolume>,
    shared: Arc<Shared>,
    /// The volume had its credentials when the task was started.
    has_credentials: bool,
    /// The last failure that an Event has told.
    told: Mutex<Option<String>>,
}

struct Shared {
    content: NodeContent,
    volumes: VolumeManager,
    events: Option<EventRecorder>,
    state: FollowState,
    slots: WeakMap<Tenant, Semaphore>,
}

impl TagFollower {
    /// Runs until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let Self { content, volumes, state, events } = self;
        let (tags, slots) = (Arc::clone(&state.tags), WeakMap::default());
        let shared = Arc::new(Shared { content, volumes, events, state, slots });
        let list = Arc::clone(shared.volumes.followed());
        let follow = async {
            loop {
                let wanted = list.all().into_iter().map(|volume| FollowedTag {
                    has_credentials: !volume.lacks_credentials(),
                    volume,
                    shared: Arc::clone(&shared),
                    told: Mutex::default(),
                });
                tags.apply(wanted).await;
                list.changed().await;
            }
        };
        shutdown.run_until_cancelled(follow).await;
        tags.apply([]).await;
    }
}

impl DesiredReference for FollowedTag {
    type Key = FollowKey;
    const AT_ONCE: usize = 8;

    fn key(&self) -> FollowKey {
        self.volume.key
    }

    /// A volume that was published again is another one. One that got the credentials that it lacked is asked for
    /// within its interval, however long its pause was.
    fn must_restart(&self, earlier: &Self, _: &ReferenceState) -> bool {
        !Arc::ptr_eq(&self.volume, &earlier.volume)
            || self.has_credentials != earlier.has_credentials
    }

    fn schedule(&self) -> Schedule {
        let interval = self.volume.interval();
        // A random moment: the volumes of a node are found together when the driver starts.
        let delay = jittered(interval);
        Schedule {
            delay,
            delay_if_present: delay,
            interval: Some(interval),
            backoff: RetryBackoff {
                longest: fault::milliseconds("CSI_OCI_FOLLOW_PAUSE")
                    .map_or(BACKOFF.longest.max(interval), Duration::from_millis),
                ..BACKOFF
            },
            retries: u32::MAX,
        }
    }

    async fn find(&self) -> RefreshOutcome {
        let (store, key) = (self.shared.content.store.clone(), self.volume.key);
        let shown = tokio::task::spawn_blocking(move || store.followed().current(key)).await;
        let manifest = shown.ok().flatten().map(|tree| tree.record.manifest);
        RefreshOutcome { manifest, ..RefreshOutcome::default() }
    }

    async fn refresh(&self, attempt: &Attempt) -> RefreshOutcome {
        let slots =
            self.shared.slots.get(self.volume.tenant(), || Semaphore::new(AT_ONCE_BY_TENANT));
        let _tenants = slots.acquire().await;
        let _slot = attempt.begin().await;
        match self.follow(attempt).await {
            Ok(manifest) => {
                self.told.lock().take();
                RefreshOutcome { manifest: Some(manifest), ..RefreshOutcome::default() }
            }
            Err(failure) => {
                self.tell(&failure);
                RefreshOutcome { failure: Some(failure), ..self.find().await }
            }
        }
    }

    fn log(&self, state: &ReferenceState) {
        let Some(RefreshError { message: reason, .. }) = &state.outcome.failure else { return };
        let reference = self.volume.reference().to_string();
        let (volume, again_in_seconds) = (self.volume.name(), state.next_seconds());
        tracing::warn!(reference, volume, reason, again_in_seconds, "the tag is not followed now");
    }
}

impl FollowedTag {
    /// Returns whether the last attempt succeeded, or none was made.
    pub fn is_current(state: &ReferenceState) -> bool {
        state.outcome.failure.is_none()
    }

    /// Returns the number of versions on the disk.
    pub fn versions(&self) -> usize {
        self.shared.content.store.followed().versions(self.volume.key)
    }

    /// Resolves the tag, fetches its content, and makes the volume show it. Returns the manifest.
    async fn follow(&self, attempt: &Attempt) -> Result<Digest, RefreshError> {
        let Self { volume, shared, .. } = self;
        let content = &shared.content;
        let (asked, of_policy) = (Arc::clone(volume), content.clone());
        let demands =
            blocking(move || asked.demands(&of_policy).map_err(|error| of_volume(&error)));
        let want = volume.want(&demands.await?);
        let acquired = content.puller.acquire_unremembered(&want, &attempt.view).await;
        let (tree, resolution) = acquired.map_err(|error| self.of_pull(&error))?;
        let switched = shared.volumes.switch(content, volume, &tree).await;
        if switched.map_err(|error| of_volume(&error))? {
            shared.state.switches.fetch_add(1, Ordering::Relaxed);
            self.tell_switch(&tree);
            // A pull has used disk space, and the earlier version may be the oldest of too many.
            content.maintenance.notify_one();
        }
        self.remember(resolution).await?;
        Ok(tree.record.manifest)
    }

    /// Records what the tag means, so that a new pod with `IfNotPresent` does not begin with earlier content.
    async fn remember(&self, resolution: Resolution) -> Result<(), RefreshError> {
        let reference = self.volume.reference().clone();
        let platform = self.volume.attributes.platform.clone();
        let (store, platform) =
            (self.shared.content.store.clone(), platform.unwrap_or_else(Platform::of_this_node));
        blocking(move || {
            let known = store.resolutions().get(&reference, &platform);
            if known.is_some_and(|known| known.manifest == resolution.manifest) {
                return Ok(());
            }
            let put = store.resolutions().put(&reference, &platform, &resolution);
            put.map_err(|error: StoreError| RefreshError::new("disk", &error))
        })
        .await
    }

    fn of_pull(&self, error: &PullError) -> RefreshError {
        let (_, reason) = error.outcome();
        if self.volume.lacks_credentials()
            && matches!(reason, "unauthorized" | "forbidden" | "not_found")
        {
            let message = format!(
                "the pod's credentials were lost when the driver restarted, and without them: {error}. The kubelet \
                 sends them again if follow.enabled is set in the chart; else delete the pod, so that its successor brings them"
            );
            // It is no failure of the registry, and needs no back-off.
            return RefreshError { reason: "credentials_lost", message, is_waiting: true };
        }
        RefreshError::new(reason, error)
    }

    fn tell_switch(&self, tree: &Tree) {
        let reference = self.volume.reference().to_string();
        let (digest, bytes) = (tree.record.manifest.to_string(), tree.record.bytes);
        tracing::info!(
            reference,
            digest,
            bytes,
            volume = self.volume.name(),
            "switched to what the tag means now"
        );
        if let (Some(events), Some(pod)) = (&self.shared.events, self.pod()) {
            events.switched(&pod, &reference, format!("{digest}, {}", Bytes(bytes)));
        }
    }

    /// Reports a failure as an Event, unless the last one was the same.
    fn tell(&self, failure: &RefreshError) {
        if self.told.lock().replace(failure.message.clone()).as_ref() == Some(&failure.message) {
            return;
        }
        let reference = self.volume.reference().to_string();
        if let (Some(events), Some(pod)) = (&self.shared.events, self.pod()) {
            events.not_followed(&pod, &reference, failure.message.clone());
        }
    }

    fn pod(&self) -> Option<PodReference> {
        let FollowedVolume { pod, target, .. } = &*self.volume;
        let (namespace, name) = (pod.namespace.clone()?, pod.name.clone()?);
        let uid = pod.uid.clone().or_else(|| target.pod_uid().map(str::to_owned))?;
        Some(PodReference { namespace, name, uid })
    }
}

/// Returns a failure of the policy, or of the node.
fn of_volume(error: &VolumeError) -> RefreshError {
    let reason = match error {
        VolumeError::Policy { .. } | VolumeError::NotReady(_) => "policy",
        VolumeError::Store(StoreError::CannotFollow { .. }) => "content",
        _ => "disk",
    };
    RefreshError::new(reason, error)
}
