//! Fetches, pins and retries one artifact of a preload.
//!
//! A job runs until it is stopped: it checks what is pinned from time to time, and retries failures at long intervals.
//! It only waits for the pull, which belongs to the node and may be shared with pods.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::pins::PreloadPins;
use super::{JobKey, NodeKey};
use crate::volume::NodeContent;
use crate::warming::{DemandsError, demands, want};
use oci::credentials::Keyring;
use oci::manifest::ManifestError;
use oci::registry::RegistryError;
use oci::{Digest, Platform, Reference};
use policy::PolicyDemands;
use preload::api::{Phase, WantedArtifact};
use preload::sealed_credentials::SealContext;
use pull::{ProgressView, PullError, PullPolicy, Tenant, Want};
use store::resolution_records::Resolution;
use store::resolution_records::namespace_resolutions::NamespaceResolution;

/// The delay after a first failure; doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// The longest delay until the artifact counts as failed.
const LONGEST_PAUSE: Duration = Duration::from_mins(4);
/// The interval of retries of a failed artifact: disk space may be freed, a registry may come back.
const FAILED_AGAIN: Duration = Duration::from_mins(10);
/// The interval of checks of a pinned artifact: damage may have been found.
const LOOK_INTERVAL: Duration = Duration::from_mins(10);
/// The reason of a failure to open sealed credentials: they were sealed to the key of an earlier process.
const WAITING_FOR_CREDENTIALS: &str = "WaitingForCredentials";
/// The granularity of reported progress, in per cent.
const STEP: u64 = 25;

/// A job, as its owner sees it.
pub(super) struct PreloadJob {
    /// The assignment of the artifact.
    pub(super) wanted: WantedArtifact,
    state: Option<JobState>,
    since: Timestamp,
    view: ProgressView,
    run: u64,
    stop: CancellationToken,
}

/// The last reported state of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
struct JobState {
    phase: Phase,
    reason: &'static str,
    message: String,
}

/// A report of a new state.
pub(super) struct JobReport {
    pub(super) key: JobKey,
    /// The number of the job, to ignore a late report of an earlier job with this key.
    run: u64,
    state: JobState,
}

/// The parts that a job needs.
pub(super) struct JobContext {
    pub(super) node: String,
    pub(super) content: NodeContent,
    pub(super) key: Arc<NodeKey>,
    pub(super) pins: PreloadPins,
    pub(super) permits: Arc<Semaphore>,
    pub(super) reports: mpsc::UnboundedSender<JobReport>,
}

/// A failed attempt.
struct AttemptError {
    reason: &'static str,
    message: String,
}

impl PreloadJob {
    /// Stops the job. A pull that it waits for may continue for other callers.
    pub(super) fn stop(&self) {
        self.stop.cancel();
    }

    /// Returns whether a changed assignment needs a new job.
    pub(super) fn must_restart(&self, wanted: &WantedArtifact) -> bool {
        let version = |wanted: &WantedArtifact| {
            let credentials = wanted.credentials.as_ref();
            credentials.map(|credentials| (credentials.key.clone(), credentials.version.clone()))
        };
        let how =
            |wanted: &WantedArtifact| (wanted.pin, wanted.timeout_seconds, wanted.backoff_limit);
        let ready = self.phase() == Phase::Ready;
        let others = version(wanted) != version(&self.wanted);
        let has_answer =
            wanted.resolved_at.is_some() && wanted.resolved_at != self.wanted.resolved_at;
        how(wanted) != how(&self.wanted) || (others && !ready) || has_answer
    }

    pub(super) fn note(&mut self, report: JobReport) {
        if report.run == self.run {
            if self.phase() == Phase::Ready && report.state.phase != Phase::Ready {
                self.since = now_in_seconds();
            }
            self.state = Some(report.state);
        }
    }

    /// Returns the time of the last start of fetching.
    pub(super) fn since(&self) -> Timestamp {
        self.since
    }

    /// Returns whether the job has reported a state.
    pub(super) fn is_known(&self) -> bool {
        self.state.is_some()
    }

    pub(super) fn phase(&self) -> Phase {
        self.state.as_ref().map_or(Phase::Waiting, |state| state.phase)
    }

    pub(super) fn reason(&self) -> &str {
        self.state.as_ref().map_or("", |state| state.reason)
    }

    pub(super) fn message(&self) -> &str {
        self.state.as_ref().map_or("", |state| &state.message)
    }

    /// Returns the progress of the download, rounded down; `None` if nothing is being fetched.
    pub(super) fn percent(&self) -> Option<i32> {
        if self.phase() != Phase::Pulling {
            return None;
        }
        let snapshot = self.view.snapshot();
        let percent = (snapshot.done * 100).checked_div(snapshot.total)?.min(100);
        i32::try_from(percent / STEP * STEP).ok()
    }
}

impl JobContext {
    /// Starts a job.
    pub(super) fn begin(self, wanted: WantedArtifact) -> PreloadJob {
        use std::sync::atomic::{AtomicU64, Ordering};
        static RUNS: AtomicU64 = AtomicU64::new(0);
        let run = RUNS.fetch_add(1, Ordering::Relaxed);
        let (stop, view) = (CancellationToken::new(), ProgressView::default());
        let running = RunningJob { context: self, wanted: wanted.clone(), view: view.clone(), run };
        let stopped = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = running.run() => {}
                () = stopped.cancelled() => {}
            }
        });
        PreloadJob { wanted, state: None, since: now_in_seconds(), view, run, stop }
    }
}

struct RunningJob {
    context: JobContext,
    wanted: WantedArtifact,
    view: ProgressView,
    run: u64,
}

impl RunningJob {
    async fn run(self) {
        let reference: Reference = match self.wanted.reference.parse() {
            Ok(reference) => reference,
            Err(error) => {
                let error: oci::reference::ReferenceError = error;
                return self.report(Phase::Failed, "InvalidReference", error.to_string());
            }
        };
        let mut failures = 0;
        loop {
            if self.wanted.pin
                && let Some(manifest) =
                    self.context.pins.holds(&self.wanted.preload, &reference).await
                && self.record_tag(&reference, manifest).await.is_ok()
            {
                failures = 0;
                self.report(Phase::Ready, "", String::new());
                tokio::time::sleep(LOOK_INTERVAL).await;
                continue;
            }
            if failures == 0 {
                self.report(Phase::Waiting, "", String::new());
            }
            // After a reported failure, an attempt reports nothing before its end.
            let reports_start = failures <= self.wanted.backoff_limit;
            match self.attempt(&reference, reports_start).await {
                Ok(()) => {
                    self.context.content.maintenance.notify_one();
                    self.report(Phase::Ready, "", String::new());
                    failures = 0;
                    if !self.wanted.pin {
                        // It was fetched. Without a pin it may be evicted again.
                        return;
                    }
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
                Err(AttemptError { reason: reason @ WAITING_FOR_CREDENTIALS, message }) => {
                    // Nothing was tried. The controller seals the credentials again, and another job begins.
                    self.report(Phase::Waiting, reason, message);
                    tokio::time::sleep(FAILED_AGAIN).await;
                }
                Err(AttemptError { reason, message }) => {
                    failures += 1;
                    let limit = self.wanted.backoff_limit;
                    let pause = if failures > limit {
                        self.report(Phase::Failed, reason, message);
                        FAILED_AGAIN
                    } else {
                        self.report(Phase::Waiting, reason, message);
                        let doublings = u32::try_from(failures - 1).unwrap_or(0).min(6);
                        FIRST_PAUSE.saturating_mul(1 << doublings).min(LONGEST_PAUSE)
                    };
                    tokio::time::sleep(pause.mul_f64(between(0.8, 1.2))).await;
                }
            }
        }
    }

    /// Runs one attempt. `reports_start` decides whether it reports the start of the pull.
    async fn attempt(
        &self,
        reference: &Reference,
        reports_start: bool,
    ) -> Result<(), AttemptError> {
        let keyring = self.keyring(reference)?;
        let demands = self.demands(reference).await?;
        let permit = Arc::clone(&self.context.permits).acquire_owned().await;
        let _permit =
            permit.map_err(|_| AttemptError::new("Stopping", "the driver is stopping"))?;
        if reports_start {
            self.report(Phase::Pulling, "", String::new());
        }
        // The reference has a digest, so the registry is only asked for missing content.
        let platform = Platform::of_this_node();
        let wanted =
            want(reference.clone(), platform, PullPolicy::IfNotPresent, keyring, self.tenant());
        let PolicyDemands { maximum_bytes, signature, .. } = demands;
        let wanted = Want { maximum_bytes, signature, ..wanted };
        let patience =
            Duration::from_secs(u64::try_from(self.wanted.timeout_seconds).unwrap_or(1).max(1));
        let acquire = self.context.content.puller.acquire(&wanted, &self.view);
        let tree = match tokio::time::timeout(patience, acquire).await {
            Ok(Ok(tree)) => tree,
            Ok(Err(error)) => return Err(AttemptError::new(reason(&error), &error)),
            Err(_) => {
                let message = format!(
                    "it took longer than {} s; what has come stays for the next try, see spec.timeoutSeconds",
                    patience.as_secs()
                );
                return Err(AttemptError::new("TimedOut", &message));
            }
        };
        if self.wanted.pin {
            let pinned = self.context.pins.pin(&self.wanted.preload, reference, &tree).await;
            pinned.map_err(|failure| AttemptError::new(failure.reason, &failure.message))?;
        }
        self.record_tag(reference, tree.record.manifest).await
    }

    /// Records the registry's resolution of the tag, for pods of the preload's namespace.
    async fn record_tag(
        &self,
        reference: &Reference,
        manifest: Digest,
    ) -> Result<(), AttemptError> {
        let (Some(resolved_at), Some(resolved), Some((namespace, _))) =
            (&self.wanted.resolved_at, reference.digest(), self.wanted.preload.split_once('/'))
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
        let store = self.context.content.store.clone();
        let record = move || store.resolutions().put_for_namespace(&reference, &platform, &answer);
        match tokio::task::spawn_blocking(record).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(AttemptError::new("NotRecorded", &error)),
            Err(_) => Err(AttemptError::new("NotRecorded", "recording the tag failed internally")),
        }
    }

    /// Returns the tenant of the preload, whose name is `namespace/name`.
    fn tenant(&self) -> Tenant {
        let namespace = self.wanted.preload.split_once('/').map(|(namespace, _)| namespace);
        Tenant::of_pod(namespace, None)
    }

    /// Returns the credentials of the assignment. The puller adds the node's own.
    fn keyring(&self, reference: &Reference) -> Result<Keyring, AttemptError> {
        let Some(sealed) = &self.wanted.credentials else { return Ok(Keyring::empty()) };
        let context = SealContext {
            node: &self.context.node,
            preload: &self.wanted.preload,
            reference: &self.wanted.reference,
        };
        match self.context.key.open(&sealed.data, context) {
            Ok(credentials) => Ok(Keyring::of_host(reference.repository().host(), credentials)),
            Err(error) => Err(AttemptError::new(WAITING_FOR_CREDENTIALS, &error)),
        }
    }

    /// Returns the demands of the node's policy, or why it does not allow the artifact in the preload's namespace.
    async fn demands(&self, reference: &Reference) -> Result<PolicyDemands, AttemptError> {
        let namespace = self.wanted.preload.split('/').next();
        let decided = demands(&self.context.content, reference, namespace).await;
        decided.map_err(|error| match error {
            DemandsError::Refused(refusal) => AttemptError::new("PolicyDenied", &refusal),
            DemandsError::Unreadable(reason) => AttemptError::new("PolicyUnreadable", &reason),
        })
    }

    fn report(&self, phase: Phase, reason: &'static str, message: String) {
        let key = (self.wanted.preload.clone(), self.wanted.reference.clone());
        let state = JobState { phase, reason, message };
        // The receiver is gone at shutdown.
        let _ = self.context.reports.send(JobReport { key, run: self.run, state });
    }
}

impl AttemptError {
    fn new(reason: &'static str, message: &(impl std::fmt::Display + ?Sized)) -> Self {
        Self { reason, message: message.to_string() }
    }
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

/// Returns the current time with the resolution that the API server keeps.
fn now_in_seconds() -> Timestamp {
    Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default()
}

/// Returns a random number.
pub(super) fn between(low: f64, high: f64) -> f64 {
    let mut bytes = [0; 4];
    // Without randomness all nodes wait for the same time, which does no harm.
    let _ = getrandom::fill(&mut bytes);
    low + (high - low) * f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}
