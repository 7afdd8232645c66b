//! The volumes that follow a tag as metrics, read at each scrape.

use std::fmt;

use crate::following::{FollowState, FollowedTag};
use telemetry::metric_families::MetricWriter;

pub(super) fn write(following: &FollowState, mut metrics: MetricWriter<'_>) -> fmt::Result {
    let states = following.tags.states();
    let current = states.iter().filter(|(_, state)| FollowedTag::is_current(state)).count() as u64;
    let counts = [("current", current), ("failed", states.len() as u64 - current)];
    let help = "Volumes that follow a tag: current, or failed while they keep earlier content";
    metrics.gauges("followed_volumes", help, "state", counts)?;
    let help = "Switches of such volumes to other content";
    metrics.counter("follow_switches", help, None, following.switches())?;
    let help = "Failed attempts to follow a tag";
    metrics.counter("follow_failures", help, None, following.tags.failures())
}
