//! Documents that are read whole: a manifest, or the pages of a list.

use bytes::Bytes;
use reqwest::header::HeaderMap;

use super::document_memory::{DocumentReservation, SMALL};
use super::error::RegistryError;
use super::exchange::Exchange;
use super::exchange_timeout::ExchangeTimeout;
use super::http_transport::HttpResponse;
use super::registry_request::RegistryRequest;
use super::response_source::AnsweredBy;

/// Maximum number of pages. Registries usually list a hundred referrers a page.
const MAXIMUM_PAGES: usize = 32;

/// The documents of one exchange, together no larger than a manifest may be.
pub(super) struct Documents {
    /// Bodies, in order.
    pub(super) pages: Vec<Bytes>,
    /// Headers of the first response.
    pub(super) headers: HeaderMap,
    /// Source of the first response.
    pub(super) answered_by: AnsweredBy,
    /// Reservation of memory.
    pub(super) held: Option<DocumentReservation>,
}

/// Returns the query of the page after a response, if there is one.
type NextPage = fn(Exchange<'_>, &HttpResponse) -> Option<String>;

impl Exchange<'_> {
    /// Fetches a document and those that follow it, and reserves memory for them.
    pub(super) async fn documents(self, next_page: NextPage) -> Result<Documents, RegistryError> {
        let limit = self.registry.options.manifest_bytes_limit;
        let mut timeout = self.timeout();
        let (mut held, mut most) = (None, SMALL.min(limit));
        loop {
            let fetched = self.fetch_all(next_page, &mut timeout, held, most).await?;
            if let Some(documents) = fetched {
                return Ok(documents);
            }
            // The documents are larger than the small pool allows. A task must not wait for a
            // reservation while it holds one, so that one was dropped with what was read, and the
            // request is sent again.
            let repository = self.request.repository;
            (held, most) = (self.registry.reserve_memory(repository, limit).await, limit);
        }
    }

    /// Fetches all documents within `left` bytes. `None` if they need more, and a larger reservation
    /// is possible.
    async fn fetch_all(
        self,
        next_page: NextPage,
        timeout: &mut ExchangeTimeout<'_>,
        mut held: Option<DocumentReservation>,
        mut left: u64,
    ) -> Result<Option<Documents>, RegistryError> {
        let Self { registry, request, .. } = self;
        let limit = registry.options.manifest_bytes_limit;
        let mut answer = timeout.run(self.expect_success()).await?;
        let mut next = next_page(self, &answer);
        let (headers, answered_by) = (answer.response.headers().clone(), self.answered_by(&answer));
        if held.is_none() {
            // `Content-Length` is the encoded length, not the decoded one.
            let is_whole = next.is_none() && !answer.is_encoded();
            let announced = answer.response.content_length().filter(|_| is_whole);
            left = if announced.is_some() { limit } else { left };
            let bytes = announced.unwrap_or(left).min(limit);
            held = registry.reserve_memory(request.repository, bytes).await;
        }
        let may_have_more = left < limit;
        let mut pages = Vec::new();
        loop {
            match timeout.run(answer.document(&request.what, left)).await {
                Ok(page) => {
                    left -= page.len() as u64;
                    pages.push(page);
                }
                Err(RegistryError::TooLarge { .. }) if may_have_more => return Ok(None),
                // A truncated list is better than none.
                Err(RegistryError::TooLarge { .. }) if !pages.is_empty() => break,
                Err(error) => return Err(error),
            }
            let Some(query) = next.filter(|_| pages.len() < MAXIMUM_PAGES) else { break };
            let page = RegistryRequest { query: Some(query), ..request.clone() };
            let exchange = Exchange { request: &page, ..self };
            answer = timeout.run(exchange.expect_success()).await?;
            next = next_page(exchange, &answer);
        }
        Ok(Some(Documents { pages, headers, answered_by, held }))
    }
}
