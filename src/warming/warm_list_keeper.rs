//! The references that the configuration lists.
//!
//! ```text
//! resolution of IfNotPresent   fetched first: it stays available while the registry is down
//! resolution of the tag now    requested and fetched in addition, for pods with Always
//! followTag                    the second replaces the first, once it is complete
//! ```

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::policy_demands::with_demands;
use super::reference_reconciler::{
    Attempt, DesiredReference, Reconciler, ReferenceState, RefreshError, RefreshOutcome, Schedule,
    blocking,
};
use super::source_pins::{SourcePins, WantedPins};
use super::warming_options::WarmList;
use crate::volume::NodeContent;
use oci::backoff::RetryBackoff;
use oci::{Digest, Platform, Reference};
use preload::api::Phase;
use pull::{ProgressView, PullPolicy, Tenant, Want};
use store::resolution_records::Resolution;
use sys::reload::Reloadable;

/// The owner of the list's pins.
const OWNER: &str = "config";
/// The interval between two checks of the file. A check is one `stat`.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// The pauses after failures. The longest one is also the longest until a registry that is back is noticed.
const BACKOFF: RetryBackoff =
    RetryBackoff { first: Duration::from_secs(5), longest: Duration::from_mins(10) };

/// Keeps the references of the list present and pinned.
pub struct ListKeeper {
    /// The content to keep.
    pub content: NodeContent,
    /// The current list.
    pub source: Reloadable<WarmList>,
    /// The references, for the status and metrics.
    pub references: Arc<Reconciler<ListedReference>>,
    /// The Node object's name.
    pub node_id: String,
}

/// A reference of the list.
#[derive(Clone)]
pub struct ListedReference {
    reference: Reference,
    content: NodeContent,
    pins: SourcePins,
    list: Arc<WarmList>,
    delay: Duration,
    /// The newer manifest of its tag that is pinned.
    newer: Option<Digest>,
}

impl ListKeeper {
    /// Runs until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let pins = SourcePins::new(self.content.store.clone(), OWNER);
        let keep = async {
            let mut applied = None;
            loop {
                // Without a valid list the last one stays. The reason is in the log.
                if let Ok(list) = self.source.load().await
                    && applied.as_ref() != Some(&list)
                {
                    self.apply(&list, &pins).await;
                    applied = Some(list);
                }
                tokio::time::sleep(CHECK_INTERVAL).await;
            }
        };
        shutdown.run_until_cancelled(keep).await;
        self.references.apply([]).await;
    }

    async fn apply(&self, list: &Arc<WarmList>, pins: &SourcePins) {
        let delay = initial_delay(&self.node_id, list.spread);
        let names = list.references.iter().map(|one| (OWNER.to_owned(), one.to_string()));
        let wanted = WantedPins { pins: names.collect(), bytes_per_namespace: None };
        let known = pins.clone();
        let newer = tokio::task::spawn_blocking(move || known.keep(wanted)).await;
        let newer = newer.unwrap_or_default();
        let listed = list.references.iter().map(|reference| ListedReference {
            reference: reference.clone(),
            content: self.content.clone(),
            pins: pins.clone(),
            list: Arc::clone(list),
            delay,
            newer: newer.get(reference).copied(),
        });
        let (new, gone) = self.references.apply(listed).await;
        if new + gone > 0 {
            let (references, delay_seconds) = (list.references.len(), delay.as_secs());
            tracing::info!(references, new, gone, delay_seconds, "the list of what is kept warm");
        }
    }
}

impl DesiredReference for ListedReference {
    type Key = String;
    const AT_ONCE: usize = 2;

    fn key(&self) -> String {
        self.reference.to_string()
    }

    fn must_restart(&self, earlier: &Self, _: &ReferenceState) -> bool {
        (self.list.interval, self.list.follow_tag)
            != (earlier.list.interval, earlier.list.follow_tag)
    }

    fn schedule(&self) -> Schedule {
        Schedule {
            delay: self.delay,
            delay_if_present: self.delay,
            interval: Some(self.list.interval),
            backoff: Schedule::backoff_within(BACKOFF, self.list.interval),
            retries: u32::MAX,
        }
    }

    async fn find(&self) -> RefreshOutcome {
        let want = self.want(PullPolicy::Never).await;
        let tree = self.content.puller.acquire(&want, &ProgressView::default()).await;
        let manifest = tree.ok().map(|tree| tree.record.manifest);
        let found = RefreshOutcome { manifest, newer: self.newer, failure: None };
        self.pin(found, None, None).await
    }

    /// Asks the registry for the current manifest, and fetches what is missing.
    async fn refresh(&self, attempt: &Attempt) -> RefreshOutcome {
        let _slot = attempt.begin().await;
        let (reference, view) = (&self.reference, &attempt.view);
        let follow_tag = self.list.follow_tag;
        let recorded = self.recorded().await;
        let mut outcome = RefreshOutcome::default();
        if reference.digest().is_some() || recorded.is_some() {
            // `follow_tag` resolves the tag below, so a missing recorded manifest is not fetched first.
            let fetches = reference.digest().is_some() || !follow_tag;
            let policy = if fetches { PullPolicy::IfNotPresent } else { PullPolicy::Never };
            match self.content.puller.acquire(&self.want(policy).await, view).await {
                Ok(tree) => outcome.manifest = Some(tree.record.manifest),
                Err(error) if fetches => outcome.failure = Some(RefreshError::new("", &error)),
                Err(_) => {}
            }
        }
        let mut remember = None;
        if reference.digest().is_none() {
            let want = self.want(PullPolicy::Always).await;
            match self.content.puller.acquire_unremembered(&want, view).await {
                Ok((tree, resolution)) => {
                    let now = tree.record.manifest;
                    if outcome.set_current(recorded, now, follow_tag) {
                        remember = Some(resolution);
                    }
                }
                // A registry that did not respond has not said that the tag resolves to another manifest.
                Err(error) => {
                    outcome.newer = attempt.newer();
                    outcome.failure.get_or_insert(RefreshError::new("", &error));
                }
            }
        }
        // A pull may have used disk space.
        self.content.maintenance.notify_one();
        let stale = attempt.newer().filter(|newer| outcome.newer != Some(*newer));
        self.pin(outcome, remember, stale).await
    }

    fn log(&self, state: &ReferenceState) {
        let RefreshOutcome { manifest, newer, failure } = &state.outcome;
        let reference = self.reference.to_string();
        if let Some(RefreshError { message: reason, .. }) = failure {
            let again_in_seconds = state.next_seconds();
            tracing::warn!(reference, reason, again_in_seconds, "not all of it is here");
        } else {
            let shown = |digest: &Option<Digest>| digest.map(|digest| digest.to_string());
            let (digest, newer) = (shown(manifest), shown(newer));
            tracing::info!(reference, digest, newer, "kept warm");
        }
    }
}

impl ListedReference {
    /// Returns the phase for the status and metrics. A failure counts until bytes arrive.
    pub fn phase(state: &ReferenceState) -> Phase {
        let has_bytes = state.pulling.as_ref().is_some_and(|view| view.snapshot().total > 0);
        state.phase(if has_bytes { u32::MAX } else { 0 })
    }

    /// Returns the pull with the node's own credentials.
    async fn want(&self, policy: PullPolicy) -> Want {
        let (reference, platform) = (self.reference.clone(), Platform::of_this_node());
        let want = Want { policy, ..Want::of_node(reference, platform, Tenant::Config) };
        with_demands(&self.content, want).await
    }

    async fn recorded(&self) -> Option<Digest> {
        let (store, reference) = (self.content.store.clone(), self.reference.clone());
        let read = move || store.resolutions().get(&reference, &Platform::of_this_node());
        tokio::task::spawn_blocking(read).await.ok().flatten().map(|known| known.manifest)
    }

    /// Records the resolution for `IfNotPresent`, pins the manifests, and removes the pin of a stale one.
    async fn pin(
        &self,
        outcome: RefreshOutcome,
        remember: Option<Resolution>,
        stale: Option<Digest>,
    ) -> RefreshOutcome {
        let (listed, found) = (self.clone(), outcome.clone());
        let pinned = blocking(move || {
            let ListedReference { reference, pins, list, content, .. } = &listed;
            let (resolutions, platform) = (content.store.resolutions(), Platform::of_this_node());
            let pin = || {
                if let Some(resolution) = &remember
                    && (list.follow_tag || resolutions.get(reference, &platform).is_none())
                {
                    resolutions.put(reference, &platform, resolution)?;
                }
                if let Some(manifest) = found.manifest {
                    pins.add(OWNER, reference, manifest)?;
                }
                if let Some(newer) = found.newer {
                    pins.add(OWNER, &reference.at(newer), newer)?;
                }
                stale.map_or(Ok(()), |stale| pins.remove_stale(OWNER, &reference.at(stale)))
            };
            pin().map_err(|error: store::StoreError| {
                RefreshError::new("", &format!("it is here and not pinned: {error}"))
            })
        });
        match pinned.await {
            Ok(()) => outcome,
            Err(failure) => RefreshOutcome { manifest: None, failure: Some(failure), ..outcome },
        }
    }
}

impl RefreshOutcome {
    /// Adds the manifest that the tag resolves to now, which is complete on this node. Returns whether it is to be
    /// recorded for `IfNotPresent`.
    fn set_current(&mut self, recorded: Option<Digest>, now: Digest, follow_tag: bool) -> bool {
        if follow_tag || recorded.is_none_or(|recorded| recorded == now) {
            self.manifest = Some(now);
            recorded != Some(now)
        } else {
            self.newer = Some(now);
            false
        }
    }
}

/// Returns the part of `spread` that a node waits before its first refresh. It follows from the node's name, so it is
/// the same at every start, and the nodes of a cluster start one after the other.
fn initial_delay(node_id: &str, spread: Duration) -> Duration {
    let digest = Digest::of(node_id.as_bytes()).hex();
    let part = u32::from_str_radix(&digest[..8], 16).unwrap_or_default();
    spread.mul_f64(f64::from(part) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_that_moved_is_kept_beside_what_pods_get_unless_it_is_followed() {
        let (old, new) = (Digest::of(b"old"), Digest::of(b"new"));
        let current = |recorded: Option<Digest>, follow_tag| {
            let mut outcome = RefreshOutcome { manifest: recorded, ..RefreshOutcome::default() };
            let is_recorded = outcome.set_current(recorded, new, follow_tag);
            (outcome.manifest, outcome.newer, is_recorded)
        };
        assert_eq!(current(None, false), (Some(new), None, true));
        assert_eq!(current(Some(new), false), (Some(new), None, false));
        // IfNotPresent means what it meant.
        assert_eq!(current(Some(old), false), (Some(old), Some(new), false));
        assert_eq!(current(Some(old), true), (Some(new), None, true));
    }

    #[test]
    fn nodes_begin_one_after_the_other_and_each_at_its_own_time() {
        let spread = Duration::from_mins(10);
        let delays: Vec<_> =
            (0..200).map(|node| initial_delay(&format!("worker-{node}"), spread)).collect();
        assert_eq!(delays[7], initial_delay("worker-7", spread));
        for minute in 0..10 {
            let within = |delay: &&Duration| delay.as_secs() / 60 == minute;
            let nodes = delays.iter().filter(within).count();
            assert!((8..35).contains(&nodes), "{nodes} of 200 nodes begin in minute {minute}");
        }
        assert_eq!(initial_delay("worker", Duration::ZERO), Duration::ZERO);
    }
}
