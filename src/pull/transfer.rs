//! One blob from a registry to `partial/`, verified.
//!
//! An async task moves bytes from the network into a bounded channel; a
//! blocking thread writes and hashes them, and owns the download: a task that
//! is dropped leaves no second writer behind.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedMutexGuard, mpsc, oneshot};

use super::error::PullError;
use super::progress::Progress;
use super::sponsors::{Source, Sponsors};
use crate::oci::registry::{BlobBody, Registry, RegistryError};
use crate::oci::{Digest, Repository};
use crate::store::partial::Partial;
use crate::store::{Store, StoreError};

/// Chunks between network and disk: at the client's 16 to 64 KiB a chunk, at most 1 MiB a download.
const CHUNKS_IN_FLIGHT: usize = 16;

/// Held while a blob is fetched or made an object: one download of a digest at a time.
pub type BlobGuard = OwnedMutexGuard<()>;

/// How often and how patiently a broken transfer is continued.
#[derive(Clone, Copy, Debug)]
pub struct RetryPolicy {
    /// Tries in a row that bring no byte.
    pub attempts: u32,
    /// Before the second try; doubles with each, to a bound.
    pub first_delay: Duration,
}

/// A verified download and the right to its digest.
#[derive(Debug)]
pub struct Download {
    /// The content.
    pub partial: Partial,
    /// Released when the content has its name.
    pub guard: BlobGuard,
    /// Where it came from.
    pub repository: Repository,
    /// Whether that repository was asked now; else all bytes were here from an
    /// earlier try, and only their host is certain.
    pub asked: bool,
}

enum Write {
    Bytes(Bytes),
    /// What is there is worth nothing.
    Restart,
    /// All bytes are there: is it the blob?
    Verify(oneshot::Sender<Digest>),
}

/// Fetches a blob of `size` bytes, from one sponsor's source after the other.
pub async fn fetch(
    store: &Store,
    registry: &Registry,
    sponsors: &Sponsors,
    (digest, size): (Digest, u64),
    progress: &Progress,
    (mut guard, retry): (BlobGuard, RetryPolicy),
) -> Result<Download, PullError> {
    let mut last = None;
    while let Some((number, source)) = sponsors.current() {
        let blob = (digest, size);
        let how = (guard, retry);
        let (error, returned) = match fetch_from(store, registry, source, blob, progress, how).await
        {
            Ok(download) => return Ok(download),
            Err(failed) => failed,
        };
        if !error.is_of_source() {
            return Err(error);
        }
        let error = Arc::new(error);
        sponsors.refuse(number, &error);
        last = Some(error);
        match returned {
            Some(returned) => guard = returned,
            None => break,
        }
    }
    // Each owner has been told his own; the flight ends with the last of them.
    Err(last.map_or(PullError::Unwanted, PullError::Shared))
}

async fn fetch_from(
    store: &Store,
    registry: &Registry,
    source: Source,
    (digest, size): (Digest, u64),
    progress: &Progress,
    (guard, retry): (BlobGuard, RetryPolicy),
) -> Result<Download, (PullError, Option<BlobGuard>)> {
    let (opened, resumed) = oneshot::channel();
    let (writes, queue) = mpsc::channel(CHUNKS_IN_FLIGHT);
    let (store, host) = (store.clone(), source.repository.host().to_owned());
    let writing = tokio::task::spawn_blocking(move || {
        let mut partial = match store.partial(&host, digest, size) {
            Ok(partial) => partial,
            Err(error) => return (None, guard, Err(error)),
        };
        let _ = opened.send(partial.length());
        let written = write(&mut partial, queue);
        (Some(partial), guard, written)
    });
    let mut transfer =
        Transfer { registry, source, digest, size, progress, writes, offset: 0, asked: false };
    let moved = match resumed.await {
        Ok(length) => {
            progress.resumed(length);
            transfer.offset = length;
            transfer.run(retry).await
        }
        // The writer could not even open it, and says why below.
        Err(_) => Ok(()),
    };
    let Transfer { source, asked, writes, offset, .. } = transfer;
    drop(writes);
    let Ok((partial, guard, written)) = writing.await else {
        return Err((PullError::Crashed, None));
    };
    let (partial, error) = match (partial, written, moved) {
        (Some(partial), Ok(()), Ok(())) => {
            let repository = source.repository;
            return Ok(Download { partial, guard, repository, asked });
        }
        (partial, Err(error), _) => (partial, PullError::Store(error)),
        (partial, Ok(()), Err(error)) => (partial, error),
        (None, Ok(()), Ok(())) => (None, PullError::Crashed),
    };
    progress.lost(offset);
    // What can be continued stays. What was proven wrong goes, and on a full disk a half
    // download helps nobody: the room is worth more to the node.
    let worthless = match &error {
        PullError::BlobSize { .. } | PullError::BlobDigest { .. } => true,
        PullError::Store(error) => {
            matches!(error, StoreError::NoSpace { .. } | StoreError::NoRoom(_))
        }
        _ => false,
    };
    let discard = move || {
        if let Some(partial) = partial.filter(|_| worthless) {
            partial.discard()?;
        }
        Ok(guard)
    };
    match super::resolve::blocking(discard).await {
        Ok(guard) => Err((error, Some(guard))),
        Err(error) => Err((error, None)),
    }
}

/// Fetches a blob only to see that the registry has it: its content is here
/// already, but did not come from this registry.
pub async fn prove(
    registry: &Registry,
    source: &Source,
    (digest, size): (Digest, u64),
    progress: &Progress,
) -> Result<(), PullError> {
    use sha2::Digest as _;
    let mut body = registry.blob(&source.repository, digest, 0, &source.credential).await?;
    let mut hasher = sha2::Sha256::new();
    let mut length = 0;
    progress.expect(size);
    while let Some(chunk) = body.chunk().await? {
        length += chunk.len() as u64;
        if length > size {
            return Err(PullError::BlobSize { digest, expected: size, got: length });
        }
        progress.arrived(chunk.len() as u64);
        // 64 KiB take about 40 µs: not worth a thread.
        hasher.update(&chunk);
    }
    let got = Digest::from_bytes(hasher.finalize().into());
    if got != digest {
        return Err(PullError::BlobDigest { expected: digest, got });
    }
    Ok(())
}

/// The blocking side.
fn write(partial: &mut Partial, mut queue: mpsc::Receiver<Write>) -> Result<(), StoreError> {
    while let Some(write) = queue.blocking_recv() {
        match write {
            Write::Bytes(bytes) => partial.append(&bytes)?,
            Write::Restart => partial.restart()?,
            Write::Verify(answer) => {
                let _ = answer.send(partial.digest());
            }
        }
    }
    Ok(())
}

/// The async side.
struct Transfer<'a> {
    registry: &'a Registry,
    source: Source,
    digest: Digest,
    size: u64,
    progress: &'a Progress,
    writes: mpsc::Sender<Write>,
    offset: u64,
    /// Whether the registry has answered.
    asked: bool,
}

/// Why a try ended.
enum Try {
    /// The writer has failed; its own error counts.
    WriterGone,
    Failed(PullError),
}

impl Transfer<'_> {
    async fn run(&mut self, retry: RetryPolicy) -> Result<(), PullError> {
        let mut fruitless = 0;
        let mut started_over = false;
        loop {
            let before = self.offset;
            let tried = if self.offset < self.size { self.attempt().await } else { Ok(()) };
            let error = match tried {
                Err(Try::WriterGone) => return Ok(()),
                Err(Try::Failed(error)) => error,
                Ok(()) => match self.verify().await {
                    Ok(()) | Err(Try::WriterGone) => return Ok(()),
                    Err(Try::Failed(error)) => error,
                },
            };
            let wrong = match &error {
                PullError::BlobDigest { .. } => true,
                PullError::BlobSize { expected, got, .. } => got > expected,
                _ => false,
            };
            if wrong {
                // A source may have changed under a download that was continued: once, from the start.
                if std::mem::replace(&mut started_over, true) {
                    return Err(error);
                }
                self.registry.distrust_mirrors(self.digest);
                if self.restart().await.is_err() {
                    return Ok(());
                }
                continue;
            }
            let short = matches!(error, PullError::BlobSize { .. });
            if short {
                self.registry.distrust_mirrors(self.digest);
            }
            if !short && !error.is_unavailable() {
                return Err(error);
            }
            fruitless = if self.offset > before { 0 } else { fruitless + 1 };
            if fruitless >= retry.attempts {
                return Err(error);
            }
            tracing::debug!(digest = %self.digest, offset = self.offset, %error, "a transfer broke and is continued");
            tokio::time::sleep(delay(retry, fruitless, &error)).await;
        }
    }

    /// One request, to its end or its failure.
    async fn attempt(&mut self) -> Result<(), Try> {
        let mut body = self.open().await?;
        if body.offset != self.offset {
            self.restart().await?;
        }
        while let Some(chunk) = body.chunk().await.map_err(|error| Try::Failed(error.into()))? {
            let length = chunk.len() as u64;
            if self.offset + length > self.size {
                return Err(Try::Failed(self.wrong_size(self.size + 1)));
            }
            self.send(Write::Bytes(chunk)).await?;
            self.offset += length;
            self.progress.arrived(length);
        }
        if self.offset < self.size {
            return Err(Try::Failed(self.wrong_size(self.offset)));
        }
        Ok(())
    }

    async fn open(&mut self) -> Result<BlobBody, Try> {
        let Source { repository, credential } = &self.source;
        let opened = self.registry.blob(repository, self.digest, self.offset, credential).await;
        let body = opened.map_err(|error| Try::Failed(error.into()))?;
        self.asked = true;
        Ok(body)
    }

    async fn verify(&self) -> Result<(), Try> {
        let (answer, digest) = oneshot::channel();
        self.send(Write::Verify(answer)).await?;
        let got = digest.await.map_err(|_| Try::WriterGone)?;
        if got == self.digest {
            return Ok(());
        }
        Err(Try::Failed(PullError::BlobDigest { expected: self.digest, got }))
    }

    async fn restart(&mut self) -> Result<(), Try> {
        self.progress.lost(self.offset);
        self.offset = 0;
        self.send(Write::Restart).await
    }

    async fn send(&self, write: Write) -> Result<(), Try> {
        self.writes.send(write).await.map_err(|_| Try::WriterGone)
    }

    fn wrong_size(&self, got: u64) -> PullError {
        PullError::BlobSize { digest: self.digest, expected: self.size, got }
    }
}

/// Doubles up to half a minute, less a random part, so that nodes do not ask in step.
fn delay(retry: RetryPolicy, fruitless: u32, error: &PullError) -> Duration {
    const LONGEST: Duration = Duration::from_secs(30);
    if let PullError::Registry(RegistryError::RateLimited { retry_after: Some(wait), .. }) = error {
        return (*wait).min(LONGEST);
    }
    let full = retry.first_delay.saturating_mul(1 << fruitless.min(8)).min(LONGEST);
    let mut random = [0];
    // Without randomness nodes ask in step, which is all that is lost.
    let _ = getrandom::fill(&mut random);
    full.mul_f64(0.5 + f64::from(random[0]) / 512.0)
}
