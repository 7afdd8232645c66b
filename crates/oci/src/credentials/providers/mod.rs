//! Credentials of the node: its docker configuration, and the kubelet's credential provider
//! plugins.
//!
//! ```text
//! kubelet_provider_config  the kubelet's CredentialProviderConfig
//! provider_protocol        requests to a plugin and its responses
//! provider_process         one run of a plugin
//! ```
//!
//! Both files are checked when they are used, and read again when they have changed.
//! [`NodeCredentials::offers`] lists the possible credentials without running a plugin. A plugin
//! runs when its credential is needed ([`NodeCredentials::redeem`]), and its response is cached as
//! long as it says.

pub mod kubelet_provider_config;
mod provider_process;
pub mod provider_protocol;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Deserialize;
use tokio::sync::Semaphore;
use tokio::time::Instant;

pub use kubelet_provider_config::CredentialProvider;

use self::kubelet_provider_config::TokenCacheType;
use super::workload_identity::{ServiceAccountToken, WorkloadIdentity};
use super::{Credential, Keyring};
use crate::Repository;
use sys::reload::FileBacked;

/// Maximum size of a file in bytes: the kubelet's own files have a few KiB, and a docker
/// configuration may name many registries.
const MAXIMUM_FILE_BYTES: u64 = 1024 * 1024;
/// Maximum number of plugins that run at once, each as a process.
const MAXIMUM_RUNS: usize = 8;
/// Maximum number of cached responses. Evicting one costs a run.
const MAXIMUM_ANSWERS: usize = 4096;

/// Sources of the credentials of the node.
#[derive(Clone, Debug)]
pub struct ProviderFiles {
    /// Path of a docker `config.json`.
    pub docker_config: Option<PathBuf>,
    /// Paths of the kubelet's configuration and of the folder of its plugins.
    pub plugins: Option<(PathBuf, PathBuf)>,
    /// Maximum duration of a run.
    pub timeout: Duration,
    /// Annotations that plugins would read from `ServiceAccount` objects.
    pub annotations: Vec<ServiceAccountAnnotations>,
}

/// Annotations of service accounts, which are otherwise available from the Kubernetes API only.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceAccountAnnotations {
    /// Namespace of the service accounts.
    pub namespace: String,
    /// Service account; `None` for all of the namespace.
    pub service_account: Option<String>,
    /// Annotations by key.
    pub annotations: BTreeMap<String, String>,
}

/// Credentials of the node. Cheap to clone.
#[derive(Clone)]
pub struct NodeCredentials(Arc<NodeCredentialsInner>);

struct NodeCredentialsInner {
    files: ProviderFiles,
    docker_config: FileBacked<Result<Keyring, ProviderError>>,
    providers: FileBacked<Result<Vec<Arc<CredentialProvider>>, ProviderError>>,
    runs: Semaphore,
    answers: Mutex<HashMap<String, (Instant, Keyring)>>,
}

/// A credential that is known, or that a plugin may return.
#[derive(Clone, Debug)]
pub struct CredentialOffer {
    /// Owner of the right that the credential stands for.
    pub owner: CredentialOwner,
    /// Way to get the credential.
    pub source: CredentialSource,
}

/// Owner of the right that a credential stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CredentialOwner {
    /// The node: any pod could use the credential.
    Node,
    /// The service account of the pod.
    ServiceAccount,
}

/// Way to get a credential.
#[derive(Clone, Debug)]
pub enum CredentialSource {
    /// Known without a plugin.
    Ready(Credential),
    /// Requires a run of this plugin.
    Plugin(Arc<CredentialProvider>),
    /// Unavailable: the configuration of the source is broken.
    Broken(ProviderError),
}

/// Reason why a source of the node gives no credential. It never contains output of a plugin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProviderError {
    /// A broken file of the node.
    #[error("the node's {} cannot be used: {reason}", path.display())]
    File {
        /// Path of the file.
        path: PathBuf,
        /// Defect of the file.
        reason: String,
    },
    /// A plugin that does not start.
    #[error("the credential provider {plugin} cannot be started from {}: {reason}", path.display())]
    Start {
        /// Name of the plugin.
        plugin: String,
        /// Expected path of the executable.
        path: PathBuf,
        /// Error of the kernel.
        reason: String,
    },
    /// A run that failed.
    #[error("the credential provider {plugin} failed: {reason}; run it by hand on the node")]
    Failed {
        /// Name of the plugin.
        plugin: String,
        /// Reason of the failure.
        reason: String,
    },
    /// A missing token: the kubelet sent none for this audience.
    #[error(
        "the credential provider {plugin} wants a service account token for the audience \"{audience}\": add it to tokenRequests of the CSIDriver object"
    )]
    NoToken {
        /// Name of the plugin.
        plugin: String,
        /// Audience of the token.
        audience: String,
    },
    /// A required annotation that is not configured.
    #[error(
        "the credential provider {plugin} wants the annotation {key} of the service account {account}, which the driver does not read from the API: set it in registries.serviceAccountAnnotations"
    )]
    NoAnnotation {
        /// Name of the plugin.
        plugin: String,
        /// Key of the annotation.
        key: String,
        /// Service account as `namespace/name`.
        account: String,
    },
}

impl NodeCredentials {
    /// Creates the sources without reading any file.
    pub fn new(files: ProviderFiles) -> Self {
        Self(Arc::new(NodeCredentialsInner {
            files,
            docker_config: FileBacked::default(),
            providers: FileBacked::default(),
            runs: Semaphore::new(MAXIMUM_RUNS),
            answers: Mutex::default(),
        }))
    }

    /// Returns the possible credentials for a repository: plugins in their order, then the docker
    /// configuration. Reads files, but runs no plugin.
    pub fn offers(&self, repository: &Repository) -> Vec<CredentialOffer> {
        let mut offers = Vec::new();
        let of_node = |source| CredentialOffer { owner: CredentialOwner::Node, source };
        let broken = |error: &ProviderError| of_node(CredentialSource::Broken(error.clone()));
        match self.providers().as_deref() {
            None => {}
            Some(Ok(providers)) => {
                for provider in providers.iter().filter(|provider| provider.matches(repository)) {
                    let source = CredentialSource::Plugin(Arc::clone(provider));
                    offers.push(match provider.token {
                        Some(_) => {
                            CredentialOffer { owner: CredentialOwner::ServiceAccount, source }
                        }
                        None => of_node(source),
                    });
                }
            }
            Some(Err(error)) => offers.push(broken(error)),
        }
        match self.docker_config().as_deref() {
            None => {}
            Some(Ok(keyring)) => {
                let known = keyring.matching(repository).into_iter().map(CredentialSource::Ready);
                offers.extend(known.map(of_node));
            }
            Some(Err(error)) => offers.push(broken(error)),
        }
        offers
    }

    /// Returns the credentials of an offer, in the order in which they are tried. A plugin may
    /// return none.
    pub async fn redeem(
        &self,
        source: &CredentialSource,
        repository: &Repository,
        identity: Option<&WorkloadIdentity>,
    ) -> Result<Vec<Credential>, ProviderError> {
        match source {
            CredentialSource::Ready(credential) => Ok(vec![credential.clone()]),
            CredentialSource::Broken(error) => Err(error.clone()),
            CredentialSource::Plugin(provider) => {
                Ok(self.run_plugin(provider, repository, identity).await?.matching(repository))
            }
        }
    }

    async fn run_plugin(
        &self,
        provider: &CredentialProvider,
        repository: &Repository,
        identity: Option<&WorkloadIdentity>,
    ) -> Result<Keyring, ProviderError> {
        let (token, annotations) = self.identity_for(provider, identity)?;
        let key = cache_key(provider, token, identity);
        if let Some(known) = self.cached(&key, repository) {
            return Ok(known);
        }
        // `acquire` fails only on a closed semaphore.
        let _permit = self.0.runs.acquire().await;
        // A concurrent request may have run the plugin meanwhile.
        if let Some(known) = self.cached(&key, repository) {
            return Ok(known);
        }
        let request = provider_protocol::ProviderRequest {
            kind: "CredentialProviderRequest",
            api_version: &provider.api_version,
            image: repository.to_string(),
            service_account_token: token.map(ServiceAccountToken::reveal),
            service_account_annotations: annotations,
        };
        let failed =
            |reason: String| ProviderError::Failed { plugin: provider.name.clone(), reason };
        let request = serde_json::to_vec(&request).map_err(|error| failed(error.to_string()))?;
        let Some((_, folder)) = &self.0.files.plugins else { return Ok(Keyring::empty()) };
        let asked_at = Instant::now();
        let output =
            provider_process::run(provider, folder, &request, self.0.files.timeout).await?;
        let answer = provider_protocol::parse(&output, &provider.api_version)
            .map_err(|reason| failed(format!("it printed {reason}")))?;
        let duration = answer.cache_duration.unwrap_or(provider.default_cache_duration);
        if !duration.is_zero() {
            let key = format!("{key} {}", answer.cache_key.key(repository));
            // A duration beyond the range of the clock would mean for ever.
            let until = asked_at.checked_add(duration).unwrap_or(asked_at);
            self.keep(key, until, answer.keyring.clone());
        }
        Ok(answer.keyring)
    }

    /// Returns the token and the annotations for a plugin.
    fn identity_for<'a>(
        &'a self,
        provider: &'a CredentialProvider,
        identity: Option<&'a WorkloadIdentity>,
    ) -> Result<(Option<&'a ServiceAccountToken>, BTreeMap<&'a str, &'a str>), ProviderError> {
        let Some(wanted) = &provider.token else { return Ok((None, BTreeMap::new())) };
        let plugin = || provider.name.clone();
        let audience = &wanted.service_account_token_audience;
        let token = identity.and_then(|identity| identity.token(audience));
        let (Some(identity), Some(token)) = (identity, token) else {
            if wanted.require_service_account {
                return Err(ProviderError::NoToken {
                    plugin: plugin(),
                    audience: audience.clone(),
                });
            }
            return Ok((None, BTreeMap::new()));
        };
        let find = |key: &str| {
            let mut accounts = self.0.files.annotations.iter().filter(|account| {
                account.namespace == identity.namespace
                    && account
                        .service_account
                        .as_ref()
                        .is_none_or(|name| *name == identity.service_account)
            });
            accounts.find_map(|account| account.annotations.get_key_value(key))
        };
        let mut annotations = BTreeMap::new();
        for key in &wanted.required_service_account_annotation_keys {
            let (key, value) = find(key).ok_or_else(|| ProviderError::NoAnnotation {
                plugin: plugin(),
                key: key.clone(),
                account: format!("{}/{}", identity.namespace, identity.service_account),
            })?;
            annotations.insert(key.as_str(), value.as_str());
        }
        for key in &wanted.optional_service_account_annotation_keys {
            if let Some((key, value)) = find(key) {
                annotations.insert(key.as_str(), value.as_str());
            }
        }
        Ok((Some(token), annotations))
    }

    /// Returns a cached response, searched as in the kubelet: by image, by registry, then global.
    fn cached(&self, key: &str, repository: &Repository) -> Option<Keyring> {
        use provider_protocol::CacheKeyType::{Global, Image, Registry};
        let answers = self.0.answers.lock();
        let now = Instant::now();
        [Image, Registry, Global].into_iter().find_map(|kind| {
            let (until, keyring) = answers.get(&format!("{key} {}", kind.key(repository)))?;
            (now < *until).then(|| keyring.clone())
        })
    }

    fn keep(&self, key: String, until: Instant, keyring: Keyring) {
        let mut answers = self.0.answers.lock();
        if answers.len() >= MAXIMUM_ANSWERS {
            let now = Instant::now();
            answers.retain(|_, (until, _)| now < *until);
            if answers.len() >= MAXIMUM_ANSWERS {
                answers.clear();
            }
        }
        answers.insert(key, (until, keyring));
    }

    fn docker_config(&self) -> Option<Arc<Result<Keyring, ProviderError>>> {
        let path = self.0.files.docker_config.as_ref()?;
        Some(parsed(&self.0.docker_config, path, |bytes| {
            Keyring::from_docker_config(&bytes).map_err(|error| error.to_string())
        }))
    }

    fn providers(&self) -> Option<Arc<Result<Vec<Arc<CredentialProvider>>, ProviderError>>> {
        let (path, _) = self.0.files.plugins.as_ref()?;
        Some(parsed(&self.0.providers, path, |bytes| {
            let text = String::from_utf8(bytes).map_err(|_| "it is no text".to_owned())?;
            let providers = kubelet_provider_config::parse(&text)?;
            Ok(providers.into_iter().map(Arc::new).collect())
        }))
    }
}

/// Returns what a file says, which is read again when it has changed.
fn parsed<T>(
    known: &FileBacked<Result<T, ProviderError>>,
    path: &Path,
    parse: impl FnOnce(Vec<u8>) -> Result<T, String>,
) -> Arc<Result<T, ProviderError>> {
    known.get(|seen| {
        let read = seen.read(path, MAXIMUM_FILE_BYTES).map_err(|error| error.to_string());
        read.and_then(parse).map_err(|reason| ProviderError::File { path: path.to_owned(), reason })
    })
}

/// Returns the cache key of a plugin's responses, which includes the service account or the token
/// if the plugin gets one.
fn cache_key(
    provider: &CredentialProvider,
    token: Option<&ServiceAccountToken>,
    identity: Option<&WorkloadIdentity>,
) -> String {
    let wanted = provider.token.as_ref();
    // The key includes all input of the plugin, so that a changed configuration causes a new run.
    let settings =
        crate::Digest::of(format!("{:?}", (&provider.args, &provider.env, wanted)).as_bytes());
    let of = match (token, identity) {
        (Some(token), Some(identity)) => {
            let account = format!("{}/{}", identity.namespace, identity.service_account);
            match wanted.and_then(|wanted| wanted.cache_type) {
                Some(TokenCacheType::ServiceAccount) => account,
                Some(TokenCacheType::Token) | None => {
                    let hash = crate::Digest::of(token.reveal().as_bytes()).hex();
                    format!("{account} {hash}")
                }
            }
        }
        _ => String::new(),
    };
    format!("{} {} [{of}]", provider.name, settings.hex())
}
