//! The references of the configuration's list as metrics, read at each scrape.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::warming::{ListedReference, Reconciler};
use preload::api::Phase;

#[derive(Debug)]
pub(super) struct WarmMetrics(pub(super) Arc<Reconciler<ListedReference>>);

impl Collector for WarmMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let states = self.0.states();
        let help = "References that the configuration keeps on this node, by how they are";
        let mut family =
            encoder.encode_descriptor("warm_references", help, None, MetricType::Gauge)?;
        for (phase, name) in [
            (Phase::Waiting, "waiting"),
            (Phase::Pulling, "pulling"),
            (Phase::Ready, "present"),
            (Phase::Failed, "failed"),
        ] {
            let has_phase = |state| ListedReference::phase(state) == phase;
            let count = states.iter().filter(|(_, state)| has_phase(state)).count();
            let gauge = ConstGauge::new(count as u64);
            gauge.encode(family.encode_family(&[("state", name)])?)?;
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
