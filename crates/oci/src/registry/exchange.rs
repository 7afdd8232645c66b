//! One exchange: a request at one host of a registry.

use reqwest::{Method, Url};

use super::Registry;
use super::error::RegistryError;
use super::exchange_timeout::ExchangeTimeout;
use super::http_transport::{HttpRequest, HttpResponse};
use super::registry_backoff::RequestKey;
use super::registry_endpoint::RegistryEndpoint;
use super::registry_request::RegistryRequest;
use super::response_source::AnsweredBy;
use crate::credentials::Credential;

/// A request at one host of its registry.
#[derive(Clone, Copy)]
pub(super) struct Exchange<'a> {
    pub(super) registry: &'a Registry,
    pub(super) request: &'a RegistryRequest<'a>,
    pub(super) endpoint: &'a RegistryEndpoint,
    /// True if the host is tried as a mirror of the registry.
    pub(super) is_mirror: bool,
}

impl<'a> Exchange<'a> {
    /// Returns another request at the same host.
    pub(super) fn with(self, request: &'a RegistryRequest<'a>) -> Self {
        Self { request, ..self }
    }

    /// Returns the credential that the host may get.
    pub(super) fn credential(self) -> &'a Credential {
        if self.endpoint.takes_credentials {
            self.request.credential
        } else {
            &Credential::Anonymous
        }
    }

    /// Returns the key of the request for the backoff of the host.
    pub(super) fn key(self) -> RequestKey {
        let RegistryRequest { repository, what, .. } = self.request;
        let host = self.endpoint.name();
        self.registry.backoff.request_key(&host, repository, self.credential(), what)
    }

    /// Returns the timeout for the exchange.
    pub(super) fn timeout(self) -> ExchangeTimeout<'a> {
        let timeout = self.registry.options.manifest_timeout;
        ExchangeTimeout::new(self.endpoint.name(), &self.request.what, timeout)
    }

    /// Performs the exchange when the backoff of the host allows it, and records the outcome.
    pub(super) async fn with_backoff<T>(
        self,
        exchange: impl Future<Output = Result<T, RegistryError>>,
    ) -> Result<T, RegistryError> {
        self.endpoint.check(&self.registry.transport.rules)?;
        let key = self.key();
        self.registry.backoff.wait(&key).await?;
        let outcome = exchange.await;
        self.registry.backoff.record_outcome(&key, &outcome);
        outcome
    }

    /// Returns an HTTP request to the host, without headers.
    pub(super) fn http_request(self, method: Method, url: Url) -> HttpRequest<'a> {
        HttpRequest { method, ..HttpRequest::get(self.endpoint, url, &self.request.what) }
    }

    /// Returns the source of a response.
    pub(super) fn answered_by(self, answer: &HttpResponse) -> AnsweredBy {
        AnsweredBy::of(self.endpoint, answer)
    }

    /// Returns the error for a response without success.
    pub(super) fn refusal(self, answer: &HttpResponse) -> RegistryError {
        answer.refusal(&self.request.what, self.credential().is_anonymous())
    }

    /// Sends the request. Returns an error for a response without success.
    pub(super) async fn expect_success(self) -> Result<HttpResponse, RegistryError> {
        let answer = self.send().await?;
        if answer.status().is_success() { Ok(answer) } else { Err(self.refusal(&answer)) }
    }
}
