//! Computes when each item is read back. Pure.
//!
//! Each item has its turn once in a period, at a moment that follows from its name. Names hold digests, so the moments
//! are spread evenly over the period, whenever the content arrived. A node's key shifts them, so that nodes with the
//! same content and one storage do not read it at the same time. The next item is the one that was read longest ago, so
//! one time stores the progress of all of them.
//!
//! After a downtime, or at the first start, the missed turns are taken in their order, at eight times the usual pace.

use std::time::Duration;

use pull::content_repair::Item;

/// The factor by which missed turns are faster than others.
const CATCH_UP: i64 = 8;
/// The part of the interval that is left for reading itself, for pods that start, and for restarts: one sixteenth.
const RESERVE: u32 = 16;
/// The number of times in a period that the names of all objects are listed.
const LOOKS: i64 = 64;
/// The shortest time between two listings, in milliseconds.
const SHORTEST_LOOK: i64 = 1000;

/// The turns of one node. Times are milliseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ScrubSchedule {
    period: i64,
    shift: u64,
}

/// The turns between two moments, in their order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ScrubTurns {
    /// The items, each with its moment.
    pub(super) items: Vec<(i64, Item)>,
    /// The end of the range: all turns before it are included.
    pub(super) end: i64,
}

impl ScrubSchedule {
    /// Creates the schedule of the node with this key, which reads everything within `interval`.
    pub(super) fn new(interval: Duration, node_key: &[u8; 32]) -> Self {
        let period = interval.saturating_sub(interval / RESERVE);
        let period = i64::try_from(period.as_millis()).unwrap_or(i64::MAX / 4).max(1);
        let shift = node_key.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        Self { period, shift }
    }

    /// Returns the moment to continue from. `through` is the progress of an earlier process. If it is older than a
    /// period, or in the future because a clock was ahead, everything is read.
    pub(super) fn start(&self, through: Option<i64>, is_empty: bool, now: i64) -> i64 {
        let oldest = now - self.period;
        match through {
            None if is_empty => now,
            Some(through) if through <= now => through.max(oldest),
            _ => oldest,
        }
    }

    /// Returns the next turns of these items after `through`.
    pub(super) fn turns(&self, items: impl IntoIterator<Item = Item>, through: i64) -> ScrubTurns {
        let end = through + (self.period / LOOKS).max(SHORTEST_LOOK);
        let with_moment = items.into_iter().map(|item| (self.next(&item, through), item));
        let mut items: Vec<_> = with_moment.filter(|(moment, _)| *moment <= end).collect();
        items.sort_unstable_by(|one, two| one.0.cmp(&two.0).then_with(|| one.1.cmp(&two.1)));
        ScrubTurns { items, end }
    }

    /// Returns the time to wait at `through` before the turns until `moment` are taken.
    pub(super) fn wait(&self, through: i64, moment: i64, now: i64) -> Duration {
        let caught_up = (moment - through) / CATCH_UP;
        let wait = caught_up.max(moment - now).clamp(0, self.period);
        Duration::from_millis(wait.unsigned_abs())
    }

    /// Returns the delay of a scrub that has read everything up to `through`.
    pub(super) fn lag(through: i64, now: i64) -> Duration {
        Duration::from_millis(now.saturating_sub(through).max(0).unsigned_abs())
    }

    /// Returns the first moment of an item after a time.
    fn next(&self, item: &Item, after: i64) -> i64 {
        let within = (after - self.offset(item)).rem_euclid(self.period);
        after + self.period - within
    }

    /// Returns the offset of an item in the period.
    fn offset(&self, item: &Item) -> i64 {
        let hash = match item {
            Item::Blobs => 0,
            Item::Object(name) => {
                let digits = name.as_str().split('/').nth(1).and_then(|key| key.get(..16));
                digits.and_then(|digits| u64::from_str_radix(digits, 16).ok()).unwrap_or_default()
            }
        };
        let part = u128::from(hash.wrapping_add(self.shift));
        let offset = (part * u128::from(self.period.unsigned_abs())) >> 64;
        i64::try_from(offset).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use oci::Digest;
    use store::{LayerKey, ObjectName};

    const HOUR: i64 = 3_600_000;
    const WEEK: Duration = Duration::from_hours(168);
    const NOW: i64 = 1_790_000_000_000;

    fn items(count: u32) -> Vec<Item> {
        let layer = |number: u32| {
            let key = LayerKey::new(Digest::of(&number.to_be_bytes()), "", "");
            Item::Object(ObjectName::layer(key, 1))
        };
        std::iter::once(Item::Blobs).chain((1..count).map(layer)).collect()
    }

    fn schedule(interval: Duration) -> ScrubSchedule {
        ScrubSchedule::new(interval, &[7; 32])
    }

    /// Takes turns with a clock of its own. Returns the time of each read.
    fn run(
        schedule: ScrubSchedule,
        items: &[Item],
        (mut through, mut now): (i64, i64),
        end: i64,
    ) -> Vec<(i64, Item)> {
        let mut read = Vec::new();
        while now < end {
            let turns = schedule.turns(items.iter().cloned(), through);
            for (moment, item) in turns.items {
                now +=
                    i64::try_from(schedule.wait(through, moment, now).as_millis()).expect("short");
                through = moment;
                read.push((now, item));
            }
            now +=
                i64::try_from(schedule.wait(through, turns.end, now).as_millis()).expect("short");
            through = turns.end;
        }
        read.retain(|(time, _)| *time < end);
        read
    }

    #[test]
    fn each_item_has_one_turn_in_each_interval_and_they_are_spread() {
        let (schedule, items) = (schedule(WEEK), items(1000));
        let read = run(schedule, &items, (NOW, NOW), NOW + schedule.period);
        let mut names: Vec<_> = read.iter().map(|(_, item)| item.clone()).collect();
        names.sort();
        let mut all = items.clone();
        all.sort();
        assert_eq!(names, all, "each of them once");
        for day in 0..6 {
            let begin = NOW + day * 24 * HOUR;
            let count = read.iter().filter(|(time, _)| (begin..begin + 24 * HOUR).contains(time));
            let count = count.count();
            assert!((100..210).contains(&count), "{count} on day {day}");
        }
        // The second period has the order of the first: the next item is the one that was read longest ago.
        let twice = run(schedule, &items, (NOW, NOW), NOW + 2 * schedule.period);
        let (first, second) = twice.split_at(items.len());
        let names =
            |turns: &[(i64, Item)]| turns.iter().map(|turn| turn.1.clone()).collect::<Vec<_>>();
        assert_eq!(names(first), names(second));
    }

    #[test]
    fn a_downtime_is_caught_up_at_a_limited_pace() {
        let (schedule, items) = (schedule(WEEK), items(1000));
        let through = schedule.start(Some(NOW - 1000 * HOUR), false, NOW);
        assert_eq!(through, NOW - schedule.period, "all of it");
        let read = run(schedule, &items, (through, NOW), NOW + schedule.period / 7 + HOUR);
        let distinct: std::collections::BTreeSet<_> = read.iter().map(|(_, item)| item).collect();
        assert_eq!(distinct.len(), items.len(), "within a seventh of the interval");
        let first_hour = read.iter().filter(|(time, _)| *time < NOW + HOUR).count();
        assert!((20..90).contains(&first_hour), "{first_hour} in the first hour");
    }

    #[test]
    fn a_restart_goes_on_where_it_stopped() {
        let schedule = schedule(WEEK);
        assert_eq!(schedule.start(Some(NOW - HOUR), false, NOW), NOW - HOUR);
        assert_eq!(schedule.start(None, true, NOW), NOW, "nothing is there to be read");
        assert_eq!(schedule.start(None, false, NOW), NOW - schedule.period);
        // A clock that was ahead proves nothing.
        assert_eq!(schedule.start(Some(NOW + HOUR), false, NOW), NOW - schedule.period);
        assert_eq!(ScrubSchedule::lag(NOW - 5000, NOW), Duration::from_secs(5));
        assert_eq!(ScrubSchedule::lag(NOW + 5000, NOW), Duration::ZERO);
    }

    #[test]
    fn nodes_take_other_turns() {
        let one = ScrubSchedule::new(WEEK, &[1; 32]);
        let two = ScrubSchedule::new(WEEK, &[200; 32]);
        let [_, item] = &items(2)[..] else { panic!("two") };
        assert_ne!(one.next(item, NOW), two.next(item, NOW));
    }

    proptest! {
        #[test]
        fn a_moment_is_after_the_time_and_within_a_period(
            after in 0..4_000_000_000_000_i64,
            seconds in 1..700_000_u64,
            shift: [u8; 32],
        ) {
            let schedule = ScrubSchedule::new(Duration::from_secs(seconds), &shift);
            for item in items(5) {
                let next = schedule.next(&item, after);
                prop_assert!(next > after && next <= after + schedule.period);
                prop_assert_eq!(schedule.next(&item, next), next + schedule.period);
                prop_assert_eq!(schedule.next(&item, next - 1), next);
            }
        }
    }
}
