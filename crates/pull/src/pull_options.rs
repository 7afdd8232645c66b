//! The `pull` section of the configuration file: concurrency, memory and timeouts of pulls. Read at the start.

use std::time::Duration;

use serde::Deserialize;

use super::memory::MemoryPlan;
use super::transfer_retry::RetryPolicy;
use text::duration::go_duration;
use text::quantity::optional_bytes;

/// The least memory in which a few small artifacts can be pulled.
const LEAST_MEMORY: u64 = 16 << 20;

/// The options of pulls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PullOptions {
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
    #[serde(deserialize_with = "optional_bytes")]
    pub memory: Option<u64>,
    /// The attempts in a row without a byte before a transfer fails.
    pub attempts: u32,
    /// The time without a byte after which a connection is closed.
    #[serde(deserialize_with = "go_duration")]
    pub stall_timeout: Duration,
    /// The least average rate of a connection over `stallTimeout`. A slower connection is closed.
    pub least_bytes_per_second: u64,
    /// The delay before the second attempt; it doubles with each, to a bound. No key sets it.
    #[serde(skip)]
    pub first_delay: Duration,
}

impl Default for PullOptions {
    fn default() -> Self {
        Self {
            downloads: 16,
            downloads_per_host: 12,
            ranges: 8,
            range_bytes: 16 << 20,
            bytes_per_second: 0,
            unpacks: 4,
            wide_unpacks: 1,
            memory: None,
            attempts: 6,
            stall_timeout: Duration::from_secs(30),
            least_bytes_per_second: 1024,
            first_delay: Duration::from_millis(250),
        }
    }
}

impl PullOptions {
    /// Checks the values of the configuration file.
    ///
    /// # Errors
    ///
    /// Names the first key with a wrong value, and says what it must be.
    pub fn check(&self) -> Result<(), String> {
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
        if self.memory.is_some_and(|memory| memory < LEAST_MEMORY) {
            return Err("pull.memory must be at least 16Mi".to_owned());
        }
        if self.range_bytes < 1 << 20 {
            return Err("pull.rangeBytes must be at least 1048576".to_owned());
        }
        if !(1..=1000).contains(&self.attempts) {
            return Err("pull.attempts must be from 1 to 1000".to_owned());
        }
        if self.stall_timeout < Duration::from_secs(1) {
            return Err("pull.stallTimeout must be at least 1s".to_owned());
        }
        Ok(())
    }

    /// Returns the memory for untrusted content in a container with this limit.
    pub fn memory_bytes(&self, container: Option<u64>) -> u64 {
        self.memory.unwrap_or_else(|| MemoryPlan::default_bytes(container))
    }

    /// Returns the policy for broken transfers.
    pub(super) fn retry(&self) -> RetryPolicy {
        RetryPolicy { attempts: self.attempts, first_delay: self.first_delay }
    }
}
