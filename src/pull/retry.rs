//! How often and how patiently a broken transfer is continued: pure but for its randomness.

use std::time::Duration;

use super::error::PullError;
use crate::oci::registry::RegistryError;

/// The longest wait that is of our own choosing.
const LONGEST: Duration = Duration::from_secs(30);
/// A registry that wants to be left alone for longer gets a failure, which the kubelet brings back.
const LONGEST_ASKED: Duration = Duration::from_mins(5);
/// A transfer that breaks so often beside one break for each [`BYTES_A_BREAK`] is given up, although
/// every connection brings a little: what it would take has no bound else.
const BREAKS: u64 = 64;
const BYTES_A_BREAK: u64 = 256 << 10;

/// How often and how patiently a broken transfer is continued.
#[derive(Clone, Copy, Debug)]
pub struct RetryPolicy {
    /// Tries in a row that bring no byte.
    pub attempts: u32,
    /// Before the second try; doubles with each, to a bound.
    pub first_delay: Duration,
}

/// The tries of one transfer.
#[derive(Debug)]
pub struct Retries {
    policy: RetryPolicy,
    /// Bytes that were missing when the fewest were: what comes again after that is no progress.
    fewest: u64,
    fruitless: u32,
    restarts: u32,
    left: u64,
}

impl Retries {
    /// None yet, for a blob of `size` bytes, of which so many are missing.
    #[must_use]
    pub fn new(policy: RetryPolicy, size: u64, missing: u64) -> Self {
        let left = BREAKS + size / BYTES_A_BREAK;
        Self { policy, fewest: missing, fruitless: 0, restarts: 0, left }
    }

    /// All bytes are asked for again. A source that cannot continue is given no more of these than
    /// of tries: what it would send has no bound else.
    pub fn restarted(&mut self) {
        self.restarts += 1;
    }

    /// How long to wait after this failure; none when there is nothing to wait for. So many bytes are
    /// missing now; `trickled` are too few for their time to count for anything.
    pub fn next(&mut self, error: &PullError, missing: u64, trickled: u64) -> Option<Duration> {
        let brought = self.fewest.saturating_sub(missing) > trickled;
        self.fewest = self.fewest.min(missing);
        let heals = match error.root() {
            // A body that ends where one has ended before is all that there is.
            PullError::BlobSize { expected, got, .. } => got < expected && brought,
            _ => error.is_unavailable(),
        };
        self.fruitless = if brought { 0 } else { self.fruitless + 1 };
        self.left = self.left.saturating_sub(1);
        let is_over = self.fruitless >= self.policy.attempts
            || self.restarts > self.policy.attempts
            || self.left == 0;
        if !heals || is_over {
            return None;
        }
        match error.root() {
            // A presigned address expires at any time, and the next one is asked for at once.
            PullError::Registry(error) if error.is_expiry() && self.fruitless < 2 => {
                Some(Duration::ZERO)
            }
            // Never before the time, and not all nodes at the same.
            PullError::Registry(
                RegistryError::RateLimited { retry_after: Some(wait), .. }
                | RegistryError::Storage { retry_after: Some(wait), .. }
                | RegistryError::ServerError { retry_after: Some(wait), .. },
            ) => (*wait <= LONGEST_ASKED).then(|| *wait + jittered(self.policy.first_delay)),
            _ => {
                let factor = 1 << self.fruitless.min(8);
                Some(jittered(self.policy.first_delay.saturating_mul(factor).min(LONGEST)))
            }
        }
    }
}

/// Less a random part, at most half, so that nodes do not ask in step.
#[must_use]
pub fn jittered(full: Duration) -> Duration {
    let mut random = [0];
    // Without randomness nodes ask in step, which is all that is lost.
    let _ = getrandom::fill(&mut random);
    full.mul_f64(0.5 + f64::from(random[0]) / 512.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: RetryPolicy =
        RetryPolicy { attempts: 3, first_delay: Duration::from_millis(100) };

    fn server_error(status: u16, retry_after: Option<u64>) -> PullError {
        let retry_after = retry_after.map(Duration::from_secs);
        let (host, what) = ("r.io".to_owned(), "blob".to_owned());
        RegistryError::ServerError { host, what, status, retry_after }.into()
    }

    fn seconds(range: std::ops::Range<u64>, wait: Duration) -> bool {
        (Duration::from_millis(range.start)..Duration::from_millis(range.end)).contains(&wait)
    }

    #[test]
    fn waits_grow_and_end() {
        let mut retries = Retries::new(POLICY, 100, 100);
        for range in [100..200, 200..400] {
            let wait = retries.next(&server_error(500, None), 100, 0).expect("a wait");
            assert!(seconds(range, wait));
        }
        assert_eq!(retries.next(&server_error(500, None), 100, 0), None, "three in a row");
        let mut retries = Retries::new(POLICY, 100, 100);
        for brought in 1..64 {
            let wait = retries.next(&server_error(502, None), 100 - brought, 0).expect("on");
            assert!(seconds(50..100, wait));
        }
        assert_eq!(retries.next(&server_error(502, None), 1, 0), None, "not for ever");
    }

    #[test]
    fn what_comes_again_or_trickles_is_no_progress() {
        let mut retries = Retries::new(POLICY, 1 << 30, 1 << 30);
        let mut fails = |missing, trickled| {
            retries.restarted();
            retries.next(&server_error(500, None), missing, trickled)
        };
        fails(10, 0).expect("the first time that only ten are missing");
        fails(10, 0).expect("the same bytes again");
        fails(500, 0).expect("fewer bytes");
        assert_eq!(fails(9, 0), None, "it starts over too often, whatever it brings");
        let mut retries = Retries::new(POLICY, 100, 100);
        retries.next(&server_error(500, None), 90, 10).expect("a trickle");
        retries.next(&server_error(500, None), 80, 9).expect("more than a trickle");
        retries.next(&server_error(500, None), 70, 10).expect("a trickle");
        retries.next(&server_error(500, None), 60, 10).expect("a trickle");
        assert_eq!(retries.next(&server_error(500, None), 50, 10), None, "three in a row");
    }

    #[test]
    fn a_body_that_ends_twice_at_the_same_place_is_all_that_there_is() {
        let digest = crate::oci::Digest::of(b"");
        let short = || PullError::BlobSize { digest, expected: 100, got: 90 };
        let mut retries = Retries::new(POLICY, 100, 100);
        retries.next(&short(), 10, 0).expect("it may have broken");
        assert_eq!(retries.next(&short(), 10, 0), None, "it has not");
    }

    #[test]
    fn a_registry_that_asks_for_patience_gets_it() {
        let mut retries = Retries::new(POLICY, 2, 2);
        let wait = retries.next(&server_error(503, Some(7)), 2, 0).expect("patience");
        assert!(seconds(7_000..7_200, wait));
        assert_eq!(
            retries.next(&server_error(503, Some(3600)), 1, 0),
            None,
            "too long to hold a flight"
        );
    }

    #[test]
    fn what_does_not_heal_is_not_tried_again() {
        let gone = RegistryError::NotFound { what: "blob".to_owned() };
        assert_eq!(Retries::new(POLICY, 2, 2).next(&gone.into(), 1, 0), None);
    }

    #[test]
    fn an_address_that_expired_is_asked_for_at_once_and_other_faults_of_storage_later() {
        let wait = |status, retry_after: Option<u64>| {
            let (host, what) = ("s3".to_owned(), "blob".to_owned());
            let retry_after = retry_after.map(Duration::from_secs);
            let storage = RegistryError::Storage { host, what, status, retry_after };
            Retries::new(POLICY, 1, 1).next(&storage.into(), 1, 0).expect("a wait")
        };
        assert_eq!(wait(403, None), Duration::ZERO);
        assert!(seconds(100..200, wait(503, None)));
        assert!(seconds(7_000..7_200, wait(429, Some(7))));
    }
}
