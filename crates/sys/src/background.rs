//! Work that no pod waits for, on threads of its own: the kernel runs them when no other thread
//! of this driver wants the processor.
//!
//! Linux calls the class of such threads `SCHED_IDLE` (sched(7)). A container is a control group of
//! its own, so they stand back behind the driver's other threads only: against other containers the
//! driver as a whole has its share. A thread that such a thread starts is one too.
//!
//! A processor is not all that there is to be had: caches, the journal of the filesystem and the disk's
//! queue know no classes. So work in the background pauses [between its steps](give_way) while pods
//! start, and takes turns with them when that goes on for long ([`turns`]).
//!
//! Who is waited for after all [hurries](Background::hurry): as long as anybody does, nobody pauses and
//! all are ordinary threads. That takes `CAP_SYS_NICE`. Without it threads keep their class: work that a
//! pod has come to wait for would go on behind everything else, for good.

mod turns;

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
use turns::Turns;

/// One step on a disk that hardly answers must not be followed by silence.
const LONGEST_REST: Duration = Duration::from_secs(5);

thread_local! {
    static HERE: RefCell<Option<Arc<Threads>>> = const { RefCell::new(None) };
}

/// Where work is done in the background. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Background(Option<Arc<Inner>>);

/// Somebody waits for work in the background; dropping it says that he has what he wanted.
#[derive(Debug)]
pub struct Hurry(Option<Arc<Inner>>);

#[derive(Debug)]
struct Inner {
    handle: Handle,
    /// None at its end.
    runtime: Option<Runtime>,
    threads: Arc<Threads>,
}

/// Somebody goes first; dropping it says that he is done.
#[derive(Debug)]
pub struct First(Option<Arc<Threads>>);

#[derive(Debug)]
struct Threads {
    stand_back: bool,
    state: Mutex<State>,
    /// Whether there is a reason to pause: what every step looks at.
    pauses: AtomicBool,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    threads: HashSet<i32>,
    hurries: usize,
    turns: Turns,
    /// Threads that pause now.
    pausing: usize,
}

/// Ends a step of whatever the calling thread does. In the background it pauses here while somebody
/// goes first.
pub fn give_way() {
    HERE.with_borrow(|here| {
        if let Some(threads) = here {
            threads.give_way();
        }
    });
}

/// Leaves the disk to others after a step that took so long: in the background, and while nobody
/// waits for it, the calling thread sleeps for three times as long.
pub fn rest(worked: Duration) {
    HERE.with_borrow(|here| {
        if let Some(threads) = here {
            threads.rest((worked * 3).min(LONGEST_REST));
        }
    });
}

/// Does what holds something that others wait for: in the background as an ordinary thread, which
/// is not kept from ending it.
pub fn as_ordinary<T>(work: impl FnOnce() -> T) -> T {
    struct Back(Arc<Threads>);
    impl Drop for Back {
        fn drop(&mut self) {
            self.0.take_place(&self.0.lock());
        }
    }
    let threads = HERE.with_borrow(Option::clone);
    let _back = threads.map(|threads| {
        threads.set(gettid().as_raw(), ThreadClass::Ordinary);
        Back(threads)
    });
    work()
}

/// Starts to work for another thread: `inherit` is what [`current`] was there.
pub fn inherit(current: Option<Current>) {
    HERE.set(current.map(|current| current.0));
}

/// What a thread that is started now is to [`inherit`].
#[must_use]
pub fn current() -> Option<Current> {
    HERE.with_borrow(|here| here.clone().map(Current))
}

/// The background that a thread works in.
#[derive(Debug)]
pub struct Current(Arc<Threads>);

impl Background {
    /// Starts its threads.
    ///
    /// # Errors
    ///
    /// The kernel's, when it has no thread to give.
    pub fn start() -> io::Result<Self> {
        let stand_back = std::thread::spawn(can_come_back).join().unwrap_or(false);
        if !stand_back {
            tracing::info!(
                "warming has no lower priority for the processor: that takes CAP_SYS_NICE"
            );
        }
        let threads = Arc::new(Threads {
            stand_back,
            state: Mutex::default(),
            pauses: AtomicBool::new(false),
            changed: Condvar::new(),
        });
        let (started, stopped) = (Arc::clone(&threads), Arc::clone(&threads));
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("background")
            .on_thread_start(move || {
                HERE.set(Some(Arc::clone(&started)));
                started.add();
            })
            .on_thread_stop(move || stopped.remove())
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        Ok(Self(Some(Arc::new(Inner { handle, runtime: Some(runtime), threads }))))
    }

    /// No threads of its own: background work is done as all other.
    #[must_use]
    pub fn none() -> Self {
        Self(None)
    }

    /// Whether the calling thread works in the background.
    #[must_use]
    pub fn is_here() -> bool {
        HERE.with_borrow(Option::is_some)
    }

    /// Has a task done in the background, with all tasks and blocking work that it begins itself.
    pub fn spawn<F>(&self, tracker: &TaskTracker, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        match &self.0 {
            Some(inner) => tracker.spawn_on(task, &inner.handle),
            None => tracker.spawn(task),
        }
    }

    /// Until the answer is dropped a pod starts: the background pauses, unless it is its turn.
    #[must_use]
    pub fn go_first(&self) -> First {
        First(self.0.as_ref().map(|inner| {
            let threads = Arc::clone(&inner.threads);
            threads.lock().turns.begin(Instant::now());
            threads.pauses.store(true, Ordering::Relaxed);
            threads
        }))
    }

    /// Waits for something that the background may hold; it hurries meanwhile.
    pub async fn hurried<F: Future>(&self, waiting: F) -> F::Output {
        let mut waiting = std::pin::pin!(waiting);
        if let Poll::Ready(done) = futures_util::poll!(&mut waiting) {
            return done;
        }
        let _hurry = (!Self::is_here()).then(|| self.hurry());
        waiting.await
    }

    /// Until the answer is dropped, background work is done as all other: somebody waits for a
    /// part of it, and the parts share their threads.
    #[must_use]
    pub fn hurry(&self) -> Hurry {
        if let Some(inner) = &self.0 {
            inner.threads.hurry();
        }
        Hurry(self.0.clone())
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        if let Some(inner) = &self.0 {
            inner.threads.relax();
        }
    }
}

impl Drop for First {
    fn drop(&mut self) {
        if let Some(threads) = &self.0 {
            threads.lock().turns.end(Instant::now());
            threads.changed.notify_all();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Whoever drops it may be a task, which must not wait.
            runtime.shutdown_background();
        }
    }
}

impl Threads {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self) {
        let mut state = self.lock();
        state.threads.insert(gettid().as_raw());
        self.take_place(&state);
    }

    /// Gives the calling thread the class that all have now.
    fn take_place(&self, state: &State) {
        let class = if state.hurries == 0 { ThreadClass::Idle } else { ThreadClass::Ordinary };
        self.set(gettid().as_raw(), class);
    }

    fn remove(&self) {
        self.lock().threads.remove(&gettid().as_raw());
    }

    fn give_way(&self) {
        if !self.pauses.load(Ordering::Relaxed) {
            return;
        }
        let mut state = self.lock();
        state.pausing += 1;
        while state.hurries == 0
            && let Some(wait) = state.turns.wait(Instant::now())
        {
            let waited = self.changed.wait_timeout(state, wait);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.pausing -= 1;
        if state.turns.is_over() {
            self.pauses.store(false, Ordering::Relaxed);
        }
    }

    fn rest(&self, time: Duration) {
        let until = Instant::now() + time;
        let mut state = self.lock();
        while state.hurries == 0
            && let Some(left) = until.checked_duration_since(Instant::now())
            && !left.is_zero()
        {
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn hurry(&self) {
        let mut state = self.lock();
        state.hurries += 1;
        self.changed.notify_all();
        if self.stand_back {
            // Those that they have started, too.
            for thread in threads_of_this_process() {
                if syscalls::thread_class(thread).is_ok_and(|class| class == ThreadClass::Idle) {
                    self.set(thread, ThreadClass::Ordinary);
                }
            }
        }
    }

    fn relax(&self) {
        let mut state = self.lock();
        state.hurries -= 1;
        if state.hurries == 0 {
            // Those that they have started end with what they do.
            state.threads.iter().for_each(|&thread| self.set(thread, ThreadClass::Idle));
        }
    }

    fn set(&self, thread: i32, class: ThreadClass) {
        if self.stand_back {
            // A thread that has ended since needs no class.
            let _ = syscalls::set_thread_class(thread, class);
        }
    }
}

/// Tries it on the calling thread.
fn can_come_back() -> bool {
    let own = gettid().as_raw();
    let there = syscalls::set_thread_class(own, ThreadClass::Idle);
    there.and_then(|()| syscalls::set_thread_class(own, ThreadClass::Ordinary)).is_ok()
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
    async fn work_stands_back_with_all_it_starts_until_somebody_waits() {
        let _alone = ALONE.lock().await;
        let (background, tracker) = (Background::start().expect("threads"), TaskTracker::new());
        // Without the right to come back nobody stands back.
        let idle = if can_come_back() { ThreadClass::Idle } else { ThreadClass::Ordinary };
        let classes = || async {
            let blocking = tokio::task::spawn_blocking(|| {
                let started = std::thread::spawn(class).join().expect("a thread");
                (Background::is_here(), class(), started)
            });
            (Background::is_here(), class(), blocking.await.expect("blocking work"))
        };
        let stood_back = background.spawn(&tracker, classes()).await.expect("a task");
        assert_eq!(stood_back, (true, idle, (true, idle, idle)));
        let hurry = background.hurry();
        let second = background.hurry();
        drop(second);
        let hurried = background.spawn(&tracker, classes()).await.expect("a task");
        let ordinary = ThreadClass::Ordinary;
        assert_eq!(hurried, (true, ordinary, (true, ordinary, ordinary)));
        drop(hurry);
        let again = background.spawn(&tracker, classes()).await.expect("a task");
        assert_eq!(again, (true, idle, (true, idle, idle)));
        assert!(!Background::is_here());
        assert_eq!(class(), ordinary, "others stay as they are");
    }

    #[tokio::test]
    async fn what_runs_already_hurries_too() {
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
        started.await.expect("a thread that waits");
        let _hurry = background.hurry();
        go.send(()).expect("a thread that waits");
        assert_eq!(work.await.expect("a task"), ThreadClass::Ordinary);
    }

    /// Ends a step in the background, on a thread that a background thread has started.
    fn step(background: &Background) -> tokio::sync::oneshot::Receiver<()> {
        let (sender, done) = tokio::sync::oneshot::channel();
        background.spawn(&TaskTracker::new(), async move {
            tokio::task::spawn_blocking(move || {
                let current = current();
                let own = std::thread::spawn(move || {
                    inherit(current);
                    give_way();
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

    /// Hurrying is the affair of the whole process.
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

    #[tokio::test]
    async fn a_step_waits_for_who_goes_first() {
        let _alone = ALONE.lock().await;
        let background = Background::start().expect("threads");
        let first = background.go_first();
        let done = step(&background);
        wait_until_it_pauses(&background);
        // Nobody else does.
        give_way();
        drop(first);
        done.await.expect("it went on");
    }

    #[tokio::test]
    async fn what_holds_a_lock_is_done_as_by_an_ordinary_thread() {
        let _alone = ALONE.lock().await;
        let (background, tracker) = (Background::start().expect("threads"), TaskTracker::new());
        let idle = if can_come_back() { ThreadClass::Idle } else { ThreadClass::Ordinary };
        let work = async { (as_ordinary(class), class()) };
        let classes = background.spawn(&tracker, work).await.expect("a task");
        assert_eq!(classes, (ThreadClass::Ordinary, idle));
        assert_eq!(as_ordinary(class), ThreadClass::Ordinary);
    }

    #[tokio::test]
    async fn who_rests_is_woken_by_a_hurry() {
        let _alone = ALONE.lock().await;
        let background = Background::start().expect("threads");
        let (ready, started) = tokio::sync::oneshot::channel();
        let work = background.spawn(&TaskTracker::new(), async move {
            let resting = tokio::task::spawn_blocking(move || {
                let _ = ready.send(());
                let since = Instant::now();
                // Longer than a test may take.
                while since.elapsed() < LONGEST_REST * 12 && !is_hurried() {
                    rest(LONGEST_REST);
                }
                is_hurried()
            });
            resting.await.expect("blocking work")
        });
        started.await.expect("a thread that rests");
        let _hurry = background.hurry();
        assert!(work.await.expect("a task"));
        // Nobody else rests.
        rest(Duration::MAX / 4);
    }

    fn is_hurried() -> bool {
        let threads = HERE.with_borrow(Option::clone);
        threads.is_some_and(|threads| threads.lock().hurries > 0)
    }

    #[tokio::test]
    async fn who_hurries_waits_for_nobody() {
        let _alone = ALONE.lock().await;
        let background = Background::start().expect("threads");
        let _first = background.go_first();
        let done = step(&background);
        wait_until_it_pauses(&background);
        let hurry = background.hurry();
        done.await.expect("it went on");
        step(&background).await.expect("it went on");
        drop(hurry);
    }
}
