//! Carries out the assignments in the node's `NodeArtifacts` object, and reports their progress in its status.
//!
//! ```text
//! mod       watches the object; starts and stops jobs; writes the status
//! job       fetches, pins and retries one artifact
//! pins      adds and removes the pins of preloads
//! capacity  the space that the node has for artifacts
//! report    builds the status
//! ```
//!
//! Off by default, and independent of the rest: pods are served whatever happens here or to the API server. It writes
//! nothing but the status of its own object, only when that changes, and progress in coarse steps.

mod capacity;
mod job;
mod pins;
mod report;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::api::{Patch, PatchParams};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::watch_object;
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::volume::{ContentState, NodeContent};
use job::{JobReport, PreloadJob};
use pins::PreloadPins;
pub use pins::release_all;
use preload::api::{NodeArtifacts, NodeArtifactsStatus, WantedArtifact};
use preload::sealed_credentials::NodeKey;

/// The field manager of its writes.
const MANAGER: &str = "csi-driver-oci-node";
/// The most artifacts that are fetched at once. The node's own limits hold as well.
const AT_ONCE: usize = 4;
/// The shortest time between two writes of the status.
const SETTLE: Duration = Duration::from_millis(500);
/// The shortest time between two writes that report progress only.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(15);
/// The longest time that the first status waits for the check of the disk.
const FIRST_LOOK: Duration = Duration::from_secs(20);
/// The delay after a first failed write; doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest delay after a failed write.
const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// The longest time of one write.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The interval of measurements of the capacity.
const CAPACITY_INTERVAL: Duration = Duration::from_secs(10);
/// The interval of attempts to create a client for the API server.
const CLIENT_RETRY: Duration = Duration::from_secs(30);

/// The node's part of preloads.
pub struct PreloadAgent {
    /// The node's name.
    pub node: String,
    /// The content, or the reason why it cannot be served.
    pub content: watch::Receiver<ContentState>,
}

/// The preload, as `namespace/name`, and the reference of one artifact.
pub(super) type JobKey = (String, String);

/// The object's last known status.
struct WrittenStatus {
    status: Option<NodeArtifactsStatus>,
}

struct PreloadWorker {
    api: Api<NodeArtifacts>,
    node: String,
    content: NodeContent,
    key: Arc<NodeKey>,
    pins: PreloadPins,
    permits: Arc<Semaphore>,
    jobs: BTreeMap<JobKey, PreloadJob>,
    reports: mpsc::UnboundedSender<JobReport>,
    /// `None` while the object does not exist.
    written: Option<WrittenStatus>,
    /// The reported capacity in bytes.
    capacity: Option<u64>,
    begun: Instant,
    may_write: Instant,
    failures: u32,
}

impl PreloadAgent {
    /// Runs until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let ready = async {
            let content = loop {
                let state = self.content.borrow_and_update().clone();
                if let Ok(content) = state {
                    break content;
                }
                if self.content.changed().await.is_err() {
                    return None;
                }
            };
            let mut logged = String::new();
            loop {
                match Client::try_default().await {
                    Ok(client) => return Some((content, client)),
                    Err(error) if error.to_string() == logged => {}
                    Err(error) => {
                        logged = error.to_string();
                        tracing::error!(
                            error = logged,
                            "preloads are not carried out: there is no access to the Kubernetes API"
                        );
                    }
                }
                tokio::time::sleep(CLIENT_RETRY).await;
            }
        };
        tokio::select! {
            met = ready => {
                if let Some((content, client)) = met {
                    PreloadWorker::run(client, self.node, content, &shutdown).await;
                }
            }
            () = shutdown.cancelled() => {}
        }
    }
}

impl PreloadWorker {
    async fn run(client: Client, node: String, content: NodeContent, shutdown: &CancellationToken) {
        let api: Api<NodeArtifacts> = Api::all(client);
        let (sender, mut reports) = mpsc::unbounded_channel();
        let now = Instant::now();
        let mut worker = Self {
            api: api.clone(),
            pins: PreloadPins::new(content.store.clone()),
            content,
            key: Arc::new(NodeKey::generate()),
            permits: Arc::new(Semaphore::new(AT_ONCE)),
            jobs: BTreeMap::new(),
            reports: sender,
            written: None,
            capacity: None,
            begun: now,
            may_write: now,
            failures: 0,
            node: node.clone(),
        };
        let mut objects = std::pin::pin!(watch_object(api, &node).default_backoff());
        let mut last_error = String::new();
        let mut capacity_timer = tokio::time::interval(CAPACITY_INTERVAL);
        capacity_timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let next = worker.next_write();
            tokio::select! {
                () = shutdown.cancelled() => break,
                // The first tick comes before the first status is written.
                _ = capacity_timer.tick() => worker.measure_capacity().await,
                object = objects.next() => match object {
                    Some(Ok(object)) => {
                        last_error.clear();
                        worker.apply(object).await;
                    }
                    Some(Err(error)) => {
                        let error = error.to_string();
                        if error != last_error {
                            tracing::warn!(error, "this node's object cannot be watched: trying again");
                            last_error = error;
                        }
                    }
                    None => break,
                },
                Some(first) = reports.recv() => {
                    worker.note(first);
                    while let Ok(more) = reports.try_recv() {
                        worker.note(more);
                    }
                }
                () = tokio::time::sleep_until(next) => worker.write().await,
            }
        }
        for job in worker.jobs.values() {
            job.stop();
        }
    }

    async fn measure_capacity(&mut self) {
        let store = self.content.store.clone();
        let measured = tokio::task::spawn_blocking(move || capacity::capacity(&store)).await;
        match measured {
            Ok(Ok(bytes)) => self.capacity = Some(capacity::reported(bytes, self.capacity)),
            // An unreadable disk is reported by the next write to it.
            failed => {
                tracing::debug!(?failed, "how much there is room for is not known");
                self.capacity = None;
            }
        }
    }

    /// Applies the current assignments.
    async fn apply(&mut self, object: Option<NodeArtifacts>) {
        let Some(object) = object else {
            // There are no instructions for this node. Its pins and jobs stay until there are.
            self.written = None;
            return;
        };
        self.written = Some(WrittenStatus { status: object.status });
        let bound = object.spec.max_pinned_bytes_per_namespace;
        let bound = bound.and_then(|bytes| u64::try_from(bytes).ok());
        let wanted: BTreeMap<JobKey, WantedArtifact> = object
            .spec
            .artifacts
            .into_iter()
            .map(|wanted| ((wanted.preload.clone(), wanted.reference.clone()), wanted))
            .collect();
        self.jobs.retain(|key, job| {
            let stays = wanted.contains_key(key);
            if !stays {
                job.stop();
            }
            stays
        });
        self.pins.keep(wanted.values(), bound).await;
        for (key, wanted) in wanted {
            match self.jobs.get_mut(&key) {
                // The job keeps its assignment, so that a ready job begins again with new credentials when it has to
                // fetch again.
                Some(job) if !job.must_restart(&wanted) => {}
                known => {
                    if let Some(job) = known {
                        job.stop();
                    }
                    let job = self.begin(wanted);
                    self.jobs.insert(key, job);
                }
            }
        }
    }

    fn begin(&self, wanted: WantedArtifact) -> PreloadJob {
        job::JobContext {
            node: self.node.clone(),
            content: self.content.clone(),
            key: Arc::clone(&self.key),
            pins: self.pins.clone(),
            permits: Arc::clone(&self.permits),
            reports: self.reports.clone(),
        }
        .begin(wanted)
    }

    fn note(&mut self, report: JobReport) {
        if let Some(job) = self.jobs.get_mut(&report.key) {
            job.note(report);
        }
    }

    /// Returns the time of the next write of the status.
    fn next_write(&self) -> Instant {
        let now = Instant::now();
        let Some(WrittenStatus { status: written }) = &self.written else {
            return now + LONGEST_PAUSE;
        };
        // The disk is checked first, so that a restart is not reported as a loss.
        let unknown = self.jobs.values().any(|job| !job.is_known());
        if unknown && self.begun.elapsed() < FIRST_LOOK {
            return (self.begun + FIRST_LOOK).max(self.may_write);
        }
        let status = self.status();
        match written {
            Some(written) if *written == status => now + PROGRESS_INTERVAL,
            Some(written) if report::differs_in_progress_only(written, &status) => {
                self.may_write.max(now + SETTLE).max(self.may_write + PROGRESS_INTERVAL)
            }
            _ => self.may_write.max(now),
        }
    }

    fn status(&self) -> NodeArtifactsStatus {
        report::status(self.jobs.values(), self.key.public(), self.capacity)
    }

    async fn write(&mut self) {
        let status = self.status();
        match &self.written {
            Some(written) if written.status.as_ref() != Some(&status) => {}
            _ => return,
        }
        let change = json!({"status": status});
        let parameters =
            PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        let change = Patch::Merge(&change);
        let write = self.api.patch_status(&self.node, &parameters, &change);
        let written = tokio::time::timeout(TIMEOUT, write).await;
        let now = Instant::now();
        match written {
            Ok(Ok(_)) => {
                self.failures = 0;
                // Not the object of the response: a CustomResourceDefinition that is older than this program drops
                // fields, which would be written again and again.
                self.written = Some(WrittenStatus { status: Some(status) });
                self.may_write = now + SETTLE;
            }
            Ok(Err(kube::Error::Api(answer))) if answer.code == 404 => {
                // The object is deleted. The watch reports when there is another one.
                self.may_write = now + FIRST_PAUSE;
            }
            failed => {
                let reason = match failed {
                    Ok(Err(error)) => error.to_string(),
                    _ => "it did not answer in time".to_owned(),
                };
                let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(6));
                let pause = pause.min(LONGEST_PAUSE);
                if self.failures == 0 {
                    tracing::warn!(reason, "this node's status cannot be written: trying again");
                }
                self.failures += 1;
                // Jitter, so that thousands of nodes do not return at the same moment.
                self.may_write = now + pause.mul_f64(job::between(0.5, 1.5));
            }
        }
    }
}
