//! Manifests from a registry, with the index and the configuration that lead to them.

use bytes::Bytes;

use super::SizedBlob;
use super::blob_origins::{BlobOrigin, BlobOrigins};
use super::blocking;
use super::credential_candidates::PrincipalCredential;
use super::error::PullError;
use super::pull_options::PullOptions;
use super::reference_resolution::ResolvedDigests;
use super::small_blob;
use oci::credentials::Credential;
use oci::manifest::{
    ChoiceStep, Descriptor, ImageManifest, Manifest, ManifestChoice, check_config_platform,
};
use oci::registry::{AnsweredBy, FetchedManifest, ManifestName, RegistryError, RepositoryClient};
use oci::{Digest, Platform, Reference, Repository};
use store::resolution_records::Resolution;
use unpack::Limits;
use unpack::layer_rule::{UnpackMode, classify};

/// Fetches manifests, and keeps them.
pub(super) struct ManifestFetcher {
    pub(super) origins: BlobOrigins,
    pub(super) limits: Limits,
    pub(super) options: PullOptions,
}

/// The resolution of a reference by a response of its registry.
pub(super) struct Meaning {
    pub(super) digests: ResolvedDigests,
    /// The source of the response.
    pub(super) answered_by: AnsweredBy,
}

impl ManifestFetcher {
    /// Fetches what is not here yet of: index, manifest, configuration.
    pub(super) async fn fetch(
        &self,
        reference: &Reference,
        platform: &Platform,
        with: &PrincipalCredential,
    ) -> Result<Meaning, PullError> {
        let (repository, name) = (reference.repository(), ManifestName::of(reference));
        if let Some(known) = self.unchanged(reference, platform, &name, with).await? {
            return Ok(known);
        }
        let limits = self.limits.manifest();
        let client = self.origins.registry.at(repository, &with.credential);
        // The block drops each document before the next one is requested, which needs the memory.
        let (top, answered_by, mut choice) = {
            let top = client.manifest(&name).await?;
            let document = Manifest::parse(&top.bytes, top.content_type.as_deref(), limits)?;
            let choice = ManifestChoice::new(top.digest, document, platform, limits)?;
            self.check_layers(&choice)?;
            let (bytes, sent_by) = (top.bytes.clone(), &top.answered_by);
            self.origins.keep_document(repository, top.digest, bytes, sent_by).await?;
            (top.digest, top.answered_by, choice)
        };
        let chosen = loop {
            match choice.step()? {
                ChoiceStep::Read(of) => {
                    let (bytes, fetched) = self.read(client, &of).await?;
                    let digest = of.digest;
                    choice.insert(of, &bytes)?;
                    self.check_layers(&choice)?;
                    let sent_by =
                        fetched.as_ref().map_or(&answered_by, |fetched| &fetched.answered_by);
                    self.origins.keep_document(repository, digest, bytes, sent_by).await?;
                }
                ChoiceStep::Chosen(chosen) => break chosen,
            }
        };
        if !chosen.has_platform
            && let Some(config) = config_of_image(chosen.image)
        {
            self.check_platform(client, platform, config).await?;
        }
        let digests = ResolvedDigests { top, manifest: chosen.digest };
        Ok(Meaning { digests, answered_by })
    }

    /// Fetches and keeps a manifest that was kept before.
    pub(super) async fn fetch_again(
        &self,
        repository: &Repository,
        digest: Digest,
        credential: &Credential,
    ) -> Result<(), PullError> {
        let name = ManifestName::Digest(digest);
        let fetched = self.origins.registry.at(repository, credential).manifest(&name).await?;
        let FetchedManifest { bytes, answered_by, .. } = &fetched;
        self.origins.keep_document(repository, digest, bytes.clone(), answered_by).await
    }

    /// Refuses a manifest that no volume can show, so that it is not kept.
    fn check_layers(&self, choice: &ManifestChoice) -> Result<(), PullError> {
        if let Some(image) = choice.chosen() {
            classify(image, UnpackMode::Auto, &self.limits)?;
        }
        Ok(())
    }

    /// A tag that still means what it meant: one request without a body tells. For one who has not
    /// been proven to read it the same is asked as if nothing were here.
    async fn unchanged(
        &self,
        reference: &Reference,
        platform: &Platform,
        name: &ManifestName,
        with: &PrincipalCredential,
    ) -> Result<Option<Meaning>, PullError> {
        let ManifestName::Tag(tag) = name else { return Ok(None) };
        let (origins, asked, asked_for) =
            (self.origins.clone(), reference.clone(), platform.clone());
        let who = with.principal.clone();
        let known = blocking(move || {
            let known = origins.store.resolutions().get(&asked, &asked_for);
            let kept = |known: &Resolution| {
                let (sources, manifest) = (origins.sources(asked.repository()), known.manifest);
                origins.store.proofs().is_proven(&sources, manifest, &who)
                    && matches!(origins.store.documents().get(manifest), Ok(Some(_)))
            };
            Ok(known.filter(kept))
        });
        let Some(known) = known.await? else { return Ok(None) };
        let (registry, repository) = (&self.origins.registry, reference.repository());
        let current = match registry.at(repository, &with.credential).resolve_tag(tag).await {
            // Some registries know no such request; the one for the manifest itself decides.
            Err(RegistryError::NotFound { .. }) => None,
            current => current?,
        };
        let digests = ResolvedDigests { top: known.resolved, manifest: known.manifest };
        let current = current.filter(|current| current.digest == digests.top);
        Ok(current.map(|current| Meaning { digests, answered_by: current.answered_by }))
    }

    /// Reads what an index points at: from the index itself, or from the registry.
    async fn read(
        &self,
        client: RepositoryClient<'_>,
        chosen: &Descriptor,
    ) -> Result<(Bytes, Option<FetchedManifest>), PullError> {
        if let Some(data) = &chosen.data {
            return Ok((data.clone().into(), None));
        }
        if chosen.size > self.limits.manifest_bytes {
            let what = format!("the manifest {}", chosen.digest);
            return Err(RegistryError::TooLarge { what, limit: self.limits.manifest_bytes }.into());
        }
        let fetched = client.manifest(&ManifestName::Digest(chosen.digest)).await?;
        let (digest, expected, got) = (chosen.digest, chosen.size, fetched.bytes.len() as u64);
        if got != expected {
            return Err(PullError::BlobSize { digest, expected, got, encoding: None });
        }
        Ok((fetched.bytes.clone(), Some(fetched)))
    }

    /// A single manifest may say in its configuration what it is for.
    async fn check_platform(
        &self,
        client: RepositoryClient<'_>,
        wanted: &Platform,
        config: Descriptor,
    ) -> Result<(), PullError> {
        let (digest, size, limit) = (config.digest, config.size, self.limits.config_bytes);
        if size > limit {
            return Err(PullError::ConfigTooLarge { size, limit });
        }
        if let Some(data) = &config.data {
            return Ok(check_config_platform(data, wanted)?);
        }
        let (origins, of) = (self.origins.clone(), client.repository.clone());
        let read = move || {
            // Another's configuration is as if it were not here.
            let is_ours = origins.of(&origins.sources(&of), digest) == BlobOrigin::Repository;
            if is_ours { Ok(origins.store.documents().get(digest)?) } else { Ok(None) }
        };
        if let Some(kept) = blocking(read).await? {
            return Ok(check_config_platform(&kept, wanted)?);
        }
        let blob = SizedBlob { digest, size };
        let fetched = small_blob::fetch(client, &self.options, blob).await?;
        let (bytes, sent_by) = (fetched.bytes.clone(), &fetched.answered_by);
        self.origins.keep_document(client.repository, digest, bytes, sent_by).await?;
        Ok(check_config_platform(&fetched.bytes, wanted)?)
    }
}

/// Returns the configuration that may name the platform of an image.
pub(super) fn config_of_image(manifest: ImageManifest) -> Option<Descriptor> {
    let (is_image, is_of_files) = (manifest.is_image(), manifest.has_titles());
    let mut config = *manifest.config.filter(|_| is_image)?;
    if config.size == 0 {
        // A missing size reads as 0. Files are pushed with `--config /dev/null` and the type of an image's
        // configuration too.
        if is_of_files || config.digest != Digest::of(b"") {
            return None;
        }
        config.data = Some(Vec::new());
    }
    Some(config)
}
