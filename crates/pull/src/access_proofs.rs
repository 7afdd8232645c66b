//! Checks whether a credential opens a manifest, and which source confirms it.
//!
//! Access is proven for each repository, manifest and principal, by fetching the reference with a credential as if
//! nothing were cached. Neither the response nor its words reveal what is cached. Content that is proven anonymously is
//! open to all callers. A mirror's response without a credential proves nothing as long as the registry itself can be
//! asked.

use super::blob_origins::BlobOrigins;
use super::blocking;
use super::credential_candidates::PrincipalCredential;
use super::error::PullError;
use super::reference_resolution::ResolvedDigests;
use oci::credentials::Credential;
use oci::registry::{AnsweredBy, FetchedManifest, ManifestName, RegistryError};
use oci::{Reference, Repository};
use store::access::ProofSource;
use store::access::access_proofs::Principal;

/// Proves access to manifests.
pub(super) struct AccessProver {
    pub(super) origins: BlobOrigins,
}

impl AccessProver {
    /// Fetches the manifest of a reference as if nothing of it were cached. Returns its source, or `None` if the tag
    /// has moved and the registry no longer has the manifest of this node. For a principal with an earlier proof a
    /// request without a body suffices.
    pub(super) async fn see(
        &self,
        reference: &Reference,
        digests: ResolvedDigests,
        with: &PrincipalCredential,
    ) -> Result<Option<AnsweredBy>, PullError> {
        let repository = reference.repository();
        let ResolvedDigests { top, manifest } = digests;
        let client = self.origins.registry.at(repository, &with.credential);
        let (origins, of, who) = (self.origins.clone(), repository.clone(), with.principal.clone());
        let is_proven =
            move || Ok(origins.store.proofs().is_proven(&origins.sources(&of), manifest, &who));
        if blocking(is_proven).await? {
            return Ok(Some(client.probe(manifest).await?));
        }
        let name = ManifestName::of(reference);
        let fetched = client.manifest(&name).await?;
        if fetched.digest == top {
            self.origins
                .keep_document(repository, top, fetched.bytes.clone(), &fetched.answered_by)
                .await?;
            return Ok(Some(fetched.answered_by));
        }
        let digest = ManifestName::Digest(manifest);
        match client.manifest(&digest).await {
            Ok(fetched) => {
                let FetchedManifest { bytes, answered_by, .. } = &fetched;
                self.origins
                    .keep_document(repository, manifest, bytes.clone(), answered_by)
                    .await?;
                Ok(Some(answered_by.clone()))
            }
            Err(RegistryError::NotFound { .. }) => Ok(None),
            // The tag was requested. Its resolution on this node is not revealed to other callers.
            Err(error) => Err(error.about(&name.describe(repository)).into()),
        }
    }

    /// Returns the source that confirms that a credential opens a manifest.
    ///
    /// A mirror that got no credential serves its content to every client: the registry itself is asked, and its
    /// refusal counts. If it cannot be asked, or another host stands in its place, the mirror's response counts for as
    /// long as the mirror is configured, unless the registry is known to refuse anonymous requests for the repository.
    pub(super) async fn attest(
        &self,
        reference: &Reference,
        digests: ResolvedDigests,
        credential: &Credential,
        answered_by: AnsweredBy,
    ) -> Result<ProofSource, PullError> {
        let (address, is_anonymous) = match answered_by {
            AnsweredBy::Registry => return Ok(ProofSource::Registry),
            AnsweredBy::Mirror { address, with_credential } => (address, !with_credential),
        };
        let mirror = ProofSource::Mirror { address, is_anonymous };
        if !is_anonymous {
            return Ok(mirror);
        }
        let repository = reference.repository();
        let client = self.origins.registry.at(repository, credential);
        let word = client.manifest_of_registry(digests.top).await;
        if credential.is_anonymous() {
            self.remember_privacy(repository, word.as_ref().map(Option::is_some)).await?;
        }
        let error = match word {
            Ok(None) => return Ok(mirror),
            Ok(Some(_)) => {
                self.learn_privacy(repository, digests, credential).await?;
                return Ok(ProofSource::Registry);
            }
            Err(error) => error,
        };
        let (origins, of) = (self.origins.clone(), repository.clone());
        if error.is_transient()
            && !blocking(move || Ok(origins.store.anonymous_refusals().contains(&of))).await?
        {
            return Ok(mirror);
        }
        Err(error.about(&ManifestName::of(reference).describe(repository)).into())
    }

    /// Asks the registry itself once whether a repository that a credential has opened is open to
    /// everyone, so that it is known while the registry cannot be asked.
    async fn learn_privacy(
        &self,
        repository: &Repository,
        digests: ResolvedDigests,
        credential: &Credential,
    ) -> Result<(), PullError> {
        let ResolvedDigests { top, manifest } = digests;
        let (origins, of) = (self.origins.clone(), repository.clone());
        let is_known = move || {
            let anonymous = Principal::anonymous();
            Ok(origins.store.anonymous_refusals().contains(&of)
                || origins.store.proofs().is_proven(&origins.sources(&of), manifest, &anonymous))
        };
        if credential.is_anonymous() || blocking(is_known).await? {
            return Ok(());
        }
        let anonymous = Credential::Anonymous;
        let word = self.origins.registry.at(repository, &anonymous).manifest_of_registry(top).await;
        if matches!(word, Ok(Some(_))) {
            let (origins, of) = (self.origins.clone(), repository.clone());
            let (who, by) = (Principal::anonymous(), ProofSource::Registry);
            blocking(move || Ok(origins.store.proofs().put(&of, manifest, &who, &by)?)).await?;
        }
        self.remember_privacy(repository, word.as_ref().map(Option::is_some)).await
    }

    /// Remembers what the registry itself answered to an anonymous request.
    async fn remember_privacy(
        &self,
        repository: &Repository,
        word: Result<bool, &RegistryError>,
    ) -> Result<(), PullError> {
        let refuses = match word {
            Ok(true) => false,
            Err(error) if error.may_depend_on_credential() => true,
            Ok(false) | Err(_) => return Ok(()),
        };
        let (origins, of) = (self.origins.clone(), repository.clone());
        blocking(move || Ok(origins.store.anonymous_refusals().set(&of, refuses)?)).await
    }
}
