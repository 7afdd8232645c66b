//! A layer that is unpacked while it is downloaded.
//!
//! Unpacking follows the hashed bytes into staging. Its outcome counts only when the
//! whole blob is verified: until then nothing has a name, and a refusal may be the
//! fault of bytes that are not the blob's. A layer that waits for a slow wire gives its
//! turn to layers that are here, and is unpacked when it is here itself.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;

use super::error::PullError;
use super::progress::Progress;
use super::want::Priority;
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
/// Verdicts that are remembered.
const MAXIMUM_REFUSALS: usize = 1024;

/// Who may unpack, on this node.
#[derive(Clone)]
pub struct Unpackers(Arc<Shared>);

struct Shared {
    store: Store,
    limits: Limits,
    permits: Arc<Semaphore>,
    /// Warming needs one of these besides: half of them, so that a pod need not wait for it.
    behind: Arc<Semaphore>,
    most_behind: usize,
    background: Background,
    /// Layers that are here and wait for a permit.
    waiting: AtomicUsize,
    /// The same of warming, which have no right to the others' half.
    waiting_behind: AtomicUsize,
    /// For windows that take a lot of memory.
    wide: Semaphore,
    refusals: Mutex<Refusals>,
}

/// What was refused, and why: a function of its bytes and of limits that do not change while
/// the process runs. By repository, since the reason may quote the content.
#[derive(Default)]
struct Refusals(VecDeque<(String, LayerKey, Arc<PullError>)>);

/// The right to do work that takes memory and disk.
pub struct Permit {
    _one_of_all: OwnedSemaphorePermit,
    one_behind: Option<OwnedSemaphorePermit>,
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
        background: Background,
    ) -> Self {
        let most_behind = (at_once / 2).max(1);
        Self(Arc::new(Shared {
            store,
            limits,
            permits: Arc::new(Semaphore::new(at_once.max(1))),
            behind: Arc::new(Semaphore::new(most_behind)),
            most_behind,
            background,
            waiting: AtomicUsize::new(0),
            waiting_behind: AtomicUsize::new(0),
            wide: Semaphore::new(wide.max(1)),
            refusals: Mutex::default(),
        }))
    }

    /// Waits for the right to do work that takes memory and disk, for a flight of this urgency.
    pub async fn permit(&self, urgency: &Progress) -> Result<Permit, PullError> {
        let acquire = async |permits: &Arc<Semaphore>| {
            let permit = Arc::clone(permits).acquire_owned().await;
            permit.map_err(|_| PullError::Crashed)
        };
        let raised = urgency.raised();
        let behind = if urgency.priority() == Priority::Warm {
            let _waiting = WaitingForPermit::new(&self.0.waiting_behind);
            tokio::select! {
                permit = acquire(&self.0.behind) => Some(permit?),
                () = raised => None,
            }
        } else {
            None
        };
        let _waiting = WaitingForPermit::new(&self.0.waiting);
        let waiting = acquire(&self.0.permits);
        let permit = if self.0.behind.available_permits() == self.0.most_behind {
            waiting.await
        } else {
            // What warming has it may hold on to while it gives way.
            self.0.background.hurried(waiting).await
        };
        Ok(Permit { _one_of_all: permit?, one_behind: behind })
    }

    /// The same, if it is to be had at once.
    fn free_permit(&self, urgency: &Progress) -> Option<Permit> {
        let acquire = |permits: &Arc<Semaphore>| Arc::clone(permits).try_acquire_owned().ok();
        let behind = match urgency.priority() {
            Priority::Warm => Some(acquire(&self.0.behind)?),
            Priority::Pod => None,
        };
        Some(Permit { _one_of_all: acquire(&self.0.permits)?, one_behind: behind })
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
            let is_behind = permit.one_behind.is_some();
            let (job, since) = (self.clone(), Instant::now());
            follower.gives_way_if(move |waited| {
                let elapsed = since.elapsed();
                let Shared { waiting, waiting_behind, .. } = &*job.unpackers.0;
                let is_wanted = waiting.load(Ordering::Relaxed) > 0
                    || is_behind && waiting_behind.load(Ordering::Relaxed) > 0;
                is_wanted && elapsed > PATIENCE && waited * 2 > elapsed
            });
            let job = self.clone();
            tokio::task::spawn_blocking(move || {
                let _permit = permit;
                job.unpack(follower, PLAIN_WINDOW_LOG)
            })
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
        let Shared { wide, background, .. } = &*self.unpackers.0;
        // What warming has it may hold on to while it gives way.
        let wide = background.hurried(wide.acquire()).await;
        let _wide = wide.map_err(|_| PullError::Crashed)?;
        self.start(&open, self.unpackers.0.limits.zstd_window_log).await
    }

    async fn start<R: Read + Send + 'static>(
        &self,
        open: &(impl Fn() -> Result<R, StoreError> + Clone + Send + 'static),
        window_log: u32,
    ) -> Result<LayerWriter, PullError> {
        let permit = self.unpackers.permit(&self.urgency).await?;
        let (job, open) = (self.clone(), open.clone());
        super::resolve::blocking(move || {
            // Held until the work ends, also when nobody waits for it any more.
            let _permit = permit;
            job.unpack(open()?, window_log)
        })
        .await
    }

    fn unpack(
        &self,
        blob: impl Read + Send + 'static,
        window_log: u32,
    ) -> Result<LayerWriter, PullError> {
        let Shared { store, limits, .. } = &*self.unpackers.0;
        let zstd_window_log = limits.zstd_window_log.min(window_log);
        let limits = Limits { zstd_window_log, ..limits.clone() };
        let mut writer = store.write_layer(self.blob)?;
        archive::unpack(blob, &self.rule, self.permissions, &limits, &mut writer)?;
        Ok(writer)
    }
}

struct WaitingForPermit<'a>(&'a AtomicUsize);

impl<'a> WaitingForPermit<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for WaitingForPermit<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
