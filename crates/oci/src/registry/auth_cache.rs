//! Cache of challenges and authorizations by repository, so that not every request of a pull starts
//! with a 401.

use std::sync::Arc;

use parking_lot::Mutex;
use reqwest::Url;
use reqwest::header::HeaderValue;

use super::auth_challenge::Challenge;
use super::bearer_token::{self, FetchedToken, TokenCache};
use super::error::{self, RegistryError};
use super::exchange::Exchange;
use crate::Repository;
use crate::credentials::Credential;
use sys::lru_map::LruMap;

/// Maximum number of repositories with a cached challenge. Evicting one costs a request.
const MAXIMUM_CHALLENGES: usize = 2048;

/// Authorization of a request.
#[derive(Clone, Debug)]
pub(super) enum RequestAuthorization {
    /// No authorization header.
    Nothing,
    /// The credential itself, as `Basic`.
    Basic(HeaderValue),
    /// The credential itself, as `Bearer`.
    RegistryToken(HeaderValue),
    /// A token that a token server returned for the credential.
    Token(FetchedToken),
}

/// Root of the API and repository of a request.
type EndpointRepository = (Url, Repository);

/// Cached challenges and tokens of one process.
pub(super) struct AuthCache {
    tokens: TokenCache,
    /// Challenges of the endpoint itself, never of a host that it redirected to.
    challenges: Mutex<LruMap<EndpointRepository, Arc<[Challenge]>>>,
}

impl RequestAuthorization {
    pub(super) fn header(&self) -> Option<&HeaderValue> {
        match self {
            Self::Nothing => None,
            Self::Basic(header) | Self::RegistryToken(header) => Some(header),
            Self::Token(fetched) => Some(&fetched.token.header),
        }
    }

    /// Returns whether `next` cannot succeed after this one was refused.
    pub(super) fn is_exhausted_by(&self, next: &Self) -> bool {
        matches!(
            (self, next),
            (_, Self::Nothing)
                | (Self::Basic(_), Self::Basic(_))
                | (Self::RegistryToken(_), Self::RegistryToken(_))
        )
    }
}

impl AuthCache {
    pub(super) fn new() -> Result<Self, RegistryError> {
        Ok(Self {
            tokens: TokenCache::new()?,
            challenges: Mutex::new(LruMap::new(MAXIMUM_CHALLENGES)),
        })
    }

    /// Returns the cached challenges of a repository.
    pub(super) fn challenges(&self, exchange: Exchange<'_>) -> Arc<[Challenge]> {
        self.challenges.lock().get(&place(exchange)).unwrap_or_else(|| Arc::new([]))
    }

    /// Caches the challenges of a repository.
    pub(super) fn cache_challenges(&self, exchange: Exchange<'_>, challenges: &[Challenge]) {
        if !challenges.is_empty() {
            self.challenges.lock().insert(place(exchange), challenges.into());
        }
    }

    /// Returns the best authorization of a credential for these challenges: a token before `Basic`,
    /// whatever their order, since a token grants less. Returns none if `shown` is a token that was
    /// just fetched.
    pub(super) async fn authorize(
        &self,
        exchange: Exchange<'_>,
        challenges: &[Challenge],
        shown: &RequestAuthorization,
    ) -> Result<RequestAuthorization, RegistryError> {
        let (repository, credential) = (exchange.request.repository, exchange.credential());
        if let Credential::RegistryToken { token } = credential {
            // Needs no challenge: the token is for this registry only.
            return bearer_token::bearer(token)
                .map(RequestAuthorization::RegistryToken)
                .ok_or_else(|| unusable(repository, "the registry token fits in no header"));
        }
        let transport = &exchange.registry.transport;
        let mut refused = None;
        for challenge in challenges {
            let Challenge::Bearer { realm, service, scopes } = challenge else { continue };
            let realm = match bearer_token::realm(transport, exchange.endpoint, realm).await {
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
            if matches!(shown, RequestAuthorization::Token(token) if !token.cached && token.key == key)
            {
                return Ok(RequestAuthorization::Nothing);
            }
            return self.tokens.get(exchange, key).await.map(RequestAuthorization::Token);
        }
        if challenges.contains(&Challenge::Basic)
            && let Some(header) = bearer_token::basic(credential)
        {
            return Ok(RequestAuthorization::Basic(header));
        }
        match refused {
            Some(reason) => Err(unusable(repository, reason)),
            None => Ok(RequestAuthorization::Nothing),
        }
    }

    /// Drops a refused token, so that it is not sent again.
    pub(super) async fn forget(&self, proof: &RequestAuthorization) {
        if let RequestAuthorization::Token(fetched) = proof {
            self.tokens.forget(fetched).await;
        }
    }
}

fn place(exchange: Exchange<'_>) -> EndpointRepository {
    (exchange.endpoint.root.clone(), exchange.request.repository.clone())
}

fn unusable(repository: &Repository, reason: &str) -> RegistryError {
    let host = error::host(repository.host());
    RegistryError::protocol(&host, &bearer_token::describe(repository), reason)
}
