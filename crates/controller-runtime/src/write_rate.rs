//! Rate limit of writes: a token bucket, and a pause while the API server is overloaded.

use std::sync::Arc;
use std::time::Duration;

use oci::backoff::RetryBackoff;
use parking_lot::Mutex;
use tokio::time::Instant;

/// Burst after a quiet period, in seconds of the average rate.
const BURST: f64 = 2.0;
/// Pauses after the API server was overloaded, without `Retry-After`.
const PAUSES: RetryBackoff =
    RetryBackoff { first: Duration::from_millis(500), longest: Duration::from_secs(30) };
/// Maximum of `Retry-After`.
const MAXIMUM_RETRY_AFTER: Duration = Duration::from_mins(5);

/// The rate of all writes of this process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct WriteRate(Arc<Mutex<WriteBucket>>);

/// A token bucket for writes.
#[derive(Debug)]
struct WriteBucket {
    per_second: f64,
    filled: f64,
    at: Instant,
    paused_until: Instant,
    failures: u32,
}

impl WriteRate {
    /// Creates a full bucket that gets so many tokens in a second.
    pub fn new(per_second: u32) -> Self {
        Self(Arc::new(Mutex::new(WriteBucket::new(per_second, Instant::now()))))
    }

    /// Takes a token, or returns the time of the next one.
    pub fn take(&self, now: Instant) -> Result<(), Instant> {
        self.0.lock().take(now)
    }

    /// Pauses all writes, since the API server is overloaded or unavailable.
    pub fn pause(&self, retry_after: Option<Duration>, now: Instant) {
        self.0.lock().pause(retry_after, now);
    }

    /// Records that the API server answers.
    pub fn answered(&self) {
        self.0.lock().answered();
    }
}

impl WriteBucket {
    fn new(per_second: u32, now: Instant) -> Self {
        let per_second = f64::from(per_second.max(1));
        Self { per_second, filled: per_second * BURST, at: now, paused_until: now, failures: 0 }
    }

    /// Takes a token, or returns the time of the next one.
    fn take(&mut self, now: Instant) -> Result<(), Instant> {
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

    /// Pauses all writes, since the API server is overloaded or unavailable.
    fn pause(&mut self, retry_after: Option<Duration>, now: Instant) {
        // Concurrent writes fail together, which counts as one failure.
        if now < self.paused_until {
            return;
        }
        self.failures = self.failures.saturating_add(1);
        let requested = retry_after.map(|delay| delay.clamp(PAUSES.first, MAXIMUM_RETRY_AFTER));
        self.paused_until = now + requested.unwrap_or_else(|| PAUSES.after(self.failures));
    }

    /// Records that the API server answers.
    fn answered(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_come_as_fast_as_they_may() {
        let start = Instant::now();
        let mut rate = WriteBucket::new(10, start);
        let burst = (0..100).take_while(|_| rate.take(start).is_ok()).count();
        assert_eq!(burst, 20);
        let next = rate.take(start).expect_err("empty");
        assert!(rate.take(next + Duration::from_millis(1)).is_ok());
        let later = start + Duration::from_mins(1);
        assert_eq!((0..100).take_while(|_| rate.take(later).is_ok()).count(), 20);
    }

    #[test]
    fn pauses_grow_and_end() {
        let start = Instant::now();
        let mut rate = WriteBucket::new(10, start);
        rate.pause(None, start);
        rate.pause(None, start);
        let first = rate.take(start).expect_err("paused");
        assert_eq!(first - start, PAUSES.first);
        rate.pause(None, first);
        assert_eq!(rate.take(first).expect_err("paused") - first, PAUSES.first * 2);
        let second = first + PAUSES.first * 2;
        rate.pause(Some(Duration::from_mins(10)), second);
        assert_eq!(rate.take(second).expect_err("paused") - second, MAXIMUM_RETRY_AFTER);
        let third = second + MAXIMUM_RETRY_AFTER;
        assert!(rate.take(third).is_ok());
        rate.answered();
        rate.pause(None, third);
        assert_eq!(rate.take(third).expect_err("paused") - third, PAUSES.first);
    }
}
