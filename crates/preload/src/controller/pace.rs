//! How fast may be written: so many a second over time, a few at once, and not at all while the API server is busy.

use std::time::Duration;

use oci::backoff::RetryBackoff;
use tokio::time::Instant;

/// Writes that may come at once after a quiet time: of so many seconds.
const BURST: f64 = 2.0;
/// The pauses after the API server was busy, where it does not say how long.
const PAUSES: RetryBackoff =
    RetryBackoff { first: Duration::from_millis(500), longest: Duration::from_secs(30) };
/// The longest that it asks for and gets.
const LONGEST_ASKED: Duration = Duration::from_mins(5);

/// A bucket of writes that fills over time.
#[derive(Debug)]
pub(super) struct Bucket {
    per_second: f64,
    filled: f64,
    at: Instant,
    paused_until: Instant,
    failures: u32,
}

impl Bucket {
    pub(super) fn new(per_second: u32, now: Instant) -> Self {
        let per_second = f64::from(per_second.max(1));
        Self { per_second, filled: per_second * BURST, at: now, paused_until: now, failures: 0 }
    }

    /// Takes one write out, or says when there will be one.
    pub(super) fn take(&mut self, now: Instant) -> Result<(), Instant> {
        if now < self.paused_until {
            return Err(self.paused_until);
        }
        let grown = now.duration_since(self.at).as_secs_f64() * self.per_second;
        self.filled = (self.filled + grown).min(self.per_second * BURST);
        self.at = now;
        if self.filled < 1.0 {
            return Err(now + Duration::from_secs_f64((1.0 - self.filled) / self.per_second));
        }
        self.filled -= 1.0;
        Ok(())
    }

    /// The API server is busy or away.
    pub(super) fn pause(&mut self, asked: Option<Duration>, now: Instant) {
        // Writes that were under way together fail together: that is one failure.
        if now < self.paused_until {
            return;
        }
        self.failures = self.failures.saturating_add(1);
        let asked = asked.map(|asked| asked.clamp(PAUSES.first, LONGEST_ASKED));
        self.paused_until = now + asked.unwrap_or_else(|| PAUSES.after(self.failures));
    }

    /// It answers.
    pub(super) fn answered(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_come_as_fast_as_they_may() {
        let start = Instant::now();
        let mut bucket = Bucket::new(10, start);
        let burst = (0..100).take_while(|_| bucket.take(start).is_ok()).count();
        assert_eq!(burst, 20);
        let next = bucket.take(start).expect_err("empty");
        assert!(bucket.take(next + Duration::from_millis(1)).is_ok());
        let later = start + Duration::from_mins(1);
        assert_eq!((0..100).take_while(|_| bucket.take(later).is_ok()).count(), 20);
    }

    #[test]
    fn pauses_grow_and_end() {
        let start = Instant::now();
        let mut bucket = Bucket::new(10, start);
        bucket.pause(None, start);
        bucket.pause(None, start);
        let first = bucket.take(start).expect_err("paused");
        assert_eq!(first - start, PAUSES.first);
        bucket.pause(None, first);
        assert_eq!(bucket.take(first).expect_err("paused") - first, PAUSES.first * 2);
        let second = first + PAUSES.first * 2;
        bucket.pause(Some(Duration::from_mins(10)), second);
        assert_eq!(bucket.take(second).expect_err("paused") - second, LONGEST_ASKED);
        let third = second + LONGEST_ASKED;
        assert!(bucket.take(third).is_ok());
        bucket.answered();
        bucket.pause(None, third);
        assert_eq!(bucket.take(third).expect_err("paused") - third, PAUSES.first);
    }
}
