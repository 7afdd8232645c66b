//! Metrics that are registered as they are made, and served in the format that a scrape accepts.

use std::fmt;
use std::sync::Arc;

use axum::Router;
use axum::http::HeaderMap;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry, Unit};
use tokio::sync::Semaphore;

use super::metric_exposition;

/// The maximum number of concurrent scrapes: clients that come and go must not occupy all blocking
/// threads.
const SCRAPES: usize = 2;

/// Names and values of labels.
pub type Labels<const N: usize> = [(&'static str, &'static str); N];

/// All metrics of one process, under the driver's prefix.
pub struct MetricFamilies(Registry);

/// Writes metrics that are read at a scrape.
pub struct MetricWriter<'a>(DescriptorEncoder<'a>);

struct ScrapeReader<F>(F);

impl<F> fmt::Debug for ScrapeReader<F> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ScrapeReader")
    }
}

impl<F> Collector for ScrapeReader<F>
where
    F: Fn(MetricWriter<'_>) -> fmt::Result + Send + Sync + 'static,
{
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.0(MetricWriter(encoder))
    }
}

impl MetricWriter<'_> {
    /// Writes a gauge.
    pub fn gauge(&mut self, name: &str, help: &str, unit: Option<&Unit>, now: u64) -> fmt::Result {
        let encoder = self.0.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        ConstGauge::new(now).encode(encoder)
    }

    /// Writes a counter.
    pub fn counter(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        sum: u64,
    ) -> fmt::Result {
        let encoder = self.0.encode_descriptor(name, help, unit, MetricType::Counter)?;
        ConstCounter::new(sum).encode(encoder)
    }

    /// Writes a gauge for each value of a label.
    pub fn gauges<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: [(&str, u64); N],
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        values.into_iter().try_for_each(|(value, now)| {
            ConstGauge::new(now).encode(family.encode_family(&[(label, value)])?)
        })
    }

    /// Writes a counter for each value of a label.
    pub fn counters<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: [(&str, u64); N],
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        values.into_iter().try_for_each(|(value, sum)| {
            ConstCounter::new(sum).encode(family.encode_family(&[(label, value)])?)
        })
    }
}

impl MetricFamilies {
    /// Registers the running version as the first family.
    pub fn new(build: &str, help: &str) -> Self {
        let mut registry = Registry::with_prefix("csi_oci");
        registry.register(build, help, Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        Self(registry)
    }

    /// Registers a new metric and returns it.
    pub fn add<M: Metric + Clone + Default>(&mut self, name: &str, help: &str) -> M {
        let metric = M::default();
        self.0.register(name, help, metric.clone());
        metric
    }

    /// Registers this metric, and appends its unit to its name.
    pub fn add_with_unit<M: Metric + Clone>(
        &mut self,
        name: &str,
        help: &str,
        unit: Unit,
        metric: M,
    ) -> M {
        self.0.register_with_unit(name, help, unit, metric.clone());
        metric
    }

    /// Registers a function that writes metrics at each scrape.
    pub fn add_reader(
        &mut self,
        write: impl Fn(MetricWriter<'_>) -> fmt::Result + Send + Sync + 'static,
    ) {
        self.0.register_collector(Box::new(ScrapeReader(write)));
    }

    /// Encodes all metrics as OpenMetrics.
    pub fn open_metrics(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &self.0);
        text
    }

    /// Returns the route `/metrics`.
    pub fn router(self: &Arc<Self>) -> Router {
        let families = Arc::clone(self);
        let scrapes = Arc::new(Semaphore::new(SCRAPES));
        let serve = async move |headers: HeaderMap| {
            let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok());
            let open = metric_exposition::accepts_open_metrics(accept.unwrap_or_default());
            let permit = scrapes.acquire_owned().await;
            // Collectors read the filesystem, which may be slow. The permit is held until they are done, even
            // if the client has gone.
            let encode = move || {
                let _permit = permit;
                families.open_metrics()
            };
            let text = tokio::task::spawn_blocking(encode).await.unwrap_or_default();
            if open {
                ([(CONTENT_TYPE, metric_exposition::OPEN_METRICS)], text)
            } else {
                (
                    [(CONTENT_TYPE, metric_exposition::TEXT)],
                    metric_exposition::to_prometheus_text(&text),
                )
            }
        };
        Router::new().route("/metrics", get(serve))
    }
}
