//! The reconciliation loop: reads facts, plans and writes, for as long as this process leads.
//!
//! Decisions that cannot be written now are dropped: the next plan decides again. Names of volumes
//! follow from the UIDs of claims, so that two processes never make two volumes for one claim.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::Arc;
use std::time::Duration;

use controller_runtime::object_events::ObjectEvent;
use controller_runtime::object_watch::RunningWatches;
use controller_runtime::object_write::{
    ObjectWriteError, patch_parameters, post_parameters, with_timeout,
};
use controller_runtime::reference_lookup::transient;
use controller_runtime::{ControllerMetrics, ResolutionFailure, Seconds, WriteRate};
use futures_util::FutureExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ObjectReference, PersistentVolume};
use kube::api::{DeleteParams, Patch, Preconditions};
use kube::{Api, Client};
use oci::backoff::RetryBackoff;
use serde_json::json;
use text::printable::excerpt;
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::claim_watch::{WatchProgress, watch};
use super::{ClaimLookup, ProvisionMetrics};
use crate::plan::claim_volume::claim_reference;
use crate::plan::facts::{
    FINALIZER, FailedWrite, LookupFacts, LookupKey, ProvisionState, VolumeFacts,
};
use crate::plan::{PendingClaim, ProvisionPlan, VolumeChange, plan};

/// Time for which changes are collected before a plan.
const SETTLE: Duration = Duration::from_millis(200);
/// Maximum time between two plans, since clocks jump and a wake-up may be lost.
const LONGEST_SLEEP: Duration = Duration::from_mins(1);
/// Maximum number of concurrent writes, those of events included.
const WRITES_AT_ONCE: usize = 16;
/// Maximum number of concurrent lookups.
const LOOKUPS_AT_ONCE: usize = 16;
/// Maximum number of concurrent lookups of one namespace, whose registries may be slow.
const LOOKUPS_PER_NAMESPACE: usize = 2;
/// Timeout of a lookup. Without an answer, the volume is made and nodes decide.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(30);
/// Seconds for which an answer of a registry serves further claims.
const ANSWER_LIFETIME: Seconds = 60;
/// Delays until a refused artifact is looked up again, and a refused volume is written again.
const RETRIES: RetryBackoff =
    RetryBackoff { first: Duration::from_secs(10), longest: Duration::from_mins(5) };
/// Delay after which a write with an outdated version is tried again; the watch is usually faster.
const OUTDATED_DELAY: Duration = Duration::from_secs(2);
/// Delay after which a change of a volume that the API server refused is tried again.
const REFUSED_DELAY: Duration = Duration::from_mins(5);
/// Time in which the watch reports a written object.
const WATCH_DELAY: Duration = Duration::from_secs(10);
/// Time after which an event is written again, since the API server keeps them for an hour.
const EVENT_INTERVAL: Duration = Duration::from_mins(30);
/// Maximum number of waiting events. Further ones are dropped.
const WAITING_EVENTS: usize = 4096;
/// Maximum number of watch events between two checks of the timer, so that a long list does not
/// delay planning.
const EVENTS_BETWEEN_CHECKS: usize = 1024;

/// Reconciler of all claims and their volumes.
pub struct ClaimReconciler {
    client: Client,
    lookup: Arc<dyn ClaimLookup>,
    rate: WriteRate,
    metrics: Arc<ProvisionMetrics>,
    process_metrics: Arc<ControllerMetrics>,
    state: ProvisionState,
    watches: WatchProgress,
    lookups: JoinSet<(LookupKey, Result<(), ResolutionFailure>)>,
    looking_up: HashSet<LookupKey>,
    writes: JoinSet<(WriteDecision, Result<(), ObjectWriteError>)>,
    writing: HashSet<String>,
    /// Volumes that are not written before this time, by name.
    not_before: HashMap<String, Instant>,
    /// Versions of volumes that were changed, by name. The watch reports the next ones.
    changed: HashMap<Arc<str>, String>,
    queue: VecDeque<WriteDecision>,
    events: VecDeque<ObjectEvent>,
    event_writes: JoinSet<()>,
    /// Claims without a volume, by UID.
    reported: HashMap<String, ReportedClaim>,
}

/// A claim without a volume, and what its events say.
struct ReportedClaim {
    first_seen: Instant,
    has_begun: bool,
    /// Last failure, and the time of its event.
    failure: Option<(String, Instant)>,
}

/// One decided write.
#[derive(Clone)]
enum WriteDecision {
    Create { claim: ObjectReference, volume: Box<PersistentVolume>, unanswered: Option<String> },
    Change { name: Arc<str>, volume: VolumeFacts, change: VolumeChange },
}

impl ClaimReconciler {
    /// Creates a reconciler without any facts but those of `state`.
    pub fn new(
        client: Client,
        lookup: Arc<dyn ClaimLookup>,
        state: ProvisionState,
        rate: WriteRate,
        metrics: Arc<ProvisionMetrics>,
        process_metrics: Arc<ControllerMetrics>,
    ) -> Self {
        process_metrics.show_kind("volume");
        Self {
            client,
            lookup,
            rate,
            metrics,
            process_metrics,
            state,
            watches: WatchProgress::default(),
            lookups: JoinSet::new(),
            looking_up: HashSet::new(),
            writes: JoinSet::new(),
            writing: HashSet::new(),
            not_before: HashMap::new(),
            changed: HashMap::new(),
            queue: VecDeque::new(),
            events: VecDeque::new(),
            event_writes: JoinSet::new(),
            reported: HashMap::new(),
        }
    }

    /// Runs until leadership is lost. Running writes are then aborted: the new leader plans again.
    pub async fn run(mut self, lost: CancellationToken) {
        // Dropping the watches ends them.
        let RunningWatches { mut events, tasks: mut watches, .. } =
            watch(&self.client, &self.process_metrics);
        let mut dirty = true;
        let mut planned = Instant::now();
        let mut settle = SETTLE;
        let mut wake = planned + LONGEST_SLEEP;
        loop {
            let next = if dirty && self.watches.is_whole() { planned + settle } else { wake };
            tokio::select! {
                biased;
                () = lost.cancelled() => return,
                Some(ended) = watches.join_next() => {
                    task_result(ended);
                    tracing::error!("a watch has ended: leading no more");
                    return;
                }
                Some(done) = self.writes.join_next(), if !self.writes.is_empty() => {
                    let (decision, written) = task_result(done);
                    self.apply_write(decision, written);
                    dirty = true;
                    wake = wake.min(self.start_writes());
                }
                Some(done) = self.event_writes.join_next(), if !self.event_writes.is_empty() => {
                    task_result(done);
                    wake = wake.min(self.start_writes());
                }
                Some(done) = self.lookups.join_next(), if !self.lookups.is_empty() => {
                    let (key, outcome) = task_result(done);
                    self.apply_lookup(key, outcome);
                    dirty = true;
                }
                // Events may arrive without end, and must not delay planning for ever.
                () = tokio::time::sleep_until(next) => {
                    if !self.watches.is_whole() {
                        wake = Instant::now() + LONGEST_SLEEP;
                        continue;
                    }
                    planned = Instant::now();
                    dirty = false;
                    wake = self.plan();
                    // Planning for many claims takes time: use at most a fifth of all.
                    settle = SETTLE.max(planned.elapsed() * 4);
                    planned = Instant::now();
                }
                Some(event) = events.recv() => {
                    dirty |= self.watches.take(&mut self.state, event);
                    for _ in 0..EVENTS_BETWEEN_CHECKS {
                        let Ok(event) = events.try_recv() else { break };
                        dirty |= self.watches.take(&mut self.state, event);
                    }
                }
            }
        }
    }

    /// Plans and starts to apply the plan. Returns the time of the next plan without any event.
    fn plan(&mut self) -> Instant {
        let (begun, now) = (Instant::now(), Timestamp::now().as_second());
        let plan = plan(&self.state, now);
        self.metrics.record_plan(&plan);
        let mut wake = begun + LONGEST_SLEEP;
        if let Some(at) = plan.wake {
            let seconds = u64::try_from(at - now).unwrap_or(0).max(1);
            wake = wake.min(begun + Duration::from_secs(seconds));
        }
        self.report(&plan.pending);
        self.forget(&plan, now);
        self.start_lookups(&plan);
        self.queue.clear();
        for (key, pending) in plan.pending {
            if let PendingClaim::Create(volume, unanswered) = pending {
                let claim = claim_reference(&self.state.claims[&key]);
                self.queue.push_back(WriteDecision::Create { claim, volume, unanswered });
            }
        }
        for (name, change) in plan.changes {
            let volume = self.state.volumes[&name].clone();
            if self.changed.get(&name) != Some(&volume.version) {
                self.queue.push_back(WriteDecision::Change { name, volume, change });
            }
        }
        wake.min(self.start_writes())
    }

    /// Writes events on claims whose state is another one than before.
    fn report(&mut self, pending: &BTreeMap<Arc<str>, PendingClaim>) {
        let now = Instant::now();
        let uids: HashSet<&str> =
            pending.keys().map(|key| self.state.claims[key].uid.as_str()).collect();
        self.reported.retain(|uid, _| uids.contains(uid.as_str()));
        let mut events = Vec::new();
        for (key, pending) in pending {
            let claim = &self.state.claims[key];
            let reported = self.reported.entry(claim.uid.clone()).or_insert(ReportedClaim {
                first_seen: now,
                has_begun: false,
                failure: None,
            });
            match pending {
                PendingClaim::WaitsForConsumer => {}
                PendingClaim::WaitsForRegistry | PendingClaim::Create(..) => {
                    if !std::mem::replace(&mut reported.has_begun, true) {
                        let message = format!(
                            "{} is provisioning a volume for claim \"{key}\"",
                            self.state.driver
                        );
                        events.push((claim_reference(claim), "Provisioning", message));
                    }
                }
                PendingClaim::Refused(reason) => {
                    let is_known = reported.failure.as_ref().is_some_and(|(known, at)| {
                        known == reason && now.duration_since(*at) < EVENT_INTERVAL
                    });
                    if !is_known {
                        reported.failure = Some((reason.clone(), now));
                        let class = excerpt(&claim.class, 100);
                        let message = format!(
                            "failed to provision volume with StorageClass \"{class}\": {reason}"
                        );
                        events.push((claim_reference(claim), "ProvisioningFailed", message));
                    }
                }
            }
        }
        for (object, reason, message) in events {
            self.push_event(object, reason, message);
        }
    }

    fn push_event(&mut self, object: ObjectReference, reason: &'static str, message: String) {
        let is_warning = !matches!(reason, "Provisioning" | "ProvisioningSucceeded");
        if self.events.len() < WAITING_EVENTS {
            self.events.push_back(ObjectEvent { object, is_warning, reason, message });
        }
    }

    /// Forgets what no claim and no volume needs any more.
    fn forget(&mut self, plan: &ProvisionPlan, now: Seconds) {
        self.state
            .lookups
            .retain(|key, known| plan.used_lookups.contains(key) || known.until > now);
        let reported = &self.reported;
        self.state.failed_writes.retain(|uid, _| reported.contains_key(uid));
        let (volumes, instant) = (&self.state.volumes, Instant::now());
        self.changed.retain(|name, _| volumes.contains_key(name));
        self.not_before.retain(|_, until| *until > instant);
    }

    /// Starts as many lookups as allowed, those of namespaces with the fewest running ones first.
    fn start_lookups(&mut self, plan: &ProvisionPlan) {
        let mut running: HashMap<&str, usize> = HashMap::new();
        for key in &self.looking_up {
            *running.entry(&key.namespace).or_default() += 1;
        }
        let mut wanted = Vec::new();
        for key in plan.lookups.iter().filter(|key| !self.looking_up.contains(*key)) {
            let of_namespace = running.entry(&key.namespace).or_default();
            *of_namespace += 1;
            if *of_namespace <= LOOKUPS_PER_NAMESPACE {
                wanted.push((*of_namespace, key));
            }
        }
        wanted.sort_by_key(|(of_namespace, _)| *of_namespace);
        let free = LOOKUPS_AT_ONCE.saturating_sub(self.looking_up.len());
        for (_, key) in wanted.into_iter().take(free) {
            self.looking_up.insert(key.clone());
            let (lookup, key) = (Arc::clone(&self.lookup), key.clone());
            self.lookups.spawn(async move {
                let asked = AssertUnwindSafe(lookup.look_up(key.clone())).catch_unwind();
                let outcome = match tokio::time::timeout(LOOKUP_TIMEOUT, asked).await {
                    Ok(Ok(outcome)) => outcome,
                    Ok(Err(_)) => Err(transient(
                        "Internal",
                        "looking at it failed internally: see the controller's log",
                    )),
                    Err(_) => Err(ResolutionFailure {
                        unanswered: true,
                        ..transient("RegistryUnavailable", "the registry did not answer in time")
                    }),
                };
                (key, outcome)
            });
        }
    }

    fn apply_lookup(&mut self, key: LookupKey, outcome: Result<(), ResolutionFailure>) {
        self.looking_up.remove(&key);
        let before = self.state.lookups.get(&key).map_or(0, |known| known.failures);
        let (result, failures, lifetime) = match &outcome {
            Ok(()) => ("success", 0, ANSWER_LIFETIME),
            // Volumes are made meanwhile.
            Err(failure) if failure.unanswered => ("unanswered", 0, ANSWER_LIFETIME),
            Err(_) => ("failure", before + 1, seconds(RETRIES.after(before + 1))),
        };
        self.metrics.record_lookup(result);
        let until = Timestamp::now().as_second() + lifetime;
        self.state.lookups.insert(key, LookupFacts { outcome, until, failures });
    }

    /// Starts as many writes as allowed: first volumes, then events. Returns the time at which more
    /// are allowed.
    fn start_writes(&mut self) -> Instant {
        let now = Instant::now();
        let mut wake = now + LONGEST_SLEEP;
        while self.writes.len() + self.event_writes.len() < WRITES_AT_ONCE {
            let decision = self.queue.pop_front();
            if decision.is_none() && self.events.is_empty() {
                break;
            }
            if let Some(decision) = &decision {
                let name = decision.volume_name();
                let until = self.not_before.get(name).copied().filter(|until| *until > now);
                wake = until.map_or(wake, |until| wake.min(until));
                if until.is_some() || self.writing.contains(name) {
                    continue;
                }
            }
            if let Err(until) = self.rate.take(now) {
                if let Some(decision) = decision {
                    self.queue.push_front(decision);
                }
                return wake.min(until);
            }
            match decision {
                Some(decision) => self.begin(decision),
                None => self.begin_event(),
            }
        }
        wake
    }

    fn begin(&mut self, decision: WriteDecision) {
        self.writing.insert(decision.volume_name().to_owned());
        let api: Api<PersistentVolume> = Api::all(self.client.clone());
        self.writes.spawn(async move {
            let written = match &decision {
                WriteDecision::Create { volume, .. } => {
                    with_timeout(api.create(&post_parameters(), volume)).await.map(drop)
                }
                WriteDecision::Change { name, volume, change } => {
                    change_volume(&api, name, volume, *change).await
                }
            };
            (decision, written)
        });
    }

    fn begin_event(&mut self) {
        let Some(event) = self.events.pop_front() else { return };
        let client = self.client.clone();
        self.event_writes.spawn(async move {
            // It is a hint only.
            if let Err(error) = event.write(client).await {
                tracing::warn!(?error, "an event is not written");
            }
        });
    }

    fn apply_write(&mut self, decision: WriteDecision, written: Result<(), ObjectWriteError>) {
        let name = decision.volume_name().to_owned();
        let now = Instant::now();
        self.writing.remove(&name);
        let result = written.as_ref().err().map_or("success", ObjectWriteError::label);
        self.process_metrics.record_write("volume", result);
        match written {
            Ok(()) => {
                self.rate.answered();
                self.apply_success(decision);
            }
            Err(ObjectWriteError::Outdated) => {
                self.rate.answered();
                self.not_before.insert(name, now + OUTDATED_DELAY);
            }
            Err(ObjectWriteError::Busy(wait, reason)) => {
                tracing::warn!(reason, "the API server is busy or away: writing again later");
                self.rate.pause(wait, now);
            }
            Err(ObjectWriteError::Refused(reason)) => {
                self.rate.answered();
                tracing::error!(volume = name, reason, "the API server refuses a write");
                self.apply_refusal(decision, &reason);
            }
        }
    }

    fn apply_success(&mut self, decision: WriteDecision) {
        let now = Instant::now();
        match decision {
            WriteDecision::Create { claim, volume, unanswered } => {
                let name = volume.metadata.name.unwrap_or_default();
                if let Some(reported) = claim.uid.as_ref().and_then(|uid| self.reported.get(uid)) {
                    self.metrics.record_provision(now.duration_since(reported.first_seen));
                }
                if let Some(reason) = unanswered {
                    let message = format!(
                        "{reason}: the volume {name} is provisioned nevertheless, and pods start where nodes have its content"
                    );
                    self.push_event(claim.clone(), "RegistryUnavailable", message);
                }
                let message = format!("Successfully provisioned volume {name}");
                self.push_event(claim, "ProvisioningSucceeded", message);
                self.not_before.insert(name, now + WATCH_DELAY);
            }
            WriteDecision::Change { name, volume, .. } => {
                self.changed.insert(name, volume.version);
            }
        }
    }

    fn apply_refusal(&mut self, decision: WriteDecision, reason: &str) {
        match decision {
            WriteDecision::Create { claim, .. } => {
                let uid = claim.uid.unwrap_or_default();
                let failures = self.state.failed_writes.get(&uid).map_or(1, |f| f.failures + 1);
                let message = format!("the API server refuses its volume: {reason}");
                let retry_at = Timestamp::now().as_second() + seconds(RETRIES.after(failures));
                let failed = FailedWrite { message, retry_at, failures };
                self.state.failed_writes.insert(uid, failed);
            }
            WriteDecision::Change { name, volume, change } => {
                let object = ObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("PersistentVolume".to_owned()),
                    name: Some(name.to_string()),
                    uid: Some(volume.uid),
                    ..ObjectReference::default()
                };
                if change == VolumeChange::Delete {
                    self.push_event(object, "VolumeFailedDelete", reason.to_owned());
                }
                self.not_before.insert(name.to_string(), Instant::now() + REFUSED_DELAY);
            }
        }
    }
}

impl Drop for ClaimReconciler {
    fn drop(&mut self) {
        self.metrics.reset();
    }
}

impl WriteDecision {
    fn volume_name(&self) -> &str {
        match self {
            Self::Create { volume, .. } => volume.metadata.name.as_deref().unwrap_or_default(),
            Self::Change { name, .. } => name,
        }
    }
}

/// Writes the change of a volume, if it is still the same.
async fn change_volume(
    api: &Api<PersistentVolume>,
    name: &str,
    volume: &VolumeFacts,
    change: VolumeChange,
) -> Result<(), ObjectWriteError> {
    let mut finalizers = volume.finalizers.clone();
    match change {
        VolumeChange::Delete => {
            let only = Preconditions {
                uid: Some(volume.uid.clone()),
                resource_version: Some(volume.version.clone()),
            };
            let parameters = DeleteParams::default().preconditions(only);
            return with_timeout(api.delete(name, &parameters)).await.map(drop);
        }
        VolumeChange::AddFinalizer => finalizers.push(FINALIZER.to_owned()),
        VolumeChange::RemoveFinalizer => finalizers.retain(|finalizer| finalizer != FINALIZER),
    }
    let change = json!({"metadata": {
        "resourceVersion": volume.version, "uid": volume.uid, "finalizers": finalizers,
    }});
    with_timeout(api.patch(name, &patch_parameters(), &Patch::Merge(&change))).await.map(drop)
}

fn seconds(duration: Duration) -> Seconds {
    Seconds::try_from(duration.as_secs()).unwrap_or(Seconds::MAX)
}

/// Returns the result of a task. A panic is propagated and ends the process, since the state may be
/// inconsistent. The next process reads all facts again.
fn task_result<T>(ended: Result<T, JoinError>) -> T {
    ended.unwrap_or_else(|error| resume_unwind(error.into_panic()))
}
