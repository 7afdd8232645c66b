//! The store's contents as metrics, read at each scrape.

use std::fmt;
use std::sync::{Arc, OnceLock};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use store::eviction::Reason;
use store::{ObjectKind, Store};

/// The metrics of the store. Empty until it is open.
#[derive(Clone, Debug, Default)]
pub(super) struct StoreMetrics(Arc<OnceLock<Store>>);

impl StoreMetrics {
    /// Sets the store, which is opened once.
    pub(super) fn observe(&self, store: Store) {
        let _ = self.0.set(store);
    }
}

impl Collector for StoreMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let Some(store) = self.0.get() else { return Ok(()) };
        let mut writer = MetricWriter(&mut encoder);
        // A disk that cannot be read has no values. The log has the error.
        if let Ok(usage) = store.inventory().usage() {
            let help = "Disk space of all content and what is known of it, shared content once";
            writer.bytes("cache", help, usage.bytes)?;
        }
        if let Ok(pinned) = store.inventory().pinned_space() {
            writer.bytes("pinned", "Disk space of what pins hold", pinned.bytes)?;
            let count = |kind| store.inventory().count(kind);
            writer.objects(&[
                ("file", count(ObjectKind::File)),
                ("layer", count(ObjectKind::Layer)),
                ("tree", count(ObjectKind::Tree)),
                ("document", count(ObjectKind::Document)),
            ])?;
        }
        if let Ok(unread) = store.inventory().unread_objects() {
            let help = "Objects of an earlier format that have not been read back yet";
            writer.gauge("unread_objects", help, unread.len() as u64)?;
        }
        let help = "Volumes that are published now";
        writer.gauge("published_volumes", help, store.publications().count() as u64)?;
        if let Ok(room) = store.space().disk() {
            let floor = room.floor(store.space().options());
            let help = "Free space of the state directory's filesystem";
            writer.bytes("filesystem_free", help, room.free_bytes)?;
            writer.bytes("filesystem_floor", "Space that is kept free", floor.bytes)?;
            let help = "Size of the state directory's filesystem";
            writer.bytes("filesystem_size", help, room.total_bytes)?;
            writer.gauge("filesystem_free_inodes", "Free inodes there", room.free_inodes)?;
        }
        let evictions = store.collector().evictions();
        writer.evictions(&Reason::ALL.map(|reason| (reason.name(), evictions.count(reason))))?;
        let help = "Disk space of evicted content";
        writer.counter("evicted", help, Some(&Unit::Bytes), evictions.bytes())?;
        let help = "Content that was found damaged";
        writer.counter("verification_failures", help, None, store.damage().count())
    }
}

struct MetricWriter<'a, 'b>(&'a mut DescriptorEncoder<'b>);

impl MetricWriter<'_, '_> {
    fn bytes(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let gauge = ConstGauge::new(value);
        let unit = Some(&Unit::Bytes);
        gauge.encode(self.0.encode_descriptor(name, help, unit, gauge_type())?)
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let gauge = ConstGauge::new(value);
        gauge.encode(self.0.encode_descriptor(name, help, None, gauge_type())?)
    }

    fn counter(&mut self, name: &str, help: &str, unit: Option<&Unit>, value: u64) -> fmt::Result {
        let counter = ConstCounter::new(value);
        counter.encode(self.0.encode_descriptor(name, help, unit, counter_type())?)
    }

    fn objects(&mut self, counts: &[(&str, u64)]) -> fmt::Result {
        let help = "Objects in the cache";
        let mut family = self.0.encode_descriptor("cache_objects", help, None, gauge_type())?;
        for (kind, count) in counts {
            let gauge = ConstGauge::new(*count);
            gauge.encode(family.encode_family(&[("kind", *kind)])?)?;
        }
        Ok(())
    }

    fn evictions(&mut self, counts: &[(&str, u64)]) -> fmt::Result {
        let help = "Objects that were evicted";
        let mut family = self.0.encode_descriptor("evictions", help, None, counter_type())?;
        for (reason, count) in counts {
            let counter = ConstCounter::new(*count);
            counter.encode(family.encode_family(&[("reason", reason.replace(' ', "_"))])?)?;
        }
        Ok(())
    }
}

const fn gauge_type() -> prometheus_client::metrics::MetricType {
    prometheus_client::metrics::MetricType::Gauge
}

const fn counter_type() -> prometheus_client::metrics::MetricType {
    prometheus_client::metrics::MetricType::Counter
}
