//! Responses to blob requests, and their bodies.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{CONTENT_RANGE, HeaderMap};
use reqwest::{Response, StatusCode};

use super::error::RegistryError;
use super::exchange::Exchange;
use super::http_transport::{self, HttpResponse};
use super::response_source::AnsweredBy;

/// The body of a blob while it is received. Nothing of it is verified: the caller computes the
/// digest, compares the size and bounds the number of bytes.
#[derive(Debug)]
pub struct BlobBody {
    /// Offset of the body in the blob: the requested one, or 0 if the registry ignored the range
    /// and the caller has to start over.
    pub offset: u64,
    /// Announced number of bytes from `offset` on.
    pub length: Option<u64>,
    /// True if the body is the requested part, false if it is the whole blob.
    pub is_part: bool,
    /// Announced size of the whole blob.
    pub total: Option<u64>,
    /// Value of `Content-Encoding` that changes bytes, if it is true.
    pub encoding: Option<String>,
    /// Mirror that sends the body; `None` for the registry itself.
    pub mirror: Option<Arc<str>>,
    /// Source of the body.
    pub answered_by: AnsweredBy,
    source: BodyState,
    host: String,
    what: String,
    stall_timeout: Duration,
}

#[derive(Debug)]
enum BodyState {
    Open(Response),
    Ended,
    Failed(RegistryError),
}

/// The requested part of a blob.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlobPart {
    pub(super) start: u64,
    /// Position after the last byte; `None` for the end of the blob.
    pub(super) end: Option<u64>,
}

impl BlobBody {
    /// Opens the body of a response with 200 or 206 to a request for a part or, without `asked`, for
    /// the whole blob. A `Content-Encoding` is ignored: storage announces the encoding of an
    /// upload, and the digest verifies the bytes.
    pub(super) fn open(
        exchange: Exchange<'_>,
        answer: HttpResponse,
        asked: Option<BlobPart>,
    ) -> Result<Self, RegistryError> {
        let Exchange { registry, request, endpoint, is_mirror } = exchange;
        let what = request.what.clone();
        let status = answer.status();
        let is_part = status == StatusCode::PARTIAL_CONTENT;
        let (offset, length, total) = match asked {
            _ if status == StatusCode::OK => {
                let length = answer.response.content_length();
                (0, length, length)
            }
            Some(BlobPart { start, end }) if is_part => {
                let range = content_range(answer.response.headers()).ok_or_else(|| {
                    answer.protocol(&what, "a part without a readable Content-Range")
                })?;
                // A shorter part is allowed. The caller requests the rest.
                let too_long = end.is_some_and(|end| range.length > end.saturating_sub(start));
                if range.start != start || too_long {
                    return Err(answer.protocol(&what, "another part than asked for"));
                }
                (start, Some(range.length), range.total)
            }
            _ => return Err(answer.protocol(&what, format!("the status {}", status.as_u16()))),
        };
        Ok(Self {
            offset,
            length,
            is_part,
            total,
            encoding: answer.encoding(),
            mirror: is_mirror.then(|| endpoint.name()),
            answered_by: exchange.answered_by(&answer),
            source: BodyState::Open(answer.response),
            host: answer.host,
            what,
            stall_timeout: registry.options.stall_timeout,
        })
    }

    /// Returns the next bytes, or `None` at the end. Waits for at most the stall timeout. After an
    /// error, returns the same error again.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, RegistryError> {
        let response = match &mut self.source {
            BodyState::Open(response) => response,
            BodyState::Ended => return Ok(None),
            BodyState::Failed(error) => return Err(error.clone()),
        };
        let error = match tokio::time::timeout(self.stall_timeout, response.chunk()).await {
            Ok(Ok(Some(chunk))) => return Ok(Some(chunk)),
            Ok(Ok(None)) => {
                self.source = BodyState::Ended;
                return Ok(None);
            }
            Ok(Err(error)) => http_transport::failure(error, &self.host, &self.what),
            Err(_) => RegistryError::Timeout {
                host: self.host.clone(),
                what: self.what.clone(),
                waited: self.stall_timeout,
            },
        };
        // Drops the response, which closes the connection.
        self.source = BodyState::Failed(error.clone());
        Err(error)
    }
}

struct ContentRange {
    start: u64,
    length: u64,
    total: Option<u64>,
}

/// Parses `bytes <first>-<last>/<total or *>`.
fn content_range(headers: &HeaderMap) -> Option<ContentRange> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (start, last) = range.trim().split_once('-')?;
    let (start, last): (u64, u64) = (start.parse().ok()?, last.parse().ok()?);
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    if total.is_some_and(|total| total <= last) {
        return None;
    }
    Some(ContentRange { start, length: last.checked_sub(start)?.checked_add(1)?, total })
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
