//! How many bytes of documents are in memory at once: manifests, configurations, signatures.
//!
//! They are read whole before they mean anything. Each has its own limit, and all that come now have
//! this one; a registry has a part of it, so that one that lets its documents trickle leaves room for
//! the others'. Nobody who holds one waits for another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Of all registries: a thousand ordinary documents, or one configuration of the largest size with
/// two manifests of the largest beside it.
const BYTES: u32 = 24 << 20;
/// Of one registry.
const BYTES_OF_HOST: u32 = 16 << 20;

/// The room of one process.
#[derive(Debug)]
pub(super) struct Documents {
    all: Arc<Semaphore>,
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
        Self { all: Arc::new(Semaphore::new(BYTES as usize)), hosts: Mutex::default() }
    }
}

impl Documents {
    /// Waits for room for so many bytes of a registry; none at the driver's end. More than a
    /// registry may have is as much as all of it.
    pub(super) async fn hold(&self, host: &str, bytes: u64) -> Option<Held> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).clamp(1, BYTES_OF_HOST);
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
        let host_has = Arc::new(Semaphore::new(BYTES_OF_HOST as usize));
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
        let documents = Documents::default();
        let large = documents.hold("slow", u64::MAX).await.expect("room");
        let mut second = Box::pin(documents.hold("slow", 1));
        assert!(poll!(&mut second).is_pending(), "the registry has its part");
        let half = documents.hold("other", 8 << 20).now_or_never().flatten().expect("room");
        let mut third = Box::pin(documents.hold("third", 1));
        assert!(poll!(&mut third).is_pending(), "all is taken");
        drop(half);
        assert!(poll!(&mut third).is_ready());
        drop(large);
        assert!(poll!(&mut second).is_ready());
        drop((second, third));
        assert_eq!(documents.all.available_permits(), BYTES as usize);
    }
}
