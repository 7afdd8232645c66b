//! One blob from a registry to `partial/`, verified.
//!
//! Async tasks move bytes from the network into a bounded channel; a blocking thread
//! writes and hashes them, and owns the download: a task that is dropped leaves no
//! second writer behind. Who wants to unpack it meanwhile follows what is hashed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tokio::sync::{OwnedMutexGuard, mpsc, oneshot};

use super::connections::{Connections, Failure, Write};
use super::error::PullError;
use super::progress::Progress;
use super::slots::Ask;
use super::spans::Spans;
use super::sponsors::{Source, Sponsors};
use super::wire::Wire;
use crate::background::give_way;
use crate::oci::{Digest, Repository};
use crate::store::growth::Follower;
use crate::store::partial::{Partial, Purpose};
use crate::store::{Store, StoreError};

/// Chunks between network and disk; [`Wire::memory`] bounds their bytes. Few, so that they are
/// still in the processor's cache when they are hashed: one may have 400 KiB.
const CHUNKS_IN_FLIGHT: usize = 4;

/// Held while a blob is fetched or made an object: one download of a digest at a time.
pub type BlobGuard = OwnedMutexGuard<()>;

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

/// Fetches a blob, from one sponsor's source after the other.
pub async fn fetch(
    store: &Store,
    wire: &Wire,
    order: &Order<'_>,
    mut guard: BlobGuard,
) -> Result<Download, PullError> {
    let mut last = None;
    while let Some((number, source)) = order.sponsors.current() {
        let (error, returned) = match fetch_from(store, wire, source, order, guard).await {
            Ok(download) => return Ok(download),
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
) -> Result<Download, (PullError, Option<BlobGuard>)> {
    let (blob, purpose) = (order.blob, order.purpose);
    let (_, size) = blob;
    let host = source.repository.host().to_owned();
    let ask = Ask {
        urgency: Arc::clone(order.progress),
        artifact: order.sponsors.number(),
        host: host.clone(),
    };
    let place = Arc::new(wire.places.acquire(ask.clone()).await);
    let (opened, resumed) = oneshot::channel();
    let (writes, queue) = mpsc::channel(CHUNKS_IN_FLIGHT);
    let (store, busy) = (store.clone(), Arc::new(AtomicU64::new(0)));
    let (measured, threads) = (Arc::clone(&busy), Arc::clone(&place));
    let writing = tokio::task::spawn_blocking(move || {
        // As long as there is the thread, also when nobody waits for it any more.
        let _place = threads;
        let is_wanted = || !opened.is_closed();
        let mut partial = match store.partial_while(&host, blob, purpose, &is_wanted) {
            Ok(partial) => partial,
            Err(error) => return (None, guard, Err(error)),
        };
        let _ = opened.send((partial.missing(), partial.follow()));
        let written = write(&mut partial, queue, &measured);
        (Some(partial), guard, written)
    });
    let (moved, asked, missing) = match resumed.await {
        Ok((missing, follower)) => {
            let spans = Spans::new(missing);
            order.progress.resumed(size - spans.missing());
            // Not before: what an earlier try left takes its time to be hashed, and no connection.
            let slot = wire.slots.acquire(ask.clone()).await;
            (order.follow)(follower);
            let about = (ask, &*place, &**order.progress);
            let to = (writes, busy);
            let connections =
                Connections::new(wire, &source, order.blob, about, to, (spans, order.follow));
            let moved = connections.run(slot).await;
            let (asked, missing) = connections.outcome();
            (moved, asked, missing)
        }
        // The writer could not even open it, and says why below.
        Err(_) => (Err(Failure::WriterGone), false, size),
    };
    let ended = writing.await;
    drop(place);
    let Ok((partial, guard, written)) = ended else {
        return Err((PullError::Crashed, None));
    };
    let (partial, error) = match (partial, written, moved) {
        (Some(partial), Ok(()), Ok(())) => {
            let repository = source.repository;
            return Ok(Download { partial, guard, repository, asked });
        }
        (partial, Err(error), _) => (partial, PullError::Store(error)),
        (partial, Ok(()), Err(Failure::Failed(error) | Failure::Wrong(error))) => (partial, error),
        (partial, Ok(()), _) => (partial, PullError::Crashed),
    };
    order.progress.lost(size - missing);
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
/// already, but did not come from this registry. As any download it takes its turn and is
/// continued where it broke.
pub async fn prove(
    wire: &Wire,
    source: &Source,
    blob: (Digest, u64),
    progress: &Arc<Progress>,
) -> Result<(), PullError> {
    let ask = Ask {
        urgency: Arc::clone(progress),
        artifact: Sponsors::default().number(),
        host: source.repository.host().to_owned(),
    };
    let (_, size) = blob;
    progress.expect(size);
    let place = Arc::new(wire.places.acquire(ask.clone()).await);
    let (writes, queue) = mpsc::channel(CHUNKS_IN_FLIGHT);
    let threads = Arc::clone(&place);
    let hashing = tokio::task::spawn_blocking(move || {
        let _place = threads;
        hash(queue);
    });
    let slot = wire.slots.acquire(ask.clone()).await;
    let (spans, busy) = (Spans::whole(size), Arc::default());
    let (about, to) = ((ask, &*place, &**progress), (writes, busy));
    let moved = Connections::new(wire, source, blob, about, to, (spans, &|_| ()))
        .one_after_the_other()
        .run(slot)
        .await;
    if hashing.await.is_err() {
        return Err(PullError::Crashed);
    }
    match moved {
        Ok(()) => Ok(()),
        Err(Failure::Failed(error) | Failure::Wrong(error)) => Err(error),
        Err(Failure::WriterGone) => Err(PullError::Crashed),
    }
}

/// The blocking side of a blob that is not kept. Its bytes come in order: one connection brings them.
fn hash(mut queue: mpsc::Receiver<Write>) {
    use sha2::Digest as _;
    let mut hasher = sha2::Sha256::new();
    while let Some(write) = queue.blocking_recv() {
        give_way();
        match write {
            Write::Bytes { bytes, memory, .. } => {
                hasher.update(&bytes);
                drop((bytes, memory));
            }
            Write::Restart(begun) => {
                hasher = sha2::Sha256::new();
                let _ = begun.send(None);
            }
            Write::Verify(answer) => {
                let _ = answer.send(Digest::from_bytes(hasher.clone().finalize().into()));
            }
        }
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
        give_way();
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
