//! Mirrors that had a blob and were of no use: passed by for a while.
//!
//! By registry and blob, so that what one registry's mirrors or its own bytes are like says nothing
//! of another's. When the registry itself is of no use they are asked again: a mirror that was bad a
//! minute ago may be better than none.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::recent::Recent;
use crate::Digest;

/// Marks that are kept; forgetting one costs a transfer.
const MAXIMUM_MARKS: usize = 1024;
/// A mirror that was repaired is used again after this.
const PASSED_BY: Duration = Duration::from_mins(10);
/// Before that it would only do again what it has just done, also where nobody else can be asked.
const USELESS: Duration = Duration::from_mins(1);

/// Whether a mirror is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// In its turn.
    Trusted,
    /// When the registry itself is of no use.
    LastResort,
    /// Not now.
    Useless,
}

/// A registry's blob at one of its mirrors, or at all of them.
type Key = (String, Digest, Option<Arc<str>>);

/// The memory of one process.
#[derive(Debug)]
pub(super) struct PassedBy(Mutex<Recent<Key, Instant>>);

impl Default for PassedBy {
    fn default() -> Self {
        Self(Mutex::new(Recent::new(MAXIMUM_MARKS)))
    }
}

impl PassedBy {
    /// One mirror, or all of a registry, were of no use for a blob.
    pub(super) fn mark(&self, registry: &str, blob: Digest, mirror: Option<&Arc<str>>) {
        let key = (registry.to_owned(), blob, mirror.cloned());
        let mut marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        marks.insert(key, Instant::now());
    }

    /// Whether this mirror is asked for a blob.
    pub(super) fn standing(&self, registry: &str, blob: Digest, mirror: &Arc<str>) -> Standing {
        let mut marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut since = |mirror| marks.get(&(registry.to_owned(), blob, mirror));
        let last = since(None).max(since(Some(Arc::clone(mirror))));
        match last.map(|last| last.elapsed()) {
            Some(elapsed) if elapsed < USELESS => Standing::Useless,
            Some(elapsed) if elapsed < PASSED_BY => Standing::LastResort,
            _ => Standing::Trusted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_mark_is_for_one_registry_and_blob_and_wears_off() {
        let marks = PassedBy::default();
        let (blob, other) = (Digest::of(b"blob"), Digest::of(b"other"));
        let (near, far): (Arc<str>, Arc<str>) = ("near".into(), "far".into());
        marks.mark("r.io", blob, Some(&near));
        marks.mark("r.io", other, None);
        let standing = |blob, mirror| marks.standing("r.io", blob, mirror);
        assert_eq!(standing(blob, &near), Standing::Useless);
        assert_eq!(standing(blob, &far), Standing::Trusted);
        assert_eq!(standing(other, &far), Standing::Useless);
        assert_eq!(marks.standing("elsewhere.io", blob, &near), Standing::Trusted);
        tokio::time::advance(USELESS).await;
        assert_eq!(standing(blob, &near), Standing::LastResort);
        tokio::time::advance(PASSED_BY).await;
        assert_eq!(standing(blob, &near), Standing::Trusted);
    }
}
