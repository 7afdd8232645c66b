//! One small blob, whole in memory: a configuration, or a signature.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::error::PullError;
use super::rate::Rate;
use super::wire::WireOptions;
use crate::oci::credentials::Credential;
use crate::oci::registry::{BlobBody, Held, Registry, RegistryError};
use crate::oci::{Digest, Repository};

/// Bytes a second that a document has time for, beside the time that any has. It takes room in memory
/// that others wait for, until it is whole.
const LEAST: u64 = 64 << 10;
/// The time that any has: as long as a manifest.
const ANY: Duration = Duration::from_secs(30);

/// A blob that is what its digest says, and the room that it takes.
#[derive(Debug)]
pub struct Document {
    /// Its bytes.
    pub bytes: Bytes,
    _held: Option<Held>,
}

/// Fetches a blob whose size is within a limit. The mirrors that are of no use for it are passed by.
pub async fn fetch(
    registry: &Registry,
    options: &WireOptions,
    repository: &Repository,
    (digest, size): (Digest, u64),
    credential: &Credential,
) -> Result<Document, PullError> {
    let held = registry.hold(repository, size).await;
    let waited = ANY + Duration::from_secs(size / LEAST);
    let too_slow = |waited| {
        let what = format!("blob {digest} of {repository}");
        let host = repository.host().to_owned();
        PullError::Registry(RegistryError::Timeout { host, what, waited })
    };
    let read = async |mut body: BlobBody| {
        let mut rate = Rate::new(options.least_rate, options.rate_window);
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
        while let Some(chunk) = body.chunk().await? {
            if (bytes.len() + chunk.len()) as u64 > size {
                return Err(PullError::BlobSize { digest, expected: size, got: size + 1 });
            }
            bytes.extend_from_slice(&chunk);
            if rate.keeps(chunk.len() as u64).is_err() {
                return Err(too_slow(options.rate_window));
            }
        }
        if bytes.len() as u64 != size {
            return Err(PullError::BlobSize { digest, expected: size, got: bytes.len() as u64 });
        }
        let got = Digest::of(&bytes);
        if got != digest {
            return Err(PullError::BlobDigest { expected: digest, got });
        }
        Ok(Bytes::from(bytes))
    };
    let bytes = loop {
        let mut mirror: Option<Arc<str>> = None;
        let tried = async {
            let body = registry.blob(repository, digest, 0, credential).await?;
            mirror.clone_from(&body.mirror);
            read(body).await
        };
        let tried = tokio::time::timeout(waited, tried).await;
        match (tried.unwrap_or_else(|_| Err(too_slow(waited))), mirror) {
            (Ok(bytes), _) => break bytes,
            // Which ends with the registry itself: none is asked a second time.
            (Err(_), Some(mirror)) => registry.pass_by(repository, digest, &mirror),
            (Err(error), None) => return Err(error),
        }
    };
    Ok(Document { bytes, _held: held })
}
