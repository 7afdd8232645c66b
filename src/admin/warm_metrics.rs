//! The references of the configuration's list as metrics, read at each scrape.

use std::fmt;
use std::sync::Arc;

use crate::warming::{ListedReference, Reconciler};
use preload::api::Phase;
use telemetry::metric_families::MetricWriter;

pub(super) fn write(
    references: &Arc<Reconciler<ListedReference>>,
    mut metrics: MetricWriter<'_>,
) -> fmt::Result {
    let states = references.states();
    let phases = [
        ("waiting", Phase::Waiting),
        ("pulling", Phase::Pulling),
        ("present", Phase::Ready),
        ("failed", Phase::Failed),
    ];
    let counts = phases.map(|(name, phase)| {
        let has_phase = |state| ListedReference::phase(state) == phase;
        (name, states.iter().filter(|(_, state)| has_phase(state)).count() as u64)
    });
    let help = "References of the configuration's warm list: waiting, pulling, present or failed";
    metrics.gauges("warm_references", help, "state", counts)?;
    let help = "Failed attempts to fetch such a reference";
    metrics.counter("warm_failures", help, None, references.failures())
}
