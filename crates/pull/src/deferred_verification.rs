//! Verification of cached content after its mount, under a rule that only warns.
//!
//! Such a rule refuses nothing, so a publish of cached content does not wait for a registry that is slow or down. A pull
//! waits: its warning comes before its mount.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Puller;
use super::artifact_request::Want;
use super::single_flight::Runway;
use oci::{Digest, Repository};

/// Time after which the registry is asked again for signatures that were not found.
const INTERVAL: Duration = Duration::from_mins(10);
/// Verifications at once. Others wait for a later publish.
const AT_ONCE: usize = 4;
/// Maximum number of verifications within [`INTERVAL`].
const MAXIMUM: usize = 1024;

/// A manifest of a repository, and the hash of the demand.
pub(super) type DeferredKey = (Repository, Digest, Digest);

/// The verifications that have begun lately.
pub(super) struct DeferredVerifications {
    begun: Mutex<HashMap<DeferredKey, Instant>>,
    places: Arc<Semaphore>,
    runway: Runway,
}

impl DeferredVerifications {
    pub(super) fn new(runway: Runway) -> Self {
        Self { begun: Mutex::default(), places: Arc::new(Semaphore::new(AT_ONCE)), runway }
    }

    /// Returns a place for a verification, unless the same one began lately or too many did.
    fn begin(&self, key: DeferredKey, now: Instant) -> Option<OwnedSemaphorePermit> {
        let mut begun = self.begun.lock();
        let is_recent = |since: &Instant| now.saturating_duration_since(*since) < INTERVAL;
        if begun.get(&key).is_some_and(is_recent) {
            return None;
        }
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        begun.retain(|_, since| is_recent(since));
        if begun.len() >= MAXIMUM {
            return None;
        }
        begun.insert(key, now);
        Some(place)
    }
}

impl Puller {
    /// Verifies the signatures of cached content in the background, and warns. Does nothing if that began lately.
    pub(super) fn verify_later(&self, want: &Want, key: DeferredKey) {
        let deferred = &self.0.deferred;
        let Some(place) = deferred.begin(key, Instant::now()) else { return };
        let (puller, want, shutdown) =
            (self.clone(), want.clone(), deferred.runway.shutdown.clone());
        let verification = async move {
            let _place = place;
            match puller.0.resolver.resolve(&want).await {
                Ok(resolved) => puller.0.signatures.verify(&want, &resolved).await,
                Err(error) => Err(error),
            }
        };
        deferred.runway.tracker.spawn(async move {
            // A warning is all that comes of it, and verify has logged that.
            let _ = shutdown.run_until_cancelled(verification).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{TestNode, TestRegistry, file_layer};
    use super::*;
    use oci::Reference;
    use oci::signature::{SignatureDemand, SignatureMode, Signers};

    fn keys() -> impl Iterator<Item = DeferredKey> {
        let reference = "registry.example/models:v1".parse::<Reference>().expect("one");
        let digest = |number: u32| Digest::of(&number.to_le_bytes());
        (0..).map(move |number| (reference.repository().clone(), digest(number), digest(0)))
    }

    fn deferred() -> DeferredVerifications {
        DeferredVerifications::new(super::super::testing::runway())
    }

    #[test]
    fn one_verification_begins_once_in_an_interval() {
        let (deferred, start) = (deferred(), Instant::now());
        let key = keys().next().expect("a key");
        assert!(deferred.begin(key.clone(), start).is_some());
        assert!(deferred.begin(key.clone(), start + INTERVAL / 2).is_none());
        assert!(deferred.begin(key, start + INTERVAL).is_some());
    }

    #[test]
    fn their_number_is_bounded() {
        let (deferred, start) = (deferred(), Instant::now());
        let places: Vec<_> =
            keys().filter_map(|key| deferred.begin(key, start)).take(AT_ONCE).collect();
        let late = keys().nth(AT_ONCE).expect("a key");
        assert!(deferred.begin(late.clone(), start).is_none(), "all places are taken");
        drop(places);
        let begun = keys()
            .skip(AT_ONCE)
            .take(MAXIMUM)
            .filter(|key| deferred.begin(key.clone(), start).is_some());
        assert_eq!(begun.count(), MAXIMUM - AT_ONCE);
        assert!(deferred.begin(late, start + INTERVAL).is_some(), "old ones are forgotten");
    }

    #[tokio::test]
    async fn cached_content_is_shown_at_once_where_a_policy_only_warns() {
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        registry.artifact("a", &file_layer("file", b"content"), b"content");
        let demand = SignatureDemand::signed_by(Signers::default());
        let enforced = Want { signature: Some(demand.clone()), ..registry.want("a") };
        let demand = SignatureDemand { mode: SignatureMode::Warn, ..demand };
        let warned = Want { signature: Some(demand), ..registry.want("a") };
        node.pull(&warned).await.expect("the policy only warns");
        let lookups = || registry.seen("referrers/").len();
        let before = lookups();
        assert!(before > 0);
        let cached = |want: &Want| node.puller.cached_key(want).is_some();
        assert!(!cached(&enforced));
        assert!(cached(&warned));
        while lookups() == before {
            tokio::task::yield_now().await;
        }
    }
}
