//! Work that the node does by itself: it compares records with mounts, and keeps room free.
//!
//! Records and mounts are compared once before content is served, then every minute. Room is kept free after
//! each pull and unpublish, and every minute. Both read the whole mount table, which an unmount waits for, so
//! this work takes at most a twentieth of the time. It runs on blocking threads and holds nothing that a
//! publish or an unpublish waits for longer than one rename.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::admin::node_metrics::NodeMetrics;
use crate::volume::{NodeContent, VolumeManager};
use store::gc::{Now, Want};
use store::{Store, StoreError};
use sys::fault;

/// The time between two comparisons of records with mounts.
const INTERVAL: Duration = Duration::from_mins(1);
/// The minimum time from a pull or an unpublish to the collection that follows it, which serves all of them.
const SETTLE: Duration = Duration::from_secs(1);
/// The pause after a collection, as a multiple of the time that it took.
const PAUSE: u32 = 19;
/// The interval between two sweeps of records. Rare, because records are small.
const SWEEP_INTERVAL: Duration = Duration::from_hours(1);

/// The task that maintains one node's content.
pub struct NodeMaintenance {
    /// Unmounts volumes that the kubelet has forgotten.
    pub volumes: VolumeManager,
    /// The content to maintain.
    pub content: NodeContent,
    /// The kubelet's root directory.
    pub kubelet_dir: PathBuf,
    /// Counts the results.
    pub metrics: Arc<NodeMetrics>,
}

impl NodeMaintenance {
    /// Brings records and mounts together.
    pub async fn reconcile(&self) {
        match self.volumes.reconcile(&self.content, &self.kubelet_dir).await {
            Ok(reconciled) => {
                self.metrics.reconciled(&reconciled);
                if reconciled.dropped + reconciled.recorded + reconciled.unmounted > 0 {
                    tracing::info!(
                        kept = reconciled.kept,
                        dropped = reconciled.dropped,
                        recorded = reconciled.recorded,
                        unmounted = reconciled.unmounted,
                        unknown = reconciled.unknown,
                        "records and mounts were brought together"
                    );
                }
            }
            Err(error) => tracing::warn!(%error, "records and mounts cannot be compared"),
        }
    }

    /// Runs until `shutdown`.
    pub async fn run(self, wanted: Arc<Notify>, shutdown: CancellationToken) {
        let mut swept = Instant::now();
        let mut compared = Instant::now();
        let mut pause = SETTLE;
        let interval =
            fault::milliseconds("CSI_OCI_COMPARE_INTERVAL").map_or(INTERVAL, Duration::from_millis);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep_until(compared + interval) => {}
                () = async { wanted.notified().await; tokio::time::sleep(pause).await } => {}
            }
            let begun = Instant::now();
            if compared.elapsed() >= interval {
                self.reconcile().await;
                compared = begun;
            }
            let sweep = swept.elapsed() >= SWEEP_INTERVAL;
            if sweep {
                swept = Instant::now();
            }
            let store = self.content.store.clone();
            let freed = tokio::task::spawn_blocking(move || free_space(&store, sweep)).await;
            match freed {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "room cannot be kept free"),
                Err(error) => tracing::error!(%error, "keeping room free failed internally"),
            }
            pause = SETTLE.max(begun.elapsed() * PAUSE);
        }
    }
}

fn free_space(store: &Store, sweep: bool) -> Result<(), StoreError> {
    if let Err(error) = store.followed().sweep() {
        tracing::warn!(%error, "old versions of followed volumes stay");
    }
    store.collector().collect(&Want::Upkeep)?;
    if sweep {
        let swept = store.collector().sweep_records(Now::read())?;
        tracing::debug!(swept, "records that led nowhere are gone");
    }
    Ok(())
}
