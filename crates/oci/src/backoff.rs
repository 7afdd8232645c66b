//! Pauses between the attempts of an operation that fails.

use std::time::Duration;

/// Pauses that double with each failure, up to a maximum.
#[derive(Clone, Copy, Debug)]
pub struct RetryBackoff {
    /// Pause after the first failure.
    pub first: Duration,
    /// Longest pause between two attempts.
    pub longest: Duration,
}

impl RetryBackoff {
    /// Returns the pause after this many failures in a row, zero after none.
    pub fn after(self, failures: u32) -> Duration {
        let Some(doublings) = failures.checked_sub(1) else { return Duration::ZERO };
        self.first.saturating_mul(1 << doublings.min(16)).min(self.longest)
    }
}

/// Shortens a pause by a random part of at most half, so that nodes do not send requests in step.
pub fn jittered(full: Duration) -> Duration {
    let mut random = [0];
    // Without randomness, nodes only send their requests in step.
    let _ = getrandom::fill(&mut random);
    full.mul_f64(0.5 + f64::from(random[0]) / 512.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_to_the_longest() {
        let (first, longest) = (Duration::from_millis(250), Duration::from_secs(30));
        let backoff = RetryBackoff { first, longest };
        let pauses = [0, 1, 2, 7, 8, u32::MAX].map(|failures| backoff.after(failures).as_millis());
        assert_eq!(pauses, [0, 250, 500, 16_000, 30_000, 30_000]);
        let pause = jittered(first);
        assert!(pause >= first / 2 && pause < first, "{pause:?}");
    }
}
