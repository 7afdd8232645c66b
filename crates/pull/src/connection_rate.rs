//! Measures whether a connection is fast enough to wait for.

use std::time::Duration;

use tokio::time::Instant;

/// Bytes of one connection, or of several that follow each other, compared with the least rate
/// window by window.
pub(super) struct Rate {
    least: u64,
    window: Duration,
    since: Instant,
    /// The part of the window before `since`.
    before: Duration,
    bytes: u64,
}

impl Rate {
    /// Starts a measurement of `least` bytes a second over each `window`.
    pub(super) fn new(least: u64, window: Duration) -> Self {
        Self { least, window, since: Instant::now(), before: Duration::ZERO, bytes: 0 }
    }

    /// So many more bytes have come. The failure is how little came in a window.
    pub(super) fn keeps(&mut self, bytes: u64) -> Result<(), u64> {
        self.bytes += bytes;
        let elapsed = self.before + self.since.elapsed();
        if elapsed < self.window {
            return Ok(());
        }
        if self.bytes < self.least.saturating_mul(elapsed.as_secs()) {
            return Err(self.bytes);
        }
        (self.since, self.before, self.bytes) = (Instant::now(), Duration::ZERO, 0);
        Ok(())
    }

    /// Its connection gave way; no time passes until the next one goes on.
    #[must_use]
    pub(super) fn paused(mut self) -> Self {
        self.before += self.since.elapsed();
        self
    }

    /// Another connection goes on.
    #[must_use]
    pub(super) fn resumed(mut self) -> Self {
        self.since = Instant::now();
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn turns_that_are_shorter_than_the_window_are_measured_together() {
        let mut rate = Rate::new(1024, Duration::from_secs(30));
        tokio::time::advance(Duration::from_secs(25)).await;
        rate.keeps(1).expect("no window has passed");
        rate = rate.paused();
        tokio::time::advance(Duration::from_mins(10)).await;
        rate = rate.resumed();
        rate.keeps(1).expect("nobody asked for bytes meanwhile");
        tokio::time::advance(Duration::from_secs(25)).await;
        assert_eq!(rate.keeps(1), Err(3));
    }
}
