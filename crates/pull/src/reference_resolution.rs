//! Resolves a reference to its current manifest, and checks the volume's access to it.

use std::sync::Arc;

use super::access_proofs::AccessProver;
use super::artifact_request::{IfUnavailable, Priority, PullPolicy, Want};
use super::blocking;
use super::credential_candidates::{Candidate, Candidates, PrincipalCredential};
use super::error::PullError;
use super::known_resolution::{Known, KnownManifests};
use super::manifest_fetch::{ManifestFetcher, Meaning};
use super::pull_tenant::Caller;
use super::single_flight::{Flights, Outcome};
use oci::credentials::Credential;
use oci::credentials::providers::NodeCredentials;
use oci::registry::Refusals;
use oci::{Digest, Platform, Reference};
use store::Store;
use store::access::access_proofs::Principal;
use store::resolution_records::Resolution;

/// The digests of a resolved reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ResolvedDigests {
    /// The digest that the reference names: of the manifest, or of the index from which it was chosen.
    pub(super) top: Digest,
    /// The chosen manifest.
    pub(super) manifest: Digest,
}

/// A manifest that this volume may see.
#[derive(Clone, Debug)]
pub(super) struct Resolved {
    pub(super) digests: ResolvedDigests,
    access: Access,
}

impl ResolvedDigests {
    /// Returns the record of what a reference means.
    pub(super) fn resolution_of(self, reference: &Reference) -> Resolution {
        Resolution {
            reference: reference.to_string(),
            resolved: self.top,
            manifest: self.manifest,
            platform: None,
        }
    }
}

impl Resolved {
    /// Returns a manifest that the node itself works on, with the access for further requests.
    pub(super) fn for_the_node(
        manifest: Digest,
        candidates: Candidates,
        candidate: Candidate,
    ) -> Self {
        let access = Access::Before(Box::new((candidates, candidate)));
        Self { digests: ResolvedDigests { top: manifest, manifest }, access }
    }
}

/// The access for further requests.
#[derive(Clone, Debug)]
enum Access {
    /// A credential that has just been proven.
    Proven(Credential),
    /// Proven before: had when it is needed.
    Before(Box<(Candidates, Candidate)>),
}

/// Callers with the same wish and the same credentials share one request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ResolveKey {
    reference: String,
    platform: Platform,
    principals: Vec<Principal>,
    account: Option<Principal>,
    question: Question,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Question {
    /// The resolution of the tag or digest.
    Meaning,
    /// The resolution, for a caller that decides itself whether `IfNotPresent` resolves to it from now on.
    MeaningUnremembered,
    /// May I see this manifest, which what the reference names led to?
    Access(ResolvedDigests),
}

/// Resolves references, and proves that their manifests may be seen.
pub(super) struct Resolver {
    pub(super) store: Store,
    pub(super) node_credentials: NodeCredentials,
    pub(super) known: KnownManifests,
    pub(super) fetcher: ManifestFetcher,
    pub(super) prover: AccessProver,
    pub(super) flights: Flights<ResolveKey, Resolved>,
}

impl Resolver {
    /// Reads the credentials that a volume may try. Blocking.
    pub(super) fn candidates(&self, want: &Want) -> Candidates {
        Candidates::read(want, self.store.node_key(), &self.node_credentials)
    }

    /// The same, off the async threads.
    pub(super) async fn read_candidates(
        self: &Arc<Self>,
        want: &Want,
    ) -> Result<Candidates, PullError> {
        let (resolver, want) = (Arc::clone(self), want.clone());
        blocking(move || Ok(resolver.candidates(&want))).await
    }

    /// Resolves and proves.
    pub(super) async fn resolve(self: &Arc<Self>, want: &Want) -> Outcome<Resolved> {
        let (resolver, of) = (Arc::clone(self), want.clone());
        let read = move || {
            let candidates = resolver.candidates(&of);
            let known = resolver.known.find(&of, &candidates);
            Ok((candidates, known))
        };
        let (candidates, known) = blocking(read).await.map_err(Arc::new)?;
        let must_ask = match want.policy {
            PullPolicy::Never if known.is_none() => return Err(Arc::new(PullError::NotCached)),
            PullPolicy::Never | PullPolicy::IfNotPresent => false,
            PullPolicy::Always => true,
        };
        let Some(Known { digests, proven, .. }) = known else {
            return self.ask(want, &candidates, Question::Meaning).await;
        };
        let before = |candidate| Resolved {
            digests,
            access: Access::Before(Box::new((candidates.clone(), candidate))),
        };
        let cached = proven.map(before);
        let question = match cached {
            Some(cached) if !must_ask => return Ok(cached),
            // What is cached for others is not cached for this volume.
            None if want.policy == PullPolicy::Never => return Err(Arc::new(PullError::NotCached)),
            // A digest means the same for ever; there is only access to be proven.
            _ if !must_ask || want.reference.digest().is_some() => Question::Access(digests),
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
                let is_proven = self.account_is_proven(want, &candidates, digests.manifest).await?;
                is_proven.then(|| before(candidates.first())).ok_or(error)
            }
            _ => Err(error),
        }
    }

    /// Returns whether a caller of the same account was proven not long ago.
    async fn account_is_proven(
        self: &Arc<Self>,
        want: &Want,
        candidates: &Candidates,
        manifest: Digest,
    ) -> Outcome<bool> {
        let Some(account) = candidates.account(self.store.node_key()) else { return Ok(false) };
        let (resolver, repository) = (Arc::clone(self), want.reference.repository().clone());
        let read = move || {
            let KnownManifests { origins, verification, .. } = &resolver.known;
            let (sources, age) = (origins.sources(&repository), verification.proof_ttl);
            Ok(origins.store.proofs().is_proven_for_account(&sources, manifest, &account, age))
        };
        blocking(read).await.map_err(Arc::new)
    }

    /// Returns the current resolution at the reference's registry. The one for `IfNotPresent` stays.
    pub(super) async fn resolve_unremembered(self: &Arc<Self>, want: &Want) -> Outcome<Resolved> {
        let candidates = self.read_candidates(want).await.map_err(Arc::new)?;
        self.ask(want, &candidates, Question::MeaningUnremembered).await
    }

    /// The credential for fetching more of what a volume may see.
    pub(super) async fn credential(&self, resolved: &Resolved) -> Outcome<Credential> {
        match &resolved.access {
            Access::Proven(credential) => Ok(credential.clone()),
            Access::Before(before) => {
                let (candidates, candidate) = before.as_ref();
                let redeemed = candidates.redeem(candidate, &self.node_credentials).await;
                let credentials = redeemed.map_err(Arc::new)?;
                Ok(credentials.into_iter().next().unwrap_or_default())
            }
        }
    }

    async fn ask(
        self: &Arc<Self>,
        want: &Want,
        candidates: &Candidates,
        question: Question,
    ) -> Outcome<Resolved> {
        let key = ResolveKey {
            reference: want.reference.to_string(),
            platform: want.platform.clone(),
            principals: candidates.principals(),
            account: candidates.account(self.store.node_key()),
            question,
        };
        let (resolver, candidates) = (Arc::clone(self), candidates.clone());
        let (reference, platform) = (want.reference.clone(), want.platform.clone());
        let work = |_| resolver.fetch(question, reference, platform, candidates);
        // A small question, for which credential plugins are run: never as idle processes.
        let caller = Caller { priority: Priority::Pod, ..want.caller() };
        self.flights.join(key, caller, work).outcome().await
    }

    /// Asks with one credential after the other, until one is good enough.
    async fn fetch(
        self: Arc<Self>,
        question: Question,
        reference: Reference,
        platform: Platform,
        candidates: Candidates,
    ) -> Result<Resolved, PullError> {
        let (mut refusals, mut failed) = (Refusals::default(), None);
        for candidate in &candidates.all {
            let credentials = match candidates.redeem(candidate, &self.node_credentials).await {
                Ok(credentials) => credentials,
                Err(error) => {
                    tracing::warn!(%reference, %error, "no credential from one of the node's sources");
                    failed.get_or_insert(error);
                    continue;
                }
            };
            for credential in credentials {
                let with =
                    PrincipalCredential { principal: candidate.principal.clone(), credential };
                match self.fetch_with(question, &reference, &platform, &with, &candidates).await {
                    Err(PullError::Registry(error)) if error.may_depend_on_credential() => {
                        tracing::debug!(%reference, %error, "refused with one of several credentials");
                        refusals.add(error);
                    }
                    done => return done,
                }
            }
        }
        // A caller with a credential makes no anonymous request, like the kubelet.
        if refusals.is_empty() {
            let (principal, credential) = (Principal::anonymous(), Credential::Anonymous);
            let with = PrincipalCredential { principal, credential };
            match self.fetch_with(question, &reference, &platform, &with, &candidates).await {
                Err(PullError::Registry(error)) if error.may_depend_on_credential() => {
                    refusals.add(error);
                }
                done => return done,
            }
        }
        // A source that failed may have had the right one: its failure can pass, a refusal does not.
        let refused = refusals.into_error().map(PullError::Registry);
        Err(failed.or(refused).unwrap_or(PullError::Crashed))
    }

    /// Asks with one credential, and remembers what was proven with it.
    async fn fetch_with(
        self: &Arc<Self>,
        mut question: Question,
        reference: &Reference,
        platform: &Platform,
        with: &PrincipalCredential,
        candidates: &Candidates,
    ) -> Result<Resolved, PullError> {
        let seen = match question {
            Question::Access(digests) => {
                let seen = self.prover.see(reference, digests, with).await?;
                seen.map(|answered_by| Meaning { digests, answered_by })
            }
            Question::Meaning | Question::MeaningUnremembered => None,
        };
        let Meaning { digests, answered_by } = if let Some(seen) = seen {
            seen
        } else {
            if matches!(question, Question::Access(_)) {
                // The registry has dropped what the tag meant here: it means something else now.
                question = Question::Meaning;
            }
            self.fetcher.fetch(reference, platform, with).await?
        };
        let PrincipalCredential { principal, credential } = with;
        let by = self.prover.attest(reference, digests, credential, answered_by).await?;
        let (store, reference, platform) =
            (self.store.clone(), reference.clone(), platform.clone());
        let (principal, candidates) = (principal.clone(), candidates.clone());
        let remember = move || {
            let (repository, manifest) = (reference.repository(), digests.manifest);
            store.proofs().put(repository, manifest, &principal, &by)?;
            if let Some(account) = candidates.account(store.node_key()) {
                store.proofs().put_for_account(repository, manifest, &account, &by)?;
            }
            if question == Question::Meaning {
                let resolution = digests.resolution_of(&reference);
                store.resolutions().put(&reference, &platform, &resolution)?;
            }
            Ok(())
        };
        blocking(remember).await?;
        Ok(Resolved { digests, access: Access::Proven(credential.clone()) })
    }

    /// Compares what the manifest announces with the volume's own bound, before any of it is fetched.
    pub(super) async fn check_size(
        self: &Arc<Self>,
        want: &Want,
        resolved: &Resolved,
    ) -> Outcome<()> {
        if want.maximum_bytes.is_none() {
            return Ok(());
        }
        let (store, manifest) = (self.store.clone(), resolved.digests.manifest);
        let look = move || {
            let lease = store.documents().hold(manifest);
            Ok((lease, store.documents().get(manifest)?.is_some()))
        };
        let (_lease, is_kept) = blocking(look).await.map_err(Arc::new)?;
        if !is_kept && want.policy != PullPolicy::Never {
            // The manifest was evicted or damaged meanwhile. Without it, too large an artifact would
            // be downloaded before it is refused.
            let credential = self.credential(resolved).await?;
            let repository = want.reference.repository();
            let again = self.fetcher.fetch_again(repository, manifest, &credential);
            again.await.map_err(Arc::new)?;
        }
        let (own, want) = (Arc::clone(self), want.clone());
        let check = move || own.known.check_bytes(&want, manifest);
        blocking(check).await.map_err(Arc::new)
    }
}

#[cfg(test)]
mod tests {
    use axum::http::{StatusCode, header};
    use axum::response::Response;

    use super::super::testing::{
        INDEX, MANIFEST, Seen, TestNode, TestRegistry, descriptor, empty, file_layer, image, index,
    };
    use super::*;
    use oci::registry::RegistryError;

    /// Refuses all requests but those with this basic authentication.
    fn only_for(auth: &'static str) -> impl Fn(&Seen) -> Option<Response> {
        move |seen| {
            let is_known = seen.authorization.as_deref() == Some(&format!("Basic {auth}"));
            let challenge = (header::WWW_AUTHENTICATE, r#"Basic realm="test""#.parse().ok()?);
            let mut refusal = empty(StatusCode::UNAUTHORIZED);
            refusal.headers_mut().insert(challenge.0, challenge.1);
            (!is_known).then_some(refusal)
        }
    }

    #[tokio::test]
    async fn the_manifest_of_the_platform_is_found_through_an_index_in_an_index() {
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        let want = registry.want("a");
        let (os, architecture) = (&want.platform.os, &want.platform.architecture);
        let entry = |architecture: &str, content: &[u8]| {
            registry.blob("a", content);
            let text = image(&[file_layer("file", content)]);
            registry.manifest("a", architecture, MANIFEST, &text);
            let platform =
                format!(r#","platform":{{"os":"{os}","architecture":"{architecture}"}}"#);
            descriptor(MANIFEST, text.as_bytes(), &platform)
        };
        let nested = index(&[entry("mips", b"other"), entry(architecture, b"ours")]);
        registry.manifest("a", "nested", INDEX, &nested);
        let top = index(&[descriptor(INDEX, nested.as_bytes(), "")]);
        let top = registry.manifest("a", "latest", INDEX, &top);
        let resolved = node.puller.0.resolver.resolve(&want).await.expect("a manifest").digests;
        let ours = Digest::of(image(&[file_layer("file", b"ours")]).as_bytes());
        assert_eq!(resolved, ResolvedDigests { top, manifest: ours });
        // The index is kept, and read when its digest is asked for.
        let digest = format!("{}@{top}", want.reference.repository()).parse().expect("a reference");
        let requests = registry.seen("").len();
        let again = node.puller.0.resolver.resolve(&Want { reference: digest, ..want }).await;
        assert_eq!(again.expect("a manifest").digests, resolved);
        assert_eq!(registry.seen("").len(), requests, "nothing is asked again");
    }

    #[tokio::test]
    async fn credentials_are_tried_in_turn_and_prove_access_for_themselves_alone() {
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        registry.artifact("a", &file_layer("file", b"secret"), b"secret");
        registry.answer_with(only_for("dTpw"));
        let anonymous = registry.want("a");
        // The more specific entry comes first, and is refused.
        let keyring = registry.keyring(&[("/a", "dTp3cm9uZw=="), ("", "dTpw")]);
        let want = Want { keyring, ..anonymous.clone() };
        let resolver = &node.puller.0.resolver;
        let first = resolver.resolve(&want).await.expect("a manifest").digests;
        let wrong = Some("Basic dTp3cm9uZw==".to_owned());
        assert!(registry.seen("manifests/").iter().any(|seen| seen.authorization == wrong));
        let requests = registry.seen("").len();
        let again = resolver.resolve(&want).await.expect("a cached manifest").digests;
        assert_eq!(again, first);
        assert_eq!(registry.seen("").len(), requests, "access is proven");
        let error = resolver.resolve(&anonymous).await.expect_err("access is not proven");
        let is_refused =
            matches!(error.root(), PullError::Registry(RegistryError::Unauthorized { .. }));
        assert!(is_refused, "{error}");
    }
}
