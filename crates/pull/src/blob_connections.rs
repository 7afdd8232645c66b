//! The connections that download one blob.
//!
//! The first connection requests the whole blob, as any client does. While the node waits for bytes, and neither the
//! bytes nor the processor are its limit, more connections take pieces of the blob ([`Spans`]), as long as the registry
//! answers range requests with ranges.
//!
//! A connection that breaks leaves its rest to the others, or to the next attempt; the registry is then trusted with
//! one concurrent connection less. Only a break of the last connection is a failed attempt: while others run, the
//! transfer continues.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::{Instant, Interval, MissedTickBehavior};

use super::SizedBlob;
use super::blob_origins::content_source;
use super::blob_transfer::BlobRequest;
use super::connection_rate::Rate;
use super::connection_slots::Slot;
use super::cpu_idle::Processors;
use super::credential_offers::Source;
use super::download_resources::{Observer, Wire};
use super::error::PullError;
use super::range_scheduler::{Spans, Step};
use super::shared_downloads::SharedDownload;
use super::transfer_retry::{Break, Retries};
use oci::Digest;
use oci::registry::{BlobBody, RegistryError};
use store::access::ProofSource;
use store::growing_download::Follower;

/// The interval of checks whether another connection would help.
const LOOK: Duration = Duration::from_millis(50);
/// Bytes a second of a connection that a wire limits, and no processor.
const LITTLE: u64 = 32 << 20;
/// A mirror whose connection breaks before this is passed by, and at any place one that trickles or
/// ends its answer too early: what it saves the registry is not worth what asking it costs.
const WORTH_A_MIRROR: u64 = 1 << 20;
/// Time after which a connection returns its slot to other artifacts that wait.
const TURN: Duration = Duration::from_secs(20);
/// Time after which a connection returns its slot to a tenant that holds fewer.
const TENANT_TURN: Duration = Duration::from_secs(1);
/// Interval at which a connection checks whether it has to return its slot.
const TURN_CHECK: Duration = Duration::from_millis(250);
/// A blob whose next try is further away than this does not keep its place from those that wait for one.
const SHORT: Duration = Duration::from_secs(5);
/// The interval of checks whether another connection has become slow.
const LOOK_BEHIND: Duration = Duration::from_secs(1);

/// A message to the blocking writer.
pub(super) enum Write {
    /// Bytes and their place; the permit is the memory that they take.
    Bytes {
        /// The offset of the bytes in the blob.
        offset: u64,
        /// The bytes of the blob.
        bytes: Bytes,
        /// Given back when they are written.
        memory: OwnedSemaphorePermit,
    },
    /// The content so far is worthless. A reader that followed it follows the new content from now on, if it is kept.
    Restart(oneshot::Sender<Option<Follower>>),
    /// All bytes are there: is it the blob?
    Verify(oneshot::Sender<Digest>),
}

/// Why the work ended without a blob.
pub(super) enum Failure {
    /// The writer has failed; its own error counts.
    WriterGone,
    /// The source's failure, or the wire's.
    Failed(PullError),
    /// The source sends something else than the blob.
    Wrong(PullError),
    /// The source cannot continue the bytes of other sources. With [`PullError::BlobDigest`] all bytes
    /// are there, and are not the blob.
    CannotContinue(PullError),
}

/// One blob that is fetched from one source.
pub(super) struct Connections<'a> {
    /// The registry client, and the limits of all downloads.
    pub(super) wire: &'a Wire,
    /// The repository, and the credential that it is shown.
    pub(super) source: &'a Source,
    /// The blob to download, and for whom.
    pub(super) request: BlobRequest<'a>,
    /// The place that the blob holds while it is under way.
    pub(super) place: &'a Slot,
    /// The channel to the writer.
    pub(super) writes: mpsc::Sender<Write>,
    /// Nanoseconds for which the writer had something to do.
    pub(super) busy: Arc<AtomicU64>,
    /// The download that other repositories share, for whose waiters bytes are kept that this source
    /// cannot continue.
    pub(super) shared: Option<Arc<SharedDownload>>,
    /// Only the head of the response is needed. The request is that for the blob, with the same timeouts.
    pub(super) only_answer: bool,
    /// The state that the connections share.
    pub(super) state: Mutex<ConnectionState>,
}

/// The bytes that are missing, and what is known of the source.
pub(super) struct ConnectionState {
    spans: Spans,
    /// The rates of connections that gave way. The remaining ones are measured with them; otherwise a slow connection
    /// could always give way before it is detected.
    rates: Vec<Rate>,
    /// The number of concurrent connections; one, once ranges were refused.
    wanted: usize,
    most: usize,
    ranges: Ranges,
    /// The sources that have answered: the registry, or mirrors of it.
    answered_by: BTreeSet<ProofSource>,
    /// Set if a mirror has answered since the download began or started over.
    mirrored: bool,
    /// Bytes were on the disk before this source was asked.
    has_earlier_bytes: bool,
}

/// The source's support of range requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ranges {
    Unknown,
    Sent,
    Refused,
}

impl ConnectionState {
    /// Creates the state before the first request. `missing` is the part of the blob to fetch, by at
    /// most `most` connections.
    pub(super) fn new(missing: Spans, blob: SizedBlob, most: usize) -> Mutex<Self> {
        Mutex::new(Self {
            has_earlier_bytes: missing.missing() < blob.size,
            spans: missing,
            rates: Vec::new(),
            wanted: 1,
            most: most.max(1),
            ranges: Ranges::Unknown,
            answered_by: BTreeSet::new(),
            mirrored: false,
        })
    }
}

impl Connections<'_> {
    /// Returns whether starting over would discard bytes that a waiting source could continue.
    pub(super) fn would_discard_others_bytes(&self) -> bool {
        self.state.lock().has_earlier_bytes
            && self.shared.as_ref().is_some_and(|shared| shared.has_waiters())
    }

    /// Returns the sources that have answered, and the number of missing bytes.
    pub(super) fn outcome(&self) -> (BTreeSet<ProofSource>, u64) {
        let state = self.state.lock();
        (state.answered_by.clone(), state.spans.missing())
    }

    /// Fetches what is missing, and has it verified.
    pub(super) async fn run(&self, slot: Slot) -> Result<(), Failure> {
        let mut slot = Some(slot);
        let missing = self.state.lock().spans.missing();
        let mut retries = Retries::new(self.wire.options.retry(), self.request.blob.size, missing);
        let mut started_over = false;
        loop {
            let done = match self.bring(slot.take(), &mut retries).await {
                Ok(()) if self.only_answer => Ok(()),
                Ok(()) => self.verify().await,
                failed => failed,
            };
            let Err(Failure::Wrong(error)) = done else { return done };
            // What was here from an earlier try, or came from the registry, is no fault of theirs.
            if self.state.lock().mirrored {
                self.wire
                    .registry
                    .record_wrong_content(&self.source.repository, self.request.blob.digest);
            }
            if self.would_discard_others_bytes() {
                return Err(Failure::CannotContinue(error));
            }
            // A source may have changed under a download that was continued: once, from the start.
            if std::mem::replace(&mut started_over, true) {
                return Err(Failure::Failed(error));
            }
            // A proxy on the way may handle ranges wrongly: this attempt requests the whole blob, as any client does.
            self.refuse_ranges();
            self.restart(&mut retries).await?;
        }
    }

    /// Runs connections until nothing is missing.
    async fn bring(&self, mut slot: Option<Slot>, retries: &mut Retries) -> Result<(), Failure> {
        let mut running = FuturesUnordered::new();
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pace = WriterPace::new(&self.busy, self.state.lock().spans.missing());
        loop {
            while self.wants_more_than(running.len()) {
                let slot = match slot.take() {
                    Some(slot) => slot,
                    None if running.is_empty() => self.wire.slots.acquire(self.request.ask()).await,
                    None => match self.wire.slots.spare(&self.request.ask()) {
                        Some(slot) => slot,
                        None => break,
                    },
                };
                let Some(number) = self.take() else { break };
                running.push(self.connection(number, slot));
            }
            if running.is_empty() {
                return Ok(());
            }
            let end = tokio::select! {
                end = running.next() => end,
                _ = looks.tick() => {
                    let missing = self.state.lock().spans.missing();
                    if self.may_grow(running.len()) && pace.wire_is_slower(missing, running.len()) {
                        self.grow();
                    }
                    continue;
                }
            };
            match end {
                Some(Ok(())) | None => {}
                Some(Err(Stop::WriterGone)) => return Err(Failure::WriterGone),
                Some(Err(Stop::NoRanges)) => {
                    self.refuse_ranges();
                    if running.is_empty() {
                        if self.would_discard_others_bytes() {
                            let got = self.request.blob.size - self.state.lock().spans.missing();
                            return Err(Failure::CannotContinue(self.wrong_size(got, None)));
                        }
                        self.restart(retries).await?;
                    }
                }
                Some(Err(Stop::Broke(Break { error, .. })))
                    if error.is_unavailable() && !running.is_empty() =>
                {
                    // The others go on; as many as these are what works.
                    tracing::debug!(%error, "one of several connections broke");
                    let mut state = self.state.lock();
                    (state.most, state.wanted) = (running.len(), running.len());
                }
                Some(Err(Stop::Broke(Break { error, .. }) | Stop::Wrong(error)))
                    if !running.is_empty() =>
                {
                    // Refused what another connection is being given: one at a time will do, and
                    // hears the same if it is more than that.
                    tracing::debug!(%error, "a part was refused");
                    self.refuse_ranges();
                }
                Some(Err(Stop::Wrong(error))) => return Err(Failure::Wrong(error)),
                Some(Err(Stop::Broke(broken))) => {
                    let missing = self.state.lock().spans.missing();
                    let wait = retries.next(&broken, missing);
                    self.state.lock().wanted = 1;
                    match wait {
                        Some(wait) => {
                            self.request.progress.failed(&broken.error);
                            if !self.waits(wait).await {
                                return Err(Failure::Failed(broken.error));
                            }
                        }
                        None => return Err(Failure::Failed(broken.error)),
                    }
                }
            }
        }
    }

    /// Waits for the next try. False when that is too long a time for those who wait for a place: the
    /// kubelet comes back, and it goes on then.
    async fn waits(&self, time: Duration) -> bool {
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left > SHORT && self.wire.places.is_wanted(self.place) {
                return false;
            }
            if left.is_zero() {
                return true;
            }
            tokio::time::sleep(left.min(LOOK_BEHIND)).await;
        }
    }

    fn wants_more_than(&self, running: usize) -> bool {
        let state = self.state.lock();
        running < state.wanted && state.spans.has_open()
    }

    /// The bytes for another connection: all that are open, unless others share them.
    fn take(&self) -> Option<u32> {
        let mut state = self.state.lock();
        let limit = if state.wanted > 1 { self.wire.options.range_bytes } else { u64::MAX };
        state.spans.take(limit).map(|(number, _)| number)
    }

    fn refuse_ranges(&self) {
        let mut state = self.state.lock();
        state.ranges = Ranges::Refused;
        (state.most, state.wanted) = (1, 1);
        state.spans.join();
    }

    /// Returns whether there may be more connections than those that run.
    fn may_grow(&self, running: usize) -> bool {
        let state = self.state.lock();
        running >= state.wanted && state.wanted < state.most && state.ranges != Ranges::Refused
    }

    /// Another connection may help: at first one, to see whether the source sends parts.
    fn grow(&self) {
        let mut state = self.state.lock();
        let grown = match state.ranges {
            Ranges::Refused => return,
            Ranges::Unknown => 2,
            Ranges::Sent => state.wanted * 2,
        };
        let grown = grown.min(state.most);
        let length = self.wire.options.range_bytes;
        if grown > state.wanted && (state.spans.has_open() || state.spans.cut(length)) {
            state.wanted = grown;
        }
    }

    /// One connection, from its request to its end.
    async fn connection(&self, number: u32, slot: Slot) -> Result<(), Stop> {
        let _counted = CountedConnection::new(&*self.wire.observer);
        let end = self.stream(number, slot).await;
        self.state.lock().spans.finish(number);
        end
    }

    /// Returns the position of a connection, and the offset at which it has to stop now.
    fn span(&self, number: u32) -> Range<u64> {
        self.state.lock().spans.of(number)
    }

    async fn stream(&self, number: u32, slot: Slot) -> Result<(), Stop> {
        let body = self.open(number).await?;
        if self.only_answer {
            self.state.lock().spans.advance(number, self.request.blob.size);
            return Ok(());
        }
        let (mirror, start) = (body.mirror.clone(), self.span(number).start);
        let mut ended = self.receive(number, slot, body).await;
        if let (Err(Stop::Broke(broken)), Some(mirror)) = (&mut ended, mirror) {
            broken.passed_by = broken.trickled > 0
                || matches!(broken.error, PullError::BlobSize { .. })
                || self.span(number).start - start < WORTH_A_MIRROR;
            if broken.passed_by {
                tracing::info!(%mirror, blob = %self.request.blob.digest, "a mirror broke off: the others are asked");
                self.wire.registry.record_mirror_failure(
                    &self.source.repository,
                    self.request.blob.digest,
                    &mirror,
                );
            }
        }
        ended
    }

    async fn receive(&self, number: u32, mut slot: Slot, mut body: BlobBody) -> Result<(), Stop> {
        let rate = self.state.lock().rates.pop().map(Rate::resumed);
        let mut rate = rate.unwrap_or_else(|| {
            Rate::new(self.wire.options.least_bytes_per_second, self.wire.options.stall_timeout)
        });
        let mut since = Instant::now();
        let mut checks = tokio::time::interval_at(since + TENANT_TURN, TURN_CHECK);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let Some(next) = self.next_chunk(&mut body, &slot, since, &mut checks).await else {
                // The source may send nothing in any of its turns.
                rate.keeps(0).map_err(|trickled| self.trickles(trickled))?;
                if self.state.lock().ranges == Ranges::Sent {
                    self.state.lock().rates.push(rate.paused());
                    return Ok(());
                }
                // Another connection cannot continue a source without ranges. This one stays open,
                // and is not read until it has a slot again.
                rate = rate.paused();
                drop(slot);
                slot = self.wire.slots.acquire(self.request.ask()).await;
                (rate, since) = (rate.resumed(), Instant::now());
                continue;
            };
            let chunk = match next {
                Ok(Some(chunk)) => chunk,
                // All that was wanted is here, however it ended.
                _ if self.span(number).is_empty() => return Ok(()),
                Ok(None) => {
                    let missing = self.state.lock().spans.missing();
                    return Err(Stop::Broke(
                        self.wrong_size(self.request.blob.size - missing, body.encoding).into(),
                    ));
                }
                Err(error) => return Err(Stop::Broke(PullError::from(error).into())),
            };
            let span = self.span(number);
            let room = usize::try_from(span.end - span.start).unwrap_or(usize::MAX);
            if chunk.len() > room && span.end == self.request.blob.size {
                return Err(Stop::Wrong(
                    self.wrong_size(self.request.blob.size + 1, body.encoding),
                ));
            }
            let bytes = chunk.slice(..chunk.len().min(room));
            let length = bytes.len() as u64;
            self.wire.throttle.pass(length).await;
            let memory = self.wire.memory(bytes.len()).await.ok_or(Stop::WriterGone)?;
            // Meanwhile the end may have been cut; what is written twice is the same twice.
            let write = Write::Bytes { offset: span.start, bytes, memory };
            self.writes.send(write).await.map_err(|_| Stop::WriterGone)?;
            self.request.progress.arrived(length);
            self.wire.observer.downloaded(length);
            let step = self.state.lock().spans.advance(number, length);
            if step == Step::Complete && span.end < self.request.blob.size {
                return Ok(());
            }
            let is_kept = rate.keeps(length);
            if step == Step::More {
                is_kept.map_err(|trickled| self.trickles(trickled))?;
            }
        }
    }

    /// Returns the failure of a source that sends too little.
    fn trickles(&self, trickled: u64) -> Stop {
        Stop::Broke(Break { trickled, ..self.too_slow().into() })
    }

    /// Waits for the next bytes of a connection. None when it has to return its slot.
    async fn next_chunk(
        &self,
        body: &mut BlobBody,
        slot: &Slot,
        since: Instant,
        checks: &mut Interval,
    ) -> Option<Result<Option<Bytes>, RegistryError>> {
        let slots = &self.wire.slots;
        // One future for all checks, so that they do not restart the timeout of a silent source.
        let mut chunk = std::pin::pin!(body.chunk());
        loop {
            tokio::select! {
                chunk = &mut chunk => return Some(chunk),
                _ = checks.tick() => {
                    let elapsed = since.elapsed();
                    if elapsed > TURN && slots.is_wanted(slot)
                        || elapsed >= TENANT_TURN && slots.is_owed_to_other_tenant(slot)
                    {
                        return None;
                    }
                }
            }
        }
    }

    async fn open(&self, number: u32) -> Result<BlobBody, Stop> {
        let span = self.span(number);
        let Source { repository, credential } = self.source;
        let registry = &self.wire.registry;
        let is_part = span.start > 0 || span.end < self.request.blob.size;
        let opened = if span.end < self.request.blob.size {
            registry
                .at(repository, credential)
                .blob_range(self.request.blob.digest, span.clone())
                .await
        } else {
            registry.at(repository, credential).blob(self.request.blob.digest, span.start).await
        };
        let body = match opened {
            Ok(body) => body,
            // A part that cannot be had, or is another: the whole may be right.
            Err(RegistryError::Protocol { .. }) if is_part => return Err(Stop::NoRanges),
            Err(error) => return Err(Stop::Broke(PullError::from(error).into())),
        };
        let mut state = self.state.lock();
        if state.answered_by.is_empty() && !self.only_answer {
            // Not before: what an earlier try left is no news for whom it is refused.
            self.request.progress.resumed(self.request.blob.size - state.spans.missing());
        }
        state.answered_by.insert(content_source(&body.answered_by));
        state.mirrored |= body.mirror.is_some();
        if body.offset != span.start || (span.end < self.request.blob.size && !body.is_part) {
            return Err(Stop::NoRanges);
        }
        if body.is_part {
            state.ranges = Ranges::Sent;
        }
        drop(state);
        match body.total {
            // However often it came, it would end where it says.
            Some(total) if total != self.request.blob.size => {
                Err(Stop::Wrong(self.wrong_size(total, body.encoding)))
            }
            _ => Ok(body),
        }
    }

    async fn verify(&self) -> Result<(), Failure> {
        let (answer, digest) = oneshot::channel();
        self.send(Write::Verify(answer)).await?;
        let got = digest.await.map_err(|_| Failure::WriterGone)?;
        if got == self.request.blob.digest {
            return Ok(());
        }
        Err(Failure::Wrong(PullError::BlobDigest { expected: self.request.blob.digest, got }))
    }

    async fn restart(&self, retries: &mut Retries) -> Result<(), Failure> {
        retries.restarted();
        {
            let mut state = self.state.lock();
            self.request.progress.lost(self.request.blob.size - state.spans.missing());
            state.spans = Spans::whole(self.request.blob.size);
            state.wanted = 1;
            state.mirrored = false;
            state.has_earlier_bytes = false;
        }
        let (begun, begins) = oneshot::channel();
        self.send(Write::Restart(begun)).await?;
        if let Some(follower) = begins.await.map_err(|_| Failure::WriterGone)? {
            (self.request.follow)(follower);
        }
        Ok(())
    }

    async fn send(&self, write: Write) -> Result<(), Failure> {
        self.writes.send(write).await.map_err(|_| Failure::WriterGone)
    }

    fn wrong_size(&self, got: u64, encoding: Option<String>) -> PullError {
        let SizedBlob { digest, size: expected } = self.request.blob;
        PullError::BlobSize { digest, expected, got, encoding }
    }

    fn too_slow(&self) -> PullError {
        let repository = &self.source.repository;
        let waited = self.wire.options.stall_timeout;
        let what = format!("blob {} of {repository}", self.request.blob.digest);
        RegistryError::Timeout { host: repository.host().to_owned(), what, waited }.into()
    }
}

/// Counts a connection until it is dropped.
struct CountedConnection<'a>(&'a dyn Observer);

impl<'a> CountedConnection<'a> {
    fn new(observer: &'a dyn Observer) -> Self {
        observer.connections(1);
        Self(observer)
    }
}

impl Drop for CountedConnection<'_> {
    fn drop(&mut self) {
        self.0.connections(-1);
    }
}

/// Why a connection brings no more.
enum Stop {
    /// The source does not send parts.
    NoRanges,
    WriterGone,
    Broke(Break),
    /// The source sent something else than the blob.
    Wrong(PullError),
}

/// Measures whether bytes wait for the node, or the node for bytes.
struct WriterPace<'a> {
    busy: &'a AtomicU64,
    before: Look,
    processors: Processors,
}

struct Look {
    at: Instant,
    /// The time that the writer was busy, in nanoseconds.
    busy: u64,
    /// Bytes of the blob.
    missing: u64,
}

impl<'a> WriterPace<'a> {
    fn new(busy: &'a AtomicU64, missing: u64) -> Self {
        let before = Look { at: Instant::now(), busy: busy.load(Ordering::Relaxed), missing };
        Self { busy, before, processors: Processors::new() }
    }

    /// Returns whether the writer was idle for more than half of the time since the last check, for another reason than
    /// busy processors: they had time, or the rate of these connections is low for any processor.
    fn wire_is_slower(&mut self, missing: u64, connections: usize) -> bool {
        let now = Look { at: Instant::now(), busy: self.busy.load(Ordering::Relaxed), missing };
        let before = std::mem::replace(&mut self.before, now);
        let elapsed = self.before.at.duration_since(before.at).as_nanos();
        let worked = u128::from(self.before.busy - before.busy);
        let brought = u128::from(before.missing.saturating_sub(missing));
        let little = u128::from(LITTLE) * connections as u128 * elapsed / 1_000_000_000;
        elapsed > LOOK.as_nanos() / 2
            && worked * 2 < elapsed
            && (brought < little || self.processors.had_time())
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::response::Response;

    use super::super::testing::{TestNode, TestRegistry, broken};

    const SIZE: usize = 300_000;

    fn content() -> Vec<u8> {
        (0..SIZE).map(|place| u8::try_from(place % 251).unwrap_or_default()).collect()
    }

    /// Downloads a blob whose first answer breaks off, from a registry that answers ranges or not. Returns
    /// the first bytes of the ranges that were asked for.
    async fn pull_broken(has_ranges: bool) -> Vec<Option<usize>> {
        let (registry, node) = (TestRegistry::start().await, TestNode::new());
        let digest = registry.blob("a", &content());
        let is_first = std::sync::atomic::AtomicBool::new(true);
        registry.answer_with(move |seen| {
            if !seen.object.starts_with("blobs/") {
                return None;
            }
            if is_first.swap(false, std::sync::atomic::Ordering::Relaxed) {
                return Some(broken(content()[..SIZE / 2].to_vec(), SIZE));
            }
            (!has_ranges).then(|| Response::new(Body::from(content())))
        });
        let download = node.download(&registry, "a", &content()).await.expect("the blob");
        assert_eq!(download.partial.digest(), digest);
        registry.seen("blobs/").iter().map(|seen| seen.start).collect()
    }

    #[tokio::test]
    async fn a_broken_download_continues_where_it_stopped() {
        let starts = pull_broken(true).await;
        let [None, Some(start)] = starts[..] else { panic!("{starts:?}") };
        assert!(start > 0 && start <= SIZE / 2, "{start}");
    }

    #[tokio::test]
    async fn a_source_without_ranges_is_asked_for_the_whole_blob_again() {
        let starts = pull_broken(false).await;
        assert!(matches!(starts[..], [None, Some(_), None]), "{starts:?}");
    }
}
