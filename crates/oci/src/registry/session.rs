//! Who asks whom with what: answers challenges, and remembers them per
//! repository so that a pull does not start every request with a 401.

use std::sync::{Arc, Mutex, PoisonError};

use reqwest::Url;
use reqwest::header::HeaderValue;

use super::challenge::Challenge;
use super::endpoint::Endpoint;
use super::error::{self, RegistryError};
use super::recent::Recent;
use super::token::{self, Handed, Tokens};
use super::transport::Transport;
use crate::Repository;
use crate::credentials::Credential;

/// Repositories whose challenge is remembered; forgetting one costs a request.
const MAXIMUM_CHALLENGES: usize = 2048;

/// What a request shows.
#[derive(Clone, Debug)]
pub(super) enum Proof {
    /// Nothing.
    Nothing,
    /// The credential itself, as `Basic`.
    Basic(HeaderValue),
    /// The credential itself, as `Bearer`.
    RegistryToken(HeaderValue),
    /// A token that a token server gave for the credential.
    Token(Handed),
}

/// Who was asked, and for which repository of which registry.
type Asked = (Url, Repository);

/// The memory behind all requests.
#[derive(Debug)]
pub(super) struct Session {
    tokens: Tokens,
    /// Only who was asked teaches, never a host that it redirected to.
    challenges: Mutex<Recent<Asked, Arc<[Challenge]>>>,
}

impl Proof {
    pub(super) fn header(&self) -> Option<&HeaderValue> {
        match self {
            Self::Nothing => None,
            Self::Basic(header) | Self::RegistryToken(header) => Some(header),
            Self::Token(handed) => Some(&handed.token.header),
        }
    }

    /// Whether showing `next` after this one was refused would say nothing new.
    pub(super) fn is_no_better(&self, next: &Self) -> bool {
        matches!(
            (self, next),
            (_, Self::Nothing)
                | (Self::Basic(_), Self::Basic(_))
                | (Self::RegistryToken(_), Self::RegistryToken(_))
        )
    }
}

impl Session {
    pub(super) fn new() -> Result<Self, RegistryError> {
        Ok(Self { tokens: Tokens::new()?, challenges: Mutex::new(Recent::new(MAXIMUM_CHALLENGES)) })
    }

    /// What to show without having been asked, from what is known of the repository.
    pub(super) async fn eager(
        &self,
        transport: &Transport,
        endpoint: &Endpoint,
        repository: &Repository,
        credential: &Credential,
    ) -> Result<Proof, RegistryError> {
        let challenges = self.known(endpoint, repository);
        self.answer(transport, endpoint, repository, &challenges, credential, &Proof::Nothing).await
    }

    /// What was asked for when this repository was last asked for there.
    pub(super) fn known(&self, endpoint: &Endpoint, repository: &Repository) -> Arc<[Challenge]> {
        let asked = (endpoint.root.clone(), repository.clone());
        self.challenges().get(&asked).unwrap_or_else(|| Arc::new([]))
    }

    /// Remembers what was asked for.
    pub(super) fn learn(
        &self,
        endpoint: &Endpoint,
        repository: &Repository,
        challenges: &[Challenge],
    ) {
        if !challenges.is_empty() {
            let asked = (endpoint.root.clone(), repository.clone());
            self.challenges().insert(asked, challenges.into());
        }
    }

    /// The best proof that a credential gives for these challenges: a token
    /// before `Basic`, whatever their order, as a token says less. After `shown`
    /// was refused, nothing when a token server was asked for it just now.
    pub(super) async fn answer(
        &self,
        transport: &Transport,
        endpoint: &Endpoint,
        repository: &Repository,
        challenges: &[Challenge],
        credential: &Credential,
        shown: &Proof,
    ) -> Result<Proof, RegistryError> {
        if let Credential::RegistryToken { token } = credential {
            // Without being asked: it was made for this registry, and opens nothing else.
            return token::bearer(token)
                .map(Proof::RegistryToken)
                .ok_or_else(|| unusable(repository, "the registry token fits in no header"));
        }
        let mut refused = None;
        for challenge in challenges {
            let Challenge::Bearer { realm, service, scopes } = challenge else { continue };
            let realm = match token::realm(transport, endpoint, realm).await {
                Ok(realm) => realm,
                Err(reason) => {
                    refused = Some(reason);
                    continue;
                }
            };
            let scopes = if scopes.is_empty() {
                vec![format!("repository:{}:pull", repository.path())]
            } else {
                scopes.clone()
            };
            let key = self.tokens.key(realm, service.clone(), scopes, credential);
            if matches!(shown, Proof::Token(token) if !token.cached && token.key == key) {
                return Ok(Proof::Nothing);
            }
            let what = error::describe("a token", repository);
            return self
                .tokens
                .get(transport, endpoint, key, credential, &what)
                .await
                .map(Proof::Token);
        }
        if challenges.contains(&Challenge::Basic)
            && let Some(header) = token::basic(credential)
        {
            return Ok(Proof::Basic(header));
        }
        match refused {
            Some(reason) => Err(unusable(repository, reason)),
            None => Ok(Proof::Nothing),
        }
    }

    /// Drops what was refused, so that it is not shown again.
    pub(super) async fn forget(&self, proof: &Proof) {
        if let Proof::Token(handed) = proof {
            self.tokens.forget(handed).await;
        }
    }

    fn challenges(&self) -> std::sync::MutexGuard<'_, Recent<Asked, Arc<[Challenge]>>> {
        self.challenges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unusable(repository: &Repository, reason: &str) -> RegistryError {
    RegistryError::Protocol {
        host: error::host(repository.host()),
        what: error::describe("a token", repository),
        reason: reason.to_owned(),
    }
}
