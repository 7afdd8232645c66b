//! A blob while it arrives.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{CONTENT_RANGE, HeaderMap};
use reqwest::{Response, StatusCode};

use super::answered_by::AnsweredBy;
use super::error::RegistryError;
use super::transport::{self, Answer};

/// A blob while it arrives. Nothing about it is verified: the caller hashes it,
/// compares its size, and bounds what it takes.
#[derive(Debug)]
pub struct BlobBody {
    /// Where the body starts: the asked offset, or 0 when the registry ignored
    /// it and the caller has to start over.
    pub offset: u64,
    /// How many bytes are announced from `offset` on.
    pub length: Option<u64>,
    /// Whether it is a part, as asked for, and not the whole.
    pub is_part: bool,
    /// How many bytes the whole blob is said to have.
    pub total: Option<u64>,
    /// The mirror that sends it, unless the registry itself does.
    pub mirror: Option<Arc<str>>,
    /// Who sends it.
    pub answered_by: AnsweredBy,
    source: Source,
    host: String,
    what: String,
    stall_timeout: Duration,
}

#[derive(Debug)]
enum Source {
    Open(Response),
    Ended,
    Failed(RegistryError),
}

/// The part of a blob that is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlobPart {
    pub(super) start: u64,
    /// The position after the last byte; none where the part ends with the blob.
    pub(super) end: Option<u64>,
}

/// A successful answer to the request for a blob.
pub(super) struct BlobAnswer {
    pub(super) answer: Answer,
    pub(super) mirror: Option<Arc<str>>,
    pub(super) answered_by: AnsweredBy,
    /// The part that was asked for; none for the whole blob.
    pub(super) asked: Option<BlobPart>,
    /// Names the blob in errors.
    pub(super) what: String,
    pub(super) stall_timeout: Duration,
}

impl BlobAnswer {
    /// Returns the body of an answer of 200 or 206. A `Content-Encoding` says nothing: storage announces how
    /// an upload was encoded, and the digest decides what the bytes are.
    pub(super) fn body(self) -> Result<BlobBody, RegistryError> {
        let Self { answer, mirror, answered_by, asked, what, stall_timeout } = self;
        let is_part = answer.status() == StatusCode::PARTIAL_CONTENT;
        let (offset, length, total) = match answer.status() {
            StatusCode::OK => {
                let length = answer.response.content_length();
                (0, length, length)
            }
            status @ StatusCode::PARTIAL_CONTENT => {
                let Some(BlobPart { start, end }) = asked else {
                    return Err(answer.protocol(&what, format!("the status {}", status.as_u16())));
                };
                let range = content_range(answer.response.headers()).ok_or_else(|| {
                    answer.protocol(&what, "a part without a readable Content-Range")
                })?;
                // Less than asked for is allowed, and asked for again.
                let too_long = end.is_some_and(|end| range.length > end.saturating_sub(start));
                if range.start != start || too_long {
                    return Err(answer.protocol(&what, "another part than asked for"));
                }
                (start, Some(range.length), range.total)
            }
            status => {
                return Err(answer.protocol(&what, format!("the status {}", status.as_u16())));
            }
        };
        let Answer { response, host, .. } = answer;
        let source = Source::Open(response);
        Ok(BlobBody {
            offset,
            length,
            is_part,
            total,
            mirror,
            answered_by,
            source,
            host,
            what,
            stall_timeout,
        })
    }
}

impl BlobBody {
    /// The next bytes, or nothing at the end. Waits for the stall timeout at
    /// most. After an error, the same error comes again.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, RegistryError> {
        let response = match &mut self.source {
            Source::Open(response) => response,
            Source::Ended => return Ok(None),
            Source::Failed(error) => return Err(error.clone()),
        };
        let error = match tokio::time::timeout(self.stall_timeout, response.chunk()).await {
            Ok(Ok(Some(chunk))) => return Ok(Some(chunk)),
            Ok(Ok(None)) => {
                self.source = Source::Ended;
                return Ok(None);
            }
            Ok(Err(error)) => transport::failure(error, &self.host, &self.what),
            Err(_) => RegistryError::Timeout {
                host: self.host.clone(),
                what: self.what.clone(),
                waited: self.stall_timeout,
            },
        };
        // Closes the connection: nobody reads the rest.
        self.source = Source::Failed(error.clone());
        Err(error)
    }
}

struct Range {
    start: u64,
    length: u64,
    total: Option<u64>,
}

/// `bytes <first>-<last>/<total or *>`.
fn content_range(headers: &HeaderMap) -> Option<Range> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (start, last) = range.trim().split_once('-')?;
    let (start, last): (u64, u64) = (start.parse().ok()?, last.parse().ok()?);
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    if total.is_some_and(|total| total <= last) {
        return None;
    }
    Some(Range { start, length: last.checked_sub(start)?.checked_add(1)?, total })
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    #[test]
    fn content_range_is_read_strictly() {
        let of = |text: &'static str| {
            let headers = HeaderMap::from_iter([(CONTENT_RANGE, HeaderValue::from_static(text))]);
            content_range(&headers).map(|range| (range.start, range.length, range.total))
        };
        assert_eq!(of("bytes 5-9/10"), Some((5, 5, Some(10))));
        assert_eq!(of("bytes 5-9/*"), Some((5, 5, None)));
        for nonsense in [
            "",
            "bytes */10",
            "bytes 9-5/10",
            "bytes 5-10/10",
            "5-9/10",
            "bytes 0-18446744073709551615/*",
        ] {
            assert_eq!(of(nonsense), None, "{nonsense}");
        }
    }
}
