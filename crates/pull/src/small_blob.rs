//! One small blob, whole in memory: a configuration, or a signature.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::SizedBlob;
use super::connection_rate::Rate;
use super::error::PullError;
use super::pull_options::PullOptions;
use oci::Digest;
use oci::registry::{AnsweredBy, BlobBody, DocumentReservation, RegistryError, RepositoryClient};

/// Bytes a second that a document has time for, beside the time that any has. It takes room in memory
/// that others wait for, until it is whole.
const LEAST: u64 = 64 << 10;
/// The time that any has: as long as a manifest.
const ANY: Duration = Duration::from_secs(30);

/// A blob that is what its digest says, and the room that it takes.
#[derive(Debug)]
pub(super) struct Document {
    /// The bytes of the document.
    pub(super) bytes: Bytes,
    /// The source that sent them.
    pub(super) answered_by: AnsweredBy,
    _held: Option<DocumentReservation>,
}

/// Fetches a blob whose size is within a limit. The mirrors that are of no use for it are passed by.
pub(super) async fn fetch(
    client: RepositoryClient<'_>,
    options: &PullOptions,
    blob: SizedBlob,
) -> Result<Document, PullError> {
    let SizedBlob { digest, size } = blob;
    let RepositoryClient { registry, repository, .. } = client;
    let held = registry.reserve_memory(repository, size).await;
    let waited = ANY + Duration::from_secs(size / LEAST);
    let too_slow = |waited| {
        let what = format!("blob {digest} of {repository}");
        let host = repository.host().to_owned();
        PullError::Registry(RegistryError::Timeout { host, what, waited })
    };
    let read = async |mut body: BlobBody| {
        let mut rate = Rate::new(options.least_bytes_per_second, options.stall_timeout);
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
        let encoding = body.encoding.take();
        while let Some(chunk) = body.chunk().await? {
            if (bytes.len() + chunk.len()) as u64 > size {
                let got = size + 1;
                return Err(PullError::BlobSize { digest, expected: size, got, encoding });
            }
            bytes.extend_from_slice(&chunk);
            if rate.keeps(chunk.len() as u64).is_err() {
                return Err(too_slow(options.stall_timeout));
            }
        }
        if bytes.len() as u64 != size {
            let got = bytes.len() as u64;
            return Err(PullError::BlobSize { digest, expected: size, got, encoding });
        }
        let got = Digest::of(&bytes);
        if got != digest {
            return Err(PullError::BlobDigest { expected: digest, got });
        }
        Ok(Bytes::from(bytes))
    };
    // Marks wear off while the next host is tried; here none is asked a second time.
    let mut useless: Vec<Arc<str>> = Vec::new();
    let (bytes, answered_by) = loop {
        let mut mirror: Option<Arc<str>> = None;
        let tried = async {
            let body = client.blob_without(&useless, digest).await?;
            mirror.clone_from(&body.mirror);
            let answered_by = body.answered_by.clone();
            Ok((read(body).await?, answered_by))
        };
        let tried = tokio::time::timeout(waited, tried).await;
        match (tried.unwrap_or_else(|_| Err(too_slow(waited))), mirror) {
            (Ok(read), _) => break read,
            // Which ends with the registry itself.
            (Err(_), Some(mirror)) => {
                registry.record_mirror_failure(repository, digest, &mirror);
                useless.push(mirror);
            }
            (Err(error), None) => return Err(error),
        }
    };
    Ok(Document { bytes, answered_by, _held: held })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::body::Body;
    use futures_util::{StreamExt as _, stream};

    use super::*;
    use oci::Reference;
    use oci::credentials::Credential;
    use oci::registry::{Registry, RegistryOptions};

    /// Sends a byte, and no more for a minute: until then the mark of another mirror has worn off.
    async fn trickling_mirror(asked: Arc<AtomicUsize>) -> String {
        let router = axum::Router::new().fallback(move || {
            assert!(asked.fetch_add(1, Ordering::Relaxed) < 9, "it is asked for ever");
            let first = Ok::<_, std::convert::Infallible>(Bytes::from_static(b"x"));
            let silence = async {
                // The same thread reads the first byte meanwhile.
                tokio::time::sleep(Duration::from_millis(100)).await;
                tokio::time::pause();
                tokio::time::advance(Duration::from_secs(61)).await;
                tokio::time::resume();
                std::future::pending().await
            };
            let body = stream::iter([first]).chain(stream::once(silence));
            async { Body::from_stream(body) }
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move { axum::serve(listener, router).await });
        format!("[host.\"http://{address}\"]\n")
    }

    #[tokio::test]
    async fn no_mirror_is_asked_twice_for_a_document() {
        let asked = [Arc::default(), Arc::default()];
        let mut mirrors = String::new();
        for asked in &asked {
            mirrors += &trickling_mirror(Arc::clone(asked)).await;
        }
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(folder.path().join("_default")).expect("a folder");
        std::fs::write(folder.path().join("_default/hosts.toml"), mirrors).expect("hosts.toml");
        let hosts_dirs = vec![folder.path().to_owned()];
        let registry = Registry::new(RegistryOptions { hosts_dirs, ..Default::default() });
        let (registry, options) = (registry.expect("a client"), PullOptions::default());
        // No process listens there.
        let reference: Reference = "127.0.0.1:1/a/b".parse().expect("a reference");
        let repository = reference.repository();
        let blob = SizedBlob { digest: Digest::of(b"xy"), size: 2 };
        let anonymous = Credential::Anonymous;
        let fetched = fetch(registry.at(repository, &anonymous), &options, blob).await;
        let error = fetched.expect_err("nobody has it");
        assert!(matches!(error, PullError::Registry(RegistryError::Unreachable { .. })), "{error}");
        assert_eq!(asked.map(|asked| asked.load(Ordering::Relaxed)), [1, 1]);
    }
}
