//! Metrics of the process. No label has values that users control: objects are counted, not named.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use telemetry::metric_families::{Labels, MetricFamilies};

/// Metrics of the process, whatever its controllers do.
#[derive(Debug)]
pub struct ControllerMetrics {
    leader: Gauge<u64, AtomicU64>,
    writes: Family<Labels<2>, Counter>,
    watch_errors: Counter,
}

impl ControllerMetrics {
    /// Registers the metrics.
    pub fn new(families: &mut MetricFamilies) -> Self {
        Self {
            leader: families.add("controller_leader", "1 while this process leads"),
            writes: families
                .add("controller_writes", "Writes to the API server, by what and how they ended"),
            watch_errors: families
                .add("controller_watch_errors", "Watches that broke; they are begun again"),
        }
    }

    /// Shows a kind of written objects from the start, so that alerts find it.
    pub fn show_kind(&self, kind: &'static str) {
        for result in ["success", "conflict", "busy", "refused"] {
            self.writes.get_or_create(&[("kind", kind), ("result", result)]).inc_by(0);
        }
    }

    /// Counts a write to the API server.
    pub fn record_write(&self, kind: &'static str, result: &'static str) {
        self.writes.get_or_create(&[("kind", kind), ("result", result)]).inc();
    }

    pub(crate) fn set_leader(&self, leads: bool) {
        self.leader.set(u64::from(leads));
    }

    pub(crate) fn record_watch_error(&self) {
        self.watch_errors.inc();
    }
}

/// Returns the families of this process, with its version.
pub fn metric_families() -> MetricFamilies {
    MetricFamilies::new("controller_build", "The controller that answers")
}
