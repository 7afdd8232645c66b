//! What a reference means now, and whether this volume may see it.
//!
//! Access is proven per repository, manifest and principal: by having fetched
//! the manifest with a credential, or by one cheap request for it. What anybody
//! may read (proven anonymously) is open to everyone.

use std::sync::Arc;

use super::error::PullError;
use super::flights::Outcome;
use super::want::{IfUnavailable, PullPolicy, Want};
use super::{Inner, Puller};
use crate::oci::credentials::Credential;
use crate::oci::manifest::{
    Descriptor, ImageManifest, Manifest, ManifestError, check_config_platform,
};
use crate::oci::registry::{ManifestName, RegistryError};
use crate::oci::{Digest, Platform, Reference, Repository};
use crate::store::access::Principal;
use crate::store::resolutions::Resolution;

/// A manifest that this volume may see.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The chosen manifest.
    pub manifest: Digest,
    /// The credential that was proven, for fetching more.
    pub credential: Credential,
}

/// Callers with the same wish and the same credentials share one request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ResolveKey {
    reference: String,
    platform: Platform,
    principals: Vec<Principal>,
    question: Question,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Question {
    /// What does the tag or digest mean?
    Meaning,
    /// May I see this manifest?
    Access(Digest),
}

/// What is known of a reference without asking anybody.
#[derive(Debug)]
struct Known {
    manifest: Digest,
    /// A credential that has been proven to see it.
    proven: Option<Credential>,
}

type Candidates = Vec<(Principal, Credential)>;

impl Puller {
    /// Resolves and proves.
    pub(super) async fn resolve(&self, want: &Want) -> Outcome<Resolved> {
        let inner = &self.0;
        let candidates = want.candidates(inner.store.node_key());
        let known = inner.known(&want.reference, &want.platform, &candidates).await?;
        let must_ask = match want.policy {
            PullPolicy::Never if known.is_none() => return Err(Arc::new(PullError::NotCached)),
            PullPolicy::Never | PullPolicy::IfNotPresent => false,
            PullPolicy::Always => true,
        };
        let Some(Known { manifest, proven }) = known else {
            return self.ask(want, &candidates, Question::Meaning).await;
        };
        let cached = proven.map(|credential| Resolved { manifest, credential });
        let question = match cached {
            Some(cached) if !must_ask => return Ok(cached),
            None if want.policy == PullPolicy::Never => return Err(Arc::new(PullError::NotProven)),
            // A digest means the same for ever; there is only access to be proven.
            _ if !must_ask || want.reference.digest().is_some() => Question::Access(manifest),
            _ => Question::Meaning,
        };
        let asked = match self.ask(want, &candidates, question).await {
            // The registry has dropped what the tag meant here: it means something else now.
            Err(error) if question != Question::Meaning && want.is_moved(&error) => {
                self.ask(want, &candidates, Question::Meaning).await
            }
            asked => asked,
        };
        match (asked, cached) {
            // The last answer, for those who have been proven to see it.
            (Err(error), Some(cached))
                if error.is_unavailable() && want.if_unavailable == IfUnavailable::UseCached =>
            {
                Ok(cached)
            }
            (asked, _) => asked,
        }
    }

    async fn ask(
        &self,
        want: &Want,
        candidates: &Candidates,
        question: Question,
    ) -> Outcome<Resolved> {
        let key = ResolveKey {
            reference: want.reference.to_string(),
            platform: want.platform.clone(),
            principals: candidates.iter().map(|(principal, _)| principal.clone()).collect(),
            question,
        };
        let (inner, candidates) = (Arc::clone(&self.0), candidates.clone());
        let (reference, platform) = (want.reference.clone(), want.platform.clone());
        let work = |_| async move {
            match question {
                Question::Meaning => inner.fetch_meaning(reference, platform, candidates).await,
                Question::Access(manifest) => {
                    inner.fetch_access(reference, manifest, candidates).await
                }
            }
        };
        self.0.resolving.join(key, work).outcome().await
    }
}

impl Inner {
    /// What is known without asking anybody.
    async fn known(
        self: &Arc<Self>,
        reference: &Reference,
        platform: &Platform,
        candidates: &Candidates,
    ) -> Outcome<Option<Known>> {
        let (inner, candidates) = (Arc::clone(self), candidates.clone());
        let (reference, platform) = (reference.clone(), platform.clone());
        let read = move || {
            let recorded = inner.store.resolution(&reference, &platform);
            let manifest = match (recorded, reference.digest()) {
                (Some(resolution), _) => resolution.manifest,
                // A kept manifest can be read itself, whatever repository it came from. One that
                // cannot be used is asked for again: what is wrong with it, the registry may tell.
                (None, Some(digest)) => match inner.kept(digest, &platform) {
                    Ok(Some(manifest)) => manifest,
                    Ok(None) | Err(_) => return Ok(None),
                },
                (None, None) => return Ok(None),
            };
            let proven = inner.proven(&reference, manifest, &candidates);
            Ok(Some(Known { manifest, proven }))
        };
        blocking(read).await.map_err(Arc::new)
    }

    /// What a kept manifest or index means for a platform.
    fn kept(&self, digest: Digest, platform: &Platform) -> Result<Option<Digest>, PullError> {
        let Some(bytes) = self.store.blob(digest)? else { return Ok(None) };
        let (manifest, bytes, named_by_index) =
            match Manifest::parse(&bytes, None, self.limits.manifest())? {
                Manifest::Image(_) => (digest, Some(bytes), false),
                Manifest::Index(index) => {
                    let chosen = index.choose(platform)?;
                    let bytes = self.store.blob(chosen.digest)?;
                    (chosen.digest, bytes, chosen.platform.is_some())
                }
            };
        let Some(bytes) = bytes else { return Ok(None) };
        let fits = named_by_index || self.kept_config_fits(&bytes, platform)?;
        Ok(fits.then_some(manifest))
    }

    /// The first candidate that has been proven to see the manifest. What anybody may read
    /// is open to everyone.
    fn proven(
        &self,
        reference: &Reference,
        manifest: Digest,
        candidates: &Candidates,
    ) -> Option<Credential> {
        let repository = reference.repository();
        let proven = |principal| self.store.is_proven(repository, manifest, principal);
        if let Some((_, credential)) = candidates.iter().find(|(principal, _)| proven(principal)) {
            return Some(credential.clone());
        }
        proven(&Principal::anonymous()).then_some(Credential::Anonymous)
    }

    /// Asks what the reference means, with one credential after the other.
    async fn fetch_meaning(
        self: Arc<Self>,
        reference: Reference,
        platform: Platform,
        candidates: Candidates,
    ) -> Result<Resolved, PullError> {
        let mut refused = None;
        for (principal, credential) in candidates {
            match self.fetch_manifest(&reference, &platform, &credential).await {
                Ok((resolved, manifest)) => {
                    let inner = Arc::clone(&self);
                    blocking(move || {
                        inner.remember(&reference, &platform, &principal, resolved, manifest)
                    })
                    .await?;
                    return Ok(Resolved { manifest, credential });
                }
                Err(error) if may_depend_on_credential(&error) => {
                    refused.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(refused.unwrap_or(PullError::Crashed))
    }

    /// Fetches what is not here yet of: index, manifest, configuration.
    async fn fetch_manifest(
        self: &Arc<Self>,
        reference: &Reference,
        platform: &Platform,
        credential: &Credential,
    ) -> Result<(Digest, Digest), PullError> {
        let repository = reference.repository();
        let name = match reference.digest() {
            Some(digest) => ManifestName::Digest(digest),
            None => ManifestName::Tag(reference.tag_or_latest().to_owned()),
        };
        if let Some(known) = self.unchanged(reference, platform, &name, credential).await? {
            return Ok(known);
        }
        let top = self.registry.manifest(repository, &name, credential).await?;
        let limits = self.limits.manifest();
        let parsed = Manifest::parse(&top.bytes, top.content_type.as_deref(), limits)?;
        self.keep(repository, top.digest, top.bytes.to_vec()).await?;
        let index = match parsed {
            Manifest::Image(manifest) => {
                self.check_platform(reference, platform, credential, &manifest).await?;
                return Ok((top.digest, top.digest));
            }
            Manifest::Index(index) => index,
        };
        let chosen = index.choose(platform)?;
        let bytes = self.manifest_bytes(reference, chosen, credential).await?;
        match Manifest::parse(&bytes, Some(&chosen.media_type), limits)? {
            Manifest::Index(_) => Err(ManifestError::NestedIndex(chosen.digest).into()),
            Manifest::Image(manifest) => {
                if chosen.platform.is_none() {
                    self.check_platform(reference, platform, credential, &manifest).await?;
                }
                self.keep(repository, chosen.digest, bytes).await?;
                Ok((top.digest, chosen.digest))
            }
        }
    }

    /// A tag that still means what it meant: one request without a body tells.
    async fn unchanged(
        self: &Arc<Self>,
        reference: &Reference,
        platform: &Platform,
        name: &ManifestName,
        credential: &Credential,
    ) -> Result<Option<(Digest, Digest)>, PullError> {
        let ManifestName::Tag(tag) = name else { return Ok(None) };
        let (inner, asked, asked_for) = (Arc::clone(self), reference.clone(), platform.clone());
        let known = blocking(move || {
            let known = inner.store.resolution(&asked, &asked_for);
            let kept = |known: &Resolution| matches!(inner.store.blob(known.manifest), Ok(Some(_)));
            Ok(known.filter(kept))
        });
        let Some(known) = known.await? else { return Ok(None) };
        let current = self.registry.resolve_tag(reference.repository(), tag, credential).await?;
        Ok((current == Some(known.resolved)).then_some((known.resolved, known.manifest)))
    }

    /// The manifest that an index points at.
    async fn manifest_bytes(
        self: &Arc<Self>,
        reference: &Reference,
        chosen: &Descriptor,
        credential: &Credential,
    ) -> Result<Vec<u8>, PullError> {
        if let Some(data) = &chosen.data {
            return Ok(data.clone());
        }
        if chosen.size > self.limits.manifest_bytes {
            let what = format!("the manifest {}", chosen.digest);
            return Err(RegistryError::TooLarge { what, limit: self.limits.manifest_bytes }.into());
        }
        let name = ManifestName::Digest(chosen.digest);
        let fetched = self.registry.manifest(reference.repository(), &name, credential).await?;
        let (digest, expected, got) = (chosen.digest, chosen.size, fetched.bytes.len() as u64);
        if got != expected {
            return Err(PullError::BlobSize { digest, expected, got });
        }
        Ok(fetched.bytes.to_vec())
    }

    /// A single manifest may say in its configuration what it is for.
    async fn check_platform(
        self: &Arc<Self>,
        reference: &Reference,
        wanted: &Platform,
        credential: &Credential,
        manifest: &ImageManifest,
    ) -> Result<(), PullError> {
        let Some(config) = manifest.config.as_ref().filter(|_| manifest.has_image_config()) else {
            return Ok(());
        };
        let bytes = self.config_bytes(reference, config, credential).await?;
        Ok(check_config_platform(&bytes, wanted)?)
    }

    /// As [`Inner::check_platform`], from what is kept; false when the
    /// configuration is not, and the registry has to be asked.
    fn kept_config_fits(&self, manifest: &[u8], wanted: &Platform) -> Result<bool, PullError> {
        let Manifest::Image(manifest) = Manifest::parse(manifest, None, self.limits.manifest())?
        else {
            return Ok(false);
        };
        let Some(config) = manifest.config.as_ref().filter(|_| manifest.has_image_config()) else {
            return Ok(true);
        };
        let kept = match &config.data {
            Some(data) => Some(data.clone()),
            None => self.store.blob(config.digest)?,
        };
        let Some(config) = kept else { return Ok(false) };
        check_config_platform(&config, wanted)?;
        Ok(true)
    }

    async fn config_bytes(
        self: &Arc<Self>,
        reference: &Reference,
        config: &Descriptor,
        credential: &Credential,
    ) -> Result<Vec<u8>, PullError> {
        let (digest, size, limit) = (config.digest, config.size, self.limits.config_bytes);
        if size > limit {
            return Err(PullError::ConfigTooLarge { size, limit });
        }
        if let Some(data) = &config.data {
            return Ok(data.clone());
        }
        let inner = Arc::clone(self);
        if let Some(kept) = blocking(move || Ok(inner.store.blob(digest)?)).await? {
            return Ok(kept);
        }
        let mut body = self.registry.blob(reference.repository(), digest, 0, credential).await?;
        let mut bytes = Vec::new();
        while let Some(chunk) = body.chunk().await? {
            if (bytes.len() + chunk.len()) as u64 > size {
                return Err(PullError::BlobSize { digest, expected: size, got: size + 1 });
            }
            bytes.extend_from_slice(&chunk);
        }
        if bytes.len() as u64 != size {
            return Err(PullError::BlobSize { digest, expected: size, got: bytes.len() as u64 });
        }
        let got = Digest::of(&bytes);
        if got != digest {
            return Err(PullError::BlobDigest { expected: digest, got });
        }
        self.keep(reference.repository(), digest, bytes.clone()).await?;
        Ok(bytes)
    }

    /// One cheap request that proves access to a manifest that is here already.
    async fn fetch_access(
        self: Arc<Self>,
        reference: Reference,
        manifest: Digest,
        candidates: Candidates,
    ) -> Result<Resolved, PullError> {
        let repository = reference.repository();
        let mut refused = None;
        for (principal, credential) in candidates {
            match self.see(repository, manifest, &credential).await {
                Ok(()) => {
                    let (inner, repository) = (Arc::clone(&self), repository.clone());
                    blocking(move || {
                        Ok(inner.store.put_proof(&repository, manifest, &principal)?)
                    })
                    .await?;
                    return Ok(Resolved { manifest, credential });
                }
                Err(error) if may_depend_on_credential(&error) => {
                    refused.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(refused.unwrap_or(PullError::Crashed))
    }

    /// The cheapest request that proves access. A host that has sent the manifest
    /// before need only say that it has it; another one has to send it: anybody
    /// can say yes to a digest.
    async fn see(
        self: &Arc<Self>,
        repository: &Repository,
        manifest: Digest,
        credential: &Credential,
    ) -> Result<(), PullError> {
        let (inner, host) = (Arc::clone(self), repository.host().to_owned());
        let sent = move || Ok(inner.store.blob_came_from_host(&host, manifest));
        if blocking(sent).await? {
            return Ok(self.registry.probe(repository, manifest, credential).await?);
        }
        let name = ManifestName::Digest(manifest);
        let fetched = self.registry.manifest(repository, &name, credential).await?;
        self.keep(repository, manifest, fetched.bytes.to_vec()).await
    }

    async fn keep(
        self: &Arc<Self>,
        repository: &Repository,
        digest: Digest,
        bytes: Vec<u8>,
    ) -> Result<(), PullError> {
        let (inner, repository) = (Arc::clone(self), repository.clone());
        blocking(move || {
            inner.store.put_blob(digest, &bytes)?;
            Ok(inner.store.put_blob_origin(&repository, digest)?)
        })
        .await
    }

    fn remember(
        &self,
        reference: &Reference,
        platform: &Platform,
        principal: &Principal,
        resolved: Digest,
        manifest: Digest,
    ) -> Result<(), PullError> {
        self.store.put_proof(reference.repository(), manifest, principal)?;
        let text = reference.to_string();
        let resolution = Resolution { reference: text, resolved, manifest };
        Ok(self.store.put_resolution(reference, platform, &resolution)?)
    }
}

/// Whether the next credential of the keyring may fare better. Registries that
/// hide private repositories answer 404.
fn may_depend_on_credential(error: &PullError) -> bool {
    matches!(
        error.root(),
        PullError::Registry(
            RegistryError::Unauthorized { .. }
                | RegistryError::Forbidden { .. }
                | RegistryError::NotFound { .. }
        )
    )
}

/// Runs disk work off the async threads.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PullError> + Send + 'static,
) -> Result<T, PullError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(PullError::Crashed))
}
