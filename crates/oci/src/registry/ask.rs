//! Authentication's three steps: ask, be asked back, show a proof.

use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode, Url};

use super::Registry;
use super::challenge;
use super::endpoint::Endpoint;
use super::error::RegistryError;
use super::question::Question;
use super::session::Proof;
use super::transport::{Answer, Request};

/// First without or with what is known, then with the challenge's answer, then
/// once more when that was a stale token.
const MAXIMUM_ATTEMPTS: usize = 3;

impl Registry {
    pub(super) async fn expect_success(
        &self,
        question: &Question<'_>,
        endpoint: &Endpoint,
    ) -> Result<Answer, RegistryError> {
        let answer = self.ask(question, endpoint).await?;
        match answer.refusal_or_success(question, endpoint) {
            Some(refusal) => Err(refusal),
            None => Ok(answer),
        }
    }

    /// Asks, and answers what the registry asks back. Any status may come out.
    pub(super) async fn ask(
        &self,
        question: &Question<'_>,
        endpoint: &Endpoint,
    ) -> Result<Answer, RegistryError> {
        let repository = question.repository;
        let credential = question.credential_for(endpoint);
        let url = question.address(endpoint);
        // The token endpoint and the API root limit the rate of the whole host.
        let asker = self.asker(question, endpoint);
        let of_host = |error: &RegistryError| self.manners.record_host_failure(&asker, error);
        let eager = self.session.eager(&self.transport, endpoint, repository, credential).await;
        let mut proof = eager.inspect_err(of_host)?;
        let mut attempt = 1;
        loop {
            let mut answer = self.send(question, endpoint, &url, &proof).await?;
            answer.with_credential = !credential.is_anonymous() && !matches!(proof, Proof::Nothing);
            let status = answer.status();
            let refused = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
            // What another host refuses is its own affair.
            if answer.redirected || !(refused || status == StatusCode::NOT_FOUND) {
                return Ok(answer);
            }
            let mut challenges = challenge::read(answer.response.headers());
            if refused {
                self.session.forget(&proof).await;
            } else if !matches!(proof, Proof::Nothing) {
                return Ok(answer);
            }
            if matches!(proof, Proof::Nothing) {
                // A registry that allows anonymous requests may answer them with 404 for a private repository.
                let is_hidden = status != StatusCode::UNAUTHORIZED;
                if is_hidden && credential.is_anonymous() {
                    return Ok(answer);
                }
                // The API itself says how to ask.
                if is_hidden || challenges.is_empty() {
                    challenges =
                        self.challenges_of_api(question, endpoint).await.inspect_err(of_host)?;
                }
            }
            if attempt == MAXIMUM_ATTEMPTS {
                return Ok(answer);
            }
            attempt += 1;
            // A refusal without a challenge still makes a stale token worth renewing.
            self.session.learn(endpoint, repository, &challenges);
            let challenges = self.session.known(endpoint, repository);
            let next = self
                .session
                .answer(&self.transport, endpoint, repository, &challenges, credential, &proof)
                .await
                .inspect_err(of_host)?;
            if proof.is_no_better(&next) {
                return Ok(answer);
            }
            answer.discard().await;
            proof = next;
        }
    }

    async fn challenges_of_api(
        &self,
        question: &Question<'_>,
        endpoint: &Endpoint,
    ) -> Result<Vec<challenge::Challenge>, RegistryError> {
        let request = Request {
            endpoint,
            method: Method::GET,
            url: endpoint.api(),
            headers: HeaderMap::new(),
            authorization: None,
            form: None,
            what: &question.what,
        };
        let answer = self.transport.send(request).await?;
        if matches!(answer.status().as_u16(), 429 | 503) && !answer.redirected {
            return Err(answer.refusal(&question.what, question.is_anonymous_at(endpoint)));
        }
        let asks = answer.status() == StatusCode::UNAUTHORIZED && !answer.redirected;
        let challenges = if asks { challenge::read(answer.response.headers()) } else { Vec::new() };
        answer.discard().await;
        Ok(challenges)
    }

    async fn send(
        &self,
        question: &Question<'_>,
        endpoint: &Endpoint,
        url: &Url,
        proof: &Proof,
    ) -> Result<Answer, RegistryError> {
        self.transport
            .send(Request {
                endpoint,
                method: question.method.clone(),
                url: url.clone(),
                headers: question.headers.clone(),
                authorization: proof.header(),
                form: None,
                what: &question.what,
            })
            .await
    }
}
