//! Metrics of claims. No label has values that users control: claims are counted, not named.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Unit;
use telemetry::metric_families::{Labels, MetricFamilies};

use crate::plan::{PendingClaim, ProvisionPlan};

/// Buckets from an immediate volume to one after many retries.
const SECONDS: [f64; 10] = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// Metrics of claims.
#[derive(Debug)]
pub struct ProvisionMetrics {
    claims: Family<Labels<1>, Gauge>,
    lookups: Family<Labels<1>, Counter>,
    durations: Histogram,
}

impl ProvisionMetrics {
    /// Registers the metrics.
    pub fn new(families: &mut MetricFamilies) -> Self {
        let metrics = Self {
            claims: families.add(
                "claims",
                "Claims of the driver's classes that are provisioned, waiting, or refused",
            ),
            lookups: families
                .add("claim_lookups", "Lookups of artifacts of claims, by how they ended"),
            durations: families.add_with_unit(
                "claim_provision_duration",
                "Time from the first sight of a claim to its volume",
                Unit::Seconds,
                Histogram::new(SECONDS),
            ),
        };
        // Present from the start, so that alerts find them.
        metrics.reset();
        metrics
    }

    /// Counts nothing: this process does not lead, and the leader counts.
    pub(super) fn reset(&self) {
        self.record_plan(&ProvisionPlan::default());
    }

    pub(super) fn record_plan(&self, plan: &ProvisionPlan) {
        let is_refused = |claim: &&PendingClaim| matches!(claim, PendingClaim::Refused(_));
        let refused = plan.pending.values().filter(is_refused).count();
        let waiting = plan.pending.len() - refused;
        for (state, count) in
            [("provisioned", plan.provisioned), ("waiting", waiting), ("refused", refused)]
        {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.claims.get_or_create(&[("state", state)]).set(count);
        }
    }

    pub(super) fn record_lookup(&self, result: &'static str) {
        self.lookups.get_or_create(&[("result", result)]).inc();
    }

    pub(super) fn record_provision(&self, took: Duration) {
        self.durations.observe(took.as_secs_f64());
    }
}
