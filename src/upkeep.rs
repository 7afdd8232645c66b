//! Brings records and mounts together, and keeps disk space free, without a request.
//!
//! Runs once before content is served, then after each pull and unpublish, and at least every minute. It works on
//! blocking threads. Publishes and unpublishes wait for it no longer than for one rename.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::admin::metrics::Metrics;
use crate::volume::{Content, Volumes};
use store::gc::{Now, Want};
use store::{Store, StoreError};

/// The longest time between two runs.
const INTERVAL: Duration = Duration::from_mins(1);
/// The delay after a request, so that one run serves many pulls and unpublishes in a row.
const SETTLE: Duration = Duration::from_secs(1);
/// The interval between two sweeps of records. Rare, because records are small.
const SWEEP_INTERVAL: Duration = Duration::from_hours(1);

/// The task that maintains one node's content.
pub struct Upkeep {
    /// Unmounts volumes that the kubelet has forgotten.
    pub volumes: Volumes,
    /// The content to maintain.
    pub content: Content,
    /// The kubelet's root directory.
    pub kubelet_dir: PathBuf,
    /// Counts the results.
    pub metrics: Arc<Metrics>,
}

impl Upkeep {
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
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(INTERVAL) => {}
                () = wanted.notified() => tokio::time::sleep(SETTLE).await,
            }
            self.reconcile().await;
            let sweep = swept.elapsed() >= SWEEP_INTERVAL;
            if sweep {
                swept = Instant::now();
            }
            let store = self.content.store.clone();
            let kept = tokio::task::spawn_blocking(move || keep(&store, sweep)).await;
            match kept {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "room cannot be kept free"),
                Err(error) => tracing::error!(%error, "keeping room free failed internally"),
            }
        }
    }
}

fn keep(store: &Store, sweep: bool) -> Result<(), StoreError> {
    store.collect(&Want::Upkeep)?;
    if sweep {
        let swept = store.sweep_records(Now::read())?;
        tracing::debug!(swept, "records that led nowhere are gone");
    }
    Ok(())
}
