//! When the background pauses.
//!
//! While pods start, and for a moment after, since they come in groups; but no longer than
//! [`TURN`]: then it works for as long, whatever comes, so that a node whose pods never cease to
//! start is warmed too, at half the pace.

use std::time::{Duration, Instant};

/// Between the pods of a group.
const LINGER: Duration = Duration::from_millis(250);
/// How long pods go first, and how long they do not, when they never cease to come.
const TURN: Duration = Duration::from_secs(10);

/// Pods that start, and since when they have gone first.
#[derive(Debug, Default)]
pub(super) struct Turns {
    starting: usize,
    /// When the last one was done.
    ended: Option<Instant>,
    /// None while no pod has started for a while.
    since: Option<Instant>,
}

impl Turns {
    /// A pod starts.
    pub(super) fn begin(&mut self, now: Instant) {
        if self.since.is_none() || self.is_quiet(now) {
            self.since = Some(now);
        }
        self.starting += 1;
    }

    /// One of them is done.
    pub(super) fn end(&mut self, now: Instant) {
        self.starting -= 1;
        self.ended = Some(now);
    }

    /// How long to pause before it is worth asking again; none when there is no reason to.
    pub(super) fn wait(&mut self, now: Instant) -> Option<Duration> {
        if self.is_quiet(now) {
            self.since = None;
        }
        let gone_first = now.saturating_duration_since(self.since?);
        if gone_first >= 2 * TURN {
            self.since = Some(now);
            return self.wait(now);
        }
        let left = TURN.checked_sub(gone_first).filter(|left| !left.is_zero())?;
        match self.ended {
            Some(ended) if self.starting == 0 => {
                Some(left.min((ended + LINGER).saturating_duration_since(now)))
            }
            _ => Some(left),
        }
    }

    /// Whether nothing changes before the next pod starts.
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
    /// Of a turn.
    const ALL_BUT_A_SECOND: Duration = Duration::from_secs(TURN.as_secs() - 1);

    #[test]
    fn pods_of_a_group_go_first_and_the_gaps_between_them_too() {
        let (mut turns, now) = (Turns::default(), Instant::now());
        assert_eq!(turns.wait(now), None, "nobody starts");
        assert!(turns.is_over());
        turns.begin(now);
        assert_eq!(turns.wait(now), Some(TURN));
        turns.begin(now);
        turns.end(now + SECOND);
        assert_eq!(turns.wait(now + SECOND), Some(ALL_BUT_A_SECOND), "one still starts");
        let done = now + 2 * SECOND;
        turns.end(done);
        assert_eq!(turns.wait(done), Some(LINGER));
        turns.begin(done + LINGER / 2);
        turns.end(done + LINGER / 2);
        assert_eq!(turns.wait(done + LINGER), Some(LINGER / 2), "the group goes on");
        assert_eq!(turns.wait(done + 2 * LINGER), None);
        assert!(turns.is_over());
    }

    #[test]
    fn who_never_ceases_to_start_takes_turns() {
        let (mut turns, now) = (Turns::default(), Instant::now());
        turns.begin(now);
        assert_eq!(turns.wait(now + ALL_BUT_A_SECOND), Some(SECOND));
        assert_eq!(turns.wait(now + TURN), None);
        turns.begin(now + TURN);
        assert_eq!(
            turns.wait(now + TURN + ALL_BUT_A_SECOND),
            None,
            "a new one does not change that"
        );
        assert!(!turns.is_over());
        assert_eq!(turns.wait(now + 2 * TURN), Some(TURN), "their turn again");
        turns.end(now + 2 * TURN);
        turns.end(now + 2 * TURN);
        assert_eq!(turns.wait(now + 2 * TURN + LINGER), None);
        let later = now + 3 * TURN;
        turns.begin(later);
        assert_eq!(turns.wait(later), Some(TURN), "what was before does not count");
    }
}
