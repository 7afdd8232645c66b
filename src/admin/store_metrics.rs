//! The store's contents as metrics, read at each scrape.

use std::fmt;
use std::sync::{Arc, OnceLock};

use prometheus_client::registry::Unit;

use store::eviction::Reason;
use store::{ObjectKind, Store};
use telemetry::metric_families::MetricWriter;

/// Writes the metrics of the store, once it is open.
pub(super) fn write(store: &Arc<OnceLock<Store>>, mut metrics: MetricWriter<'_>) -> fmt::Result {
    let (Some(store), bytes) = (store.get(), Some(&Unit::Bytes)) else { return Ok(()) };
    // A disk that cannot be read has no values. The log has the error.
    if let Ok(usage) = store.inventory().usage() {
        let help = "Disk space of all content, manifests, proofs and broken downloads; shared content counts once";
        metrics.gauge("cache", help, bytes, usage.bytes)?;
    }
    if let Ok(pinned) = store.inventory().pinned_space() {
        metrics.gauge("pinned", "Disk space of pinned content", bytes, pinned.bytes)?;
        let count = |kind| store.inventory().count(kind);
        metrics.gauges(
            "cache_objects",
            "Objects in the cache: files, layers, trees, and documents such as manifests",
            "kind",
            [
                ("file", count(ObjectKind::File)),
                ("layer", count(ObjectKind::Layer)),
                ("tree", count(ObjectKind::Tree)),
                ("document", count(ObjectKind::Document)),
            ],
        )?;
    }
    if let Ok(unread) = store.inventory().unread_objects() {
        let help = "Objects of an earlier format that have not been read back yet";
        metrics.gauge("unread_objects", help, None, unread.len() as u64)?;
    }
    let help = "Volumes that are published now";
    metrics.gauge("published_volumes", help, None, store.publications().count() as u64)?;
    if let Ok(room) = store.space().disk() {
        let floor = room.floor(store.space().options());
        let help = "Free space of the state directory's filesystem";
        metrics.gauge("filesystem_free", help, bytes, room.free_bytes)?;
        metrics.gauge(
            "filesystem_floor",
            "Disk space that the driver leaves free",
            bytes,
            floor.bytes,
        )?;
        let help = "Size of the state directory's filesystem";
        metrics.gauge("filesystem_size", help, bytes, room.total_bytes)?;
        metrics.gauge(
            "filesystem_free_inodes",
            "Free inodes of the state directory's filesystem",
            None,
            room.free_inodes,
        )?;
    }
    let evictions = &store.collector().evictions;
    let names = Reason::ALL.map(|reason| reason.name().replace(' ', "_"));
    let counts = std::array::from_fn(|i| (names[i].as_str(), evictions.count(Reason::ALL[i])));
    metrics.counters::<{ Reason::ALL.len() }>(
        "evictions",
        "Objects that were evicted: damaged, forgotten, unlinked or least_recently_used",
        "reason",
        counts,
    )?;
    let help = "Disk space of evicted objects";
    metrics.counter("evicted", help, bytes, evictions.bytes())?;
    let help = "Content that was found damaged";
    metrics.counter("verification_failures", help, None, store.damage().count())
}
