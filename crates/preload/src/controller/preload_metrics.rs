//! Metrics of preloads. No label has values that users control: preloads are counted, not
//! named.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Unit;

use crate::plan::PlanTotals;
use telemetry::metric_families::{Labels, MetricFamilies};

/// Buckets from a small cluster to the largest.
const PLAN_SECONDS: [f64; 10] = [0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0];

/// Metrics of preloads.
#[derive(Debug)]
pub struct PreloadMetrics {
    preloads: Family<Labels<1>, Gauge>,
    nodes: Family<Labels<1>, Gauge>,
    resolutions: Family<Labels<1>, Counter>,
    plans: Histogram,
}

impl PreloadMetrics {
    /// Registers the metrics.
    pub fn new(families: &mut MetricFamilies) -> Self {
        let metrics = Self {
            preloads: families.add("preloads", "Preloads that are ready, under way, or stalled"),
            nodes: families.add("preload_nodes", "Pairs of preload and node, by how far they are"),
            resolutions: families.add(
                "preload_resolutions",
                "References and secrets that were looked at, by how that ended",
            ),
            plans: families.add_with_unit(
                "controller_plan_duration",
                "Time to plan",
                Unit::Seconds,
                Histogram::new(PLAN_SECONDS),
            ),
        };
        // Present from the start, so that alerts find them.
        metrics.count(PlanTotals::default());
        metrics
    }

    /// Counts nothing: this process does not lead, and the leader counts.
    pub(super) fn reset(&self) {
        self.count(PlanTotals::default());
    }

    pub(super) fn record_plan(&self, totals: PlanTotals, took: Duration) {
        self.plans.observe(took.as_secs_f64());
        self.count(totals);
    }

    fn count(&self, totals: PlanTotals) {
        let preloads =
            [("ready", totals.ready), ("stalled", totals.stalled), ("under_way", totals.under_way)];
        let nodes = [
            ("ready", totals.nodes_ready),
            ("active", totals.nodes_active),
            ("failed", totals.nodes_failed),
            ("waiting", totals.nodes_waiting),
        ];
        for (family, values) in [(&self.preloads, &preloads[..]), (&self.nodes, &nodes[..])] {
            for &(state, count) in values {
                let count = i64::try_from(count).unwrap_or(i64::MAX);
                family.get_or_create(&[("state", state)]).set(count);
            }
        }
    }

    pub(super) fn resolved(&self, result: &'static str) {
        self.resolutions.get_or_create(&[("result", result)]).inc();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use controller_runtime::ControllerMetrics;
    use controller_runtime::controller_metrics::metric_families;

    use super::*;

    #[test]
    fn the_charts_alerts_ask_for_what_is_counted() {
        let mut families = metric_families();
        ControllerMetrics::new(&mut families).show_kind("node");
        PreloadMetrics::new(&mut families);
        let text = families.open_metrics();
        let alerts = include_str!("../../../../charts/csi-driver-oci/files/controller-alerts.yaml");
        let words = alerts.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        let names: BTreeSet<_> = words.filter(|word| word.starts_with("csi_oci_")).collect();
        assert!(names.len() > 2, "{names:?}");
        for name in names {
            let served = text.lines().any(|line| line.starts_with(name));
            assert!(served, "{name} is not served:\n{text}");
        }
    }
}
