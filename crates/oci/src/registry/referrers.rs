//! Referrers of a digest: one list, which may have several pages.

use bytes::Bytes;
use reqwest::header::{HeaderMap, LINK};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::RepositoryClient;
use super::document_memory::DocumentReservation;
use super::documents::Documents;
use super::error::RegistryError;
use super::exchange::Exchange;
use super::http_transport::HttpResponse;
use super::registry_request::{RegistryRequest, RequiredCapability};
use crate::Digest;

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
        let request = &RegistryRequest::referrers(self, subject);
        let hosts = self.registry.failover(request, RequiredCapability::Pull).await?;
        let fetched = hosts.try_each(|exchange| async move {
            let Documents { pages, held, .. } = exchange.documents(next_page).await?;
            // A mirror may not know all referrers of the content that it holds.
            if exchange.is_mirror && pages.iter().all(is_empty) {
                return Err(RegistryError::NotFound { what: request.what.clone() });
            }
            Ok(Some(Referrers { pages, _held: held }))
        });
        // A mirror without the API says nothing about the registry, which is tried next.
        match fetched.await {
            Err(RegistryError::NotFound { .. } | RegistryError::Protocol { .. }) => Ok(None),
            done => done,
        }
    }
}

/// Returns the query of the next page, if this host has the same list. Other parts of the URL are
/// ignored, since they could lead anywhere.
fn next_page(exchange: Exchange<'_>, answer: &HttpResponse) -> Option<String> {
    let Exchange { request, endpoint, .. } = exchange;
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
