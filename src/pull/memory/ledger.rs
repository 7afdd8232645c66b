//! Who gets memory next: the pure part of the budget.
//!
//! A [`Ledger`] knows how many bytes there are, who holds how many, and who waits. It grants
//! requests one at a time, in turns between tenants, and never lets a later request overtake the
//! one whose turn it is: a large request waits for those that hold memory now, and for no others.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

/// How much one tenant may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Share {
    /// For memory that is held while something is computed, which ends by itself: half of it while
    /// other tenants wait. A tenant that holds nothing may have any amount that fits.
    HalfWhileOthersWait,
    /// For memory that is held while a registry sends bytes, which may take hours: half of what
    /// other tenants leave, so that there is always some for the next one.
    HalfOfTheRest,
}

/// The identity of a request that waits.
pub(super) type RequestId = u64;

/// The bytes of one pool of memory.
#[derive(Debug)]
pub(super) struct Ledger<T> {
    capacity: u64,
    share: Share,
    held: u64,
    held_by: HashMap<T, u64>,
    /// Tenants that wait, the next one first. Each has at least one request.
    rotation: VecDeque<T>,
    waiting: HashMap<T, VecDeque<Request>>,
    next_id: RequestId,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    id: RequestId,
    bytes: u64,
}

/// A request that was granted: its bytes are held from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grant<T> {
    pub(super) id: RequestId,
    pub(super) tenant: T,
    pub(super) bytes: u64,
}

impl<T: Clone + Eq + Hash> Ledger<T> {
    pub(super) fn new(capacity: u64, share: Share) -> Self {
        Self {
            capacity,
            share,
            held: 0,
            held_by: HashMap::new(),
            rotation: VecDeque::new(),
            waiting: HashMap::new(),
            next_id: 0,
        }
    }

    /// The most that one request can get, when nobody else holds anything.
    pub(super) fn most(&self) -> u64 {
        match self.share {
            Share::HalfWhileOthersWait => self.capacity,
            Share::HalfOfTheRest => self.capacity / 2,
        }
    }

    /// Bytes that nobody holds.
    pub(super) fn free(&self) -> u64 {
        self.capacity.saturating_sub(self.held)
    }

    /// Whether nothing is held and nobody waits.
    #[cfg(test)]
    pub(super) fn is_untouched(&self) -> bool {
        self.held == 0 && self.held_by.is_empty() && self.waiting.is_empty()
    }

    /// Queues a request of at most [`Ledger::most`] bytes.
    pub(super) fn request(&mut self, tenant: T, bytes: u64) -> RequestId {
        debug_assert!(bytes <= self.most(), "it would wait for ever");
        let id = self.next_id;
        self.next_id += 1;
        let queue = self.waiting.entry(tenant.clone()).or_default();
        if queue.is_empty() {
            self.rotation.push_back(tenant);
        }
        queue.push_back(Request { id, bytes });
        id
    }

    /// Withdraws a request that waits.
    pub(super) fn withdraw(&mut self, tenant: &T, id: RequestId) {
        if let Some(queue) = self.waiting.get_mut(tenant) {
            queue.retain(|request| request.id != id);
            if queue.is_empty() {
                self.waiting.remove(tenant);
                self.rotation.retain(|waiting| waiting != tenant);
            }
        }
    }

    /// Gives bytes back.
    pub(super) fn release(&mut self, tenant: &T, bytes: u64) {
        self.held = self.held.saturating_sub(bytes);
        if let Some(held) = self.held_by.get_mut(tenant) {
            *held = held.saturating_sub(bytes);
            if *held == 0 {
                self.held_by.remove(tenant);
            }
        }
    }

    /// Grants the next request, if it may have its bytes now.
    pub(super) fn grant(&mut self) -> Option<Grant<T>> {
        let turn = self.rotation.iter().position(|tenant| self.is_within_share(tenant))?;
        let tenant = self.rotation.get(turn)?.clone();
        let queue = self.waiting.get_mut(&tenant)?;
        let Request { id, bytes } = *queue.front()?;
        // Nobody else goes first meanwhile: the request would never fit.
        if bytes > self.capacity.saturating_sub(self.held) {
            return None;
        }
        queue.pop_front();
        let has_more = !queue.is_empty();
        self.rotation.remove(turn);
        if has_more {
            self.rotation.push_back(tenant.clone());
        } else {
            self.waiting.remove(&tenant);
        }
        self.held += bytes;
        *self.held_by.entry(tenant.clone()).or_default() += bytes;
        Some(Grant { id, tenant, bytes })
    }

    /// Whether the tenant's next request stays within its share.
    fn is_within_share(&self, tenant: &T) -> bool {
        let own = self.held_by.get(tenant).copied().unwrap_or_default();
        let next = self.waiting.get(tenant).and_then(VecDeque::front);
        let then = own.saturating_add(next.map_or(0, |next| next.bytes));
        match self.share {
            Share::HalfWhileOthersWait => {
                own == 0 || then <= self.capacity / 2 || self.rotation.len() == 1
            }
            Share::HalfOfTheRest => then <= self.capacity.saturating_sub(self.held - own) / 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CAPACITY: u64 = 100;

    fn grants(ledger: &mut Ledger<u8>) -> Vec<(u8, u64)> {
        std::iter::from_fn(|| ledger.grant()).map(|grant| (grant.tenant, grant.bytes)).collect()
    }

    fn ledger(share: Share) -> Ledger<u8> {
        Ledger::new(CAPACITY, share)
    }

    #[test]
    fn tenants_take_turns() {
        let mut ledger = ledger(Share::HalfWhileOthersWait);
        ledger.request(0, 100);
        assert_eq!(grants(&mut ledger), [(0, 100)]);
        for tenant in [1, 1, 1, 2, 3] {
            ledger.request(tenant, 20);
        }
        assert_eq!(grants(&mut ledger), []);
        ledger.release(&0, 100);
        assert_eq!(grants(&mut ledger), [(1, 20), (2, 20), (3, 20), (1, 20), (1, 20)]);
    }

    #[test]
    fn a_tenant_has_half_while_others_wait_and_all_when_none_does() {
        let mut ledger = ledger(Share::HalfWhileOthersWait);
        ledger.request(1, 40);
        ledger.request(1, 40);
        assert_eq!(grants(&mut ledger), [(1, 40), (1, 40)]);
        ledger.release(&1, 40);
        ledger.request(1, 20);
        ledger.request(2, 70);
        // The second tenant is next, and what it waits for is not taken away from it.
        assert_eq!(grants(&mut ledger), []);
        ledger.release(&1, 40);
        assert_eq!(grants(&mut ledger), [(1, 20), (2, 70)]);
    }

    #[test]
    fn memory_that_is_held_for_long_leaves_half_to_the_next_tenant() {
        let mut ledger = ledger(Share::HalfOfTheRest);
        for tenant in [1, 2, 3] {
            (0..20).for_each(|_| {
                ledger.request(tenant, 5);
            });
        }
        let granted = grants(&mut ledger);
        let of = |tenant| granted.iter().filter(|(of, _)| *of == tenant).count();
        assert!(of(1) <= 10 && of(1) > 0 && of(2) > 0 && of(3) > 0, "{granted:?}");
        assert!(ledger.free() > 0);
        ledger.request(4, ledger.free() / 2);
        assert_eq!(grants(&mut ledger).len(), 1, "a tenant that comes late gets some");
    }

    #[test]
    fn a_withdrawn_request_blocks_nobody() {
        let mut ledger = ledger(Share::HalfWhileOthersWait);
        ledger.request(1, 90);
        assert_eq!(grants(&mut ledger), [(1, 90)]);
        let large = ledger.request(2, 100);
        ledger.request(3, 5);
        assert_eq!(grants(&mut ledger), []);
        ledger.withdraw(&2, large);
        assert_eq!(grants(&mut ledger), [(3, 5)]);
    }

    proptest! {
        /// Whatever is asked for in whatever order: the capacity and the shares hold at every step,
        /// and as soon as holders give back, everything that waits is granted.
        #[test]
        fn nothing_waits_for_ever(
            requests in prop::collection::vec((0..5_u8, 1..=CAPACITY), 1..40),
            releases in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
            lasting in any::<bool>(),
        ) {
            let share = if lasting { Share::HalfOfTheRest } else { Share::HalfWhileOthersWait };
            let mut ledger = ledger(share);
            let mut held: Vec<Grant<u8>> = Vec::new();
            let (mut granted, wanted) = (0, requests.len());
            let mut releases = releases.into_iter();
            let mut requests = requests.into_iter();
            loop {
                if let Some((tenant, bytes)) = requests.next() {
                    ledger.request(tenant, bytes.min(ledger.most()));
                }
                while let Some(grant) = ledger.grant() {
                    granted += 1;
                    held.push(grant);
                    let sum: u64 = held.iter().map(|grant| grant.bytes).sum();
                    prop_assert!(sum <= CAPACITY);
                    let own: Vec<_> =
                        held.iter().filter(|other| other.tenant == grant.tenant).collect();
                    let others_wait =
                        ledger.waiting.keys().any(|tenant| *tenant != grant.tenant);
                    let of_tenant: u64 = own.iter().map(|grant| grant.bytes).sum();
                    prop_assert!(own.len() == 1 || !others_wait || of_tenant <= CAPACITY / 2);
                }
                if requests.len() == 0 && held.is_empty() {
                    break;
                }
                // A holder never waits for memory, so that each gives back in the end.
                let place = releases.next().map(|place| place.index(held.len().max(1)));
                if requests.len() == 0 || place.is_some() {
                    let place = place.unwrap_or_default();
                    if place < held.len() {
                        let Grant { tenant, bytes, .. } = held.swap_remove(place);
                        ledger.release(&tenant, bytes);
                    }
                }
            }
            prop_assert_eq!(granted, wanted);
            prop_assert_eq!(ledger.free(), CAPACITY);
            prop_assert!(ledger.rotation.is_empty() && ledger.waiting.is_empty());
            prop_assert!(ledger.held_by.is_empty());
        }
    }
}
