//! Whether a connection brings enough to be worth waiting for.

use std::time::Duration;

use tokio::time::Instant;

/// Bytes of one connection, compared with the least rate window by window.
pub struct Rate {
    least: u64,
    window: Duration,
    since: Instant,
    bytes: u64,
}

impl Rate {
    /// From now on: `least` bytes a second over each `window`.
    #[must_use]
    pub fn new(least: u64, window: Duration) -> Self {
        Self { least, window, since: Instant::now(), bytes: 0 }
    }

    /// So many more bytes have come. The failure is how little came in a window.
    pub fn keeps(&mut self, bytes: u64) -> Result<(), u64> {
        self.bytes += bytes;
        let elapsed = self.since.elapsed();
        if elapsed < self.window {
            return Ok(());
        }
        if self.bytes < self.least.saturating_mul(elapsed.as_secs()) {
            return Err(self.bytes);
        }
        (self.since, self.bytes) = (Instant::now(), 0);
        Ok(())
    }
}
