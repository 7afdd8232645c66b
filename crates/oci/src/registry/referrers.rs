//! Referrers of a digest: one list, which may have several pages.

use bytes::Bytes;
use reqwest::header::{HeaderMap, LINK};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::document_memory::{DocumentReservation, SMALL};
use super::error::RegistryError;
use super::exchange_timeout::ExchangeTimeout;
use super::http_transport::HttpResponse;
use super::registry_endpoint::RegistryEndpoint;
use super::registry_request::{RegistryRequest, RequiredCapability};
use super::{Registry, RepositoryClient};
use crate::Digest;

/// Maximum number of pages. Registries usually list a hundred referrers a page.
const MAXIMUM_PAGES: usize = 32;

/// Referrers of a digest as the registry sent them: indexes, together no larger than a manifest may
/// be.
#[derive(Debug)]
pub struct Referrers {
    /// Bodies of the pages, in order.
    pub pages: Vec<Bytes>,
    /// Reservation of memory. A task that holds one must not wait for another.
    _held: Option<DocumentReservation>,
}

impl RepositoryClient<'_> {
    /// Returns the referrers of a digest. `None` if the registry does not support the API, so that
    /// the caller has to read the fallback tag.
    ///
    /// The request has no filter by artifact type: registries that do not record it would leave out
    /// the matching referrers.
    pub async fn referrers(self, subject: Digest) -> Result<Option<Referrers>, RegistryError> {
        let registry = self.registry;
        let request = &RegistryRequest::referrers(self, subject);
        let mut failover = registry.failover(request, RequiredCapability::Pull).await?;
        loop {
            let (endpoint, is_mirror) = (failover.current(), failover.mirror().is_some());
            let tried = Box::pin(async {
                let found = registry.fetch_referrers(request, endpoint).await?;
                // A mirror may not know all referrers of the content that it holds.
                if is_mirror && found.pages.iter().all(is_empty) {
                    return Err(RegistryError::NotFound { what: request.what.clone() });
                }
                Ok(Some(found))
            });
            // A mirror without the API says nothing about the registry, which is tried next.
            match failover.evaluate(registry.with_backoff(request, endpoint, tried).await) {
                Some(Err(RegistryError::NotFound { .. } | RegistryError::Protocol { .. })) => {
                    return Ok(None);
                }
                Some(done) => return done,
                None => {}
            }
        }
    }
}

impl Registry {
    async fn fetch_referrers(
        &self,
        request: &RegistryRequest<'_>,
        endpoint: &RegistryEndpoint,
    ) -> Result<Referrers, RegistryError> {
        let limit = self.options.manifest_bytes_limit;
        let mut timeout = self.timeout(request, endpoint);
        let (mut held, mut most) = (None, SMALL.min(limit));
        loop {
            let fetched = self.pages(request, endpoint, &mut timeout, &mut held, most).await?;
            if let Some(pages) = fetched {
                return Ok(Referrers { pages, _held: held });
            }
            // The list is larger than the small pool allows. A task must not wait for a reservation
            // while it holds one, so this drops it and sends the request again.
            drop(held.take());
            (held, most) = (self.reserve_memory(request.repository, limit).await, limit);
        }
    }

    /// Fetches all pages within `left` bytes. `None` if they need more, and a larger reservation is
    /// possible.
    async fn pages(
        &self,
        request: &RegistryRequest<'_>,
        endpoint: &RegistryEndpoint,
        timeout: &mut ExchangeTimeout<'_>,
        held: &mut Option<DocumentReservation>,
        mut left: u64,
    ) -> Result<Option<Vec<Bytes>>, RegistryError> {
        let limit = self.options.manifest_bytes_limit;
        let mut answer = timeout.run(self.expect_success(request, endpoint)).await?;
        let mut next = next_page(&answer, request, endpoint);
        if held.is_none() {
            let is_whole = next.is_none() && !answer.is_encoded();
            let announced = answer.response.content_length().filter(|_| is_whole);
            left = if announced.is_some() { limit } else { left };
            *held =
                self.reserve_memory(request.repository, announced.unwrap_or(left).min(limit)).await;
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
            let page = RegistryRequest {
                headers: request.headers.clone(),
                method: request.method.clone(),
                object: request.object.clone(),
                what: request.what.clone(),
                query: Some(query),
                ..*request
            };
            answer = timeout.run(self.expect_success(&page, endpoint)).await?;
            next = next_page(&answer, &page, endpoint);
        }
        Ok(Some(pages))
    }
}

/// Returns the query of the next page, if this host has the same list. Other parts of the URL are
/// ignored, since they could lead anywhere.
fn next_page(
    answer: &HttpResponse,
    request: &RegistryRequest<'_>,
    endpoint: &RegistryEndpoint,
) -> Option<String> {
    let next = answer.response.url().join(next_link(answer.response.headers())?).ok()?;
    let is_ours = !answer.redirected
        && next.origin() == endpoint.root.origin()
        && next.path().ends_with(&request.object);
    let query = next.query().filter(|_| is_ours)?;
    (request.query.as_deref() != Some(query)).then(|| query.to_owned())
}

/// Returns the target of `Link: <target>; rel="next"` (RFC 8288).
fn next_link(headers: &HeaderMap) -> Option<&str> {
    for value in headers.get_all(LINK) {
        let mut rest = value.to_str().ok()?;
        while let Some((target, behind)) =
            rest.split_once('<').and_then(|(_, behind)| behind.split_once('>'))
        {
            let parameters = behind.split_once('<').map_or(behind, |(parameters, _)| parameters);
            let is_next = parameters.split([';', ',']).any(|parameter| {
                let relation = parameter.trim().strip_prefix("rel=").unwrap_or_default();
                relation.trim_matches('"').split(' ').any(|word| word.eq_ignore_ascii_case("next"))
            });
            if is_next {
                return Some(target);
            }
            rest = behind;
        }
    }
    None
}

/// Returns whether a page is empty or unreadable.
fn is_empty(page: &Bytes) -> bool {
    #[derive(Deserialize)]
    struct ReferrersPage {
        #[serde(default)]
        manifests: Vec<IgnoredAny>,
    }
    serde_json::from_slice::<ReferrersPage>(page).map_or(true, |list| list.manifests.is_empty())
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    #[test]
    fn the_link_to_the_next_page_is_found_among_others() {
        let of = |text: &'static str| {
            let headers = HeaderMap::from_iter([(LINK, HeaderValue::from_static(text))]);
            next_link(&headers).map(str::to_owned)
        };
        let next = Some("/v2/a/referrers/sha256:0?n=1,2".to_owned());
        assert_eq!(of("</v2/a/referrers/sha256:0?n=1,2>; rel=\"next\""), next);
        assert_eq!(of("<x>; rel=prev, </v2/a/referrers/sha256:0?n=1,2>; a=b; rel=next"), next);
        for other in ["", "<x>", "<x>; rel=\"last\"", "x; rel=next", "<x; rel=next"] {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
