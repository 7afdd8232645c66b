//! The memory budget of all pulls of this node.
//!
//! ```text
//! memory_ledger           the bookkeeping of one pool: turns and shares of tenants
//! container_memory_limit  the memory limit of the container, from which the default budget follows
//! memory_check            whether the budget and the limits fit into that memory
//! ```
//!
//! The budget is divided by how long memory is held, so that no stage of a pull waits for a stage
//! that may itself wait:
//!
//! | part | held | by |
//! | --- | --- | --- |
//! | fixed | always | buffers of downloads, windows and buffers of [`MemoryPlan::new`]'s unpackings |
//! | kept | while a registry sends bytes | lists of layers |
//! | small | during a computation | parsed manifests, plans of small trees |
//! | large | during a computation | plans of large trees, windows above 8 MiB |
//!
//! A stage reserves all its memory at once, before it takes a permit or a lock. A holder of `kept`
//! may wait for `small` or `large`. A holder of `small` or `large` waits for no memory, and for no
//! permit whose holder waits for a registry. So each wait ends when computations end. Small requests
//! never wait for large ones.
//!
//! An unpacking that is paused for another tenant keeps its window beside the budget. As many are
//! paused as may run at once, which [`crate::PullOptions::check_memory`] counts.
//!
//! Publishes of cached trees and unpublishes reserve no memory.

mod container_memory_limit;
mod memory_check;
mod memory_ledger;

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;

pub use container_memory_limit::container_limit;
use memory_ledger::{MemoryGrant, MemoryLedger, RequestId, TenantShare};

use text::human_units::Bytes;

/// The default budget without a container limit: three eighths of the chart's 512 MiB.
const DEFAULT_BYTES: u64 = 192 << 20;

/// Memory of one unpacking: a zstd window of 8 MiB, the state of the decoder, and the buffers between
/// its threads.
const BYTES_PER_UNPACK: u64 = 9 << 20;

/// Memory of all buffers between network and disk (see [`super::download_resources`]).
const DOWNLOAD_BYTES: u64 = 3 << 20;

/// Memory that the process takes beside the budget: the process itself, its threads and connections,
/// and documents from registries, which are limited to 32 MiB.
const PROCESS_BYTES: u64 = 64 << 20;

/// Memory that a pull keeps for each layer while it waits for a registry: the descriptor, the rule,
/// the flight, and the state in the store.
pub(super) const BYTES_PER_PART: u64 = 1024;

/// Memory for each byte of a manifest while it is parsed: the byte itself, and three times as much for
/// a descriptor of the shortest possible layer.
pub(super) const BYTES_PER_MANIFEST_BYTE: u64 = 4;

/// The largest zstd window without a reservation. The format asks every decoder to support it.
pub(super) const PLAIN_WINDOW: u64 = 8 << 20;

/// The least growth between two tries of a computation.
const SMALLEST_STEP: u64 = 64 << 10;

/// Interval at which a request that waits reports its state again.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// The memory budget of a node, shared fairly between tenants. Cheap to clone.
#[derive(Clone)]
pub struct MemoryBudget<T: Clone + Eq + Hash> {
    kept: Arc<MemoryPool<T>>,
    small: Arc<MemoryPool<T>>,
    large: Arc<MemoryPool<T>>,
}

/// A number of bytes that are reserved until this is dropped.
pub struct MemoryReservation<T: Clone + Eq + Hash> {
    pool: Arc<MemoryPool<T>>,
    tenant: T,
    bytes: u64,
}

/// The state of a request that waits for memory, as users see it. All numbers are bytes of one pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryWait {
    /// The requested bytes.
    pub needs: u64,
    /// The bytes that are not held.
    pub free: u64,
    /// The size of the pool.
    pub capacity: u64,
    /// The bytes that the tenant of the request holds.
    pub held: u64,
    /// The most bytes that this tenant may hold now.
    pub share: u64,
}

/// A request for more memory than the budget can ever give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "it needs {} of memory, and the node has at most {} for one artifact (pull.memory): select less of it with include or exclude, push it with fewer entries or layers, or raise pull.memory",
    Bytes(self.needs),
    Bytes(self.most)
)]
pub struct NeverFits {
    /// The requested bytes.
    pub needs: u64,
    /// The size of the largest possible request.
    pub most: u64,
}

/// The division of a budget, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The whole budget.
    pub total: u64,
    /// The part that counts as always taken.
    pub fixed: u64,
    /// The part for memory that pulls keep while they wait for a registry.
    pub kept: u64,
    /// The part that small computations share.
    pub small: u64,
    /// The part that large computations share.
    pub large: u64,
}

struct MemoryPool<T: Clone + Eq + Hash> {
    state: Mutex<PoolState<T>>,
    most: u64,
}

struct PoolState<T: Clone + Eq + Hash> {
    ledger: MemoryLedger<T>,
    waiting: HashMap<RequestId, oneshot::Sender<MemoryReservation<T>>>,
}

impl MemoryPlan {
    /// Divides `total` bytes for a node that unpacks `unpacks` layers at once.
    pub fn new(total: u64, unpacks: usize) -> Self {
        let fixed = BYTES_PER_UNPACK.saturating_mul(unpacks as u64).saturating_add(DOWNLOAD_BYTES);
        let (kept, small) = (total / 8, total / 48);
        // Windows of 8 MiB are rare. A small node keeps half for everything else.
        let taken = fixed.min(total / 2).saturating_add(kept).saturating_add(small);
        Self { total, fixed, kept, small, large: total.saturating_sub(taken) }
    }

    /// Returns the default budget: three eighths of the container's limit.
    pub fn default_bytes(container_limit: Option<u64>) -> u64 {
        container_limit.map_or(DEFAULT_BYTES, |limit| limit / 8 * 3)
    }
}

impl<T: Clone + Eq + Hash> MemoryBudget<T> {
    /// Returns a budget without reservations.
    pub fn new(plan: MemoryPlan) -> Self {
        let pool = |bytes, share| Arc::new(MemoryPool::new(bytes, share));
        Self {
            kept: pool(plan.kept, TenantShare::HalfOfTheRest),
            small: pool(plan.small, TenantShare::HalfWhileOthersWait),
            large: pool(plan.large, TenantShare::HalfWhileOthersWait),
        }
    }

    /// Waits for memory that a pull keeps while it waits for a registry. `waits` is called with the
    /// state of the request when it has to wait, and with none at the end. Safe to cancel.
    ///
    /// # Errors
    ///
    /// [`NeverFits`].
    pub async fn keep(
        &self,
        tenant: T,
        bytes: u64,
        waits: impl Fn(Option<MemoryWait>),
    ) -> Result<MemoryReservation<T>, NeverFits> {
        self.kept.reserve(tenant, bytes, waits).await
    }

    /// Reserves memory that a pull keeps, as [`Self::keep`] does. None if it would have to wait.
    #[must_use]
    pub fn try_keep(&self, tenant: T, bytes: u64) -> Option<MemoryReservation<T>> {
        self.kept.try_reserve(tenant, bytes)
    }

    /// Waits for the memory of a computation, as [`Self::keep`] does. A task that holds such a
    /// reservation must not wait for another one. Safe to cancel.
    ///
    /// # Errors
    ///
    /// [`NeverFits`].
    pub async fn compute(
        &self,
        tenant: T,
        bytes: u64,
        waits: impl Fn(Option<MemoryWait>),
    ) -> Result<MemoryReservation<T>, NeverFits> {
        let pool = if bytes <= self.small.most { &self.small } else { &self.large };
        pool.reserve(tenant, bytes, waits).await
    }

    /// Returns the most bytes that one computation can reserve.
    pub fn most(&self) -> u64 {
        self.large.most.max(self.small.most)
    }

    /// Returns the bytes to reserve after a computation has stopped because `bytes` were too few, and
    /// it needs `needs` as far as known. They grow by half at least, so that a few tries are enough.
    /// After a try with [`Self::most`] bytes they never fit.
    pub fn bytes_of_next_try(&self, bytes: u64, needs: u64) -> u64 {
        let more = bytes.saturating_add((bytes / 2).max(SMALLEST_STEP)).max(needs);
        if bytes < self.most() { more.min(self.most()) } else { more }
    }
}

impl<T: Clone + Eq + Hash> MemoryPool<T> {
    fn new(capacity: u64, share: TenantShare) -> Self {
        let ledger = MemoryLedger::new(capacity, share);
        let most = ledger.largest_request();
        Self { state: Mutex::new(PoolState { ledger, waiting: HashMap::new() }), most }
    }

    async fn reserve(
        self: &Arc<Self>,
        tenant: T,
        bytes: u64,
        waits: impl Fn(Option<MemoryWait>),
    ) -> Result<MemoryReservation<T>, NeverFits> {
        if bytes > self.most {
            return Err(NeverFits { needs: bytes, most: self.most });
        }
        loop {
            let mut request = self.request(tenant.clone(), bytes);
            if let Ok(reservation) = request.granted.try_recv() {
                return Ok(reservation);
            }
            let granted = loop {
                waits(Some(self.state.lock().ledger.state_of(&tenant, bytes)));
                let granted = tokio::time::timeout(REPORT_INTERVAL, &mut request.granted);
                if let Ok(granted) = granted.await {
                    break granted;
                }
            };
            waits(None);
            // Fails only if the reservation was dropped with the channel; then it is requested again.
            if let Ok(reservation) = granted {
                return Ok(reservation);
            }
        }
    }

    fn try_reserve(self: &Arc<Self>, tenant: T, bytes: u64) -> Option<MemoryReservation<T>> {
        if bytes > self.most {
            return None;
        }
        self.request(tenant, bytes).granted.try_recv().ok()
    }

    /// Queues a request of at most `most` bytes, and grants what can be granted now.
    fn request(self: &Arc<Self>, tenant: T, bytes: u64) -> PendingRequest<'_, T> {
        let (grant, granted) = oneshot::channel();
        let id = {
            let mut state = self.state.lock();
            let id = state.ledger.request(tenant.clone(), bytes);
            state.waiting.insert(id, grant);
            id
        };
        self.distribute();
        PendingRequest { pool: self, tenant, id, granted }
    }

    /// Grants the requests that can be granted now.
    fn distribute(self: &Arc<Self>) {
        let mut state = self.state.lock();
        // Dropped after the lock is released, which dropping a reservation takes.
        let mut left = Vec::new();
        while let Some(MemoryGrant { id, tenant, bytes }) = state.ledger.grant() {
            let reservation = MemoryReservation { pool: Arc::clone(self), tenant, bytes };
            match state.waiting.remove(&id) {
                Some(grant) => left.extend(grant.send(reservation).err()),
                None => left.push(reservation),
            }
        }
        drop(state);
    }
}

/// A request that may have been granted. Dropping it withdraws the request or returns the bytes.
struct PendingRequest<'a, T: Clone + Eq + Hash> {
    pool: &'a Arc<MemoryPool<T>>,
    tenant: T,
    id: RequestId,
    granted: oneshot::Receiver<MemoryReservation<T>>,
}

impl<T: Clone + Eq + Hash> Drop for PendingRequest<'_, T> {
    fn drop(&mut self) {
        let mut state = self.pool.state.lock();
        if state.waiting.remove(&self.id).is_some() {
            state.ledger.withdraw(&self.tenant, self.id);
            drop(state);
            // Other requests may have waited for this one.
            self.pool.distribute();
        }
    }
}

impl<T: Clone + Eq + Hash> MemoryReservation<T> {
    /// Reduces the reservation to `bytes`.
    pub fn shrink(&mut self, bytes: u64) {
        let surplus = self.bytes.saturating_sub(bytes);
        if surplus > 0 {
            self.bytes -= surplus;
            self.pool.state.lock().ledger.release(&self.tenant, surplus);
            self.pool.distribute();
        }
    }

    /// Returns the number of reserved bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl<T: Clone + Eq + Hash> Drop for MemoryReservation<T> {
    fn drop(&mut self) {
        self.pool.state.lock().ledger.release(&self.tenant, self.bytes);
        self.pool.distribute();
    }
}

impl fmt::Display for MemoryWait {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { needs, free, capacity, held, share } = *self;
        write!(
            formatter,
            "waits for memory (pull.memory): needs {}, {} of {} are free, and its namespace holds {} of at most {}",
            Bytes(needs),
            Bytes(free),
            Bytes(capacity),
            Bytes(held),
            Bytes(share)
        )
    }
}

#[cfg(test)]
mod tests;
