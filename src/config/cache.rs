//! The `cache` section: the disk space of content, and the interval of the scrub. Read at the start.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::Deserialize;

use super::{GoDuration, Quantity};
use store::CacheOptions;

/// The intervals in which content can be read back.
const INTERVALS: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_hours(10 * 365 * 24);

/// The `cache` section.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CacheSection {
    /// The most bytes of all content.
    pub max_bytes: Option<Quantity>,
    /// The use of the filesystem, by any program, above which content is evicted ...
    pub high_threshold_percent: u8,
    /// ... until the use is at most this.
    pub low_threshold_percent: u8,
    /// The part of the filesystem that is kept free.
    pub min_free_percent: u8,
    /// The part of the filesystem's inodes that is kept free.
    pub min_free_inodes_percent: u8,
    /// The most bytes that pins may hold together. The default is half of the space for content.
    pub max_pinned_bytes: Option<Quantity>,
    /// The time that content stays after its last publish or unpublish; a Go duration.
    pub minimum_age: GoDuration,
    /// Refuse to publish until the state directory is a mount point.
    pub require_mountpoint: bool,
    /// The time within which all content is read back; 0 turns that off; a Go duration.
    pub scrub_interval: GoDuration,
}

impl CacheSection {
    /// Returns the time within which all content is read back, or `None` if the scrub is off.
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

    /// Returns the options of the store.
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
