//! Verification of a pod's content beside its mount, under a rule that only warns.
//!
//! Such a rule refuses nothing, so no publish waits for a registry that is slow or down, whether the content is cached
//! or pulled.

use std::time::Duration;

use parking_lot::Mutex;
use sys::lru_map::LruMap;
use sys::weak_map::WeakMap;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::Puller;
use super::artifact_request::Want;
use super::keyed_locks::KeyedLocks;
use super::pull_tenant::Tenant;
use super::reference_resolution::{Resolved, ResolvedDigests};
use super::signature_verification::{self, VerificationKey};
use super::single_flight::Runway;
use super::tree_shape::Shape;
use oci::credentials::{Credential, Keyring};

/// Time after which the registry is asked again for signatures that were not found.
const INTERVAL: Duration = Duration::from_mins(10);
/// Maximum number of recorded verifications. Evicting one costs another verification.
const MAXIMUM: usize = 1024;
/// Verifications of a tenant that wait. A further one is left to the next publish.
const MAXIMUM_WAITING: usize = 64;
/// Bytes of the credentials that a verification may hold while it waits: many of the largest tokens.
const MAXIMUM_CREDENTIAL_BYTES: usize = 64 << 10;

/// The verifications that have begun lately or wait. Each tenant has one at a time, so that none waits for those of
/// others.
pub(super) struct DeferredVerifications {
    begun: Mutex<LruMap<VerificationKey, Instant>>,
    queues: WeakMap<Tenant, Semaphore>,
    turns: KeyedLocks<Tenant>,
    runway: Runway,
}

impl DeferredVerifications {
    pub(super) fn new(runway: Runway) -> Self {
        let (begun, queues) = (Mutex::new(LruMap::new(MAXIMUM)), WeakMap::default());
        Self { begun, queues, turns: KeyedLocks::default(), runway }
    }

    /// Returns a place in the tenant's queue, unless it is full, or the same verification began lately.
    fn begin(&self, tenant: &Tenant, key: VerificationKey) -> Option<OwnedSemaphorePermit> {
        let mut begun = self.begun.lock();
        if begun.get(&key).is_some_and(|since| since.elapsed() < INTERVAL) {
            return None;
        }
        let queue = self.queues.get(tenant.clone(), || Semaphore::new(MAXIMUM_WAITING));
        let place = queue.try_acquire_owned().ok()?;
        begun.insert(key, Instant::now());
        Some(place)
    }
}

impl Puller {
    /// Verifies the signatures of a manifest in the background, and warns. Does nothing if that began lately, or too
    /// much of the tenant waits.
    pub(super) fn verify_later(
        &self,
        want: &Want,
        digests: ResolvedDigests,
        resolved: Option<&Resolved>,
    ) {
        let Some(demand) = &want.signature else { return };
        let deferred = &self.0.deferred;
        let credentials = want.keyring.matching(want.reference.repository());
        let bytes: usize = credentials.iter().map(Credential::bytes).sum();
        if bytes > MAXIMUM_CREDENTIAL_BYTES {
            tracing::warn!(reference = %want.reference, bytes, "its signature is not verified, as its credentials are too large, and the policy only warns");
            return;
        }
        let key = signature_verification::key(want, digests, demand);
        let Some(place) = deferred.begin(&want.tenant, key) else { return };
        // What it needs of the volume while it waits.
        let keyring = Keyring::of_host(want.reference.repository().host(), credentials);
        let want = Want { keyring, shape: Shape::default(), ..want.clone() };
        let (puller, resolved) = (self.clone(), resolved.cloned());
        let shutdown = deferred.runway.shutdown.clone();
        let verification = async move {
            let _place = place;
            let _turn = puller.0.deferred.turns.lock(want.tenant.clone()).await;
            let resolved = match resolved {
                Some(resolved) => resolved,
                None => puller.0.resolver.resolve(&want).await?,
            };
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
    use super::super::artifact_request::Priority;
    use super::super::testing::{TestNode, TestRegistry, file_layer, runway};
    use super::*;
    use oci::Digest;
    use oci::Reference;
    use oci::signature::{SignatureDemand, SignatureMode, Signers};

    fn key(number: usize) -> VerificationKey {
        let reference = "registry.example/models:v1".parse::<Reference>().expect("one");
        let manifest = Digest::of(&number.to_le_bytes());
        let digests = ResolvedDigests { top: manifest, manifest };
        (reference.repository().clone(), digests, Digest::of(b"demand"))
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
        let place = |number| deferred.begin(&hostile, key(number)).expect("a place");
        let mut places: Vec<_> = (0..MAXIMUM_WAITING).map(place).collect();
        assert!(deferred.begin(&hostile, key(MAXIMUM_WAITING)).is_none());
        assert!(deferred.begin(&other, key(MAXIMUM_WAITING)).is_some());
        places.pop();
        assert!(deferred.begin(&hostile, key(MAXIMUM_WAITING + 1)).is_some());
    }

    #[tokio::test]
    async fn no_content_waits_for_its_signature_where_a_policy_only_warns() {
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        registry.artifact("a", &file_layer("file", b"content"), b"content");
        registry.artifact("b", &file_layer("file", b"another"), b"another");
        let demand = SignatureDemand::signed_by(Signers::default());
        let of = |name, mode| {
            let demand = SignatureDemand { mode, ..demand.clone() };
            Want { signature: Some(demand), priority: Priority::Pod, ..registry.want(name) }
        };
        let looked_up = async |count| {
            while registry.seen("referrers/").len() < count {
                tokio::task::yield_now().await;
            }
        };
        for (name, count) in [("a", 1), ("b", 2)] {
            node.pull(&of(name, SignatureMode::Warn)).await.expect("the policy only warns");
            looked_up(count).await;
        }
        let cached = |want: &Want| node.puller.cached_key(want).is_some();
        assert!(!cached(&of("a", SignatureMode::Enforce)));
        assert!(cached(&of("a", SignatureMode::Warn)));
    }
}
