//! The `pull` section: concurrency, memory and timeouts of pulls. Read at the start.

use std::time::Duration;

use serde::Deserialize;

use super::{GoDuration, Quantity};
use pull::PullOptions;
use pull::download_resources::WireOptions;
use pull::memory::{MemoryPlan, container_limit};
use pull::transfer_retry::RetryPolicy;
use unpack::Limits;

/// The `pull` section.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PullSection {
    /// The most connections that download at once on this node.
    pub downloads: usize,
    /// The most of these connections to one registry.
    pub downloads_per_host: usize,
    /// The most of these connections for one blob, if the registry supports range requests.
    pub ranges: usize,
    /// The bytes of one range request, if a blob has several connections.
    pub range_bytes: u64,
    /// The limit on all downloads together; 0 means no limit.
    pub bytes_per_second: u64,
    /// The most layers that are unpacked at once on this node.
    pub unpacks: usize,
    /// The most layers with zstd windows above 8 MiB that are unpacked at once on this node.
    pub wide_unpacks: usize,
    /// The memory for untrusted content; the default is three eighths of the container's limit.
    pub memory: Option<Quantity>,
    /// The attempts in a row without a byte before a transfer fails.
    pub attempts: u32,
    /// The time without a byte after which a connection is closed; a Go duration.
    pub stall_timeout: GoDuration,
    /// The least average rate of a connection over `stallTimeout`. A slower connection is closed.
    pub least_bytes_per_second: u64,
}

/// The least memory in which a few small artifacts can be pulled.
const LEAST_MEMORY: u64 = 16 << 20;

impl PullSection {
    pub(super) fn check(&self) -> Result<(), String> {
        let counts = [
            ("downloads", self.downloads),
            ("downloadsPerHost", self.downloads_per_host),
            ("ranges", self.ranges),
            ("unpacks", self.unpacks),
            ("wideUnpacks", self.wide_unpacks),
        ];
        if let Some((name, _)) = counts.iter().find(|(_, count)| !(1..=1024).contains(count)) {
            return Err(format!("pull.{name} must be from 1 to 1024"));
        }
        if self.memory.is_some_and(|memory| memory.0 < LEAST_MEMORY) {
            return Err("pull.memory must be at least 16Mi".to_owned());
        }
        if self.range_bytes < 1 << 20 {
            return Err("pull.rangeBytes must be at least 1048576".to_owned());
        }
        if !(1..=1000).contains(&self.attempts) {
            return Err("pull.attempts must be from 1 to 1000".to_owned());
        }
        if self.stall_timeout.0 < Duration::from_secs(1) {
            return Err("pull.stallTimeout must be at least 1s".to_owned());
        }
        Ok(())
    }

    /// Returns the options of the puller.
    pub fn options(&self, limits: Limits) -> PullOptions {
        let defaults = WireOptions::default();
        PullOptions {
            limits,
            wire: WireOptions {
                downloads: self.downloads,
                downloads_per_host: self.downloads_per_host,
                connections: self.ranges,
                range_bytes: self.range_bytes,
                bytes_per_second: (self.bytes_per_second > 0).then_some(self.bytes_per_second),
                least_rate: self.least_bytes_per_second,
                rate_window: self.stall_timeout.0,
                retry: RetryPolicy { attempts: self.attempts, ..defaults.retry },
            },
            unpacks: self.unpacks,
            wide_unpacks: self.wide_unpacks,
            memory_bytes: self.memory_bytes(container_limit()),
        }
    }

    /// Returns the memory for untrusted content in a container with this limit.
    pub(super) fn memory_bytes(&self, container: Option<u64>) -> u64 {
        self.memory.map_or_else(|| MemoryPlan::default_bytes(container), |memory| memory.0)
    }
}

impl Default for PullSection {
    fn default() -> Self {
        let PullOptions { wire, unpacks, wide_unpacks, .. } = PullOptions::default();
        Self {
            downloads: wire.downloads,
            downloads_per_host: wire.downloads_per_host,
            ranges: wire.connections,
            range_bytes: wire.range_bytes,
            bytes_per_second: wire.bytes_per_second.unwrap_or_default(),
            unpacks,
            wide_unpacks,
            memory: None,
            attempts: wire.retry.attempts,
            stall_timeout: GoDuration(wire.rate_window),
            least_bytes_per_second: wire.least_rate,
        }
    }
}
