//! What refers to a digest: one list, which may come in pages.

use bytes::Bytes;
use reqwest::header::{HeaderMap, LINK};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Registry;
use super::documents::{Held, SMALL};
use super::endpoint::Endpoint;
use super::error::RegistryError;
use super::question::{Needs, Question};
use super::time::ExchangeTime;
use super::transport::Answer;
use crate::credentials::Credential;
use crate::{Digest, Repository};

/// Pages that are read; a hundred referrers a page are usual.
const MAXIMUM_PAGES: usize = 32;

/// What refers to a digest, as the registry sent it: indexes, all of them together no larger than
/// a manifest may be.
#[derive(Debug)]
pub struct Referrers {
    /// One after the other.
    pub pages: Vec<Bytes>,
    /// Who holds it asks for nothing else.
    _held: Option<Held>,
}

impl Registry {
    /// What refers to a digest; none where the registry does not know the question, so that its
    /// fallback tag has to be asked for.
    ///
    /// The kind of artifact is not asked for: registries that forget it would leave out what is
    /// looked for.
    pub async fn referrers(
        &self,
        repository: &Repository,
        subject: Digest,
        credential: &Credential,
    ) -> Result<Option<Referrers>, RegistryError> {
        let question = &Question::referrers(repository, subject, credential);
        let mut turns = self.turns(question, Needs::Pull).await?;
        loop {
            let (endpoint, is_mirror) = (turns.current(), turns.mirror().is_some());
            let tried = Box::pin(async {
                let found = self.fetch_referrers(question, endpoint).await?;
                // A mirror does not know of all that refers to what it holds; the registry does.
                if is_mirror && found.pages.iter().all(is_empty) {
                    return Err(RegistryError::NotFound { what: question.what.clone() });
                }
                Ok(Some(found))
            });
            // A mirror that does not know referrers says nothing of the registry, which is asked next.
            match turns.judge(self.with_manners(question, endpoint, tried).await) {
                Some(Err(RegistryError::NotFound { .. } | RegistryError::Protocol { .. })) => {
                    return Ok(None);
                }
                Some(done) => return done,
                None => {}
            }
        }
    }

    async fn fetch_referrers(
        &self,
        question: &Question<'_>,
        endpoint: &Endpoint,
    ) -> Result<Referrers, RegistryError> {
        let limit = self.options.manifest_bytes_limit;
        let mut time = self.time(question, endpoint);
        let (mut held, mut most) = (None, SMALL.min(limit));
        loop {
            let fetched = self.pages(question, endpoint, &mut time, &mut held, most).await?;
            if let Some(pages) = fetched {
                return Ok(Referrers { pages, _held: held });
            }
            // Larger than most are. Who waits for more room gives back what he has, and asks again
            // when he has it.
            drop(held.take());
            (held, most) = (self.hold(question.repository, limit).await, limit);
        }
    }

    /// All pages that come within so many bytes; none where they need more than these, and may have it.
    async fn pages(
        &self,
        question: &Question<'_>,
        endpoint: &Endpoint,
        time: &mut ExchangeTime<'_>,
        held: &mut Option<Held>,
        mut left: u64,
    ) -> Result<Option<Vec<Bytes>>, RegistryError> {
        let limit = self.options.manifest_bytes_limit;
        let mut answer = time.of(self.expect_success(question, endpoint)).await?;
        let mut next = next_page(&answer, question, endpoint);
        if held.is_none() {
            let is_whole = next.is_none() && !answer.is_encoded();
            let announced = answer.response.content_length().filter(|_| is_whole);
            left = if announced.is_some() { limit } else { left };
            *held = self.hold(question.repository, announced.unwrap_or(left).min(limit)).await;
        }
        let may_have_more = left < limit;
        let mut pages = Vec::new();
        loop {
            match time.of(answer.document(&question.what, left)).await {
                Ok(page) => {
                    left -= page.len() as u64;
                    pages.push(page);
                }
                Err(RegistryError::TooLarge { .. }) if may_have_more => return Ok(None),
                // What was read is worth more than nothing.
                Err(RegistryError::TooLarge { .. }) if !pages.is_empty() => break,
                Err(error) => return Err(error),
            }
            let Some(query) = next.filter(|_| pages.len() < MAXIMUM_PAGES) else { break };
            let page = Question {
                headers: question.headers.clone(),
                method: question.method.clone(),
                object: question.object.clone(),
                what: question.what.clone(),
                query: Some(query),
                ..*question
            };
            answer = time.of(self.expect_success(&page, endpoint)).await?;
            next = next_page(&answer, &page, endpoint);
        }
        Ok(Some(pages))
    }
}

/// The query of the page that follows, if this host has the same list of it. Nothing else of the
/// address is taken over: it could lead anywhere.
fn next_page(answer: &Answer, question: &Question<'_>, endpoint: &Endpoint) -> Option<String> {
    let next = answer.response.url().join(next_link(answer.response.headers())?).ok()?;
    let is_ours = !answer.redirected
        && next.origin() == endpoint.root.origin()
        && next.path().ends_with(&question.object);
    let query = next.query().filter(|_| is_ours)?;
    (question.query.as_deref() != Some(query)).then(|| query.to_owned())
}

/// The target of `Link: <target>; rel="next"` (RFC 8288).
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

/// Whether a page lists nothing, or is none.
fn is_empty(page: &Bytes) -> bool {
    #[derive(Deserialize)]
    struct List {
        #[serde(default)]
        manifests: Vec<IgnoredAny>,
    }
    serde_json::from_slice::<List>(page).map_or(true, |list| list.manifests.is_empty())
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
