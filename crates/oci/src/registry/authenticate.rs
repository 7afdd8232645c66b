//! Requests with authentication: send, receive a challenge, send again with an authorization.

use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode, Url};

use super::Registry;
use super::auth_cache::RequestAuthorization;
use super::auth_challenge;
use super::error::RegistryError;
use super::http_transport::{HttpRequest, HttpResponse};
use super::registry_endpoint::RegistryEndpoint;
use super::registry_request::RegistryRequest;

/// First without authorization or with a cached one, then with that of the challenge, then once
/// more if that was a stale token.
const MAXIMUM_ATTEMPTS: usize = 3;

impl Registry {
    pub(super) async fn expect_success(
        &self,
        request: &RegistryRequest<'_>,
        endpoint: &RegistryEndpoint,
    ) -> Result<HttpResponse, RegistryError> {
        let answer = self.send_authenticated(request, endpoint).await?;
        match answer.refusal_or_success(request, endpoint) {
            Some(refusal) => Err(refusal),
            None => Ok(answer),
        }
    }

    /// Sends a request and answers challenges. Returns the response whatever its status.
    pub(super) async fn send_authenticated(
        &self,
        request: &RegistryRequest<'_>,
        endpoint: &RegistryEndpoint,
    ) -> Result<HttpResponse, RegistryError> {
        let repository = request.repository;
        let credential = request.credential_for(endpoint);
        let url = request.address(endpoint);
        // The token endpoint and the API root limit the rate of the whole host.
        let key = self.request_key(request, endpoint);
        let of_host = |error: &RegistryError| self.backoff.record_host_failure(&key, error);
        let initial = self
            .auth_cache
            .initial_authorization(&self.transport, endpoint, repository, credential)
            .await;
        let mut authorization = initial.inspect_err(of_host)?;
        let mut attempt = 1;
        loop {
            let mut answer = self.send(request, endpoint, &url, &authorization).await?;
            answer.with_credential = !credential.is_anonymous()
                && !matches!(authorization, RequestAuthorization::Nothing);
            let status = answer.status();
            let refused = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
            // A refusal of a redirect's host has no challenge of the registry.
            if answer.redirected || !(refused || status == StatusCode::NOT_FOUND) {
                return Ok(answer);
            }
            let mut challenges = auth_challenge::read(answer.response.headers());
            if refused {
                self.auth_cache.forget(&authorization).await;
            } else if !matches!(authorization, RequestAuthorization::Nothing) {
                return Ok(answer);
            }
            if matches!(authorization, RequestAuthorization::Nothing) {
                // A registry that allows anonymous requests may answer them with 404 for a private
                // repository.
                let is_hidden = status != StatusCode::UNAUTHORIZED;
                if is_hidden && credential.is_anonymous() {
                    return Ok(answer);
                }
                // The API root returns a challenge.
                if is_hidden || challenges.is_empty() {
                    challenges =
                        self.challenges_of_api(request, endpoint).await.inspect_err(of_host)?;
                }
            }
            if attempt == MAXIMUM_ATTEMPTS {
                return Ok(answer);
            }
            attempt += 1;
            // A refusal without a challenge may mean a stale token, which is worth renewing.
            self.auth_cache.cache_challenges(endpoint, repository, &challenges);
            let challenges = self.auth_cache.cached_challenges(endpoint, repository);
            let next = self
                .auth_cache
                .authorize(
                    &self.transport,
                    endpoint,
                    repository,
                    &challenges,
                    credential,
                    &authorization,
                )
                .await
                .inspect_err(of_host)?;
            if authorization.is_exhausted_by(&next) {
                answer.unchallenged = challenges.is_empty() && !answer.with_credential;
                return Ok(answer);
            }
            answer.discard().await;
            authorization = next;
        }
    }

    async fn challenges_of_api(
        &self,
        request: &RegistryRequest<'_>,
        endpoint: &RegistryEndpoint,
    ) -> Result<Vec<auth_challenge::Challenge>, RegistryError> {
        let probe = HttpRequest {
            endpoint,
            method: Method::GET,
            url: endpoint.api(),
            headers: HeaderMap::new(),
            authorization: None,
            form: None,
            what: &request.what,
        };
        let answer = self.transport.send(probe).await?;
        if matches!(answer.status().as_u16(), 429 | 503) && !answer.redirected {
            return Err(answer.refusal(&request.what, request.is_anonymous_at(endpoint)));
        }
        let asks = answer.status() == StatusCode::UNAUTHORIZED && !answer.redirected;
        let challenges =
            if asks { auth_challenge::read(answer.response.headers()) } else { Vec::new() };
        answer.discard().await;
        Ok(challenges)
    }

    async fn send(
        &self,
        request: &RegistryRequest<'_>,
        endpoint: &RegistryEndpoint,
        url: &Url,
        authorization: &RequestAuthorization,
    ) -> Result<HttpResponse, RegistryError> {
        self.transport
            .send(HttpRequest {
                endpoint,
                method: request.method.clone(),
                url: url.clone(),
                headers: request.headers.clone(),
                authorization: authorization.header(),
                form: None,
                what: &request.what,
            })
            .await
    }
}
