//! The node's setting of file leases as a metric. Read with each scrape, since other programs may change it.

use std::fmt;

use crate::file_leases;
use telemetry::metric_families::MetricWriter;

pub(super) fn write(mut metrics: MetricWriter<'_>) -> fmt::Result {
    let Some(enabled) = file_leases::are_enabled() else { return Ok(()) };
    let help = "1 while processes of the node may take leases on files (fs.leases-enable), by which a pod can delay opens of shared files; absent if the kernel does not report it";
    metrics.gauge("file_leases_enabled", help, None, u64::from(enabled))
}
