//! The progress of the scrub as metrics, read at each scrape.

use std::fmt;

use prometheus_client::registry::Unit;

use crate::scrub::ScrubState;
use telemetry::metric_families::MetricWriter;

pub(super) fn write(scrub: &ScrubState, mut metrics: MetricWriter<'_>) -> fmt::Result {
    let scrub = scrub.snapshot();
    let help = "Bytes that the scrub has read back";
    metrics.counter("scrub_read", help, Some(&Unit::Bytes), scrub.counts.verified.bytes)?;
    let help = "Objects that the scrub has read back";
    metrics.counter("scrub_objects", help, None, scrub.counts.verified.objects)?;
    let help =
        "Damaged artifacts that the scrub fetched again (success), or failed to fetch (failure)";
    let repairs = [("success", scrub.counts.repaired), ("failure", scrub.counts.unrepaired)];
    metrics.counters("scrub_repairs", help, "result", repairs)?;
    // A scrub that is off has no lag.
    let Some(lag) = scrub.lag else { return Ok(()) };
    let help = "How far the scrub is behind its schedule; absent while it is off";
    metrics.gauge("scrub_lag", help, Some(&Unit::Seconds), lag.as_secs())
}
