//! Finding an artifact's signatures, and verifying them before anything is unpacked.
//!
//! ```text
//! legacy   the tag sha256-<hex>.sig: a manifest whose layers are payloads
//! bundle   the referrers of the digest, or the index under the tag sha256-<hex>
//! ```
//!
//! Both are looked for at the manifest that is mounted and at the index that it
//! was chosen from. What a registry sends here is as untrusted as everything else
//! of it: bounded in number and size, hashed, and believed when a key has signed it.

use std::sync::Arc;

use super::artifact_request::Want;
use super::download_resources::Observer;
use super::error::PullError;
use super::pull_options::PullOptions;
use super::reference_resolution::{Resolved, ResolvedDigests, Resolver};
use super::single_flight::Outcome;
use super::small_blob;
use super::{SizedBlob, blocking};
use oci::Digest;
use oci::manifest::{
    CERTIFICATE_ANNOTATION, Descriptor, ImageManifest, LOG_ENTRY_ANNOTATION, Manifest,
    ManifestLimits, SIGNATURE_ANNOTATION, TIMESTAMP_ANNOTATION,
};
use oci::registry::{ManifestName, Registry, RegistryError, RepositoryClient};
use oci::signature::{
    AcceptedSignature, FoundSignature, SignatureDemand, SignatureFormat, SignatureMode,
    SimpleSignature, sigstore_bundle, simple_signing,
};
use store::Store;

/// Signatures that are looked at for one digest; more is a registry's attempt to keep the node busy.
const MAXIMUM_SIGNATURES: usize = 64;
/// A payload has 300 bytes, a bundle with a certificate and a log's entry about 10 KiB.
const MAXIMUM_SIGNATURE_BYTES: u64 = 256 * 1024;
/// All signatures of an artifact that are held in memory.
const MAXIMUM_HELD_BYTES: u64 = 8 * 1024 * 1024;

/// Makes sure that manifests have the signatures that volumes demand.
pub(super) struct SignatureVerifier {
    pub(super) store: Store,
    pub(super) registry: Registry,
    pub(super) resolver: Arc<Resolver>,
    pub(super) options: PullOptions,
    pub(super) limits: ManifestLimits,
    pub(super) observer: Arc<dyn Observer>,
}

impl SignatureVerifier {
    /// Sees to it that a manifest has the signature that the volume demands.
    pub(super) async fn verify(&self, want: &Want, resolved: &Resolved) -> Outcome<()> {
        let Some(demand) = &want.signature else { return Ok(()) };
        let (store, repository) = (self.store.clone(), want.reference.repository().clone());
        let (manifest, id) = (resolved.digests.manifest, demand.id());
        let known = move || Ok(store.verified_signatures().contains(&repository, manifest, id));
        if blocking(known).await.map_err(Arc::new)? {
            return Ok(());
        }
        let verified = self.verify_now(want, resolved, demand).await;
        match (verified, demand.mode) {
            (Err(error), SignatureMode::Warn) => {
                tracing::warn!(reference = %want.reference, %error, "the policy only warns: it is mounted");
                self.observer.signature_warning();
                Ok(())
            }
            (verified, _) => verified,
        }
    }

    async fn verify_now(
        &self,
        want: &Want,
        resolved: &Resolved,
        demand: &SignatureDemand,
    ) -> Outcome<()> {
        let credential = self.resolver.credential(resolved).await?;
        let repository = want.reference.repository();
        let ResolvedDigests { top, manifest } = resolved.digests;
        let client = self.registry.at(repository, &credential);
        let finder = Finder { client, options: self.options, limits: self.limits };
        let mut others = (top != manifest).then_some(top).into_iter();
        let (mut subject, mut found) = (manifest, Vec::new());
        let accepted = loop {
            finder.find(subject, demand.format, &mut found).await.map_err(Arc::new)?;
            let (demand, signatures) = (demand.clone(), std::mem::take(&mut found));
            // The proofs of a keyless signature take milliseconds. A signature of the index counts, of
            // whatever else does not.
            let judge = move || Ok((demand.judge(&signatures, &[manifest, top]), signatures));
            let (judged, judged_signatures) = blocking(judge).await.map_err(Arc::new)?;
            found = judged_signatures;
            match judged {
                Ok(accepted) => break accepted,
                Err(unmet) => {
                    let unmet = || Arc::new(PullError::Signature(unmet));
                    subject = others.next().ok_or_else(unmet)?;
                }
            }
        };
        let signed_by: Vec<_> = accepted.iter().map(AcceptedSignature::to_string).collect();
        for signer in &signed_by {
            tracing::info!(reference = %want.reference, %subject, signer, "its signature was verified");
        }
        let (store, repository, id) = (self.store.clone(), repository.clone(), demand.id());
        let keep =
            move || Ok(store.verified_signatures().put(&repository, manifest, id, signed_by)?);
        blocking(keep).await.map_err(Arc::new)
    }
}

/// Finds what a registry has of signatures.
#[derive(Clone, Copy)]
pub struct Finder<'a> {
    /// The client of the repository.
    pub client: RepositoryClient<'a>,
    /// The options of requests.
    pub options: PullOptions,
    /// The limits on manifests that carry signatures.
    pub limits: ManifestLimits,
}

impl Finder<'_> {
    /// Adds all signatures of a digest, in the formats that count.
    pub async fn find(
        &self,
        subject: Digest,
        format: SignatureFormat,
        found: &mut Vec<FoundSignature>,
    ) -> Result<(), PullError> {
        if format != SignatureFormat::Bundle {
            self.find_simple(subject, found).await?;
        }
        if format != SignatureFormat::Legacy {
            self.find_bundles(subject, found).await?;
        }
        Ok(())
    }

    async fn find_simple(
        &self,
        subject: Digest,
        found: &mut Vec<FoundSignature>,
    ) -> Result<(), PullError> {
        let name = ManifestName::Tag(format!("sha256-{}.sig", subject.hex()));
        let Some(manifest) = self.signature_manifest(&name).await? else {
            return Ok(());
        };
        let layers =
            manifest.layers.iter().filter(|layer| layer.media_type == simple_signing::MEDIA_TYPE);
        for layer in layers.take(MAXIMUM_SIGNATURES) {
            let annotation = |name| layer.annotations.get(name).cloned();
            let Some(signature) = annotation(SIGNATURE_ANNOTATION) else {
                continue;
            };
            if let Some(payload) = self.signature_blob(layer, found).await? {
                found.push(FoundSignature::Simple(SimpleSignature {
                    payload,
                    signature,
                    certificate: annotation(CERTIFICATE_ANNOTATION),
                    log_entry: annotation(LOG_ENTRY_ANNOTATION),
                    timestamp: annotation(TIMESTAMP_ANNOTATION),
                }));
            }
        }
        Ok(())
    }

    async fn find_bundles(
        &self,
        subject: Digest,
        found: &mut Vec<FoundSignature>,
    ) -> Result<(), PullError> {
        for descriptor in self.referrers(subject).await? {
            let name = ManifestName::Digest(descriptor.digest);
            let Some(manifest) = self.signature_manifest(&name).await? else {
                continue;
            };
            let layers = manifest
                .layers
                .iter()
                .filter(|layer| layer.media_type == sigstore_bundle::MEDIA_TYPE);
            for layer in layers.take(1) {
                if let Some(bytes) = self.signature_blob(layer, found).await? {
                    found.push(FoundSignature::Bundle(bytes));
                }
            }
        }
        Ok(())
    }

    /// Returns the referrers of a digest that may carry a signature, most likely first.
    async fn referrers(&self, subject: Digest) -> Result<Vec<Descriptor>, PullError> {
        let mut indexes = Vec::new();
        let parse = |bytes: &[u8]| match Manifest::parse(bytes, None, self.limits) {
            Ok(Manifest::Index(index)) => Some(index),
            Ok(Manifest::Image(_)) | Err(_) => None,
        };
        if let Some(referrers) = self.client.referrers(subject).await? {
            indexes.extend(referrers.pages.iter().filter_map(|page| parse(page)));
        } else {
            // The fallback of the distribution specification.
            let name = ManifestName::Tag(format!("sha256-{}", subject.hex()));
            match self.client.manifest(&name).await {
                Ok(fetched) => indexes.extend(parse(&fetched.bytes)),
                Err(RegistryError::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let is_bundle = |descriptor: &Descriptor| {
            descriptor.artifact_type.as_deref() == Some(sigstore_bundle::MEDIA_TYPE)
        };
        // Some registries forget what kind of artifact it is: then its layer says so.
        let may_be = |descriptor: &Descriptor| {
            let kind = descriptor.artifact_type.as_deref();
            is_bundle(descriptor) || kind.is_none_or(|kind| kind.contains("empty"))
        };
        let all = indexes.into_iter().flat_map(|index| index.manifests);
        let mut found: Vec<_> = all.filter(may_be).collect();
        found.sort_by_key(|descriptor| !is_bundle(descriptor));
        found.truncate(MAXIMUM_SIGNATURES);
        Ok(found)
    }

    /// A manifest that carries signatures; one that is not there or makes no sense carries none.
    async fn signature_manifest(
        &self,
        name: &ManifestName,
    ) -> Result<Option<ImageManifest>, PullError> {
        let fetched = match self.client.manifest(name).await {
            Ok(fetched) => fetched,
            Err(RegistryError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match Manifest::parse(&fetched.bytes, None, self.limits) {
            Ok(Manifest::Image(manifest)) => Ok(Some(manifest)),
            Ok(Manifest::Index(_)) | Err(_) => Ok(None),
        }
    }

    /// Returns the content of a layer, if it is small enough beside what was found before.
    async fn signature_blob(
        &self,
        layer: &Descriptor,
        found: &[FoundSignature],
    ) -> Result<Option<Vec<u8>>, PullError> {
        let held: usize = found.iter().map(FoundSignature::bytes).sum();
        if layer.size > MAXIMUM_SIGNATURE_BYTES || held as u64 + layer.size > MAXIMUM_HELD_BYTES {
            return Ok(None);
        }
        if let Some(data) = &layer.data {
            return Ok(Some(data.clone()));
        }
        let blob = SizedBlob { digest: layer.digest, size: layer.size };
        match small_blob::fetch(self.client, &self.options, blob).await {
            Ok(document) => Ok(Some(document.bytes.to_vec())),
            Err(
                PullError::Registry(RegistryError::NotFound { .. })
                | PullError::BlobSize { .. }
                | PullError::BlobDigest { .. },
            ) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{
        INDEX, MANIFEST, TestNode, TestRegistry, descriptor, file_layer, image, index,
    };
    use super::*;
    use oci::credentials::Credential;
    use oci::registry::RegistryOptions;
    use oci::signature::{Signers, UnmetDemand};

    #[tokio::test]
    async fn signatures_are_found_under_the_tag_and_among_the_referrers() {
        let registry = TestRegistry::start().await;
        let subject = Digest::of(b"subject");
        let (signed, large) = (b"payload", vec![0; 300 << 10]);
        let annotation = format!(
            r#","annotations":{{"{SIGNATURE_ANNOTATION}":"c2ln","{CERTIFICATE_ANNOTATION}":"PEM"}}"#
        );
        for blob in [&signed[..], &large[..], &b"bundle"[..]] {
            registry.blob("a", blob);
        }
        let layers = [&large[..], &signed[..]]
            .map(|blob| descriptor(simple_signing::MEDIA_TYPE, blob, &annotation));
        registry.manifest("a", &format!("sha256-{}.sig", subject.hex()), MANIFEST, &image(&layers));
        let of_bundle = image(&[descriptor(sigstore_bundle::MEDIA_TYPE, b"bundle", "")]);
        registry.manifest("a", "bundle", MANIFEST, &of_bundle);
        let kind = format!(r#","artifactType":"{}""#, sigstore_bundle::MEDIA_TYPE);
        let referrers = index(&[descriptor(MANIFEST, of_bundle.as_bytes(), &kind)]);
        registry.manifest("a", &format!("sha256-{}", subject.hex()), INDEX, &referrers);
        let client = Registry::new(RegistryOptions::default()).expect("a client");
        let limits = unpack::Limits::default().manifest();
        let reference = registry.reference("a");
        let client = client.at(reference.repository(), &Credential::Anonymous);
        let finder = Finder { client, options: PullOptions::default(), limits };
        let find = async |format| {
            let mut found = Vec::new();
            finder.find(subject, format, &mut found).await.map(|()| found)
        };
        let found = find(SignatureFormat::Any).await.expect("signatures");
        let [FoundSignature::Simple(simple), FoundSignature::Bundle(bundle)] = &found[..] else {
            panic!("{found:?}")
        };
        assert_eq!(
            (&simple.payload[..], &*simple.signature, simple.certificate.as_deref(), &bundle[..]),
            (&signed[..], "c2ln", Some("PEM"), &b"bundle"[..])
        );
        let of_large = format!("blobs/{}", Digest::of(&large));
        assert!(registry.seen(&of_large).is_empty(), "too large for a signature");
        assert_eq!(find(SignatureFormat::Bundle).await.expect("signatures").len(), 1);
    }

    #[tokio::test]
    async fn nothing_is_downloaded_of_an_artifact_without_the_signature() {
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        registry.artifact("a", &file_layer("file", b"content"), b"content");
        let want = registry.want("a");
        let demand = SignatureDemand::signed_by(Signers::default());
        let enforced = Want { signature: Some(demand.clone()), ..want.clone() };
        let resolved = node.puller.0.resolver.resolve(&want).await.expect("a manifest");
        let error = node.pull(&enforced).await.expect_err("it is not signed");
        assert!(matches!(*error, PullError::Signature(UnmetDemand { flaw: None, .. })), "{error}");
        assert!(registry.seen("blobs/").is_empty());
        let demand = SignatureDemand { mode: SignatureMode::Warn, ..demand };
        let warned = Want { signature: Some(demand), ..want };
        let verified = node.puller.0.signatures.verify(&warned, &resolved).await;
        verified.expect("the policy only warns");
    }
}
