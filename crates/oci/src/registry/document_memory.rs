//! Memory budget for documents: manifests, configurations, signatures.
//!
//! Documents are read whole before they are parsed. Each has its own limit, and two pools bound
//! their sum: most are a few KiB, and these never wait for the few large ones, which may take
//! minutes. One registry may use only a part of each pool, so that a registry that sends slowly
//! leaves memory for others. A task that holds a reservation never waits for another.

use std::sync::Arc;

use sys::weak_map::WeakMap;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Size limit of the small pool. Documents of unknown size start there until they turn out to be
/// larger.
pub(super) const SMALL: u64 = 256 << 10;
/// The pool of small documents: thousands of ordinary ones. To use it up, eight registries would
/// have to send four of the largest slowly at once, for which they have half a minute.
const SMALL_POOL: PoolBytes = PoolBytes { all: 8 << 20, of_host: 1 << 20 };
/// The pool of large documents: for one registry, one configuration of the largest size and two
/// manifests of the largest size.
const LARGE_POOL: PoolBytes = PoolBytes { all: 24 << 20, of_host: 16 << 20 };

/// The capacity of a pool in bytes.
#[derive(Clone, Copy)]
struct PoolBytes {
    all: u32,
    /// Part of the pool that one registry may use.
    of_host: u32,
}

/// Document memory of one process.
pub(super) struct DocumentMemory {
    small: DocumentPool,
    large: DocumentPool,
}

struct DocumentPool {
    all: Arc<Semaphore>,
    bytes_of_host: u32,
    hosts: WeakMap<String, Semaphore>,
}

/// Memory reservation for one document, while it is fetched and read.
#[derive(Debug)]
pub struct DocumentReservation {
    _of_host: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

impl Default for DocumentMemory {
    fn default() -> Self {
        Self { small: DocumentPool::new(SMALL_POOL), large: DocumentPool::new(LARGE_POOL) }
    }
}

impl DocumentMemory {
    /// Waits for memory for a document of a registry; `None` when the driver ends. A request for
    /// more than the share of a registry reserves all of the share.
    pub(super) async fn hold(&self, host: &str, bytes: u64) -> Option<DocumentReservation> {
        let pool = if bytes <= SMALL { &self.small } else { &self.large };
        pool.hold(host, bytes).await
    }
}

impl DocumentPool {
    fn new(bytes: PoolBytes) -> Self {
        let all = Arc::new(Semaphore::new(bytes.all as usize));
        Self { all, bytes_of_host: bytes.of_host, hosts: WeakMap::default() }
    }

    async fn hold(&self, host: &str, bytes: u64) -> Option<DocumentReservation> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).clamp(1, self.bytes_of_host);
        let of_host =
            self.hosts.get(host.to_owned(), || Semaphore::new(self.bytes_of_host as usize));
        let of_host = of_host.acquire_many_owned(bytes).await.ok()?;
        let of_all = Arc::clone(&self.all).acquire_many_owned(bytes).await.ok()?;
        Some(DocumentReservation { _of_host: of_host, _of_all: of_all })
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt as _, poll};

    use super::*;

    #[tokio::test]
    async fn pools_bound_each_registry_and_all_together() {
        for (pool, part) in [
            (DocumentPool::new(SMALL_POOL), SMALL_POOL.of_host),
            (DocumentPool::new(LARGE_POOL), LARGE_POOL.of_host),
        ] {
            let all = pool.all.available_permits();
            let large = pool.hold("slow", u64::MAX).await.expect("room");
            let mut second = Box::pin(pool.hold("slow", 1));
            assert!(poll!(&mut second).is_pending(), "the registry has its part");
            let mut rest = Vec::new();
            while pool.all.available_permits() > 0 {
                let bytes = pool.all.available_permits().min(part as usize) as u64;
                let host = format!("other{}", rest.len());
                rest.push(pool.hold(&host, bytes).now_or_never().flatten().expect("room"));
            }
            let mut third = Box::pin(pool.hold("third", 1));
            assert!(poll!(&mut third).is_pending(), "all is taken");
            drop(rest);
            assert!(poll!(&mut third).is_ready());
            drop(large);
            assert!(poll!(&mut second).is_ready());
            drop((second, third));
            assert_eq!(pool.all.available_permits(), all);
        }
    }

    #[tokio::test]
    async fn small_documents_do_not_wait_for_large_ones() {
        let documents = DocumentMemory::default();
        let _large = documents.hold("slow", 16 << 20).await.expect("room");
        let _other = documents.hold("slow too", 8 << 20).await.expect("room");
        let mut queued = Box::pin(documents.hold("quick", 1 << 20));
        assert!(poll!(&mut queued).is_pending());
        assert!(documents.hold("quick", SMALL).now_or_never().flatten().is_some());
        assert!(documents.hold("slow", 2048).now_or_never().flatten().is_some());
    }
}
