//! Keeps each reference of the configuration's list present and pinned.
//!
//! One task checks the file every few seconds, starts the refreshes that are due, and records their results. It alone
//! adds and removes the pins of its owner, so that a reference which leaves the list while it is fetched leaves no pin
//! behind.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::options::WarmList;
use super::refresh::{RefreshOutcome, find_local, refresh};
use super::schedule::{initial_delay, next_refresh, retry};
use super::states::WarmStates;
use crate::volume::NodeContent;
use oci::{Digest, Platform, Reference};
use pull::ProgressView;
use store::pin_records::Pin;
use store::{Store, StoreError};
use sys::reload::Reloadable;

/// The owner of the list's pins.
pub const OWNER: &str = "config";

/// The interval between two checks of the file. A check is one `stat`.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// The most refreshes at once. The node's own limits hold as well.
const AT_ONCE: usize = 2;

/// The task that keeps the list.
pub struct WarmKeeper {
    /// The content to keep.
    pub content: NodeContent,
    /// The current list.
    pub source: Reloadable<WarmList>,
    /// The states of the references, for the status and metrics.
    pub states: WarmStates,
    /// The Node object's name.
    pub node_id: String,
}

/// A reference of the list.
struct WarmItem {
    reference: Reference,
    due: Instant,
    failures: u32,
    /// The manifest that its tag resolves to now, pinned in addition to the one for pods with `IfNotPresent`.
    newer: Option<Digest>,
    /// Ends the running refresh.
    running: Option<CancellationToken>,
}

type RefreshTasks = FuturesUnordered<BoxFuture<'static, Option<(String, RefreshOutcome)>>>;

struct WarmListTask {
    keeper: WarmKeeper,
    platform: Platform,
    /// `None` until the file has been read once.
    list: Option<Arc<WarmList>>,
    items: BTreeMap<String, WarmItem>,
}

impl WarmKeeper {
    /// Runs until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut task = WarmListTask {
            keeper: self,
            platform: Platform::of_this_node(),
            list: None,
            items: BTreeMap::new(),
        };
        let mut tasks = RefreshTasks::new();
        loop {
            task.reload().await;
            task.start_due(&mut tasks);
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some(ended) = tasks.next(), if !tasks.is_empty() => {
                    if let Some((name, outcome)) = ended {
                        task.finish(&name, outcome).await;
                    }
                }
                () = tokio::time::sleep(CHECK_INTERVAL) => {}
            }
        }
    }
}

impl WarmListTask {
    /// Applies the current list.
    async fn reload(&mut self) {
        let source = self.keeper.source.clone();
        let Ok(Ok(list)) = tokio::task::spawn_blocking(move || source.current()).await else {
            // There was no valid list yet. The reason is in the log.
            return;
        };
        let before = self.list.replace(Arc::clone(&list));
        if before.as_ref() == Some(&list) {
            return;
        }
        let delay = initial_delay(&self.keeper.node_id, list.spread);
        let soon = Instant::now() + delay;
        let gone = self.drop_unlisted(&list.references);
        let (mut new, mut pinned) = (0_usize, self.sweep().await);
        // A shorter interval, or `followTag`, takes effect now.
        let is_anew = before.is_some_and(|before| {
            (before.interval, before.follow_tag) != (list.interval, list.follow_tag)
        });
        for reference in &list.references {
            let name = reference.to_string();
            if let Some(item) = self.items.get_mut(&name) {
                if is_anew {
                    item.due = item.due.min(soon);
                    let due = item.due;
                    self.keeper.states.change(&name, |shown| shown.next = Some(due));
                }
                continue;
            }
            new += 1;
            let (newer, reference) = (pinned.remove(reference), reference.clone());
            let mut found = find_local(&self.keeper.content, &reference, &self.platform).await;
            found.newer = newer;
            let item = WarmItem { reference, due: soon, failures: 0, newer, running: None };
            self.items.insert(name.clone(), item);
            self.keep(&name, &found).await;
        }
        if new + gone > 0 {
            let (references, delay_seconds) = (self.items.len(), delay.as_secs());
            tracing::info!(references, new, gone, delay_seconds, "the list of what is kept warm");
        }
    }

    /// Cancels the refreshes of references that are no longer listed. Returns their number.
    fn drop_unlisted(&mut self, references: &[Reference]) -> usize {
        let wanted: HashSet<_> = references.iter().collect();
        let states = &self.keeper.states;
        let before = self.items.len();
        self.items.retain(|name, item| {
            let stays = wanted.contains(&item.reference);
            if !stays {
                states.forget(name);
                item.running.iter().for_each(CancellationToken::cancel);
            }
            stays
        });
        before - self.items.len()
    }

    /// Starts the refreshes that are due, at most [`AT_ONCE`].
    fn start_due(&mut self, tasks: &mut RefreshTasks) {
        let (now, follow_tag) = (Instant::now(), self.follows_tags());
        let due = |item: &&mut WarmItem| item.running.is_none() && item.due <= now;
        let busy = self.items.values().filter(|item| item.running.is_some()).count();
        for item in self.items.values_mut().filter(due).take(AT_ONCE.saturating_sub(busy)) {
            let (content, platform) = (self.keeper.content.clone(), self.platform.clone());
            let (reference, follow_tag) = (item.reference.clone(), follow_tag);
            let (view, token) = (ProgressView::default(), CancellationToken::new());
            let name = reference.to_string();
            item.running = Some(token.clone());
            self.keeper.states.change(&name, |shown| shown.pulling = Some(view.clone()));
            tasks.push(Box::pin(async move {
                let outcome = Box::pin(refresh(&content, &reference, &platform, follow_tag, &view));
                Some((name, token.run_until_cancelled(outcome).await?))
            }));
        }
    }

    /// Records the result of a refresh, and schedules the next one.
    async fn finish(&mut self, name: &str, outcome: RefreshOutcome) {
        let interval = self.list.as_ref().map_or_else(Duration::default, |list| list.interval);
        let Some(item) = self.items.get_mut(name) else { return };
        item.running = None;
        item.failures = if outcome.failure.is_some() { item.failures + 1 } else { 0 };
        let wait = match item.failures {
            0 => next_refresh(interval),
            failures => retry(failures, interval),
        };
        item.due = Instant::now() + wait;
        if let Some(reason) = &outcome.failure {
            self.keeper.states.failed();
            let again_in_seconds = wait.as_secs();
            tracing::warn!(reference = name, reason, again_in_seconds, "not all of it is here");
        } else {
            let shown = |digest: Option<Digest>| digest.map(|digest| digest.to_string());
            let (digest, newer) = (shown(outcome.manifest), shown(outcome.newer));
            tracing::info!(reference = name, digest, newer, "kept warm");
        }
        // A registry that did not respond has not said that the tag resolves to another manifest.
        let stale = item.newer.filter(|_| outcome.failure.is_none());
        let stale = stale.filter(|stale| Some(*stale) != outcome.newer);
        item.newer = outcome.newer.or(item.newer.filter(|_| stale.is_none()));
        let stale = stale.map(|stale| item.reference.at(stale));
        self.keep(name, &outcome).await;
        if let Some(stale) = stale {
            self.unpin(stale).await;
        }
        // A pull may have used disk space.
        self.keeper.content.maintenance.notify_one();
    }

    /// Records the resolution, pins the manifests, and updates the reference's state.
    async fn keep(&self, name: &str, outcome: &RefreshOutcome) {
        let Some(item) = self.items.get(name) else { return };
        let (store, platform) = (self.keeper.content.store.clone(), self.platform.clone());
        let (reference, found) = (item.reference.clone(), outcome.clone());
        let follow_tag = self.follows_tags();
        let kept = blocking(move || {
            if let Some(resolution) = &found.remember
                && (follow_tag || store.resolutions().get(&reference, &platform).is_none())
            {
                store.resolutions().put(&reference, &platform, resolution)?;
            }
            for (reference, manifest) in found.pins(&reference) {
                pin(&store, &reference, &platform, manifest)?;
            }
            Ok(())
        });
        let failure = kept.await.err().map(|error| format!("it is here and not pinned: {error}"));
        if let Some(reason) = &failure {
            tracing::warn!(reference = name, reason, "what is to be kept warm may be evicted");
        }
        self.keeper.states.change(name, |shown| {
            shown.pulling = None;
            shown.manifest = outcome.manifest.filter(|_| failure.is_none());
            shown.newer = outcome.newer;
            shown.reason = failure.or_else(|| outcome.failure.clone());
            shown.next = Some(item.due);
        });
    }

    /// Removes pins of the list that no reference needs. Returns those that an earlier process made of newer manifests
    /// of listed tags.
    async fn sweep(&self) -> HashMap<Reference, Digest> {
        let references = self.list.iter().flat_map(|list| list.references.iter().cloned());
        let listed: HashSet<_> = references.collect();
        let store = self.keeper.content.store.clone();
        let swept = blocking(move || {
            let mut newer = HashMap::new();
            for pin in store.pins().list()?.into_iter().filter(|pin| pin.owner == OWNER) {
                let reference = pin.reference.parse::<Reference>().ok();
                if reference.as_ref().is_some_and(|reference| listed.contains(reference)) {
                    continue;
                }
                let floating = reference.as_ref().map(Reference::floating);
                match floating.filter(|floating| listed.contains(floating)) {
                    Some(floating) if !newer.contains_key(&floating) => {
                        newer.insert(floating, pin.manifest);
                    }
                    _ => drop_pin(&store, &pin)?,
                }
            }
            Ok(newer)
        });
        swept.await.unwrap_or_else(|error| {
            tracing::warn!(error, "pins of the list cannot be taken away");
            HashMap::new()
        })
    }

    /// Removes the pin of a manifest that the tag no longer resolves to.
    async fn unpin(&self, reference: Reference) {
        let (store, platform) = (self.keeper.content.store.clone(), self.platform.clone());
        let unpinned = blocking(move || match store.pins().get(&reference, &platform, OWNER) {
            Some(pin) => drop_pin(&store, &pin),
            None => Ok(()),
        });
        if let Err(error) = unpinned.await {
            tracing::warn!(error, "a pin of the list cannot be taken away");
        }
    }

    fn follows_tags(&self) -> bool {
        self.list.as_ref().is_some_and(|list| list.follow_tag)
    }
}

fn drop_pin(store: &Store, pin: &Pin) -> Result<(), StoreError> {
    store.pins().remove(pin)?;
    tracing::info!(reference = pin.reference, digest = %pin.manifest, "no longer kept warm");
    Ok(())
}

/// Pins a manifest. Writes nothing if it is pinned already.
fn pin(
    store: &Store,
    reference: &Reference,
    platform: &Platform,
    manifest: Digest,
) -> Result<(), StoreError> {
    let held = store.pins().get(reference, platform, OWNER);
    if held.is_none_or(|held| held.manifest != manifest) {
        store.pins().add(reference, platform, manifest, OWNER)?;
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, String> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}
