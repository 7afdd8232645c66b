//! The progress of a pull, which users see in `kubectl describe pod` while they wait.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::time::Instant;

use super::artifact_request::Priority;
use super::memory::MemoryWait;
use super::pull_tenant::{Caller, Tenant, WaitingTenants};
use sys::background::{Background, BoostGuard};
use text::human_units::Bytes;

/// Bytes of a flight, counted as they arrive: its own, and those of the flights that it waits for.
#[derive(Debug)]
pub struct Progress {
    started: Instant,
    total: AtomicU64,
    done: AtomicU64,
    /// Bytes that were here when the flight began: they say nothing of its rate.
    resumed: AtomicU64,
    /// The parts by the layer's number. Several trees may wait for one part.
    parts: Mutex<HashMap<usize, Arc<Progress>>>,
    /// The urgency of the flight, and its threads.
    pace: Mutex<FlightUrgency>,
    tenants: Mutex<WaitingTenants>,
    /// Notified when its priority or its tenants change.
    changed: Notify,
    /// The name for messages.
    name: OnceLock<String>,
    /// Set if its bytes are read back from the disk, and not fetched.
    reads_back: AtomicBool,
    /// Bytes from an earlier try are being hashed, before which none can be fetched.
    is_hashing: AtomicBool,
    /// The failure of its last try, unless bytes have come since.
    failure: Mutex<Option<Arc<str>>>,
    /// There may be a failure. Saves taking its lock for each chunk.
    has_failed: AtomicBool,
    /// The state of its request for memory while that waits.
    memory: Mutex<Option<MemoryWait>>,
}

/// The urgency of a flight, and the threads on which it runs.
#[derive(Debug)]
enum FlightUrgency {
    /// Without a caller that waits: the flight runs on background threads.
    Behind(Background),
    /// Began without a caller, and a pod waits for it now.
    Hurrying { _until_dropped: BoostGuard },
    /// A pod waits, or has waited.
    Urgent,
}

/// Progress at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Bytes to fetch; 0 while the manifest is not known.
    pub total: u64,
    /// The number of fetched bytes.
    pub done: u64,
    /// Bytes a second since the flight began.
    pub rate: u64,
    /// At that rate; none while it is unknown.
    pub left: Option<Duration>,
    /// Set if the bytes are read back from the node's disk, and not fetched.
    pub reads_back: bool,
    /// The failure of the last try, while the next one is waited for.
    pub failure: Option<Arc<str>>,
    /// The state of its request for memory while that waits.
    pub memory: Option<MemoryWait>,
}

impl Default for Progress {
    /// Returns the progress of work that does not run in the background.
    fn default() -> Self {
        Self::of(Priority::Warm, Background::none())
    }
}

impl Progress {
    /// Returns the progress of a flight that begins with this priority. Unless a pod waits, it runs in the background.
    pub fn of(priority: Priority, background: Background) -> Self {
        let pace = match priority {
            Priority::Pod => FlightUrgency::Urgent,
            Priority::Warm => FlightUrgency::Behind(background),
        };
        Self {
            started: Instant::now(),
            total: AtomicU64::new(0),
            done: AtomicU64::new(0),
            resumed: AtomicU64::new(0),
            parts: Mutex::default(),
            pace: Mutex::new(pace),
            tenants: Mutex::default(),
            changed: Notify::new(),
            name: OnceLock::new(),
            reads_back: AtomicBool::new(false),
            is_hashing: AtomicBool::new(false),
            failure: Mutex::default(),
            has_failed: AtomicBool::new(false),
            memory: Mutex::default(),
        }
    }

    /// More is to be fetched.
    pub fn expect(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes have arrived.
    pub fn arrived(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        if self.has_failed.swap(false, Ordering::Relaxed) {
            *self.failure.lock() = None;
        }
    }

    /// Records the failure of a try that is followed by another one.
    pub fn failed(&self, error: &dyn fmt::Display) {
        *self.failure.lock() = Some(error.to_string().into());
        self.has_failed.store(true, Ordering::Relaxed);
    }

    /// Returns the failure of the last try, its own or of a flight that it waits for.
    fn last_failure(&self) -> Option<Arc<str>> {
        let own = self.failure.lock().clone();
        own.or_else(|| self.parts.lock().values().find_map(|part| part.last_failure()))
    }

    /// Records whether bytes from an earlier try are being hashed.
    pub(super) fn hashes(&self, is_hashing: bool) {
        self.is_hashing.store(is_hashing, Ordering::Relaxed);
    }

    /// Returns whether bytes from an earlier try are being hashed, before which none can be fetched.
    pub(super) fn is_hashing(&self) -> bool {
        self.is_hashing.load(Ordering::Relaxed)
    }

    /// Returns the bytes that this flight itself has fetched.
    pub(super) fn fetched(&self) -> u64 {
        let done = self.done.load(Ordering::Relaxed);
        done.saturating_sub(self.resumed.load(Ordering::Relaxed))
    }

    /// Returns the bytes of this flight itself that are on the disk, and those that are missing.
    pub(super) fn here_and_missing(&self) -> (u64, u64) {
        let done = self.done.load(Ordering::Relaxed);
        (done, self.total.load(Ordering::Relaxed).saturating_sub(done))
    }

    /// Bytes were there from an earlier try.
    pub fn resumed(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        self.resumed.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes turned out to be worth nothing.
    pub fn lost(&self, bytes: u64) {
        let less = |done: u64| Some(done.saturating_sub(bytes));
        let _ = self.done.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        let _ = self.resumed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Says what it is, once.
    pub fn name(&self, name: String) {
        // A second name would be the same.
        let _ = self.name.set(name);
    }

    /// Says that its bytes are on the node already, and are read back.
    pub fn reads_back(&self) {
        self.reads_back.store(true, Ordering::Relaxed);
    }

    /// Records the state of a request for memory, or that none waits any more.
    pub(super) fn waits_for_memory(&self, wait: Option<MemoryWait>) {
        *self.memory.lock() = wait;
    }

    /// Returns the state of a request for memory, its own or of a flight that it waits for.
    fn memory_wait(&self) -> Option<MemoryWait> {
        let own = *self.memory.lock();
        own.or_else(|| self.parts.lock().values().find_map(|part| part.memory_wait()))
    }

    /// Returns the name for messages.
    pub fn named(&self) -> Option<&str> {
        self.name.get().map(String::as_str)
    }

    /// It waits for this flight, whose bytes count from now on.
    pub fn wait_for(&self, number: usize, part: &Arc<Self>) {
        part.raise(self.priority());
        self.parts.lock().insert(number, Arc::clone(part));
        // Another caller may have joined since its priority was read.
        part.raise(self.priority());
        self.tenants().iter().for_each(|tenant| part.enter_parts(tenant));
    }

    /// Returns the priority and the tenants of the callers that wait for it.
    pub fn caller(&self) -> Caller {
        Caller { priority: self.priority(), tenants: self.tenants() }
    }

    /// Returns the tenants that wait for it, or the one that waited last.
    pub fn tenants(&self) -> Vec<Tenant> {
        self.tenants.lock().all()
    }

    /// Returns the tenant that memory is charged to: the first one that waits.
    pub(super) fn tenant(&self) -> Tenant {
        self.tenants().into_iter().next().unwrap_or(Tenant::Config)
    }

    /// Adds the tenants of a caller to this flight and to all flights that it waits for.
    pub(super) fn enter(&self, caller: &Caller) {
        for tenant in &caller.tenants {
            self.tenants.lock().enter(tenant);
            self.parts.lock().values().for_each(|part| part.enter_parts(tenant));
        }
        self.changed.notify_waiters();
        self.raise(caller.priority);
    }

    /// Removes the tenants of a caller. Flights that this one waits for keep them until they end.
    pub(super) fn leave(&self, caller: &Caller) {
        caller.tenants.iter().for_each(|tenant| self.tenants.lock().leave(tenant));
    }

    /// Adds a tenant that waits through another flight.
    fn enter_parts(&self, tenant: &Tenant) {
        if !self.tenants().contains(tenant) {
            self.tenants.lock().enter(tenant);
            self.changed.notify_waiters();
            self.parts.lock().values().for_each(|part| part.enter_parts(tenant));
        }
    }

    /// Returns the urgency: that of the most urgent caller.
    pub fn priority(&self) -> Priority {
        match *self.pace.lock() {
            FlightUrgency::Behind(_) => Priority::Warm,
            FlightUrgency::Hurrying { .. } | FlightUrgency::Urgent => Priority::Pod,
        }
    }

    /// One who waits for it is so urgent, and so is all that it waits for.
    pub fn raise(&self, priority: Priority) {
        if priority == Priority::Warm {
            return;
        }
        let mut pace = self.pace.lock();
        if let FlightUrgency::Behind(background) = &*pace {
            *pace = FlightUrgency::Hurrying { _until_dropped: background.boost() };
            drop(pace);
            self.changed.notify_waiters();
            self.parts.lock().values().for_each(|part| part.raise(priority));
        }
    }

    /// Ends when its priority or its tenants change after this call.
    pub(super) fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }

    /// Ends the boost after the end of the flight.
    pub fn landed(&self) {
        // Who still holds it must not keep others hurrying.
        *self.pace.lock() = FlightUrgency::Urgent;
    }

    /// Bytes that are here, and those of them that were here before.
    fn bytes(&self) -> (u64, u64) {
        let own = (self.done.load(Ordering::Relaxed), self.resumed.load(Ordering::Relaxed));
        self.parts.lock().values().fold(own, |(done, resumed), part| {
            let (more, before) = part.bytes();
            (done + more, resumed + before)
        })
    }

    /// Returns a snapshot of the progress.
    pub fn snapshot(&self) -> Snapshot {
        let total = self.total.load(Ordering::Relaxed);
        let (done, resumed) = self.bytes();
        let done = done.min(total);
        let fetched = done.saturating_sub(resumed);
        let milliseconds = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let rate = fetched.saturating_mul(1000) / milliseconds.max(1);
        let left = (rate > 0).then(|| Duration::from_secs((total - done).div_ceil(rate)));
        let reads_back = self.reads_back.load(Ordering::Relaxed);
        let (failure, memory) = (self.last_failure(), self.memory_wait());
        Snapshot { total, done, rate, left, reads_back, failure, memory }
    }
}

impl Snapshot {
    /// Returns the progress of this and of another flight together.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        let (total, done) = (self.total + other.total, self.done + other.done);
        let rate = self.rate + other.rate;
        let left = (rate > 0).then(|| Duration::from_secs((total - done).div_ceil(rate)));
        let reads_back = (self.total == 0 || self.reads_back) && other.reads_back;
        let (failure, memory) = (self.failure.or(other.failure), self.memory.or(other.memory));
        Self { total, done, rate, left, reads_back, failure, memory }
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { total, done, rate, left, reads_back, ref failure, memory } = *self;
        if let Some(memory) = memory {
            return write!(formatter, "{memory}");
        }
        if reads_back {
            write!(formatter, "reading cached content back, ")?;
        }
        if reads_back && (total == 0 || done == total) {
            return write!(formatter, "comparing {}", Bytes(total));
        }
        if total == 0 {
            return write!(formatter, "asking the registry");
        }
        if done == total {
            return write!(formatter, "100% of {} fetched, unpacking", Bytes(total));
        }
        let percent = done.saturating_mul(100) / total;
        write!(formatter, "{percent}% ({} of {}), {}/s", Bytes(done), Bytes(total), Bytes(rate))?;
        match left {
            Some(left) => write!(formatter, ", {} left", Left(left))?,
            None => write!(formatter, ", time left unknown")?,
        }
        match failure {
            Some(failure) => write!(formatter, "; the last try failed: {failure}"),
            None => Ok(()),
        }
    }
}

struct Left(Duration);

impl fmt::Display for Left {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_secs() {
            seconds @ 0..120 => write!(formatter, "{seconds} s"),
            seconds @ 120..7200 => write!(formatter, "{} min", seconds / 60),
            seconds => write!(formatter, "{} h", seconds / 3600),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn says_bytes_rate_and_time_left() {
        let progress = Progress::default();
        assert_eq!(progress.snapshot().to_string(), "asking the registry");
        progress.expect(3 << 30);
        progress.resumed(1 << 30);
        tokio::time::advance(Duration::from_secs(10)).await;
        progress.arrived(1 << 29);
        let text = progress.snapshot().to_string();
        // The paused clock rounds up to a millisecond.
        assert!(text.starts_with("50% (1.5 GiB of 3.0 GiB), 51."), "{text}");
        assert!(
            text.ends_with(" MiB/s, 31 s left") || text.ends_with(" MiB/s, 30 s left"),
            "{text}"
        );
        progress.lost(3 << 29);
        assert!(progress.snapshot().to_string().contains("time left unknown"));
        let tree = Progress::default();
        tree.expect(3 << 30);
        tree.wait_for(0, &Arc::new(Progress::default()));
        let progress = Arc::new(progress);
        tree.wait_for(1, &progress);
        progress.failed(&"r.io answered 500");
        let text = tree.snapshot().to_string();
        assert!(text.ends_with("; the last try failed: r.io answered 500"), "{text}");
        progress.arrived(3 << 30);
        assert_eq!(tree.snapshot().failure, None, "it is over");
        assert_eq!(progress.snapshot().to_string(), "100% of 3.0 GiB fetched, unpacking");
        progress.reads_back();
        let text = progress.snapshot().to_string();
        assert_eq!(text, "reading cached content back, comparing 3.0 GiB");
    }
}
