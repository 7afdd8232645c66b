//! The `cache` section: how much of the disk content may take, and how often it is read back. Read at start.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::Deserialize;

use super::{GoDuration, Quantity};
use store::CacheOptions;

/// Intervals in which content can be read back.
const INTERVALS: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_hours(10 * 365 * 24);

/// The `cache` section.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CacheSection {
    /// Bytes of all content.
    pub max_bytes: Option<Quantity>,
    /// Above this part of the filesystem in use, by whomever, content is evicted ...
    pub high_threshold_percent: u8,
    /// ... until no more than this part is.
    pub low_threshold_percent: u8,
    /// This part of the filesystem stays free.
    pub min_free_percent: u8,
    /// ... and this part of its inodes.
    pub min_free_inodes_percent: u8,
    /// Bytes that pins may hold together; half of what content may take unless it is given.
    pub max_pinned_bytes: Option<Quantity>,
    /// How long content stays after its last publish or unpublish; a Go duration.
    pub minimum_age: GoDuration,
    /// Publishing is off until the state directory is a mount point.
    pub require_mountpoint: bool,
    /// All content is read back within this time; 0 turns that off; a Go duration.
    pub scrub_interval: GoDuration,
}

impl CacheSection {
    /// Within which time all content is read back; none when it is not.
    #[must_use]
    pub fn scrub_interval(&self) -> Option<Duration> {
        Some(self.scrub_interval.0).filter(|interval| !interval.is_zero())
    }

    pub(super) fn check(&self) -> Result<(), String> {
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
        if self.scrub_interval().is_some_and(|interval| !INTERVALS.contains(&interval)) {
            return Err("cache.scrubInterval must be 0, or from 1s to 87600h".to_owned());
        }
        if self.low_threshold_percent > self.high_threshold_percent {
            return Err(
                "cache.lowThresholdPercent must not be above cache.highThresholdPercent".to_owned()
            );
        }
        if let (Some(Quantity(pinned)), Some(Quantity(all))) =
            (self.max_pinned_bytes, self.max_bytes)
            && pinned > all
        {
            return Err("cache.maxPinnedBytes must not be above cache.maxBytes".to_owned());
        }
        Ok(())
    }

    /// What the store is opened with.
    #[must_use]
    pub fn options(&self) -> CacheOptions {
        CacheOptions {
            max_bytes: self.max_bytes.map(|quantity| quantity.0),
            high_threshold_percent: self.high_threshold_percent,
            low_threshold_percent: self.low_threshold_percent,
            min_free_percent: self.min_free_percent,
            min_free_inodes_percent: self.min_free_inodes_percent,
            max_pinned_bytes: self.max_pinned_bytes.map(|quantity| quantity.0),
            minimum_age: self.minimum_age.0,
            require_mountpoint: self.require_mountpoint,
        }
    }
}

impl Default for CacheSection {
    fn default() -> Self {
        let options = CacheOptions::default();
        Self {
            max_bytes: options.max_bytes.map(Quantity),
            high_threshold_percent: options.high_threshold_percent,
            low_threshold_percent: options.low_threshold_percent,
            min_free_percent: options.min_free_percent,
            min_free_inodes_percent: options.min_free_inodes_percent,
            max_pinned_bytes: options.max_pinned_bytes.map(Quantity),
            minimum_age: GoDuration(options.minimum_age),
            require_mountpoint: options.require_mountpoint,
            scrub_interval: GoDuration(Duration::from_hours(7 * 24)),
        }
    }
}
