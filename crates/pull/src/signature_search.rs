//! The search for signatures of an artifact in a registry.
//!
//! ```text
//! legacy   the tag sha256-<hex>.sig: a manifest whose layers are payloads
//! bundle   the referrers of the digest, or the index under the tag sha256-<hex>
//! ```
//!
//! Signatures are fetched one at a time, when the one before was not enough. A registry is as untrusted here as with
//! all else: the search is bounded in number and size, and what it finds counts when it is verified.
//!
//! Mirrors are asked first. They may know none of the signatures, a part, or older ones: when those are not enough, the
//! registry itself is asked for all.

use std::collections::VecDeque;

use bytes::Bytes;

use super::SizedBlob;
use super::error::PullError;
use super::pull_options::PullOptions;
use super::small_blob::{self, Document};
use oci::Digest;
use oci::manifest::{
    CERTIFICATE_ANNOTATION, Descriptor, ImageManifest, LOG_ENTRY_ANNOTATION, Manifest,
    ManifestLimits, SIGNATURE_ANNOTATION, TIMESTAMP_ANNOTATION,
};
use oci::registry::{FetchedManifest, ManifestName, RegistryError, RepositoryClient};
use oci::signature::{
    Bundle, FoundSignature, SignatureFormat, SimpleSignature, sigstore_bundle, simple_signing,
};

/// Signatures that are read of one digest, in each format.
const MAXIMUM_SIGNATURES: usize = 256;
/// Bytes of all signatures that are read for one artifact.
const MAXIMUM_READ_BYTES: u64 = 64 << 20;
/// The maximum size of a bundle in bytes. One of a large bill of materials has megabytes.
const MAXIMUM_BUNDLE_BYTES: u64 = oci::signature::MAXIMUM_BUNDLE_BYTES as u64;
/// The maximum size of a payload and of a bundle without one, in bytes.
const MAXIMUM_SMALL_BYTES: u64 = 64 << 10;
/// Memory of what is still to be read, with its annotations, and of a bundle without payload.
pub const KEPT_BYTES: u64 = 128 << 10;

/// A search for the signatures of one artifact.
pub struct SignatureSearch<'a> {
    client: RepositoryClient<'a>,
    options: PullOptions,
    limits: ManifestLimits,
    /// The client of the registry itself and its steps, while mirrors are asked.
    registry_itself: Option<(RepositoryClient<'a>, VecDeque<Step>)>,
    /// The work that is left. Earlier steps come first.
    steps: VecDeque<Step>,
    /// The bytes of signatures that were read so far.
    read_bytes: u64,
    /// The reason that not all signatures are read, told at the end.
    unread: Option<String>,
}

/// A signature, with the memory that it takes as long as it is held.
#[derive(Debug)]
pub struct FetchedSignature {
    /// The signature, of which nothing is verified.
    pub signature: FoundSignature,
    _blob: Option<Document>,
    _document: Option<FetchedManifest>,
}

enum Step {
    /// Looks at the tag of the older format, from this layer on.
    Tag { subject: Digest, from: usize },
    /// Reads one payload of the older format.
    Payload(Box<PayloadLayer>),
    /// Looks at the referrers.
    Referrers(Digest),
    /// Reads the bundle of a referrer.
    Referrer { subject: Digest, manifest: Digest },
}

/// The needed parts of a layer of the older format.
struct PayloadLayer {
    blob: SizedBlob,
    data: Option<Vec<u8>>,
    /// The signature with its proofs. The payload is still missing.
    signature: SimpleSignature,
}

impl PayloadLayer {
    /// Returns nothing for a layer without a signature.
    fn new(mut layer: Descriptor) -> Option<Self> {
        let mut annotation = |name| layer.annotations.remove(name);
        let signature = SimpleSignature {
            signature: annotation(SIGNATURE_ANNOTATION)?,
            certificate: annotation(CERTIFICATE_ANNOTATION),
            log_entry: annotation(LOG_ENTRY_ANNOTATION),
            timestamp: annotation(TIMESTAMP_ANNOTATION),
            ..SimpleSignature::default()
        };
        let blob = SizedBlob { digest: layer.digest, size: layer.size };
        Some(Self { blob, data: layer.data, signature })
    }

    fn kept_bytes(&self) -> u64 {
        let SimpleSignature { signature, certificate, log_entry, timestamp, .. } = &self.signature;
        let texts = [certificate, log_entry, timestamp].into_iter().flatten().chain([signature]);
        let texts: usize = texts.map(String::len).sum();
        (size_of::<Self>() + texts + self.data.as_ref().map_or(0, Vec::len)) as u64
    }
}

impl FetchedSignature {
    fn unread(reason: String) -> Self {
        Self { signature: FoundSignature::Unread(reason), _blob: None, _document: None }
    }

    fn oversized(bytes: u64, most: u64) -> Self {
        Self::unread(format!("one has {bytes} bytes, and the most is {most}"))
    }

    /// Returns the size of the signature, and of the document that it may be over.
    pub(super) fn bytes(&self) -> u64 {
        let length = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let bytes = match &self.signature {
            FoundSignature::Simple(simple) => {
                let SimpleSignature { payload, certificate, log_entry, timestamp, .. } = simple;
                payload.len()
                    + [certificate, log_entry, timestamp].map(length).iter().sum::<usize>()
            }
            FoundSignature::Bundle(Bundle { json, document }) => {
                json.len() + document.as_ref().map_or(0, Bytes::len)
            }
            FoundSignature::Unread(_) => 0,
        };
        bytes as u64
    }
}

fn first_steps(format: SignatureFormat, subjects: &[Digest]) -> VecDeque<Step> {
    let mut steps = VecDeque::new();
    for (number, subject) in subjects.iter().enumerate() {
        if subjects[..number].contains(subject) {
            continue;
        }
        if format != SignatureFormat::Bundle {
            steps.push_back(Step::Tag { subject: *subject, from: 0 });
        }
        if format != SignatureFormat::Legacy {
            steps.push_back(Step::Referrers(*subject));
        }
    }
    steps
}

impl<'a> SignatureSearch<'a> {
    /// Begins a search for signatures of these digests, in order.
    pub async fn begin(
        client: RepositoryClient<'a>,
        options: PullOptions,
        limits: ManifestLimits,
        format: SignatureFormat,
        subjects: &[Digest],
    ) -> Result<Self, PullError> {
        let steps = || first_steps(format, subjects);
        let (client, registry_itself) = match client.mirrors_and_registry().await? {
            Some((mirrors, itself)) => (mirrors, Some((itself, steps()))),
            None => (client, None),
        };
        Ok(Self {
            client,
            options,
            limits,
            registry_itself,
            steps: steps(),
            read_bytes: 0,
            unread: None,
        })
    }

    /// Returns the next signature; `None` if there are no more.
    pub async fn next(&mut self) -> Result<Option<FetchedSignature>, PullError> {
        loop {
            let Some(step) = self.steps.pop_front() else {
                let Some((client, steps)) = self.registry_itself.take() else {
                    return Ok(self.unread.take().map(FetchedSignature::unread));
                };
                (self.client, self.steps) = (client, steps);
                continue;
            };
            match self.take(step).await {
                Ok(None) => {}
                Err(PullError::Registry(error)) if self.registry_itself.is_some() => {
                    tracing::info!(%error, "mirrors were of no use for signatures: the registry itself is asked too");
                    // A mirror that does not answer would keep each step waiting.
                    if error.is_transient() {
                        self.steps.clear();
                    }
                }
                found => return found,
            }
        }
    }

    /// Takes a step. Returns the signature that it reads.
    async fn take(&mut self, step: Step) -> Result<Option<FetchedSignature>, PullError> {
        match step {
            Step::Tag { subject, from } => self.look_at_tag(subject, from).await?,
            Step::Payload(layer) => return self.payload(*layer).await,
            Step::Referrers(subject) => self.look_at_referrers(subject).await?,
            Step::Referrer { subject, manifest } => return self.bundle(subject, manifest).await,
        }
        Ok(None)
    }

    /// Puts steps before those that are left.
    fn put_first(&mut self, steps: Vec<Step>) {
        for step in steps.into_iter().rev() {
            self.steps.push_front(step);
        }
    }

    async fn look_at_tag(&mut self, subject: Digest, from: usize) -> Result<(), PullError> {
        let name = ManifestName::Tag(format!("sha256-{}.sig", subject.hex()));
        let Some(manifest) = self.signature_manifest(&name).await? else { return Ok(()) };
        let is_payload = |layer: &Descriptor| layer.media_type == simple_signing::MEDIA_TYPE;
        let layers = manifest.layers.into_iter().filter(is_payload);
        let layers = layers.filter_map(PayloadLayer::new).enumerate().skip(from);
        let (mut steps, mut kept) = (Vec::new(), 0);
        for (number, layer) in layers {
            if number >= MAXIMUM_SIGNATURES {
                self.count_unread();
                break;
            }
            kept += layer.kept_bytes();
            // The rest is read when these are done. One may be as large as a descriptor can be.
            if kept > KEPT_BYTES && !steps.is_empty() {
                steps.push(Step::Tag { subject, from: number });
                break;
            }
            steps.push(Step::Payload(Box::new(layer)));
        }
        self.put_first(steps);
        Ok(())
    }

    /// Remembers that there are more signatures than are read.
    fn count_unread(&mut self) {
        self.unread = Some(format!(
            "there are more than {MAXIMUM_SIGNATURES} of one digest, remove those that nobody needs"
        ));
    }

    async fn payload(
        &mut self,
        layer: PayloadLayer,
    ) -> Result<Option<FetchedSignature>, PullError> {
        let PayloadLayer { blob, data, mut signature } = layer;
        if blob.size > MAXIMUM_SMALL_BYTES {
            return Ok(Some(FetchedSignature::oversized(blob.size, MAXIMUM_SMALL_BYTES)));
        }
        let Some((payload, blob)) = self.blob(blob, data).await? else { return Ok(None) };
        signature.payload = payload;
        let signature = FoundSignature::Simple(signature);
        Ok(Some(FetchedSignature { signature, _blob: blob, _document: None }))
    }

    async fn look_at_referrers(&mut self, subject: Digest) -> Result<(), PullError> {
        let referrers = self.referrers(subject).await?.into_iter();
        let step = |manifest| Step::Referrer { subject, manifest };
        self.put_first(referrers.map(step).collect());
        Ok(())
    }

    async fn bundle(
        &mut self,
        subject: Digest,
        manifest: Digest,
    ) -> Result<Option<FetchedSignature>, PullError> {
        // Keeps only the descriptor of the bundle: the manifest is dropped before the bundle is fetched.
        let layer = self.signature_manifest(&ManifestName::Digest(manifest)).await?;
        let layers = layer.map(|manifest| manifest.layers).unwrap_or_default();
        let is_bundle = |layer: &Descriptor| sigstore_bundle::is_media_type(&layer.media_type);
        let layer = layers.into_iter().find(is_bundle);
        let Some(Descriptor { digest, size, data, .. }) = layer else { return Ok(None) };
        if size > MAXIMUM_BUNDLE_BYTES {
            return Ok(Some(FetchedSignature::oversized(size, MAXIMUM_BUNDLE_BYTES)));
        }
        let blob = SizedBlob { digest, size };
        let Some((json, blob)) = self.blob(blob, data).await? else { return Ok(None) };
        if !sigstore_bundle::signs_document(&json) {
            let signature = FoundSignature::Bundle(Bundle { json, document: None });
            return Ok(Some(FetchedSignature { signature, _blob: blob, _document: None }));
        }
        if size > MAXIMUM_SMALL_BYTES {
            return Ok(Some(FetchedSignature::oversized(size, MAXIMUM_SMALL_BYTES)));
        }
        // One document at a time is reserved. The bundle is within the memory that is kept.
        drop(blob);
        let document = self.client.manifest(&ManifestName::Digest(subject)).await?;
        let bundle = Bundle { json, document: Some(document.bytes.clone()) };
        let signature = FoundSignature::Bundle(bundle);
        Ok(Some(FetchedSignature { signature, _blob: None, _document: Some(document) }))
    }

    /// Returns the referrers of a digest that may carry a signature, most likely first.
    async fn referrers(&mut self, subject: Digest) -> Result<Vec<Digest>, PullError> {
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
            descriptor.artifact_type.as_deref().is_some_and(sigstore_bundle::is_media_type)
        };
        // Some registries drop the artifact type. Then the layer of the referrer has it.
        let may_be = |descriptor: &Descriptor| {
            let kind = descriptor.artifact_type.as_deref();
            is_bundle(descriptor) || kind.is_none_or(|kind| kind.contains("empty"))
        };
        let all = indexes.into_iter().flat_map(|index| index.manifests);
        let mut found: Vec<_> = all.filter(may_be).collect();
        found.sort_by_key(|descriptor| !is_bundle(descriptor));
        if found.len() > MAXIMUM_SIGNATURES {
            self.count_unread();
            found.truncate(MAXIMUM_SIGNATURES);
        }
        Ok(found.into_iter().map(|descriptor| descriptor.digest).collect())
    }

    /// Returns a manifest that carries signatures. One that is missing or malformed carries none.
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

    /// Returns the content of a layer, if there are bytes left for it and the registry has it.
    async fn blob(
        &mut self,
        blob: SizedBlob,
        data: Option<Vec<u8>>,
    ) -> Result<Option<(Bytes, Option<Document>)>, PullError> {
        if self.read_bytes.saturating_add(blob.size) > MAXIMUM_READ_BYTES {
            self.unread = Some(format!(
                "they have more than {MAXIMUM_READ_BYTES} bytes, remove those that nobody needs"
            ));
            return Ok(None);
        }
        self.read_bytes += blob.size;
        if let Some(data) = data {
            return Ok(Some((data.into(), None)));
        }
        match small_blob::fetch(self.client, &self.options, blob).await {
            Ok(document) => Ok(Some((document.bytes.clone(), Some(document)))),
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
    use super::super::testing::{INDEX, MANIFEST, TestRegistry, descriptor, image, index};
    use super::*;
    use oci::credentials::Credential;
    use oci::registry::{Registry, RegistryOptions};

    #[tokio::test]
    async fn signatures_are_found_under_the_tag_and_among_the_referrers() {
        let registry = TestRegistry::start().await;
        let subject = Digest::of(b"subject");
        let (signed, large) = (b"payload", vec![0; 5 << 20]);
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
        let find = async |format| {
            let options = PullOptions::default();
            let subjects = [subject];
            let search = SignatureSearch::begin(client, options, limits, format, &subjects);
            let mut search = search.await.expect("a search");
            let mut found = Vec::new();
            while let Some(fetched) = search.next().await.expect("signatures") {
                found.push(fetched.signature);
            }
            found
        };
        let found = find(SignatureFormat::Any).await;
        let [
            FoundSignature::Unread(reason),
            FoundSignature::Simple(simple),
            FoundSignature::Bundle(bundle),
        ] = &found[..]
        else {
            panic!("{found:?}")
        };
        assert_eq!(
            (&simple.payload[..], &*simple.signature, simple.certificate.as_deref()),
            (&signed[..], "c2ln", Some("PEM"))
        );
        assert_eq!(&bundle.json[..], b"bundle");
        assert!(reason.contains("5242880 bytes"), "{reason}");
        let of_large = format!("blobs/{}", Digest::of(&large));
        assert!(registry.seen(&of_large).is_empty(), "too large for a signature");
        assert_eq!(find(SignatureFormat::Bundle).await.len(), 1);
    }
}
