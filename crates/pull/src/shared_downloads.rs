//! One download of a blob that all repositories of a registry host share.
//!
//! One flight at a time has the turn, and adds to the bytes that are on the disk. Flights of other
//! repositories wait for the turn, which offers their repositories as sources. A slow source loses
//! the turn to one that was faster or that was not measured yet. The next source continues where
//! the last one stopped. Turns are fair between tenants: the many slow repositories of one tenant
//! do not keep the repository of another from being measured.
//!
//! The bytes of several sources together may not have the right digest. Then they are thrown away,
//! and for a while each repository downloads the blob into a file of its own
//! ([`SharedDownloads::isolate`]). So no source can spoil or delay the download of another for long.
//! The bytes of one repository prove nothing for another: each flight asks its own repository.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::artifact_request::Priority;
use super::pull_progress::Progress;
use super::pull_tenant::Tenant;
use oci::{Digest, Repository};
use sys::weak_map::WeakMap;

/// Time over which the rate of a source is measured. A connection is at full speed by then.
const WINDOW: Duration = Duration::from_secs(3);
/// Interval between two measurements.
const CHECK: Duration = Duration::from_millis(500);
/// Rate in bytes a second from which a source keeps its turn against sources without a measurement.
const FAST: u64 = 1 << 20;
/// Remaining time for which a download stays with its source.
const SHORT: Duration = Duration::from_secs(5);
/// Rate in bytes a second at which the next source hashes the bytes on the disk, on a slow processor.
const HASH_RATE: u64 = 256 << 20;
/// The most doublings of the time before the next turn of a tenant that has had many.
const MOST_DOUBLINGS: u32 = 6;
/// The number of measured repositories from which those that no longer wait are forgotten.
const MAXIMUM_RATES: usize = 256;
/// The most blobs whose sources are isolated.
const MAXIMUM_ISOLATED: usize = 1024;
/// Time for which the sources of a blob are isolated.
const ISOLATION: Duration = Duration::from_mins(10);

/// A registry host and the digest of a blob.
type BlobOfHost = (String, Digest);

/// The shared downloads of a node.
#[derive(Default)]
pub(super) struct SharedDownloads {
    under_way: WeakMap<BlobOfHost, SharedDownload>,
    /// Blobs whose sources are isolated, each with the time since when, oldest first.
    isolated: Mutex<VecDeque<(BlobOfHost, Instant)>>,
}

/// The turns at the download of one blob of a host.
#[derive(Default)]
pub(super) struct SharedDownload(Mutex<DownloadState>);

#[derive(Default)]
struct DownloadState {
    is_taken: bool,
    /// Waiters in the order of their arrival.
    waiting: Vec<DownloadWaiter>,
    next: u64,
    /// The last measured rate of each repository in bytes a second.
    rates: HashMap<Repository, u64>,
    /// The number of turns that each tenant has had.
    turns: HashMap<Tenant, u32>,
    /// The waiter that the turn was taken away for.
    promised: Option<u64>,
}

/// A flight that waits for the turn, and offers its repository as a source.
struct DownloadWaiter {
    number: u64,
    repository: Repository,
    flight: Arc<Progress>,
    grant: oneshot::Sender<DownloadTurn>,
}

/// The right to add to a download. Dropping it passes the turn to the next waiter.
pub(super) struct DownloadTurn(pub(super) Arc<SharedDownload>);

/// A measurement of the source that has the turn.
#[derive(Clone, Copy, Debug)]
struct SourcePace {
    /// The rate in bytes a second.
    rate: u64,
    /// The time since the turn began.
    elapsed: Duration,
    /// Bytes on the disk.
    here: u64,
    missing: u64,
}

/// The measurement of a source that waits.
#[derive(Clone, Copy, Debug)]
struct WaitingSource {
    /// The rate in bytes a second, if it was measured.
    rate: Option<u64>,
    /// The number of turns of its tenant.
    turns: u32,
}

impl SharedDownloads {
    /// Returns the download of a blob, and begins it if no flight has it.
    pub(super) fn of(&self, host: &str, digest: Digest) -> Arc<SharedDownload> {
        self.under_way.get((host.to_owned(), digest), SharedDownload::default)
    }

    /// Isolates the sources of a blob, since their bytes together did not have its digest.
    pub(super) fn isolate(&self, host: &str, digest: Digest) {
        self.share_again(host, digest);
        let mut all = self.isolated.lock();
        if all.len() >= MAXIMUM_ISOLATED {
            all.pop_front();
        }
        all.push_back(((host.to_owned(), digest), Instant::now()));
    }

    /// Ends the isolation of the sources of a blob that the administrator has imported.
    pub(super) fn share_again(&self, host: &str, digest: Digest) {
        self.isolated.lock().retain(|((of, blob), _)| of != host || *blob != digest);
    }

    /// Returns whether each repository has to download the blob by itself.
    pub(super) fn is_isolated(&self, host: &str, digest: Digest) -> bool {
        let mut all = self.isolated.lock();
        while all.front().is_some_and(|(_, since)| since.elapsed() >= ISOLATION) {
            all.pop_front();
        }
        all.iter().any(|((of, blob), _)| of == host && *blob == digest)
    }
}

impl SharedDownload {
    /// Returns the state, without waiters that have left.
    fn lock(&self) -> MutexGuard<'_, DownloadState> {
        let mut state = self.0.lock();
        state.waiting.retain(|waiting| !waiting.grant.is_closed());
        state
    }

    /// Takes the turn if it is free.
    pub(super) fn try_take(self: &Arc<Self>, flight: &Progress) -> Option<DownloadTurn> {
        let mut state = self.lock();
        if state.is_taken {
            return None;
        }
        Some(self.begin_turn(&mut state, flight))
    }

    /// Waits for the turn, and offers a repository as a source meanwhile. Safe to cancel.
    pub(super) async fn wait(
        self: &Arc<Self>,
        repository: &Repository,
        flight: &Arc<Progress>,
    ) -> DownloadTurn {
        loop {
            let (grant, granted) = oneshot::channel();
            {
                let mut state = self.lock();
                if !state.is_taken {
                    return self.begin_turn(&mut state, flight);
                }
                let number = state.next;
                state.next += 1;
                let (repository, flight) = (repository.clone(), Arc::clone(flight));
                state.waiting.push(DownloadWaiter { number, repository, flight, grant });
            }
            // Fails only if the turn was dropped with the channel; then it is waited for again.
            if let Ok(turn) = granted.await {
                return turn;
            }
        }
    }

    /// Returns whether another flight waits for the turn.
    pub(super) fn has_waiters(&self) -> bool {
        !self.lock().waiting.is_empty()
    }

    /// Waits until the source that has the turn loses it to another one. The rate of the source is
    /// that of its flight.
    pub(super) async fn until_lost(&self, repository: &Repository, flight: &Progress) {
        let mut samples = VecDeque::new();
        let mut since = Instant::now();
        loop {
            if flight.is_hashing() {
                since = Instant::now();
                samples.clear();
            }
            let now = Instant::now();
            samples.push_back((now, flight.fetched()));
            while samples.len() > 1 && now.duration_since(samples[1].0) >= WINDOW {
                samples.pop_front();
            }
            let (began, before) = samples[0];
            let measured = now.duration_since(began);
            if measured >= WINDOW {
                let brought = flight.fetched().saturating_sub(before);
                let milliseconds = u64::try_from(measured.as_millis()).unwrap_or(u64::MAX);
                let rate = brought.saturating_mul(1000) / milliseconds.max(1);
                let (here, missing) = flight.here_and_missing();
                let pace = SourcePace { rate, elapsed: now.duration_since(since), here, missing };
                if self.lock().promise_turn(repository, flight.priority(), pace) {
                    return;
                }
            }
            tokio::time::sleep(CHECK).await;
        }
    }

    fn begin_turn(self: &Arc<Self>, state: &mut DownloadState, flight: &Progress) -> DownloadTurn {
        state.is_taken = true;
        for tenant in flight.tenants() {
            let turns = state.turns.entry(tenant).or_default();
            *turns = turns.saturating_add(1);
        }
        DownloadTurn(Arc::clone(self))
    }

    /// Passes the turn to the next waiter.
    fn pass_turn(self: &Arc<Self>) {
        let mut state = self.lock();
        let promised = state.promised.take();
        let promised = promised.and_then(|promised| {
            state.waiting.iter().position(|waiting| waiting.number == promised)
        });
        let Some(next) = promised.or_else(|| state.next_waiter()) else {
            state.is_taken = false;
            return;
        };
        let DownloadWaiter { flight, grant, .. } = state.waiting.remove(next);
        let turn = self.begin_turn(&mut state, &flight);
        // A turn that the waiter does not accept is dropped, which passes it on.
        drop(state);
        let _ = grant.send(turn);
    }
}

impl DownloadState {
    /// Returns the place of the waiter that is next when the turn ends by itself.
    fn next_waiter(&self) -> Option<usize> {
        (0..self.waiting.len()).min_by_key(|&place| self.turn_order(place))
    }

    /// Returns the key by which waiters are ordered: priority, turns of the tenant, arrival.
    fn turn_order(&self, place: usize) -> (Priority, u32, usize) {
        let flight = &self.waiting[place].flight;
        (flight.priority(), self.turns_of(flight), place)
    }

    /// Returns the turns of the tenant of a flight that has had the fewest.
    fn turns_of(&self, flight: &Progress) -> u32 {
        let tenants = flight.tenants().into_iter();
        let turns = tenants.map(|tenant| self.turns.get(&tenant).copied().unwrap_or_default());
        turns.min().unwrap_or_default()
    }

    /// Records the rate of the source that has the turn, and promises the turn to a better source.
    /// Returns whether there is one.
    fn promise_turn(
        &mut self,
        repository: &Repository,
        priority: Priority,
        pace: SourcePace,
    ) -> bool {
        if self.rates.len() >= MAXIMUM_RATES {
            self.rates.retain(|of, _| self.waiting.iter().any(|waiting| waiting.repository == *of));
        }
        self.rates.insert(repository.clone(), pace.rate);
        let winner = (0..self.waiting.len())
            .filter(|&place| {
                let DownloadWaiter { repository, flight, .. } = &self.waiting[place];
                let rate = self.rates.get(repository).copied();
                // A flight of warming takes no turn from one of a pod.
                flight.priority() <= priority
                    && pace.loses_to(WaitingSource { rate, turns: self.turns_of(flight) })
            })
            .min_by_key(|&place| self.turn_order(place));
        self.promised = winner.map(|place| self.waiting[place].number);
        self.promised.is_some()
    }
}

impl SourcePace {
    /// Returns whether the source loses its turn to one that waits.
    fn loses_to(self, other: WaitingSource) -> bool {
        let worth = SHORT + Duration::from_secs(self.here / HASH_RATE);
        let is_short = self.missing <= self.rate.saturating_mul(worth.as_secs());
        if is_short {
            return false;
        }
        if let Some(rate) = other.rate {
            return rate >= self.rate.saturating_mul(2).max(1);
        }
        let patience = WINDOW * (1 << other.turns.min(MOST_DOUBLINGS));
        self.rate < FAST && self.elapsed >= patience
    }
}

impl Drop for DownloadTurn {
    fn drop(&mut self) {
        self.0.pass_turn();
    }
}

#[cfg(test)]
mod tests {
    use super::super::Caller;
    use super::*;

    fn flight(namespace: &str) -> Arc<Progress> {
        let flight = Arc::new(Progress::default());
        let tenant = Tenant::Namespace(namespace.into());
        flight.enter(&Caller::new(Priority::Pod, tenant));
        flight.expect(1 << 40);
        flight
    }

    fn repository(name: &str) -> Repository {
        let reference: oci::Reference = format!("r.io/{name}").parse().unwrap();
        reference.repository().clone()
    }

    fn slow(seconds: u64) -> SourcePace {
        let elapsed = Duration::from_secs(seconds);
        SourcePace { rate: 2048, elapsed, here: 0, missing: 1 << 30 }
    }

    #[test]
    fn a_source_is_kept_where_another_is_not_worth_the_change() {
        let unknown = WaitingSource { rate: None, turns: 0 };
        assert!(slow(3).loses_to(unknown));
        assert!(!SourcePace { rate: FAST, ..slow(3) }.loses_to(unknown), "it is fast enough");
        assert!(!SourcePace { missing: 10_000, ..slow(3) }.loses_to(unknown), "it soon ends");
        let rest = SourcePace { missing: 2048 * 10, ..slow(3) };
        assert!(rest.loses_to(unknown));
        assert!(!SourcePace { here: 8 << 30, ..rest }.loses_to(unknown), "hashing takes longer");
        for (rate, is_faster) in [(0, false), (2048, false), (4095, false), (4096, true)] {
            assert_eq!(
                slow(3).loses_to(WaitingSource { rate: Some(rate), turns: 9 }),
                is_faster,
                "{rate}"
            );
        }
        let fast = SourcePace { rate: FAST, ..slow(3) };
        assert!(fast.loses_to(WaitingSource { rate: Some(2 * FAST), turns: 0 }));
        let silent = SourcePace { rate: 0, ..slow(3) };
        assert!(
            !silent.loses_to(WaitingSource { rate: Some(0), turns: 0 }),
            "no more than this one"
        );
    }

    #[test]
    fn a_tenant_of_many_slow_sources_has_ever_rarer_turns() {
        let other = WaitingSource { rate: None, turns: 3 };
        assert!(!slow(23).loses_to(other));
        assert!(slow(24).loses_to(other));
        let other = WaitingSource { rate: None, turns: 1000 };
        assert!(slow(192).loses_to(other));
    }

    #[tokio::test]
    async fn the_turn_goes_to_the_tenant_that_had_the_fewest() {
        let download: Arc<SharedDownload> = Arc::default();
        let (many, few) = (flight("many"), flight("few"));
        let turn = download.try_take(&many).expect("free");
        assert!(download.try_take(&few).is_none());
        let (first, second) = (repository("first"), repository("second"));
        let mut of_many = Box::pin(download.wait(&first, &many));
        let mut of_few = Box::pin(download.wait(&second, &few));
        assert!(futures_util::poll!(&mut of_many).is_pending());
        assert!(futures_util::poll!(&mut of_few).is_pending());
        drop(turn);
        assert!(futures_util::poll!(&mut of_many).is_pending(), "it came first, and had one");
        let std::task::Poll::Ready(turn) = futures_util::poll!(&mut of_few) else {
            panic!("it is the next")
        };
        drop(of_many);
        drop(turn);
        assert!(download.try_take(&many).is_some(), "one that has left has no turn");
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_is_silent_loses_its_turn_once_to_each_that_is_no_better() {
        let download: Arc<SharedDownload> = Arc::default();
        let (slow, other) = (flight("slow"), flight("other"));
        let (first, second) = (repository("first"), repository("second"));
        let turn = download.try_take(&slow).expect("free");
        let hour = Duration::from_hours(1);
        let alone = tokio::time::timeout(hour, download.until_lost(&first, &slow)).await;
        assert!(alone.is_err(), "nobody else wants it");
        let mut waiting = Box::pin(download.wait(&second, &other));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        slow.hashes(true);
        let hashes = tokio::time::timeout(hour, download.until_lost(&first, &slow)).await;
        assert!(hashes.is_err(), "no byte could come");
        slow.hashes(false);
        download.until_lost(&first, &slow).await;
        drop(turn);
        let _turn = waiting.await;
        let mut back = Box::pin(download.wait(&first, &slow));
        assert!(futures_util::poll!(&mut back).is_pending());
        let kept = tokio::time::timeout(hour, download.until_lost(&second, &other)).await;
        assert!(kept.is_err(), "the first was no faster");
    }

    #[tokio::test(start_paused = true)]
    async fn sources_are_isolated_for_a_while() {
        let downloads = SharedDownloads::default();
        let (blob, other) = (Digest::of(b"blob"), Digest::of(b"other"));
        downloads.isolate("r.io", blob);
        assert!(downloads.is_isolated("r.io", blob));
        assert!(!downloads.is_isolated("r.io", other) && !downloads.is_isolated("s.io", blob));
        tokio::time::advance(ISOLATION).await;
        assert!(!downloads.is_isolated("r.io", blob));
    }

    #[tokio::test(start_paused = true)]
    async fn a_blob_that_is_isolated_again_and_again_displaces_no_other() {
        let downloads = SharedDownloads::default();
        let (blob, other) = (Digest::of(b"blob"), Digest::of(b"other"));
        downloads.isolate("r.io", other);
        for _ in 0..MAXIMUM_ISOLATED {
            downloads.isolate("r.io", blob);
        }
        assert!(downloads.is_isolated("r.io", other) && downloads.is_isolated("r.io", blob));
    }

    #[test]
    fn rates_of_repositories_that_have_left_are_forgotten() {
        let mut state = DownloadState::default();
        for number in 0..10 * MAXIMUM_RATES {
            state.promise_turn(
                &repository(&format!("repository-{number}")),
                Priority::Pod,
                slow(3),
            );
        }
        assert!(state.rates.len() <= MAXIMUM_RATES, "{}", state.rates.len());
    }
}
