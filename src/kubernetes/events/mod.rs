//! Events on pods: what a user sees of a pull before the kubelet's own call has ended.
//!
//! ```text
//! handle    says what happened; never waits, and is dropped when the queue is full
//! ledger    whether a new Event is made, an old one is changed, or nothing is said: pure
//! writer    the task that asks the API server; a failure is logged, and nothing else
//! ```
//!
//! They are core/v1 Events, as the kubelet's own: those of `events.k8s.io` cannot change their text, and
//! progress would be a new object each time.

mod ledger;
mod writer;

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What waits to be written; beyond it, what happens is not told.
const QUEUE: usize = 256;

/// The pod that an Event is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodReference {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

/// What happened, in the word that `kubectl describe pod` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Reason {
    Pulling,
    Pulled,
    Failed,
    Damaged,
}

/// Something that happened to a pod's volume.
#[derive(Clone, Debug)]
pub(super) struct Happening {
    pod: PodReference,
    reference: String,
    reason: Reason,
    /// What follows the reference.
    detail: String,
    /// How long the last call for it took, for what ended.
    took: Duration,
    /// Said only where a pull was told before: nothing else is news.
    only_after_pulling: bool,
}

/// Says what happens. Cheap to clone.
#[derive(Clone, Debug)]
pub struct PodEvents(mpsc::Sender<Happening>);

impl PodEvents {
    /// Starts the writer, which ends with `shutdown`.
    #[must_use]
    pub fn start(
        driver_name: &str,
        node_id: &str,
        tracker: &TaskTracker,
        shutdown: &CancellationToken,
    ) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let writer = writer::Writer::new(driver_name.to_owned(), node_id.to_owned());
        let shutdown = shutdown.clone();
        tracker.spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = writer.run(receiver) => {}
            }
        });
        Self(sender)
    }

    /// A pull is under way, and how far it is.
    pub fn pulling(&self, pod: &PodReference, reference: &str, progress: String) {
        self.tell(Happening::new(pod, reference, Reason::Pulling, progress));
    }

    /// It has ended well; `took` is what the last call for it took.
    pub fn pulled(&self, pod: &PodReference, reference: &str, what: String, took: Duration) {
        self.tell(Happening { took, ..Happening::new(pod, reference, Reason::Pulled, what) });
    }

    /// The content was here. That ends a pull that was told, and is no news otherwise.
    pub fn found(&self, pod: &PodReference, reference: &str, what: String, took: Duration) {
        let pulled = Happening::new(pod, reference, Reason::Pulled, what);
        self.tell(Happening { took, only_after_pulling: true, ..pulled });
    }

    /// The volume is not there, and why.
    pub fn failed(&self, pod: &PodReference, reference: &str, why: String) {
        self.tell(Happening::new(pod, reference, Reason::Failed, why));
    }

    /// What the pod has mounted was found damaged on the node.
    pub fn damaged(&self, pod: &PodReference, reference: &str) {
        let what =
            "the node has read it back, and it is not what was unpacked; new pods get it anew. \
                    Delete this pod, so that its successor does"
                .to_owned();
        self.tell(Happening::new(pod, reference, Reason::Damaged, what));
    }

    fn tell(&self, happening: Happening) {
        if self.0.try_send(happening).is_err() {
            tracing::debug!("an event is not told: too many wait for the Kubernetes API");
        }
    }
}

impl Happening {
    fn new(pod: &PodReference, reference: &str, reason: Reason, detail: String) -> Self {
        let (pod, reference) = (pod.clone(), reference.to_owned());
        Self { pod, reference, reason, detail, took: Duration::ZERO, only_after_pulling: false }
    }
}

impl Reason {
    fn name(self) -> &'static str {
        match self {
            Self::Pulling => "Pulling",
            Self::Pulled => "Pulled",
            Self::Failed => "Failed",
            Self::Damaged => "Damaged",
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Self::Pulling | Self::Pulled => "Normal",
            Self::Failed | Self::Damaged => "Warning",
        }
    }
}
