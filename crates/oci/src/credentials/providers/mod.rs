//! The node's own credentials: its docker configuration, and the kubelet's plugins.
//!
//! ```text
//! config     the kubelet's CredentialProviderConfig
//! protocol   what is said to a plugin, and what it says
//! run        one run of a plugin
//! ```
//!
//! Both files are looked at when they are used and read again when they have
//! changed. Which credentials there could be is known without running anything
//! ([`NodeCredentials::offers`]); a plugin runs when its credential is needed
//! ([`NodeCredentials::redeem`]), and its answer is kept as long as it says.

pub mod config;
pub mod protocol;
mod run;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::Semaphore;
use tokio::time::Instant;

pub use config::Provider;

use self::config::TokenCacheType;
use super::identity::{ServiceAccountToken, WorkloadIdentity};
use super::{Credential, Keyring};
use crate::Repository;
use sys::reload::FileBacked;

/// The kubelet's own files are a few KiB; a docker configuration may name many registries.
const MAXIMUM_FILE_BYTES: u64 = 1024 * 1024;
/// Plugins that run at once: each is a process.
const MAXIMUM_RUNS: usize = 8;
/// Answers kept; forgetting one costs a run.
const MAXIMUM_ANSWERS: usize = 4096;

/// Where the node's own credentials come from.
#[derive(Clone, Debug)]
pub struct ProviderFiles {
    /// A docker `config.json`.
    pub docker_config: Option<PathBuf>,
    /// The kubelet's configuration, and the folder of its plugins.
    pub plugins: Option<(PathBuf, PathBuf)>,
    /// How long a plugin may take.
    pub timeout: Duration,
    /// What plugins would read from `ServiceAccount` objects.
    pub annotations: Vec<ServiceAccountAnnotations>,
}

/// Annotations of service accounts, which only the Kubernetes API could give otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceAccountAnnotations {
    /// The namespace.
    pub namespace: String,
    /// The service account; none means all of the namespace.
    pub service_account: Option<String>,
    /// The annotations.
    pub annotations: BTreeMap<String, String>,
}

/// The node's own credentials. Cheap to clone.
#[derive(Clone, Debug)]
pub struct NodeCredentials(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    files: ProviderFiles,
    docker_config: FileBacked<Result<Keyring, ProviderError>>,
    providers: FileBacked<Result<Vec<Arc<Provider>>, ProviderError>>,
    runs: Semaphore,
    answers: Mutex<HashMap<String, (Instant, Keyring)>>,
}

/// A credential that there is, or may be.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Who is behind it.
    pub owner: Owner,
    /// How it is had.
    pub source: Source,
}

/// Whose right a credential stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The node: any pod could use it.
    Node,
    /// The pod's service account.
    ServiceAccount,
}

/// How a credential is had.
#[derive(Clone, Debug)]
pub enum Source {
    /// It is here.
    Ready(Credential),
    /// By running a plugin.
    Plugin(Arc<Provider>),
    /// Not at all: what offers it cannot be used.
    Broken(ProviderError),
}

/// Why a source of the node's gives no credential. The plugin's own words are never in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProviderError {
    /// A file of the node's.
    #[error("the node's {} cannot be used: {reason}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The program.
    #[error("the credential provider {plugin} cannot be started from {}: {reason}", path.display())]
    Start {
        /// Its name.
        plugin: String,
        /// Where it should be.
        path: PathBuf,
        /// The kernel's answer.
        reason: String,
    },
    /// It ran and was of no use.
    #[error("the credential provider {plugin} failed: {reason}; run it by hand on the node")]
    Failed {
        /// Its name.
        plugin: String,
        /// How.
        reason: String,
    },
    /// The kubelet sent no token that it could use.
    #[error(
        "the credential provider {plugin} wants a service account token for the audience \"{audience}\": add it to tokenRequests of the CSIDriver object"
    )]
    NoToken {
        /// Its name.
        plugin: String,
        /// The audience.
        audience: String,
    },
    /// Only the Kubernetes API has it.
    #[error(
        "the credential provider {plugin} wants the annotation {key} of the service account {account}, which the driver does not read from the API: set it in registries.serviceAccountAnnotations"
    )]
    NoAnnotation {
        /// Its name.
        plugin: String,
        /// The annotation.
        key: String,
        /// `namespace/name`.
        account: String,
    },
}

impl Offer {
    fn broken(error: &ProviderError) -> Self {
        Self { owner: Owner::Node, source: Source::Broken(error.clone()) }
    }
}

impl NodeCredentials {
    /// Reads nothing yet.
    #[must_use]
    pub fn new(files: ProviderFiles) -> Self {
        Self(Arc::new(Inner {
            files,
            docker_config: FileBacked::default(),
            providers: FileBacked::default(),
            runs: Semaphore::new(MAXIMUM_RUNS),
            answers: Mutex::default(),
        }))
    }

    /// What there may be for a repository: plugins in their order, then the docker
    /// configuration. Reads files; runs nothing.
    #[must_use]
    pub fn offers(&self, repository: &Repository) -> Vec<Offer> {
        let mut offers = Vec::new();
        match self.providers().as_ref().map(|providers| providers.as_ref().as_ref()) {
            None => {}
            Some(Ok(providers)) => {
                for provider in providers.iter().filter(|provider| provider.matches(repository)) {
                    let with_token = provider.token.is_some();
                    let owner = if with_token { Owner::ServiceAccount } else { Owner::Node };
                    offers.push(Offer { owner, source: Source::Plugin(Arc::clone(provider)) });
                }
            }
            Some(Err(error)) => offers.push(Offer::broken(error)),
        }
        match self.docker_config().as_deref() {
            None => {}
            Some(Ok(keyring)) => {
                let credentials = keyring.matching(repository).into_iter();
                offers.extend(credentials.map(|credential| Offer {
                    owner: Owner::Node,
                    source: Source::Ready(credential),
                }));
            }
            Some(Err(error)) => offers.push(Offer::broken(error)),
        }
        offers
    }

    /// The credentials behind an offer, in the order in which they are tried; a plugin may know none.
    pub async fn redeem(
        &self,
        source: &Source,
        repository: &Repository,
        identity: Option<&WorkloadIdentity>,
    ) -> Result<Vec<Credential>, ProviderError> {
        match source {
            Source::Ready(credential) => Ok(vec![credential.clone()]),
            Source::Broken(error) => Err(error.clone()),
            Source::Plugin(provider) => {
                Ok(self.ask(provider, repository, identity).await?.matching(repository))
            }
        }
    }

    async fn ask(
        &self,
        provider: &Provider,
        repository: &Repository,
        identity: Option<&WorkloadIdentity>,
    ) -> Result<Keyring, ProviderError> {
        let (token, annotations) = self.identity_for(provider, identity)?;
        let asker = asker(provider, token, identity);
        if let Some(known) = self.known(&asker, repository) {
            return Ok(known);
        }
        // The semaphore is never closed.
        let _permit = self.0.runs.acquire().await;
        // Another one may have asked the same meanwhile.
        if let Some(known) = self.known(&asker, repository) {
            return Ok(known);
        }
        let request = protocol::Request {
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
        let output = run::run(provider, folder, &request, self.0.files.timeout).await?;
        let answer = protocol::parse(&output, &provider.api_version)
            .map_err(|reason| failed(format!("it printed {reason}")))?;
        let duration = answer.cache_duration.unwrap_or(provider.default_cache_duration);
        if !duration.is_zero() {
            let key = format!("{asker} {}", answer.cache_key.key(repository));
            // Beyond what a clock can say is for ever, which the bound on answers ends.
            let until = asked_at.checked_add(duration).unwrap_or(asked_at);
            self.keep(key, until, answer.keyring.clone());
        }
        Ok(answer.keyring)
    }

    /// The token and the annotations that a plugin is given.
    fn identity_for<'a>(
        &'a self,
        provider: &'a Provider,
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

    /// What a plugin said before, looked for as the kubelet does: image, registry, everything.
    fn known(&self, asker: &str, repository: &Repository) -> Option<Keyring> {
        use protocol::CacheKeyType::{Global, Image, Registry};
        let answers = self.0.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        [Image, Registry, Global].into_iter().find_map(|kind| {
            let (until, keyring) = answers.get(&format!("{asker} {}", kind.key(repository)))?;
            (now < *until).then(|| keyring.clone())
        })
    }

    fn keep(&self, key: String, until: Instant, keyring: Keyring) {
        let mut answers = self.0.answers.lock().unwrap_or_else(PoisonError::into_inner);
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
        Some(self.0.docker_config.get(|seen| {
            let wrong = |reason: String| ProviderError::File { path: path.clone(), reason };
            let bytes =
                seen.read(path, MAXIMUM_FILE_BYTES).map_err(|error| wrong(error.to_string()))?;
            Keyring::from_docker_config(&bytes).map_err(|error| wrong(error.to_string()))
        }))
    }

    fn providers(&self) -> Option<Arc<Result<Vec<Arc<Provider>>, ProviderError>>> {
        let (path, _) = self.0.files.plugins.as_ref()?;
        Some(self.0.providers.get(|seen| {
            let wrong = |reason: String| ProviderError::File { path: path.clone(), reason };
            let bytes =
                seen.read(path, MAXIMUM_FILE_BYTES).map_err(|error| wrong(error.to_string()))?;
            let text = String::from_utf8(bytes).map_err(|_| wrong("it is no text".to_owned()))?;
            let providers = config::parse(&text).map_err(wrong)?;
            Ok(providers.into_iter().map(Arc::new).collect())
        }))
    }
}

/// Whose answers are kept together: the plugin's, and with a token the service account's or the token's own.
fn asker(
    provider: &Provider,
    token: Option<&ServiceAccountToken>,
    identity: Option<&WorkloadIdentity>,
) -> String {
    let wanted = provider.token.as_ref();
    // Everything that the plugin is told stands in its answers' name: a changed configuration asks anew.
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
