//! Shares connections fairly. A slot is a connection that downloads a blob, or the place of a running blob.
//!
//! Slots are given one at a time to the request that [`choose`] picks: publishes before warming, then the tenant that
//! has the fewest, then the artifact, then the order of arrival. A host has no more than its share, so that one that
//! trickles leaves connections for the others. Warming has half of all slots at most, so that a pod need not wait until
//! it releases one.
//!
//! A tenant holds at most [`HELD_FOR_EACH_FREE`] slots for each slot that is free. One tenant alone leaves a quarter of
//! all slots free, and two leave a seventh, so that the next tenant seldom waits. If it does,
//! [`Slots::is_owed_to_other_tenant`] tells tenants with more slots to return theirs.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::oneshot;

use super::artifact_request::Priority;
use super::pull_progress::Progress;
use super::pull_tenant::Tenant;
use sys::background::Background;

/// Slots that one tenant may hold for each slot that is free. A tenant alone gets three quarters of
/// all slots, as many as one registry by default.
const HELD_FOR_EACH_FREE: usize = 3;

/// All slots of a node. Cheap to clone.
#[derive(Clone)]
pub(super) struct Slots {
    shared: Arc<SharedSlots>,
    background: Background,
}

struct SharedSlots {
    total: usize,
    per_host: usize,
    /// Slots that a tenant may hold for each free one, usually [`HELD_FOR_EACH_FREE`].
    held_for_each_free: usize,
    state: Mutex<SlotState>,
}

#[derive(Default)]
struct SlotState {
    /// In the order in which they came.
    waiting: Vec<Waiting>,
    taken: usize,
    /// The slots of warming.
    behind: usize,
    by_tenant: HashMap<Tenant, usize>,
    by_artifact: HashMap<u64, usize>,
    by_host: HashMap<String, usize>,
}

struct Waiting {
    ask: Ask,
    grant: oneshot::Sender<Slot>,
}

/// A request for a slot.
#[derive(Clone)]
pub(super) struct Ask {
    /// The flight, with its priority and tenants, which may change while it waits.
    pub(super) urgency: Arc<Progress>,
    /// The artifact that it is for, as a number that is unique to it.
    pub(super) artifact: u64,
    /// The host of its registry.
    pub(super) host: String,
    /// It goes before other requests of its tenant, since it holds what other tenants wait for.
    pub(super) is_first: bool,
}

/// The right to one connection or blob. Dropping it gives it to the next.
pub(super) struct Slot {
    shared: Arc<SharedSlots>,
    priority: Priority,
    tenant: Tenant,
    artifact: u64,
    host: String,
}

impl Ask {
    /// Returns the request of a flight for something that has no host and no artifact.
    pub(super) fn without_host(flight: &Arc<Progress>) -> Self {
        let urgency = Arc::clone(flight);
        Self { urgency, artifact: 0, host: String::new(), is_first: false }
    }
}

impl Slots {
    /// `total` slots, of which one host may have `per_host`.
    pub(super) fn new(total: usize, per_host: usize, background: Background) -> Self {
        let state = Mutex::default();
        let (total, per_host) = (total.max(1), per_host.max(1));
        let shared = SharedSlots { total, per_host, held_for_each_free: HELD_FOR_EACH_FREE, state };
        Self { shared: Arc::new(shared), background }
    }

    /// Creates `total` slots without shares: one host or tenant may hold all while no other waits.
    pub(super) fn without_reserve(total: usize, background: Background) -> Self {
        let (total, state) = (total.max(1), Mutex::default());
        let shared = SharedSlots { total, per_host: total, held_for_each_free: total, state };
        Self { shared: Arc::new(shared), background }
    }

    /// Waits for a slot. Safe to cancel.
    pub(super) async fn acquire(&self, ask: Ask) -> Slot {
        if ask.urgency.priority() == Priority::Warm || self.shared.lock().behind == 0 {
            return self.wait(ask).await;
        }
        // What warming has it may hold on to while it gives way.
        self.background.boost_while(self.wait(ask)).await
    }

    async fn wait(&self, ask: Ask) -> Slot {
        loop {
            let (grant, mut granted) = oneshot::channel();
            self.shared.lock().waiting.push(Waiting { ask: ask.clone(), grant });
            let granted = loop {
                // A pod or a tenant that joins the flight may have what the others may not.
                let changed = ask.urgency.changed();
                self.shared.give();
                tokio::select! {
                    biased;
                    slot = &mut granted => break slot,
                    () = changed => {}
                }
            };
            // A sender is dropped only with its slot in it; then the next turn is ours.
            if let Ok(slot) = granted {
                return slot;
            }
        }
    }

    /// Returns a slot that no other request could use now, to speed up a download. A request that waits for the end of
    /// others of its kind or its host is not served sooner if the slot stays free.
    #[must_use]
    pub(super) fn spare(&self, ask: &Ask) -> Option<Slot> {
        let mut state = self.shared.lock();
        let is_wanted = state.waiting.iter().any(|waiting| self.shared.may(&state, &waiting.ask));
        let is_free = !is_wanted && state.taken < self.shared.total;
        (is_free && self.shared.may(&state, ask)).then(|| self.shared.take(&mut state, ask))
    }

    /// Returns whether a request waits that could use this slot.
    pub(super) fn is_wanted(&self, slot: &Slot) -> bool {
        let state = self.shared.lock();
        state.waiting.iter().any(|waiting| self.shared.could_use(&state, &waiting.ask, slot))
    }

    /// Returns whether another tenant waits that could use this slot, and that would hold fewer slots
    /// than the tenant of this one even then.
    pub(super) fn is_owed_to_other_tenant(&self, slot: &Slot) -> bool {
        let state = self.shared.lock();
        let held = state.held_by(&slot.tenant);
        state.waiting.iter().any(|Waiting { ask, .. }| {
            ask.urgency.priority() <= slot.priority
                && state.tenant_of(ask).1 + 1 < held
                && self.shared.could_use(&state, ask, slot)
        })
    }

    /// Slots in use.
    pub(super) fn taken(&self) -> usize {
        self.shared.lock().taken
    }
}

impl SharedSlots {
    /// Returns the state, without requests whose callers have left.
    fn lock(&self) -> MutexGuard<'_, SlotState> {
        let mut state = self.state.lock();
        state.waiting.retain(|waiting| !waiting.grant.is_closed());
        state
    }

    /// Returns the most slots that warming may have.
    fn most_behind(&self) -> usize {
        (self.total.min(self.per_host) / 2).max(1)
    }

    /// Returns whether the request may have one of the free slots.
    fn may(&self, state: &SlotState, ask: &Ask) -> bool {
        let stays_behind =
            ask.urgency.priority() == Priority::Pod || state.behind < self.most_behind();
        let free = self.total.saturating_sub(state.taken);
        let (_, held) = state.tenant_of(ask);
        stays_behind
            && state.has_room(&ask.host, self.per_host)
            && held < self.held_for_each_free * free
    }

    /// Returns whether a request could have this slot if the slot were free.
    fn could_use(&self, state: &SlotState, ask: &Ask, slot: &Slot) -> bool {
        let of_host = ask.host == slot.host || state.has_room(&ask.host, self.per_host);
        let of_kind = ask.urgency.priority() == Priority::Pod
            || slot.priority == Priority::Warm
            || state.behind < self.most_behind();
        let (tenant, held) = state.tenant_of(ask);
        let held = held - usize::from(tenant == slot.tenant);
        let free = self.total + 1 - state.taken;
        of_host && of_kind && held < self.held_for_each_free * free
    }

    fn take(self: &Arc<Self>, state: &mut SlotState, ask: &Ask) -> Slot {
        let priority = ask.urgency.priority();
        let (tenant, _) = state.tenant_of(ask);
        state.taken += 1;
        state.behind += usize::from(priority == Priority::Warm);
        *state.by_tenant.entry(tenant.clone()).or_default() += 1;
        *state.by_artifact.entry(ask.artifact).or_default() += 1;
        *state.by_host.entry(ask.host.clone()).or_default() += 1;
        let (artifact, host) = (ask.artifact, ask.host.clone());
        Slot { shared: Arc::clone(self), priority, tenant, artifact, host }
    }

    /// Gives free slots to those who wait.
    fn give(self: &Arc<Self>) {
        let mut state = self.state.lock();
        // Outlives the lock: dropping a slot takes it.
        let mut refused = Vec::new();
        while state.taken < self.total {
            let asks = state.waiting.iter().map(|waiting| &waiting.ask);
            let Some(chosen) = choose(asks, &state, |ask| self.may(&state, ask)) else { break };
            let Waiting { ask, grant, .. } = state.waiting.remove(chosen);
            let slot = self.take(&mut state, &ask);
            if let Err(slot) = grant.send(slot) {
                // The caller has gone between its request and its slot.
                refused.push(slot);
            }
        }
        drop(state);
    }
}

impl SlotState {
    /// Returns the tenant that a slot is charged to, and the number of slots that it holds. Of several
    /// tenants that wait for the same flight it is the one with the fewest.
    fn tenant_of(&self, ask: &Ask) -> (Tenant, usize) {
        let tenants = ask.urgency.tenants().into_iter();
        let held = tenants.map(|tenant| {
            let held = self.held_by(&tenant);
            (tenant, held)
        });
        held.min_by_key(|(_, held)| *held)
            .unwrap_or_else(|| (Tenant::Config, self.held_by(&Tenant::Config)))
    }

    fn held_by(&self, tenant: &Tenant) -> usize {
        self.by_tenant.get(tenant).copied().unwrap_or_default()
    }

    fn has_room(&self, host: &str, per_host: usize) -> bool {
        self.by_host.get(host).copied().unwrap_or_default() < per_host
    }
}

/// Chooses the next of the waiting requests.
fn choose<'a>(
    waiting: impl Iterator<Item = &'a Ask>,
    state: &SlotState,
    may: impl Fn(&Ask) -> bool,
) -> Option<usize> {
    let held_by = |artifact: &u64| state.by_artifact.get(artifact).copied().unwrap_or_default();
    waiting
        .enumerate()
        .filter(|(_, ask)| may(ask))
        .min_by_key(|(place, ask)| {
            let (_, of_tenant) = state.tenant_of(ask);
            (ask.urgency.priority(), of_tenant, !ask.is_first, held_by(&ask.artifact), *place)
        })
        .map(|(place, _)| place)
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.taken -= 1;
        state.behind -= usize::from(self.priority == Priority::Warm);
        release(&mut state.by_tenant, &self.tenant);
        release(&mut state.by_artifact, &self.artifact);
        release(&mut state.by_host, &self.host);
        drop(state);
        self.shared.give();
    }
}

fn release<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(priority: Priority, artifact: u64, host: &str) -> Ask {
        let urgency = Arc::new(Progress::default());
        urgency.raise(priority);
        Ask { urgency, artifact, host: host.to_owned(), is_first: false }
    }

    /// Returns a request of a namespace for a registry of its own.
    fn ask_of(namespace: &str, artifact: u64) -> Ask {
        let ask = ask(Priority::Pod, artifact, &format!("registry-{artifact}"));
        let tenant = Tenant::Namespace(namespace.into());
        ask.urgency.enter(&super::super::Caller::new(Priority::Pod, tenant));
        ask
    }

    fn slots(total: usize, per_host: usize) -> Slots {
        Slots::new(total, per_host, Background::none())
    }

    /// The order in which asks get a single slot after each other.
    async fn order(asks: Vec<Ask>) -> Vec<usize> {
        let slots = Arc::new(slots(1, 1));
        let first = slots.acquire(ask(Priority::Pod, 99, "other")).await;
        let (sender, mut order) = tokio::sync::mpsc::unbounded_channel();
        for (number, ask) in asks.into_iter().enumerate() {
            let (slots, sender) = (Arc::clone(&slots), sender.clone());
            tokio::spawn(async move {
                let slot = slots.acquire(ask).await;
                sender.send(number).expect("somebody listens");
                drop(slot);
            });
            tokio::task::yield_now().await;
        }
        drop((first, sender));
        let mut got = Vec::new();
        while let Some(number) = order.recv().await {
            got.push(number);
        }
        got
    }

    #[tokio::test]
    async fn publishes_go_before_warming_and_otherwise_in_order_of_arrival() {
        let warm = |artifact| ask(Priority::Warm, artifact, "r");
        let pod = |artifact| ask(Priority::Pod, artifact, "r");
        assert_eq!(order(vec![warm(1), warm(2), pod(3), pod(4)]).await, [2, 3, 0, 1]);
    }

    #[tokio::test]
    async fn an_artifact_of_many_blobs_takes_turns_with_one_of_few() {
        let slots = slots(2, 2);
        let many = slots.acquire(ask(Priority::Pod, 1, "r")).await;
        let _other = slots.acquire(ask(Priority::Pod, 1, "r")).await;
        let mut second = Box::pin(slots.acquire(ask(Priority::Pod, 1, "r")));
        let mut few = Box::pin(slots.acquire(ask(Priority::Pod, 2, "r")));
        assert!(futures_util::poll!(&mut second).is_pending());
        assert!(futures_util::poll!(&mut few).is_pending());
        assert!(slots.is_wanted(&many));
        drop(many);
        assert!(futures_util::poll!(&mut second).is_pending(), "it has one already");
        assert!(futures_util::poll!(&mut few).is_ready());
    }

    #[tokio::test]
    async fn a_tenant_of_many_registries_leaves_a_quarter_to_others() {
        let slots = slots(16, 12);
        let many: Vec<_> = (0..).map_while(|number| slots.spare(&ask_of("many", number))).collect();
        assert_eq!(many.len(), 12);
        let mut next = Box::pin(slots.acquire(ask_of("many", 99)));
        assert!(futures_util::poll!(&mut next).is_pending());
        assert!(!slots.is_owed_to_other_tenant(&many[0]), "its own tenant waits");
        let few = slots.spare(&ask_of("few", 100)).expect("at once");
        drop((few, many));
        assert!(futures_util::poll!(&mut next).is_ready());
    }

    #[tokio::test]
    async fn a_waiting_tenant_is_owed_the_slots_that_another_has_more() {
        let slots = slots(2, 2);
        let held = [slots.acquire(ask_of("many", 1)).await, slots.acquire(ask_of("many", 2)).await];
        let mut same = Box::pin(slots.acquire(ask_of("many", 3)));
        assert!(futures_util::poll!(&mut same).is_pending());
        let mut few = Box::pin(slots.acquire(ask_of("few", 4)));
        assert!(futures_util::poll!(&mut few).is_pending());
        assert!(slots.is_owed_to_other_tenant(&held[0]));
        let [first, second] = held;
        drop(first);
        assert!(futures_util::poll!(&mut same).is_pending(), "it came first, and has one");
        assert!(futures_util::poll!(&mut few).is_ready());
        assert!(!slots.is_owed_to_other_tenant(&second), "each has one");
    }

    #[tokio::test]
    async fn a_slot_for_two_tenants_is_charged_to_the_one_with_fewer() {
        let slots = slots(4, 4);
        let many: Vec<_> = (0..).map_while(|number| slots.spare(&ask_of("many", number))).collect();
        assert_eq!(many.len(), 3);
        let shared = ask_of("many", 9);
        assert!(slots.spare(&shared).is_none());
        let tenant = Tenant::Namespace("few".into());
        shared.urgency.enter(&super::super::Caller::new(Priority::Pod, tenant));
        assert!(slots.spare(&shared).is_some());
    }

    #[tokio::test]
    async fn warming_leaves_half_to_publishes() {
        let slots = slots(4, 4);
        let warm = || ask(Priority::Warm, 1, "r");
        let held = [slots.acquire(warm()).await, slots.acquire(warm()).await];
        let mut third = Box::pin(slots.acquire(warm()));
        assert!(futures_util::poll!(&mut third).is_pending());
        let pod = slots.acquire(ask(Priority::Pod, 2, "r")).await;
        assert!(!slots.is_wanted(&pod), "it would be of no use to warming");
        assert!(slots.is_wanted(&held[0]));
        drop(pod);
        assert!(futures_util::poll!(&mut third).is_pending());
        let urgent = ask(Priority::Warm, 3, "r");
        let mut joined = Box::pin(slots.acquire(urgent.clone()));
        assert!(futures_util::poll!(&mut joined).is_pending());
        urgent.urgency.raise(Priority::Pod);
        assert!(futures_util::poll!(&mut joined).is_ready(), "a pod has joined, and one is free");
        assert!(futures_util::poll!(&mut third).is_pending());
        drop(held);
        assert!(futures_util::poll!(&mut third).is_ready());
    }

    #[tokio::test]
    async fn a_tenant_that_joins_a_waiting_flight_takes_what_is_free() {
        let slots = slots(4, 4);
        let held: Vec<_> = (0..).map_while(|number| slots.spare(&ask_of("many", number))).collect();
        assert_eq!(held.len(), 3);
        let shared = ask_of("many", 99);
        let mut next = Box::pin(slots.acquire(shared.clone()));
        assert!(futures_util::poll!(&mut next).is_pending(), "its tenant has its share");
        let few = Tenant::Namespace("few".into());
        shared.urgency.enter(&super::super::Caller::new(Priority::Pod, few));
        assert!(futures_util::poll!(&mut next).is_ready(), "the other tenant has none");
    }

    #[tokio::test]
    async fn a_waiter_that_cannot_be_served_now_slows_no_other() {
        let slots = slots(6, 4);
        let (warm, pod) = (|| ask(Priority::Warm, 1, "r"), |host| ask(Priority::Pod, 2, host));
        let held = [slots.acquire(warm()).await, slots.acquire(warm()).await];
        let mut warming = Box::pin(slots.acquire(warm()));
        assert!(futures_util::poll!(&mut warming).is_pending(), "it has its share");
        let first = slots.spare(&pod("r")).expect("of no use to warming");
        let second = slots.spare(&pod("r")).expect("of no use to warming");
        let mut of_host = Box::pin(slots.acquire(pod("r")));
        assert!(futures_util::poll!(&mut of_host).is_pending(), "the host has its share");
        let other = slots.spare(&pod("other")).expect("of no use to who waits for the host");
        drop((first, second));
        assert!(futures_util::poll!(&mut of_host).is_ready());
        drop((held, other));
    }

    #[tokio::test]
    async fn a_host_leaves_slots_for_others_and_a_cancelled_waiter_is_forgotten() {
        let slots = slots(2, 1);
        let slot = slots.acquire(ask(Priority::Pod, 1, "slow")).await;
        let mut second = Box::pin(slots.acquire(ask(Priority::Pod, 2, "slow")));
        assert!(futures_util::poll!(&mut second).is_pending());
        assert!(slots.spare(&ask(Priority::Pod, 1, "slow")).is_none());
        let quick = slots.acquire(ask(Priority::Pod, 3, "quick")).await;
        drop(second);
        drop((slot, quick));
        assert_eq!(slots.taken(), 0);
        assert!(slots.spare(&ask(Priority::Pod, 1, "slow")).is_some());
    }
}
