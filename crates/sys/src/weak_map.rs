//! Values by key, each shared while it is in use.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

/// A map of the values that are in use.
pub struct WeakMap<K, V>(Mutex<HashMap<K, Weak<V>>>);

impl<K: Eq + Hash, V> WeakMap<K, V> {
    /// Returns the value of a key, and makes it if it is not in use.
    pub fn get(&self, key: K, make: impl FnOnce() -> V) -> Arc<V> {
        let mut values = self.0.lock();
        values.retain(|_, value| value.strong_count() > 0);
        let known = values.get(&key).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let value = Arc::new(make());
            values.insert(key, Arc::downgrade(&value));
            value
        })
    }
}

impl<K, V> Default for WeakMap<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_shared_while_in_use_and_then_forgotten() {
        let values = WeakMap::default();
        drop(values.get("a", || 1));
        let held = values.get("b", || 2);
        assert_eq!(values.0.lock().len(), 1);
        assert!(Arc::ptr_eq(&held, &values.get("b", || 3)));
    }
}
