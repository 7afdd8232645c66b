//! What a reference means, and what the secrets have for its registry.
//!
//! The registry is asked once for the whole fleet, with the secrets of the preload's namespace. Only secrets that name
//! the registries they are for are taken: with a user name and password alone, whoever may write a preload could send
//! them to a registry of his own.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};

use crate::plan::facts::{Access, Known, Meaning, Origin, Refusal, Seconds};
use crate::seal::Plain;
use oci::credentials::providers::NodeCredentials;
use oci::credentials::{Credential, Keyring};
use oci::manifest::{
    ImageIndex, ImageManifest, IndexEntries, Manifest, ManifestError, ManifestLimits,
};
use oci::registry::{ManifestName, Refusals, Registry, RegistryError};
use oci::{Digest, Platform, Reference};
use policy::{PolicyRequest, PolicySource};
use text::printable::excerpt;

/// Secrets are read again after so long, while nodes still need them.
const SECRETS_LAST: Seconds = 120;
/// What may pass by itself is asked again after so long.
const SOON: Seconds = 20;
/// What needs somebody is, too, for he does not tell.
const LATER: Seconds = 60;
/// Platforms of an index that are kept: no artifact has as many.
const MAXIMUM_PLATFORMS: usize = 16;
/// Characters of one, as the status takes it.
const MAXIMUM_PLATFORM: usize = 64;
/// The types of secrets that say whom they are for, and their keys.
const TYPES: [(&str, &str); 2] = [
    ("kubernetes.io/dockerconfigjson", ".dockerconfigjson"),
    ("kubernetes.io/dockercfg", ".dockercfg"),
];

/// What is to be found out.
#[derive(Clone, Debug)]
pub struct Question {
    /// Where the secrets are.
    pub namespace: String,
    /// The artifact.
    pub reference: Reference,
    /// As it was written.
    pub written: String,
    /// Names of secrets.
    pub pull_secrets: Vec<String>,
    /// Whether the registry is asked too, or the secrets are read only.
    pub meaning: bool,
}

/// What was found out.
#[derive(Clone, Debug)]
pub struct Found {
    /// None where it was not asked.
    pub meaning: Option<Meaning>,
    /// With what it may be fetched.
    pub access: Access,
    /// What is to be sealed for nodes.
    pub plain: Option<Plain>,
}

impl Found {
    /// Nothing, for the moment.
    pub(super) fn failed(message: &str) -> Self {
        let refusal = soon("Internal", message);
        let meaning = Some(Meaning::Refused(refusal.clone()));
        Self { meaning, access: Access::Refused(refusal), plain: None }
    }
}

/// Finds out.
pub trait Look: Send + Sync {
    /// Never fails: why something cannot be found out is found out then.
    fn look(&self, question: Question) -> BoxFuture<'static, Found>;
}

/// Asks the API server and the registries.
#[derive(Clone, Debug)]
pub struct Looker {
    /// For secrets.
    pub client: LookerClient,
    /// For references.
    pub registry: Registry,
    /// Of what registries send.
    pub limits: ManifestLimits,
    /// What may be mounted by which namespaces.
    pub policy: PolicySource,
    /// The controller's own credentials.
    pub credentials: NodeCredentials,
}

/// A client whose `Debug` says nothing.
#[derive(Clone)]
pub struct LookerClient(pub Client);

impl std::fmt::Debug for LookerClient {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("LookerClient")
    }
}

impl Look for Looker {
    fn look(&self, question: Question) -> BoxFuture<'static, Found> {
        let looker = self.clone();
        async move { looker.find(question).await }.boxed()
    }
}

impl Looker {
    async fn find(&self, question: Question) -> Found {
        let secrets = self.secrets(&question).await;
        let (credentials, access, plain) = match secrets {
            Ok(Secrets { credentials, version }) => {
                let sealed = Plain::new(&credentials);
                match sealed {
                    Ok(_) if credentials.is_empty() => (credentials, Access::Open, None),
                    Ok(plain) => {
                        let until = now() + SECRETS_LAST;
                        (credentials, Access::Sealed { version, until }, Some(plain))
                    }
                    Err(error) => {
                        let refusal = later("SecretUnusable", &error);
                        return refused(refusal);
                    }
                }
            }
            Err(refusal) => return refused(refusal),
        };
        if !question.meaning {
            return Found { meaning: None, access, plain };
        }
        let meaning = match self.resolve(&question, credentials).await {
            Ok(known) => Meaning::Known(known),
            Err(refusal) => Meaning::Refused(refusal),
        };
        Found { meaning: Some(meaning), access, plain }
    }

    /// What the secrets have for the registry.
    async fn secrets(&self, question: &Question) -> Result<Secrets, Refusal> {
        let api: Api<Secret> = Api::namespaced(self.client.0.clone(), &question.namespace);
        let (mut credentials, mut versions) = (Vec::new(), Vec::new());
        for name in &question.pull_secrets {
            let place = format!("{}/{name}", question.namespace);
            let unusable = |what: &dyn std::fmt::Display| {
                let message = format!("the secret {place} cannot be used: {what}");
                later("SecretUnusable", &message)
            };
            let secret = match api.get_opt(name).await {
                Ok(Some(secret)) => secret,
                Ok(None) => {
                    let message =
                        format!("there is no secret {place}: make it, or correct spec.pullSecrets");
                    return Err(later("SecretMissing", &message));
                }
                Err(kube::Error::Api(status)) if status.code == 403 => {
                    let message = format!(
                        "the controller may not read secrets in {}: see the chart's controller.secretNamespaces",
                        question.namespace
                    );
                    return Err(later("SecretForbidden", &message));
                }
                Err(error) => {
                    let message = format!("the secret {place} cannot be read: {error}");
                    return Err(soon("SecretUnavailable", &message));
                }
            };
            let found = secret.type_.unwrap_or_default();
            let Some((_, key)) = TYPES.iter().find(|(kind, _)| *kind == found) else {
                let what = format!(
                    "it is of the type {}, which does not say whom it is for; make one with kubectl create secret docker-registry",
                    excerpt(&found, 80)
                );
                return Err(unusable(&what));
            };
            let content = secret.data.unwrap_or_default().remove(*key).unwrap_or_default().0;
            let text = String::from_utf8(content).map_err(|_| unusable(&"it is no text"))?;
            let content = HashMap::from([((*key).to_owned(), text)]);
            let repository = question.reference.repository();
            let keyring = Keyring::from_secrets(&content, repository.host())
                .map_err(|error| unusable(&error))?;
            for credential in keyring.matching(repository) {
                if !credentials.contains(&credential) {
                    credentials.push(credential);
                }
            }
            let metadata = secret.metadata;
            versions.push(metadata.uid.unwrap_or_default());
            versions.push(metadata.resource_version.unwrap_or_default());
        }
        let version = Digest::of(versions.join("\n").as_bytes()).hex();
        Ok(Secrets { credentials, version: Arc::from(&version[..16]) })
    }

    async fn resolve(
        &self,
        question: &Question,
        mut credentials: Vec<Credential>,
    ) -> Result<Known, Refusal> {
        let demands = self.demands(question).await?;
        let repository = question.reference.repository();
        for offer in self.credentials.offers(repository) {
            match self.credentials.redeem(&offer.source, repository, None).await {
                Ok(found) => credentials.extend(found),
                Err(error) => {
                    tracing::warn!(%error, "no credential from one of the controller's sources");
                }
            }
        }
        // Nobody who has a credential is asked for as anybody, as with the kubelet.
        if credentials.is_empty() {
            credentials.push(Credential::Anonymous);
        }
        let mut refusals = Refusals::default();
        for credential in credentials {
            match self.ask(question, &credential, demands).await {
                Ok(known) => return Ok(known),
                Err(LookError::Registry(error)) if error.may_depend_on_credential() => {
                    refusals.add(error);
                }
                Err(error) => {
                    let unanswered = refusals.is_empty() && error.is_unanswered();
                    return Err(Refusal { unanswered, ..error.refusal() });
                }
            }
        }
        let nobody = || soon("RegistryUnavailable", "nobody was asked");
        let refused = refusals.into_error().map(LookError::Registry);
        Err(refused.map_or_else(nobody, |error| error.refusal()))
    }

    /// What the policy demands; the bytes that it allows, where it bounds them.
    async fn demands(&self, question: &Question) -> Result<Option<u64>, Refusal> {
        let (source, namespace) = (self.policy.clone(), question.namespace.clone());
        // Nodes are told a digest, so a policy that wants one has it.
        let reference = &question.reference;
        let nodes_see = Reference::from_parts(
            &reference.repository().to_string(),
            Some(reference.tag_or_latest()),
            Some(&reference.digest().unwrap_or_else(|| Digest::of(b"")).to_string()),
        );
        let nodes_see = nodes_see.unwrap_or_else(|_| reference.clone());
        let decide = move || {
            let policy = source.current()?;
            let facts = PolicyRequest {
                reference: &nodes_see,
                namespace: Some(&namespace),
                require_signature: false,
            };
            Ok(policy.decide(facts))
        };
        let failed = |error: &dyn std::fmt::Display| soon("PolicyUnreadable", error);
        match tokio::task::spawn_blocking(decide).await {
            Ok(Ok(Ok(demands))) => Ok(demands.maximum_bytes),
            Ok(Ok(Err(refusal))) => Err(later("PolicyDenied", &refusal)),
            Ok(Err(error)) => {
                let error: String = error;
                Err(failed(&error))
            }
            Err(error) => Err(failed(&error)),
        }
    }

    async fn ask(
        &self,
        question: &Question,
        credential: &Credential,
        maximum_bytes: Option<u64>,
    ) -> Result<Known, LookError> {
        let (reference, asked_at) = (&question.reference, now());
        let name = ManifestName::of(reference);
        let (digest, parsed) = {
            let top = self.registry.manifest(reference.repository(), &name, credential).await?;
            let parsed = Manifest::parse(&top.bytes, top.content_type.as_deref(), self.limits);
            (top.digest, parsed.map_err(|error| LookError::Content(error.to_string()))?)
        };
        let allowed = |bytes: u64| match maximum_bytes {
            Some(limit) if bytes > limit => Err(LookError::TooLarge { bytes, limit }),
            _ => Ok(bytes),
        };
        let (platforms, bytes) = match parsed {
            Manifest::Image(image) => (Vec::new(), Some(allowed(bytes_of(&image))?)),
            Manifest::Index(index) => {
                let index = self.with_nested(reference, index, credential).await?;
                let (entries, is_for_any) = entries(index.index());
                let mut sizes = Vec::with_capacity(entries.len());
                for digest in entries.values().chain(&is_for_any) {
                    match self.bytes(reference, *digest, credential).await {
                        Ok(bytes) => sizes.push(bytes.map(allowed).transpose()?),
                        // Nodes may well get what they need of it; then only its size is not known.
                        Err(_) if maximum_bytes.is_none() => sizes.push(None),
                        Err(error) => return Err(error.into()),
                    }
                }
                let fewest = sizes.into_iter().collect::<Option<Vec<u64>>>();
                let platforms = entries.into_keys().filter_map(|text| text.parse().ok());
                // Platforms that are listed exclude others.
                let platforms = platforms.filter(|_| is_for_any.is_none());
                (platforms.collect(), fewest.and_then(|sizes| sizes.into_iter().min()))
            }
        };
        let reference = question.written.clone();
        let pull_secrets = question.pull_secrets.clone();
        let origin = Origin { resolved_at: Some(asked_at), pull_secrets, unavailable: None };
        Ok(Known { reference, digest, platforms, bytes, origin })
    }

    /// Reads the indexes in an index.
    async fn with_nested(
        &self,
        reference: &Reference,
        index: ImageIndex,
        credential: &Credential,
    ) -> Result<IndexEntries, LookError> {
        let unusable = |error: ManifestError| LookError::Content(error.to_string());
        let mut entries = IndexEntries::for_all_platforms(index, self.limits).map_err(unusable)?;
        while let Some(nested) = entries.next_index() {
            let name = ManifestName::Digest(nested.digest);
            let read = self.registry.manifest(reference.repository(), &name, credential).await?;
            let document = Manifest::parse(&read.bytes, Some(&nested.media_type), self.limits);
            entries.insert(nested, document.map_err(unusable)?).map_err(unusable)?;
        }
        Ok(entries)
    }

    /// Of the artifact for one platform; none where its manifest is not understood.
    async fn bytes(
        &self,
        reference: &Reference,
        digest: Digest,
        credential: &Credential,
    ) -> Result<Option<u64>, RegistryError> {
        let (repository, name) = (reference.repository(), ManifestName::Digest(digest));
        let one = self.registry.manifest(repository, &name, credential).await?;
        Ok(match Manifest::parse(&one.bytes, None, self.limits) {
            Ok(Manifest::Image(image)) => Some(bytes_of(&image)),
            _ => None,
        })
    }
}

/// What the secrets have.
struct Secrets {
    credentials: Vec<Credential>,
    version: Arc<str>,
}

/// Returns the platforms that can be asked for, each with the manifest that it gets, and the manifest
/// that every other platform gets: the only one without a platform.
fn entries(index: &ImageIndex) -> (BTreeMap<String, Digest>, Option<Digest>) {
    let mut platforms = BTreeMap::new();
    for platform in index.manifests.iter().filter_map(|entry| entry.platform.as_ref()) {
        let text = platform.to_string();
        if platform.os != "unknown"
            && text.len() <= MAXIMUM_PLATFORM
            && text.parse::<Platform>().is_ok()
        {
            platforms.entry(text).or_insert(platform);
        }
        // Each choice looks at the whole index.
        if platforms.len() == MAXIMUM_PLATFORMS {
            break;
        }
    }
    let chosen = platforms.into_iter().filter_map(|(text, platform)| {
        let entry = index.choose_for_any_node(platform).ok()?;
        Some((text, entry.digest))
    });
    let entries = chosen.collect();
    let mut unnamed = index.manifests.iter().filter(|entry| entry.platform.is_none());
    let is_for_any = match (unnamed.next(), unnamed.next()) {
        (Some(entry), None) => Some(entry.digest),
        _ => None,
    };
    (entries, is_for_any)
}

/// Of all layers, as the registry has them.
fn bytes_of(image: &ImageManifest) -> u64 {
    image.layers.iter().map(|layer| layer.size).fold(0, u64::saturating_add)
}

/// Why a registry's answer is no use.
#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error("{0}")]
    Content(String),
    #[error("it has {bytes} bytes, the policy allows {limit} (maxArtifactBytes)")]
    TooLarge { bytes: u64, limit: u64 },
}

impl LookError {
    /// Returns whether the registry has said nothing: neither yes nor no.
    fn is_unanswered(&self) -> bool {
        matches!(self, Self::Registry(error) if error.is_transient())
    }

    fn refusal(&self) -> Refusal {
        let reason = match self {
            Self::Registry(RegistryError::NotFound { .. }) => "ReferenceNotFound",
            Self::Registry(RegistryError::Unauthorized { .. }) => "Unauthorized",
            Self::Registry(RegistryError::Forbidden { .. }) => "Forbidden",
            Self::Registry(_) if self.is_unanswered() => return soon("RegistryUnavailable", self),
            Self::Registry(_) => "RegistryRefused",
            Self::Content(_) => "UnusableManifest",
            Self::TooLarge { .. } => "PolicyDenied",
        };
        later(reason, self)
    }
}

/// What was found out is of the moment when it was: an answer may have taken longer than it lasts.
fn now() -> Seconds {
    Timestamp::now().as_second()
}

fn soon(reason: &'static str, message: &(impl std::fmt::Display + ?Sized)) -> Refusal {
    refusal(reason, message, true, now() + SOON)
}

fn later(reason: &'static str, message: &(impl std::fmt::Display + ?Sized)) -> Refusal {
    refusal(reason, message, false, now() + LATER)
}

fn refusal(
    reason: &'static str,
    message: &(impl std::fmt::Display + ?Sized),
    transient: bool,
    retry_at: Seconds,
) -> Refusal {
    Refusal { reason, message: message.to_string(), transient, unanswered: false, retry_at }
}

fn refused(refusal: Refusal) -> Found {
    Found { meaning: None, access: Access::Refused(refusal), plain: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entries of these platforms in an index; an empty one is none.
    fn index(platforms: &[&str]) -> ImageIndex {
        let entry = |(number, platform): (usize, &&str)| {
            let digest = Digest::of(number.to_string().as_bytes());
            let platform = platform.split_once('/').map_or(String::new(), |(os, architecture)| {
                format!(r#","platform":{{"os":"{os}","architecture":"{architecture}"}}"#)
            });
            let kind = oci::media_type::OCI_MANIFEST;
            format!(r#"{{"mediaType":"{kind}","digest":"{digest}","size":2{platform}}}"#)
        };
        let entries: Vec<_> = platforms.iter().enumerate().map(entry).collect();
        let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
        let limits = ManifestLimits { layers: 100, blob_bytes: 1 << 40 };
        match Manifest::parse(text.as_bytes(), None, limits).unwrap() {
            Manifest::Index(index) => index,
            Manifest::Image(_) => panic!("no index"),
        }
    }

    #[test]
    fn platforms_are_listed_once_and_the_only_other_entry_is_for_all_others() {
        let of = |platforms: &[&str]| {
            let (entries, is_for_any) = entries(&index(platforms));
            (entries.into_keys().collect::<Vec<_>>(), is_for_any.is_some())
        };
        let listed = |platforms: &[&str]| platforms.iter().map(|&text| text.to_owned()).collect();
        let mut many = vec!["linux/amd64"; 40];
        many.push("linux/s390x");
        assert_eq!(of(&many), (listed(&["linux/amd64", "linux/s390x"]), false));
        assert_eq!(of(&["linux/amd64", "unknown/unknown"]), (listed(&["linux/amd64"]), false));
        assert_eq!(of(&["linux/amd64", ""]), (listed(&["linux/amd64"]), true));
        assert_eq!(of(&["", ""]), (listed(&[]), false));
    }
}
