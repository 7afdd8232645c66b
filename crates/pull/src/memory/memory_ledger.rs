//! The bookkeeping of one memory pool, without locks and wakers.
//!
//! A [`MemoryLedger`] counts the bytes that each tenant holds, and queues the requests that wait. It
//! grants one request at a time, in rotation between tenants. A request that is next in turn is never
//! overtaken, so that a large one waits only for the memory that is held now.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

use super::MemoryWait;

/// The rule that limits the bytes of one tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TenantShare {
    /// Half of the capacity while other tenants wait, or one request of any size. It suits memory
    /// that is held by computations, which end by themselves.
    HalfWhileOthersWait,
    /// Half of what other tenants leave, so that the next one always finds some. It suits memory
    /// that is held while a registry sends bytes, which may take hours.
    HalfOfTheRest,
}

/// The identity of a request that waits.
pub(super) type RequestId = u64;

/// The capacity, the holders and the queue of one memory pool.
pub(super) struct MemoryLedger<T> {
    capacity: u64,
    share: TenantShare,
    held: u64,
    held_by: HashMap<T, u64>,
    /// The tenants that wait, in the order of their turns. Each has at least one request.
    rotation: VecDeque<T>,
    waiting: HashMap<T, VecDeque<MemoryRequest>>,
    next_id: RequestId,
}

#[derive(Clone, Copy, Debug)]
struct MemoryRequest {
    id: RequestId,
    bytes: u64,
}

/// A granted request, whose bytes count as held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MemoryGrant<T> {
    pub(super) id: RequestId,
    pub(super) tenant: T,
    pub(super) bytes: u64,
}

impl<T: Clone + Eq + Hash> MemoryLedger<T> {
    pub(super) fn new(capacity: u64, share: TenantShare) -> Self {
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

    /// Returns the size of the largest request that can be granted when no other bytes are held.
    pub(super) fn largest_request(&self) -> u64 {
        match self.share {
            TenantShare::HalfWhileOthersWait => self.capacity,
            TenantShare::HalfOfTheRest => self.capacity / 2,
        }
    }

    /// Returns the bytes that are not held.
    pub(super) fn free(&self) -> u64 {
        self.capacity.saturating_sub(self.held)
    }

    /// Returns the state of a request of a tenant.
    pub(super) fn state_of(&self, tenant: &T, bytes: u64) -> MemoryWait {
        let (held, share) = (self.held_by(tenant), self.share_of(tenant));
        MemoryWait { needs: bytes, free: self.free(), capacity: self.capacity, held, share }
    }

    /// Returns whether no bytes are held and no request waits.
    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.held == 0 && self.held_by.is_empty() && self.waiting.is_empty()
    }

    /// Queues a request of at most [`MemoryLedger::largest_request`] bytes.
    pub(super) fn request(&mut self, tenant: T, bytes: u64) -> RequestId {
        debug_assert!(bytes <= self.largest_request(), "it would wait for ever");
        let id = self.next_id;
        self.next_id += 1;
        let queue = self.waiting.entry(tenant.clone()).or_default();
        if queue.is_empty() {
            self.rotation.push_back(tenant);
        }
        queue.push_back(MemoryRequest { id, bytes });
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

    /// Returns bytes of a tenant to the pool.
    pub(super) fn release(&mut self, tenant: &T, bytes: u64) {
        self.held = self.held.saturating_sub(bytes);
        if let Some(held) = self.held_by.get_mut(tenant) {
            *held = held.saturating_sub(bytes);
            if *held == 0 {
                self.held_by.remove(tenant);
            }
        }
    }

    /// Grants the next request in turn. None if it does not fit yet or no tenant may hold more.
    pub(super) fn grant(&mut self) -> Option<MemoryGrant<T>> {
        let turn = self.rotation.iter().position(|tenant| self.is_within_share(tenant))?;
        let tenant = self.rotation.get(turn)?.clone();
        let free = self.free();
        let queue = self.waiting.get_mut(&tenant)?;
        let MemoryRequest { id, bytes } = *queue.front()?;
        // A later request is not granted first: this one might never fit then.
        if bytes > free {
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
        Some(MemoryGrant { id, tenant, bytes })
    }

    /// Returns whether the next request of a tenant stays within its share.
    fn is_within_share(&self, tenant: &T) -> bool {
        let next = self.waiting.get(tenant).and_then(VecDeque::front);
        let bytes = next.map_or(0, |next| next.bytes);
        self.held_by(tenant).saturating_add(bytes) <= self.share_of(tenant)
    }

    /// Returns the most bytes that a tenant may hold now.
    fn share_of(&self, tenant: &T) -> u64 {
        let own = self.held_by(tenant);
        match self.share {
            TenantShare::HalfOfTheRest => self.capacity.saturating_sub(self.held - own) / 2,
            TenantShare::HalfWhileOthersWait => {
                let others_wait = self.rotation.iter().any(|waiting| waiting != tenant);
                if own > 0 && others_wait { self.capacity / 2 } else { self.capacity }
            }
        }
    }

    fn held_by(&self, tenant: &T) -> u64 {
        self.held_by.get(tenant).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CAPACITY: u64 = 100;

    fn grants(ledger: &mut MemoryLedger<u8>) -> Vec<(u8, u64)> {
        std::iter::from_fn(|| ledger.grant()).map(|grant| (grant.tenant, grant.bytes)).collect()
    }

    fn ledger(share: TenantShare) -> MemoryLedger<u8> {
        MemoryLedger::new(CAPACITY, share)
    }

    #[test]
    fn tenants_take_turns() {
        let mut ledger = ledger(TenantShare::HalfWhileOthersWait);
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
        let mut ledger = ledger(TenantShare::HalfWhileOthersWait);
        ledger.request(1, 40);
        ledger.request(1, 40);
        assert_eq!(grants(&mut ledger), [(1, 40), (1, 40)]);
        ledger.release(&1, 40);
        ledger.request(1, 20);
        ledger.request(2, 70);
        // The second tenant is next in turn, and is not overtaken.
        assert_eq!(grants(&mut ledger), []);
        ledger.release(&1, 40);
        assert_eq!(grants(&mut ledger), [(1, 20), (2, 70)]);
    }

    #[test]
    fn a_tenant_that_comes_late_finds_half_of_the_rest() {
        let mut ledger = ledger(TenantShare::HalfOfTheRest);
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
    fn a_withdrawn_request_blocks_no_other() {
        let mut ledger = ledger(TenantShare::HalfWhileOthersWait);
        ledger.request(1, 90);
        assert_eq!(grants(&mut ledger), [(1, 90)]);
        let large = ledger.request(2, 100);
        ledger.request(3, 5);
        assert_eq!(grants(&mut ledger), []);
        ledger.withdraw(&2, large);
        assert_eq!(grants(&mut ledger), [(3, 5)]);
    }

    proptest! {
        /// Checks that the capacity and the shares hold at every step, for requests in any order, and
        /// that every request is granted once the holders return their bytes.
        #[test]
        fn nothing_waits_for_ever(
            requests in prop::collection::vec((0..5_u8, 1..=CAPACITY), 1..40),
            releases in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
            lasting in any::<bool>(),
        ) {
            let share = if lasting { TenantShare::HalfOfTheRest } else { TenantShare::HalfWhileOthersWait };
            let mut ledger = ledger(share);
            let mut held: Vec<MemoryGrant<u8>> = Vec::new();
            let (mut granted, wanted) = (0, requests.len());
            let mut releases = releases.into_iter();
            let mut requests = requests.into_iter();
            loop {
                if let Some((tenant, bytes)) = requests.next() {
                    ledger.request(tenant, bytes.min(ledger.largest_request()));
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
                // A holder never waits for memory, so that each returns its bytes in the end.
                let place = releases.next().map(|place| place.index(held.len().max(1)));
                if requests.len() == 0 || place.is_some() {
                    let place = place.unwrap_or_default();
                    if place < held.len() {
                        let MemoryGrant { tenant, bytes, .. } = held.swap_remove(place);
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
