//! Allows one attach or detach at a target at a time. Nothing slow happens under this lock.
//!
//! A publish that waits for a pull holds no lock. It only remembers the turn of its target at its start: an unpublish
//! begins a new turn, and a publish of an earlier turn no longer attaches.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sys::weak_map::WeakMap;
use tokio::sync::OwnedMutexGuard;

/// The targets of all running calls.
#[derive(Default)]
pub struct TargetLocks(WeakMap<PathBuf, TargetEntry>);

#[derive(Default)]
struct TargetEntry {
    busy: Arc<tokio::sync::Mutex<()>>,
    turn: AtomicU64,
}

/// A call's interest in a target, from its start to its end.
#[derive(Clone)]
pub struct TargetTurn {
    entry: Arc<TargetEntry>,
    turn: u64,
}

/// The lock of one target. Dropping it lets the next call start.
pub type TargetLock = OwnedMutexGuard<()>;

impl TargetLocks {
    /// Registers a publish that begins.
    pub fn begin_publish(&self, target: &Path) -> TargetTurn {
        let entry = self.entry(target);
        let turn = entry.turn.load(Ordering::SeqCst);
        TargetTurn { entry, turn }
    }

    /// Registers an unpublish that begins: publishes that began before no longer attach.
    pub fn begin_unpublish(&self, target: &Path) -> TargetTurn {
        let entry = self.entry(target);
        let turn = entry.turn.fetch_add(1, Ordering::SeqCst) + 1;
        TargetTurn { entry, turn }
    }

    fn entry(&self, target: &Path) -> Arc<TargetEntry> {
        self.0.get(target.to_owned(), TargetEntry::default)
    }
}

impl TargetTurn {
    /// Waits for the right to attach or detach.
    pub async fn lock(&self) -> TargetLock {
        Arc::clone(&self.entry.busy).lock_owned().await
    }

    /// Returns whether no unpublish has begun since.
    pub fn is_current(&self) -> bool {
        self.entry.turn.load(Ordering::SeqCst) == self.turn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_unpublish_overtakes_a_publish_that_waits() {
        let locks = TargetLocks::default();
        let target = Path::new("/target");
        let publish = locks.begin_publish(target);
        let unpublish = locks.begin_unpublish(target);
        assert!(!publish.is_current());
        assert!(unpublish.is_current());
        let again = locks.begin_publish(target);
        assert!(again.is_current());
        let held = unpublish.lock().await;
        let waiting = again.lock();
        tokio::pin!(waiting);
        assert!(futures_util::poll!(&mut waiting).is_pending());
        drop(held);
        waiting.await;
    }
}
