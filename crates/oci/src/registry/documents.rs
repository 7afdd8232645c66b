//! How many bytes of documents are in memory at once: manifests, configurations, signatures.
//!
//! They are read whole before they mean anything. Each has its own limit, and all that come now have
//! two: most are a few KiB, and these never wait for one of the few that are large, which may take
//! minutes. A registry has a part of each, so that one that lets its documents trickle leaves room
//! for the others'. Nobody who holds one waits for another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The largest of the small documents. What does not say how large it is is one of them until it
/// turns out to be larger.
pub(super) const SMALL: u64 = 256 << 10;
/// Of all small ones, and of those of one registry: thousands of ordinary documents. To take all of
/// it, eight registries must each trickle four of the largest at once, which have half a minute.
const SMALL_POOL: PoolBytes = PoolBytes { all: 8 << 20, of_host: 1 << 20 };
/// Of all large ones, and of those of one registry: one configuration of the largest size with two
/// manifests of the largest beside it.
const LARGE_POOL: PoolBytes = PoolBytes { all: 24 << 20, of_host: 16 << 20 };

/// The capacity of a pool in bytes.
#[derive(Clone, Copy)]
struct PoolBytes {
    all: u32,
    /// The part of it that one registry may have.
    of_host: u32,
}

/// The room of one process.
#[derive(Debug)]
pub(super) struct Documents {
    small: Pool,
    large: Pool,
}

#[derive(Debug)]
struct Pool {
    all: Arc<Semaphore>,
    bytes_of_host: u32,
    hosts: Mutex<HashMap<String, Weak<Semaphore>>>,
}

/// Room for one document, while it is fetched and read.
#[derive(Debug)]
pub struct Held {
    _of_host: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

impl Default for Documents {
    fn default() -> Self {
        Self { small: Pool::new(SMALL_POOL), large: Pool::new(LARGE_POOL) }
    }
}

impl Documents {
    /// Waits for room for so many bytes of a registry; none at the driver's end. More than a
    /// registry may have is as much as all of it.
    pub(super) async fn hold(&self, host: &str, bytes: u64) -> Option<Held> {
        let pool = if bytes <= SMALL { &self.small } else { &self.large };
        pool.hold(host, bytes).await
    }
}

impl Pool {
    fn new(bytes: PoolBytes) -> Self {
        let all = Arc::new(Semaphore::new(bytes.all as usize));
        Self { all, bytes_of_host: bytes.of_host, hosts: Mutex::default() }
    }

    async fn hold(&self, host: &str, bytes: u64) -> Option<Held> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).clamp(1, self.bytes_of_host);
        let of_host = self.of_host(host).acquire_many_owned(bytes).await.ok()?;
        let of_all = Arc::clone(&self.all).acquire_many_owned(bytes).await.ok()?;
        Some(Held { _of_host: of_host, _of_all: of_all })
    }

    fn of_host(&self, host: &str) -> Arc<Semaphore> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = hosts.get(host).and_then(Weak::upgrade) {
            return known;
        }
        hosts.retain(|_, host| host.strong_count() > 0);
        let host_has = Arc::new(Semaphore::new(self.bytes_of_host as usize));
        hosts.insert(host.to_owned(), Arc::downgrade(&host_has));
        host_has
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt as _, poll};

    use super::*;

    #[tokio::test]
    async fn a_registry_leaves_room_for_others_and_all_have_one_bound() {
        for (pool, part) in [
            (Pool::new(SMALL_POOL), SMALL_POOL.of_host),
            (Pool::new(LARGE_POOL), LARGE_POOL.of_host),
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
    async fn a_small_document_waits_for_no_large_one() {
        let documents = Documents::default();
        let _large = documents.hold("slow", 16 << 20).await.expect("room");
        let _other = documents.hold("slow too", 8 << 20).await.expect("room");
        let mut queued = Box::pin(documents.hold("quick", 1 << 20));
        assert!(poll!(&mut queued).is_pending());
        assert!(documents.hold("quick", SMALL).now_or_never().flatten().is_some());
        assert!(documents.hold("slow", 2048).now_or_never().flatten().is_some());
    }
}
