//! Checks what a registry would serve, before a pod mounts it. Stores nothing.
//!
//! ```text
//! mod           the artifact: its kind, platforms, size and signatures
//! volume_files  the files that a volume of it would show
//! ```
//!
//! The code of the node plugin decides: credentials, mirrors, manifests, titles, archives, limits, signatures.

mod volume_files;

use bytes::Bytes;
use serde::Serialize;

pub use volume_files::FileReport;

use oci::credentials::{Credential, Keyring};
use oci::manifest::{
    ChoiceStep, ChosenManifest, ImageManifest, Manifest, ManifestChoice, ManifestError,
    check_config_platform, config_platform,
};
use oci::registry::{ManifestName, Refusals, Registry, RepositoryClient};
use oci::signature::{
    AcceptedSignature, Bundle, FoundSignature, SignatureDemand, SignatureFormat, SignatureMode,
    SignatureVerification, sigstore_bundle,
};
use oci::{Digest, Platform, Reference};
use pull::signature_search::SignatureSearch;
use pull::{PullError, PullOptions};
use unpack::Limits;

/// A request to check an artifact.
#[derive(Clone, Debug)]
pub struct CheckRequest {
    /// The artifact's reference.
    pub reference: Reference,
    /// The platforms to check; all of the artifact's if empty.
    pub platforms: Vec<Platform>,
    /// The signatures that it must have.
    pub signature: Option<SignatureDemand>,
    /// Sigstore bundles to verify instead of the registry's signatures, if any.
    pub bundles: Vec<Bytes>,
    /// The files that it must have.
    pub required: Vec<RequiredFile>,
    /// The credentials for the registry.
    pub keyring: Keyring,
}

/// A file that an artifact must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequiredFile {
    /// The path in the volume.
    pub path: String,
    /// The file must be executable.
    pub executable: bool,
}

/// The result of a check.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckReport {
    /// The checked reference.
    pub reference: String,
    /// The digest that it resolves to: of a manifest or an index.
    pub digest: Digest,
    /// The digest is that of an index.
    pub index: bool,
    /// The manifests that nodes would mount, one for each platform.
    pub manifests: Vec<ManifestReport>,
}

/// The result for one manifest.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ManifestReport {
    /// The platform as `os/arch[/variant]`; `None` if neither index nor config name it.
    pub platform: Option<String>,
    /// The digest of the manifest.
    pub digest: Digest,
    /// The artifact's kind.
    pub kind: String,
    /// The total size of the blobs in bytes.
    pub bytes: u64,
    /// The signatures of the manifest.
    pub signatures: SignatureStatus,
    /// The files that titles name; with required files, all files of the volume.
    pub files: Vec<FileReport>,
    /// The list of files is complete.
    pub files_are_complete: bool,
}

/// The signatures of a manifest.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase", tag = "state")]
pub enum SignatureStatus {
    /// The demanded signers have signed it.
    Verified {
        /// The signature for each demanded statement.
        by: Vec<AcceptedSignature>,
    },
    /// It is not signed as demanded, and the policy only warns.
    Warned {
        /// The demand, and the signature that is the closest to it.
        reason: String,
    },
    /// Nothing says who must have signed it.
    Unverified {
        /// The number of signatures.
        count: usize,
    },
    /// No signature is demanded, and none could be looked up.
    Unknown {
        /// The reason of the failed request.
        reason: String,
    },
}

/// A failed check.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The artifact could not be fetched.
    #[error(transparent)]
    Pull(#[from] PullError),
    /// A required file is missing.
    #[error("{platform}: the file {path} is not in it")]
    NoFile {
        /// The platform without it.
        platform: String,
        /// The path of the file.
        path: String,
    },
    /// A required file is not executable.
    #[error("{platform}: the file {path} is not executable")]
    NotExecutable {
        /// The platform without it.
        platform: String,
        /// The path of the file.
        path: String,
    },
}

/// Checks artifacts with the code of the node plugin.
#[derive(Clone)]
pub struct ArtifactChecker {
    /// The registry client.
    pub registry: Registry,
    /// The limits on untrusted input.
    pub limits: Limits,
}

/// Reads an artifact with one credential.
struct ArtifactReader<'a> {
    client: RepositoryClient<'a>,
    limits: &'a Limits,
}

/// A manifest to check.
struct PlatformManifest {
    platform: Option<Platform>,
    digest: Digest,
    image: ImageManifest,
}

impl ArtifactChecker {
    /// Checks an artifact with each credential that applies, until one is accepted.
    pub async fn check(&self, check: &CheckRequest) -> Result<CheckReport, CheckError> {
        let repository = check.reference.repository();
        let mut credentials = check.keyring.matching(repository);
        if credentials.is_empty() {
            credentials.push(Credential::Anonymous);
        }
        let mut refusals = Refusals::default();
        for credential in &credentials {
            let client = self.registry.at(repository, credential);
            let reader = ArtifactReader { client, limits: &self.limits };
            match reader.check(check).await {
                Err(CheckError::Pull(PullError::Registry(error)))
                    if error.may_depend_on_credential() =>
                {
                    refusals.add(error);
                }
                done => return done,
            }
        }
        Err(refusals.into_error().map_or(PullError::Crashed, PullError::from).into())
    }
}

impl ArtifactReader<'_> {
    async fn check(&self, check: &CheckRequest) -> Result<CheckReport, CheckError> {
        let name = ManifestName::of(&check.reference);
        // Keeps only what the next requests need: the memory of the document is theirs.
        let (top, parsed) = {
            let top = self.client.manifest(&name).await.map_err(PullError::from)?;
            let kind = top.content_type.as_deref();
            let parsed = Manifest::parse(&top.bytes, kind, self.limits.manifest());
            (top.digest, parsed.map_err(PullError::from)?)
        };
        let index = matches!(parsed, Manifest::Index(_));
        let chosen = self.choose(&check.platforms, top, parsed).await?;
        let mut manifests = Vec::new();
        for one in chosen {
            manifests.push(self.check_manifest(check, top, one).await?);
        }
        let reference = check.reference.to_string();
        Ok(CheckReport { reference, digest: top, index, manifests })
    }

    /// Returns the manifests to check.
    async fn choose(
        &self,
        platforms: &[Platform],
        digest: Digest,
        parsed: Manifest,
    ) -> Result<Vec<PlatformManifest>, PullError> {
        let index = match parsed {
            Manifest::Image(image) => {
                let mut platform = None;
                if let Some(config) = image.config.as_ref().filter(|_| image.is_image()) {
                    let bytes = self.blob(config).await?;
                    for wanted in platforms {
                        check_config_platform(&bytes, wanted)?;
                    }
                    platform = config_platform(&bytes)?;
                }
                return Ok(vec![PlatformManifest { platform, digest, image }]);
            }
            Manifest::Index(index) => index,
        };
        let mut chosen = Vec::new();
        for wanted in platforms {
            let of = Manifest::Index(index.clone());
            let found = self.resolve(digest, of, wanted).await?;
            chosen.push(PlatformManifest { platform: Some(wanted.clone()), ..found });
        }
        if !chosen.is_empty() {
            return Ok(chosen);
        }
        let known = index.manifests.iter().filter_map(|entry| entry.platform.clone());
        for platform in known.filter(|platform| platform.os != "unknown") {
            let entry = index.choose_for_any_node(&platform)?;
            let fetched = self.client.manifest(&ManifestName::Digest(entry.digest)).await?;
            let kind = Some(entry.media_type.as_str());
            match Manifest::parse(&fetched.bytes, kind, self.limits.manifest())? {
                Manifest::Image(image) => {
                    chosen.push(PlatformManifest {
                        platform: Some(platform),
                        digest: entry.digest,
                        image,
                    });
                }
                Manifest::Index(_) => return Err(ManifestError::NestedIndex(entry.digest).into()),
            }
        }
        if chosen.is_empty() {
            let (of, node) = (Manifest::Index(index), Platform::of_this_node());
            chosen.push(self.resolve(digest, of, &node).await?);
        }
        Ok(chosen)
    }

    /// Chooses the manifest for a platform on this node.
    async fn resolve(
        &self,
        digest: Digest,
        document: Manifest,
        wanted: &Platform,
    ) -> Result<PlatformManifest, PullError> {
        let mut choice = ManifestChoice::new(digest, document, wanted, self.limits.manifest())?;
        loop {
            match choice.step()? {
                ChoiceStep::Read(of) => {
                    let fetched = self.client.manifest(&ManifestName::Digest(of.digest)).await?;
                    choice.insert(of, &fetched.bytes)?;
                }
                ChoiceStep::Chosen(ChosenManifest { digest, image, .. }) => {
                    return Ok(PlatformManifest { platform: None, digest, image });
                }
            }
        }
    }

    async fn check_manifest(
        &self,
        check: &CheckRequest,
        top: Digest,
        chosen: PlatformManifest,
    ) -> Result<ManifestReport, CheckError> {
        let PlatformManifest { platform, digest, image } = chosen;
        let platform = platform.map(|platform| platform.to_string());
        let sizes = image.layers.iter().chain(image.config.as_deref()).map(|layer| layer.size);
        let bytes = sizes.fold(0, u64::saturating_add);
        let signatures = self.signatures(check, [digest, top]).await?;
        let whole = !check.required.is_empty();
        let (files, files_are_complete) = self.files(&image, whole).await?;
        let place = || platform.clone().unwrap_or_else(|| digest.to_string());
        for RequiredFile { path, executable } in &check.required {
            let wanted = path.trim_start_matches('/');
            let file = files.iter().find(|file| file.path == wanted);
            let file =
                file.ok_or_else(|| CheckError::NoFile { platform: place(), path: path.clone() })?;
            if *executable && !file.executable {
                return Err(CheckError::NotExecutable { platform: place(), path: path.clone() });
            }
        }
        let kind = image.kind().to_owned();
        Ok(ManifestReport { platform, digest, kind, bytes, signatures, files, files_are_complete })
    }

    async fn signatures(
        &self,
        check: &CheckRequest,
        subjects: [Digest; 2],
    ) -> Result<SignatureStatus, PullError> {
        let demand = check.signature.clone();
        let format = demand.as_ref().map_or(SignatureFormat::Any, |demand| demand.format);
        let (options, limits) = (PullOptions::default(), self.limits.manifest());
        let search = SignatureSearch::begin(self.client, options, limits, format, &subjects);
        let mut search = search.await?;
        let Some(demand) = demand else {
            let mut count = 0;
            return Ok(loop {
                match search.next().await {
                    Ok(Some(_)) => count += 1,
                    Ok(None) => break SignatureStatus::Unverified { count },
                    // Nothing demands a signature: the artifact can be read without this answer.
                    Err(error) => break SignatureStatus::Unknown { reason: error.to_string() },
                }
            });
        };
        let mode = demand.mode;
        let mut verification = SignatureVerification::new(demand, subjects.to_vec());
        if check.bundles.is_empty() {
            while let Some(found) = search.next().await? {
                if verification.add(&found.signature) {
                    break;
                }
            }
        }
        for json in &check.bundles {
            let mut add = |document| {
                verification.add(&FoundSignature::Bundle(Bundle { json: json.clone(), document }))
            };
            if !sigstore_bundle::signs_document(json) {
                add(None);
                continue;
            }
            for subject in subjects {
                let document = self.client.manifest(&ManifestName::Digest(subject)).await?;
                add(Some(document.bytes.clone()));
            }
        }
        match (verification.finish(), mode) {
            (Ok(by), _) => Ok(SignatureStatus::Verified { by }),
            (Err(unmet), SignatureMode::Warn) => {
                Ok(SignatureStatus::Warned { reason: unmet.to_string() })
            }
            (Err(unmet), SignatureMode::Enforce) => {
                Err(PullError::Signature { signed: subjects[1], unmet: Box::new(unmet) })
            }
        }
    }
}
