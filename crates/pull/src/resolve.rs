//! What a reference means now, and whether this volume may see it.
//!
//! Access is proven per repository, manifest and principal: by fetching with a
//! credential what the reference names, as if nothing were here. What is here is
//! told apart neither by the answer nor by its words. What anybody may read
//! (proven anonymously) is open to everyone. What a mirror gives without having
//! seen a credential proves nothing as long as the registry itself can be asked.

use std::cell::Cell;
use std::sync::{Arc, MutexGuard, PoisonError};

use bytes::Bytes;

use super::candidates::{Candidate, Candidates};
use super::document;
use super::error::PullError;
use super::flights::Outcome;
use super::origins::content_source;
use super::tenant::Caller;
use super::want::{IfUnavailable, Priority, PullPolicy, Want};
use super::{Inner, Puller};
use oci::credentials::Credential;
use oci::manifest::{
    Descriptor, ImageManifest, IndexEntries, Manifest, ManifestError, check_config_platform,
};
use oci::registry::{AnsweredBy, FetchedManifest, ManifestName, RegistryError};
use oci::{Digest, Platform, Reference, Repository};
use store::access::{Mirrors, Principal, ProofSource};
use store::resolutions::Resolution;
use unpack::layer_rule::{UnpackMode, classify};

/// The size up to which any number of publishes parse documents of the store at once.
const LARGE_DOCUMENT: u64 = 256 << 10;

/// A manifest that this volume may see.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// What the reference names: the manifest, or the index that it was chosen from.
    pub top: Digest,
    /// The chosen manifest.
    pub manifest: Digest,
    access: Access,
}

impl Resolved {
    /// A manifest that the node itself works on, for nobody: with what it could fetch more.
    pub(super) fn for_the_node(
        manifest: Digest,
        candidates: Candidates,
        candidate: Candidate,
    ) -> Self {
        let access = Access::Before(Box::new((candidates, candidate)));
        Self { top: manifest, manifest, access }
    }
}

/// With what more of it is fetched.
#[derive(Clone, Debug)]
enum Access {
    /// A credential that has just been proven.
    Proven(Credential),
    /// Proven before: had when it is needed.
    Before(Box<(Candidates, Candidate)>),
}

/// Callers with the same wish and the same credentials share one request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ResolveKey {
    reference: String,
    platform: Platform,
    principals: Vec<Principal>,
    account: Option<Principal>,
    question: Question,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Question {
    /// What does the tag or digest mean?
    Meaning,
    /// The same, for one who decides himself whether `IfNotPresent` is to mean it too.
    MeaningUnremembered,
    /// May I see this manifest, which what the reference names led to?
    Access { top: Digest, manifest: Digest },
}

/// What a reference means by an answer just now.
struct Meaning {
    top: Digest,
    manifest: Digest,
    /// Who gave the answer.
    answered_by: AnsweredBy,
}

/// What is known of a reference without asking anybody.
#[derive(Debug)]
pub(super) struct Known {
    top: Digest,
    pub(super) manifest: Digest,
    /// One that needs no further proof.
    pub(super) proven: Option<Candidate>,
}

impl Puller {
    /// Resolves and proves.
    pub(super) async fn resolve(&self, want: &Want) -> Outcome<Resolved> {
        let (inner, for_candidates) = (Arc::clone(&self.0), want.clone());
        let read = move || {
            let candidates = inner.candidates(&for_candidates);
            let mirrors = inner.mirrors(for_candidates.reference.repository());
            let known = inner.known(&for_candidates, &candidates, &mirrors);
            Ok((candidates, known))
        };
        let (candidates, known) = blocking(read).await.map_err(Arc::new)?;
        let must_ask = match want.policy {
            PullPolicy::Never if known.is_none() => return Err(Arc::new(PullError::NotCached)),
            PullPolicy::Never | PullPolicy::IfNotPresent => false,
            PullPolicy::Always => true,
        };
        let Some(Known { top, manifest, proven }) = known else {
            return self.ask(want, &candidates, Question::Meaning).await;
        };
        let before = |candidate| Resolved {
            top,
            manifest,
            access: Access::Before(Box::new((candidates.clone(), candidate))),
        };
        let cached = proven.map(before);
        let question = match cached {
            Some(cached) if !must_ask => return Ok(cached),
            // What is cached for others is not cached for this volume.
            None if want.policy == PullPolicy::Never => return Err(Arc::new(PullError::NotCached)),
            // A digest means the same for ever; there is only access to be proven.
            _ if !must_ask || want.reference.digest().is_some() => {
                Question::Access { top, manifest }
            }
            _ => Question::Meaning,
        };
        let error = match self.ask(want, &candidates, question).await {
            Err(error) if error.is_unavailable() => error,
            asked => return asked,
        };
        // The last answer, for those who have been proven to see it; credentials that rotate
        // are known by their account while no registry can be asked. A volume that asks every
        // time fails without an answer, unless its attributes say otherwise.
        let uses_cached = !must_ask || want.if_unavailable == IfUnavailable::UseCached;
        match cached {
            Some(cached) if uses_cached => Ok(cached),
            None if uses_cached => {
                let is_proven = self.account_is_proven(want, &candidates, manifest).await?;
                is_proven.then(|| before(candidates.first())).ok_or(error)
            }
            _ => Err(error),
        }
    }

    /// Returns whether a caller of the same account was proven not long ago.
    async fn account_is_proven(
        &self,
        want: &Want,
        candidates: &Candidates,
        manifest: Digest,
    ) -> Outcome<bool> {
        let Some(account) = candidates.account(self.0.store.node_key()) else { return Ok(false) };
        let (inner, repository) = (Arc::clone(&self.0), want.reference.repository().clone());
        let read = move || {
            let (mirrors, age) = (inner.mirrors(&repository), inner.verification.proof_ttl);
            let store = &inner.store;
            Ok(store.is_proven_for_account(&repository, manifest, (&account, age), &mirrors))
        };
        blocking(read).await.map_err(Arc::new)
    }

    /// What the reference means at its registry now. What it means for `IfNotPresent` stays.
    pub(super) async fn resolve_unremembered(&self, want: &Want) -> Outcome<Resolved> {
        let (inner, for_candidates) = (Arc::clone(&self.0), want.clone());
        let candidates = blocking(move || Ok(inner.candidates(&for_candidates))).await;
        let candidates = candidates.map_err(Arc::new)?;
        self.ask(want, &candidates, Question::MeaningUnremembered).await
    }

    /// The credential for fetching more of what a volume may see.
    pub(super) async fn credential(&self, resolved: &Resolved) -> Outcome<Credential> {
        match &resolved.access {
            Access::Proven(credential) => Ok(credential.clone()),
            Access::Before(before) => {
                let (candidates, candidate) = before.as_ref();
                let redeemed = candidates.redeem(candidate, &self.0.node_credentials).await;
                let credentials = redeemed.map_err(Arc::new)?;
                Ok(credentials.into_iter().next().unwrap_or_default())
            }
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
            principals: candidates.principals(),
            account: candidates.account(self.0.store.node_key()),
            question,
        };
        let (inner, candidates) = (Arc::clone(&self.0), candidates.clone());
        let (reference, platform) = (want.reference.clone(), want.platform.clone());
        let work = |_| inner.fetch(question, reference, platform, candidates);
        // A small question, for which credential plugins are run: never as idle processes.
        let caller = Caller { priority: Priority::Pod, ..want.caller() };
        self.0.resolving.join(key, caller, work).outcome().await
    }
}

impl Inner {
    /// What is known without asking anybody. Blocking.
    pub(super) fn known(
        &self,
        want: &Want,
        candidates: &Candidates,
        mirrors: &Mirrors,
    ) -> Option<Known> {
        let (reference, platform) = (&want.reference, &want.platform);
        let repository = reference.repository();
        let recorded = self.store.resolution_for(want.tenant.namespace(), reference, platform);
        let (top, manifest) = match (recorded, reference.digest()) {
            (Some(resolution), _) => (resolution.resolved, resolution.manifest),
            // A manifest that the repository has sent can be read itself. One that cannot be used
            // is asked for again: what is wrong with it, the registry may tell.
            (None, Some(digest)) => match self.kept(digest, platform, &|blob| {
                self.kept_blob(repository, blob, candidates, mirrors)
            }) {
                Ok(Some(manifest)) => (digest, manifest),
                Ok(None) | Err(_) => return None,
            },
            (None, None) => return None,
        };
        let proven = self.proven(repository, manifest, candidates, mirrors);
        Some(Known { top, manifest, proven })
    }

    /// A blob that is kept and that this repository has sent, or a manifest that the volume has been
    /// proven to read there. What others have sent is not here.
    fn kept_blob(
        &self,
        repository: &Repository,
        blob: Digest,
        candidates: &Candidates,
        mirrors: &Mirrors,
    ) -> Result<Option<Vec<u8>>, PullError> {
        let anonymous = Principal::anonymous();
        let is_proven = |who| self.store.is_proven(repository, blob, who, mirrors);
        let is_of_repository = self.store.blob_came_from(repository, blob, mirrors).is_some()
            || self.store.is_imported(repository, blob)
            || is_proven(&anonymous)
            || candidates.all().iter().any(|candidate| is_proven(&candidate.principal));
        if is_of_repository { Ok(self.store.blob(blob)?) } else { Ok(None) }
    }

    /// Waits for the turn to parse a document of the store, if it is a large one. Parsing takes
    /// milliseconds, and doing it for many at once would take much memory. Blocking.
    pub(super) fn turn_of_large(
        &self,
        blob: Digest,
    ) -> Result<Option<MutexGuard<'_, ()>>, PullError> {
        let size = self.store.blob_size(blob)?.unwrap_or_default();
        let turn = || self.large_documents.lock().unwrap_or_else(PoisonError::into_inner);
        Ok((size > LARGE_DOCUMENT).then(turn))
    }

    /// What a kept manifest or index means for a platform.
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
        let Some(bytes) = read(digest)? else { return Ok(None) };
        let (manifest, bytes, named_by_index) =
            match Manifest::parse(&bytes, None, self.limits.manifest())? {
                Manifest::Image(_) => (digest, Some(bytes), false),
                Manifest::Index(index) => {
                    let limits = self.limits.manifest();
                    let mut entries = IndexEntries::for_this_node(index, platform, limits)?;
                    drop(bytes);
                    while let Some(nested) = entries.next_index() {
                        let Some(bytes) = read(nested.digest)? else { return Ok(None) };
                        entries.insert(nested, Manifest::parse(&bytes, None, limits)?)?;
                    }
                    let chosen = entries.index().choose(platform)?;
                    let bytes = read(chosen.digest)?;
                    (chosen.digest, bytes, chosen.platform.is_some())
                }
            };
        let Some(bytes) = bytes else { return Ok(None) };
        let fits = named_by_index || self.kept_config_fits(&bytes, platform, read)?;
        Ok(fits.then_some(manifest))
    }

    /// The first candidate that has been proven to see the manifest. What anybody may read is
    /// open to everyone, and so is what the node's rule asks no proof for.
    fn proven(
        &self,
        repository: &Repository,
        manifest: Digest,
        candidates: &Candidates,
        mirrors: &Mirrors,
    ) -> Option<Candidate> {
        let proven = |principal| self.store.is_proven(repository, manifest, principal, mirrors);
        if let Some(candidate) =
            candidates.all().iter().find(|candidate| proven(&candidate.principal))
        {
            return Some(candidate.clone());
        }
        let imported = || self.store.is_imported(repository, manifest);
        if self.verification.is_waived(repository, imported) {
            return Some(candidates.first());
        }
        proven(&Principal::anonymous()).then(Candidates::anonymous)
    }

    /// Asks with one credential after the other, until one is good enough.
    async fn fetch(
        self: Arc<Self>,
        question: Question,
        reference: Reference,
        platform: Platform,
        candidates: Candidates,
    ) -> Result<Resolved, PullError> {
        let (mut refused, mut failed) = (None, None);
        let mut asked = false;
        for candidate in candidates.all() {
            let credentials = match candidates.redeem(candidate, &self.node_credentials).await {
                Ok(credentials) => credentials,
                Err(error) => {
                    tracing::warn!(%reference, %error, "no credential from one of the node's sources");
                    failed.get_or_insert(error);
                    continue;
                }
            };
            for credential in credentials {
                asked = true;
                let with = (&credential, &candidate.principal);
                match self.fetch_with(question, &reference, &platform, with, &candidates).await {
                    Err(error) if may_depend_on_credential(&error) => {
                        tracing::debug!(%reference, %error, "refused with one of several credentials");
                        // Whom the registry does not know says nothing of the thing; the others do.
                        let says_more = |before| is_stranger(before) && !is_stranger(&error);
                        if refused.as_ref().is_none_or(says_more) {
                            refused = Some(error);
                        }
                    }
                    done => return done,
                }
            }
        }
        // Nobody who has a credential is asked for as anybody, as with the kubelet.
        if !asked {
            let with = (&Credential::Anonymous, &Principal::anonymous());
            match self.fetch_with(question, &reference, &platform, with, &candidates).await {
                Err(error) if may_depend_on_credential(&error) => refused = Some(error),
                done => return done,
            }
        }
        // A source that failed may have had the right one: its failure can pass, a refusal does not.
        Err(failed.or(refused).unwrap_or(PullError::Crashed))
    }

    /// Asks with one credential, and remembers what was proven with it.
    async fn fetch_with(
        self: &Arc<Self>,
        mut question: Question,
        reference: &Reference,
        platform: &Platform,
        with: (&Credential, &Principal),
        candidates: &Candidates,
    ) -> Result<Resolved, PullError> {
        let (credential, principal) = with;
        let seen = match question {
            Question::Access { top, manifest } => {
                let seen = self.see(reference, (top, manifest), with).await?;
                seen.map(|answered_by| Meaning { top, manifest, answered_by })
            }
            Question::Meaning | Question::MeaningUnremembered => None,
        };
        let Meaning { top, manifest, answered_by } = if let Some(seen) = seen {
            seen
        } else {
            if matches!(question, Question::Access { .. }) {
                // The registry has dropped what the tag meant here: it means something else now.
                question = Question::Meaning;
            }
            self.fetch_manifest(reference, platform, with).await?
        };
        let by = self.attest(reference, (top, manifest), credential, answered_by).await?;
        let (inner, reference, platform) = (Arc::clone(self), reference.clone(), platform.clone());
        let (principal, candidates) = (principal.clone(), candidates.clone());
        let remember = move || {
            let (store, repository) = (&inner.store, reference.repository());
            store.put_proof(repository, manifest, &principal, &by)?;
            if let Some(account) = candidates.account(store.node_key()) {
                store.put_account_proof(repository, manifest, &account, &by)?;
            }
            if question == Question::Meaning {
                let text = reference.to_string();
                let resolution =
                    Resolution { reference: text, resolved: top, manifest, platform: None };
                store.put_resolution(&reference, &platform, &resolution)?;
            }
            Ok(())
        };
        blocking(remember).await?;
        Ok(Resolved { top, manifest, access: Access::Proven(credential.clone()) })
    }

    /// Fetches what the reference names, as if nothing of it were here; says who sent it. None when
    /// the tag has moved and the registry no longer has what it means on this node. One who has
    /// been proven before has seen it: for him a request without a body is enough.
    async fn see(
        self: &Arc<Self>,
        reference: &Reference,
        (top, manifest): (Digest, Digest),
        (credential, principal): (&Credential, &Principal),
    ) -> Result<Option<AnsweredBy>, PullError> {
        let repository = reference.repository();
        let (inner, of, who) = (Arc::clone(self), repository.clone(), principal.clone());
        let is_proven = move || Ok(inner.store.is_proven(&of, manifest, &who, &inner.mirrors(&of)));
        if blocking(is_proven).await? {
            return Ok(Some(self.registry.probe(repository, manifest, credential).await?));
        }
        let name = name_of(reference);
        let fetched = self.registry.manifest(repository, &name, credential).await?;
        if fetched.digest == top {
            self.keep(repository, top, fetched.bytes.clone(), &fetched.answered_by).await?;
            return Ok(Some(fetched.answered_by));
        }
        let digest = ManifestName::Digest(manifest);
        match self.registry.manifest(repository, &digest, credential).await {
            Ok(fetched) => {
                let FetchedManifest { bytes, answered_by, .. } = &fetched;
                self.keep(repository, manifest, bytes.clone(), answered_by).await?;
                Ok(Some(answered_by.clone()))
            }
            Err(RegistryError::NotFound { .. }) => Ok(None),
            // The tag is what was asked for; what it means on this node is told to nobody else.
            Err(error) => Err(error.about(&name.describe(repository)).into()),
        }
    }

    /// Whose word it is that a credential opens a manifest.
    ///
    /// A mirror that was shown no credential gives to everyone what it has: the registry itself is
    /// asked, and its refusal counts. Where it cannot be asked, or another host stands in its place,
    /// the mirror's word counts for as long as it is configured, unless the registry is known to
    /// refuse the repository to an anonymous request.
    async fn attest(
        self: &Arc<Self>,
        reference: &Reference,
        (top, manifest): (Digest, Digest),
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
        let word = self.registry.manifest_of_registry(repository, top, credential).await;
        if credential.is_anonymous() {
            self.remember_privacy(repository, word.as_ref().map(Option::is_some)).await?;
        }
        let error = match word {
            Ok(None) => return Ok(mirror),
            Ok(Some(_)) => {
                self.learn_privacy(repository, (top, manifest), credential).await?;
                return Ok(ProofSource::Registry);
            }
            Err(error) => error,
        };
        let (inner, of) = (Arc::clone(self), repository.clone());
        if error.is_transient() && !blocking(move || Ok(inner.store.refuses_anonymous(&of))).await?
        {
            return Ok(mirror);
        }
        Err(error.about(&name_of(reference).describe(repository)).into())
    }

    /// Asks the registry itself once whether a repository that a credential has opened is open to
    /// everyone, so that it is known while the registry cannot be asked.
    async fn learn_privacy(
        self: &Arc<Self>,
        repository: &Repository,
        (top, manifest): (Digest, Digest),
        credential: &Credential,
    ) -> Result<(), PullError> {
        let (inner, of) = (Arc::clone(self), repository.clone());
        let is_known = move || {
            let anonymous = Principal::anonymous();
            Ok(inner.store.refuses_anonymous(&of)
                || inner.store.is_proven(&of, manifest, &anonymous, &inner.mirrors(&of)))
        };
        if credential.is_anonymous() || blocking(is_known).await? {
            return Ok(());
        }
        let anonymous = Credential::Anonymous;
        let word = self.registry.manifest_of_registry(repository, top, &anonymous).await;
        if matches!(word, Ok(Some(_))) {
            let (inner, of) = (Arc::clone(self), repository.clone());
            let (who, by) = (Principal::anonymous(), ProofSource::Registry);
            blocking(move || Ok(inner.store.put_proof(&of, manifest, &who, &by)?)).await?;
        }
        self.remember_privacy(repository, word.as_ref().map(Option::is_some)).await
    }

    /// Remembers what the registry itself answered to an anonymous request.
    async fn remember_privacy(
        self: &Arc<Self>,
        repository: &Repository,
        word: Result<bool, &RegistryError>,
    ) -> Result<(), PullError> {
        let refuses = match word {
            Ok(true) => false,
            Err(
                RegistryError::Unauthorized { .. }
                | RegistryError::Forbidden { .. }
                | RegistryError::NotFound { .. },
            ) => true,
            Ok(false) | Err(_) => return Ok(()),
        };
        let (inner, of) = (Arc::clone(self), repository.clone());
        blocking(move || Ok(inner.store.put_refuses_anonymous(&of, refuses)?)).await
    }

    /// Fetches what is not here yet of: index, manifest, configuration.
    async fn fetch_manifest(
        self: &Arc<Self>,
        reference: &Reference,
        platform: &Platform,
        with: (&Credential, &Principal),
    ) -> Result<Meaning, PullError> {
        let repository = reference.repository();
        let (name, (credential, _)) = (name_of(reference), with);
        if let Some(known) = self.unchanged(reference, platform, &name, with).await? {
            return Ok(known);
        }
        let limits = self.limits.manifest();
        // Of each document what the next one is asked for with, and no more: its room is another's.
        let (top, answered_by, entries, config) = {
            let top = self.registry.manifest(repository, &name, credential).await?;
            // A manifest that no volume can show is not kept.
            let (entries, config) =
                match Manifest::parse(&top.bytes, top.content_type.as_deref(), limits)? {
                    Manifest::Image(manifest) => {
                        classify(&manifest, UnpackMode::Auto, &self.limits)?;
                        (None, config_of_image(manifest))
                    }
                    Manifest::Index(index) => {
                        (Some(IndexEntries::for_this_node(index, platform, limits)?), None)
                    }
                };
            self.keep(repository, top.digest, top.bytes.clone(), &top.answered_by).await?;
            (top.digest, top.answered_by, entries, config)
        };
        let Some(mut entries) = entries else {
            self.check_platform(reference, platform, credential, config).await?;
            return Ok(Meaning { top, manifest: top, answered_by });
        };
        while let Some(nested) = entries.next_index() {
            let (bytes, fetched) = self.manifest_bytes(reference, &nested, credential).await?;
            let sent_by = fetched.as_ref().map_or(&answered_by, |fetched| &fetched.answered_by);
            let document = Manifest::parse(&bytes, Some(&nested.media_type), limits)?;
            self.keep(repository, nested.digest, bytes, sent_by).await?;
            entries.insert(nested, document)?;
        }
        let chosen = entries.index().choose(platform)?.clone();
        let config = {
            let (bytes, fetched) = self.manifest_bytes(reference, &chosen, credential).await?;
            let sent_by = fetched.as_ref().map_or(&answered_by, |fetched| &fetched.answered_by);
            match Manifest::parse(&bytes, Some(&chosen.media_type), limits)? {
                Manifest::Index(_) => return Err(ManifestError::NestedIndex(chosen.digest).into()),
                Manifest::Image(manifest) => {
                    classify(&manifest, UnpackMode::Auto, &self.limits)?;
                    self.keep(repository, chosen.digest, bytes, sent_by).await?;
                    config_of_image(manifest)
                }
            }
        };
        if chosen.platform.is_none() {
            self.check_platform(reference, platform, credential, config).await?;
        }
        Ok(Meaning { top, manifest: chosen.digest, answered_by })
    }

    /// A tag that still means what it meant: one request without a body tells. For one who has not
    /// been proven to read it the same is asked as if nothing were here.
    async fn unchanged(
        self: &Arc<Self>,
        reference: &Reference,
        platform: &Platform,
        name: &ManifestName,
        (credential, principal): (&Credential, &Principal),
    ) -> Result<Option<Meaning>, PullError> {
        let ManifestName::Tag(tag) = name else { return Ok(None) };
        let (inner, asked, asked_for) = (Arc::clone(self), reference.clone(), platform.clone());
        let who = principal.clone();
        let known = blocking(move || {
            let known = inner.store.resolution(&asked, &asked_for);
            let kept = |known: &Resolution| {
                let (repository, manifest) = (asked.repository(), known.manifest);
                let mirrors = inner.mirrors(repository);
                inner.store.is_proven(repository, manifest, &who, &mirrors)
                    && matches!(inner.store.blob(manifest), Ok(Some(_)))
            };
            Ok(known.filter(kept))
        });
        let Some(known) = known.await? else { return Ok(None) };
        let current = match self.registry.resolve_tag(reference.repository(), tag, credential).await
        {
            // Some registries know no such request; the one for the manifest itself decides.
            Err(RegistryError::NotFound { .. }) => None,
            current => current?,
        };
        let Resolution { resolved: top, manifest, .. } = known;
        let current = current.filter(|current| current.digest == top);
        Ok(current.map(|current| Meaning { top, manifest, answered_by: current.answered_by }))
    }

    /// The manifest that an index points at.
    async fn manifest_bytes(
        self: &Arc<Self>,
        reference: &Reference,
        chosen: &Descriptor,
        credential: &Credential,
    ) -> Result<(Bytes, Option<FetchedManifest>), PullError> {
        if let Some(data) = &chosen.data {
            return Ok((data.clone().into(), None));
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
        Ok((fetched.bytes.clone(), Some(fetched)))
    }

    /// A single manifest may say in its configuration what it is for.
    async fn check_platform(
        self: &Arc<Self>,
        reference: &Reference,
        wanted: &Platform,
        credential: &Credential,
        config: Option<Descriptor>,
    ) -> Result<(), PullError> {
        let Some(config) = config else { return Ok(()) };
        let (digest, size, limit) = (config.digest, config.size, self.limits.config_bytes);
        if size > limit {
            return Err(PullError::ConfigTooLarge { size, limit });
        }
        if let Some(data) = &config.data {
            return Ok(check_config_platform(data, wanted)?);
        }
        let (inner, of) = (Arc::clone(self), reference.repository().clone());
        let read = move || {
            // Another's configuration is as if it were not here.
            let is_ours = inner.store.blob_came_from(&of, digest, &inner.mirrors(&of)).is_some();
            if is_ours { Ok(inner.store.blob(digest)?) } else { Ok(None) }
        };
        if let Some(kept) = blocking(read).await? {
            return Ok(check_config_platform(&kept, wanted)?);
        }
        let (repository, options) = (reference.repository(), &self.wire.options);
        let fetched =
            document::fetch(&self.registry, options, repository, (digest, size), credential);
        let fetched = fetched.await?;
        self.keep(repository, digest, fetched.bytes.clone(), &fetched.answered_by).await?;
        Ok(check_config_platform(&fetched.bytes, wanted)?)
    }

    /// As [`Inner::check_platform`], from what is kept; false when the
    /// configuration is not, and the registry has to be asked.
    fn kept_config_fits(
        &self,
        manifest: &[u8],
        wanted: &Platform,
        read: &dyn Fn(Digest) -> Result<Option<Vec<u8>>, PullError>,
    ) -> Result<bool, PullError> {
        let Manifest::Image(manifest) = Manifest::parse(manifest, None, self.limits.manifest())?
        else {
            return Ok(false);
        };
        let Some(config) = config_of_image(manifest) else { return Ok(true) };
        let kept = match config.data {
            Some(data) => Some(data),
            None => read(config.digest)?,
        };
        let Some(config) = kept else { return Ok(false) };
        check_config_platform(&config, wanted)?;
        Ok(true)
    }

    /// Stores a document that was checked, and the source that it came from.
    pub(super) async fn keep(
        self: &Arc<Self>,
        repository: &Repository,
        digest: Digest,
        bytes: Bytes,
        sent_by: &AnsweredBy,
    ) -> Result<(), PullError> {
        let (inner, repository) = (Arc::clone(self), repository.clone());
        let by = content_source(sent_by);
        blocking(move || {
            inner.store.put_blob(digest, &bytes)?;
            Ok(inner.store.put_blob_origin(&repository, digest, &by)?)
        })
        .await
    }
}

/// As a registry is asked for what the reference names.
fn name_of(reference: &Reference) -> ManifestName {
    match reference.digest() {
        Some(digest) => ManifestName::Digest(digest),
        None => ManifestName::Tag(reference.tag_or_latest().to_owned()),
    }
}

/// What may say for which platform an image is.
fn config_of_image(manifest: ImageManifest) -> Option<Descriptor> {
    let says_it = manifest.is_image();
    manifest.config.map(|config| *config).filter(|config| says_it && config.size > 0)
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

/// Whether the credential itself was not accepted.
fn is_stranger(error: &PullError) -> bool {
    matches!(error.root(), PullError::Registry(RegistryError::Unauthorized { .. }))
}

/// Runs disk work off the async threads.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PullError> + Send + 'static,
) -> Result<T, PullError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(PullError::Crashed))
}
