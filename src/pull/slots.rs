//! Who may download: a slot is a connection that brings a blob's bytes.
//!
//! Slots are given one at a time to whom [`choose`] picks: publishes before warming,
//! then the artifact that has the fewest, then who came first; a host has no more
//! than its share, so that one that trickles leaves room for the others.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::progress::Progress;

/// All slots of a node.
#[derive(Debug)]
pub struct Slots(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    total: usize,
    per_host: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// In the order in which they came.
    waiting: Vec<Waiting>,
    next: u64,
    taken: usize,
    by_artifact: HashMap<u64, usize>,
    by_host: HashMap<String, usize>,
}

#[derive(Debug)]
struct Waiting {
    number: u64,
    ask: Ask,
    grant: oneshot::Sender<Slot>,
}

/// Who asks.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Says how urgent it is, which may change while it waits.
    pub urgency: Arc<Progress>,
    /// Which artifact it is for; any number that is the artifact's own.
    pub artifact: u64,
    /// From which registry.
    pub host: String,
}

/// The right to one connection. Dropping it gives it to the next.
#[derive(Debug)]
pub struct Slot {
    shared: Arc<Shared>,
    artifact: u64,
    host: String,
}

impl Slots {
    /// `total` slots, of which one host may have `per_host`.
    #[must_use]
    pub fn new(total: usize, per_host: usize) -> Self {
        let state = Mutex::default();
        Self(Arc::new(Shared { total: total.max(1), per_host: per_host.max(1), state }))
    }

    /// Waits for a slot. Safe to cancel.
    pub async fn acquire(&self, ask: Ask) -> Slot {
        loop {
            let (grant, granted) = oneshot::channel();
            let number = {
                let mut state = self.0.lock();
                let number = state.next;
                state.next += 1;
                state.waiting.push(Waiting { number, ask: ask.clone(), grant });
                number
            };
            let _leaving = Leaving { shared: &self.0, number };
            self.0.give();
            // A sender is dropped only with its slot in it; then the next turn is ours.
            if let Ok(slot) = granted.await {
                return slot;
            }
        }
    }

    /// A slot that nobody else wants now, for going faster.
    #[must_use]
    pub fn spare(&self, ask: &Ask) -> Option<Slot> {
        let mut state = self.0.lock();
        let is_free = state.waiting.is_empty() && state.taken < self.0.total;
        (is_free && state.has_room(&ask.host, self.0.per_host))
            .then(|| self.0.take(&mut state, ask))
    }

    /// Whether somebody waits who could use the slot of this host.
    #[must_use]
    pub fn is_wanted(&self, slot: &Slot) -> bool {
        let state = self.0.lock();
        let fits = |waiting: &Waiting| {
            waiting.ask.host == slot.host || state.has_room(&waiting.ask.host, self.0.per_host)
        };
        state.waiting.iter().any(fits)
    }

    /// Slots in use.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.0.lock().taken
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(self: &Arc<Self>, state: &mut State, ask: &Ask) -> Slot {
        state.taken += 1;
        *state.by_artifact.entry(ask.artifact).or_default() += 1;
        *state.by_host.entry(ask.host.clone()).or_default() += 1;
        Slot { shared: Arc::clone(self), artifact: ask.artifact, host: ask.host.clone() }
    }

    /// Gives free slots to those who wait.
    fn give(self: &Arc<Self>) {
        let mut state = self.lock();
        // Outlives the lock: dropping a slot takes it.
        let mut refused = Vec::new();
        while state.taken < self.total {
            let asks = state.waiting.iter().map(|waiting| &waiting.ask);
            let Some(chosen) = choose(asks, &state.by_artifact, &state.by_host, self.per_host)
            else {
                break;
            };
            let Waiting { ask, grant, .. } = state.waiting.remove(chosen);
            let slot = self.take(&mut state, &ask);
            if let Err(slot) = grant.send(slot) {
                // He left between asking and getting.
                refused.push(slot);
            }
        }
        drop(state);
    }
}

impl State {
    fn has_room(&self, host: &str, per_host: usize) -> bool {
        self.by_host.get(host).copied().unwrap_or_default() < per_host
    }
}

/// Which of those who wait is next.
fn choose<'a>(
    waiting: impl Iterator<Item = &'a Ask>,
    by_artifact: &HashMap<u64, usize>,
    by_host: &HashMap<String, usize>,
    per_host: usize,
) -> Option<usize> {
    let count = |artifact: &u64| by_artifact.get(artifact).copied().unwrap_or_default();
    waiting
        .enumerate()
        .filter(|(_, ask)| by_host.get(&ask.host).copied().unwrap_or_default() < per_host)
        .min_by_key(|(place, ask)| (ask.urgency.priority(), count(&ask.artifact), *place))
        .map(|(place, _)| place)
}

struct Leaving<'a> {
    shared: &'a Shared,
    number: u64,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.shared.lock().waiting.retain(|waiting| waiting.number != self.number);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.taken -= 1;
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
    use super::super::want::Priority;
    use super::*;

    fn ask(priority: Priority, artifact: u64, host: &str) -> Ask {
        let urgency = Arc::new(Progress::default());
        urgency.raise(priority);
        Ask { urgency, artifact, host: host.to_owned() }
    }

    /// The order in which asks get a single slot after each other.
    async fn order(asks: Vec<Ask>) -> Vec<usize> {
        let slots = Arc::new(Slots::new(1, 1));
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
    async fn publishes_go_before_warming_and_else_who_came_first() {
        let warm = |artifact| ask(Priority::Warm, artifact, "r");
        let pod = |artifact| ask(Priority::Pod, artifact, "r");
        assert_eq!(order(vec![warm(1), warm(2), pod(3), pod(4)]).await, [2, 3, 0, 1]);
    }

    #[tokio::test]
    async fn an_artifact_of_many_blobs_takes_turns_with_one_of_few() {
        let slots = Slots::new(2, 2);
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
    async fn a_host_leaves_room_for_others_and_who_leaves_is_forgotten() {
        let slots = Slots::new(2, 1);
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
