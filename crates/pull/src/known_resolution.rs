//! The resolutions and proofs of a reference that are known without a request.

use std::cell::Cell;

use parking_lot::{Mutex, MutexGuard};

use super::artifact_request::Want;
use super::blob_origins::BlobOrigins;
use super::credential_candidates::{Candidate, Candidates};
use super::credentials_verification::Verification;
use super::error::PullError;
use super::manifest_fetch::config_of_image;
use super::reference_resolution::ResolvedDigests;
use oci::manifest::{ChoiceStep, ImageManifest, Manifest, ManifestChoice, check_config_platform};
use oci::{Digest, Platform};
use store::access::RepositorySources;
use store::access::access_proofs::Principal;
use unpack::Limits;

/// The size up to which any number of publishes parse documents of the store at once.
const LARGE_DOCUMENT: u64 = 256 << 10;

/// Reads what the store knows of references and manifests.
pub(super) struct KnownManifests {
    pub(super) origins: BlobOrigins,
    pub(super) limits: Limits,
    pub(super) verification: Verification,
    /// Held while a large cached document is parsed for a publish, which reserves no memory.
    pub(super) large_documents: Mutex<()>,
}

/// The resolution of a reference, as far as the store has it.
pub(super) struct Known {
    pub(super) digests: ResolvedDigests,
    /// A candidate that needs no further proof.
    pub(super) proven: Option<Candidate>,
    pub(super) sources: RepositorySources,
}

impl KnownManifests {
    /// Returns what a reference stands for. Blocking.
    pub(super) fn find(&self, want: &Want, candidates: &Candidates) -> Option<Known> {
        let (reference, platform) = (&want.reference, &want.platform);
        let sources = self.origins.sources(reference.repository());
        let recorded = self.origins.store.resolutions().for_namespace(
            want.tenant.namespace(),
            reference,
            platform,
        );
        let digests = match (recorded, reference.digest()) {
            (Some(resolution), _) => {
                ResolvedDigests { top: resolution.resolved, manifest: resolution.manifest }
            }
            // A manifest that the repository has sent can be read itself. One that cannot be used
            // is asked for again: what is wrong with it, the registry may tell.
            (None, Some(digest)) => {
                let read = |blob| self.kept_blob(&sources, blob, candidates);
                let manifest = self.kept(digest, platform, &read).ok()??;
                ResolvedDigests { top: digest, manifest }
            }
            (None, None) => return None,
        };
        let proven = self.proven(&sources, digests.manifest, candidates);
        Some(Known { digests, proven, sources })
    }

    /// A blob that is kept and that this repository has sent, or a manifest that the volume has been
    /// proven to read there. What others have sent is not here.
    fn kept_blob(
        &self,
        sources: &RepositorySources,
        blob: Digest,
        candidates: &Candidates,
    ) -> Result<Option<Vec<u8>>, PullError> {
        let anonymous = Principal::anonymous();
        let store = &self.origins.store;
        let is_proven = |who| store.proofs().is_proven(sources, blob, who);
        let is_of_repository = store.origins().blob_came_from(sources, blob).is_some()
            || store.imports().contains(&sources.repository, blob)
            || is_proven(&anonymous)
            || candidates.all.iter().any(|candidate| is_proven(&candidate.principal));
        if is_of_repository { Ok(store.documents().get(blob)?) } else { Ok(None) }
    }

    /// Waits for the turn to parse a document of the store, if it is a large one. Parsing takes
    /// milliseconds, and doing it for many at once would take much memory. Blocking.
    fn turn_of_large(&self, blob: Digest) -> Result<Option<MutexGuard<'_, ()>>, PullError> {
        let size = self.origins.store.documents().size(blob)?.unwrap_or_default();
        let turn = || self.large_documents.lock();
        Ok((size > LARGE_DOCUMENT).then(turn))
    }

    /// Returns the kept manifest that a digest means for a platform.
    fn kept(
        &self,
        digest: Digest,
        platform: &Platform,
        read: &dyn Fn(Digest) -> Result<Option<Vec<u8>>, PullError>,
    ) -> Result<Option<Digest>, PullError> {
        let turn = Cell::new(None);
        let read = &|blob| {
            if let Some(held) = turn.take() {
                turn.set(Some(held));
            } else {
                turn.set(self.turn_of_large(blob)?);
            }
            read(blob)
        };
        let limits = self.limits.manifest();
        let Some(bytes) = read(digest)? else { return Ok(None) };
        let document = Manifest::parse(&bytes, None, limits)?;
        drop(bytes);
        let mut choice = ManifestChoice::new(digest, document, platform, limits)?;
        let chosen = loop {
            match choice.step()? {
                ChoiceStep::Read(of) => {
                    let Some(bytes) = read(of.digest)? else { return Ok(None) };
                    choice.insert(of, &bytes)?;
                }
                ChoiceStep::Chosen(chosen) => break chosen,
            }
        };
        let fits = chosen.has_platform || kept_config_fits(chosen.image, platform, read)?;
        Ok(fits.then_some(chosen.digest))
    }

    /// Returns the first candidate that is proven to see the manifest. Content that is proven anonymously is open to
    /// all callers, and so is content for which the node's rule demands no proof.
    fn proven(
        &self,
        sources: &RepositorySources,
        manifest: Digest,
        candidates: &Candidates,
    ) -> Option<Candidate> {
        let (store, repository) = (&self.origins.store, &sources.repository);
        let proven = |who: &Principal| store.proofs().is_proven(sources, manifest, who);
        let mut all = candidates.all.iter();
        if let Some(candidate) = all.find(|candidate| proven(&candidate.principal)) {
            return Some(candidate.clone());
        }
        let imported = || store.imports().contains(repository, manifest);
        if self.verification.is_waived(repository, imported) {
            return Some(candidates.first());
        }
        proven(&Principal::anonymous()).then(Candidates::anonymous)
    }

    /// Compares the sizes of all layers of a cached manifest with the limit of the volume. Blocking.
    pub(super) fn check_bytes(&self, want: &Want, manifest: Digest) -> Result<(), PullError> {
        if want.maximum_bytes.is_none() {
            return Ok(());
        }
        let _turn = self.turn_of_large(manifest)?;
        // A damaged manifest is fetched again later, and then the size of its tree is compared.
        let Some(bytes) = self.origins.store.documents().get(manifest)? else { return Ok(()) };
        let Manifest::Image(image) = Manifest::parse(&bytes, None, self.limits.manifest())? else {
            return Ok(());
        };
        let sizes = image.layers.iter().map(|layer| layer.size);
        want.check_bytes(sizes.fold(0, u64::saturating_add))
    }
}

/// Compares the platform with the configuration that is kept of an image. False where none is kept, and
/// the registry has to be asked.
fn kept_config_fits(
    image: ImageManifest,
    wanted: &Platform,
    read: &dyn Fn(Digest) -> Result<Option<Vec<u8>>, PullError>,
) -> Result<bool, PullError> {
    let Some(config) = config_of_image(image) else { return Ok(true) };
    let kept = match config.data {
        Some(data) => Some(data),
        None => read(config.digest)?,
    };
    let Some(config) = kept else { return Ok(false) };
    check_config_platform(&config, wanted)?;
    Ok(true)
}
