//! Reads all content back in the background, and repairs damage.
//!
//! ```text
//! scrub_schedule  computes when each item is read: pure
//! scrub_status    the progress, for `status` and metrics
//! ```
//!
//! Content of an earlier format is read first, without a pause between two items. Then each item has its turn once in
//! `cache.scrubInterval`. Reading uses threads of low priority, pauses while pods start, bypasses the page cache, and
//! uses the disk for at most a quarter of the time. It holds a lease on the item, and nothing that a publish waits for.
//! A pod that needs an item of an earlier format while it is being read joins that reading, which then runs at full
//! speed.
//!
//! Damaged trees are reported to the pods that have them mounted, whichever component found the damage. Trees that the
//! scrub found are fetched again if a registry has them.

mod scrub_schedule;
mod scrub_status;

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::kubernetes::{EventRecorder, PodReference};
use crate::volume::NodeContent;
use crate::volume::target_path::pod_of_volume;
use pull::content_repair::{Damaged, Item, ReadBack, Repaired};
use scrub_schedule::ScrubSchedule;
pub use scrub_status::{ScrubSnapshot, ScrubState};
use store::publication_records::Publication;
use store::{Store, StoreError};

/// The longest time until damage is reported that another component found.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);
/// The shortest time between two writes of the progress.
const SAVE_INTERVAL: Duration = Duration::from_secs(10);
/// The delay after a failure of the node, such as a disk that cannot be listed.
const RETRY: Duration = Duration::from_mins(1);

/// The task that reads one node's content back.
pub struct ContentScrubber {
    /// The content to read.
    pub content: NodeContent,
    /// The time within which everything is read; `None` only reports damage.
    pub interval: Option<Duration>,
    /// Receives the progress.
    pub state: ScrubState,
    /// Reports damage on pods; `None` if Events are off.
    pub events: Option<EventRecorder>,
    /// Returns the time in milliseconds since 1970.
    pub clock: fn() -> i64,
}

impl ContentScrubber {
    /// Runs until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        self.state.begin(self.interval, self.clock);
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.work() => {}
            () = self.report() => {}
        }
    }

    async fn work(&self) {
        let Some(interval) = self.interval else { return std::future::pending().await };
        loop {
            if let Err(error) = self.take_turns(interval).await {
                tracing::warn!(error, "content cannot be read back");
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Takes turns until the node itself fails.
    async fn take_turns(&self, interval: Duration) -> Result<(), String> {
        let store = &self.content.store;
        let schedule = ScrubSchedule::new(interval, store.node_key());
        let known = self
            .blocking(|store| Ok((store.scrub_progress().through(), store.inventory().names()?)))
            .await?;
        let mut through = schedule.start(known.0, known.1.is_empty(), (self.clock)());
        drop(known);
        let mut saved = Instant::now();
        loop {
            self.read_unread().await?;
            let turns = self.blocking(move |store| {
                let objects = store.inventory().names()?.into_iter().map(Item::Object);
                Ok(schedule.turns(objects.chain([Item::Blobs]), through))
            });
            let turns = turns.await?;
            let end = (turns.end, None);
            let items = turns.items.into_iter().map(|(moment, item)| (moment, Some(item)));
            for (moment, item) in items.chain([end]) {
                // No item has a turn before this moment.
                self.state.came_to(moment);
                tokio::time::sleep(schedule.wait(through, moment, (self.clock)())).await;
                if let Some(item) = item {
                    self.read(item).await?;
                }
                through = moment;
                if saved.elapsed() >= SAVE_INTERVAL {
                    self.blocking(move |store| store.scrub_progress().set_through(through)).await?;
                    saved = Instant::now();
                }
            }
        }
    }

    /// Reads back content of an earlier format. Content that cannot be read now is read in its turn.
    async fn read_unread(&self) -> Result<(), String> {
        let mut before = usize::MAX;
        loop {
            let unread = self.blocking(|store| {
                store.inventory().finish_reading_back()?;
                store.inventory().unread_objects()
            });
            let mut unread = unread.await?;
            if unread.is_empty() || unread.len() >= before {
                return Ok(());
            }
            before = unread.len();
            tracing::info!(objects = unread.len(), "content of an earlier format is read back");
            // Sorted, so that files and layers come before the trees that link them.
            unread.sort();
            for name in unread {
                self.read(Item::Object(name)).await?;
            }
        }
    }

    async fn read(&self, item: Item) -> Result<(), String> {
        self.state.reads(Some(&item));
        let read = self.content.puller.scrub(item).await;
        self.state.reads(None);
        if let Err(error) = &read
            && error.leaves_unread()
        {
            // Read again at its next turn. Other items need not wait.
            tracing::warn!(%error, "content is not read back");
            return Ok(());
        }
        let ReadBack { verified, findings, damaged } = read.map_err(|error| error.to_string())?;
        self.state.has_read(verified, findings);
        for tree in &damaged {
            self.repair(tree).await;
        }
        Ok(())
    }

    async fn repair(&self, damaged: &Damaged) {
        let manifest = damaged.manifest;
        let repaired = self.content.puller.repair(damaged).await;
        match repaired.unwrap_or_else(|error| Repaired::Later(error.to_string())) {
            Repaired::Anew(reference) => {
                self.state.repaired(true);
                tracing::info!(%manifest, %reference, "damaged content was fetched again");
            }
            Repaired::Later(reason) => {
                self.state.repaired(false);
                tracing::warn!(%manifest, reason, "damaged content is not fetched again before a pod asks for it");
            }
        }
    }

    /// Reports damage on the pods that have it mounted, whichever component found it.
    async fn report(&self) {
        loop {
            tokio::time::sleep(REPORT_INTERVAL).await;
            let Some(events) = &self.events else { return std::future::pending().await };
            let trees = self.content.store.damage().take_trees();
            if trees.is_empty() {
                continue;
            }
            let read = move |store: &Store| {
                Ok(trees
                    .iter()
                    .flat_map(|tree| store.publications().of_tree(tree))
                    .collect::<Vec<_>>())
            };
            match self.blocking(read).await {
                Ok(publications) => report_damage(events, &publications),
                Err(error) => tracing::warn!(error, "pods are not told of damaged content"),
            }
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, String> {
        let store = self.content.store.clone();
        let done = tokio::task::spawn_blocking(move || work(&store)).await;
        done.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
    }
}

fn report_damage(events: &EventRecorder, publications: &[Publication]) {
    for publication in publications {
        if let Some(pod) = pod(publication) {
            events.damaged(&pod, &publication.reference);
        }
    }
}

/// Returns the pod that mounts a volume. The kubelet's target paths hold its uid.
fn pod(publication: &Publication) -> Option<PodReference> {
    let (namespace, name) = publication.pod.as_deref()?.split_once('/')?;
    let (namespace, name) = (namespace.to_owned(), name.to_owned());
    let uid = pod_of_volume(&publication.target)?.to_owned();
    Some(PodReference { namespace, name, uid })
}

/// Returns the time of day in milliseconds since 1970.
pub fn system_clock() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}
