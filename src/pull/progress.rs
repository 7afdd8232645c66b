//! How far a pull is: what users see in `kubectl describe pod` while they wait.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::units::Bytes;

/// Bytes of a flight, counted as they arrive.
#[derive(Debug)]
pub struct Progress {
    started: Instant,
    total: AtomicU64,
    done: AtomicU64,
    /// Bytes that were here when the flight began: they say nothing of its rate.
    resumed: AtomicU64,
}

/// Progress at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Bytes to fetch; 0 while the manifest is not known.
    pub total: u64,
    /// Bytes fetched.
    pub done: u64,
    /// Bytes a second since the flight began.
    pub rate: u64,
    /// At that rate; none while it is unknown.
    pub left: Option<Duration>,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            total: AtomicU64::new(0),
            done: AtomicU64::new(0),
            resumed: AtomicU64::new(0),
        }
    }
}

impl Progress {
    /// More is to be fetched.
    pub fn expect(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes have arrived.
    pub fn arrived(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes were there from an earlier try.
    pub fn resumed(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        self.resumed.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes turned out to be worth nothing.
    pub fn lost(&self, bytes: u64) {
        let less = |done: u64| Some(done.saturating_sub(bytes));
        let _ = self.done.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        let _ = self.resumed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// How far it is now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let total = self.total.load(Ordering::Relaxed);
        let done = self.done.load(Ordering::Relaxed).min(total);
        let fetched = done.saturating_sub(self.resumed.load(Ordering::Relaxed));
        let milliseconds = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let rate = fetched.saturating_mul(1000) / milliseconds.max(1);
        let left = (rate > 0).then(|| Duration::from_secs((total - done).div_ceil(rate)));
        Snapshot { total, done, rate, left }
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { total, done, rate, left } = *self;
        if total == 0 {
            return write!(formatter, "asking the registry");
        }
        if done == total {
            return write!(formatter, "100% of {} fetched, unpacking", Bytes(total));
        }
        let percent = done.saturating_mul(100) / total;
        write!(formatter, "{percent}% ({} of {}), {}/s", Bytes(done), Bytes(total), Bytes(rate))?;
        match left {
            Some(left) => write!(formatter, ", {} left", Left(left)),
            None => write!(formatter, ", time left unknown"),
        }
    }
}

struct Left(Duration);

impl fmt::Display for Left {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_secs() {
            seconds @ 0..120 => write!(formatter, "{seconds} s"),
            seconds @ 120..7200 => write!(formatter, "{} min", seconds / 60),
            seconds => write!(formatter, "{} h", seconds / 3600),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn says_bytes_rate_and_time_left() {
        let progress = Progress::default();
        assert_eq!(progress.snapshot().to_string(), "asking the registry");
        progress.expect(3 << 30);
        progress.resumed(1 << 30);
        tokio::time::advance(Duration::from_secs(10)).await;
        progress.arrived(1 << 29);
        let text = progress.snapshot().to_string();
        // The paused clock rounds up to a millisecond.
        assert!(text.starts_with("50% (1.5 GiB of 3.0 GiB), 51."), "{text}");
        assert!(
            text.ends_with(" MiB/s, 31 s left") || text.ends_with(" MiB/s, 30 s left"),
            "{text}"
        );
        progress.lost(3 << 29);
        assert!(progress.snapshot().to_string().contains("time left unknown"));
        progress.arrived(3 << 30);
        assert_eq!(progress.snapshot().to_string(), "100% of 3.0 GiB fetched, unpacking");
    }
}
