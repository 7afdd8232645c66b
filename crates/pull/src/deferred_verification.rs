//! Verification of cached content after its mount, under a rule that only warns.
//!
//! Such a rule refuses nothing, so a publish of cached content does not wait for a registry that is slow or down. A pull
//! waits: its warning comes before its mount.

use std::time::Duration;

use parking_lot::Mutex;
use sys::lru_map::LruMap;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use super::Puller;
use super::artifact_request::Want;
use super::keyed_locks::KeyedLocks;
use super::pull_tenant::Tenant;
use super::single_flight::Runway;
use oci::{Digest, Repository};

/// Time after which the registry is asked again for signatures that were not found.
const INTERVAL: Duration = Duration::from_mins(10);
/// Maximum number of recorded verifications. Evicting one costs another verification.
const MAXIMUM: usize = 1024;

/// A manifest of a repository, and the hash of the demand.
pub(super) type DeferredKey = (Repository, Digest, Digest);

/// The verifications that have begun lately. Each tenant has at most one at a time, so that none waits for those of others.
pub(super) struct DeferredVerifications {
    begun: Mutex<LruMap<DeferredKey, Instant>>,
    turns: KeyedLocks<Tenant>,
    runway: Runway,
}

impl DeferredVerifications {
    pub(super) fn new(runway: Runway) -> Self {
        Self { begun: Mutex::new(LruMap::new(MAXIMUM)), turns: KeyedLocks::default(), runway }
    }

    /// Returns the tenant's turn, unless it is taken, or the same verification began lately.
    fn begin(&self, tenant: &Tenant, key: DeferredKey) -> Option<OwnedMutexGuard<()>> {
        let mut begun = self.begun.lock();
        if begun.get(&key).is_some_and(|since| since.elapsed() < INTERVAL) {
            return None;
        }
        let turn = self.turns.try_lock(tenant.clone())?;
        begun.insert(key, Instant::now());
        Some(turn)
    }
}

impl Puller {
    /// Verifies the signatures of cached content in the background, and warns. Does nothing if that began lately, or
    /// the tenant has another verification under way.
    pub(super) fn verify_later(&self, want: &Want, key: DeferredKey) {
        let deferred = &self.0.deferred;
        let Some(turn) = deferred.begin(&want.tenant, key) else { return };
        let (puller, want, shutdown) =
            (self.clone(), want.clone(), deferred.runway.shutdown.clone());
        let verification = async move {
            let _turn = turn;
            let resolved = puller.0.resolver.resolve(&want).await?;
            puller.0.signatures.verify(&want, &resolved).await
        };
        deferred.runway.tracker.spawn(async move {
            // A warning is all that comes of it, and verify has logged that.
            let _ = shutdown.run_until_cancelled(verification).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{TestNode, TestRegistry, file_layer, runway};
    use super::*;
    use oci::Reference;
    use oci::signature::{SignatureDemand, SignatureMode, Signers};

    fn key(number: usize) -> DeferredKey {
        let reference = "registry.example/models:v1".parse::<Reference>().expect("one");
        (reference.repository().clone(), Digest::of(&number.to_le_bytes()), Digest::of(b"demand"))
    }

    #[tokio::test(start_paused = true)]
    async fn one_verification_begins_once_in_an_interval() {
        let deferred = DeferredVerifications::new(runway());
        let begins = || deferred.begin(&Tenant::Admin, key(0)).is_some();
        assert!(begins());
        tokio::time::advance(INTERVAL / 2).await;
        assert!(!begins());
        tokio::time::advance(INTERVAL / 2).await;
        assert!(begins());
    }

    #[test]
    fn one_tenant_keeps_no_other_from_a_verification() {
        let deferred = DeferredVerifications::new(runway());
        let (hostile, other) = (Tenant::Pod("hostile".into()), Tenant::Pod("other".into()));
        for number in 0..MAXIMUM {
            assert!(deferred.begin(&hostile, key(number)).is_some());
        }
        let _turn = deferred.begin(&hostile, key(MAXIMUM)).expect("its only turn");
        assert!(deferred.begin(&hostile, key(MAXIMUM + 1)).is_none());
        assert!(deferred.begin(&other, key(MAXIMUM + 1)).is_some());
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
