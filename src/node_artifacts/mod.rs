//! The node plugin's part: does what its node's object says, and says how far it is.
//!
//! ```text
//! mod       watches the object; begins and ends jobs; writes the status
//! job       one artifact: fetched, pinned, tried again
//! pins      what is kept for preloads, and what is not any more
//! capacity  how much there is room for
//! report    how far all are, as the status says it
//! ```
//!
//! It is a part of its own, off unless it is asked for: whatever becomes of it or of the API server, pods are served as
//! before. It writes nothing but its own object's status, only when that changes, and progress in coarse steps.

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

use crate::volume::{Content, ContentState};
use job::{Job, Told};
use pins::Pins;
pub use pins::release_all;
use preload::api::{NodeArtifacts, NodeArtifactsStatus, WantedArtifact};
use preload::seal::NodeKey;

/// Who the API server says has written.
const MANAGER: &str = "csi-driver-oci-node";
/// Artifacts that are fetched at once; the node's own limits hold besides.
const AT_ONCE: usize = 4;
/// What happens within so long is told together.
const SETTLE: Duration = Duration::from_millis(500);
/// Progress alone is told so rarely.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(15);
/// So long it is waited for what is on the disk before it is told.
const FIRST_LOOK: Duration = Duration::from_secs(20);
/// After a write that failed; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// A write that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How much there is room for is looked at so often.
const CAPACITY_INTERVAL: Duration = Duration::from_secs(10);
/// Between two tries to reach an API server at all.
const CLIENT_RETRY: Duration = Duration::from_secs(30);

/// What it takes.
pub struct NodePart {
    /// The node's name.
    pub node: String,
    /// When there is content, and which.
    pub content: watch::Receiver<ContentState>,
}

/// Which artifact for whom.
pub(super) type JobKey = (String, String);

/// What stands in the object's status.
struct Written {
    status: Option<NodeArtifactsStatus>,
}

struct Working {
    api: Api<NodeArtifacts>,
    node: String,
    content: Content,
    key: Arc<NodeKey>,
    pins: Pins,
    permits: Arc<Semaphore>,
    jobs: BTreeMap<JobKey, Job>,
    told: mpsc::UnboundedSender<Told>,
    /// None while there is no object.
    written: Option<Written>,
    /// Bytes that there is room for, as they are told.
    capacity: Option<u64>,
    begun: Instant,
    may_write: Instant,
    failures: u32,
}

impl NodePart {
    /// Works until shutdown.
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
            let mut told = String::new();
            loop {
                match Client::try_default().await {
                    Ok(client) => return Some((content, client)),
                    Err(error) if error.to_string() == told => {}
                    Err(error) => {
                        told = error.to_string();
                        tracing::error!(
                            error = told,
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
                    Working::run(client, self.node, content, &shutdown).await;
                }
            }
            () = shutdown.cancelled() => {}
        }
    }
}

impl Working {
    async fn run(client: Client, node: String, content: Content, shutdown: &CancellationToken) {
        let api: Api<NodeArtifacts> = Api::all(client);
        let (sender, mut told) = mpsc::unbounded_channel();
        let now = Instant::now();
        let mut working = Self {
            api: api.clone(),
            pins: Pins::new(content.store.clone()),
            content,
            key: Arc::new(NodeKey::generate()),
            permits: Arc::new(Semaphore::new(AT_ONCE)),
            jobs: BTreeMap::new(),
            told: sender,
            written: None,
            capacity: None,
            begun: now,
            may_write: now,
            failures: 0,
            node: node.clone(),
        };
        let mut objects = std::pin::pin!(watch_object(api, &node).default_backoff());
        let mut last_error = String::new();
        let mut rooms = tokio::time::interval(CAPACITY_INTERVAL);
        rooms.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let next = working.next_write();
            tokio::select! {
                () = shutdown.cancelled() => break,
                // The first look comes before the first status.
                _ = rooms.tick() => working.look_at_room().await,
                object = objects.next() => match object {
                    Some(Ok(object)) => {
                        last_error.clear();
                        working.take(object).await;
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
                Some(first) = told.recv() => {
                    working.note(first);
                    while let Ok(more) = told.try_recv() {
                        working.note(more);
                    }
                }
                () = tokio::time::sleep_until(next) => working.write().await,
            }
        }
        for job in working.jobs.values() {
            job.stop();
        }
    }

    async fn look_at_room(&mut self) {
        let store = self.content.store.clone();
        let looked = tokio::task::spawn_blocking(move || capacity::capacity(&store)).await;
        match looked {
            Ok(Ok(bytes)) => self.capacity = Some(capacity::told(bytes, self.capacity)),
            // A disk that cannot be looked at is said where something is to be written to it.
            failed => {
                tracing::debug!(?failed, "how much there is room for is not known");
                self.capacity = None;
            }
        }
    }

    /// Takes in what is wanted now.
    async fn take(&mut self, object: Option<NodeArtifacts>) {
        let Some(object) = object else {
            // Nothing is said about this node: what it has stays, until something is.
            self.written = None;
            return;
        };
        self.written = Some(Written { status: object.status });
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
                // What it works with stays noted: a job that is ready begins anew with other credentials when it has
                // to fetch again.
                Some(job) if !job.must_begin_anew(&wanted) => {}
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

    fn begin(&self, wanted: WantedArtifact) -> Job {
        job::Begin {
            node: self.node.clone(),
            content: self.content.clone(),
            key: Arc::clone(&self.key),
            pins: self.pins.clone(),
            permits: Arc::clone(&self.permits),
            told: self.told.clone(),
        }
        .begin(wanted)
    }

    fn note(&mut self, told: Told) {
        if let Some(job) = self.jobs.get_mut(&told.key) {
            job.note(told);
        }
    }

    /// When the status is to be written next, if it has to be.
    fn next_write(&self) -> Instant {
        let now = Instant::now();
        let Some(Written { status: written }) = &self.written else { return now + LONGEST_PAUSE };
        // What is on the disk is looked at first: a restart must not look like a loss.
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
                // Not what is answered: a definition that is older than this program drops fields, and they would be
                // sent again and again.
                self.written = Some(Written { status: Some(status) });
                self.may_write = now + SETTLE;
            }
            Ok(Err(kube::Error::Api(answer))) if answer.code == 404 => {
                // It has gone; the watch tells when there is another one.
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
                // Thousands of nodes must not come back at the same moment.
                self.may_write = now + pause.mul_f64(job::between(0.5, 1.5));
            }
        }
    }
}
