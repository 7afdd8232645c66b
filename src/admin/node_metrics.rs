//! Metrics in the Prometheus text format: base units, and no label whose values users can multiply.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Unit;
use tonic::Code;

use super::{follow_metrics, lease_metrics, scrub_metrics, store_metrics, warm_metrics};
use crate::following::FollowState;
use crate::scrub::ScrubState;
use crate::volume::mount_reconcile::ReconcileCounts;
use crate::volume::publish_volume::PublishPath;
use crate::warming::{ListedReference, Reconciler};
use pull::download_resources::Observer;
use store::Store;
use telemetry::metric_families::{Labels, MetricFamilies, MetricWriter};

/// Buckets from a tenth of a millisecond, a cached publish, to the two minutes after which the kubelet calls again.
const SECONDS: [f64; 16] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 30.0,
    60.0, 120.0,
];

/// Buckets from one round trip to an hour, the time of a model on a slow line.
const PULL_SECONDS: [f64; 12] =
    [0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 120.0, 300.0, 900.0, 3600.0];

/// The node plugin's metrics.
pub struct NodeMetrics {
    families: Arc<MetricFamilies>,
    publish: Family<Labels<2>, Histogram, fn() -> Histogram>,
    hits: Counter,
    misses: Counter,
    unpublished: Counter,
    configuration_errors: Gauge<u64, AtomicU64>,
    wrong_parts: Mutex<BTreeSet<&'static str>>,
    endpoint_errors: Family<Labels<1>, Counter>,
    unknown_mounts: Gauge<u64, AtomicU64>,
    vanished: Counter,
    store: Arc<OnceLock<Store>>,
    /// The references of the configuration, whose states each scrape reads.
    pub warming: Arc<Reconciler<ListedReference>>,
    /// The followed tags, whose states each scrape reads.
    pub following: FollowState,
    /// The progress of the scrub, which each scrape reads.
    pub scrub: ScrubState,
    downloads: Gauge,
    downloaded_bytes: Counter,
    pulls: Family<Labels<2>, Counter>,
    signature_warnings: Counter,
    pull_durations: Family<Labels<1>, Histogram, fn() -> Histogram>,
}

impl Default for NodeMetrics {
    fn default() -> Self {
        let mut families = MetricFamilies::new("build", "The running version");
        families.add_reader(lease_metrics::write);
        Self {
            publish: families.add_with_unit(
                "publish_duration",
                "Duration of NodePublishVolume by gRPC code, and by what was found: hit or miss of the cache, mounted, or none for failures; its _count is the number of publishes",
                Unit::Seconds,
                Family::new_with_constructor(|| Histogram::new(SECONDS)),
            ),
            hits: families.add("cache_hits", "Publishes from the cache"),
            misses: families.add("cache_misses", "Publishes that had to download or unpack"),
            unpublished: families.add("unpublish", "Volumes unpublished"),
            configuration_errors: families.add(
                "configuration_error",
                "1 while the configuration file, or a file that it names, cannot be used",
            ),
            wrong_parts: Mutex::default(),
            endpoint_errors: families
                .add("endpoint_errors", "Endpoints (admin, health, metrics) that could not be listened on"),
            downloads: families
                .add("downloads_in_flight", "Connections that download a blob now"),
            downloaded_bytes: families.add_with_unit(
                "downloaded",
                "Bytes of blobs that registries have sent",
                Unit::Bytes,
                Counter::default(),
            ),
            pulls: families.add(
                "pulls",
                "Pulls that have ended, by result (success, failure, cancelled) and by the reason of a failure: not_found, unauthorized, rate_limited, unreachable, content, wrong_content, no_space, memory and some more",
            ),
            pull_durations: families.add_with_unit(
                "pull_duration",
                "Duration of a pull by result, from its first request until its content has a name",
                Unit::Seconds,
                Family::new_with_constructor(|| Histogram::new(PULL_SECONDS)),
            ),
            signature_warnings: families.add(
                "signature_warnings",
                "Demanded signatures that were not found, of content that is mounted because the rule's mode is Warn",
            ),
            unknown_mounts: families.add(
                "unknown_mounts",
                "Mounts of the driver's content that belong to no known volume",
            ),
            vanished: families.add(
                "vanished_mounts",
                "Mounts that were removed because the kubelet had forgotten their volume",
            ),
            store: add_shared(&mut families, store_metrics::write),
            warming: add_shared(&mut families, warm_metrics::write),
            following: add_shared(&mut families, follow_metrics::write),
            scrub: add_shared(&mut families, scrub_metrics::write),
            families: Arc::new(families),
        }
    }
}

/// Adds metrics that are read from a shared value at each scrape. Returns the value.
fn add_shared<T: Default + Clone + Send + Sync + 'static>(
    families: &mut MetricFamilies,
    write: fn(&T, MetricWriter<'_>) -> fmt::Result,
) -> T {
    let shared = T::default();
    let read = shared.clone();
    families.add_reader(move |metrics| write(&read, metrics));
    shared
}

impl NodeMetrics {
    /// Counts a volume that was published.
    pub fn published(&self, path: PublishPath, duration: Duration) {
        let cache = match path {
            PublishPath::AlreadyMounted => "mounted",
            PublishPath::Hit => {
                self.hits.inc();
                "hit"
            }
            PublishPath::Miss => {
                self.misses.inc();
                "miss"
            }
        };
        self.observe("OK", cache, duration);
    }

    /// Counts a publish that failed.
    pub fn publish_failed(&self, code: Code, duration: Duration) {
        self.observe(code_name(code), "none", duration);
    }

    /// Counts a volume that was unpublished.
    pub fn unpublished(&self) {
        self.unpublished.inc();
    }

    /// Sets whether a part of the configuration is unusable. The metric is 1 while any part is.
    pub fn configuration_error(&self, part: &'static str, is_wrong: bool) {
        let mut wrong = self.wrong_parts.lock();
        if is_wrong {
            wrong.insert(part)
        } else {
            wrong.remove(part)
        };
        self.configuration_errors.set((!wrong.is_empty()).into());
    }

    /// Counts the results of bringing records and mounts together.
    pub fn reconciled(&self, reconciled: &ReconcileCounts) {
        self.unknown_mounts.set(reconciled.unknown as u64);
        self.vanished.inc_by(reconciled.unmounted as u64);
    }

    /// Sets the open store, which each scrape reads.
    pub fn observe_store(&self, store: &Store) {
        // It is opened once.
        let _ = self.store.set(store.clone());
    }

    /// Counts an endpoint that could not be listened on.
    pub fn endpoint_error(&self, endpoint: &'static str) {
        self.endpoint_errors.get_or_create(&[("endpoint", endpoint)]).inc();
    }

    /// Returns the route of the metrics.
    pub fn router(&self) -> Router {
        self.families.router()
    }

    fn observe(&self, result: &'static str, cache: &'static str, duration: Duration) {
        let labels = [("result", result), ("cache", cache)];
        self.publish.get_or_create(&labels).observe(duration.as_secs_f64());
    }
}

impl Observer for NodeMetrics {
    fn downloaded(&self, bytes: u64) {
        self.downloaded_bytes.inc_by(bytes);
    }

    fn connections(&self, change: i64) {
        self.downloads.inc_by(change);
    }

    fn pulled(&self, result: &'static str, reason: &'static str, duration: Duration) {
        self.pulls.get_or_create(&[("result", result), ("reason", reason)]).inc();
        self.pull_durations.get_or_create(&[("result", result)]).observe(duration.as_secs_f64());
    }

    fn signature_warning(&self) {
        self.signature_warnings.inc();
    }
}

/// Returns a code's name in the spelling of the gRPC specification.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
