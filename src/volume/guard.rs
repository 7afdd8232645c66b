//! Allows one attach or detach at a target at a time. Nothing slow happens under this lock.
//!
//! A publish that waits for a pull holds no lock. It only remembers the turn of its target at its start: an unpublish
//! begins a new turn, and a publish of an earlier turn no longer attaches.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::OwnedMutexGuard;

/// The targets of all running calls.
#[derive(Debug, Default)]
pub struct Guards(Mutex<HashMap<PathBuf, Weak<Guard>>>);

#[derive(Debug, Default)]
struct Guard {
    busy: Arc<tokio::sync::Mutex<()>>,
    turn: AtomicU64,
}

/// A call's interest in a target, from its start to its end.
#[derive(Clone, Debug)]
pub struct Interest {
    guard: Arc<Guard>,
    turn: u64,
}

/// The right to attach or detach at a target. Released when dropped.
#[derive(Debug)]
pub struct Held {
    _lock: OwnedMutexGuard<()>,
}

impl Guards {
    /// Registers a publish that begins.
    pub fn interest(&self, target: &Path) -> Interest {
        let guard = self.guard(target);
        let turn = guard.turn.load(Ordering::SeqCst);
        Interest { guard, turn }
    }

    /// Registers an unpublish that begins: publishes that began before no longer attach.
    pub fn withdraw(&self, target: &Path) -> Interest {
        let guard = self.guard(target);
        let turn = guard.turn.fetch_add(1, Ordering::SeqCst) + 1;
        Interest { guard, turn }
    }

    fn guard(&self, target: &Path) -> Arc<Guard> {
        let mut guards = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        guards.retain(|_, guard| guard.strong_count() > 0);
        if let Some(guard) = guards.get(target).and_then(Weak::upgrade) {
            return guard;
        }
        let guard = Arc::new(Guard::default());
        guards.insert(target.to_owned(), Arc::downgrade(&guard));
        guard
    }
}

impl Interest {
    /// Waits for the right to attach or detach.
    pub async fn hold(&self) -> Held {
        Held { _lock: Arc::clone(&self.guard.busy).lock_owned().await }
    }

    /// Returns whether no unpublish has begun since.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.guard.turn.load(Ordering::SeqCst) == self.turn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_unpublish_overtakes_a_publish_that_waits() {
        let guards = Guards::default();
        let target = Path::new("/target");
        let publish = guards.interest(target);
        let unpublish = guards.withdraw(target);
        assert!(!publish.is_current());
        assert!(unpublish.is_current());
        let again = guards.interest(target);
        assert!(again.is_current());
        let held = unpublish.hold().await;
        let waiting = again.hold();
        tokio::pin!(waiting);
        assert!(futures_util::poll!(&mut waiting).is_pending());
        drop(held);
        waiting.await;
    }

    #[test]
    fn targets_nobody_is_busy_with_are_forgotten() {
        let guards = Guards::default();
        drop(guards.interest(Path::new("/a")));
        let _held = guards.interest(Path::new("/b"));
        assert_eq!(guards.0.lock().expect("unpoisoned").len(), 1);
    }
}
