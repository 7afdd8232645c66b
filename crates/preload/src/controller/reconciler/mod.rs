//! The reconciliation loop: reads facts, plans and writes, for as long as this process leads.
//!
//! Decisions that cannot be written now are dropped: the next plan decides again. The loop waits
//! for the result of running writes; failed ones are decided again after a delay.

use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::Arc;
use std::time::Duration;

use controller_runtime::object_watch::RunningWatches;
use controller_runtime::object_write::ObjectWriteError;
use controller_runtime::{ControllerMetrics, WriteRate};
use futures_util::FutureExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node as ApiNode;
use kube::{Api, Client};
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::api_watch::{WatchEvent, WatchProgress, watch};
use super::reference_resolver::{ResolveRequest, ResolveResult};
use super::{PreloadMetrics, ReferenceResolver, api_write, preload_events};
use crate::api::{
    ArtifactPreload, ArtifactPreloadStatus, NodeArtifacts, NodeArtifactsSpec, SealedCredentials,
    WantedArtifact,
};
use crate::plan::cluster_facts::{
    AssignedArtifact, ClusterState, NodeReadiness, PreloadFacts, ReferenceResolution,
    RegistryAccess, SealedVersion, Seconds, key_of,
};
use crate::plan::node_status::NodeStatus;
use crate::plan::{PreloadPlan, StatusChange, plan};
use crate::sealed_credentials::{PlainCredentials, SealContext};
use oci::{Reference, Repository};

/// Maximum number of concurrent resolutions.
const CONCURRENT_RESOLUTIONS: usize = 8;
/// Maximum number of Node objects that are read at once.
const CONCURRENT_CHECKS: usize = 8;
/// Lifetime of a node's condition that was read from the API server, in seconds.
const CHECK_LIFETIME: Seconds = 20;
/// Timeout for reading a node's condition. A node whose condition cannot be read counts as Ready.
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum time between two plans, since clocks jump and a wake-up may be lost.
const LONGEST_SLEEP: Duration = Duration::from_mins(1);
/// Delay after which a write that the API server refused is tried again.
const REFUSED_DELAY: Duration = Duration::from_secs(30);
/// Delay after which a write with an outdated version is tried again; the watch is usually faster.
const OUTDATED_DELAY: Duration = Duration::from_millis(500);
/// Maximum number of watch events between two checks of the timer, so that a long list does not
/// delay planning.
const EVENTS_BETWEEN_CHECKS: usize = 1024;
/// Maximum number of preloads whose events are written at once. Events of others are dropped.
const EVENT_WRITES: usize = 64;
/// Number of plans between two clean-ups of unused texts.
const CLEAN_UP_PLANS: u32 = 500;

/// Pace of the controller.
#[derive(Clone, Copy, Debug)]
pub struct ControllerPace {
    /// Maximum number of concurrent writes.
    pub writes_at_once: usize,
    /// Time for which changes are collected before a plan.
    pub settle: Duration,
    /// Minimum time between two writes of a status that changes counts only.
    pub counts_interval: Duration,
}

impl Default for ControllerPace {
    fn default() -> Self {
        Self {
            writes_at_once: 16,
            settle: Duration::from_millis(200),
            counts_interval: Duration::from_secs(5),
        }
    }
}

/// Reconciler of all preloads and nodes.
pub struct PreloadReconciler {
    client: Client,
    resolver: Arc<dyn ReferenceResolver>,
    pace: ControllerPace,
    metrics: Arc<PreloadMetrics>,
    process_metrics: Arc<ControllerMetrics>,
    state: ClusterState,
    watches: WatchProgress,
    /// Credentials to seal for nodes, by preload.
    readable: HashMap<Arc<str>, SealableCredentials>,
    resolutions: JoinSet<(Arc<str>, ResolutionInput, ResolveResult)>,
    resolving: HashSet<Arc<str>>,
    /// Running checks of nodes: name, uid, and the result, whether the node is Ready.
    checks: JoinSet<(Arc<str>, String, bool)>,
    checking: HashSet<Arc<str>>,
    /// Time of the last resolution of each preload. The longest waiting one is next, so that slow
    /// registries do not delay others.
    last_resolved: HashMap<Arc<str>, Instant>,
    writes: JoinSet<(WriteTarget, Result<WriteResult, ObjectWriteError>)>,
    writing: HashSet<WriteTarget>,
    /// Statuses that running writes replace.
    replaced: HashMap<Arc<str>, ArtifactPreloadStatus>,
    event_writes: JoinSet<()>,
    /// Failed writes, with the time of the next attempt.
    backing_off: HashMap<WriteTarget, Instant>,
    queue: VecDeque<WriteDecision>,
    last_counts: HashMap<Arc<str>, Instant>,
    rate: WriteRate,
    plans: u32,
}

/// Credentials that the secrets contain.
struct SealableCredentials {
    version: Arc<str>,
    /// Repository that the credentials were selected for.
    repository: Repository,
    plain: PlainCredentials,
}

/// Object that a write changes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum WriteTarget {
    Node(Arc<str>),
    NodeStatus(Arc<str>),
    Preload(Arc<str>),
}

/// One decided write.
enum WriteDecision {
    Create { node: Arc<str>, uid: String },
    Assign { node: Arc<str>, version: String, wanted: Vec<AssignedArtifact> },
    NodeStatus { node: Arc<str>, uid: String, status: NodeStatus },
    Report { preload: Arc<str>, version: String, status: Box<ArtifactPreloadStatus> },
    Delete { preload: Arc<str>, uid: String, version: String },
}

/// Result of a write.
enum WriteResult {
    Node(Box<NodeArtifacts>),
    NodeStatus(Box<ApiNode>, NodeStatus),
    Preload(Box<ArtifactPreload>),
    Deleted,
}

/// Input of a resolution. Its result applies only to the same input.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ResolutionInput {
    uid: String,
    reference: String,
    pull_secrets: Vec<String>,
}

impl PreloadReconciler {
    /// Creates a reconciler, with a state that has no facts yet.
    pub fn new(
        client: Client,
        resolver: Arc<dyn ReferenceResolver>,
        pace: ControllerPace,
        state: ClusterState,
        rate: WriteRate,
        metrics: Arc<PreloadMetrics>,
        process_metrics: Arc<ControllerMetrics>,
    ) -> Self {
        for kind in ["node", "node_status", "preload"] {
            process_metrics.show_kind(kind);
        }
        Self {
            client,
            resolver,
            pace,
            metrics,
            process_metrics,
            state,
            watches: WatchProgress::default(),
            readable: HashMap::new(),
            resolutions: JoinSet::new(),
            resolving: HashSet::new(),
            checks: JoinSet::new(),
            checking: HashSet::new(),
            last_resolved: HashMap::new(),
            writes: JoinSet::new(),
            writing: HashSet::new(),
            replaced: HashMap::new(),
            event_writes: JoinSet::new(),
            backing_off: HashMap::new(),
            queue: VecDeque::new(),
            last_counts: HashMap::new(),
            rate,
            plans: 0,
        }
    }

    /// Runs until leadership is lost. Running writes are then aborted: the new leader plans again.
    pub async fn run(mut self, lost: CancellationToken) {
        // Dropping the watches ends them.
        let RunningWatches { mut events, tasks: mut watches, .. } =
            watch(&self.client, &self.process_metrics);
        let mut dirty = true;
        let mut planned = Instant::now();
        let mut settle = self.pace.settle;
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
                    let (target, written) = task_result(done);
                    self.apply_write(target, written);
                    dirty = true;
                    wake = wake.min(self.start_writes());
                }
                Some(done) = self.checks.join_next(), if !self.checks.is_empty() => {
                    let (node, uid, is_ready) = task_result(done);
                    self.record_check(&node, &uid, is_ready);
                    dirty = true;
                }
                Some(done) = self.event_writes.join_next(), if !self.event_writes.is_empty() => {
                    task_result(done);
                }
                Some(done) = self.resolutions.join_next(), if !self.resolutions.is_empty() => {
                    let (preload, input, result) = task_result(done);
                    self.apply_resolution(&preload, &input, result);
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
                    // Planning for many nodes takes time: use at most a fifth of all.
                    settle = self.pace.settle.max(planned.elapsed() * 4);
                    planned = Instant::now();
                }
                Some(event) = events.recv() => {
                    dirty |= self.take_events(event, &mut events);
                }
            }
        }
    }

    fn take_events(
        &mut self,
        first: WatchEvent,
        more: &mut tokio::sync::mpsc::Receiver<WatchEvent>,
    ) -> bool {
        let mut matters = self.watches.take(&mut self.state, first);
        for _ in 0..EVENTS_BETWEEN_CHECKS {
            let Ok(event) = more.try_recv() else { break };
            matters |= self.watches.take(&mut self.state, event);
        }
        matters
    }

    /// Plans and starts to apply the plan. Returns the time of the next plan without any event.
    fn plan(&mut self) -> Instant {
        let (begun, now) = (Instant::now(), Timestamp::now().as_second());
        let mut planned = plan(&self.state, now);
        self.metrics.record_plan(planned.totals, begun.elapsed());
        let mut wake = begun + LONGEST_SLEEP;
        if let Some(at) = planned.wake {
            let seconds = u64::try_from(at - now).unwrap_or(0).max(1);
            wake = wake.min(begun + Duration::from_secs(seconds));
        }
        self.plans += 1;
        if self.plans.is_multiple_of(CLEAN_UP_PLANS) {
            self.state.forget_texts();
            let (preloads, now) = (&self.state.preloads, Instant::now());
            self.readable.retain(|preload, _| preloads.contains_key(preload));
            self.last_resolved.retain(|preload, _| preloads.contains_key(preload));
            self.last_counts.retain(|preload, _| preloads.contains_key(preload));
            self.backing_off.retain(|_, until| *until > now);
        }
        planned.resolve.sort_by_key(|preload| self.last_resolved.get(preload).copied());
        for preload in &planned.resolve {
            self.start_resolution(preload);
        }
        for node in &planned.check {
            self.start_check(node);
        }
        wake = wake.min(self.decide(planned));
        wake.min(self.start_writes())
    }

    /// Turns a plan into writes that are allowed now.
    fn decide(&mut self, plan: PreloadPlan) -> Instant {
        let now = Instant::now();
        let mut wake = now + LONGEST_SLEEP;
        self.queue.clear();
        // Writes that others wait for come first: transitions of preloads, then assignments of
        // nodes.
        let (urgent, counts): (Vec<_>, Vec<_>) =
            plan.report.into_iter().partition(|change| change.urgent);
        for change in urgent {
            self.decide_report(change);
        }
        for node in plan.create {
            if let Some(known) = self.state.nodes.get(&node) {
                self.queue.push_back(WriteDecision::Create { uid: known.uid.clone(), node });
            }
        }
        for (node, wanted) in plan.assign {
            if let Some(object) = self.state.objects.get(&node) {
                let version = object.version.clone();
                self.queue.push_back(WriteDecision::Assign { node, version, wanted });
            }
        }
        for (node, status) in plan.node_status {
            if let Some(known) = self.state.nodes.get(&node) {
                let uid = known.uid.clone();
                self.queue.push_back(WriteDecision::NodeStatus { node, uid, status });
            }
        }
        for change in counts {
            let since = self.last_counts.get(&change.preload);
            match since.map(|since| *since + self.pace.counts_interval) {
                Some(next) if next > now => wake = wake.min(next),
                _ => self.decide_report(change),
            }
        }
        for preload in plan.delete {
            if let Some(known) = self.state.preloads.get(&preload) {
                let (uid, version) = (known.uid.clone(), known.version.clone());
                self.queue.push_back(WriteDecision::Delete { preload, uid, version });
            }
        }
        wake
    }

    fn decide_report(&mut self, change: StatusChange) {
        if let Some(known) = self.state.preloads.get(&change.preload) {
            let (version, status) = (known.version.clone(), Box::new(change.status));
            self.queue.push_back(WriteDecision::Report {
                preload: change.preload,
                version,
                status,
            });
        }
    }

    /// Starts as many of the decided writes as allowed. Returns the time at which more are allowed.
    fn start_writes(&mut self) -> Instant {
        let now = Instant::now();
        let mut wake = now + LONGEST_SLEEP;
        while self.writes.len() < self.pace.writes_at_once {
            let Some(decision) = self.queue.pop_front() else { break };
            let target = decision.target();
            if self.writing.contains(&target) {
                continue;
            }
            match self.backing_off.get(&target) {
                Some(until) if *until > now => {
                    wake = wake.min(*until);
                    continue;
                }
                _ => {}
            }
            if let Err(until) = self.rate.take(now) {
                self.queue.push_front(decision);
                return wake.min(until);
            }
            self.backing_off.remove(&target);
            self.begin(target, decision);
        }
        wake
    }

    fn begin(&mut self, target: WriteTarget, decision: WriteDecision) {
        let client = self.client.clone();
        self.writing.insert(target.clone());
        match decision {
            WriteDecision::Create { node, uid } => {
                self.writes.spawn(async move {
                    let made = api_write::create(client, &node, &uid).await;
                    (target, made.map(|object| WriteResult::Node(Box::new(object))))
                });
            }
            WriteDecision::Assign { node, version, wanted } => {
                let bound = self.state.quota.pinned_bytes;
                let spec = NodeArtifactsSpec {
                    artifacts: self.sealed(&node, &wanted),
                    max_pinned_bytes_per_namespace: bound
                        .map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX)),
                };
                self.writes.spawn(async move {
                    let written = api_write::assign(client, &node, &version, spec).await;
                    (target, written.map(|object| WriteResult::Node(Box::new(object))))
                });
            }
            WriteDecision::NodeStatus { node, uid, status } => {
                self.writes.spawn(async move {
                    let written = api_write::write_node_status(client, &node, &uid, &status).await;
                    (target, written.map(|node| WriteResult::NodeStatus(Box::new(node), status)))
                });
            }
            WriteDecision::Report { preload, version, status } => {
                self.last_counts.insert(Arc::clone(&preload), Instant::now());
                if let Some(known) = self.state.preloads.get(&preload) {
                    self.replaced.insert(Arc::clone(&preload), known.status.clone());
                }
                self.writes.spawn(async move {
                    let written = api_write::report(client, &preload, &version, &status).await;
                    (target, written.map(|object| WriteResult::Preload(Box::new(object))))
                });
            }
            WriteDecision::Delete { preload, uid, version } => {
                self.writes.spawn(async move {
                    let gone = api_write::delete(client, &preload, &uid, &version).await;
                    (target, gone.map(|()| WriteResult::Deleted))
                });
            }
        }
    }

    /// Returns the assignment of a node in its API form, with sealed credentials.
    fn sealed(&self, node: &str, wanted: &[AssignedArtifact]) -> Vec<WantedArtifact> {
        let with_credentials = |wish: &AssignedArtifact| {
            let preload = self.state.key(wish.preload);
            let place = SealContext { node, preload: &preload, reference: &wish.reference };
            let sealed = wish.sealed.as_ref().and_then(|sealed| self.seal(sealed, place));
            api_write::wanted(&preload, wish, sealed)
        };
        let mut artifacts: Vec<_> = wanted.iter().map(with_credentials).collect();
        artifacts.sort_by(|one, two| {
            (&one.preload, &one.reference).cmp(&(&two.preload, &two.reference))
        });
        artifacts
    }

    /// Seals credentials for a node. `None` if the secrets are no longer known: artifacts that need
    /// them are not planned then, and others must not wait for them.
    fn seal(&self, sealed: &SealedVersion, place: SealContext<'_>) -> Option<SealedCredentials> {
        let SealableCredentials { version, repository, plain } =
            self.readable.get(place.preload)?;
        let reference: Reference = place.reference.parse().ok()?;
        if *version != sealed.version || repository != reference.repository() {
            return None;
        }
        let data = plain.seal(&sealed.key, place).unwrap_or_else(|error| {
            // A node without a valid key cannot open the credentials, and reports that they are
            // missing.
            tracing::warn!(node = place.node, %error, "credentials cannot be sealed for a node");
            String::new()
        });
        let (key, version) = (sealed.key.to_string(), sealed.version.to_string());
        Some(SealedCredentials { key, version, data })
    }

    /// Applies the result of a write.
    fn apply_write(&mut self, target: WriteTarget, written: Result<WriteResult, ObjectWriteError>) {
        self.writing.remove(&target);
        let (kind, replaced) = match &target {
            WriteTarget::Node(_) => ("node", None),
            WriteTarget::NodeStatus(_) => ("node_status", None),
            WriteTarget::Preload(preload) => ("preload", self.replaced.remove(preload)),
        };
        let now = Instant::now();
        match written {
            Ok(written) => {
                self.process_metrics.record_write(kind, "success");
                self.rate.answered();
                if let (WriteResult::Preload(object), Some(before)) = (&written, replaced) {
                    self.write_events(object, &before);
                }
                self.update_state(written);
            }
            Err(error) => {
                self.process_metrics.record_write(kind, error.label());
                match error {
                    ObjectWriteError::Outdated => {
                        self.rate.answered();
                        self.backing_off.insert(target, now + OUTDATED_DELAY);
                    }
                    ObjectWriteError::Busy(wait, reason) => {
                        tracing::warn!(
                            reason,
                            "the API server is busy or away: writing again later"
                        );
                        self.rate.pause(wait, now);
                    }
                    ObjectWriteError::Refused(reason) => {
                        self.rate.answered();
                        tracing::error!(?target, reason, "the API server refuses a write");
                        self.backing_off.insert(target, now + REFUSED_DELAY);
                    }
                }
            }
        }
    }

    /// Writes events for the transitions between the replaced status and the new one.
    fn write_events(&mut self, preload: &ArtifactPreload, before: &ArtifactPreloadStatus) {
        let transitions =
            preload.status.as_ref().map(|after| preload_events::transitions(before, after));
        let transitions = transitions.filter(|transitions| !transitions.is_empty());
        if let Some(transitions) = transitions
            && self.event_writes.len() < EVENT_WRITES
        {
            self.event_writes.spawn(preload_events::write(
                self.client.clone(),
                preload.clone(),
                transitions,
            ));
        }
    }

    /// Updates the facts with a written object, unless the watch has reported its deletion
    /// meanwhile: it would never be removed again.
    fn update_state(&mut self, written: WriteResult) {
        match written {
            WriteResult::Node(object) => {
                let mut owners = object.metadata.owner_references.iter().flatten();
                let name = object.metadata.name.as_deref().unwrap_or_default();
                let node = self.state.nodes.get(name);
                if node.is_some_and(|node| owners.any(|owner| owner.uid == node.uid)) {
                    self.state.put_object(&object);
                }
            }
            WriteResult::NodeStatus(node, status) => {
                let name = node.metadata.name.as_deref().unwrap_or_default();
                let known = self.state.nodes.get_mut(name);
                let known = known.filter(|known| node.metadata.uid.as_ref() == Some(&known.uid));
                if let Some(known) = known {
                    known.labels = node.metadata.labels.unwrap_or_default();
                    known.condition = status.condition;
                }
            }
            WriteResult::Preload(object) => {
                let key = key_of(&*object).unwrap_or_default();
                let known = self.state.preloads.get(key.as_str());
                if known.is_some_and(|known| object.metadata.uid.as_ref() == Some(&known.uid)) {
                    self.state.put_preload(&object);
                }
            }
            WriteResult::Deleted => {}
        }
    }

    /// Starts the resolution of a preload, unless one is running.
    fn start_resolution(&mut self, preload: &Arc<str>) {
        if self.resolutions.len() >= CONCURRENT_RESOLUTIONS || self.resolving.contains(preload) {
            return;
        }
        let Some(known) = self.state.preloads.get(preload) else { return };
        let Ok(parsed) = &known.parsed else { return };
        let input = ResolutionInput::of(known);
        let request = ResolveRequest {
            namespace: api_write::split(preload).0.to_owned(),
            reference: parsed.reference.clone(),
            written: known.spec.reference.clone(),
            pull_secrets: known.spec.pull_secrets.clone(),
            resolves: !known.resolution.is_answer(),
        };
        self.resolving.insert(Arc::clone(preload));
        self.last_resolved.insert(Arc::clone(preload), Instant::now());
        let (resolver, preload) = (Arc::clone(&self.resolver), Arc::clone(preload));
        self.resolutions.spawn(async move {
            let result = AssertUnwindSafe(resolver.resolve(request)).catch_unwind().await;
            let failed = |_| {
                ResolveResult::failed("looking at it failed internally: see the controller's log")
            };
            (preload, input, result.unwrap_or_else(failed))
        });
    }

    /// Starts to read whether a node is Ready, unless this is running.
    fn start_check(&mut self, node: &Arc<str>) {
        if self.checks.len() >= CONCURRENT_CHECKS || self.checking.contains(node) {
            return;
        }
        let Some(known) = self.state.nodes.get(node) else { return };
        let (name, uid) = (Arc::clone(node), known.uid.clone());
        let api: Api<ApiNode> = Api::all(self.client.clone());
        self.checking.insert(Arc::clone(node));
        self.checks.spawn(async move {
            let read = tokio::time::timeout(CHECK_TIMEOUT, api.get(&name)).await;
            let is_ready = match read {
                Ok(Ok(node)) => is_ready(&node),
                Ok(Err(error)) => {
                    tracing::warn!(node = &*name, %error, "a node's condition cannot be read");
                    true
                }
                Err(_) => true,
            };
            (name, uid, is_ready)
        });
    }

    /// Records whether a node is Ready.
    fn record_check(&mut self, node: &Arc<str>, uid: &str, is_ready: bool) {
        self.checking.remove(node);
        let until = Timestamp::now().as_second() + CHECK_LIFETIME;
        if let Some(known) = self.state.nodes.get_mut(node).filter(|known| known.uid == uid) {
            known.readiness = Some(NodeReadiness { is_ready, until });
        }
    }

    /// Applies the result of a resolution, if its input is still the same.
    fn apply_resolution(
        &mut self,
        preload: &Arc<str>,
        input: &ResolutionInput,
        result: ResolveResult,
    ) {
        self.resolving.remove(preload);
        let failed = matches!(result.access, RegistryAccess::Refused(_))
            || matches!(result.resolution, Some(ReferenceResolution::Refused(_)));
        self.metrics.resolved(if failed { "failure" } else { "success" });
        let Some(known) = self.state.preloads.get_mut(preload) else { return };
        if ResolutionInput::of(known) != *input {
            return;
        }
        if let (None, RegistryAccess::Refused(refusal)) = (&result.resolution, &result.access) {
            known.lose_secrets(refusal);
        }
        let repository = known.parsed.as_ref().map(|parsed| parsed.reference.repository().clone());
        match (result.access, result.plain, &mut known.access) {
            // After a transient failure the known secrets are kept, and read again later.
            (RegistryAccess::Refused(refusal), _, RegistryAccess::Sealed { until, .. })
                if refusal.transient =>
            {
                *until = refusal.retry_at;
            }
            (access, plain, known) => {
                self.readable.remove(preload);
                if let (RegistryAccess::Sealed { version, .. }, Some(plain), Ok(repository)) =
                    (&access, plain, repository)
                {
                    let readable =
                        SealableCredentials { version: Arc::clone(version), repository, plain };
                    self.readable.insert(Arc::clone(preload), readable);
                }
                *known = access;
            }
        }
        // `None` if only the secrets were read: the known digest is kept.
        if let Some(resolution) = result.resolution {
            known.apply_resolution(resolution, Timestamp::now().as_second());
        }
    }
}

impl ResolutionInput {
    fn of(preload: &PreloadFacts) -> Self {
        Self {
            uid: preload.uid.clone(),
            reference: preload.spec.reference.clone(),
            pull_secrets: preload.spec.pull_secrets.clone(),
        }
    }
}

impl WriteDecision {
    fn target(&self) -> WriteTarget {
        match self {
            Self::Create { node, .. } | Self::Assign { node, .. } => {
                WriteTarget::Node(Arc::clone(node))
            }
            Self::NodeStatus { node, .. } => WriteTarget::NodeStatus(Arc::clone(node)),
            Self::Report { preload, .. } | Self::Delete { preload, .. } => {
                WriteTarget::Preload(Arc::clone(preload))
            }
        }
    }
}

/// Returns the node's condition Ready. A node without that condition counts as ready.
fn is_ready(node: &ApiNode) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let mut ready = conditions.filter(|condition| condition.type_ == "Ready");
    ready.all(|condition| condition.status == "True")
}

/// Returns the result of a task. A panic is propagated and ends the process, since the state may be
/// inconsistent. The next process reads all facts again.
fn task_result<T>(ended: Result<T, JoinError>) -> T {
    ended.unwrap_or_else(|error| resume_unwind(error.into_panic()))
}

impl Drop for PreloadReconciler {
    fn drop(&mut self) {
        self.metrics.reset();
    }
}

#[cfg(test)]
mod tests;
