//! Verification of an artifact's signatures before anything of it is unpacked.
//!
//! A verdict is kept with the content, under a hash of the demand. Without one, the signatures in the registry are
//! verified one after another, in a flight: callers with the same demand share it, and it continues when their time is
//! over.
//!
//! | memory | held | from |
//! | --- | --- | --- |
//! | the annotations of signatures that are still to be read | while a registry sends | the kept part of the budget |
//! | a signature and its document | while a registry sends | the documents of the registry's client |
//! | their parsed forms | while one is verified | the budget of computations |

use std::sync::Arc;
use std::time::Duration;

use super::artifact_request::Want;
use super::blocking;
use super::compute_budget::Computations;
use super::download_resources::Observer;
use super::error::PullError;
use super::pull_options::PullOptions;
use super::reference_resolution::{Resolved, ResolvedDigests, Resolver};
use super::signature_search::{KEPT_BYTES, SignatureSearch};
use super::single_flight::{Flights, Outcome};
use oci::manifest::ManifestLimits;
use oci::registry::{Registry, RegistryError};
use oci::signature::{
    AcceptedSignature, FoundSignature, SignatureDemand, SignatureMode, SignatureVerification,
    SignedObject,
};
use oci::{Digest, Repository};
use store::Store;

/// Memory for each byte of a signature while it is found out how much a verification takes.
const BYTES_PER_SIGNATURE_BYTE: u64 = 3;

/// The time in which the signatures of an artifact are found and verified.
const TIME_LIMIT: Duration = Duration::from_mins(5);

/// A manifest of a repository, and the hash of the demand.
pub(super) type VerificationKey = (Repository, ResolvedDigests, Digest);

/// Makes sure that manifests have the signatures that volumes demand.
pub(super) struct SignatureVerifier {
    pub(super) store: Store,
    pub(super) registry: Registry,
    pub(super) resolver: Arc<Resolver>,
    pub(super) computations: Computations,
    pub(super) options: PullOptions,
    pub(super) limits: ManifestLimits,
    pub(super) observer: Arc<dyn Observer>,
    pub(super) flights: Flights<VerificationKey, ()>,
}

/// Returns the key of a verification, which is the same for all modes.
pub(super) fn key(
    want: &Want,
    digests: ResolvedDigests,
    demand: &SignatureDemand,
) -> VerificationKey {
    (want.reference.repository().clone(), digests, demand.id(SignedObject::Manifest))
}

/// Returns whether a verdict is kept: of the manifest itself, or of the index that it is chosen from here. Blocking.
pub(super) fn is_verified(
    store: &Store,
    repository: &Repository,
    digests: ResolvedDigests,
    demand: &SignatureDemand,
) -> bool {
    let ResolvedDigests { top, manifest } = digests;
    let verdicts = store.verified_signatures();
    let is_kept = |signed| verdicts.contains(repository, manifest, demand.id(signed));
    is_kept(SignedObject::Manifest) || top != manifest && is_kept(SignedObject::Index(top))
}

impl SignatureVerifier {
    /// Makes sure that a manifest has the signatures that the volume demands.
    pub(super) async fn verify(self: &Arc<Self>, want: &Want, resolved: &Resolved) -> Outcome<()> {
        let Some(demand) = &want.signature else { return Ok(()) };
        let (store, repository) = (self.store.clone(), want.reference.repository().clone());
        let (digests, of) = (resolved.digests, demand.clone());
        let known = move || Ok(is_verified(&store, &repository, digests, &of));
        if blocking(known).await.map_err(Arc::new)? {
            return Ok(());
        }
        let key = key(want, resolved.digests, demand);
        let start = |_| {
            let (verifier, want) = (Arc::clone(self), want.clone());
            let (resolved, demand) = (resolved.clone(), demand.clone());
            async move { verifier.verify_in_time(&want, &resolved, &demand).await }
        };
        let verified = self.flights.run(key, want.caller(), |_| {}, start).await;
        match (verified, demand.mode) {
            (Err(error), SignatureMode::Warn)
                if !matches!(error.root(), PullError::ShuttingDown) =>
            {
                tracing::warn!(reference = %want.reference, %error, "the policy only warns: it is mounted");
                self.observer.signature_warning();
                Ok(())
            }
            (verified, _) => verified,
        }
    }

    async fn verify_in_time(
        &self,
        want: &Want,
        resolved: &Resolved,
        demand: &SignatureDemand,
    ) -> Result<(), PullError> {
        let verified = tokio::time::timeout(TIME_LIMIT, self.verify_now(want, resolved, demand));
        let Ok(verified) = verified.await else {
            let repository = want.reference.repository();
            let (host, waited) = (repository.host().to_owned(), TIME_LIMIT);
            let what = format!("the signatures of {repository}");
            return Err(RegistryError::Timeout { host, what, waited }.into());
        };
        verified.map_err(PullError::Shared)
    }

    async fn verify_now(
        &self,
        want: &Want,
        resolved: &Resolved,
        demand: &SignatureDemand,
    ) -> Outcome<()> {
        let (repository, manifest) = (want.reference.repository(), resolved.digests.manifest);
        let accepted = self.search(want, resolved, demand).await?;
        let signed_by: Vec<_> = accepted.iter().map(AcceptedSignature::to_string).collect();
        for signer in &signed_by {
            tracing::info!(reference = %want.reference, %manifest, signer, "its signature was verified");
        }
        let by_index = accepted.iter().any(|signature| signature.digest != manifest);
        let signed = if by_index {
            vec![SignedObject::Index(resolved.digests.top), SignedObject::AnyIndex]
        } else {
            vec![SignedObject::Manifest]
        };
        let ids: Vec<Digest> = signed.into_iter().map(|signed| demand.id(signed)).collect();
        let (store, repository) = (self.store.clone(), repository.clone());
        let keep = move || {
            let verdicts = store.verified_signatures();
            for id in ids {
                verdicts.put(&repository, manifest, id, signed_by.clone())?;
            }
            Ok(())
        };
        blocking(keep).await.map_err(Arc::new)
    }

    /// Looks for the demanded signatures in the registry: of the manifest, then of its index.
    async fn search(
        &self,
        want: &Want,
        resolved: &Resolved,
        demand: &SignatureDemand,
    ) -> Outcome<Vec<AcceptedSignature>> {
        let credential = self.resolver.credential(resolved).await?;
        let (computations, tenant) = (&self.computations, &want.tenant);
        let _kept = computations.keep_of(tenant, KEPT_BYTES).await.map_err(Arc::new)?;
        let ResolvedDigests { top, manifest } = resolved.digests;
        let client = self.registry.at(want.reference.repository(), &credential);
        let subjects = vec![manifest, top];
        let search =
            SignatureSearch::begin(client, self.options, self.limits, demand.format, &subjects);
        let mut search = search.await.map_err(Arc::new)?;
        let mut verification = SignatureVerification::new(demand.clone(), subjects);
        while let Some(found) = search.next().await.map_err(Arc::new)? {
            let bytes = found.bytes().saturating_mul(BYTES_PER_SIGNATURE_BYTE);
            let memory = computations.memory_of(tenant, bytes).await.map_err(Arc::new)?;
            let count = move || {
                let _memory = memory;
                let bytes = found.signature.verification_bytes();
                Ok((found, bytes))
            };
            let (mut found, bytes) = blocking(count).await.map_err(Arc::new)?;
            let most = computations.budget.most();
            if bytes > most {
                let reason = format!("one takes {bytes} bytes of memory, and pulls have {most}");
                found.signature = FoundSignature::Unread(reason);
            }
            let memory = computations.memory_of(tenant, bytes.min(most)).await.map_err(Arc::new)?;
            let verify = move || {
                let _memory = memory;
                let is_met = verification.add(&found.signature);
                Ok((verification, is_met))
            };
            let (verified, is_met) = blocking(verify).await.map_err(Arc::new)?;
            verification = verified;
            if is_met {
                break;
            }
        }
        let refused =
            |unmet| Arc::new(PullError::Signature { signed: top, unmet: Box::new(unmet) });
        verification.finish().map_err(refused)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{TestNode, TestRegistry, file_layer};
    use super::*;
    use oci::signature::Signers;

    #[tokio::test]
    async fn nothing_is_downloaded_of_an_artifact_without_the_signature() {
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        registry.artifact("a", &file_layer("file", b"content"), b"content");
        let want = registry.want("a");
        let demand = SignatureDemand::signed_by(Signers::default());
        let enforced = Want { signature: Some(demand.clone()), ..want.clone() };
        let resolved = node.puller.0.resolver.resolve(&want).await.expect("a manifest");
        let error = node.pull(&enforced).await.expect_err("it is not signed");
        assert!(
            matches!(
                error.root(),
                PullError::Signature { unmet, .. } if unmet.flaw.is_none()
            ),
            "{error}"
        );
        assert!(registry.seen("blobs/").is_empty());
        let demand = SignatureDemand { mode: SignatureMode::Warn, ..demand };
        let warned = Want { signature: Some(demand), ..want };
        let verified = node.puller.0.signatures.verify(&warned, &resolved).await;
        verified.expect("the policy only warns");
    }
}
