//! Keeps references present on the node: one task for each fetches it, refreshes it at an interval and retries failures.
//!
//! A [`DesiredReference`] says how it is fetched, pinned and timed.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use oci::Digest;
use oci::backoff::{RetryBackoff, jittered};
use preload::api::Phase;
use pull::ProgressView;

/// A reference that a source wants on the node.
pub trait DesiredReference: Send + Sync + 'static {
    /// Identifies the reference within its source.
    type Key: Ord + Clone + Send + Sync;
    /// The most fetches at once. The node's own limits hold as well.
    const AT_ONCE: usize;

    /// Returns the key.
    fn key(&self) -> Self::Key;
    /// Returns whether it differs from an earlier one in a way that needs a new task.
    fn must_restart(&self, earlier: &Self, state: &ReferenceState) -> bool;
    /// Returns the times of its refreshes.
    fn schedule(&self) -> Schedule;
    /// Returns what is complete and pinned on the node, without a request to a registry.
    fn find(&self) -> impl Future<Output = RefreshOutcome> + Send;
    /// Fetches and pins what is missing.
    fn refresh(&self, attempt: &Attempt) -> impl Future<Output = RefreshOutcome> + Send;
    /// Logs the state after a refresh.
    fn log(&self, _state: &ReferenceState) {}
}

/// The times of a reference's refreshes.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// The delay of the first refresh of a reference that is not on the node.
    pub delay: Duration,
    /// The delay of the first refresh of a reference that is on the node.
    pub delay_if_present: Duration,
    /// The interval between two refreshes; `None` ends the task when the reference is on the node.
    pub interval: Option<Duration>,
    /// The pauses after failures.
    pub backoff: RetryBackoff,
    /// The number of retries in a row before the reference is only retried at [`Self::LONG_INTERVAL`].
    pub retries: u32,
}

/// The outcome of a refresh.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RefreshOutcome {
    /// The manifest, if it is complete on this node and pinned.
    pub manifest: Option<Digest>,
    /// The manifest that its tag resolves to now, if pods with `IfNotPresent` still get the other one.
    pub newer: Option<Digest>,
    /// The first failure.
    pub failure: Option<RefreshError>,
}

/// A failure of a refresh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefreshError {
    /// The reason, as one word.
    pub reason: &'static str,
    /// The message for users.
    pub message: String,
    /// Nothing was tried, as something is missing that does not come by itself. It does not count as a failure.
    pub is_waiting: bool,
}

/// The state of a reference.
#[derive(Clone, Debug)]
pub struct ReferenceState {
    /// The outcome of the last refresh.
    pub outcome: RefreshOutcome,
    /// The number of failures in a row.
    pub failures: u32,
    /// The progress of a running fetch.
    pub pulling: Option<ProgressView>,
    /// The time since which the reference is fetched.
    pub since: Timestamp,
    /// The time of the next refresh, or of the start of the running one.
    pub next: Option<Instant>,
}

/// Keeps the references of one source present.
pub struct Reconciler<T: DesiredReference> {
    tasks: Mutex<BTreeMap<T::Key, ReferenceTask<T>>>,
    shared: Arc<SharedState>,
}

struct ReferenceTask<T> {
    reference: Arc<T>,
    state: Arc<Mutex<ReferenceState>>,
    /// Stops it. A pull that it waits for may continue for other callers.
    _running: AbortOnDropHandle<()>,
}

struct SharedState {
    slots: Semaphore,
    failures: AtomicU64,
    changed: Notify,
}

/// A running refresh.
pub struct Attempt {
    /// The progress of its pull.
    pub view: ProgressView,
    state: Arc<Mutex<ReferenceState>>,
    shared: Arc<SharedState>,
}

impl<T: DesiredReference> Default for Reconciler<T> {
    fn default() -> Self {
        let slots = Semaphore::new(T::AT_ONCE);
        let shared = SharedState { slots, failures: AtomicU64::new(0), changed: Notify::new() };
        Self { tasks: Mutex::default(), shared: Arc::new(shared) }
    }
}

impl<T: DesiredReference> Reconciler<T> {
    /// Keeps these references from now on, and no others. Returns how many are new, and how many were stopped.
    pub async fn apply(&self, desired: impl IntoIterator<Item = T>) -> (usize, usize) {
        let desired: BTreeMap<_, _> = desired.into_iter().map(|one| (one.key(), one)).collect();
        let (mut new, mut stopped) = (0, 0);
        self.tasks().retain(|key, _| {
            let stays = desired.contains_key(key);
            stopped += usize::from(!stays);
            stays
        });
        for (key, reference) in desired {
            let mut next = None;
            if let Some(task) = self.tasks().get(&key) {
                let state = task.state.lock();
                if !reference.must_restart(&task.reference, &state) {
                    continue;
                }
                next = state.next;
            } else {
                new += 1;
            }
            self.tasks().remove(&key);
            let task = self.start(reference, next).await;
            self.tasks().insert(key, task);
            self.shared.changed.notify_one();
        }
        (new, stopped)
    }

    /// Starts a task whose first refresh is due at `next` at the latest.
    async fn start(&self, reference: T, next: Option<Instant>) -> ReferenceTask<T> {
        let (schedule, outcome) = (reference.schedule(), Box::pin(reference.find()).await);
        let is_present = outcome.manifest.is_some();
        let delay = if is_present { schedule.delay_if_present } else { schedule.delay };
        let due = Instant::now() + delay;
        let state = ReferenceState {
            outcome,
            failures: 0,
            pulling: None,
            since: now_in_seconds(),
            next: Some(next.map_or(due, |next| next.min(due))),
        };
        let (reference, state) = (Arc::new(reference), Arc::new(Mutex::new(state)));
        let running = run(Arc::clone(&reference), Arc::clone(&state), Arc::clone(&self.shared));
        let running = AbortOnDropHandle::new(tokio::spawn(running));
        ReferenceTask { reference, state, _running: running }
    }

    /// Returns all references and their states, ordered by key.
    pub fn states(&self) -> Vec<(Arc<T>, ReferenceState)> {
        self.tasks().values().map(ReferenceTask::snapshot).collect()
    }

    /// Returns one reference and its state.
    pub fn get(&self, key: &T::Key) -> Option<(Arc<T>, ReferenceState)> {
        self.tasks().get(key).map(ReferenceTask::snapshot)
    }

    /// Returns the number of failed refreshes since the start.
    pub fn failures(&self) -> u64 {
        self.shared.failures.load(Ordering::Relaxed)
    }

    /// Waits for a change of a state.
    pub async fn changed(&self) {
        self.shared.changed.notified().await;
    }

    fn tasks(&self) -> MutexGuard<'_, BTreeMap<T::Key, ReferenceTask<T>>> {
        self.tasks.lock()
    }
}

impl<T> ReferenceTask<T> {
    fn snapshot(&self) -> (Arc<T>, ReferenceState) {
        (Arc::clone(&self.reference), self.state.lock().clone())
    }
}

async fn run<T: DesiredReference>(
    reference: Arc<T>,
    state: Arc<Mutex<ReferenceState>>,
    shared: Arc<SharedState>,
) {
    let schedule = reference.schedule();
    loop {
        let Some(next) = state.lock().next else { return };
        tokio::time::sleep_until(next).await;
        let attempt = Attempt {
            view: ProgressView::default(),
            state: Arc::clone(&state),
            shared: Arc::clone(&shared),
        };
        let outcome = Box::pin(reference.refresh(&attempt)).await;
        shared.failures.fetch_add(outcome.failure.is_some().into(), Ordering::Relaxed);
        let now = {
            let mut state = state.lock();
            state.record(outcome, &schedule);
            state.clone()
        };
        reference.log(&now);
        shared.changed.notify_one();
    }
}

impl Attempt {
    /// Waits for the right to fetch, which the result holds, and shows that the pull begins.
    pub async fn begin(&self) -> Option<SemaphorePermit<'_>> {
        let slot = self.shared.slots.acquire().await.ok();
        self.change(|state| state.pulling = Some(self.view.clone()));
        slot
    }

    /// Shows that content which was present is missing.
    pub fn mark_missing(&self) {
        self.change(|state| {
            if state.outcome.manifest.take().is_some() {
                state.since = now_in_seconds();
            }
        });
    }

    /// Returns the newer manifest of the refresh before.
    pub fn newer(&self) -> Option<Digest> {
        self.state.lock().outcome.newer
    }

    fn change(&self, change: impl FnOnce(&mut ReferenceState)) {
        change(&mut self.state.lock());
        self.shared.changed.notify_one();
    }
}

impl ReferenceState {
    fn record(&mut self, outcome: RefreshOutcome, schedule: &Schedule) {
        self.failures = match &outcome.failure {
            None => 0,
            Some(failure) => self.failures.saturating_add((!failure.is_waiting).into()),
        };
        let is_over = outcome.manifest.is_some() && schedule.interval.is_none();
        self.next = (!is_over).then(|| Instant::now() + schedule.pause(self.failures));
        self.pulling = None;
        self.outcome = outcome;
    }

    /// Returns the phase. More than `retries` failures in a row count as failed.
    pub fn phase(&self, retries: u32) -> Phase {
        if self.outcome.manifest.is_some() {
            Phase::Ready
        } else if self.failures > retries {
            Phase::Failed
        } else if self.pulling.is_some() {
            Phase::Pulling
        } else {
            Phase::Waiting
        }
    }

    /// Returns the seconds until the next refresh; `None` during one.
    pub fn next_seconds(&self) -> Option<u64> {
        let next = self.next.filter(|_| self.pulling.is_none());
        next.map(|next| next.saturating_duration_since(Instant::now()).as_secs())
    }
}

impl Schedule {
    /// Returns pauses of which none is longer than an interval.
    pub fn backoff_within(backoff: RetryBackoff, interval: Duration) -> RetryBackoff {
        let RetryBackoff { first, longest } = backoff;
        RetryBackoff { first, longest: longest.min(interval.max(first)) }
    }

    /// The interval of a reference without one, and of one that has failed for good.
    pub const LONG_INTERVAL: Duration = Duration::from_mins(10);

    /// Returns the pause after this many failures in a row. The interval varies by a tenth, so that references and nodes
    /// that were refreshed together do not stay together.
    fn pause(&self, failures: u32) -> Duration {
        let interval = self.interval.unwrap_or(Self::LONG_INTERVAL);
        if failures == 0 || failures > self.retries {
            return interval.mul_f64(0.7) + jittered(interval.mul_f64(0.4));
        }
        jittered(self.backoff.after(failures))
    }
}

impl RefreshError {
    /// Returns a failure that is retried.
    pub fn new(reason: &'static str, message: &(impl fmt::Display + ?Sized)) -> Self {
        Self { reason, message: message.to_string(), is_waiting: false }
    }
}

/// Runs a part of a refresh that blocks.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RefreshError> + Send + 'static,
) -> Result<T, RefreshError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(RefreshError::new("Internal", &error)))
}

/// Returns the current time with the resolution that the API server keeps.
fn now_in_seconds() -> Timestamp {
    Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reference whose refresh takes a minute. It fails as often as `failures` says.
    struct Slow {
        name: &'static str,
        failures: u32,
        keeps: bool,
        delay: Duration,
    }

    impl Slow {
        fn kept(name: &'static str) -> Self {
            Self { name, failures: 0, keeps: true, delay: Duration::ZERO }
        }
    }

    impl DesiredReference for Slow {
        type Key = &'static str;
        const AT_ONCE: usize = 2;

        fn key(&self) -> &'static str {
            self.name
        }

        fn must_restart(&self, earlier: &Self, _: &ReferenceState) -> bool {
            self.failures != earlier.failures
        }

        fn schedule(&self) -> Schedule {
            Schedule {
                delay: self.delay,
                delay_if_present: self.delay,
                interval: self.keeps.then_some(Duration::from_hours(1)),
                backoff: RetryBackoff {
                    first: Duration::from_secs(5),
                    longest: Duration::from_mins(10),
                },
                retries: u32::MAX,
            }
        }

        async fn find(&self) -> RefreshOutcome {
            RefreshOutcome::default()
        }

        async fn refresh(&self, attempt: &Attempt) -> RefreshOutcome {
            let _slot = attempt.begin().await;
            tokio::time::sleep(Duration::from_mins(1)).await;
            if attempt.state.lock().failures < self.failures {
                let failure = Some(RefreshError::new("Down", "it is down"));
                return RefreshOutcome { failure, ..RefreshOutcome::default() };
            }
            let manifest = Some(Digest::of(self.name.as_bytes()));
            RefreshOutcome { manifest, ..RefreshOutcome::default() }
        }
    }

    fn phases(reconciler: &Reconciler<Slow>, retries: u32) -> Vec<Phase> {
        reconciler.states().iter().map(|(_, state)| state.phase(retries)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_few_references_are_fetched_at_once_and_what_is_not_wanted_stops() {
        let reconciler = Reconciler::default();
        assert_eq!(reconciler.apply(["a", "b", "c"].map(Slow::kept)).await, (3, 0));
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert_eq!(phases(&reconciler, 0), [Phase::Pulling, Phase::Pulling, Phase::Waiting]);
        assert_eq!(reconciler.apply(["b", "c"].map(Slow::kept)).await, (0, 1));
        assert!(reconciler.get(&"a").is_none());
        tokio::time::sleep(Duration::from_secs(31)).await;
        assert_eq!(phases(&reconciler, 0), [Phase::Ready, Phase::Pulling], "one freed a place");
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_retried_and_counted_until_a_success() {
        let reconciler = Reconciler::default();
        let failing = Slow { failures: 3, keeps: false, ..Slow::kept("a") };
        reconciler.apply([failing]).await;
        tokio::time::sleep(Duration::from_secs(61)).await;
        assert_eq!((phases(&reconciler, 0), phases(&reconciler, 1)), {
            (vec![Phase::Failed], vec![Phase::Waiting])
        });
        assert!(
            (1..=4).contains(&reconciler.get(&"a").expect("it").1.next_seconds().expect("a time"))
        );
        tokio::time::sleep(Duration::from_mins(5)).await;
        let (_, state) = reconciler.get(&"a").expect("it");
        assert_eq!((state.phase(0), state.failures, state.next), (Phase::Ready, 0, None));
        assert_eq!(reconciler.failures(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_reference_is_restarted_without_waiting_longer() {
        let reconciler = Reconciler::default();
        reconciler.apply([Slow::kept("a")]).await;
        tokio::time::sleep(Duration::from_secs(61)).await;
        assert_eq!(reconciler.apply([Slow::kept("a")]).await, (0, 0));
        assert_eq!(phases(&reconciler, 0), [Phase::Ready], "nothing changed");
        let later = Duration::from_hours(2);
        let changed = Slow { failures: 1, delay: later, ..Slow::kept("a") };
        assert_eq!(reconciler.apply([changed]).await, (0, 0));
        assert_eq!(phases(&reconciler, 0), [Phase::Waiting], "it begins again");
        let (_, state) = reconciler.get(&"a").expect("it");
        assert!(
            state.next_seconds().expect("a time") < later.as_secs() - 2000,
            "the old time stays"
        );
    }

    #[test]
    fn intervals_vary_and_pauses_grow_to_a_bound() {
        let schedule = |interval, retries| Schedule {
            interval: Some(interval),
            retries,
            ..Slow::kept("a").schedule()
        };
        let hour = Duration::from_hours(1);
        for _ in 0..100 {
            let interval = schedule(hour, u32::MAX).pause(0);
            assert!((Duration::from_mins(54)..=Duration::from_mins(66)).contains(&interval));
        }
        let pause = |failures| schedule(hour, u32::MAX).pause(failures);
        assert!((Duration::from_millis(2500)..=Duration::from_secs(5)).contains(&pause(1)));
        assert!((Duration::from_secs(10)..=Duration::from_secs(20)).contains(&pause(3)));
        assert!((Duration::from_mins(5)..=Duration::from_mins(10)).contains(&pause(1000)));
        let second = Duration::from_secs(1);
        let short = Schedule::backoff_within(schedule(second, u32::MAX).backoff, second);
        let short = Schedule { backoff: short, ..schedule(second, u32::MAX) };
        assert!(short.pause(1000) <= Duration::from_secs(5));
        assert!(schedule(hour, 2).pause(3) >= Duration::from_mins(54), "it has failed for good");
    }
}
