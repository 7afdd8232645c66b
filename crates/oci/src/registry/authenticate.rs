//! Requests with authentication: send, receive a challenge, send again with an authorization.

use reqwest::{Method, StatusCode, Url};

use super::auth_cache::RequestAuthorization;
use super::auth_challenge::{self, Challenge};
use super::error::RegistryError;
use super::exchange::Exchange;
use super::http_transport::{HttpRequest, HttpResponse};

/// First without authorization or with a cached one, then with that of the challenge, then once
/// more if that was a stale token.
const MAXIMUM_ATTEMPTS: usize = 3;

impl Exchange<'_> {
    /// Sends a request and answers challenges. Returns the response whatever its status.
    pub(super) async fn send(self) -> Result<HttpResponse, RegistryError> {
        let is_anonymous = self.credential().is_anonymous();
        let cache = &self.registry.auth_cache;
        let url = self.request.address(self.endpoint);
        // The token endpoint and the API root limit the rate of the whole host.
        let key = self.key();
        let of_host = |error: &RegistryError| {
            self.registry.backoff.record_host_failure(&key, error);
        };
        let mut challenges = cache.challenges(self);
        let initial = cache.authorize(self, &challenges, &RequestAuthorization::Nothing).await;
        let mut authorization = initial.inspect_err(of_host)?;
        let mut attempt = 1;
        loop {
            let mut answer = self.send_once(&url, &authorization).await?;
            let has_none = matches!(authorization, RequestAuthorization::Nothing);
            answer.with_credential = !is_anonymous && !has_none;
            let status = answer.status();
            let refused = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
            // A refusal of a redirect's host has no challenge of the registry.
            if answer.redirected || !(refused || status == StatusCode::NOT_FOUND) {
                return Ok(answer);
            }
            let mut sent = auth_challenge::read(answer.response.headers());
            if refused {
                cache.forget(&authorization).await;
            } else if !has_none {
                return Ok(answer);
            }
            if has_none {
                // A registry that allows anonymous requests may answer them with 404 for a private
                // repository.
                let is_hidden = status != StatusCode::UNAUTHORIZED;
                if is_hidden && is_anonymous {
                    return Ok(answer);
                }
                // The API root returns a challenge.
                if is_hidden || sent.is_empty() {
                    sent = self.challenges_of_api().await.inspect_err(of_host)?;
                }
            }
            if attempt == MAXIMUM_ATTEMPTS {
                return Ok(answer);
            }
            attempt += 1;
            // A refusal without a challenge may mean a stale token, which is worth renewing.
            cache.cache_challenges(self, &sent);
            challenges = cache.challenges(self);
            let next = cache.authorize(self, &challenges, &authorization).await;
            let next = next.inspect_err(of_host)?;
            if authorization.is_exhausted_by(&next) {
                answer.unchallenged = challenges.is_empty() && !answer.with_credential;
                return Ok(answer);
            }
            answer.discard().await;
            authorization = next;
        }
    }

    async fn challenges_of_api(self) -> Result<Vec<Challenge>, RegistryError> {
        let probe = self.http_request(Method::GET, self.endpoint.api());
        let answer = self.registry.transport.send(probe).await?;
        if matches!(answer.status().as_u16(), 429 | 503) && !answer.redirected {
            return Err(self.refusal(&answer));
        }
        let asks = answer.status() == StatusCode::UNAUTHORIZED && !answer.redirected;
        let challenges =
            if asks { auth_challenge::read(answer.response.headers()) } else { Vec::new() };
        answer.discard().await;
        Ok(challenges)
    }

    async fn send_once(
        self,
        url: &Url,
        authorization: &RequestAuthorization,
    ) -> Result<HttpResponse, RegistryError> {
        let request = HttpRequest {
            headers: self.request.headers.clone(),
            authorization: authorization.header(),
            ..self.http_request(self.request.method.clone(), url.clone())
        };
        self.registry.transport.send(request).await
    }
}
