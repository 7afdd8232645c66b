//! One piece of work at a time for each key.

use std::hash::Hash;

use sys::weak_map::WeakMap;
use tokio::sync::{Mutex, OwnedMutexGuard};

/// A lock for each key that is in use.
pub(super) struct KeyedLocks<K>(WeakMap<K, Mutex<()>>);

impl<K> Default for KeyedLocks<K> {
    fn default() -> Self {
        Self(WeakMap::default())
    }
}

impl<K: Eq + Hash> KeyedLocks<K> {
    /// Waits for the lock of a key.
    pub(super) async fn lock(&self, key: K) -> OwnedMutexGuard<()> {
        self.0.get(key, Mutex::default).lock_owned().await
    }
}
