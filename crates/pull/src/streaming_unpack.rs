//! A layer that is unpacked while it is downloaded.
//!
//! Unpacking follows the hashed bytes into staging. Its outcome counts only when the
//! whole blob is verified: until then nothing has a name, and a refusal may be the
//! fault of bytes that are not the blob's. A layer that waits for a slow wire gives its
//! turn to layers that are here, and is unpacked when it is here itself.
//!
//! Permits are shared by tenant. An unpacking of a tenant that holds more permits than one that waits
//! returns its permit at the next read of its input, and continues when it has another one. Its
//! decompression window stays in memory meanwhile, so that only as many are paused at once as may
//! run (see [`super::PullOptions::check_memory`]).
//!
//! Work for which memory is reserved does not wait for a registry. Plans and readings have permits
//! of their own. A layer with a large window is the next one of its tenant, and an unpacking that
//! waits for bytes returns its permit.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::compute_budget::Computations;
use super::connection_slots::{Ask, Slot, Slots};
use super::error::PullError;
use super::memory::PLAIN_WINDOW;
use super::pull_progress::Progress;
use oci::Digest;
use store::growing_download::Follower;
use store::layers::LayerWriter;
use store::{LayerKey, Store, StoreError};
use sys::background::Background;
use unpack::layer_rule::ArchiveRule;
use unpack::{Limits, PermissionsRule, archive};

/// zstd windows up to this (8 MiB, what the format asks every decoder to take) need no permit.
const PLAIN_WINDOW_LOG: u32 = 23;
/// An unpacking that waited for more than half of at least this time gives way.
const PATIENCE: Duration = Duration::from_secs(2);
/// Interval at which an unpacking checks whether another tenant is owed its permit.
const TENANT_CHECK: Duration = Duration::from_millis(50);
/// Verdicts that are remembered.
const MAXIMUM_REFUSALS: usize = 1024;

/// The limits on concurrent unpackings on this node.
#[derive(Clone)]
pub(super) struct Unpackers(Arc<SharedUnpackers>);

struct SharedUnpackers {
    store: Store,
    limits: Limits,
    /// Permits to unpack a layer.
    permits: Slots,
    /// The right to keep a decompression window without a permit.
    paused: Semaphore,
    background: Background,
    /// The permits for windows that take a lot of memory.
    wide: Semaphore,
    computations: Computations,
    refusals: Mutex<RefusedLayers>,
}

/// Refused layers with their errors: a function of their bytes and of limits that do not change while the process runs.
/// Kept for each repository, since the error may quote the content.
#[derive(Default)]
struct RefusedLayers(VecDeque<(String, LayerKey, Arc<PullError>)>);

/// The right to unpack one layer.
struct UnpackPermit {
    unpackers: Unpackers,
    request: Ask,
    /// Drives waiting on threads that the runtime does not know.
    runtime: Handle,
    /// The slot; empty while the unpacking is paused.
    slot: Mutex<Option<Slot>>,
}

/// The memory that one unpacking takes for its decompression window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Window {
    /// A window that the fixed part of the budget covers.
    Plain,
    /// A window for which memory is reserved. The unpacking is not paused with it.
    Large,
}

/// Input of an unpacking that can be paused between two reads.
struct PausableReader<R> {
    input: R,
    permit: Arc<UnpackPermit>,
    checked: Instant,
}

/// A thread that unpacks what grows.
type Following = JoinHandle<Result<LayerWriter, PullError>>;

/// A layer to unpack.
#[derive(Clone)]
pub(super) struct Job {
    unpackers: Unpackers,
    pub(super) blob: Digest,
    rule: ArchiveRule,
    permissions: PermissionsRule,
    urgency: Arc<Progress>,
    following: Arc<Mutex<Option<Following>>>,
}

impl Unpackers {
    /// `at_once` layers, of which `wide` with large windows.
    pub(super) fn new(
        store: Store,
        limits: Limits,
        at_once: usize,
        wide: usize,
        computations: Computations,
        background: Background,
    ) -> Self {
        Self(Arc::new(SharedUnpackers {
            store,
            limits,
            permits: Slots::without_reserve(at_once, background.clone()),
            paused: Semaphore::new(at_once.max(1)),
            background,
            wide: Semaphore::new(wide.max(1)),
            computations,
            refusals: Mutex::default(),
        }))
    }

    /// Waits for the right to unpack a layer.
    async fn permit(&self, flight: &Arc<Progress>, window: Window) -> UnpackPermit {
        let request = slot_request(flight, window);
        let slot = self.0.permits.acquire(request.clone()).await;
        UnpackPermit::new(self, request, slot)
    }

    /// Returns the right to unpack a layer, if no other flight waits for it.
    fn free_permit(&self, flight: &Arc<Progress>) -> Option<UnpackPermit> {
        let request = slot_request(flight, Window::Plain);
        let slot = self.0.permits.spare(&request)?;
        Some(UnpackPermit::new(self, request, slot))
    }

    /// A layer of one's own to unpack.
    pub(super) fn job(
        &self,
        blob: Digest,
        rule: ArchiveRule,
        permissions: PermissionsRule,
        urgency: &Arc<Progress>,
    ) -> Job {
        let (unpackers, urgency) = (self.clone(), Arc::clone(urgency));
        Job { unpackers, blob, rule, permissions, urgency, following: Arc::default() }
    }

    /// Why this layer was refused when it was last here from this repository.
    pub(super) fn refusal(&self, repository: &str, key: LayerKey) -> Option<Arc<PullError>> {
        let refusals = self.0.refusals.lock();
        let mut refusals = refusals.0.iter();
        let known = refusals.find(|(from, layer, _)| *layer == key && from == repository);
        known.map(|(_, _, error)| Arc::clone(error))
    }

    /// Remembers why a verified layer was refused.
    pub(super) fn refuse(&self, repository: &str, key: LayerKey, error: &Arc<PullError>) {
        let mut refusals = self.0.refusals.lock();
        if refusals.0.len() == MAXIMUM_REFUSALS {
            refusals.0.pop_front();
        }
        refusals.0.push_back((repository.to_owned(), key, Arc::clone(error)));
    }
}

impl Job {
    /// Begins to unpack what grows, if a permit is free. What was begun before is given up.
    pub(super) fn follow(&self, mut follower: Follower) {
        let following = self.unpackers.free_permit(&self.urgency).map(|permit| {
            let (permit, since) = (Arc::new(permit), Instant::now());
            let held = Arc::clone(&permit);
            follower.gives_way = Some(Box::new(move |waited| {
                let elapsed = since.elapsed();
                held.is_wanted() && elapsed > PATIENCE && waited * 2 > elapsed
            }));
            let job = self.clone();
            tokio::task::spawn_blocking(move || job.unpack(follower, Window::Plain, permit))
        });
        *self.following.lock() = following;
    }

    /// Returns the layer of a blob that is verified. `open` reads it from its start.
    pub(super) async fn finish<R: Read + Send + 'static>(
        &self,
        open: impl Fn() -> Result<R, StoreError> + Clone + Send + 'static,
    ) -> Result<LayerWriter, PullError> {
        let following = self.following.lock().take();
        let followed = match following {
            Some(following) => match following.await {
                Ok(followed) => Some(followed),
                Err(_) => return Err(PullError::Crashed),
            },
            None => None,
        };
        let outcome = match followed {
            // It gave way, or its disk had a bad moment.
            None | Some(Err(PullError::Store(_))) => self.start(&open, Window::Plain).await,
            Some(outcome) => outcome,
        };
        let needs_wide = matches!(&outcome,
            Err(PullError::Unpack(error)) if error.is_about_window());
        if !needs_wide || self.unpackers.0.limits.zstd_window_log <= PLAIN_WINDOW_LOG {
            return outcome;
        }
        let SharedUnpackers { wide, background, computations, limits, .. } = &*self.unpackers.0;
        // Reserved before a permit is taken, and beside the window that each unpacking may have.
        let window = (1_u64 << limits.zstd_window_log).saturating_sub(PLAIN_WINDOW);
        let _memory = computations.memory(window, &self.urgency).await?;
        let wide = background.boost_while(wide.acquire()).await;
        let _wide = wide.map_err(|_| PullError::Crashed)?;
        let unpacked = self.start(&open, Window::Large).await;
        store::give_memory_back();
        unpacked
    }

    async fn start<R: Read + Send + 'static>(
        &self,
        open: &(impl Fn() -> Result<R, StoreError> + Clone + Send + 'static),
        window: Window,
    ) -> Result<LayerWriter, PullError> {
        let permit = Arc::new(self.unpackers.permit(&self.urgency, window).await);
        let (job, open) = (self.clone(), open.clone());
        super::blocking(move || job.unpack(open()?, window, permit)).await
    }

    /// Unpacks a layer. The permit is held until that ends, also when the caller has gone.
    fn unpack(
        &self,
        blob: impl Read + Send + 'static,
        window: Window,
        permit: Arc<UnpackPermit>,
    ) -> Result<LayerWriter, PullError> {
        let SharedUnpackers { store, limits, .. } = &*self.unpackers.0;
        let mut limits = limits.clone();
        let mut writer = store.layers().write(self.blob)?;
        let totals = match window {
            Window::Plain => {
                limits.zstd_window_log = limits.zstd_window_log.min(PLAIN_WINDOW_LOG);
                let blob = PausableReader { input: blob, permit, checked: Instant::now() };
                archive::unpack(blob, &self.rule, self.permissions, &limits, &mut writer)?
            }
            Window::Large => {
                let _permit = permit;
                archive::unpack(blob, &self.rule, self.permissions, &limits, &mut writer)?
            }
        };
        if totals.skipped > 0 {
            let (layer, skipped) = (self.blob, totals.skipped);
            tracing::info!(%layer, skipped, "device nodes, fifos and entries that would replace the root are not shown");
        }
        Ok(writer)
    }
}

/// Returns the request of a flight for a permit. Other tenants may wait for the memory that a layer
/// with a large window has reserved.
fn slot_request(flight: &Arc<Progress>, window: Window) -> Ask {
    Ask { is_first: window == Window::Large, ..Ask::without_host(flight) }
}

impl UnpackPermit {
    fn new(unpackers: &Unpackers, request: Ask, slot: Slot) -> Self {
        let (unpackers, runtime) = (unpackers.clone(), Handle::current());
        Self { unpackers, request, runtime, slot: Mutex::new(Some(slot)) }
    }

    /// Returns whether a flight waits that could use the permit.
    fn is_wanted(&self) -> bool {
        let slot = self.slot.lock();
        slot.as_ref().is_some_and(|slot| self.unpackers.0.permits.is_wanted(slot))
    }

    /// Returns the permit to a tenant that holds fewer, and waits for the next one. Does nothing if
    /// no tenant is owed it, or if too many unpackings are paused. Blocking.
    fn pause_if_owed(&self) {
        let SharedUnpackers { permits, paused, .. } = &*self.unpackers.0;
        let mut slot = self.slot.lock();
        if !slot.as_ref().is_some_and(|slot| permits.is_owed_to_other_tenant(slot)) {
            return;
        }
        let Ok(_paused) = paused.try_acquire() else { return };
        *slot = None;
        *slot = Some(self.runtime.block_on(permits.acquire(self.request.clone())));
    }
}

impl<R: Read> Read for PausableReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.checked.elapsed() >= TENANT_CHECK {
            self.checked = Instant::now();
            self.permit.pause_if_owed();
        }
        self.input.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::super::memory::{MemoryBudget, MemoryPlan};
    use super::super::{Caller, Priority, Tenant};
    use super::*;

    fn flight(namespace: &str) -> Arc<Progress> {
        let flight = Arc::new(Progress::default());
        flight.enter(&Caller::new(Priority::Pod, Tenant::Namespace(namespace.into())));
        flight
    }

    fn unpackers(at_once: usize) -> Unpackers {
        unpackers_in(tempfile::tempdir().unwrap().path(), at_once)
    }

    fn unpackers_in(folder: &std::path::Path, at_once: usize) -> Unpackers {
        let store = super::super::testing::store_in(folder);
        let budget = MemoryBudget::new(MemoryPlan::new(192 << 20, at_once));
        let computations = Computations::new(budget, at_once, Background::none());
        Unpackers::new(store, Limits::default(), at_once, 1, computations, Background::none())
    }

    /// Unpackings of one tenant that hold all permits and do not end by themselves.
    struct Unpackings {
        unpackers: Unpackers,
        flight: Arc<Progress>,
        is_over: Arc<AtomicBool>,
        running: Vec<JoinHandle<()>>,
    }

    impl Unpackings {
        async fn start(at_once: usize) -> Self {
            let unpackers = unpackers(at_once);
            let (flight, is_over) = (flight("many"), Arc::new(AtomicBool::new(false)));
            let mut running = Vec::new();
            for _ in 0..at_once {
                let permit = Arc::new(unpackers.permit(&flight, Window::Plain).await);
                let is_over = Arc::clone(&is_over);
                let mut input =
                    PausableReader { input: std::io::repeat(0), permit, checked: Instant::now() };
                let read = move || {
                    while !is_over.load(Ordering::Relaxed) {
                        let _ = input.read(&mut [0; 1024]);
                    }
                };
                // Archives are read by a thread that the runtime does not know.
                running.push(tokio::task::spawn_blocking(|| {
                    std::thread::spawn(read).join().expect("it reads");
                }));
            }
            Self { unpackers, flight, is_over, running }
        }

        async fn end(self) -> Unpackers {
            self.is_over.store(true, Ordering::Relaxed);
            for unpacking in self.running {
                unpacking.await.unwrap();
            }
            self.unpackers
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_unpacking_gives_way_to_another_tenant_and_goes_on() {
        let many = Unpackings::start(2).await;
        let few = many.unpackers.permit(&flight("few"), Window::Plain).await;
        let (unpackers, flight) = (many.unpackers.clone(), Arc::clone(&many.flight));
        let mut same = Box::pin(unpackers.permit(&flight, Window::Plain));
        assert!(futures_util::poll!(&mut same).is_pending(), "the other one has more");
        drop(few);
        let unpackers = many.end().await;
        drop(same.await);
        assert_eq!(unpackers.0.permits.taken(), 0);
        unpackers.permit(&self::flight("next"), Window::Plain).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn as_many_unpackings_are_paused_as_may_run() {
        let unpackers = unpackers(2);
        let many = flight("many");
        let held = unpackers.permit(&many, Window::Plain).await;
        let _other = unpackers.permit(&many, Window::Plain).await;
        let few = flight("few");
        let mut next = Box::pin(unpackers.permit(&few, Window::Plain));
        assert!(futures_util::poll!(&mut next).is_pending());
        let paused = unpackers.0.paused.acquire_many(2).await.expect("none is paused");
        held.pause_if_owed();
        assert!(futures_util::poll!(&mut next).is_pending(), "too many are paused");
        drop(paused);
        let resumed = tokio::task::spawn_blocking(move || held.pause_if_owed());
        drop(next.await);
        resumed.await.unwrap();
        assert_eq!(unpackers.0.paused.available_permits(), 2);
    }

    #[tokio::test]
    async fn a_layer_with_reserved_memory_is_the_next_one_of_its_tenant() {
        let unpackers = unpackers(1);
        let many = flight("many");
        let running = unpackers.permit(&many, Window::Plain).await;
        let mut plain = Box::pin(unpackers.permit(&many, Window::Plain));
        let mut large = Box::pin(unpackers.permit(&many, Window::Large));
        assert!(futures_util::poll!(&mut plain).is_pending());
        assert!(futures_util::poll!(&mut large).is_pending());
        drop(running);
        assert!(futures_util::poll!(&mut plain).is_pending(), "it came first");
        assert!(futures_util::poll!(&mut large).is_ready());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_computation_with_reserved_memory_waits_for_no_unpacking() {
        let many = Unpackings::start(1).await;
        let mut compute = Box::pin(many.unpackers.0.computations.permit(&many.flight));
        assert!(futures_util::poll!(&mut compute).is_ready(), "its tenant unpacks");
        drop(compute);
        many.end().await;
    }

    #[tokio::test]
    async fn a_layer_is_unpacked_and_a_refusal_is_of_one_repository() {
        let folder = tempfile::tempdir().unwrap();
        let unpackers = unpackers_in(folder.path(), 1);
        let rule = ArchiveRule { whiteouts: false, tar_digest: None, within: None };
        let unpack = async |bytes: Vec<u8>| {
            let (blob, flight) = (Digest::of(&bytes), flight("a"));
            let job = unpackers.job(blob, rule.clone(), PermissionsRule::Readable, &flight);
            job.finish(move || Ok(std::io::Cursor::new(bytes.clone()))).await
        };
        let archive = super::super::testing::tar(&[("folder/file", b"content")]);
        let key = super::super::disk_space_claim::layer_key(
            Digest::of(&archive),
            &rule,
            PermissionsRule::Readable,
        );
        let Err(error) = unpack(vec![b'x'; 2048]).await else { panic!("it is no archive") };
        assert!(matches!(error, PullError::Unpack(_)), "{error}");
        assert_eq!(unpackers.0.permits.taken(), 0);
        unpackers.refuse("r.io/a", key, &Arc::new(error));
        assert!(unpackers.refusal("r.io/a", key).is_some());
        assert!(unpackers.refusal("r.io/b", key).is_none());
        if super::super::testing::is_root() {
            let writer = unpack(archive).await.expect("a layer");
            let totals = unpackers.0.store.layers().finish(key, writer).expect("a layer").totals();
            assert_eq!((totals.files, totals.bytes), (1, 7));
        }
    }
}
