//! How each reference of the list is, for people and metrics.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use oci::Digest;
use pull::ProgressView;
use pull::progress::Snapshot;

/// All of them. Cheap to clone; clones show the same.
#[derive(Clone, Debug, Default)]
pub struct WarmStates(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    by_reference: Mutex<BTreeMap<String, Shown>>,
    failures: AtomicU64,
}

/// Where a reference is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Its time has not come.
    Waiting,
    /// It is being fetched.
    Pulling,
    /// It is here and pinned.
    Present,
    /// It is not here; it is tried again.
    Failed,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Waiting, Self::Pulling, Self::Present, Self::Failed];

    /// For metrics and people.
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

/// How one reference is at one moment.
#[derive(Clone, Debug)]
pub struct WarmState {
    /// The reference.
    pub reference: String,
    /// Where it is on its way.
    pub phase: Phase,
    /// What is pinned for it.
    pub manifest: Option<Digest>,
    /// What its tag means by now, where pods with `IfNotPresent` still get the other one.
    pub newer: Option<Digest>,
    /// Why the last try failed, also where something is here.
    pub reason: String,
    /// How far a pull is.
    pub progress: Option<Snapshot>,
    /// Seconds until it is looked after again; none while it is.
    pub next_seconds: Option<u64>,
}

/// What the list knows of a reference.
#[derive(Clone, Debug, Default)]
pub(super) struct Shown {
    pub(super) manifest: Option<Digest>,
    pub(super) newer: Option<Digest>,
    pub(super) reason: Option<String>,
    /// While a try is under way.
    pub(super) pulling: Option<ProgressView>,
    pub(super) next: Option<Instant>,
}

impl WarmStates {
    /// How all of them are, in the order of their names.
    #[must_use]
    pub fn list(&self) -> Vec<WarmState> {
        let by_reference = self.lock();
        by_reference.iter().map(|(reference, shown)| shown.state(reference)).collect()
    }

    /// How one of them is.
    #[must_use]
    pub fn get(&self, reference: &str) -> Option<WarmState> {
        self.lock().get(reference).map(|shown| shown.state(reference))
    }

    /// Tries that have failed since the start.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.0.failures.load(Ordering::Relaxed)
    }

    pub(super) fn change(&self, reference: &str, change: impl FnOnce(&mut Shown)) {
        change(self.lock().entry(reference.to_owned()).or_default());
    }

    pub(super) fn failed(&self) {
        self.0.failures.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn forget(&self, reference: &str) {
        self.lock().remove(reference);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Shown>> {
        self.0.by_reference.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shown {
    fn state(&self, reference: &str) -> WarmState {
        let progress = self.pulling.as_ref().map(ProgressView::snapshot);
        // What is looked after while it is here is here, and what failed has failed until bytes come.
        let phase = match (self.manifest, &progress, &self.reason) {
            (Some(_), _, _) => Phase::Present,
            (None, Some(Snapshot { total: 0, .. }) | None, Some(_)) => Phase::Failed,
            (None, Some(_), _) => Phase::Pulling,
            (None, None, None) => Phase::Waiting,
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
