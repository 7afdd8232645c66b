//! The `pull` section: how much at once, and how patiently. Read at start.

use std::time::Duration;

use serde::Deserialize;

use super::GoDuration;
use crate::pull::PullOptions;
use crate::pull::transfer::RetryPolicy;

/// The `pull` section.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PullSection {
    /// Blobs that are downloaded at once on this node.
    pub downloads: usize,
    /// Layers that are unpacked at once on this node.
    pub unpacks: usize,
    /// Tries in a row that bring no byte, before a transfer fails.
    pub attempts: u32,
    /// A connection that brings nothing for so long is given up; a Go duration.
    pub stall_timeout: GoDuration,
}

impl PullSection {
    pub(super) fn check(&self) -> Result<(), String> {
        let Self { downloads, unpacks, attempts, stall_timeout } = self;
        if !(1..=1024).contains(downloads) || !(1..=1024).contains(unpacks) {
            return Err("pull.downloads and pull.unpacks must be from 1 to 1024".to_owned());
        }
        if !(1..=1000).contains(attempts) {
            return Err("pull.attempts must be from 1 to 1000".to_owned());
        }
        if stall_timeout.0 < Duration::from_secs(1) {
            return Err("pull.stallTimeout must be at least 1s".to_owned());
        }
        Ok(())
    }

    /// What pulling is built with.
    #[must_use]
    pub fn options(&self) -> PullOptions {
        PullOptions {
            downloads: self.downloads,
            unpacks: self.unpacks,
            retry: RetryPolicy { attempts: self.attempts, first_delay: Duration::from_millis(250) },
        }
    }
}

impl Default for PullSection {
    fn default() -> Self {
        let PullOptions { downloads, unpacks, retry } = PullOptions::default();
        let stall_timeout = GoDuration(Duration::from_secs(30));
        Self { downloads, unpacks, attempts: retry.attempts, stall_timeout }
    }
}
