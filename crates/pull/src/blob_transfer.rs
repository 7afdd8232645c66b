//! One blob from a registry to `partial/`, verified.
//!
//! Async tasks move bytes from the network into a bounded channel; a blocking thread
//! writes and hashes them, and owns the download: a task that is dropped leaves no
//! second writer behind. Who wants to unpack it meanwhile follows what is hashed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tokio::sync::{OwnedMutexGuard, mpsc, oneshot};

use super::blob_connections::{ConnectionState, Connections, Failure, Write};
use super::blob_origins::content_sources;
use super::blocking;
use super::connection_slots::Ask;
use super::credential_offers::{Source, Sponsors};
use super::download_resources::Wire;
use super::error::PullError;
use super::pull_progress::Progress;
use super::range_scheduler::Spans;
use super::shared_downloads::DownloadTurn;
use oci::Digest;
use oci::manifest::Descriptor;
use store::access::ProofSource;
use store::growing_download::Follower;
use store::partial_downloads::{Partial, Purpose};
use store::{Store, StoreError};
use sys::background::yield_to_pods;

/// Chunks between network and disk; [`Wire::memory`] bounds their bytes. Few, so that they are
/// still in the processor's cache when they are hashed: one may have 400 KiB.
const CHUNKS_IN_FLIGHT: usize = 4;

/// The right to work on a blob for one repository; released when dropped.
pub(super) struct BlobGuard {
    /// Flights of one repository wait here for each other: the first one's proof counts for all.
    pub(super) _repository: OwnedMutexGuard<()>,
    /// The turn at the download that all repositories of the host share. None for a download of the
    /// repository's own.
    pub(super) turn: Option<DownloadTurn>,
}

/// The outcome of a transfer that did not fail.
pub(super) enum TransferOutcome {
    /// The blob is on the disk, verified.
    Complete(Box<Download>),
    /// Another repository is the source now.
    TurnLost,
    /// The source cannot continue the bytes of other sources. It has to download the blob by itself.
    Isolated {
        /// The bytes did not have the digest, and were thrown away.
        is_wrong: bool,
    },
}

/// A verified download and the right to its digest.
pub(super) struct Download {
    /// The downloaded content.
    pub(super) partial: Partial,
    /// Released when the content has its name.
    pub(super) guard: BlobGuard,
    /// The sources that have given it for the repository now. Empty if all bytes were there from an earlier attempt,
    /// and only their host is certain.
    pub(super) given_by: BTreeSet<ProofSource>,
}

/// A blob, and its size by the manifest.
#[derive(Clone, Copy, Debug)]
pub(super) struct SizedBlob {
    /// The digest of all bytes.
    pub(super) digest: Digest,
    /// The number of bytes.
    pub(super) size: u64,
}

impl SizedBlob {
    /// Returns the blob of a layer.
    pub(super) fn of(layer: &Descriptor) -> Self {
        Self { digest: layer.digest, size: layer.size }
    }
}

/// A blob that is wanted, and for whom.
#[derive(Clone, Copy)]
pub(super) struct BlobRequest<'a> {
    /// The blob by the manifest.
    pub(super) blob: SizedBlob,
    /// The purpose of the download.
    pub(super) purpose: Purpose,
    /// The callers whose credentials the flight uses.
    pub(super) sponsors: &'a Sponsors,
    /// The blob's own.
    pub(super) progress: &'a Arc<Progress>,
    /// Is given a reader of the blob each time that it begins to grow.
    pub(super) follow: &'a (dyn Fn(Follower) + Send + Sync),
}

impl BlobRequest<'_> {
    /// Returns the request for a slot.
    pub(super) fn ask(&self) -> Ask {
        Ask {
            urgency: Arc::clone(self.progress),
            artifact: self.sponsors.number,
            host: self.sponsors.repository.host().to_owned(),
            is_first: false,
        }
    }
}

/// Downloads a blob until it is complete, or until the turn goes to another repository of the host.
pub(super) async fn fetch(
    store: &Store,
    wire: &Wire,
    request: BlobRequest<'_>,
    guard: BlobGuard,
) -> Result<TransferOutcome, PullError> {
    let Some(shared) = guard.turn.as_ref().map(|turn| Arc::clone(&turn.0)) else {
        return fetch_from_offers(store, wire, request, guard).await;
    };
    let repository = &request.sponsors.repository;
    tokio::select! {
        fetched = fetch_from_offers(store, wire, request, guard) => fetched,
        // The writer ends by itself, which passes the turn on.
        () = shared.until_lost(repository, request.progress) => {
            let blob = request.blob.digest;
            tracing::info!(%repository, %blob, "another repository takes a slow download over");
            request.progress.lost(u64::MAX);
            Ok(TransferOutcome::TurnLost)
        }
    }
}

/// Downloads a blob from the current credential offer, and from the next one if that is refused.
async fn fetch_from_offers(
    store: &Store,
    wire: &Wire,
    request: BlobRequest<'_>,
    mut guard: BlobGuard,
) -> Result<TransferOutcome, PullError> {
    let mut last = PullError::Unwanted;
    while let Some((number, source)) = request.sponsors.current() {
        let (error, returned) = match fetch_from(store, wire, source, request, guard).await {
            Ok(fetched) => return Ok(fetched),
            Err(failed) => failed,
        };
        if !error.is_of_source() {
            return Err(error);
        }
        last = request.sponsors.refused(number, error);
        match returned {
            Some(returned) => guard = returned,
            None => break,
        }
    }
    // Each owner has got its own refusal. The flight ends with the last of them.
    Err(last)
}

async fn fetch_from(
    store: &Store,
    wire: &Wire,
    source: Source,
    request: BlobRequest<'_>,
    guard: BlobGuard,
) -> Result<TransferOutcome, (PullError, Option<BlobGuard>)> {
    let BlobRequest { blob, purpose, progress, .. } = request;
    let ask = request.ask();
    let shared = guard.turn.as_ref().map(|turn| Arc::clone(&turn.0));
    // A file is shared by the flights of one registry host, or of one repository.
    let scope = match shared {
        Some(_) => ask.host.clone(),
        None => source.repository.to_string(),
    };
    let place = Arc::new(wire.places.acquire(ask.clone()).await);
    progress.hashes(true);
    let (opened, resumed) = oneshot::channel();
    let (writes, queue) = mpsc::channel(CHUNKS_IN_FLIGHT);
    let (store, busy) = (store.clone(), Arc::new(AtomicU64::new(0)));
    let (measured, threads) = (Arc::clone(&busy), Arc::clone(&place));
    let writing = tokio::task::spawn_blocking(move || {
        // Held as long as the thread runs, also without a caller.
        let _place = threads;
        let is_wanted = || !opened.is_closed();
        let mut partial =
            match store.downloads().open(&scope, blob.digest, blob.size, purpose, &is_wanted) {
                Ok(partial) => partial,
                Err(error) => return (None, guard, Err(error)),
            };
        let _ = opened.send((partial.missing(), partial.follow()));
        let written = write(&mut partial, queue, &measured);
        (Some(partial), guard, written)
    });
    let resumed = resumed.await;
    progress.hashes(false);
    let (moved, answered_by, missing, has_others_bytes) = match resumed {
        Ok((missing, follower)) => {
            let spans = Spans::new(missing);
            // Not before: what an earlier try left takes its time to be hashed, and no connection.
            let slot = wire.slots.acquire(ask).await;
            (request.follow)(follower);
            let state = ConnectionState::new(spans, blob, wire.options.ranges);
            let (source, place, only_answer) = (&source, &place, false);
            let connections = Connections {
                wire,
                source,
                request,
                place,
                writes,
                busy,
                shared,
                only_answer,
                state,
            };
            let moved = connections.run(slot).await;
            let (answered_by, missing) = connections.outcome();
            (moved, answered_by, missing, connections.would_discard_others_bytes())
        }
        // The writer could not even open it, and says why below.
        Err(_) => (Err(Failure::WriterGone), BTreeSet::new(), blob.size, false),
    };
    let ended = writing.await;
    drop(place);
    let Ok((partial, guard, written)) = ended else {
        return Err((PullError::Crashed, None));
    };
    let (partial, error) = match (partial, written, moved) {
        (Some(partial), Ok(()), Ok(())) => {
            let given_by = content_sources(&answered_by);
            return Ok(TransferOutcome::Complete(Box::new(Download { partial, guard, given_by })));
        }
        (Some(partial), Ok(()), Err(Failure::CannotContinue(error))) => {
            tracing::info!(%error, blob = %blob.digest, "what several sources have sent does not fit");
            progress.lost(u64::MAX);
            return leave_to_others(partial, guard, &error).await.map_err(|error| (error, None));
        }
        (partial, Err(error), _) => (partial, PullError::Store(error)),
        (
            partial,
            Ok(()),
            Err(Failure::Failed(error) | Failure::Wrong(error) | Failure::CannotContinue(error)),
        ) => (partial, error),
        (partial, Ok(()), _) => (partial, PullError::Crashed),
    };
    progress.lost(blob.size - missing);
    let worthless = is_worthless(&error, has_others_bytes);
    let discard = move || {
        if let Some(partial) = partial.filter(|_| worthless) {
            partial.discard()?;
        }
        Ok(guard)
    };
    match blocking(discard).await {
        Ok(guard) => Err((error, Some(guard))),
        Err(error) => Err((error, None)),
    }
}

/// Returns whether the bytes of a download that failed are of no use. What can be continued stays. What
/// was proven wrong goes, and so does a half download on a full disk, where the room is worth more.
fn is_worthless(error: &PullError, has_others_bytes: bool) -> bool {
    match error {
        // The length of one source's body does not invalidate the bytes of others.
        PullError::BlobSize { .. } => !has_others_bytes,
        PullError::BlobDigest { .. } => true,
        PullError::Store(error) => {
            matches!(error, StoreError::NoSpace { .. } | StoreError::NoRoom(_))
        }
        _ => false,
    }
}

/// Leaves a download to other sources, and discards it if it does not have the right digest.
async fn leave_to_others(
    partial: Partial,
    guard: BlobGuard,
    error: &PullError,
) -> Result<TransferOutcome, PullError> {
    let is_wrong = matches!(error, PullError::BlobDigest { .. });
    blocking(move || {
        if is_wrong {
            partial.discard()?;
        }
        drop(guard);
        Ok(TransferOutcome::Isolated { is_wrong })
    })
    .await
}

/// Asks a source for a blob as a download does, and reads no more than the head of its answer: for
/// a blob that its host has sent before. Says who gave it.
pub(super) async fn ask(
    wire: &Wire,
    source: &Source,
    request: BlobRequest<'_>,
) -> Result<BTreeSet<ProofSource>, PullError> {
    let request = BlobRequest { follow: &|_| (), ..request };
    let place = wire.places.acquire(request.ask()).await;
    let slot = wire.slots.acquire(request.ask()).await;
    let (writes, mut queue) = mpsc::channel(CHUNKS_IN_FLIGHT);
    let state = ConnectionState::new(Spans::whole(request.blob.size), request.blob, 1);
    let (place, busy, shared, only_answer) = (&place, Arc::default(), None, true);
    let connections =
        Connections { wire, source, request, place, writes, busy, shared, only_answer, state };
    // Nothing is written, but a source that contradicts itself is asked once more from the start.
    let restarts = async {
        while let Some(write) = queue.recv().await {
            if let Write::Restart(begun) = write {
                let _ = begun.send(None);
            }
        }
        std::future::pending::<()>().await;
    };
    let moved = tokio::select! {
        moved = connections.run(slot) => moved,
        () = restarts => Ok(()),
    };
    match moved {
        Ok(()) => Ok(content_sources(&connections.outcome().0)),
        Err(Failure::Failed(error) | Failure::Wrong(error) | Failure::CannotContinue(error)) => {
            Err(error)
        }
        Err(Failure::WriterGone) => Err(PullError::Crashed),
    }
}

/// The blocking side.
fn write(
    partial: &mut Partial,
    mut queue: mpsc::Receiver<Write>,
    busy: &AtomicU64,
) -> Result<(), StoreError> {
    while let Some(write) = queue.blocking_recv() {
        let since = Instant::now();
        yield_to_pods();
        match write {
            Write::Bytes { offset, bytes, memory } => {
                partial.write(offset, &bytes)?;
                drop((bytes, memory));
            }
            Write::Restart(follow) => {
                partial.restart()?;
                let _ = follow.send(Some(partial.follow()));
            }
            Write::Verify(answer) => {
                let _ = answer.send(partial.digest());
            }
        }
        let spent = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        busy.fetch_add(spent, Ordering::Relaxed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::StatusCode;
    use axum::response::Response;

    use super::super::testing::{TestNode, TestRegistry, empty, file_layer, is_root};
    use super::*;
    use oci::registry::RegistryError;

    #[tokio::test]
    async fn bytes_that_are_not_the_blob_are_thrown_away() {
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        let digest = registry.blob("a", b"right");
        registry.answer_with(|_| Some(Response::new(Body::from("wrong"))));
        let error =
            node.download(&registry, "a", b"right").await.err().expect("it is another blob");
        assert!(matches!(error.root(), PullError::BlobDigest { .. }), "{error}");
        registry.answer_with(|_| None);
        let download = node.download(&registry, "a", b"right").await.expect("the blob");
        assert_eq!(download.partial.digest(), digest);
        assert!(download.given_by.contains(&ProofSource::Registry));
        let starts: Vec<_> = registry.seen("blobs/").iter().map(|seen| seen.start).collect();
        assert!(starts.iter().all(Option::is_none), "nothing was continued: {starts:?}");
    }

    #[tokio::test]
    async fn a_blob_of_the_store_is_only_for_repositories_that_give_it() {
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        let layer = file_layer("file", b"content");
        for repository in ["a", "b", "c"] {
            registry.artifact(repository, &layer, b"content");
        }
        registry.answer_with(|seen| {
            let is_refused = seen.repository == "b" && seen.object.starts_with("blobs/");
            is_refused.then(|| empty(StatusCode::NOT_FOUND))
        });
        // Bytes on the disk are the host's, whether they have a name or not.
        drop(node.download(&registry, "a", b"content").await.expect("the blob"));
        let error = node.download(&registry, "b", b"content").await.err().expect("it is not there");
        let is_missing =
            matches!(error.root(), PullError::Registry(RegistryError::NotFound { .. }));
        assert!(is_missing, "{error}");
        if is_root() {
            node.pull(&registry.want("a")).await.expect("a tree");
            node.pull(&registry.want("b")).await.expect_err("it is not there");
        }
        node.download(&registry, "c", b"content").await.expect("the blob");
        let asked = registry.seen("blobs/");
        assert!(asked.iter().any(|seen| seen.repository == "c"), "{asked:?}");
    }
}
