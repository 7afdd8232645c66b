//! The times at which the background pauses.
//!
//! It pauses while pods start, and for a moment after, since they come in groups, but for no longer
//! than [`TURN`]. Then it works for as long, whether pods start or not. So a node whose pods never
//! cease to start is warmed too, at half the pace.

use std::time::{Duration, Instant};

/// The longest gap between two pods of a group.
const LINGER: Duration = Duration::from_millis(250);
/// The longest pause, and the time of work after it while pods go on starting.
const TURN: Duration = Duration::from_secs(10);

/// Counts the pods that start, and decides how long the background pauses for them.
#[derive(Debug, Default)]
pub(super) struct PauseSchedule {
    starting: usize,
    /// The end of the latest start.
    ended: Option<Instant>,
    /// The start of the group's first pod, or of the latest pause that was renewed. Unset while no
    /// pod has started for a while.
    since: Option<Instant>,
}

impl PauseSchedule {
    /// Counts a pod that starts.
    pub(super) fn begin(&mut self, now: Instant) {
        if self.since.is_none() || self.is_quiet(now) {
            self.since = Some(now);
        }
        self.starting += 1;
    }

    /// Removes a pod whose start has ended.
    pub(super) fn end(&mut self, now: Instant) {
        self.starting -= 1;
        self.ended = Some(now);
    }

    /// Returns the time to pause before asking again, if there is a reason to pause.
    pub(super) fn pause(&mut self, now: Instant) -> Option<Duration> {
        if self.is_quiet(now) {
            self.since = None;
        }
        let elapsed = now.saturating_duration_since(self.since?);
        if elapsed >= 2 * TURN {
            self.since = Some(now);
            return self.pause(now);
        }
        let left = TURN.checked_sub(elapsed).filter(|left| !left.is_zero())?;
        match self.ended {
            Some(ended) if self.starting == 0 => {
                Some(left.min((ended + LINGER).saturating_duration_since(now)))
            }
            _ => Some(left),
        }
    }

    /// Returns whether there is no reason to pause before the next pod starts.
    pub(super) fn is_over(&self) -> bool {
        self.since.is_none()
    }

    fn is_quiet(&self, now: Instant) -> bool {
        let long_ago = |ended| now.saturating_duration_since(ended) >= LINGER;
        self.starting == 0 && self.ended.is_none_or(long_ago)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const ALL_BUT_A_SECOND: Duration = Duration::from_secs(TURN.as_secs() - 1);

    #[test]
    fn the_background_pauses_for_a_group_of_pods_and_the_gaps_between_them() {
        let (mut schedule, now) = (PauseSchedule::default(), Instant::now());
        assert_eq!(schedule.pause(now), None, "no pod starts");
        assert!(schedule.is_over());
        schedule.begin(now);
        assert_eq!(schedule.pause(now), Some(TURN));
        schedule.begin(now);
        schedule.end(now + SECOND);
        assert_eq!(schedule.pause(now + SECOND), Some(ALL_BUT_A_SECOND), "one still starts");
        let done = now + 2 * SECOND;
        schedule.end(done);
        assert_eq!(schedule.pause(done), Some(LINGER));
        schedule.begin(done + LINGER / 2);
        schedule.end(done + LINGER / 2);
        assert_eq!(schedule.pause(done + LINGER), Some(LINGER / 2), "the group goes on");
        assert_eq!(schedule.pause(done + 2 * LINGER), None);
        assert!(schedule.is_over());
    }

    #[test]
    fn pauses_and_work_alternate_while_pods_never_cease_to_start() {
        let (mut schedule, now) = (PauseSchedule::default(), Instant::now());
        schedule.begin(now);
        assert_eq!(schedule.pause(now + ALL_BUT_A_SECOND), Some(SECOND));
        assert_eq!(schedule.pause(now + TURN), None);
        schedule.begin(now + TURN);
        assert_eq!(
            schedule.pause(now + TURN + ALL_BUT_A_SECOND),
            None,
            "another pod does not change that"
        );
        assert!(!schedule.is_over());
        assert_eq!(schedule.pause(now + 2 * TURN), Some(TURN), "the next pause");
        schedule.end(now + 2 * TURN);
        schedule.end(now + 2 * TURN);
        assert_eq!(schedule.pause(now + 2 * TURN + LINGER), None);
        let later = now + 3 * TURN;
        schedule.begin(later);
        assert_eq!(schedule.pause(later), Some(TURN), "earlier groups do not count");
    }
}
