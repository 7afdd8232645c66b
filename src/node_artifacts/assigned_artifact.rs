//! One artifact of a preload: how it is fetched, pinned and recorded.

use std::sync::Arc;
use std::time::Duration;

use super::ArtifactKey;
use crate::volume::NodeContent;
use crate::warming::{
    Attempt, DemandsError, DesiredReference, ReferenceState, RefreshError, RefreshOutcome,
    Schedule, SourcePins, blocking, demands,
};
use oci::backoff::RetryBackoff;
use oci::credentials::Keyring;
use oci::manifest::ManifestError;
use oci::reference::ReferenceError;
use oci::registry::RegistryError;
use oci::{Digest, Platform, Reference};
use policy::PolicyDemands;
use preload::api::{Phase, QUOTA_EXCEEDED, WantedArtifact};
use preload::sealed_credentials::{NodeKey, SealContext};
use pull::{PullError, Tenant, Want};
use store::resolution_records::Resolution;
use store::resolution_records::namespace_resolutions::NamespaceResolution;
use store::{StoreError, Tree};

/// The prefix of a pin's owner, before the preload's `namespace/name`.
pub const OWNERS: &str = "preload/";
/// The pauses after failures.
const BACKOFF: RetryBackoff =
    RetryBackoff { first: Duration::from_secs(5), longest: Duration::from_mins(4) };
/// The granularity of reported progress, in per cent.
const STEP: u64 = 25;

/// The parts of the node that its artifacts need.
pub(super) struct ArtifactContext {
    pub(super) node: String,
    pub(super) content: NodeContent,
    pub(super) key: NodeKey,
    pub(super) pins: SourcePins,
}

/// An artifact that the node has to hold.
#[derive(Clone)]
pub(super) struct AssignedArtifact {
    pub(super) wanted: WantedArtifact,
    pub(super) context: Arc<ArtifactContext>,
}

impl DesiredReference for AssignedArtifact {
    type Key = ArtifactKey;
    const AT_ONCE: usize = 4;

    fn key(&self) -> ArtifactKey {
        (self.wanted.preload.clone(), self.wanted.reference.clone())
    }

    /// A task keeps its assignment while the artifact is ready, and is restarted for new credentials when it has to fetch
    /// again.
    fn must_restart(&self, earlier: &Self, state: &ReferenceState) -> bool {
        let (wanted, earlier) = (&self.wanted, &earlier.wanted);
        let version = |wanted: &WantedArtifact| {
            let credentials = wanted.credentials.as_ref();
            credentials.map(|credentials| (credentials.key.clone(), credentials.version.clone()))
        };
        let how =
            |wanted: &WantedArtifact| (wanted.pin, wanted.timeout_seconds, wanted.backoff_limit);
        let has_answer = wanted.resolved_at.is_some() && wanted.resolved_at != earlier.resolved_at;
        let others = version(wanted) != version(earlier);
        let is_ready = state.phase(self.retries()) == Phase::Ready;
        how(wanted) != how(earlier) || (others && !is_ready) || has_answer
    }

    fn schedule(&self) -> Schedule {
        Schedule {
            delay: Duration::ZERO,
            delay_if_present: Schedule::LONG_INTERVAL,
            // Without a pin it may be evicted again. With one, damage may be found.
            interval: self.wanted.pin.then_some(Schedule::LONG_INTERVAL),
            backoff: BACKOFF,
            retries: self.retries(),
        }
    }

    async fn find(&self) -> RefreshOutcome {
        let artifact = self.clone();
        let found = blocking(move || {
            let reference = artifact.reference()?;
            let Some(manifest) = artifact.held(&reference) else { return Ok(None) };
            artifact.record_tag(&reference, manifest).map(|()| Some(manifest))
        });
        RefreshOutcome { manifest: found.await.ok().flatten(), ..RefreshOutcome::default() }
    }

    async fn refresh(&self, attempt: &Attempt) -> RefreshOutcome {
        let found = self.find().await;
        if found.manifest.is_some() {
            return found;
        }
        attempt.mark_missing();
        match self.fetch(attempt).await {
            Ok(manifest) => RefreshOutcome { manifest: Some(manifest), ..found },
            Err(failure) => RefreshOutcome { failure: Some(failure), ..found },
        }
    }
}

impl AssignedArtifact {
    /// Returns the retries until the artifact counts as failed.
    pub(super) fn retries(&self) -> u32 {
        let limit = if self.reference().is_ok() { self.wanted.backoff_limit } else { 0 };
        u32::try_from(limit).unwrap_or(0)
    }

    /// Returns the progress of the download in per cent, rounded down; `None` if nothing is being fetched.
    pub(super) fn percent(state: &ReferenceState) -> Option<i32> {
        let snapshot = state.pulling.as_ref()?.snapshot();
        let percent = (snapshot.done * 100).checked_div(snapshot.total)?.min(100);
        i32::try_from(percent / STEP * STEP).ok()
    }

    /// Returns the owner of its pin.
    pub(super) fn owner(wanted: &WantedArtifact) -> String {
        format!("{OWNERS}{}", wanted.preload)
    }

    fn reference(&self) -> Result<Reference, RefreshError> {
        let parsed = self.wanted.reference.parse();
        parsed.map_err(|error: ReferenceError| RefreshError::new("InvalidReference", &error))
    }

    /// Returns the namespace of the preload, whose name is `namespace/name`.
    fn namespace(&self) -> Option<&str> {
        self.wanted.preload.split('/').next()
    }

    /// Returns the manifest that is pinned for the preload, if the node has its whole tree.
    fn held(&self, reference: &Reference) -> Option<Digest> {
        if !self.wanted.pin {
            return None;
        }
        let store = &self.context.content.store;
        let owner = Self::owner(&self.wanted);
        let pin = store.pins().get(reference, &Platform::of_this_node(), &owner)?;
        let trees = store.inventory().sound_trees().ok()?;
        // A tree with patterns has only a part of the artifact.
        let is_whole = |tree: &Tree| {
            let view = &tree.record.view;
            tree.record.manifest == pin.manifest
                && view.include.is_empty()
                && view.exclude.is_empty()
        };
        trees.iter().any(is_whole).then_some(pin.manifest)
    }

    async fn fetch(&self, attempt: &Attempt) -> Result<Digest, RefreshError> {
        let reference = self.reference()?;
        let keyring = self.keyring(&reference)?;
        let demands = self.demands(&reference).await?;
        let slot = attempt.begin().await;
        let PolicyDemands { maximum_bytes, signature, .. } = demands;
        let platform = Platform::of_this_node();
        let tenant = Tenant::of_pod(self.namespace(), None);
        // The reference has a digest, so the registry is only asked for missing content.
        let want = Want::of_node(reference.clone(), platform, tenant);
        let want = Want { keyring, maximum_bytes, signature, ..want };
        let seconds = u64::try_from(self.wanted.timeout_seconds).unwrap_or(1).max(1);
        let acquire = self.context.content.puller.acquire(&want, &attempt.view);
        let acquired = tokio::time::timeout(Duration::from_secs(seconds), acquire).await;
        let acquired = acquired.map_err(|_| {
            let message = format!(
                "it took longer than {seconds} s; what has come stays for the next try, see spec.timeoutSeconds"
            );
            RefreshError::new("TimedOut", &message)
        })?;
        let tree = acquired.map_err(|error| RefreshError::new(reason(&error), &error))?;
        let (artifact, manifest) = (self.clone(), tree.record.manifest);
        let pinned = blocking(move || {
            if artifact.wanted.pin {
                let owner = Self::owner(&artifact.wanted);
                let pinned = artifact.context.pins.add(&owner, &reference, manifest);
                pinned.map_err(|error| pin_error(&error))?;
            }
            artifact.record_tag(&reference, manifest)
        });
        pinned.await?;
        drop(slot);
        self.context.content.maintenance.notify_one();
        Ok(manifest)
    }

    /// Records the registry's resolution of the tag, for pods of the preload's namespace.
    fn record_tag(&self, reference: &Reference, manifest: Digest) -> Result<(), RefreshError> {
        let (Some(resolved_at), Some(resolved), Some(namespace)) =
            (&self.wanted.resolved_at, reference.digest(), self.namespace())
        else {
            return Ok(());
        };
        let (reference, platform) = (reference.floating(), Platform::of_this_node());
        let answer = NamespaceResolution {
            resolution: Resolution {
                reference: reference.to_string(),
                resolved,
                manifest,
                platform: Some(platform.to_string()),
            },
            namespace: namespace.to_owned(),
            resolved_at: resolved_at.0.as_second(),
        };
        let resolutions = self.context.content.store.resolutions();
        let recorded = resolutions.put_for_namespace(&reference, &platform, &answer);
        recorded.map_err(|error| RefreshError::new("NotRecorded", &error))
    }

    /// Returns the credentials of the assignment. The puller adds the node's own.
    fn keyring(&self, reference: &Reference) -> Result<Keyring, RefreshError> {
        let Some(sealed) = &self.wanted.credentials else { return Ok(Keyring::empty()) };
        let context = SealContext {
            node: &self.context.node,
            preload: &self.wanted.preload,
            reference: &self.wanted.reference,
        };
        match self.context.key.open(&sealed.data, context) {
            Ok(credentials) => Ok(Keyring::of_host(reference.repository().host(), credentials)),
            // Sealed to the key of an earlier process. The controller seals them again, which restarts the task.
            Err(error) => Err(RefreshError {
                is_waiting: true,
                ..RefreshError::new("WaitingForCredentials", &error)
            }),
        }
    }

    /// Returns the demands of the node's policy, or why it does not allow the artifact in the preload's namespace.
    async fn demands(&self, reference: &Reference) -> Result<PolicyDemands, RefreshError> {
        let decided = demands(&self.context.content, reference, self.namespace()).await;
        decided.map_err(|error| match error {
            DemandsError::Refused(refusal) => RefreshError::new("PolicyDenied", &refusal),
            DemandsError::Unreadable(reason) => RefreshError::new("PolicyUnreadable", &reason),
        })
    }
}

/// Returns the failure to pin, with what to change.
fn pin_error(error: &StoreError) -> RefreshError {
    if !matches!(error, StoreError::PinShareExceeded { .. }) {
        return RefreshError::new("NotPinned", error);
    }
    let message = format!(
        "{error}: delete some, or have controller.maxPinnedBytesPerNamespace of the chart raised"
    );
    RefreshError::new(QUOTA_EXCEEDED, &message)
}

/// Returns the reason of a failed pull as one word.
fn reason(error: &PullError) -> &'static str {
    match error.root() {
        PullError::Registry(RegistryError::NotFound { .. }) => "NotFound",
        PullError::Registry(RegistryError::Unauthorized { .. }) => "Unauthorized",
        PullError::Registry(RegistryError::Forbidden { .. }) => "Forbidden",
        PullError::Registry(error) if error.is_transient() => "RegistryUnavailable",
        PullError::Registry(_) => "RegistryRefused",
        PullError::Manifest(ManifestError::NoPlatform { .. }) => "PlatformMissing",
        PullError::Signature { .. } | PullError::TooManyBytes { .. } => "PolicyDenied",
        PullError::Provider(_) => "CredentialProvider",
        error if error.is_full() => "NoRoom",
        _ => "PullFailed",
    }
}
