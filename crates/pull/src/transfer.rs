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

use super::connections::{Connections, Failure, Write};
use super::error::PullError;
use super::origins::content_sources;
use super::progress::Progress;
use super::shared_downloads::DownloadTurn;
use super::slots::Ask;
use super::spans::Spans;
use super::sponsors::{Source, Sponsors};
use super::wire::Wire;
use oci::Digest;
use store::access::ProofSource;
use store::growth::Follower;
use store::partial::{Partial, Purpose};
use store::{Store, StoreError};
use sys::background::yield_to_pods;

/// Chunks between network and disk; [`Wire::memory`] bounds their bytes. Few, so that they are
/// still in the processor's cache when they are hashed: one may have 400 KiB.
const CHUNKS_IN_FLIGHT: usize = 4;

/// The right to work on a blob for one repository; released when dropped.
#[derive(Debug)]
pub struct BlobGuard {
    /// Flights of one repository wait here for each other: the first one's proof counts for all.
    pub(super) _repository: OwnedMutexGuard<()>,
    /// The turn at the download that all repositories of the host share. None for a download of the
    /// repository's own.
    pub(super) turn: Option<DownloadTurn>,
}

/// The outcome of a transfer that did not fail.
#[derive(Debug)]
pub enum TransferOutcome {
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
#[derive(Debug)]
pub struct Download {
    /// The content.
    pub partial: Partial,
    /// Released when the content has its name.
    pub guard: BlobGuard,
    /// Who has given it for the repository now; nobody when all bytes were here from an earlier
    /// try, and only their host is certain.
    pub given_by: BTreeSet<ProofSource>,
}

/// What is fetched, and for whom.
pub struct Order<'a> {
    /// The blob and its size by the manifest.
    pub blob: (Digest, u64),
    /// What becomes of it.
    pub purpose: Purpose,
    /// Whose credentials pay.
    pub sponsors: &'a Sponsors,
    /// The blob's own.
    pub progress: &'a Arc<Progress>,
    /// Is given a reader of the blob each time that it begins to grow.
    pub follow: &'a (dyn Fn(Follower) + Send + Sync),
}

/// Downloads a blob until it is complete, or until the turn goes to another repository of the host.
pub async fn fetch(
    store: &Store,
    wire: &Wire,
    order: &Order<'_>,
    guard: BlobGuard,
) -> Result<TransferOutcome, PullError> {
    let Some(shared) = guard.turn.as_ref().map(DownloadTurn::download) else {
        return fetch_from_offers(store, wire, order, guard).await;
    };
    let shared = Arc::clone(shared);
    let repository = order.sponsors.repository();
    tokio::select! {
        fetched = fetch_from_offers(store, wire, order, guard) => fetched,
        // The writer ends by itself, which passes the turn on.
        () = shared.until_lost(repository, order.progress) => {
            let blob = order.blob.0;
            tracing::info!(%repository, %blob, "another repository takes a slow download over");
            order.progress.lost(u64::MAX);
            Ok(TransferOutcome::TurnLost)
        }
    }
}

/// Downloads a blob from the current credential offer, and from the next one if that is refused.
async fn fetch_from_offers(
    store: &Store,
    wire: &Wire,
    order: &Order<'_>,
    mut guard: BlobGuard,
) -> Result<TransferOutcome, PullError> {
    let mut last = None;
    while let Some((number, source)) = order.sponsors.current() {
        let (error, returned) = match fetch_from(store, wire, source, order, guard).await {
            Ok(fetched) => return Ok(fetched),
            Err(failed) => failed,
        };
        if !error.is_of_source() {
            return Err(error);
        }
        let error = Arc::new(error);
        order.sponsors.refuse(number, &error);
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
    wire: &Wire,
    source: Source,
    order: &Order<'_>,
    guard: BlobGuard,
) -> Result<TransferOutcome, (PullError, Option<BlobGuard>)> {
    let (blob, purpose) = (order.blob, order.purpose);
    let (_, size) = blob;
    let host = source.repository.host().to_owned();
    let ask = Ask {
        urgency: Arc::clone(order.progress),
        artifact: order.sponsors.number(),
        host: host.clone(),
        is_first: false,
    };
    let shared = guard.turn.as_ref().map(|turn| Arc::clone(turn.download()));
    // A file is shared by the flights of one registry host, or of one repository.
    let scope = match shared {
        Some(_) => host,
        None => source.repository.to_string(),
    };
    let place = Arc::new(wire.places.acquire(ask.clone()).await);
    order.progress.hashes(true);
    let (opened, resumed) = oneshot::channel();
    let (writes, queue) = mpsc::channel(CHUNKS_IN_FLIGHT);
    let (store, busy) = (store.clone(), Arc::new(AtomicU64::new(0)));
    let (measured, threads) = (Arc::clone(&busy), Arc::clone(&place));
    let writing = tokio::task::spawn_blocking(move || {
        // As long as there is the thread, also when nobody waits for it any more.
        let _place = threads;
        let is_wanted = || !opened.is_closed();
        let mut partial = match store.partial_while(&scope, blob, purpose, &is_wanted) {
            Ok(partial) => partial,
            Err(error) => return (None, guard, Err(error)),
        };
        let _ = opened.send((partial.missing(), partial.follow()));
        let written = write(&mut partial, queue, &measured);
        (Some(partial), guard, written)
    });
    let resumed = resumed.await;
    order.progress.hashes(false);
    let (moved, answered_by, missing, has_others_bytes) = match resumed {
        Ok((missing, follower)) => {
            let spans = Spans::new(missing);
            // Not before: what an earlier try left takes its time to be hashed, and no connection.
            let slot = wire.slots.acquire(ask.clone()).await;
            (order.follow)(follower);
            let about = (ask, &*place, &**order.progress);
            let to = (writes, busy);
            let connections =
                Connections::new(wire, &source, order.blob, about, to, (spans, order.follow))
                    .sharing(shared);
            let moved = connections.run(slot).await;
            let (answered_by, missing) = connections.outcome();
            (moved, answered_by, missing, connections.would_discard_others_bytes())
        }
        // The writer could not even open it, and says why below.
        Err(_) => (Err(Failure::WriterGone), BTreeSet::new(), size, false),
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
            tracing::info!(%error, blob = %blob.0, "what several sources have sent does not fit");
            order.progress.lost(u64::MAX);
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
    order.progress.lost(size - missing);
    // What can be continued stays. What was proven wrong goes, and on a full disk a half
    // download helps nobody: the room is worth more to the node.
    let worthless = match &error {
        // The length of one source's body does not invalidate the bytes of others.
        PullError::BlobSize { .. } => !has_others_bytes,
        PullError::BlobDigest { .. } => true,
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

/// Leaves a download to other sources, and discards it if it does not have the right digest.
async fn leave_to_others(
    partial: Partial,
    guard: BlobGuard,
    error: &PullError,
) -> Result<TransferOutcome, PullError> {
    let is_wrong = matches!(error, PullError::BlobDigest { .. });
    super::resolve::blocking(move || {
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
pub async fn ask(
    wire: &Wire,
    source: &Source,
    (blob, artifact): ((Digest, u64), u64),
    progress: &Arc<Progress>,
) -> Result<BTreeSet<ProofSource>, PullError> {
    let (urgency, host) = (Arc::clone(progress), source.repository.host().to_owned());
    let ask = Ask { urgency, artifact, host, is_first: false };
    let (_, size) = blob;
    let place = wire.places.acquire(ask.clone()).await;
    let slot = wire.slots.acquire(ask.clone()).await;
    let (writes, mut queue) = mpsc::channel(CHUNKS_IN_FLIGHT);
    let (spans, busy) = (Spans::whole(size), Arc::default());
    let (about, to) = ((ask, &place, &**progress), (writes, busy));
    let connections =
        Connections::new(wire, source, blob, about, to, (spans, &|_| ())).only_answer();
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
