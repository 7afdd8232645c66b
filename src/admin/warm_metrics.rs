//! The references of the configuration's list as metrics, read at each scrape.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::warming::{WarmPhase, WarmStates};

#[derive(Debug)]
pub(super) struct WarmMetrics(pub(super) WarmStates);

impl Collector for WarmMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let states = self.0.list();
        let help = "References that the configuration keeps on this node, by how they are";
        let mut family =
            encoder.encode_descriptor("warm_references", help, None, MetricType::Gauge)?;
        for phase in WarmPhase::ALL {
            let count = states.iter().filter(|state| state.phase == phase).count();
            let gauge = ConstGauge::new(count as u64);
            gauge.encode(family.encode_family(&[("state", phase.name())])?)?;
        }
        let help = "Tries to bring or look after such a reference that have failed";
        let counter = ConstCounter::new(self.0.failures());
        counter.encode(encoder.encode_descriptor(
            "warm_failures",
            help,
            None,
            MetricType::Counter,
        )?)
    }
}
