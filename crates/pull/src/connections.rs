//! The connections that bring one blob.
//!
//! The first asks for the whole blob, as everybody does. While the node waits for
//! bytes, and not bytes for the node, nor for its processors, more connections take pieces of it ([`Spans`]),
//! for as long as the registry answers ranges with ranges. A connection that breaks
//! leaves its rest to the others, or to the next try; with it goes one connection of
//! what the registry is trusted to serve at once. Only the last one's break is a try
//! that failed: while others run, the transfer does.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::{Instant, Interval, MissedTickBehavior};

use super::error::PullError;
use super::idle::Processors;
use super::origins::content_source;
use super::progress::Progress;
use super::rate::Rate;
use super::retry::{Break, Retries};
use super::shared_downloads::SharedDownload;
use super::slots::{Ask, Slot};
use super::spans::{Spans, Step};
use super::sponsors::Source;
use super::wire::{Observer, Wire};
use oci::Digest;
use oci::registry::{BlobBody, RegistryError};
use store::access::ProofSource;
use store::growth::Follower;

/// How often it is looked whether another connection would help.
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
/// How often it is looked whether somebody does.
const LOOK_BEHIND: Duration = Duration::from_secs(1);

/// What the blocking side is told.
pub enum Write {
    /// Bytes and their place; the permit is the memory that they take.
    Bytes {
        /// Where they belong.
        offset: u64,
        /// Themselves.
        bytes: Bytes,
        /// Given back when they are written.
        memory: OwnedSemaphorePermit,
    },
    /// What is there is worth nothing. Whoever followed it follows this from now on, if it is kept.
    Restart(oneshot::Sender<Option<Follower>>),
    /// All bytes are there: is it the blob?
    Verify(oneshot::Sender<Digest>),
}

/// Why the work ended without a blob.
pub enum Failure {
    /// The writer has failed; its own error counts.
    WriterGone,
    /// The source's failure, or the wire's.
    Failed(PullError),
    /// What the source sends is not the blob.
    Wrong(PullError),
    /// The source cannot continue the bytes of other sources. With [`PullError::BlobDigest`] all bytes
    /// are there, and are not the blob.
    CannotContinue(PullError),
}

/// One blob that is fetched from one source.
pub struct Connections<'a> {
    wire: &'a Wire,
    source: &'a Source,
    digest: Digest,
    size: u64,
    ask: Ask,
    /// Which it holds while it is under way.
    place: &'a Slot,
    progress: &'a Progress,
    writes: mpsc::Sender<Write>,
    /// Nanoseconds for which the writer had something to do.
    busy: Arc<AtomicU64>,
    follow: &'a (dyn Fn(Follower) + Send + Sync),
    /// The download that other repositories share.
    shared: Option<Arc<SharedDownload>>,
    /// Whether the head of an answer is all that is wanted.
    only_answer: bool,
    state: Mutex<State>,
}

/// What the connections share.
struct State {
    spans: Spans,
    /// Of connections that gave way: those that go on are measured with them, as one that is slow
    /// could else always be given up before it was found out.
    rates: Vec<Rate>,
    /// How many connections at once; none works beside another once ranges were refused.
    wanted: usize,
    most: usize,
    ranges: Ranges,
    /// Who has answered: the registry, or mirrors of it.
    answered_by: BTreeSet<ProofSource>,
    /// Whether one of its mirrors has, since the download began or started over.
    mirrored: bool,
    /// Bytes were on the disk before this source was asked.
    has_earlier_bytes: bool,
}

/// Whether the source sends parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ranges {
    Unknown,
    Sent,
    Refused,
}

/// How a connection ended.
enum End {
    /// It brought what it was to bring, or gave way to others.
    Done,
    /// The source does not send parts.
    NoRanges,
    Broke(Break),
    /// What it was sent is not the blob.
    Wrong(PullError),
    WriterGone,
}

impl<'a> Connections<'a> {
    /// Nothing is asked for yet. `spans` is what is missing; `follow` is given a reader of the blob
    /// each time that it starts over.
    pub fn new(
        wire: &'a Wire,
        source: &'a Source,
        (digest, size): (Digest, u64),
        (ask, place, progress): (Ask, &'a Slot, &'a Progress),
        (writes, busy): (mpsc::Sender<Write>, Arc<AtomicU64>),
        (spans, follow): (Spans, &'a (dyn Fn(Follower) + Send + Sync)),
    ) -> Self {
        let most = wire.options.connections.max(1);
        let ranges = Ranges::Unknown;
        let (rates, answered_by, mirrored) = (Vec::new(), BTreeSet::new(), false);
        let has_earlier_bytes = spans.missing() < size;
        let state = State {
            spans,
            rates,
            wanted: 1,
            most,
            ranges,
            answered_by,
            mirrored,
            has_earlier_bytes,
        };
        let state = Mutex::new(state);
        Self {
            wire,
            source,
            digest,
            size,
            ask,
            place,
            progress,
            writes,
            busy,
            follow,
            shared: None,
            only_answer: false,
            state,
        }
    }

    /// Asks as for the blob, with the same patience, and reads no more than the head of the answer.
    #[must_use]
    pub fn only_answer(self) -> Self {
        self.state().most = 1;
        Self { only_answer: true, ..self }
    }

    /// Keeps bytes that this source cannot continue for the waiters of a shared download.
    #[must_use]
    pub(super) fn sharing(self, shared: Option<Arc<SharedDownload>>) -> Self {
        Self { shared, ..self }
    }

    /// Returns whether starting over would discard bytes that a waiting source could continue.
    pub fn would_discard_others_bytes(&self) -> bool {
        self.state().has_earlier_bytes
            && self.shared.as_ref().is_some_and(|shared| shared.has_waiters())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who has answered, and bytes that never came.
    pub fn outcome(&self) -> (BTreeSet<ProofSource>, u64) {
        let state = self.state();
        (state.answered_by.clone(), state.spans.missing())
    }

    /// Fetches what is missing, and has it verified.
    pub async fn run(&self, slot: Slot) -> Result<(), Failure> {
        let mut slot = Some(slot);
        let missing = self.state().spans.missing();
        let mut retries = Retries::new(self.wire.options.retry, self.size, missing);
        let mut started_over = false;
        loop {
            let done = match self.bring(slot.take(), &mut retries).await {
                Ok(()) if self.only_answer => Ok(()),
                Ok(()) => self.verify().await,
                failed => failed,
            };
            let Err(Failure::Wrong(error)) = done else { return done };
            // What was here from an earlier try, or came from the registry, is no fault of theirs.
            if self.state().mirrored {
                self.wire.registry.distrust_mirrors(&self.source.repository, self.digest);
            }
            if self.would_discard_others_bytes() {
                return Err(Failure::CannotContinue(error));
            }
            // A source may have changed under a download that was continued: once, from the start.
            if std::mem::replace(&mut started_over, true) {
                return Err(Failure::Failed(error));
            }
            // Parts may be what a proxy on the way gets wrong: this time it is asked as everybody asks.
            self.refuse_ranges();
            self.restart(&mut retries).await?;
        }
    }

    /// Runs connections until nothing is missing.
    async fn bring(&self, mut slot: Option<Slot>, retries: &mut Retries) -> Result<(), Failure> {
        let mut running = FuturesUnordered::new();
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pace = Pace::new(&self.busy, self.state().spans.missing());
        loop {
            while self.wants_more_than(running.len()) {
                let slot = match slot.take() {
                    Some(slot) => slot,
                    None if running.is_empty() => self.wire.slots.acquire(self.ask.clone()).await,
                    None => match self.wire.slots.spare(&self.ask) {
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
                    let missing = self.state().spans.missing();
                    if self.may_grow(running.len()) && pace.wire_is_slower(missing, running.len()) {
                        self.grow();
                    }
                    continue;
                }
            };
            match end {
                Some(End::Done) | None => {}
                Some(End::WriterGone) => return Err(Failure::WriterGone),
                Some(End::NoRanges) => {
                    self.refuse_ranges();
                    if running.is_empty() {
                        if self.would_discard_others_bytes() {
                            let got = self.size - self.state().spans.missing();
                            return Err(Failure::CannotContinue(self.wrong_size(got)));
                        }
                        self.restart(retries).await?;
                    }
                }
                Some(End::Broke(Break { error, .. }))
                    if error.is_unavailable() && !running.is_empty() =>
                {
                    // The others go on; as many as these are what works.
                    tracing::debug!(%error, "one of several connections broke");
                    let mut state = self.state();
                    (state.most, state.wanted) = (running.len(), running.len());
                }
                Some(End::Broke(Break { error, .. }) | End::Wrong(error))
                    if !running.is_empty() =>
                {
                    // Refused what another connection is being given: one at a time will do, and
                    // hears the same if it is more than that.
                    tracing::debug!(%error, "a part was refused");
                    self.refuse_ranges();
                }
                Some(End::Wrong(error)) => return Err(Failure::Wrong(error)),
                Some(End::Broke(broken)) => {
                    let missing = self.state().spans.missing();
                    let wait = retries.next(&broken, missing);
                    self.state().wanted = 1;
                    match wait {
                        Some(wait) => {
                            self.progress.failed(&broken.error);
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
        let state = self.state();
        running < state.wanted && state.spans.has_open()
    }

    /// The bytes for another connection: all that are open, unless others share them.
    fn take(&self) -> Option<u32> {
        let mut state = self.state();
        let limit = if state.wanted > 1 { self.wire.options.range_bytes } else { u64::MAX };
        state.spans.take(limit).map(|(number, _)| number)
    }

    fn refuse_ranges(&self) {
        let mut state = self.state();
        state.ranges = Ranges::Refused;
        (state.most, state.wanted) = (1, 1);
        state.spans.join();
    }

    /// Whether there may be more connections than those that run.
    fn may_grow(&self, running: usize) -> bool {
        let state = self.state();
        running >= state.wanted && state.wanted < state.most && state.ranges != Ranges::Refused
    }

    /// Another connection may help: at first one, to see whether the source sends parts.
    fn grow(&self) {
        let mut state = self.state();
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
    async fn connection(&self, number: u32, slot: Slot) -> End {
        let _counted = Counted::new(&*self.wire.observer);
        let end = self.stream(number, slot).await;
        self.state().spans.finish(number);
        match end {
            Ok(()) => End::Done,
            Err(Stop::NoRanges) => End::NoRanges,
            Err(Stop::WriterGone) => End::WriterGone,
            Err(Stop::Broke(broken)) => End::Broke(broken),
            Err(Stop::Wrong(error)) => End::Wrong(error),
        }
    }

    /// Where a connection is, and where it has to stop now.
    fn span(&self, number: u32) -> Range<u64> {
        self.state().spans.of(number)
    }

    async fn stream(&self, number: u32, slot: Slot) -> Result<(), Stop> {
        let body = self.open(number).await?;
        if self.only_answer {
            self.state().spans.advance(number, self.size);
            return Ok(());
        }
        let (mirror, start) = (body.mirror.clone(), self.span(number).start);
        let mut ended = self.receive(number, slot, body).await;
        if let (Err(Stop::Broke(broken)), Some(mirror)) = (&mut ended, mirror) {
            broken.passed_by = broken.trickled > 0
                || matches!(broken.error, PullError::BlobSize { .. })
                || self.span(number).start - start < WORTH_A_MIRROR;
            if broken.passed_by {
                tracing::info!(%mirror, blob = %self.digest, "a mirror broke off: the others are asked");
                self.wire.registry.pass_by(&self.source.repository, self.digest, &mirror);
            }
        }
        ended
    }

    async fn receive(&self, number: u32, mut slot: Slot, mut body: BlobBody) -> Result<(), Stop> {
        let rate = self.state().rates.pop().map(Rate::resumed);
        let mut rate = rate.unwrap_or_else(|| {
            Rate::new(self.wire.options.least_rate, self.wire.options.rate_window)
        });
        let mut since = Instant::now();
        let mut checks = tokio::time::interval_at(since + TENANT_TURN, TURN_CHECK);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let Some(next) = self.next_chunk(&mut body, &slot, since, &mut checks).await else {
                // The source may send nothing in any of its turns.
                rate.keeps(0).map_err(|trickled| self.trickles(trickled))?;
                if self.state().ranges == Ranges::Sent {
                    self.state().rates.push(rate.paused());
                    return Ok(());
                }
                // Another connection cannot continue a source without ranges. This one stays open,
                // and is not read until it has a slot again.
                rate = rate.paused();
                drop(slot);
                slot = self.wire.slots.acquire(self.ask.clone()).await;
                (rate, since) = (rate.resumed(), Instant::now());
                continue;
            };
            let chunk = match next {
                Ok(Some(chunk)) => chunk,
                // All that was wanted is here, however it ended.
                _ if self.span(number).is_empty() => return Ok(()),
                Ok(None) => {
                    let missing = self.state().spans.missing();
                    return Err(Stop::Broke(self.wrong_size(self.size - missing).into()));
                }
                Err(error) => return Err(Stop::Broke(PullError::from(error).into())),
            };
            let span = self.span(number);
            let room = usize::try_from(span.end - span.start).unwrap_or(usize::MAX);
            if chunk.len() > room && span.end == self.size {
                return Err(Stop::Wrong(self.wrong_size(self.size + 1)));
            }
            let bytes = chunk.slice(..chunk.len().min(room));
            let length = bytes.len() as u64;
            self.wire.throttle.pass(length).await;
            let memory = self.wire.memory(bytes.len()).await.ok_or(Stop::WriterGone)?;
            // Meanwhile the end may have been cut; what is written twice is the same twice.
            let write = Write::Bytes { offset: span.start, bytes, memory };
            self.writes.send(write).await.map_err(|_| Stop::WriterGone)?;
            self.progress.arrived(length);
            self.wire.observer.downloaded(length);
            let step = self.state().spans.advance(number, length);
            if step == Step::Complete && span.end < self.size {
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
        let is_part = span.start > 0 || span.end < self.size;
        let opened = if span.end < self.size {
            registry.blob_range(repository, self.digest, span.clone(), credential).await
        } else {
            registry.blob(repository, self.digest, span.start, credential).await
        };
        let body = match opened {
            Ok(body) => body,
            // A part that cannot be had, or is another: the whole may be right.
            Err(RegistryError::Protocol { .. }) if is_part => return Err(Stop::NoRanges),
            Err(error) => return Err(Stop::Broke(PullError::from(error).into())),
        };
        let mut state = self.state();
        if state.answered_by.is_empty() && !self.only_answer {
            // Not before: what an earlier try left is no news for whom it is refused.
            self.progress.resumed(self.size - state.spans.missing());
        }
        state.answered_by.insert(content_source(&body.answered_by));
        state.mirrored |= body.mirror.is_some();
        if body.offset != span.start || (span.end < self.size && !body.is_part) {
            return Err(Stop::NoRanges);
        }
        if body.is_part {
            state.ranges = Ranges::Sent;
        }
        drop(state);
        match body.total {
            // However often it came, it would end where it says.
            Some(total) if total != self.size => Err(Stop::Wrong(self.wrong_size(total))),
            _ => Ok(body),
        }
    }

    async fn verify(&self) -> Result<(), Failure> {
        let (answer, digest) = oneshot::channel();
        self.send(Write::Verify(answer)).await?;
        let got = digest.await.map_err(|_| Failure::WriterGone)?;
        if got == self.digest {
            return Ok(());
        }
        Err(Failure::Wrong(PullError::BlobDigest { expected: self.digest, got }))
    }

    async fn restart(&self, retries: &mut Retries) -> Result<(), Failure> {
        retries.restarted();
        {
            let mut state = self.state();
            self.progress.lost(self.size - state.spans.missing());
            state.spans = Spans::whole(self.size);
            state.wanted = 1;
            state.mirrored = false;
            state.has_earlier_bytes = false;
        }
        let (begun, begins) = oneshot::channel();
        self.send(Write::Restart(begun)).await?;
        if let Some(follower) = begins.await.map_err(|_| Failure::WriterGone)? {
            (self.follow)(follower);
        }
        Ok(())
    }

    async fn send(&self, write: Write) -> Result<(), Failure> {
        self.writes.send(write).await.map_err(|_| Failure::WriterGone)
    }

    fn wrong_size(&self, got: u64) -> PullError {
        PullError::BlobSize { digest: self.digest, expected: self.size, got }
    }

    fn too_slow(&self) -> PullError {
        let repository = &self.source.repository;
        let waited = self.wire.options.rate_window;
        let what = format!("blob {} of {repository}", self.digest);
        RegistryError::Timeout { host: repository.host().to_owned(), what, waited }.into()
    }
}

/// A connection, as long as somebody looks at it.
struct Counted<'a>(&'a dyn Observer);

impl<'a> Counted<'a> {
    fn new(observer: &'a dyn Observer) -> Self {
        observer.connections(1);
        Self(observer)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.connections(-1);
    }
}

/// Why a connection brings no more.
enum Stop {
    NoRanges,
    WriterGone,
    Broke(Break),
    Wrong(PullError),
}

/// Whether bytes wait for the node, or the node for bytes.
struct Pace<'a> {
    busy: &'a AtomicU64,
    before: Look,
    processors: Processors,
}

struct Look {
    at: Instant,
    /// Of the writer, in nanoseconds.
    busy: u64,
    /// Bytes of the blob.
    missing: u64,
}

impl<'a> Pace<'a> {
    fn new(busy: &'a AtomicU64, missing: u64) -> Self {
        let before = Look { at: Instant::now(), busy: busy.load(Ordering::Relaxed), missing };
        Self { busy, before, processors: Processors::new() }
    }

    /// Whether the writer had nothing to do for more than half of the time since the last look, and
    /// not because the processors had too much: they had time, or what so many connections have
    /// brought is little for any processor.
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
