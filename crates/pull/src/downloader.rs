//! The right to a blob, the proof that a repository gives it, and its download.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::blob_origins::{BlobOrigin, BlobOrigins};
use super::blob_transfer::{self, BlobGuard, BlobRequest, Download, TransferOutcome};
use super::download_resources::Wire;
use super::error::PullError;
use super::keyed_locks::KeyedLocks;
use super::shared_downloads::SharedDownloads;
use super::{SizedBlob, blocking};
use oci::{Digest, Repository};
use store::Store;
use store::access::ProofSource;
use sys::background::Background;

/// The outcome of one attempt to get a blob.
pub(super) type Attempt<T> = Result<T, AttemptEnd>;

/// The reason why an attempt ended without the blob.
pub(super) enum AttemptEnd {
    /// Another repository is the source now, or this one cannot continue the bytes of others. The
    /// next attempt finds the content in the store, or continues a download.
    Retry {
        /// The repository has to download the blob by itself from now on.
        isolated: bool,
    },
    Failed(PullError),
}

/// The right to work on a blob for one repository.
pub(super) struct DownloadTurn {
    guard: BlobGuard,
    origin: BlobOrigin,
    /// The sources that have given it for the repository while other tasks worked on it.
    given_by: BTreeSet<ProofSource>,
}

impl DownloadTurn {
    /// Returns the turn for a blob that the repository has been proven to give.
    pub(super) fn proven(guard: BlobGuard) -> Self {
        Self { guard, origin: BlobOrigin::Repository, given_by: BTreeSet::new() }
    }
}

impl From<PullError> for AttemptEnd {
    fn from(error: PullError) -> Self {
        Self::Failed(error)
    }
}

/// Repeats an attempt until it has the blob or fails. The attempt is told whether the repository has
/// to download the blob by itself.
pub(super) async fn retry<T, F>(attempt: impl Fn(bool) -> F) -> Result<T, PullError>
where
    F: Future<Output = Attempt<T>>,
{
    let mut is_isolated = false;
    loop {
        match attempt(is_isolated).await {
            Ok(done) => return Ok(done),
            Err(AttemptEnd::Retry { isolated }) => is_isolated |= isolated,
            Err(AttemptEnd::Failed(error)) => return Err(error),
        }
    }
}

/// Downloads blobs, each once for all repositories of a host that give it.
pub(super) struct Downloader {
    pub(super) store: Store,
    pub(super) wire: Arc<Wire>,
    pub(super) origins: BlobOrigins,
    pub(super) background: Background,
    /// The downloads that repositories of a host share, by host and digest.
    pub(super) shared: SharedDownloads,
    /// Held while it is proven that a repository gives a blob.
    pub(super) proving: KeyedLocks<(Repository, Digest)>,
}

impl Downloader {
    /// Waits for the right to work on a blob. While a flight of another repository of the host has
    /// it, waits only after this repository has given the blob, too. So a caller without access is
    /// refused at once, whether the blob is under way or not. With `isolated` the download is the
    /// repository's own.
    pub(super) async fn turn(
        &self,
        request: BlobRequest<'_>,
        isolated: bool,
    ) -> Result<DownloadTurn, PullError> {
        let (repository, digest) = (&request.sponsors.repository, request.blob.digest);
        let host = repository.host();
        let mut given_by = BTreeSet::new();
        let of_repository = self.proving.lock((repository.clone(), digest));
        let of_repository = self.background.boost_while(of_repository).await;
        let shared = self.shared.of(host, digest);
        let mut turn = None;
        if !isolated && !self.shared.is_isolated(host, digest) {
            turn = shared.try_take(request.progress);
            if turn.is_none() {
                if self.origins.look_up(repository, digest).await? != BlobOrigin::Repository {
                    given_by = self.ask_for(request).await?;
                }
                let waits = shared.wait(repository, request.progress);
                turn = Some(self.background.boost_while(waits).await);
            }
            // The sources may have been isolated meanwhile.
            turn = turn.filter(|_| !self.shared.is_isolated(host, digest));
        }
        let origin = self.origins.look_up(repository, digest).await?;
        let guard = BlobGuard { _repository: of_repository, turn };
        Ok(DownloadTurn { guard, origin, given_by })
    }

    /// Sees to it that the repository gives a blob that is in the store (see [`super::blob_origins`]),
    /// and remembers who has given it.
    pub(super) async fn prove(
        &self,
        request: BlobRequest<'_>,
        turn: DownloadTurn,
    ) -> Attempt<BlobGuard> {
        let SizedBlob { digest, size } = request.blob;
        let (guard, given_by) = match turn {
            DownloadTurn { guard, origin: BlobOrigin::Repository, .. } => {
                request.progress.resumed(size);
                return Ok(guard);
            }
            DownloadTurn { guard, origin: BlobOrigin::Host, given_by } => {
                let is_given = !given_by.is_empty();
                let given_by = if is_given { given_by } else { self.ask_for(request).await? };
                request.progress.resumed(size);
                (guard, given_by)
            }
            // Another host has to send the bytes themselves: naming a digest proves nothing.
            turn => {
                let request = BlobRequest { follow: &|_| (), ..request };
                let download = self.download(request, turn).await?;
                let Download { partial, guard, given_by } = download;
                blocking(move || Ok(partial.discard()?)).await?;
                (guard, given_by)
            }
        };
        let (origins, repository) = (self.origins.clone(), request.sponsors.repository.clone());
        blocking(move || origins.record(&repository, digest, &given_by)).await?;
        Ok(guard)
    }

    /// Asks the repository for a blob; says who has given it.
    async fn ask_for(&self, request: BlobRequest<'_>) -> Result<BTreeSet<ProofSource>, PullError> {
        let sponsors = request.sponsors;
        let mut last = PullError::Unwanted;
        while let Some((number, source)) = sponsors.current() {
            match blob_transfer::ask(&self.wire, &source, request).await {
                Err(error) if error.is_of_source() => last = sponsors.refused(number, error),
                done => return done,
            }
        }
        Err(last)
    }

    /// Downloads a blob. Returns who has given it for the repository, too.
    pub(super) async fn download(
        &self,
        request: BlobRequest<'_>,
        turn: DownloadTurn,
    ) -> Attempt<Download> {
        let DownloadTurn { guard, origin, given_by } = turn;
        let mut download =
            match blob_transfer::fetch(&self.store, &self.wire, request, guard).await? {
                TransferOutcome::Complete(download) => *download,
                TransferOutcome::TurnLost => return Err(AttemptEnd::Retry { isolated: false }),
                TransferOutcome::Isolated { is_wrong } => {
                    if is_wrong {
                        let host = request.sponsors.repository.host();
                        self.shared.isolate(host, request.blob.digest);
                    }
                    return Err(AttemptEnd::Retry { isolated: true });
                }
            };
        if download.given_by.is_empty() {
            // All bytes were here from an earlier try, of whichever repository of the host.
            download.given_by = match origin {
                BlobOrigin::Repository => given_by,
                _ if !given_by.is_empty() => given_by,
                _ => self.ask_for(request).await?,
            };
            request.progress.resumed(request.blob.size);
        }
        Ok(download)
    }
}
