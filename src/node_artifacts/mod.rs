//! Carries out the assignments in the node's `NodeArtifacts` object, and reports their progress in its status.
//!
//! ```text
//! mod                watches the object, keeps its artifacts with `warming`, and writes the status
//! assigned_artifact  how one artifact is fetched, pinned and recorded
//! node_capacity      the space that the node has for artifacts
//! artifact_report    builds the status
//! ```
//!
//! Off by default, and independent of the rest: pods are served whatever happens here or to the API server. It writes
//! nothing but the status of its own object, only when that changes, and progress in coarse steps.

mod artifact_report;
mod assigned_artifact;
mod node_capacity;

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::api::{Patch, PatchParams};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::watch_object;
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::volume::{ContentState, NodeContent};
use crate::warming::{Reconciler, SourcePins, WantedPins};
pub use assigned_artifact::OWNERS;
use assigned_artifact::{ArtifactContext, AssignedArtifact};
use oci::Reference;
use oci::backoff::{RetryBackoff, jittered};
use preload::api::{NodeArtifacts, NodeArtifactsStatus};
use preload::sealed_credentials::NodeKey;

/// The field manager of its writes.
const MANAGER: &str = "csi-driver-oci-node";
/// The shortest time between two writes of the status.
const SETTLE: Duration = Duration::from_millis(500);
/// The shortest time between two writes that report progress only.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(15);
/// The pauses after failed writes.
const BACKOFF: RetryBackoff =
    RetryBackoff { first: Duration::from_secs(1), longest: Duration::from_mins(1) };
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
type ArtifactKey = (String, String);

/// The object's last known status.
struct WrittenStatus {
    status: Option<NodeArtifactsStatus>,
}

struct PreloadWorker {
    api: Api<NodeArtifacts>,
    context: Arc<ArtifactContext>,
    artifacts: Reconciler<AssignedArtifact>,
    /// `None` while the object does not exist.
    written: Option<WrittenStatus>,
    /// The reported capacity in bytes.
    capacity: Option<u64>,
    may_write: Instant,
    failures: u32,
}

impl PreloadAgent {
    /// Runs until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let ready = async {
            let content = self.content.wait_for(Result::is_ok).await.ok()?.clone().ok()?;
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
        if let Some(Some((content, client))) = shutdown.run_until_cancelled(ready).await {
            PreloadWorker::run(client, self.node, content, &shutdown).await;
        }
    }
}

impl PreloadWorker {
    async fn run(client: Client, node: String, content: NodeContent, shutdown: &CancellationToken) {
        let api: Api<NodeArtifacts> = Api::all(client);
        let pins = SourcePins::new(content.store.clone(), OWNERS);
        let key = NodeKey::generate();
        let mut worker = Self {
            api: api.clone(),
            context: Arc::new(ArtifactContext { node: node.clone(), content, key, pins }),
            artifacts: Reconciler::default(),
            written: None,
            capacity: None,
            may_write: Instant::now(),
            failures: 0,
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
                () = worker.artifacts.changed() => {}
                () = tokio::time::sleep_until(next) => worker.write().await,
            }
        }
    }

    async fn measure_capacity(&mut self) {
        let store = self.context.content.store.clone();
        let measured = tokio::task::spawn_blocking(move || node_capacity::capacity(&store)).await;
        match measured {
            Ok(Ok(bytes)) => self.capacity = Some(node_capacity::reported(bytes, self.capacity)),
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
            // There are no instructions for this node. Its pins and tasks stay until there are.
            self.written = None;
            return;
        };
        self.written = Some(WrittenStatus { status: object.status });
        let bound = object.spec.max_pinned_bytes_per_namespace;
        let bound = bound.and_then(|bytes| u64::try_from(bytes).ok());
        let assigned = object.spec.artifacts.into_iter();
        let assigned =
            assigned.map(|wanted| AssignedArtifact { wanted, context: Arc::clone(&self.context) });
        let assigned: Vec<_> = assigned.collect();
        let pinned = assigned.iter().map(|artifact| &artifact.wanted).filter(|wanted| wanted.pin);
        let names = pinned.filter_map(|wanted| {
            let reference = wanted.reference.parse::<Reference>().ok()?;
            Some((AssignedArtifact::owner(wanted), reference.to_string()))
        });
        let wanted = WantedPins { pins: names.collect(), bytes_per_namespace: bound };
        let pins = self.context.pins.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || pins.keep(wanted)).await {
            tracing::warn!(%error, "pins of preloads cannot be taken away");
        }
        self.artifacts.apply(assigned).await;
    }

    /// Returns the time of the next write of the status.
    fn next_write(&self) -> Instant {
        let now = Instant::now();
        let Some(WrittenStatus { status: written }) = &self.written else {
            return now + BACKOFF.longest;
        };
        let status = self.status();
        match written {
            Some(written) if *written == status => now + PROGRESS_INTERVAL,
            Some(written) if artifact_report::differs_in_progress_only(written, &status) => {
                self.may_write.max(now + SETTLE).max(self.may_write + PROGRESS_INTERVAL)
            }
            _ => self.may_write.max(now),
        }
    }

    fn status(&self) -> NodeArtifactsStatus {
        artifact_report::status(&self.artifacts.states(), self.context.key.public(), self.capacity)
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
        let write = self.api.patch_status(&self.context.node, &parameters, &change);
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
                self.may_write = now + BACKOFF.first;
            }
            failed => {
                let reason = match failed {
                    Ok(Err(error)) => error.to_string(),
                    _ => "it did not answer in time".to_owned(),
                };
                if self.failures == 0 {
                    tracing::warn!(reason, "this node's status cannot be written: trying again");
                }
                self.failures += 1;
                self.may_write = now + jittered(BACKOFF.after(self.failures));
            }
        }
    }
}
