//! The node's setting of file leases as a metric. Read with each scrape, since other programs may change it.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::file_leases;

#[derive(Debug)]
pub(super) struct LeaseMetrics;

impl Collector for LeaseMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let Some(enabled) = file_leases::are_enabled() else { return Ok(()) };
        let help = "1 while processes of the node may take leases on files (fs.leases-enable), by which a pod can delay opens of shared files";
        let descriptor =
            encoder.encode_descriptor("file_leases_enabled", help, None, MetricType::Gauge)?;
        ConstGauge::new(u64::from(enabled)).encode(descriptor)
    }
}
