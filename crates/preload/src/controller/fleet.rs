//! Facts, plan, writes, again and again, for as long as this process leads.
//!
//! What is decided and cannot be written now is forgotten: it is decided again. A write that is under way is waited
//! for; one that failed is decided again after a while.

use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node as ApiNode;
use kube::{Api, Client};
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::events;
use super::look::{Found, Question};
use super::pace::Bucket;
use super::watch::{Gathering, Told, Watching, watch};
use super::write::{self, Trouble};
use super::{FleetMetrics, Look};
use crate::api::{
    ArtifactPreload, ArtifactPreloadStatus, NodeArtifacts, NodeArtifactsSpec, SealedCredentials,
    WantedArtifact,
};
use crate::plan::facts::{
    Access, Meaning, NamespaceQuota, Readiness, Sealed, Seconds, Wanted, World, key_of,
};
use crate::plan::{Plan, StatusChange, plan};
use crate::seal::{Place, Plain};
use oci::{Reference, Repository};

/// Questions that are asked at once.
const LOOKS_AT_ONCE: usize = 8;
/// The maximum number of Node objects that are read at once.
const CHECKS_AT_ONCE: usize = 8;
/// The lifetime of a node's condition that was read from the API server, in seconds.
const CHECK_COUNTS: Seconds = 20;
/// A node whose condition cannot be read counts as one that is Ready.
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);
/// In any case after so long: clocks jump, and a wake that was missed must not be for ever.
const LONGEST_SLEEP: Duration = Duration::from_mins(1);
/// What is not wanted by the API server is offered again after so long.
const REFUSED_AGAIN: Duration = Duration::from_secs(30);
/// What was decided on old facts, after so long; the watch is faster as a rule.
const OUTDATED_AGAIN: Duration = Duration::from_millis(500);
/// Events that are taken before it is planned, so that a list does not starve it.
const EVENTS_AT_ONCE: usize = 1024;
/// Preloads whose events are written at once; those of others are not written then.
const EVENT_WRITES: usize = 64;
/// Texts that nobody has any more are looked for after so many plans.
const FORGET_AFTER: u32 = 500;

/// How fast the controller writes.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Writes under way at once.
    pub writes_at_once: usize,
    /// Writes a second, over time.
    pub writes_per_second: u32,
    /// What happens within so long is planned together.
    pub settle: Duration,
    /// A status whose numbers alone change is written so rarely.
    pub counts_interval: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            writes_at_once: 16,
            writes_per_second: 50,
            settle: Duration::from_millis(200),
            counts_interval: Duration::from_secs(5),
        }
    }
}

/// Leads one fleet.
pub struct Fleet {
    client: Client,
    look: Arc<dyn Look>,
    pace: Pace,
    metrics: Arc<FleetMetrics>,
    world: World,
    gathering: Gathering,
    /// What is sealed for nodes, by preload.
    readable: HashMap<Arc<str>, Readable>,
    looks: JoinSet<(Arc<str>, Asked, Found)>,
    looking: HashSet<Arc<str>>,
    /// Nodes, by name and uid, and whether they are Ready.
    checks: JoinSet<(Arc<str>, String, bool)>,
    checking: HashSet<Arc<str>>,
    /// When each was asked last: whoever waits longest is next, so that registries that hang hold up nobody else's.
    asked: HashMap<Arc<str>, Instant>,
    writes: JoinSet<(Target, Result<Written, Trouble>)>,
    writing: HashSet<Target>,
    /// The statuses that writes under way replace.
    replaced: HashMap<Arc<str>, ArtifactPreloadStatus>,
    event_writes: JoinSet<()>,
    /// What has failed, and when it may be tried again.
    resting: HashMap<Target, Instant>,
    queue: VecDeque<Decision>,
    counted: HashMap<Arc<str>, Instant>,
    bucket: Bucket,
    plans: u32,
}

/// What secrets have.
struct Readable {
    version: Arc<str>,
    /// For which it was taken; it is for no other one.
    repository: Repository,
    plain: Plain,
}

/// What is written to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Target {
    Node(Arc<str>),
    Preload(Arc<str>),
}

/// One write that was decided.
enum Decision {
    Create { node: Arc<str>, uid: String },
    Assign { node: Arc<str>, version: String, wanted: Vec<Wanted> },
    Report { preload: Arc<str>, version: String, status: Box<ArtifactPreloadStatus> },
    Delete { preload: Arc<str>, uid: String, version: String },
}

/// What came of it.
enum Written {
    Node(Box<NodeArtifacts>),
    Preload(Box<ArtifactPreload>),
    Deleted,
}

/// For what a question was asked: its answer is for nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Asked {
    uid: String,
    reference: String,
    pull_secrets: Vec<String>,
}

impl Fleet {
    /// Knows nothing yet.
    #[must_use]
    pub fn new(
        client: Client,
        look: Arc<dyn Look>,
        pace: Pace,
        metrics: Arc<FleetMetrics>,
    ) -> Self {
        Self {
            client,
            look,
            pace,
            metrics,
            world: World::default(),
            gathering: Gathering::default(),
            readable: HashMap::new(),
            looks: JoinSet::new(),
            looking: HashSet::new(),
            checks: JoinSet::new(),
            checking: HashSet::new(),
            asked: HashMap::new(),
            writes: JoinSet::new(),
            writing: HashSet::new(),
            replaced: HashMap::new(),
            event_writes: JoinSet::new(),
            resting: HashMap::new(),
            queue: VecDeque::new(),
            counted: HashMap::new(),
            bucket: Bucket::new(pace.writes_per_second, Instant::now()),
            plans: 0,
        }
    }

    /// Bounds what the preloads of one namespace may take.
    #[must_use]
    pub fn with_quota(mut self, quota: NamespaceQuota) -> Self {
        self.world.quota = quota;
        self
    }

    /// Leads until told that somebody else does. Writes under way are then cut off: whoever leads plans anew.
    pub async fn run(mut self, lost: CancellationToken) {
        // They end with this.
        let Watching { mut told, tasks: mut watches } = watch(&self.client, &self.metrics);
        let mut dirty = true;
        let mut planned = Instant::now();
        let mut settle = self.pace.settle;
        let mut wake = planned + LONGEST_SLEEP;
        loop {
            let next = if dirty && self.gathering.is_whole() { planned + settle } else { wake };
            tokio::select! {
                biased;
                () = lost.cancelled() => return,
                Some(ended) = watches.join_next() => {
                    whole(ended);
                    tracing::error!("a watch has ended: leading no more");
                    return;
                }
                Some(done) = self.writes.join_next(), if !self.writes.is_empty() => {
                    let (target, written) = whole(done);
                    dirty |= self.written(target, written);
                    wake = wake.min(self.write_on());
                }
                Some(done) = self.checks.join_next(), if !self.checks.is_empty() => {
                    let (node, uid, is_ready) = whole(done);
                    self.checked(&node, &uid, is_ready);
                    dirty = true;
                }
                Some(done) = self.event_writes.join_next(), if !self.event_writes.is_empty() => {
                    whole(done);
                }
                Some(done) = self.looks.join_next(), if !self.looks.is_empty() => {
                    let (preload, asked, found) = whole(done);
                    self.found(&preload, &asked, found);
                    dirty = true;
                }
                // Facts may come without end; what is decided on them must not wait for it.
                () = tokio::time::sleep_until(next) => {
                    if !self.gathering.is_whole() {
                        wake = Instant::now() + LONGEST_SLEEP;
                        continue;
                    }
                    planned = Instant::now();
                    dirty = false;
                    wake = self.plan();
                    // A plan of a large fleet takes its time: never more than a fifth of all.
                    settle = self.pace.settle.max(planned.elapsed() * 4);
                    planned = Instant::now();
                }
                Some(event) = told.recv() => {
                    dirty |= self.take(event, &mut told);
                }
            }
        }
    }

    fn take(&mut self, first: Told, more: &mut tokio::sync::mpsc::Receiver<Told>) -> bool {
        let mut matters = self.gathering.take(&mut self.world, first);
        for _ in 0..EVENTS_AT_ONCE {
            let Ok(event) = more.try_recv() else { break };
            matters |= self.gathering.take(&mut self.world, event);
        }
        matters
    }

    /// Plans, and begins to carry it out; says when to plan again though nothing happens.
    fn plan(&mut self) -> Instant {
        let (begun, now) = (Instant::now(), Timestamp::now().as_second());
        let mut planned = plan(&self.world, now);
        self.metrics.planned(planned.totals, begun.elapsed());
        let mut wake = begun + LONGEST_SLEEP;
        if let Some(at) = planned.wake {
            let seconds = u64::try_from(at - now).unwrap_or(0).max(1);
            wake = wake.min(begun + Duration::from_secs(seconds));
        }
        self.plans += 1;
        if self.plans.is_multiple_of(FORGET_AFTER) {
            self.world.forget_texts();
            let (preloads, now) = (&self.world.preloads, Instant::now());
            self.readable.retain(|preload, _| preloads.contains_key(preload));
            self.asked.retain(|preload, _| preloads.contains_key(preload));
            self.counted.retain(|preload, _| preloads.contains_key(preload));
            self.resting.retain(|_, until| *until > now);
        }
        planned.look.sort_by_key(|preload| self.asked.get(preload).copied());
        for preload in &planned.look {
            self.ask(preload);
        }
        for node in &planned.check {
            self.check(node);
        }
        wake = wake.min(self.decide(planned));
        wake.min(self.write_on())
    }

    /// Turns a plan into writes that may be made now.
    fn decide(&mut self, plan: Plan) -> Instant {
        let now = Instant::now();
        let mut wake = now + LONGEST_SLEEP;
        self.queue.clear();
        // What others wait for comes first: what a preload has come to, then what nodes may begin with.
        let (urgent, counts): (Vec<_>, Vec<_>) =
            plan.report.into_iter().partition(|change| change.urgent);
        for change in urgent {
            self.decide_report(change);
        }
        for node in plan.create {
            if let Some(known) = self.world.nodes.get(&node) {
                self.queue.push_back(Decision::Create { uid: known.uid.clone(), node });
            }
        }
        for (node, wanted) in plan.assign {
            if let Some(object) = self.world.objects.get(&node) {
                let version = object.version.clone();
                self.queue.push_back(Decision::Assign { node, version, wanted });
            }
        }
        for change in counts {
            let since = self.counted.get(&change.preload);
            match since.map(|since| *since + self.pace.counts_interval) {
                Some(next) if next > now => wake = wake.min(next),
                _ => self.decide_report(change),
            }
        }
        for preload in plan.delete {
            if let Some(known) = self.world.preloads.get(&preload) {
                let (uid, version) = (known.uid.clone(), known.version.clone());
                self.queue.push_back(Decision::Delete { preload, uid, version });
            }
        }
        wake
    }

    fn decide_report(&mut self, change: StatusChange) {
        if let Some(known) = self.world.preloads.get(&change.preload) {
            let (version, status) = (known.version.clone(), Box::new(change.status));
            self.queue.push_back(Decision::Report { preload: change.preload, version, status });
        }
    }

    /// Begins as many of the decided writes as may be under way; says when more may.
    fn write_on(&mut self) -> Instant {
        let now = Instant::now();
        let mut wake = now + LONGEST_SLEEP;
        while self.writes.len() < self.pace.writes_at_once {
            let Some(decision) = self.queue.pop_front() else { break };
            let target = decision.target();
            if self.writing.contains(&target) {
                continue;
            }
            match self.resting.get(&target) {
                Some(until) if *until > now => {
                    wake = wake.min(*until);
                    continue;
                }
                _ => {}
            }
            if let Err(until) = self.bucket.take(now) {
                self.queue.push_front(decision);
                return wake.min(until);
            }
            self.resting.remove(&target);
            self.begin(target, decision);
        }
        wake
    }

    fn begin(&mut self, target: Target, decision: Decision) {
        let client = self.client.clone();
        match decision {
            Decision::Create { node, uid } => {
                self.writing.insert(target.clone());
                self.writes.spawn(async move {
                    let made = write::create(client, &node, &uid).await;
                    (target, made.map(|object| Written::Node(Box::new(object))))
                });
            }
            Decision::Assign { node, version, wanted } => {
                let bound = self.world.quota.pinned_bytes;
                let spec = NodeArtifactsSpec {
                    artifacts: self.sealed(&node, &wanted),
                    max_pinned_bytes_per_namespace: bound
                        .map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX)),
                };
                self.writing.insert(target.clone());
                self.writes.spawn(async move {
                    let written = write::assign(client, &node, &version, spec).await;
                    (target, written.map(|object| Written::Node(Box::new(object))))
                });
            }
            Decision::Report { preload, version, status } => {
                self.counted.insert(Arc::clone(&preload), Instant::now());
                if let Some(known) = self.world.preloads.get(&preload) {
                    self.replaced.insert(Arc::clone(&preload), known.status.clone());
                }
                self.writing.insert(target.clone());
                self.writes.spawn(async move {
                    let written = write::report(client, &preload, &version, &status).await;
                    (target, written.map(|object| Written::Preload(Box::new(object))))
                });
            }
            Decision::Delete { preload, uid, version } => {
                self.writing.insert(target.clone());
                self.writes.spawn(async move {
                    let gone = write::delete(client, &preload, &uid, &version).await;
                    (target, gone.map(|()| Written::Deleted))
                });
            }
        }
    }

    /// The wishes as they are written, with credentials for those that need some.
    fn sealed(&self, node: &str, wanted: &[Wanted]) -> Vec<WantedArtifact> {
        let with_credentials = |wish: &Wanted| {
            let preload = self.world.key(wish.preload);
            let place = Place { node, preload: &preload, reference: &wish.reference };
            let sealed = wish.sealed.as_ref().and_then(|sealed| self.seal(sealed, place));
            write::wanted(&preload, wish, sealed)
        };
        let mut artifacts: Vec<_> = wanted.iter().map(with_credentials).collect();
        artifacts.sort_by(|one, two| {
            (&one.preload, &one.reference).cmp(&(&two.preload, &two.reference))
        });
        artifacts
    }

    /// None where the secrets are not known any more: what needs them is not planned then, and what does not must not
    /// wait for them.
    fn seal(&self, sealed: &Sealed, place: Place<'_>) -> Option<SealedCredentials> {
        let Readable { version, repository, plain } = self.readable.get(place.preload)?;
        let reference: Reference = place.reference.parse().ok()?;
        if *version != sealed.version || repository != reference.repository() {
            return None;
        }
        let data = plain.seal(&sealed.key, place).unwrap_or_else(|error| {
            // A node that tells no key can open as little, and says that it lacks them.
            tracing::warn!(node = place.node, %error, "credentials cannot be sealed for a node");
            String::new()
        });
        let (key, version) = (sealed.key.to_string(), sealed.version.to_string());
        Some(SealedCredentials { key, version, data })
    }

    /// Takes in what came of a write; whether it matters.
    fn written(&mut self, target: Target, written: Result<Written, Trouble>) -> bool {
        self.writing.remove(&target);
        let (kind, replaced) = match &target {
            Target::Node(_) => ("node", None),
            Target::Preload(preload) => ("preload", self.replaced.remove(preload)),
        };
        let now = Instant::now();
        match written {
            Ok(written) => {
                self.metrics.wrote(kind, "success");
                self.bucket.answered();
                if let (Written::Preload(object), Some(before)) = (&written, replaced) {
                    self.tell(object, &before);
                }
                self.learn(written);
            }
            Err(trouble) => {
                self.metrics.wrote(kind, trouble.word());
                match trouble {
                    Trouble::Outdated => {
                        self.bucket.answered();
                        self.resting.insert(target, now + OUTDATED_AGAIN);
                    }
                    Trouble::Busy(wait, reason) => {
                        tracing::warn!(
                            reason,
                            "the API server is busy or away: writing again later"
                        );
                        self.bucket.pause(wait, now);
                    }
                    Trouble::Refused(reason) => {
                        self.bucket.answered();
                        tracing::error!(?target, reason, "the API server refuses a write");
                        self.resting.insert(target, now + REFUSED_AGAIN);
                    }
                }
            }
        }
        true
    }

    /// Writes events for what a new status says beyond the one before.
    fn tell(&mut self, preload: &ArtifactPreload, before: &ArtifactPreloadStatus) {
        let turns = preload.status.as_ref().map(|after| events::turns(before, after));
        let turns = turns.filter(|turns| !turns.is_empty());
        if let Some(turns) = turns
            && self.event_writes.len() < EVENT_WRITES
        {
            self.event_writes.spawn(events::write(self.client.clone(), preload.clone(), turns));
        }
    }

    /// Takes in what was written, unless the watch has told meanwhile that it is gone: it would never go again.
    fn learn(&mut self, written: Written) {
        match written {
            Written::Node(object) => {
                let mut owners = object.metadata.owner_references.iter().flatten();
                let name = object.metadata.name.as_deref().unwrap_or_default();
                let node = self.world.nodes.get(name);
                if node.is_some_and(|node| owners.any(|owner| owner.uid == node.uid)) {
                    self.world.put_object(&object);
                }
            }
            Written::Preload(object) => {
                let key = key_of(&object).unwrap_or_default();
                let known = self.world.preloads.get(key.as_str());
                if known.is_some_and(|known| object.metadata.uid.as_ref() == Some(&known.uid)) {
                    self.world.put_preload(&object);
                }
            }
            Written::Deleted => {}
        }
    }

    /// Asks what a preload means, unless that is being asked already.
    fn ask(&mut self, preload: &Arc<str>) {
        if self.looks.len() >= LOOKS_AT_ONCE || self.looking.contains(preload) {
            return;
        }
        let Some(known) = self.world.preloads.get(preload) else { return };
        let Ok(parsed) = &known.parsed else { return };
        let asked = Asked {
            uid: known.uid.clone(),
            reference: known.spec.reference.clone(),
            pull_secrets: known.spec.pull_secrets.clone(),
        };
        let question = Question {
            namespace: write::split(preload).0.to_owned(),
            reference: parsed.reference.clone(),
            written: known.spec.reference.clone(),
            pull_secrets: known.spec.pull_secrets.clone(),
            meaning: !known.meaning.is_answer(),
        };
        self.looking.insert(Arc::clone(preload));
        self.asked.insert(Arc::clone(preload), Instant::now());
        let (look, preload) = (Arc::clone(&self.look), Arc::clone(preload));
        self.looks.spawn(async move {
            let found = AssertUnwindSafe(look.look(question)).catch_unwind().await;
            let failed =
                |_| Found::failed("looking at it failed internally: see the controller's log");
            (preload, asked, found.unwrap_or_else(failed))
        });
    }

    /// Asks whether a node is Ready, unless that is being asked already.
    fn check(&mut self, node: &Arc<str>) {
        if self.checks.len() >= CHECKS_AT_ONCE || self.checking.contains(node) {
            return;
        }
        let Some(known) = self.world.nodes.get(node) else { return };
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

    /// Takes in whether a node is Ready.
    fn checked(&mut self, node: &Arc<str>, uid: &str, is_ready: bool) {
        self.checking.remove(node);
        let until = Timestamp::now().as_second() + CHECK_COUNTS;
        if let Some(known) = self.world.nodes.get_mut(node).filter(|known| known.uid == uid) {
            known.readiness = Some(Readiness { is_ready, until });
        }
    }

    /// Takes in what was found out, if it is still asked for.
    fn found(&mut self, preload: &Arc<str>, asked: &Asked, found: Found) {
        self.looking.remove(preload);
        let failed = matches!(found.access, Access::Refused(_))
            || matches!(found.meaning, Some(Meaning::Refused(_)));
        self.metrics.looked(if failed { "failure" } else { "success" });
        let Some(known) = self.world.preloads.get_mut(preload) else { return };
        let now = Asked {
            uid: known.uid.clone(),
            reference: known.spec.reference.clone(),
            pull_secrets: known.spec.pull_secrets.clone(),
        };
        if now != *asked {
            return;
        }
        if let (None, Access::Refused(refusal)) = (&found.meaning, &found.access) {
            known.lose_secrets(refusal);
        }
        let repository = known.parsed.as_ref().map(|parsed| parsed.reference.repository().clone());
        match (found.access, found.plain, &mut known.access) {
            // What cannot be read at the moment is as it was, and is read again.
            (Access::Refused(refusal), _, Access::Sealed { until, .. }) if refusal.transient => {
                *until = refusal.retry_at;
            }
            (access, plain, known) => {
                self.readable.remove(preload);
                if let (Access::Sealed { version, .. }, Some(plain), Ok(repository)) =
                    (&access, plain, repository)
                {
                    let readable = Readable { version: Arc::clone(version), repository, plain };
                    self.readable.insert(Arc::clone(preload), readable);
                }
                *known = access;
            }
        }
        // What is known stays known: the secrets alone were read.
        if let Some(meaning) = found.meaning {
            known.learn(meaning, Timestamp::now().as_second());
        }
    }
}

impl Decision {
    fn target(&self) -> Target {
        match self {
            Self::Create { node, .. } | Self::Assign { node, .. } => Target::Node(Arc::clone(node)),
            Self::Report { preload, .. } | Self::Delete { preload, .. } => {
                Target::Preload(Arc::clone(preload))
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

/// What a task has come to. One that has panicked has left behind what nobody knows: the process ends, and the next one
/// reads anew what there is.
fn whole<T>(ended: Result<T, JoinError>) -> T {
    ended.unwrap_or_else(|error| resume_unwind(error.into_panic()))
}

#[cfg(test)]
mod tests;
