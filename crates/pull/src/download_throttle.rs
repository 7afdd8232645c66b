//! Bytes a second, for all downloads of a node together.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Bytes that may come at once after a pause.
const BURST: Duration = Duration::from_millis(100);

/// Lets through so many bytes a second; without a limit, all.
pub(super) struct Throttle {
    bytes_per_second: Option<u64>,
    /// When all bytes that were let through so far have had their time.
    due: Mutex<Instant>,
}

impl Throttle {
    /// Creates a throttle with a limit, or without.
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, due: Mutex::new(Instant::now()) }
    }

    /// Returns when these bytes have had their time.
    pub(super) async fn pass(&self, bytes: u64) {
        let Some(limit) = self.bytes_per_second else { return };
        let due = {
            let mut due = self.due.lock();
            let now = Instant::now();
            let start = (*due).max(now.checked_sub(BURST).unwrap_or(now));
            *due = start + Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / limit.max(1));
            *due
        };
        tokio::time::sleep_until(due).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_downloads_share_the_rate() {
        let throttle = Throttle::new(Some(1000));
        let started = Instant::now();
        let both = async { tokio::join!(throttle.pass(2000), throttle.pass(3000)) };
        both.await;
        let seconds = started.elapsed().as_secs_f64();
        assert!((4.8..=5.0).contains(&seconds), "{seconds}");
        tokio::time::advance(Duration::from_mins(1)).await;
        let started = Instant::now();
        throttle.pass(1000).await;
        assert!(started.elapsed() >= Duration::from_millis(900), "a pause is not saved up");
    }
}
