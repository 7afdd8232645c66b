//! Work that no pod waits for, on threads of its own.
//!
//! Pods share the processor, the caches, the journal of the filesystem and the disk's queue with it.
//! So it pauses [between its steps](yield_to_pods) while pods start, and alternates with them when
//! that goes on for long ([`pause_schedule`]).
//!
//! A pod that comes to wait for background work [boosts](Background::boost) it: until the boost
//! ends, no thread pauses.

mod pause_schedule;

use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use pause_schedule::PauseSchedule;

/// The longest pause of [`throttle`]: one step on a disk that hardly answers must not be followed by
/// silence.
const LONGEST_THROTTLE: Duration = Duration::from_secs(5);

thread_local! {
    static CURRENT: RefCell<Option<Arc<BackgroundThreads>>> = const { RefCell::new(None) };
}

/// The threads for background work, or none. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Background(Option<Arc<BackgroundRuntime>>);

/// Background work does not pause until this is dropped.
#[derive(Debug)]
pub struct BoostGuard(Option<Arc<BackgroundRuntime>>);

#[derive(Debug)]
struct BackgroundRuntime {
    handle: Handle,
    /// Taken when the runtime shuts down.
    runtime: Option<Runtime>,
    threads: Arc<BackgroundThreads>,
}

/// A pod starts; dropping this ends its start.
pub struct PodStartGuard(Option<Arc<BackgroundThreads>>);

#[derive(Debug, Default)]
struct BackgroundThreads {
    state: Mutex<ThreadsState>,
    /// True if a step may have to pause. Lets the other steps do without the lock.
    may_pause: AtomicBool,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct ThreadsState {
    boosts: usize,
    schedule: PauseSchedule,
    /// Threads that pause now.
    pausing: usize,
}

/// Ends a step of the calling thread. A background thread pauses here while pods start.
pub fn yield_to_pods() {
    CURRENT.with_borrow(|current| {
        if let Some(threads) = current {
            threads.yield_to_pods();
        }
    });
}

/// Leaves the disk to other work after a step that took `worked`: a background thread sleeps for
/// three times as long, unless it is boosted.
pub fn throttle(worked: Duration) {
    CURRENT.with_borrow(|current| {
        if let Some(threads) = current {
            threads.throttle((worked * 3).min(LONGEST_THROTTLE));
        }
    });
}

/// Makes the calling thread work for another thread, whose [`current`] is passed.
pub fn inherit(current: Option<BackgroundContext>) {
    CURRENT.set(current.map(|current| current.0));
}

/// Returns the context that a thread started by this one has to [`inherit`].
pub fn current() -> Option<BackgroundContext> {
    CURRENT.with_borrow(|current| current.clone().map(BackgroundContext))
}

/// The background that a thread works in.
pub struct BackgroundContext(Arc<BackgroundThreads>);

impl Background {
    /// Starts the background's threads.
    ///
    /// # Errors
    ///
    /// The kernel's, when it refuses another thread.
    pub fn start() -> io::Result<Self> {
        let threads = Arc::new(BackgroundThreads::default());
        let started = Arc::clone(&threads);
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("background")
            .on_thread_start(move || CURRENT.set(Some(Arc::clone(&started))))
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        Ok(Self(Some(Arc::new(BackgroundRuntime { handle, runtime: Some(runtime), threads }))))
    }

    /// Returns a background without threads: its work runs as all other work does.
    pub fn none() -> Self {
        Self(None)
    }

    /// Returns whether the calling thread works in the background.
    pub fn is_here() -> bool {
        CURRENT.with_borrow(Option::is_some)
    }

    /// Spawns a task in the background, with all tasks and blocking work that it starts itself.
    pub fn spawn<F>(&self, tracker: &TaskTracker, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        match &self.0 {
            Some(runtime) => tracker.spawn_on(task, &runtime.handle),
            None => tracker.spawn(task),
        }
    }

    /// Announces that a pod starts. The background pauses until the guard is dropped, except for its
    /// own turns of [`pause_schedule`].
    #[must_use]
    pub fn begin_pod_start(&self) -> PodStartGuard {
        PodStartGuard(self.0.as_ref().map(|runtime| {
            let threads = Arc::clone(&runtime.threads);
            threads.state.lock().schedule.begin(Instant::now());
            threads.may_pause.store(true, Ordering::Relaxed);
            threads
        }))
    }

    /// Waits for something that the background may hold, and boosts it meanwhile. A background thread
    /// waits without a boost.
    pub async fn boost_while<F: Future>(&self, waiting: F) -> F::Output {
        let mut waiting = std::pin::pin!(waiting);
        if let Poll::Ready(done) = futures_util::poll!(&mut waiting) {
            return done;
        }
        let _boost = (!Self::is_here()).then(|| self.boost());
        waiting.await
    }

    /// Boosts all background work until the guard is dropped: one part of it is waited for, and the
    /// parts share their threads.
    #[must_use]
    pub fn boost(&self) -> BoostGuard {
        if let Some(runtime) = &self.0 {
            runtime.threads.state.lock().boosts += 1;
            runtime.threads.changed.notify_all();
        }
        BoostGuard(self.0.clone())
    }
}

impl Drop for BoostGuard {
    fn drop(&mut self) {
        if let Some(runtime) = &self.0 {
            runtime.threads.state.lock().boosts -= 1;
        }
    }
}

impl Drop for PodStartGuard {
    fn drop(&mut self) {
        if let Some(threads) = &self.0 {
            threads.state.lock().schedule.end(Instant::now());
            threads.changed.notify_all();
        }
    }
}

impl Drop for BackgroundRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // The last owner may be a task, which must not block.
            runtime.shutdown_background();
        }
    }
}

impl BackgroundThreads {
    fn yield_to_pods(&self) {
        if !self.may_pause.load(Ordering::Relaxed) {
            return;
        }
        let mut state = self.state.lock();
        state.pausing += 1;
        while state.boosts == 0
            && let Some(pause) = state.schedule.pause(Instant::now())
        {
            self.changed.wait_for(&mut state, pause);
        }
        state.pausing -= 1;
        if state.schedule.is_over() {
            self.may_pause.store(false, Ordering::Relaxed);
        }
    }

    fn throttle(&self, time: Duration) {
        let until = Instant::now() + time;
        let mut state = self.state.lock();
        while state.boosts == 0
            && let Some(left) = until.checked_duration_since(Instant::now())
            && !left.is_zero()
        {
            self.changed.wait_for(&mut state, left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn background_work_is_known_on_all_threads_of_the_background() {
        let (background, tracker) = (Background::start().expect("threads"), TaskTracker::new());
        let places = async {
            let blocking = tokio::task::spawn_blocking(Background::is_here);
            (Background::is_here(), blocking.await.expect("blocking work"))
        };
        assert_eq!(background.spawn(&tracker, places).await.expect("a task"), (true, true));
        assert!(!Background::is_here());
    }

    #[tokio::test]
    async fn no_step_pauses_until_the_last_boost_ends() {
        let background = Background::start().expect("threads");
        let _pod_start = background.begin_pod_start();
        let paused = step(&background);
        wait_until_it_pauses(&background);
        let boost = background.boost();
        paused.await.expect("it went on");
        drop(background.boost());
        step(&background).await.expect("another boost goes on");
        drop(boost);
        let _paused = step(&background);
        wait_until_it_pauses(&background);
    }

    /// Ends a step in the background, on a thread that a background thread has started.
    fn step(background: &Background) -> tokio::sync::oneshot::Receiver<()> {
        let (sender, done) = tokio::sync::oneshot::channel();
        background.spawn(&TaskTracker::new(), async move {
            tokio::task::spawn_blocking(move || {
                let current = current();
                let own = std::thread::spawn(move || {
                    inherit(current);
                    yield_to_pods();
                });
                own.join().expect("a thread");
                let _ = sender.send(());
            });
        });
        done
    }

    fn wait_until_it_pauses(background: &Background) {
        let threads = &background.0.as_ref().expect("threads").threads;
        let since = Instant::now();
        while threads.state.lock().pausing == 0 {
            assert!(since.elapsed().as_secs() < 60, "nothing pauses");
            std::thread::yield_now();
        }
    }

    #[tokio::test]
    async fn a_step_pauses_while_a_pod_starts() {
        let background = Background::start().expect("threads");
        let pod_start = background.begin_pod_start();
        let done = step(&background);
        wait_until_it_pauses(&background);
        // Other threads do not pause.
        yield_to_pods();
        drop(pod_start);
        done.await.expect("it went on");
    }

    #[tokio::test]
    async fn a_boost_ends_throttling() {
        let background = Background::start().expect("threads");
        let (ready, started) = tokio::sync::oneshot::channel();
        let work = background.spawn(&TaskTracker::new(), async move {
            let throttled = tokio::task::spawn_blocking(move || {
                let _ = ready.send(());
                let since = Instant::now();
                // Longer than a test may take.
                while since.elapsed() < LONGEST_THROTTLE * 12 && !is_boosted() {
                    throttle(LONGEST_THROTTLE);
                }
                is_boosted()
            });
            throttled.await.expect("blocking work")
        });
        started.await.expect("a throttled thread");
        let _boost = background.boost();
        assert!(work.await.expect("a task"));
        // Other threads are not throttled.
        throttle(Duration::MAX / 4);
    }

    fn is_boosted() -> bool {
        let threads = CURRENT.with_borrow(Option::clone);
        threads.is_some_and(|threads| threads.state.lock().boosts > 0)
    }
}
