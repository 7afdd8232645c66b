//! The memory that content of others may take on this node: one budget for all pulls.
//!
//! ```text
//! ledger     who gets memory next; pure
//! container  the limit of the container, from which the budget's default follows
//! ```
//!
//! The budget is divided by how long memory is held, so that no stage of a pull waits for one that
//! may itself wait:
//!
//! | part | held | by |
//! | --- | --- | --- |
//! | fixed | always | buffers of downloads, windows and buffers of layers that are unpacked |
//! | kept | while a registry sends bytes | the list of an artifact's layers |
//! | small | while something is computed | manifests that are parsed, plans of small trees |
//! | large | while something is computed | plans of large trees, windows above 8 MiB |
//!
//! A stage reserves all that it needs at once, before it takes a permit or a lock, and never a
//! second time. Who holds `kept` may wait for `small` or `large`; who holds one of these waits for
//! no memory. So each wait ends when computations end. Small needs never wait for large ones.
//!
//! Publishes of cached trees and unpublishes reserve nothing.

mod container;
mod ledger;

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

pub use container::container_limit;
use ledger::{Ledger, RequestId, Share};

use crate::units::Bytes;

/// The budget without a limit of the container: three eighths of 512 MiB, which the chart sets.
const DEFAULT_BYTES: u64 = 192 << 20;

/// Layers that are unpacked: a zstd window of 8 MiB, what zstd keeps beside it, and the buffers
/// between its threads.
const BYTES_PER_UNPACK: u64 = 9 << 20;

/// Buffers between network and disk, of pods and of warming (see [`super::wire`]).
const DOWNLOAD_BYTES: u64 = 3 << 20;

/// What a process takes beside the budget: itself, its threads, its connections, and documents that
/// registries send, which have a bound of their own of 32 MiB.
pub const BYTES_BESIDE: u64 = 64 << 20;

/// What a pull keeps for each layer while it waits for a registry: the descriptor, the rule, the
/// flight, and what is held in the store.
pub const BYTES_PER_PART: u64 = 1024;

/// What a manifest takes while it is parsed: itself, and for each of its shortest possible layers
/// three times as much.
pub const BYTES_PER_MANIFEST_BYTE: u64 = 4;

/// The largest zstd window that needs no reservation of its own: what the format asks every decoder
/// to take.
pub const PLAIN_WINDOW: u64 = 8 << 20;

/// The budget of a node, shared fairly between tenants. Cheap to clone.
#[derive(Debug)]
pub struct MemoryBudget<T: Clone + Eq + Hash> {
    kept: Arc<Pool<T>>,
    small: Arc<Pool<T>>,
    large: Arc<Pool<T>>,
}

/// Bytes that are reserved until this is dropped.
#[derive(Debug)]
pub struct Reservation<T: Clone + Eq + Hash> {
    pool: Arc<Pool<T>>,
    tenant: T,
    bytes: u64,
}

/// Why a stage does not go on: what it needs, and what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryWait {
    /// Bytes that it needs.
    pub needs: u64,
    /// Bytes that nobody holds, of those that it may get.
    pub free: u64,
    /// The most that it could get.
    pub most: u64,
}

/// More than the budget has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "it needs {} of memory, and the node has at most {} for one artifact (pull.memory): select less of it with include or exclude, push it with fewer entries or layers, or raise pull.memory",
    Bytes(self.needs),
    Bytes(self.most)
)]
pub struct NeverFits {
    /// Bytes that it needs.
    pub needs: u64,
    /// The most that it could get.
    pub most: u64,
}

/// How a budget is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// All of it.
    pub total: u64,
    /// What is always taken.
    pub fixed: u64,
    /// What all pulls may keep while they wait for a registry.
    pub kept: u64,
    /// What small computations share.
    pub small: u64,
    /// What large computations share.
    pub large: u64,
}

#[derive(Debug)]
struct Pool<T: Clone + Eq + Hash> {
    state: Mutex<State<T>>,
    most: u64,
}

#[derive(Debug)]
struct State<T: Clone + Eq + Hash> {
    ledger: Ledger<T>,
    waiting: HashMap<RequestId, oneshot::Sender<Reservation<T>>>,
}

impl MemoryPlan {
    /// Divides `total` bytes on a node that unpacks so many layers at once.
    #[must_use]
    pub fn new(total: u64, unpacks: usize) -> Self {
        let fixed = BYTES_PER_UNPACK.saturating_mul(unpacks as u64).saturating_add(DOWNLOAD_BYTES);
        let (kept, small) = (total / 8, total / 48);
        // Windows of 8 MiB are rare; a small node is not to refuse all else for them.
        let taken = fixed.min(total / 2).saturating_add(kept).saturating_add(small);
        Self { total, fixed, kept, small, large: total.saturating_sub(taken) }
    }

    /// The budget where nothing is configured: three eighths of the container's limit.
    #[must_use]
    pub fn default_bytes(container_limit: Option<u64>) -> u64 {
        container_limit.map_or(DEFAULT_BYTES, |limit| limit / 8 * 3)
    }
}

impl<T: Clone + Eq + Hash> MemoryBudget<T> {
    /// A budget of which nothing is reserved.
    #[must_use]
    pub fn new(plan: MemoryPlan) -> Self {
        let pool = |bytes, share| Arc::new(Pool::new(bytes, share));
        Self {
            kept: pool(plan.kept, Share::HalfOfTheRest),
            small: pool(plan.small, Share::HalfWhileOthersWait),
            large: pool(plan.large, Share::HalfWhileOthersWait),
        }
    }

    /// Reserves what a pull keeps while it waits for a registry. `waits` is told what it waits for,
    /// and nothing once it goes on. Safe to cancel.
    ///
    /// # Errors
    ///
    /// [`NeverFits`].
    pub async fn keep(
        &self,
        tenant: T,
        bytes: u64,
        waits: impl Fn(Option<MemoryWait>),
    ) -> Result<Reservation<T>, NeverFits> {
        self.kept.reserve(tenant, bytes, waits).await
    }

    /// Reserves what a computation takes. A task that holds such a reservation must not wait for
    /// another. Safe to cancel.
    ///
    /// # Errors
    ///
    /// [`NeverFits`].
    pub async fn compute(
        &self,
        tenant: T,
        bytes: u64,
        waits: impl Fn(Option<MemoryWait>),
    ) -> Result<Reservation<T>, NeverFits> {
        let pool = if bytes <= self.small.most { &self.small } else { &self.large };
        pool.reserve(tenant, bytes, waits).await
    }

    /// The most that one computation can get.
    #[must_use]
    pub fn most(&self) -> u64 {
        self.large.most.max(self.small.most)
    }
}

impl<T: Clone + Eq + Hash> Clone for MemoryBudget<T> {
    fn clone(&self) -> Self {
        let Self { kept, small, large } = self;
        Self { kept: Arc::clone(kept), small: Arc::clone(small), large: Arc::clone(large) }
    }
}

impl<T: Clone + Eq + Hash> Pool<T> {
    fn new(capacity: u64, share: Share) -> Self {
        let ledger = Ledger::new(capacity, share);
        let most = ledger.most();
        Self { state: Mutex::new(State { ledger, waiting: HashMap::new() }), most }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn reserve(
        self: &Arc<Self>,
        tenant: T,
        bytes: u64,
        waits: impl Fn(Option<MemoryWait>),
    ) -> Result<Reservation<T>, NeverFits> {
        if bytes > self.most {
            return Err(NeverFits { needs: bytes, most: self.most });
        }
        loop {
            let (grant, mut granted) = oneshot::channel();
            let id = {
                let mut state = self.lock();
                let id = state.ledger.request(tenant.clone(), bytes);
                state.waiting.insert(id, grant);
                id
            };
            let _withdrawing = Withdrawing { pool: self, tenant: &tenant, id };
            self.distribute();
            if let Ok(reservation) = granted.try_recv() {
                return Ok(reservation);
            }
            let free = self.lock().ledger.free();
            waits(Some(MemoryWait { needs: bytes, free, most: self.most }));
            let granted = granted.await;
            waits(None);
            // A sender goes only with its reservation in it.
            if let Ok(reservation) = granted {
                return Ok(reservation);
            }
        }
    }

    /// Grants what can be granted.
    fn distribute(self: &Arc<Self>) {
        let mut state = self.lock();
        // Outlives the lock: dropping a reservation takes it.
        let mut left = Vec::new();
        while let Some(ledger::Grant { id, tenant, bytes }) = state.ledger.grant() {
            let reservation = Reservation { pool: Arc::clone(self), tenant, bytes };
            match state.waiting.remove(&id) {
                Some(grant) => left.extend(grant.send(reservation).err()),
                None => left.push(reservation),
            }
        }
        drop(state);
    }
}

/// Withdraws a request when its caller goes away.
struct Withdrawing<'a, T: Clone + Eq + Hash> {
    pool: &'a Arc<Pool<T>>,
    tenant: &'a T,
    id: RequestId,
}

impl<T: Clone + Eq + Hash> Drop for Withdrawing<'_, T> {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        if state.waiting.remove(&self.id).is_some() {
            state.ledger.withdraw(self.tenant, self.id);
            drop(state);
            // It may have been the one that others had to wait for.
            self.pool.distribute();
        }
    }
}

impl<T: Clone + Eq + Hash> Reservation<T> {
    /// Gives back all but so many bytes.
    pub fn shrink(&mut self, bytes: u64) {
        let surplus = self.bytes.saturating_sub(bytes);
        if surplus > 0 {
            self.bytes -= surplus;
            self.pool.lock().ledger.release(&self.tenant, surplus);
            self.pool.distribute();
        }
    }

    /// Bytes that are reserved.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl<T: Clone + Eq + Hash> Drop for Reservation<T> {
    fn drop(&mut self) {
        self.pool.lock().ledger.release(&self.tenant, self.bytes);
        self.pool.distribute();
    }
}

impl fmt::Display for MemoryWait {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { needs, free, most } = *self;
        let (needs, free, most) = (Bytes(needs), Bytes(free), Bytes(most));
        write!(formatter, "waits for memory: needs {needs} of {most}, {free} free (pull.memory)")
    }
}

#[cfg(test)]
mod tests;
