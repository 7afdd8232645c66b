//! The state of each reference of the list, for the status and metrics.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use oci::Digest;
use pull::ProgressView;
use pull::pull_progress::Snapshot;

/// The states of all references. Cheap to clone; clones share them.
#[derive(Clone, Debug, Default)]
pub struct WarmStates(Arc<WarmStatesInner>);

#[derive(Debug, Default)]
struct WarmStatesInner {
    by_reference: Mutex<BTreeMap<String, WarmEntry>>,
    failures: AtomicU64,
}

/// The phase of a reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WarmPhase {
    /// Its first refresh is not due yet.
    Waiting,
    /// Its content is being fetched.
    Pulling,
    /// Its content is on the node and pinned.
    Present,
    /// The refresh failed and will be retried.
    Failed,
}

impl WarmPhase {
    /// All phases, in the order of the metric's labels.
    pub const ALL: [Self; 4] = [Self::Waiting, Self::Pulling, Self::Present, Self::Failed];

    /// Returns the name for metrics and the status.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Pulling => "pulling",
            Self::Present => "present",
            Self::Failed => "failed",
        }
    }
}

/// A snapshot of one reference's state.
#[derive(Clone, Debug)]
pub struct WarmState {
    /// The reference, as the list has it.
    pub reference: String,
    /// The phase of its refresh.
    pub phase: WarmPhase,
    /// The pinned manifest.
    pub manifest: Option<Digest>,
    /// The manifest that its tag resolves to now, if pods with `IfNotPresent` still get the other one.
    pub newer: Option<Digest>,
    /// The failure of the last refresh, also if content is on the node.
    pub reason: String,
    /// The progress of a pull.
    pub progress: Option<Snapshot>,
    /// Seconds until the next refresh; `None` during one.
    pub next_seconds: Option<u64>,
}

/// The state of a reference, kept by the list.
#[derive(Clone, Debug, Default)]
pub(super) struct WarmEntry {
    pub(super) manifest: Option<Digest>,
    pub(super) newer: Option<Digest>,
    pub(super) reason: Option<String>,
    /// Set while a refresh runs.
    pub(super) pulling: Option<ProgressView>,
    pub(super) next: Option<Instant>,
}

impl WarmStates {
    /// Returns the states of all references, ordered by name.
    #[must_use]
    pub fn list(&self) -> Vec<WarmState> {
        let by_reference = self.lock();
        by_reference.iter().map(|(reference, shown)| shown.state(reference)).collect()
    }

    /// Returns the state of a reference.
    #[must_use]
    pub fn get(&self, reference: &str) -> Option<WarmState> {
        self.lock().get(reference).map(|shown| shown.state(reference))
    }

    /// Returns the number of failed refreshes since the start.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.0.failures.load(Ordering::Relaxed)
    }

    pub(super) fn change(&self, reference: &str, change: impl FnOnce(&mut WarmEntry)) {
        change(self.lock().entry(reference.to_owned()).or_default());
    }

    pub(super) fn failed(&self) {
        self.0.failures.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn forget(&self, reference: &str) {
        self.lock().remove(reference);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, WarmEntry>> {
        self.0.by_reference.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WarmEntry {
    fn state(&self, reference: &str) -> WarmState {
        let progress = self.pulling.as_ref().map(ProgressView::snapshot);
        // Content on the node counts as present also during a refresh. A failure counts until bytes arrive.
        let phase = match (self.manifest, &progress, &self.reason) {
            (Some(_), _, _) => WarmPhase::Present,
            (None, Some(Snapshot { total: 0, .. }) | None, Some(_)) => WarmPhase::Failed,
            (None, Some(_), _) => WarmPhase::Pulling,
            (None, None, None) => WarmPhase::Waiting,
        };
        let next = self.next.filter(|_| self.pulling.is_none());
        WarmState {
            reference: reference.to_owned(),
            phase,
            manifest: self.manifest,
            newer: self.newer,
            reason: self.reason.clone().unwrap_or_default(),
            progress,
            next_seconds: next.map(|next| next.saturating_duration_since(Instant::now()).as_secs()),
        }
    }
}
