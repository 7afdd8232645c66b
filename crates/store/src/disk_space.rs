//! The space of the state directory's filesystem, and the part of it that the cache may take.

use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use super::error::{IoContext as _, StoreError};
use super::space_amount::SpaceAmount;
use text::duration::go_duration;
use text::quantity::optional_bytes;

/// The intervals in which content can be read back.
const SCRUB_INTERVALS: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_hours(10 * 365 * 24);

/// The `cache` section of the configuration file: the part of the filesystem that the cache may take, and how often
/// its content is read back. Read at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CacheOptions {
    /// Bytes of all content; none means as much as the filesystem allows.
    #[serde(deserialize_with = "optional_bytes")]
    pub max_bytes: Option<u64>,
    /// The use of the filesystem, by any program, above which content is evicted ...
    pub high_threshold_percent: u8,
    /// ... until no more than this part is.
    pub low_threshold_percent: u8,
    /// This part of the filesystem stays free.
    pub min_free_percent: u8,
    /// ... and this part of its inodes.
    pub min_free_inodes_percent: u8,
    /// Bytes that pins may hold together; none means half of what content may take.
    #[serde(deserialize_with = "optional_bytes")]
    pub max_pinned_bytes: Option<u64>,
    /// Time that content stays after its last publish or unpublish.
    #[serde(deserialize_with = "go_duration")]
    pub minimum_age: Duration,
    /// The state directory must be a mount point: a disk that is mounted late would else be
    /// filled behind its back.
    pub require_mountpoint: bool,
    /// Time within which all content is read back; 0 turns that off.
    #[serde(deserialize_with = "go_duration")]
    pub scrub_interval: Duration,
}

/// The space of a filesystem as a process without privileges could use it, counted as `df` does: what is
/// reserved for root is neither used nor free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskSpace {
    /// The number of free bytes.
    pub free_bytes: u64,
    /// Used and free bytes.
    pub total_bytes: u64,
    /// Inodes that are left.
    pub free_inodes: u64,
    /// Inodes that there are; 0 where the filesystem makes them as needed.
    pub total_inodes: u64,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self {
            max_bytes: None,
            // The kubelet evicts images at 85 and pods at 90 (or 85) percent: we go first.
            high_threshold_percent: 75,
            low_threshold_percent: 65,
            min_free_percent: 20,
            min_free_inodes_percent: 10,
            max_pinned_bytes: None,
            minimum_age: Duration::from_mins(2),
            require_mountpoint: false,
            scrub_interval: Duration::from_hours(7 * 24),
        }
    }
}

impl CacheOptions {
    /// Checks the values of the configuration file.
    ///
    /// # Errors
    ///
    /// Names the first key with a wrong value, and says what it must be.
    pub fn check(&self) -> Result<(), String> {
        let percents = [
            ("highThresholdPercent", self.high_threshold_percent),
            ("lowThresholdPercent", self.low_threshold_percent),
            ("minFreePercent", self.min_free_percent),
            ("minFreeInodesPercent", self.min_free_inodes_percent),
        ];
        for (name, value) in percents {
            if value > 100 {
                return Err(format!("cache.{name} must be from 0 to 100"));
            }
        }
        if self.scrub_interval().is_some_and(|interval| !SCRUB_INTERVALS.contains(&interval)) {
            return Err("cache.scrubInterval must be 0, or from 1s to 87600h".to_owned());
        }
        if self.low_threshold_percent > self.high_threshold_percent {
            return Err(
                "cache.lowThresholdPercent must not be above cache.highThresholdPercent".to_owned()
            );
        }
        if let (Some(pinned), Some(all)) = (self.max_pinned_bytes, self.max_bytes)
            && pinned > all
        {
            return Err("cache.maxPinnedBytes must not be above cache.maxBytes".to_owned());
        }
        Ok(())
    }

    /// Returns the time within which all content is read back, or `None` if the scrub is off.
    pub fn scrub_interval(&self) -> Option<Duration> {
        Some(self.scrub_interval).filter(|interval| !interval.is_zero())
    }

    /// Returns the bytes that pins may hold together on a filesystem of this size.
    ///
    /// The default is half of `max_bytes`, or of the filesystem up to the low threshold, whichever is less: pins are
    /// never evicted, so the other half is left for what pods use.
    pub fn pinned_bytes_limit(&self, space: &DiskSpace) -> u64 {
        self.max_pinned_bytes.unwrap_or_else(|| {
            let filesystem = percent(space.total_bytes, self.low_threshold_percent);
            self.max_bytes.map_or(filesystem, |max| max.min(filesystem)) / 2
        })
    }
}

impl DiskSpace {
    /// Reads the space of the filesystem that a folder lies on.
    pub fn of(folder: &Path) -> Result<Self, StoreError> {
        let status = nix::sys::statvfs::statvfs(folder).io_context("look at", folder)?;
        let bytes = |blocks: u64| blocks.saturating_mul(status.fragment_size());
        Ok(Self {
            free_bytes: bytes(status.blocks_available()),
            total_bytes: bytes(
                status.blocks().saturating_sub(status.blocks_free()) + status.blocks_available(),
            ),
            free_inodes: status.files_available(),
            total_inodes: status.files(),
        })
    }

    /// Returns the space that stays free by these options.
    pub fn floor(&self, options: &CacheOptions) -> SpaceAmount {
        SpaceAmount {
            bytes: percent(self.total_bytes, options.min_free_percent),
            inodes: percent(self.total_inodes, options.min_free_inodes_percent),
        }
    }

    /// Returns the space that is missing until `wanted` is free.
    pub fn missing_until(&self, wanted: SpaceAmount) -> SpaceAmount {
        let inodes = match self.total_inodes {
            0 => 0,
            _ => wanted.inodes.saturating_sub(self.free_inodes),
        };
        SpaceAmount { bytes: wanted.bytes.saturating_sub(self.free_bytes), inodes }
    }

    /// Returns how much more is free than this.
    pub(super) fn above(&self, kept: SpaceAmount) -> SpaceAmount {
        let inodes = match self.total_inodes {
            0 => u64::MAX,
            _ => self.free_inodes,
        };
        SpaceAmount { bytes: self.free_bytes, inodes }.less(kept)
    }

    /// Returns the bytes to free once the high threshold is passed: down to the low one.
    pub fn above_threshold(&self, options: &CacheOptions) -> u64 {
        let used = self.total_bytes.saturating_sub(self.free_bytes);
        if used <= percent(self.total_bytes, options.high_threshold_percent) {
            return 0;
        }
        used - percent(self.total_bytes, options.low_threshold_percent)
    }
}

fn percent(total: u64, percent: u8) -> u64 {
    let part = u128::from(total) * u128::from(percent) / 100;
    u64::try_from(part).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: DiskSpace =
        DiskSpace { free_bytes: 300, total_bytes: 1000, free_inodes: 50, total_inodes: 100 };

    #[test]
    fn thresholds_and_floor_are_parts_of_the_filesystem() {
        let options = CacheOptions::default();
        assert_eq!(SPACE.floor(&options), SpaceAmount { bytes: 200, inodes: 10 });
        assert_eq!(SPACE.above_threshold(&options), 0);
        let fuller = DiskSpace { free_bytes: 240, ..SPACE };
        assert_eq!(fuller.above_threshold(&options), 760 - 650);
        let missing = SPACE.missing_until(SpaceAmount { bytes: 310, inodes: 60 });
        assert_eq!(missing, SpaceAmount { bytes: 10, inodes: 10 });
    }

    #[test]
    fn pins_have_half_of_what_content_may_take_unless_it_is_configured() {
        let options = CacheOptions::default();
        assert_eq!(options.pinned_bytes_limit(&SPACE), 325);
        let quota = CacheOptions { max_bytes: Some(100), ..options };
        assert_eq!(quota.pinned_bytes_limit(&SPACE), 50);
        let generous = CacheOptions { max_bytes: Some(5000), ..options };
        assert_eq!(generous.pinned_bytes_limit(&SPACE), 325);
        let configured = CacheOptions { max_pinned_bytes: Some(900), ..options };
        assert_eq!(configured.pinned_bytes_limit(&SPACE), 900);
    }

    #[test]
    fn a_filesystem_that_counts_no_inodes_runs_out_of_none() {
        let btrfs = DiskSpace { free_inodes: 0, total_inodes: 0, ..SPACE };
        assert!(btrfs.missing_until(SpaceAmount { bytes: 0, inodes: 5 }).is_nothing());
    }
}
