//! A download that several repositories of a registry host can continue.
//!
//! One flight at a time adds to the bytes that are here of a blob of a host. All others that want
//! the blob wait for their turn, and offer their own repository as its source by that. A source
//! that is slow loses its turn to one that has not been measured yet, or that was faster; the next
//! one goes on where it stopped. The order of turns is fair between tenants: one that offers many
//! slow repositories does not keep another's from being measured.
//!
//! What several sources have sent may not be the blob. Who finds that out throws it away, and from
//! then on each repository fetches the blob into a file of its own for a while
//! ([`SharedDownloads::is_mixed_up`]), so that no source can spoil or hold up another's.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::progress::Progress;
use super::tenant::Tenant;
use super::want::Priority;
use crate::oci::{Digest, Repository};

/// Time over which the rate of a source is measured: a connection is at its speed by then.
const WINDOW: Duration = Duration::from_secs(3);
/// Time between two looks at how many bytes have come.
const CHECK: Duration = Duration::from_millis(500);
/// Bytes a second of a source that is not worth comparing with one that has not been measured.
const FAST: u64 = 1 << 20;
/// A download that would end within this time stays where it is.
const SHORT: Duration = Duration::from_secs(5);
/// Bytes a second at which the next one hashes what is here, on a slow processor.
const HASH_RATE: u64 = 256 << 20;
/// A tenant's turn is worth so many doublings of the time that others have before its next one.
const MOST_DOUBLINGS: u32 = 6;
/// Blobs whose sources are kept apart, and for how long.
const MAXIMUM_MIXED_UP: usize = 1024;
const MIXED_UP: Duration = Duration::from_mins(10);

/// A blob of a registry host.
type Blob = (String, Digest);

/// All downloads of a node.
#[derive(Debug, Default)]
pub(super) struct SharedDownloads {
    under_way: Mutex<HashMap<Blob, Weak<SharedDownload>>>,
    /// The blobs of which several sources have sent other bytes, oldest first.
    mixed_up: Mutex<VecDeque<(Blob, Instant)>>,
}

/// The turns at one blob of a host.
#[derive(Debug, Default)]
pub(super) struct SharedDownload(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    is_taken: bool,
    /// In the order in which they came.
    waiting: Vec<Waiting>,
    next: u64,
    /// Bytes a second of each repository when it last had a turn.
    rates: HashMap<Repository, u64>,
    /// Turns that each tenant has had.
    turns: HashMap<Tenant, u32>,
    /// Who the turn was given up for.
    promised: Option<u64>,
}

#[derive(Debug)]
struct Waiting {
    number: u64,
    repository: Repository,
    flight: Arc<Progress>,
    grant: oneshot::Sender<DownloadTurn>,
}

/// The right to add to a download. Dropping it gives the turn to the next.
#[derive(Debug)]
pub(super) struct DownloadTurn(Arc<SharedDownload>);

/// How a source does that has the turn.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// Bytes a second.
    rate: u64,
    /// How long it has had the turn.
    elapsed: Duration,
    /// Bytes that are here.
    here: u64,
    missing: u64,
}

/// One that waits, as the source that has the turn sees it.
#[derive(Clone, Copy, Debug)]
struct Rival {
    /// Bytes a second, if it was measured.
    rate: Option<u64>,
    /// Turns of its tenant.
    turns: u32,
}

impl SharedDownloads {
    /// Returns the turns at a blob.
    pub(super) fn of(&self, host: &str, digest: Digest) -> Arc<SharedDownload> {
        let mut all = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, download| download.strong_count() > 0);
        let key = (host.to_owned(), digest);
        let known = all.get(&key).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let download = Arc::default();
            all.insert(key, Arc::downgrade(&download));
            download
        })
    }

    /// Records that the bytes of several sources were not the blob.
    pub(super) fn mix_up(&self, host: &str, digest: Digest) {
        let mut all = self.mixed_up.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= MAXIMUM_MIXED_UP {
            all.pop_front();
        }
        all.push_back(((host.to_owned(), digest), Instant::now()));
    }

    /// Forgets that the bytes of several sources were not the blob: the administrator has brought it.
    pub(super) fn share_again(&self, host: &str, digest: Digest) {
        let mut all = self.mixed_up.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|((of, blob), _)| of != host || *blob != digest);
    }

    /// Whether each repository has to fetch the blob by itself.
    pub(super) fn is_mixed_up(&self, host: &str, digest: Digest) -> bool {
        let mut all = self.mixed_up.lock().unwrap_or_else(PoisonError::into_inner);
        while all.front().is_some_and(|(_, since)| since.elapsed() >= MIXED_UP) {
            all.pop_front();
        }
        all.iter().any(|((of, blob), _)| of == host && *blob == digest)
    }
}

impl SharedDownload {
    /// Takes the turn, if it is free.
    pub(super) fn try_take(self: &Arc<Self>, flight: &Progress) -> Option<DownloadTurn> {
        let mut state = self.state();
        if state.is_taken {
            return None;
        }
        Some(self.take(&mut state, flight))
    }

    /// Waits for the turn, and offers a repository by that. Safe to cancel.
    pub(super) async fn wait(
        self: &Arc<Self>,
        repository: &Repository,
        flight: &Arc<Progress>,
    ) -> DownloadTurn {
        loop {
            let (grant, granted) = oneshot::channel();
            let number = {
                let mut state = self.state();
                if !state.is_taken {
                    return self.take(&mut state, flight);
                }
                let number = state.next;
                state.next += 1;
                let (repository, flight) = (repository.clone(), Arc::clone(flight));
                state.waiting.push(Waiting { number, repository, flight, grant });
                number
            };
            let _leaving = Leaving { download: self, number };
            // A sender is dropped only with its turn in it, which is given on then.
            if let Ok(turn) = granted.await {
                return turn;
            }
        }
    }

    /// Whether anybody waits.
    pub(super) fn is_wanted(&self) -> bool {
        !self.state().waiting.is_empty()
    }

    /// Returns when the source that has the turn has lost it to another one. Its flight counts the
    /// bytes.
    pub(super) async fn is_lost(&self, repository: &Repository, flight: &Progress) {
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
                let pace = Pace { rate, elapsed: now.duration_since(since), here, missing };
                if self.state().loses(repository, flight.priority(), pace) {
                    return;
                }
            }
            tokio::time::sleep(CHECK).await;
        }
    }

    fn take(self: &Arc<Self>, state: &mut State, flight: &Progress) -> DownloadTurn {
        state.is_taken = true;
        for tenant in flight.tenants() {
            let turns = state.turns.entry(tenant).or_default();
            *turns = turns.saturating_add(1);
        }
        DownloadTurn(Arc::clone(self))
    }

    /// Gives the turn to the next.
    fn give(self: &Arc<Self>) {
        let mut state = self.state();
        let promised = state.promised.take();
        let promised = promised.and_then(|promised| {
            state.waiting.iter().position(|waiting| waiting.number == promised)
        });
        let Some(next) = promised.or_else(|| state.first()) else {
            state.is_taken = false;
            return;
        };
        let Waiting { flight, grant, .. } = state.waiting.remove(next);
        let turn = self.take(&mut state, &flight);
        // One that was not accepted is dropped, which gives it to the next.
        drop(state);
        let _ = grant.send(turn);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DownloadTurn {
    /// Returns the download that it is a turn at.
    pub(super) fn download(&self) -> &Arc<SharedDownload> {
        &self.0
    }
}

impl State {
    /// Which of those that wait is next when the turn ends by itself.
    fn first(&self) -> Option<usize> {
        (0..self.waiting.len()).min_by_key(|&place| self.rank(place))
    }

    fn rank(&self, place: usize) -> (Priority, u32, usize) {
        let Waiting { flight, .. } = &self.waiting[place];
        (flight.priority(), self.turns_of(flight), place)
    }

    /// Turns that the tenants of a flight have had; of several, those of the one with the fewest.
    fn turns_of(&self, flight: &Progress) -> u32 {
        let tenants = flight.tenants().into_iter();
        let turns = tenants.map(|tenant| self.turns.get(&tenant).copied().unwrap_or_default());
        turns.min().unwrap_or_default()
    }

    /// Whether the source that has the turn loses it, which is promised to the winner then.
    fn loses(&mut self, repository: &Repository, priority: Priority, pace: Pace) -> bool {
        self.rates.insert(repository.clone(), pace.rate);
        let winner = (0..self.waiting.len())
            .filter(|&place| {
                let Waiting { repository, flight, .. } = &self.waiting[place];
                let rate = self.rates.get(repository).copied();
                // What no pod waits for may be slow for that alone.
                flight.priority() <= priority
                    && pace.loses_to(Rival { rate, turns: self.turns_of(flight) })
            })
            .min_by_key(|&place| self.rank(place));
        self.promised = winner.map(|place| self.waiting[place].number);
        self.promised.is_some()
    }
}

impl Pace {
    fn loses_to(self, rival: Rival) -> bool {
        let worth = SHORT + Duration::from_secs(self.here / HASH_RATE);
        let is_short = self.missing <= self.rate.saturating_mul(worth.as_secs());
        if is_short {
            return false;
        }
        if let Some(rate) = rival.rate {
            return rate >= self.rate.saturating_mul(2).max(1);
        }
        let patience = WINDOW * (1 << rival.turns.min(MOST_DOUBLINGS));
        self.rate < FAST && self.elapsed >= patience
    }
}

struct Leaving<'a> {
    download: &'a SharedDownload,
    number: u64,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.download.state().waiting.retain(|waiting| waiting.number != self.number);
    }
}

impl Drop for DownloadTurn {
    fn drop(&mut self) {
        self.0.give();
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
        let reference: crate::oci::Reference = format!("r.io/{name}").parse().unwrap();
        reference.repository().clone()
    }

    fn slow(seconds: u64) -> Pace {
        let elapsed = Duration::from_secs(seconds);
        Pace { rate: 2048, elapsed, here: 0, missing: 1 << 30 }
    }

    #[test]
    fn a_source_is_kept_where_another_is_not_worth_the_change() {
        let unknown = Rival { rate: None, turns: 0 };
        assert!(slow(3).loses_to(unknown));
        assert!(!Pace { rate: FAST, ..slow(3) }.loses_to(unknown), "it is fast enough");
        assert!(!Pace { missing: 10_000, ..slow(3) }.loses_to(unknown), "it soon ends");
        let rest = Pace { missing: 2048 * 10, ..slow(3) };
        assert!(rest.loses_to(unknown));
        assert!(!Pace { here: 8 << 30, ..rest }.loses_to(unknown), "hashing takes longer");
        for (rate, is_faster) in [(0, false), (2048, false), (4095, false), (4096, true)] {
            assert_eq!(slow(3).loses_to(Rival { rate: Some(rate), turns: 9 }), is_faster, "{rate}");
        }
        let fast = Pace { rate: FAST, ..slow(3) };
        assert!(fast.loses_to(Rival { rate: Some(2 * FAST), turns: 0 }));
        let silent = Pace { rate: 0, ..slow(3) };
        assert!(!silent.loses_to(Rival { rate: Some(0), turns: 0 }), "no more than this one");
    }

    #[test]
    fn a_tenant_of_many_slow_sources_has_ever_rarer_turns() {
        let rival = Rival { rate: None, turns: 3 };
        assert!(!slow(23).loses_to(rival));
        assert!(slow(24).loses_to(rival));
        let rival = Rival { rate: None, turns: 1000 };
        assert!(slow(192).loses_to(rival));
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
        let alone = tokio::time::timeout(hour, download.is_lost(&first, &slow)).await;
        assert!(alone.is_err(), "nobody else wants it");
        let mut waiting = Box::pin(download.wait(&second, &other));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        slow.hashes(true);
        let hashes = tokio::time::timeout(hour, download.is_lost(&first, &slow)).await;
        assert!(hashes.is_err(), "no byte could come");
        slow.hashes(false);
        download.is_lost(&first, &slow).await;
        drop(turn);
        let _turn = waiting.await;
        let mut back = Box::pin(download.wait(&first, &slow));
        assert!(futures_util::poll!(&mut back).is_pending());
        let kept = tokio::time::timeout(hour, download.is_lost(&second, &other)).await;
        assert!(kept.is_err(), "the first was no faster");
    }

    #[tokio::test(start_paused = true)]
    async fn sources_that_were_mixed_up_are_kept_apart_for_a_while() {
        let downloads = SharedDownloads::default();
        let (blob, other) = (Digest::of(b"blob"), Digest::of(b"other"));
        downloads.mix_up("r.io", blob);
        assert!(downloads.is_mixed_up("r.io", blob));
        assert!(!downloads.is_mixed_up("r.io", other) && !downloads.is_mixed_up("s.io", blob));
        tokio::time::advance(MIXED_UP).await;
        assert!(!downloads.is_mixed_up("r.io", blob));
    }
}
