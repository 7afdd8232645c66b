//! Lookups of references in registries, with the credentials of secrets.
//!
//! The registry is asked once for all nodes. Only secrets that name their registries are used: with
//! a user name and password alone, the author of a reference could send them to a registry of an
//! attacker.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};

use crate::Seconds;
use oci::credentials::providers::NodeCredentials;
use oci::credentials::{Credential, Keyring};
use oci::manifest::{
    ImageIndex, ImageManifest, IndexEntries, Manifest, ManifestError, ManifestLimits,
};
use oci::registry::{ManifestName, Refusals, Registry, RegistryError, RepositoryClient};
use oci::{Digest, Platform, Reference};
use policy::{PolicyRequest, PolicySource};
use text::printable::excerpt;

/// Seconds until the next attempt after a transient failure.
const TRANSIENT_RETRY: Seconds = 20;
/// Seconds until the next attempt after a failure that needs a change, since there is no
/// notification of changes.
const PERMANENT_RETRY: Seconds = 60;
/// Maximum number of platforms of an index that are kept, more than any artifact has.
const MAXIMUM_PLATFORMS: usize = 16;
/// Maximum bytes of a platform in the status.
const MAXIMUM_PLATFORM: usize = 64;
/// Supported types of secrets, which name their registries, and their keys.
const SECRET_TYPES: [(&str, &str); 2] = [
    ("kubernetes.io/dockerconfigjson", ".dockerconfigjson"),
    ("kubernetes.io/dockercfg", ".dockercfg"),
];

/// A reference to look up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LookupRequest {
    /// Namespace whose policy applies.
    pub namespace: String,
    /// Namespace of the secrets.
    pub secret_namespace: String,
    /// Names of the secrets.
    pub pull_secrets: Vec<String>,
    /// Reference of the artifact.
    pub reference: Reference,
    /// True if nodes get the reference with the digest of the answer.
    pub pins_digest: bool,
}

/// A client of the API server and the registries.
#[derive(Clone)]
pub struct ReferenceLookup {
    /// Client for reading secrets.
    pub client: Client,
    /// Client for asking registries.
    pub registry: Registry,
    /// Limits of manifests from registries.
    pub limits: ManifestLimits,
    /// Policy for the artifacts that namespaces may use.
    pub policy: PolicySource,
    /// Credentials of the controller itself.
    pub credentials: NodeCredentials,
}

/// Credentials of secrets for one registry.
#[derive(Debug)]
pub struct SecretCredentials {
    /// Credentials in the order in which they are tried.
    pub credentials: Vec<Credential>,
    /// Version that changes with the secrets.
    pub version: String,
}

/// Answer of a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundArtifact {
    /// Digest of a manifest or an index.
    pub digest: Digest,
    /// Platforms of an index; empty if it is not an index.
    pub platforms: Vec<Platform>,
    /// Bytes of the layers in the registry; for an index, those of the platform with the fewest.
    pub bytes: Option<u64>,
    /// Time of the request.
    pub requested_at: Seconds,
}

/// Reason why a lookup failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolutionFailure {
    /// Reason in one word.
    pub reason: &'static str,
    /// Message with details of the reason.
    pub message: String,
    /// True if a retry may succeed without a change.
    pub transient: bool,
    /// True if the registry answered no request, whatever the credential. 429 and 5xx are not
    /// answers.
    pub unanswered: bool,
    /// Time of the next attempt.
    pub retry_at: Seconds,
}

impl ReferenceLookup {
    /// Reads the credentials for the registry from the secrets.
    pub async fn secrets(
        &self,
        request: &LookupRequest,
    ) -> Result<SecretCredentials, ResolutionFailure> {
        let api: Api<Secret> = Api::namespaced(self.client.clone(), &request.secret_namespace);
        let (mut credentials, mut versions) = (Vec::new(), Vec::new());
        for name in &request.pull_secrets {
            let place = format!("{}/{name}", request.secret_namespace);
            let unusable = |what: &dyn Display| {
                let message = format!("the secret {place} cannot be used: {what}");
                permanent("SecretUnusable", message)
            };
            let secret = match api.get_opt(name).await {
                Ok(Some(secret)) => secret,
                Ok(None) => {
                    let message =
                        format!("there is no secret {place}: make it, or name another one");
                    return Err(permanent("SecretMissing", message));
                }
                Err(kube::Error::Api(status)) if status.code == 403 => {
                    let message = format!(
                        "the controller may not read secrets in {}: see the chart's controller.secretNamespaces",
                        request.secret_namespace
                    );
                    return Err(permanent("SecretForbidden", message));
                }
                Err(error) => {
                    let message = format!("the secret {place} cannot be read: {error}");
                    return Err(transient("SecretUnavailable", message));
                }
            };
            let found = secret.type_.unwrap_or_default();
            let Some((_, key)) = SECRET_TYPES.iter().find(|(kind, _)| *kind == found) else {
                let what = format!(
                    "it is of the type {}, which does not say whom it is for; make one with kubectl create secret docker-registry",
                    excerpt(&found, 80)
                );
                return Err(unusable(&what));
            };
            let content = secret.data.unwrap_or_default().remove(*key).unwrap_or_default().0;
            let text = String::from_utf8(content).map_err(|_| unusable(&"it is no text"))?;
            let content = HashMap::from([((*key).to_owned(), text)]);
            let repository = request.reference.repository();
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
        Ok(SecretCredentials { credentials, version: version[..16].to_owned() })
    }

    /// Asks the policy, and then the registry with these credentials and those of the controller.
    pub async fn resolve(
        &self,
        request: &LookupRequest,
        mut credentials: Vec<Credential>,
    ) -> Result<FoundArtifact, ResolutionFailure> {
        let maximum_bytes = self.check_policy(request).await?;
        let repository = request.reference.repository();
        for offer in self.credentials.offers(repository) {
            match self.credentials.redeem(&offer.source, repository, None).await {
                Ok(found) => credentials.extend(found),
                Err(error) => {
                    tracing::warn!(%error, "no credential from one of the controller's sources");
                }
            }
        }
        // As in the kubelet, the request is anonymous only without any credential.
        if credentials.is_empty() {
            credentials.push(Credential::Anonymous);
        }
        let mut refusals = Refusals::default();
        for credential in credentials {
            let client = self.registry.at(repository, &credential);
            match self.resolve_with(request, client, maximum_bytes).await {
                Ok(known) => return Ok(known),
                Err(ResolveError::Registry(error)) if error.may_depend_on_credential() => {
                    refusals.add(error);
                }
                Err(error) => {
                    let unanswered = refusals.is_empty() && error.is_unanswered();
                    return Err(ResolutionFailure { unanswered, ..error.refusal() });
                }
            }
        }
        let unavailable = || transient("RegistryUnavailable", "nobody was asked");
        let refused = refusals.into_error().map(ResolveError::Registry);
        Err(refused.map_or_else(unavailable, |error| error.refusal()))
    }

    /// Checks the policy. Returns the maximum size in bytes, if the policy has one.
    async fn check_policy(
        &self,
        request: &LookupRequest,
    ) -> Result<Option<u64>, ResolutionFailure> {
        let mut nodes_see = request.reference.clone();
        if request.pins_digest && nodes_see.digest().is_none() {
            // A policy that requires digests is met, whatever the digest will be.
            nodes_see = nodes_see.at(Digest::of(b""));
        }
        let policy = self.policy.load().await;
        let policy = policy.map_err(|error| transient("PolicyUnreadable", error))?;
        let decided = policy.decide(PolicyRequest {
            reference: &nodes_see,
            namespace: Some(&request.namespace),
            require_signature: false,
        });
        let demands = decided.map_err(|refusal| permanent("PolicyDenied", refusal))?;
        Ok(demands.maximum_bytes)
    }

    async fn resolve_with(
        &self,
        request: &LookupRequest,
        client: RepositoryClient<'_>,
        maximum_bytes: Option<u64>,
    ) -> Result<FoundArtifact, ResolveError> {
        let requested_at = now();
        let name = ManifestName::of(&request.reference);
        let (digest, parsed) = {
            let top = client.manifest(&name).await?;
            let parsed = Manifest::parse(&top.bytes, top.content_type.as_deref(), self.limits);
            (top.digest, parsed.map_err(|error| ResolveError::Content(error.to_string()))?)
        };
        let allowed = |bytes: u64| match maximum_bytes {
            Some(limit) if bytes > limit => Err(ResolveError::TooLarge { bytes, limit }),
            _ => Ok(bytes),
        };
        let (platforms, bytes) = match parsed {
            Manifest::Image(image) => (Vec::new(), Some(allowed(bytes_of(&image))?)),
            Manifest::Index(index) => {
                let index = self.with_nested(index, client).await?;
                let (entries, is_for_any) = entries(index.index());
                let mut sizes = Vec::with_capacity(entries.len());
                for digest in entries.values().chain(&is_for_any) {
                    match self.bytes(*digest, client).await {
                        Ok(bytes) => sizes.push(bytes.map(allowed).transpose()?),
                        // Nodes may still get their platform of the index; only the size is
                        // unknown.
                        Err(_) if maximum_bytes.is_none() => sizes.push(None),
                        Err(error) => return Err(error.into()),
                    }
                }
                let fewest = sizes.into_iter().collect::<Option<Vec<u64>>>();
                let platforms = entries.into_keys().filter_map(|text| text.parse().ok());
                // Listed platforms exclude others.
                let platforms = platforms.filter(|_| is_for_any.is_none());
                (platforms.collect(), fewest.and_then(|sizes| sizes.into_iter().min()))
            }
        };
        Ok(FoundArtifact { digest, platforms, bytes, requested_at })
    }

    /// Reads the nested indexes of an index.
    async fn with_nested(
        &self,
        index: ImageIndex,
        client: RepositoryClient<'_>,
    ) -> Result<IndexEntries, ResolveError> {
        let unusable = |error: ManifestError| ResolveError::Content(error.to_string());
        let mut entries = IndexEntries::for_all_platforms(index, self.limits).map_err(unusable)?;
        while let Some(nested) = entries.next_index() {
            let name = ManifestName::Digest(nested.digest);
            let read = client.manifest(&name).await?;
            let document = Manifest::parse(&read.bytes, Some(&nested.media_type), self.limits);
            entries.insert(nested, document.map_err(unusable)?).map_err(unusable)?;
        }
        Ok(entries)
    }

    /// Returns the size of the artifact for one platform; `None` if its manifest is not supported.
    async fn bytes(
        &self,
        digest: Digest,
        client: RepositoryClient<'_>,
    ) -> Result<Option<u64>, RegistryError> {
        let one = client.manifest(&ManifestName::Digest(digest)).await?;
        Ok(match Manifest::parse(&one.bytes, None, self.limits) {
            Ok(Manifest::Image(image)) => Some(bytes_of(&image)),
            _ => None,
        })
    }
}

/// Returns the supported platforms, each with its manifest, and the manifest for any other
/// platform: the only one without a platform.
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
        // Each choice scans the whole index.
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

/// Returns the total size of the layers in the registry.
fn bytes_of(image: &ImageManifest) -> u64 {
    image.layers.iter().map(|layer| layer.size).fold(0, u64::saturating_add)
}

/// Reason why an answer of a registry is unusable.
#[derive(Debug, thiserror::Error)]
enum ResolveError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error("{0}")]
    Content(String),
    #[error("it has {bytes} bytes, the policy allows {limit} (maxArtifactBytes)")]
    TooLarge { bytes: u64, limit: u64 },
}

impl ResolveError {
    /// Returns whether the registry gave no answer at all.
    fn is_unanswered(&self) -> bool {
        matches!(self, Self::Registry(error) if error.is_transient())
    }

    fn refusal(&self) -> ResolutionFailure {
        let reason = match self {
            Self::Registry(RegistryError::NotFound { .. }) => "ReferenceNotFound",
            Self::Registry(RegistryError::Unauthorized { .. }) => "Unauthorized",
            Self::Registry(RegistryError::Forbidden { .. }) => "Forbidden",
            Self::Registry(_) if self.is_unanswered() => {
                return transient("RegistryUnavailable", self);
            }
            Self::Registry(_) => "RegistryRefused",
            Self::Content(_) => "UnusableManifest",
            Self::TooLarge { .. } => "PolicyDenied",
        };
        permanent(reason, self)
    }
}

/// Returns the current time. Called when a result is there, since a request may take longer than
/// the result lasts.
fn now() -> Seconds {
    Timestamp::now().as_second()
}

/// Returns a failure after which a retry may succeed without a change.
pub fn transient(reason: &'static str, message: impl Display) -> ResolutionFailure {
    let retry_at = now() + TRANSIENT_RETRY;
    ResolutionFailure { transient: true, retry_at, ..permanent(reason, message) }
}

/// Returns a failure that only a change mends.
pub fn permanent(reason: &'static str, message: impl Display) -> ResolutionFailure {
    let (message, retry_at) = (message.to_string(), now() + PERMANENT_RETRY);
    ResolutionFailure { reason, message, transient: false, unanswered: false, retry_at }
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
