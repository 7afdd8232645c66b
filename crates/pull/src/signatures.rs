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

use super::document;
use super::error::PullError;
use super::flights::Outcome;
use super::resolve::{Resolved, blocking};
use super::want::{PullPolicy, Want};
use super::wire::WireOptions;
use super::{Inner, Puller};
use oci::credentials::Credential;
use oci::manifest::{Descriptor, ImageManifest, Manifest, ManifestLimits, SIGNATURE_ANNOTATION};
use oci::registry::{ManifestName, Registry, RegistryError};
use oci::signature::{Found, SignatureDemand, SignatureFormat, SignatureMode, bundle, simple};
use oci::{Digest, Repository};

/// Signatures that are looked at for one digest; more is a registry's attempt to keep the node busy.
const MAXIMUM_SIGNATURES: usize = 64;
/// A payload has 300 bytes, a bundle with a certificate and a log's entry about 10 KiB.
const MAXIMUM_SIGNATURE_BYTES: u64 = 256 * 1024;

impl Puller {
    /// Compares what the manifest announces with the volume's own bound, before any of it is fetched.
    pub(super) async fn check_size(&self, want: &Want, resolved: &Resolved) -> Outcome<()> {
        if want.maximum_bytes.is_none() {
            return Ok(());
        }
        let (inner, manifest) = (Arc::clone(&self.0), resolved.manifest);
        let look = move || {
            let lease = inner.store.hold_blob(manifest);
            Ok((lease, inner.store.blob(manifest)?.is_some()))
        };
        let (_lease, is_kept) = blocking(look).await.map_err(Arc::new)?;
        if !is_kept && want.policy != PullPolicy::Never {
            // The manifest was evicted or damaged meanwhile. Without it, too large an artifact would
            // be downloaded before it is refused.
            self.fetch_again(want, resolved).await?;
        }
        let (inner, want) = (Arc::clone(&self.0), want.clone());
        let check = move || inner.check_manifest_bytes(&want, manifest);
        blocking(check).await.map_err(Arc::new)
    }

    /// Fetches and keeps a manifest that this volume may see.
    async fn fetch_again(&self, want: &Want, resolved: &Resolved) -> Outcome<()> {
        let credential = self.credential(resolved).await?;
        let (repository, digest) = (want.reference.repository(), resolved.manifest);
        let name = ManifestName::Digest(digest);
        let fetched = self.0.registry.manifest(repository, &name, &credential).await;
        let fetched = fetched.map_err(|error| Arc::new(error.into()))?;
        let kept = self.0.keep(repository, digest, fetched.bytes.clone(), &fetched.answered_by);
        kept.await.map_err(Arc::new)
    }

    /// Sees to it that a manifest has the signature that the volume demands.
    pub(super) async fn verify(&self, want: &Want, resolved: &Resolved) -> Outcome<()> {
        let Some(demand) = &want.signature else { return Ok(()) };
        let (inner, repository) = (Arc::clone(&self.0), want.reference.repository().clone());
        let (manifest, id) = (resolved.manifest, demand.id());
        let known = move || Ok(inner.store.is_verified(&repository, manifest, id));
        if blocking(known).await.map_err(Arc::new)? {
            return Ok(());
        }
        let verified = self.verify_now(want, resolved, demand).await;
        match (verified, demand.mode) {
            (Err(error), SignatureMode::Warn) => {
                tracing::warn!(reference = %want.reference, %error, "the policy only warns: it is mounted");
                self.0.wire.observer.signature_warning();
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
        let credential = self.credential(resolved).await?;
        let repository = want.reference.repository();
        let mut subjects = vec![resolved.manifest];
        if resolved.top != resolved.manifest {
            subjects.push(resolved.top);
        }
        let mut worst = None;
        for subject in &subjects {
            let (registry, options) = (&self.0.registry, self.0.wire.options);
            let finder = Finder { registry, options, limits: self.0.limits.manifest() };
            let found = finder.find(repository, *subject, demand.format, &credential);
            let found = found.await.map_err(Arc::new)?;
            // A signature of the index counts, of whatever else does not.
            match demand.judge(&found, &subjects) {
                Ok(key) => {
                    tracing::info!(reference = %want.reference, %subject, key, "its signature was verified");
                    let (inner, repository) = (Arc::clone(&self.0), repository.clone());
                    let (manifest, id) = (resolved.manifest, demand.id());
                    let keep = move || Ok(inner.store.put_verified(&repository, manifest, id)?);
                    return blocking(keep).await.map_err(Arc::new);
                }
                Err(flaw) => worst = worst.max(flaw),
            }
        }
        let keys = demand.keys.iter().map(|named| named.name.as_str()).collect::<Vec<_>>();
        Err(Arc::new(PullError::Signature { flaw: worst, keys: keys.join(", ") }))
    }
}

impl Inner {
    /// Compares the sizes of all layers of a cached manifest with the limit of the volume. Blocking.
    pub(super) fn check_manifest_bytes(
        &self,
        want: &Want,
        manifest: Digest,
    ) -> Result<(), PullError> {
        if want.maximum_bytes.is_none() {
            return Ok(());
        }
        let _turn = self.turn_of_large(manifest)?;
        // A damaged manifest is fetched again later, and then the size of its tree is compared.
        let Some(bytes) = self.store.blob(manifest)? else { return Ok(()) };
        let Manifest::Image(image) = Manifest::parse(&bytes, None, self.limits.manifest())? else {
            return Ok(());
        };
        let sizes = image.layers.iter().map(|layer| layer.size);
        want.check_bytes(sizes.fold(0, u64::saturating_add))
    }
}

/// Finds what a registry has of signatures.
#[derive(Clone, Copy, Debug)]
pub struct Finder<'a> {
    /// Who is asked.
    pub registry: &'a Registry,
    /// How patiently.
    pub options: WireOptions,
    /// For manifests that carry signatures.
    pub limits: ManifestLimits,
}

impl Finder<'_> {
    /// All signatures of a digest, in the formats that count.
    pub async fn find(
        &self,
        repository: &Repository,
        subject: Digest,
        format: SignatureFormat,
        credential: &Credential,
    ) -> Result<Vec<Found>, PullError> {
        let mut found = Vec::new();
        if format != SignatureFormat::Bundle {
            self.find_simple(repository, subject, credential, &mut found).await?;
        }
        if format != SignatureFormat::Legacy {
            self.find_bundles(repository, subject, credential, &mut found).await?;
        }
        Ok(found)
    }

    async fn find_simple(
        &self,
        repository: &Repository,
        subject: Digest,
        credential: &Credential,
        found: &mut Vec<Found>,
    ) -> Result<(), PullError> {
        let name = ManifestName::Tag(format!("sha256-{}.sig", subject.hex()));
        let Some(manifest) = self.signature_manifest(repository, &name, credential).await? else {
            return Ok(());
        };
        let layers = manifest.layers.iter().filter(|layer| layer.media_type == simple::MEDIA_TYPE);
        for layer in layers.take(MAXIMUM_SIGNATURES) {
            let Some(signature) = layer.annotations.get(SIGNATURE_ANNOTATION) else {
                continue;
            };
            if let Some(payload) = self.signature_blob(repository, layer, credential).await? {
                found.push(Found::Simple { payload, signature: signature.clone() });
            }
        }
        Ok(())
    }

    async fn find_bundles(
        &self,
        repository: &Repository,
        subject: Digest,
        credential: &Credential,
        found: &mut Vec<Found>,
    ) -> Result<(), PullError> {
        for descriptor in self.referrers(repository, subject, credential).await? {
            let name = ManifestName::Digest(descriptor.digest);
            let Some(manifest) = self.signature_manifest(repository, &name, credential).await?
            else {
                continue;
            };
            let layers =
                manifest.layers.iter().filter(|layer| layer.media_type == bundle::MEDIA_TYPE);
            for layer in layers.take(1) {
                if let Some(bytes) = self.signature_blob(repository, layer, credential).await? {
                    found.push(Found::Bundle(bytes));
                }
            }
        }
        Ok(())
    }

    /// What refers to a digest and may carry a signature, most likely first.
    async fn referrers(
        &self,
        repository: &Repository,
        subject: Digest,
        credential: &Credential,
    ) -> Result<Vec<Descriptor>, PullError> {
        let mut indexes = Vec::new();
        let parse = |bytes: &[u8]| match Manifest::parse(bytes, None, self.limits) {
            Ok(Manifest::Index(index)) => Some(index),
            Ok(Manifest::Image(_)) | Err(_) => None,
        };
        if let Some(referrers) = self.registry.referrers(repository, subject, credential).await? {
            indexes.extend(referrers.pages.iter().filter_map(|page| parse(page)));
        } else {
            // The fallback of the distribution specification.
            let name = ManifestName::Tag(format!("sha256-{}", subject.hex()));
            match self.registry.manifest(repository, &name, credential).await {
                Ok(fetched) => indexes.extend(parse(&fetched.bytes)),
                Err(RegistryError::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let is_bundle = |descriptor: &Descriptor| {
            descriptor.artifact_type.as_deref() == Some(bundle::MEDIA_TYPE)
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
        repository: &Repository,
        name: &ManifestName,
        credential: &Credential,
    ) -> Result<Option<ImageManifest>, PullError> {
        let fetched = match self.registry.manifest(repository, name, credential).await {
            Ok(fetched) => fetched,
            Err(RegistryError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match Manifest::parse(&fetched.bytes, None, self.limits) {
            Ok(Manifest::Image(manifest)) => Ok(Some(manifest)),
            Ok(Manifest::Index(_)) | Err(_) => Ok(None),
        }
    }

    async fn signature_blob(
        &self,
        repository: &Repository,
        layer: &Descriptor,
        credential: &Credential,
    ) -> Result<Option<Vec<u8>>, PullError> {
        if layer.size > MAXIMUM_SIGNATURE_BYTES {
            return Ok(None);
        }
        if let Some(data) = &layer.data {
            return Ok(Some(data.clone()));
        }
        let (blob, options) = ((layer.digest, layer.size), &self.options);
        match document::fetch(self.registry, options, repository, blob, credential).await {
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
