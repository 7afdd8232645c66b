//! A layer that is unpacked while it is downloaded.
//!
//! Unpacking follows the hashed bytes into staging. Its outcome counts only when the
//! whole blob is verified: until then nothing has a name, and a refusal may be the
//! fault of bytes that are not the blob's. A layer that waits for a slow wire gives its
//! turn to layers that are here, and is unpacked when it is here itself.
//!
//! Permits are shared by tenant. An unpacking whose tenant holds more than one that waits gives its
//! permit back at the next read of its input, and goes on when it has one again.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::error::PullError;
use super::memory::{MemoryBudget, PLAIN_WINDOW};
use super::progress::Progress;
use super::slots::{Ask, Slot, Slots};
use super::tenant::Tenant;
use crate::background::Background;
use crate::oci::Digest;
use crate::store::growth::Follower;
use crate::store::layers::LayerWriter;
use crate::store::{LayerKey, Store, StoreError};
use crate::unpack::layer_rule::ArchiveRule;
use crate::unpack::{Limits, PermissionsRule, archive};

/// zstd windows up to this (8 MiB, what the format asks every decoder to take) need no permit.
const PLAIN_WINDOW_LOG: u32 = 23;
/// Who waited for more than half of at least this time gives way.
const PATIENCE: Duration = Duration::from_secs(2);
/// Time between two looks at whether an unpacking has to give way to another tenant.
const TENANT_CHECK: Duration = Duration::from_millis(50);
/// Verdicts that are remembered.
const MAXIMUM_REFUSALS: usize = 1024;

/// Who may unpack, on this node.
#[derive(Clone)]
pub struct Unpackers(Arc<Shared>);

struct Shared {
    store: Store,
    limits: Limits,
    permits: Slots,
    at_once: usize,
    /// Unpackings that have given way to another tenant, and keep their windows meanwhile.
    paused: AtomicUsize,
    background: Background,
    /// For windows that take a lot of memory.
    wide: Semaphore,
    memory: MemoryBudget<Tenant>,
    refusals: Mutex<Refusals>,
}

/// What was refused, and why: a function of its bytes and of limits that do not change while
/// the process runs. By repository, since the reason may quote the content.
#[derive(Default)]
struct Refusals(VecDeque<(String, LayerKey, Arc<PullError>)>);

/// The right to do work that takes memory and disk.
pub struct Permit {
    unpackers: Unpackers,
    ask: Ask,
    /// None while it has been given back.
    slot: Mutex<Option<Slot>>,
}

/// Input of an unpacking, which gives way between two reads.
struct GivingWay<R> {
    input: R,
    permit: Arc<Permit>,
    checked: Instant,
}

/// A thread that unpacks what grows.
type Following = JoinHandle<Result<LayerWriter, PullError>>;

/// What is unpacked.
#[derive(Clone)]
pub struct Job {
    unpackers: Unpackers,
    blob: Digest,
    rule: ArchiveRule,
    permissions: PermissionsRule,
    urgency: Arc<Progress>,
    following: Arc<Mutex<Option<Following>>>,
}

impl Unpackers {
    /// `at_once` layers, of which `wide` with large windows.
    #[must_use]
    pub fn new(
        store: Store,
        limits: Limits,
        at_once: usize,
        wide: usize,
        memory: MemoryBudget<Tenant>,
        background: Background,
    ) -> Self {
        let at_once = at_once.max(1);
        Self(Arc::new(Shared {
            store,
            limits,
            permits: Slots::without_reserve(at_once, background.clone()),
            at_once,
            paused: AtomicUsize::new(0),
            background,
            wide: Semaphore::new(wide.max(1)),
            memory,
            refusals: Mutex::default(),
        }))
    }

    /// Waits for the right to do work that takes memory and disk, for the tenants of a flight.
    pub async fn permit(&self, flight: &Arc<Progress>) -> Permit {
        let ask = ask(flight);
        let slot = self.0.permits.acquire(ask.clone()).await;
        Permit { unpackers: self.clone(), ask, slot: Mutex::new(Some(slot)) }
    }

    /// The same, if it is to be had at once.
    fn free_permit(&self, flight: &Arc<Progress>) -> Option<Permit> {
        let ask = ask(flight);
        let slot = self.0.permits.spare(&ask)?;
        Some(Permit { unpackers: self.clone(), ask, slot: Mutex::new(Some(slot)) })
    }

    /// A layer of one's own to unpack.
    #[must_use]
    pub fn job(
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
    #[must_use]
    pub fn refusal(&self, repository: &str, key: LayerKey) -> Option<Arc<PullError>> {
        let refusals = self.0.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        let mut refusals = refusals.0.iter();
        let known = refusals.find(|(from, layer, _)| *layer == key && from == repository);
        known.map(|(_, _, error)| Arc::clone(error))
    }

    /// Remembers why a verified layer was refused.
    pub fn refuse(&self, repository: &str, key: LayerKey, error: &Arc<PullError>) {
        let mut refusals = self.0.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        if refusals.0.len() == MAXIMUM_REFUSALS {
            refusals.0.pop_front();
        }
        refusals.0.push_back((repository.to_owned(), key, Arc::clone(error)));
    }
}

impl Job {
    /// Begins to unpack what grows, if a permit is free. What was begun before is given up.
    pub fn follow(&self, mut follower: Follower) {
        let following = self.unpackers.free_permit(&self.urgency).map(|permit| {
            let (permit, since) = (Arc::new(permit), Instant::now());
            let held = Arc::clone(&permit);
            follower.gives_way_if(move |waited| {
                let elapsed = since.elapsed();
                held.is_wanted() && elapsed > PATIENCE && waited * 2 > elapsed
            });
            let job = self.clone();
            tokio::task::spawn_blocking(move || job.unpack(follower, PLAIN_WINDOW_LOG, permit))
        });
        *self.following.lock().unwrap_or_else(PoisonError::into_inner) = following;
    }

    /// Returns the layer of a blob that is verified. `open` reads it from its start.
    pub async fn finish<R: Read + Send + 'static>(
        &self,
        open: impl Fn() -> Result<R, StoreError> + Clone + Send + 'static,
    ) -> Result<LayerWriter, PullError> {
        let following = self.following.lock().unwrap_or_else(PoisonError::into_inner).take();
        let followed = match following {
            Some(following) => match following.await {
                Ok(followed) => Some(followed),
                Err(_) => return Err(PullError::Crashed),
            },
            None => None,
        };
        let outcome = match followed {
            // It gave way, or its disk had a bad moment.
            None | Some(Err(PullError::Store(_))) => self.start(&open, PLAIN_WINDOW_LOG).await,
            Some(outcome) => outcome,
        };
        let needs_wide = matches!(&outcome,
            Err(PullError::Unpack(error)) if error.is_about_window());
        if !needs_wide || self.unpackers.0.limits.zstd_window_log <= PLAIN_WINDOW_LOG {
            return outcome;
        }
        let Shared { wide, background, memory, limits, .. } = &*self.unpackers.0;
        // Before anything that others wait for, and beside what each layer that is unpacked has.
        let window = (1_u64 << limits.zstd_window_log).saturating_sub(PLAIN_WINDOW);
        let waits = |wait| self.urgency.waits_for_memory(wait);
        let memory = memory.compute(self.urgency.tenant(), window, waits);
        // What warming has it may hold on to while it gives way.
        let _memory = background.hurried(memory).await?;
        let wide = background.hurried(wide.acquire()).await;
        let _wide = wide.map_err(|_| PullError::Crashed)?;
        let unpacked = self.start(&open, limits.zstd_window_log).await;
        crate::store::give_memory_back();
        unpacked
    }

    async fn start<R: Read + Send + 'static>(
        &self,
        open: &(impl Fn() -> Result<R, StoreError> + Clone + Send + 'static),
        window_log: u32,
    ) -> Result<LayerWriter, PullError> {
        let permit = Arc::new(self.unpackers.permit(&self.urgency).await);
        let (job, open) = (self.clone(), open.clone());
        super::resolve::blocking(move || job.unpack(open()?, window_log, permit)).await
    }

    /// Holds the permit until the work ends, also when nobody waits for it any more.
    fn unpack(
        &self,
        blob: impl Read + Send + 'static,
        window_log: u32,
        permit: Arc<Permit>,
    ) -> Result<LayerWriter, PullError> {
        let Shared { store, limits, .. } = &*self.unpackers.0;
        let zstd_window_log = limits.zstd_window_log.min(window_log);
        let limits = Limits { zstd_window_log, ..limits.clone() };
        let mut writer = store.write_layer(self.blob)?;
        let blob = GivingWay { input: blob, permit, checked: Instant::now() };
        archive::unpack(blob, &self.rule, self.permissions, &limits, &mut writer)?;
        Ok(writer)
    }
}

/// Permits have no host, and those of a tenant go to who came first.
fn ask(flight: &Arc<Progress>) -> Ask {
    Ask { urgency: Arc::clone(flight), artifact: 0, host: String::new() }
}

impl Permit {
    /// Whether anybody waits who could use it.
    fn is_wanted(&self) -> bool {
        let slot = self.slot.lock().unwrap_or_else(PoisonError::into_inner);
        slot.as_ref().is_some_and(|slot| self.unpackers.0.permits.is_wanted(slot))
    }

    /// Gives way to a tenant that holds fewer, and waits for the next permit. Blocking.
    fn give_way(&self) {
        let Shared { permits, paused, at_once, .. } = &*self.unpackers.0;
        let mut slot = self.slot.lock().unwrap_or_else(PoisonError::into_inner);
        if !slot.as_ref().is_some_and(|slot| permits.is_owed(slot)) {
            return;
        }
        // Its window stays in memory.
        let one_more = |paused: usize| (paused < *at_once).then_some(paused + 1);
        if paused.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_err() {
            return;
        }
        *slot = None;
        *slot = Some(Handle::current().block_on(permits.acquire(self.ask.clone())));
        paused.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<R: Read> Read for GivingWay<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.checked.elapsed() >= TENANT_CHECK {
            self.checked = Instant::now();
            self.permit.give_way();
        }
        self.input.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::MemoryPlan;
    use super::super::{Caller, Priority, Tenant};
    use super::*;
    use crate::store::StoreOptions;

    fn flight(namespace: &str) -> Arc<Progress> {
        let flight = Arc::new(Progress::default());
        flight.enter(&Caller::new(Priority::Pod, Tenant::Namespace(namespace.into())));
        flight
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_unpacking_gives_way_to_another_tenant_and_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), StoreOptions::default()).unwrap();
        let unpackers = Unpackers::new(
            store,
            Limits::default(),
            2,
            1,
            MemoryBudget::new(MemoryPlan::new(192 << 20, 2)),
            Background::none(),
        );
        let many = flight("many");
        let is_over = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let mut unpackings = Vec::new();
        for _ in 0..2 {
            let permit = Arc::new(unpackers.permit(&many).await);
            let is_over = Arc::clone(&is_over);
            unpackings.push(tokio::task::spawn_blocking(move || {
                let mut input =
                    GivingWay { input: std::io::repeat(0), permit, checked: Instant::now() };
                while !is_over.load(Ordering::Relaxed) {
                    let _ = input.read(&mut [0; 1024]);
                }
            }));
        }
        let few = unpackers.permit(&flight("few")).await;
        let mut same = Box::pin(unpackers.permit(&many));
        assert!(futures_util::poll!(&mut same).is_pending(), "the other one has more");
        assert_eq!(unpackers.0.paused.load(Ordering::Relaxed), 1);
        drop(few);
        is_over.store(true, Ordering::Relaxed);
        for unpacking in unpackings {
            unpacking.await.unwrap();
        }
        drop(same.await);
        assert_eq!(unpackers.0.paused.load(Ordering::Relaxed), 0);
        assert_eq!(unpackers.0.permits.taken(), 0);
    }
}
