//! One piece of work at a time, however many wait for it.
//!
//! A flight belongs to the node: it runs in a task of its own, and callers only
//! wait. When the last of them has lost interest it goes on for a while, since
//! the kubelet comes back, and is then stopped.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::artifact_request::Priority;
use super::error::PullError;
use super::pull_progress::Progress;
use super::pull_tenant::Caller;
use sys::background::Background;

/// The result of a flight. All callers share a failure.
pub type Outcome<T> = Result<T, Arc<PullError>>;

/// The environment in which all flights run.
#[derive(Clone)]
pub struct Runway {
    /// Waits for them at the node's end.
    pub tracker: TaskTracker,
    /// Stops them all.
    pub shutdown: CancellationToken,
    /// The threads for flights that warming began.
    pub background: Background,
}

/// All flights of one kind.
pub struct Flights<K, T> {
    under_way: Arc<Mutex<HashMap<K, Arc<Flight<T>>>>>,
    runway: Runway,
    /// The time that a flight continues without a caller.
    linger: Duration,
}

struct Flight<T> {
    outcome: watch::Sender<Option<Outcome<T>>>,
    progress: Arc<Progress>,
    /// The number of callers.
    interest: watch::Sender<usize>,
}

/// A caller's interest in a flight. Dropping it withdraws the interest.
pub struct Ticket<T> {
    flight: Arc<Flight<T>>,
    outcome: watch::Receiver<Option<Outcome<T>>>,
    caller: Caller,
}

impl<K, T> Flights<K, T>
where
    K: Clone + Eq + Hash + Send + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// No flights yet.
    pub fn new(runway: Runway, linger: Duration) -> Self {
        Self { under_way: Arc::default(), runway, linger }
    }

    /// Returns the progress of all flights.
    pub fn under_way(&self) -> Vec<Arc<Progress>> {
        let under_way = self.under_way.lock();
        under_way.values().map(|flight| Arc::clone(&flight.progress)).collect()
    }

    /// Joins the flight of this key, or starts it. The flight gets the priority of the caller if that
    /// is higher, and the caller's tenants.
    pub fn join<F>(
        &self,
        key: K,
        caller: Caller,
        start: impl FnOnce(Arc<Progress>) -> F,
    ) -> Ticket<T>
    where
        F: Future<Output = Result<T, PullError>> + Send + 'static,
    {
        let mut under_way = self.under_way.lock();
        if let Some(flight) = under_way.get(&key) {
            return Ticket::new(Arc::clone(flight), caller);
        }
        // What the background begins works there, however urgent it is: then it hurries by itself.
        let place = if Background::is_here() { Priority::Warm } else { caller.priority };
        let progress = Arc::new(Progress::of(place, self.runway.background.clone()));
        let flight = Arc::new(Flight {
            outcome: watch::Sender::new(None),
            progress: Arc::clone(&progress),
            interest: watch::Sender::new(0),
        });
        under_way.insert(key.clone(), Arc::clone(&flight));
        let ticket = Ticket::new(Arc::clone(&flight), caller);
        let work = start(progress);
        let Runway { tracker, shutdown, background } = &self.runway;
        let (map, shutdown, linger) = (Arc::clone(&self.under_way), shutdown.clone(), self.linger);
        // Dropping the entry in a guard: a flight that panics must not stay in the map for ever.
        let landing = Landing { map, key, flight: Arc::clone(&flight) };
        let task = async move {
            let outcome = tokio::select! {
                outcome = work => outcome,
                () = unwanted(&landing.flight, linger) => Err(PullError::Unwanted),
                () = shutdown.cancelled() => Err(PullError::ShuttingDown),
            };
            landing.land(outcome.map_err(Arc::new));
        };
        match place {
            Priority::Pod => tracker.spawn(task),
            Priority::Warm => background.spawn(tracker, task),
        };
        ticket
    }

    /// Joins the flight of this key, or starts it, and waits for its end. A flight that was under way
    /// before may fail with its own source: then another one follows, whose source may not.
    /// `joined` is given the progress of each.
    pub async fn run<F>(
        &self,
        key: K,
        caller: Caller,
        joined: impl Fn(&Arc<Progress>),
        start: impl Fn(Arc<Progress>) -> F,
    ) -> Outcome<T>
    where
        F: Future<Output = Result<T, PullError>> + Send + 'static,
    {
        loop {
            let mut is_started = false;
            let mut ticket = self.join(key.clone(), caller.clone(), |progress| {
                is_started = true;
                start(progress)
            });
            joined(ticket.progress());
            match ticket.outcome().await {
                Err(error) if !is_started && error.is_of_source() => {}
                outcome => return outcome,
            }
        }
    }
}

/// Returns when there has been no caller for the time of `linger`.
async fn unwanted<T>(flight: &Flight<T>, linger: Duration) {
    let mut interest = flight.interest.subscribe();
    loop {
        // The sender lives in the flight, so these cannot fail while it is borrowed.
        let _ = interest.wait_for(|&count| count == 0).await;
        let back = interest.wait_for(|&count| count > 0);
        if tokio::time::timeout(linger, back).await.is_err() {
            return;
        }
    }
}

struct Landing<K: Eq + Hash, T> {
    map: Arc<Mutex<HashMap<K, Arc<Flight<T>>>>>,
    key: K,
    flight: Arc<Flight<T>>,
}

impl<K: Eq + Hash, T> Landing<K, T> {
    fn land(self, outcome: Outcome<T>) {
        // Later callers find no flight, and callers that joined find its outcome.
        let mut map = self.map.lock();
        map.remove(&self.key);
        self.flight.progress.landed();
        self.flight.outcome.send_replace(Some(outcome));
    }
}

impl<K: Eq + Hash, T> Drop for Landing<K, T> {
    fn drop(&mut self) {
        let mut map = self.map.lock();
        if map.get(&self.key).is_some_and(|flight| Arc::ptr_eq(flight, &self.flight)) {
            map.remove(&self.key);
            self.flight.progress.landed();
            self.flight.outcome.send_replace(Some(Err(Arc::new(PullError::Crashed))));
        }
    }
}

impl<T: Clone> Ticket<T> {
    fn new(flight: Arc<Flight<T>>, caller: Caller) -> Self {
        flight.progress.enter(&caller);
        flight.interest.send_modify(|count| *count += 1);
        let outcome = flight.outcome.subscribe();
        Self { flight, outcome, caller }
    }

    /// Waits for the end. Safe to cancel: the flight goes on.
    pub async fn outcome(&mut self) -> Outcome<T> {
        match self.outcome.wait_for(Option::is_some).await {
            Ok(outcome) => match outcome.as_ref() {
                Some(outcome) => outcome.clone(),
                None => Err(Arc::new(PullError::Crashed)),
            },
            Err(_) => Err(Arc::new(PullError::Crashed)),
        }
    }

    /// Returns the progress of the flight.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.flight.progress
    }
}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        self.flight.progress.leave(&self.caller);
        self.flight.interest.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tenant;

    fn pod() -> Caller {
        Caller::new(Priority::Pod, Tenant::Namespace("team".into()))
    }

    fn flights(linger: u64) -> Flights<u8, u32> {
        let linger = Duration::from_secs(linger);
        let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
        Flights::new(Runway { tracker, shutdown, background: Background::none() }, linger)
    }

    #[tokio::test]
    async fn many_wait_for_one() {
        let flights = flights(60);
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let mut first = flights.join(1, pod(), |_| async move {
            let _ = wait.await;
            Ok(7)
        });
        let mut second = flights.join(1, pod(), |_| async { Ok(8) });
        go.send(()).expect("a flight");
        assert_eq!(first.outcome().await.expect("landed"), 7);
        assert_eq!(second.outcome().await.expect("landed"), 7);
        assert!(flights.under_way.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_flight_without_waiters_ends_after_a_while() {
        let flights = flights(60);
        let first = flights.join(1, pod(), |_| std::future::pending());
        tokio::task::yield_now().await;
        drop(first);
        tokio::time::sleep(Duration::from_secs(59)).await;
        let mut back = flights.join(1, pod(), |_| async { Ok(8) });
        let still = tokio::time::timeout(Duration::from_mins(5), back.outcome()).await;
        assert!(still.is_err(), "a flight that somebody waits for goes on");
        drop(back);
        tokio::time::sleep(Duration::from_secs(61)).await;
        assert!(flights.under_way.lock().is_empty());
    }

    #[tokio::test]
    async fn a_panic_is_an_outcome() {
        let flights = flights(60);
        let mut ticket = flights.join(1, pod(), |_| async { panic!("a bug") });
        assert!(matches!(*ticket.outcome().await.expect_err("crashed"), PullError::Crashed));
        let mut next = flights.join(1, pod(), |_| async { Ok(8) });
        assert_eq!(next.outcome().await.expect("a new flight"), 8);
    }
}
