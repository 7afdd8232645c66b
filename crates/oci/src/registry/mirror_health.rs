//! Mirror health: mirrors that failed for a blob, which are avoided for a while.
//!
//! Failures are recorded by registry and blob: they say nothing about other registries or blobs. If
//! the registry itself fails too, avoided mirrors are tried again, since they may work by then.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::Digest;
use sys::lru_map::LruMap;

/// Maximum number of recorded failures. Evicting one costs a transfer.
const MAXIMUM_MARKS: usize = 1024;
/// Time after which a mirror is used again.
const AVOIDED: Duration = Duration::from_mins(10);
/// Time during which a mirror is not used at all, since it would only fail again.
const UNUSED: Duration = Duration::from_mins(1);

/// Health of a mirror for a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MirrorHealth {
    /// Used in the configured order.
    Healthy,
    /// Used only if the registry itself fails.
    LastResort,
    /// Skipped, since it failed for the blob within the last minute.
    Unusable,
}

/// A blob of a registry, at one of its mirrors or (`None`) at all of them.
type FailureKey = (String, Digest, Option<Arc<str>>);

/// Recent failures of mirrors, by registry and blob.
pub(super) struct MirrorFailures(Mutex<LruMap<FailureKey, Instant>>);

impl Default for MirrorFailures {
    fn default() -> Self {
        Self(Mutex::new(LruMap::new(MAXIMUM_MARKS)))
    }
}

impl MirrorFailures {
    /// Records that one mirror, or all mirrors of a registry, failed for a blob.
    pub(super) fn record_failure(&self, registry: &str, blob: Digest, mirror: Option<&Arc<str>>) {
        let key = (registry.to_owned(), blob, mirror.cloned());
        let mut marks = self.0.lock();
        marks.insert(key, Instant::now());
    }

    /// Returns the health of a mirror for a blob.
    pub(super) fn health(&self, registry: &str, blob: Digest, mirror: &Arc<str>) -> MirrorHealth {
        let mut marks = self.0.lock();
        let mut since = |mirror| marks.get(&(registry.to_owned(), blob, mirror));
        let last = since(None).max(since(Some(Arc::clone(mirror))));
        match last.map(|last| last.elapsed()) {
            Some(elapsed) if elapsed < UNUSED => MirrorHealth::Unusable,
            Some(elapsed) if elapsed < AVOIDED => MirrorHealth::LastResort,
            _ => MirrorHealth::Healthy,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_for_one_registry_and_blob_and_expires() {
        let marks = MirrorFailures::default();
        let (blob, other) = (Digest::of(b"blob"), Digest::of(b"other"));
        let (near, far): (Arc<str>, Arc<str>) = ("near".into(), "far".into());
        marks.record_failure("r.io", blob, Some(&near));
        marks.record_failure("r.io", other, None);
        let health = |blob, mirror| marks.health("r.io", blob, mirror);
        assert_eq!(health(blob, &near), MirrorHealth::Unusable);
        assert_eq!(health(blob, &far), MirrorHealth::Healthy);
        assert_eq!(health(other, &far), MirrorHealth::Unusable);
        assert_eq!(marks.health("elsewhere.io", blob, &near), MirrorHealth::Healthy);
        tokio::time::advance(UNUSED).await;
        assert_eq!(health(blob, &near), MirrorHealth::LastResort);
        tokio::time::advance(AVOIDED).await;
        assert_eq!(health(blob, &near), MirrorHealth::Healthy);
    }
}
