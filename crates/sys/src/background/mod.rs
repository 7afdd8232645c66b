//! Work that no pod waits for, on its own threads: the kernel runs them when no other thread of this
//! driver wants the processor.
//!
//! Linux calls the class of such threads `SCHED_IDLE` (sched(7)). A container is a control group of
//! its own, so these threads yield to the driver's other threads only: against other containers the
//! driver as a whole has its share. A thread that such a thread starts inherits the class.
//!
//! The processor is not the only shared resource: caches, the journal of the filesystem and the
//! disk's queue know no classes. So work in the background pauses [between its
//! steps](yield_to_pods) while pods start, and alternates with them when that goes on for long
//! ([`pause_schedule`]).
//!
//! A pod that comes to wait for background work [boosts](Background::boost) it: until the boost
//! ends, no thread pauses and all have normal priority. Returning to normal priority takes
//! `CAP_SYS_NICE`. Without it threads keep their class from the start: boosted work would otherwise
//! stay behind everything else, for good.

mod pause_schedule;

use std::cell::RefCell;
use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use nix::unistd::gettid;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use crate::mount::syscalls::{self, ThreadClass};
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

/// Background work has normal priority and does not pause until this is dropped.
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
#[derive(Debug)]
pub struct PodStartGuard(Option<Arc<BackgroundThreads>>);

#[derive(Debug)]
struct BackgroundThreads {
    can_change_class: bool,
    state: Mutex<ThreadsState>,
    /// True if a step may have to pause. Lets the other steps do without the lock.
    may_pause: AtomicBool,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct ThreadsState {
    threads: HashSet<i32>,
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

/// Does work that holds a lock which publishes take. A background thread has normal priority
/// meanwhile, so that other threads cannot keep it from releasing the lock.
pub fn at_normal_priority<T>(work: impl FnOnce() -> T) -> T {
    struct RestoreClass(Arc<BackgroundThreads>);
    impl Drop for RestoreClass {
        fn drop(&mut self) {
            self.0.set_own_class(&self.0.lock());
        }
    }
    let threads = CURRENT.with_borrow(Option::clone);
    let _restore = threads.map(|threads| {
        threads.set_class(gettid().as_raw(), ThreadClass::Normal);
        RestoreClass(threads)
    });
    work()
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
#[derive(Debug)]
pub struct BackgroundContext(Arc<BackgroundThreads>);

impl Background {
    /// Starts the background's threads.
    ///
    /// # Errors
    ///
    /// The kernel's, when it refuses another thread.
    pub fn start() -> io::Result<Self> {
        let can_change_class = std::thread::spawn(can_restore_class).join().unwrap_or(false);
        if !can_change_class {
            tracing::info!(
                "warming has no lower priority for the processor: that takes CAP_SYS_NICE"
            );
        }
        let threads = Arc::new(BackgroundThreads {
            can_change_class,
            state: Mutex::default(),
            may_pause: AtomicBool::new(false),
            changed: Condvar::new(),
        });
        let (started, stopped) = (Arc::clone(&threads), Arc::clone(&threads));
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("background")
            .on_thread_start(move || {
                CURRENT.set(Some(Arc::clone(&started)));
                started.add();
            })
            .on_thread_stop(move || stopped.remove())
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
            threads.lock().schedule.begin(Instant::now());
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
            runtime.threads.begin_boost();
        }
        BoostGuard(self.0.clone())
    }
}

impl Drop for BoostGuard {
    fn drop(&mut self) {
        if let Some(runtime) = &self.0 {
            runtime.threads.end_boost();
        }
    }
}

impl Drop for PodStartGuard {
    fn drop(&mut self) {
        if let Some(threads) = &self.0 {
            threads.lock().schedule.end(Instant::now());
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
    fn lock(&self) -> MutexGuard<'_, ThreadsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self) {
        let mut state = self.lock();
        state.threads.insert(gettid().as_raw());
        self.set_own_class(&state);
    }

    /// Gives the calling thread the class that all background threads have now.
    fn set_own_class(&self, state: &ThreadsState) {
        let class = if state.boosts == 0 { ThreadClass::Idle } else { ThreadClass::Normal };
        self.set_class(gettid().as_raw(), class);
    }

    fn remove(&self) {
        self.lock().threads.remove(&gettid().as_raw());
    }

    fn yield_to_pods(&self) {
        if !self.may_pause.load(Ordering::Relaxed) {
            return;
        }
        let mut state = self.lock();
        state.pausing += 1;
        while state.boosts == 0
            && let Some(pause) = state.schedule.pause(Instant::now())
        {
            let waited = self.changed.wait_timeout(state, pause);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.pausing -= 1;
        if state.schedule.is_over() {
            self.may_pause.store(false, Ordering::Relaxed);
        }
    }

    fn throttle(&self, time: Duration) {
        let until = Instant::now() + time;
        let mut state = self.lock();
        while state.boosts == 0
            && let Some(left) = until.checked_duration_since(Instant::now())
            && !left.is_zero()
        {
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn begin_boost(&self) {
        let mut state = self.lock();
        state.boosts += 1;
        self.changed.notify_all();
        if self.can_change_class {
            // Background threads may have started further threads, which `state` does not list.
            for thread in threads_of_this_process() {
                if syscalls::thread_class(thread).is_ok_and(|class| class == ThreadClass::Idle) {
                    self.set_class(thread, ThreadClass::Normal);
                }
            }
        }
    }

    fn end_boost(&self) {
        let mut state = self.lock();
        state.boosts -= 1;
        if state.boosts == 0 {
            // Further threads that they started keep their class: these end with their work.
            state.threads.iter().for_each(|&thread| self.set_class(thread, ThreadClass::Idle));
        }
    }

    fn set_class(&self, thread: i32, class: ThreadClass) {
        if self.can_change_class {
            // A thread that has ended since needs no class.
            let _ = syscalls::set_thread_class(thread, class);
        }
    }
}

/// Tries on the calling thread whether a thread can leave the idle class again.
fn can_restore_class() -> bool {
    let own = gettid().as_raw();
    let lowered = syscalls::set_thread_class(own, ThreadClass::Idle);
    lowered.and_then(|()| syscalls::set_thread_class(own, ThreadClass::Normal)).is_ok()
}

fn threads_of_this_process() -> Vec<i32> {
    let Ok(folder) = std::fs::read_dir("/proc/self/task") else { return Vec::new() };
    let number =
        |entry: io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    folder.filter_map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class() -> ThreadClass {
        syscalls::thread_class(gettid().as_raw()).expect("a thread's class")
    }

    #[tokio::test]
    async fn background_work_is_idle_with_all_its_threads_until_boosted() {
        let _alone = ALONE.lock().await;
        let (background, tracker) = (Background::start().expect("threads"), TaskTracker::new());
        // Without the right to restore the class, threads keep it.
        let idle = if can_restore_class() { ThreadClass::Idle } else { ThreadClass::Normal };
        let classes = || async {
            let blocking = tokio::task::spawn_blocking(|| {
                let started = std::thread::spawn(class).join().expect("a thread");
                (Background::is_here(), class(), started)
            });
            (Background::is_here(), class(), blocking.await.expect("blocking work"))
        };
        let lowered = background.spawn(&tracker, classes()).await.expect("a task");
        assert_eq!(lowered, (true, idle, (true, idle, idle)));
        let boost = background.boost();
        let second = background.boost();
        drop(second);
        let boosted = background.spawn(&tracker, classes()).await.expect("a task");
        let normal = ThreadClass::Normal;
        assert_eq!(boosted, (true, normal, (true, normal, normal)));
        drop(boost);
        let again = background.spawn(&tracker, classes()).await.expect("a task");
        assert_eq!(again, (true, idle, (true, idle, idle)));
        assert!(!Background::is_here());
        assert_eq!(class(), normal, "other threads keep their class");
    }

    #[tokio::test]
    async fn a_boost_reaches_threads_that_already_run() {
        let _alone = ALONE.lock().await;
        let (background, tracker) = (Background::start().expect("threads"), TaskTracker::new());
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let (ready, started) = tokio::sync::oneshot::channel();
        let work = background.spawn(&tracker, async move {
            let blocking = tokio::task::spawn_blocking(move || {
                std::thread::scope(|scope| {
                    let own = scope.spawn(move || {
                        let _ = ready.send(());
                        let _ = wait.recv();
                        class()
                    });
                    own.join().expect("a thread")
                })
            });
            blocking.await.expect("blocking work")
        });
        started.await.expect("a waiting thread");
        let _boost = background.boost();
        go.send(()).expect("a waiting thread");
        assert_eq!(work.await.expect("a task"), ThreadClass::Normal);
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
        while threads.lock().pausing == 0 {
            assert!(since.elapsed().as_secs() < 60, "nothing pauses");
            std::thread::yield_now();
        }
    }

    /// Makes the tests run one at a time: a boost concerns all threads of the process.
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

    #[tokio::test]
    async fn a_step_pauses_while_a_pod_starts() {
        let _alone = ALONE.lock().await;
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
    async fn work_under_a_lock_has_normal_priority() {
        let _alone = ALONE.lock().await;
        let (background, tracker) = (Background::start().expect("threads"), TaskTracker::new());
        let idle = if can_restore_class() { ThreadClass::Idle } else { ThreadClass::Normal };
        let work = async { (at_normal_priority(class), class()) };
        let classes = background.spawn(&tracker, work).await.expect("a task");
        assert_eq!(classes, (ThreadClass::Normal, idle));
        assert_eq!(at_normal_priority(class), ThreadClass::Normal);
    }

    #[tokio::test]
    async fn a_boost_ends_throttling() {
        let _alone = ALONE.lock().await;
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
        threads.is_some_and(|threads| threads.lock().boosts > 0)
    }

    #[tokio::test]
    async fn boosted_work_does_not_pause() {
        let _alone = ALONE.lock().await;
        let background = Background::start().expect("threads");
        let _pod_start = background.begin_pod_start();
        let done = step(&background);
        wait_until_it_pauses(&background);
        let boost = background.boost();
        done.await.expect("it went on");
        step(&background).await.expect("it went on");
        drop(boost);
    }
}
