//! The progress of the scrub as metrics, read at each scrape.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use crate::scrub::ScrubState;

#[derive(Debug)]
pub(super) struct ScrubMetrics(pub(super) ScrubState);

impl Collector for ScrubMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let scrub = self.0.snapshot();
        let bytes = Some(&Unit::Bytes);
        for (name, help, unit, value) in [
            ("scrub_read", "Content that the scrub has read back", bytes, scrub.verified.bytes),
            ("scrub_objects", "Objects that the scrub has read back", None, scrub.verified.objects),
        ] {
            let counter = ConstCounter::new(value);
            let kind = MetricType::Counter;
            counter.encode(encoder.encode_descriptor(name, help, unit, kind)?)?;
        }
        let help = "Damaged artifacts that the scrub has fetched again, or could not";
        let mut family =
            encoder.encode_descriptor("scrub_repairs", help, None, MetricType::Counter)?;
        for (result, count) in [("success", scrub.repaired), ("failure", scrub.unrepaired)] {
            let counter = ConstCounter::new(count);
            counter.encode(family.encode_family(&[("result", result)])?)?;
        }
        // A scrub that is off has no lag.
        if let Some(lag) = scrub.lag {
            let gauge = ConstGauge::new(lag.as_secs());
            let (help, unit) = ("How far the scrub is behind its turns", Some(&Unit::Seconds));
            gauge.encode(encoder.encode_descriptor(
                "scrub_lag",
                help,
                unit,
                MetricType::Gauge,
            )?)?;
        }
        Ok(())
    }
}
