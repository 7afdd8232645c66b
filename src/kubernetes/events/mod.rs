//! Events on pods, which show the progress of a pull before the kubelet's call ends.
//!
//! ```text
//! PodEvents         queues occurrences; never waits, and drops them if the queue is full
//! event_correlator  decides whether to create an Event, to change an existing one, or to write nothing: pure
//! event_writer      the task that writes to the API server; failures are only logged
//! ```
//!
//! They are core/v1 Events, like the kubelet's: those of `events.k8s.io` cannot change their text, and progress would
//! be a new object each time.

mod event_correlator;
mod event_writer;

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The capacity of the queue. Further occurrences are dropped.
const QUEUE: usize = 256;

/// The pod that an Event is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodReference {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The pod's uid.
    pub uid: String,
}

/// The reason of an Event, as `kubectl describe pod` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum EventReason {
    Pulling,
    Pulled,
    Failed,
    Damaged,
    Switched,
    NotFollowed,
}

/// An occurrence on a pod's volume.
#[derive(Clone, Debug)]
pub(super) struct PodOccurrence {
    pod: PodReference,
    reference: String,
    reason: EventReason,
    /// The end of the message, after the reference.
    detail: String,
    /// The time that the last call took, for a pull that has ended.
    took: Duration,
    /// Written only if the pull had an Event before.
    only_after_pulling: bool,
}

/// Queues occurrences for the writer. Cheap to clone.
#[derive(Clone)]
pub struct EventRecorder(mpsc::Sender<PodOccurrence>);

impl EventRecorder {
    /// Starts the writer, which ends with `shutdown`.
    pub fn start(
        driver_name: &str,
        node_id: &str,
        tracker: &TaskTracker,
        shutdown: &CancellationToken,
    ) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let writer = event_writer::EventWriter::new(driver_name.to_owned(), node_id.to_owned());
        let shutdown = shutdown.clone();
        tracker.spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = writer.run(receiver) => {}
            }
        });
        Self(sender)
    }

    /// Reports the progress of a running pull.
    pub fn pulling(&self, pod: &PodReference, reference: &str, progress: String) {
        self.send(PodOccurrence::new(pod, reference, EventReason::Pulling, progress));
    }

    /// Reports the end of a successful pull; `took` is the time of its last call. Content that was
    /// found on the node only ends a pull that had an Event.
    pub fn pulled(
        &self,
        pod: &PodReference,
        reference: &str,
        what: String,
        took: Duration,
        was_found: bool,
    ) {
        let pulled = PodOccurrence::new(pod, reference, EventReason::Pulled, what);
        self.send(PodOccurrence { took, only_after_pulling: was_found, ..pulled });
    }

    /// Reports a volume that failed to mount.
    pub fn failed(&self, pod: &PodReference, reference: &str, why: String) {
        self.send(PodOccurrence::new(pod, reference, EventReason::Failed, why));
    }

    /// Reports a volume that shows what its tag means now.
    pub fn switched(&self, pod: &PodReference, reference: &str, what: String) {
        self.send(PodOccurrence::new(pod, reference, EventReason::Switched, what));
    }

    /// Reports a volume that keeps showing what its tag meant before.
    pub fn not_followed(&self, pod: &PodReference, reference: &str, why: String) {
        self.send(PodOccurrence::new(pod, reference, EventReason::NotFollowed, why));
    }

    /// Reports damage of content that the pod has mounted.
    pub fn damaged(&self, pod: &PodReference, reference: &str) {
        let what =
            "the node has read it back, and it is not what was unpacked; new pods get it anew. \
                    Delete this pod, so that its successor does"
                .to_owned();
        self.send(PodOccurrence::new(pod, reference, EventReason::Damaged, what));
    }

    fn send(&self, occurrence: PodOccurrence) {
        if self.0.try_send(occurrence).is_err() {
            tracing::debug!("an event is not told: too many wait for the Kubernetes API");
        }
    }
}

impl PodOccurrence {
    fn new(pod: &PodReference, reference: &str, reason: EventReason, detail: String) -> Self {
        let (pod, reference) = (pod.clone(), reference.to_owned());
        Self { pod, reference, reason, detail, took: Duration::ZERO, only_after_pulling: false }
    }
}

impl EventReason {
    fn name(self) -> &'static str {
        match self {
            Self::Pulling => "Pulling",
            Self::Pulled => "Pulled",
            Self::Failed => "Failed",
            Self::Damaged => "Damaged",
            Self::Switched => "Switched",
            Self::NotFollowed => "NotFollowed",
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Self::Pulling | Self::Pulled | Self::Switched => "Normal",
            Self::Failed | Self::Damaged | Self::NotFollowed => "Warning",
        }
    }
}
