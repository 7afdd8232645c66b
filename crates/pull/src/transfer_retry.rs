//! Decides whether and when a broken transfer is continued. Pure but for its randomness.

use std::time::Duration;

use super::error::PullError;
use oci::backoff::{RetryBackoff, jittered};
use oci::registry::RegistryError;

/// The longest wait that is of our own choosing.
const LONGEST: Duration = Duration::from_secs(30);
/// A registry that wants to be left alone for longer gets a failure, which the kubelet brings back.
const LONGEST_ASKED: Duration = Duration::from_mins(5);
/// A transfer that breaks so often beside one break for each [`BYTES_A_BREAK`] is given up, although
/// every connection brings a little: what it would take has no bound else.
const BREAKS: u64 = 64;
const BYTES_A_BREAK: u64 = 256 << 10;

/// The number of attempts for a broken transfer, and the delays between them.
#[derive(Clone, Copy, Debug)]
pub struct RetryPolicy {
    /// Tries in a row that bring nothing new.
    pub attempts: u32,
    /// Before the second try; doubles with each, to a bound.
    pub first_delay: Duration,
}

/// The break of a connection.
#[derive(Debug)]
pub struct Break {
    /// The error of the connection.
    pub error: PullError,
    /// Bytes that it brought, too few for their time to count for anything.
    pub trickled: u64,
    /// The source was a mirror, which is avoided from now on: the next attempt uses another host.
    pub passed_by: bool,
}

impl From<PullError> for Break {
    fn from(error: PullError) -> Self {
        Self { error, trickled: 0, passed_by: false }
    }
}

/// The tries of one transfer.
pub struct Retries {
    policy: RetryPolicy,
    /// Bytes that were missing when the fewest were: what comes again after that is no progress.
    fewest: u64,
    fruitless: u32,
    restarts: u32,
    left: u64,
}

impl Retries {
    /// Creates a state without failures, for a blob of `size` bytes, of which `missing` are missing.
    pub fn new(policy: RetryPolicy, size: u64, missing: u64) -> Self {
        let left = BREAKS + size / BYTES_A_BREAK;
        Self { policy, fewest: missing, fruitless: 0, restarts: 0, left }
    }

    /// All bytes are asked for again. A source that cannot continue is given no more of these than
    /// of tries: what it would send has no bound else.
    pub fn restarted(&mut self) {
        self.restarts += 1;
    }

    /// Returns the delay after this failure, or `None` if retrying is pointless. `missing` is the number of missing
    /// bytes now.
    pub fn next(&mut self, broken: &Break, missing: u64) -> Option<Duration> {
        let Break { error, trickled, passed_by } = broken;
        let brought = self.fewest.saturating_sub(missing) > *trickled;
        self.fewest = self.fewest.min(missing);
        let heals = match error.root() {
            // What one mirror has of it says nothing of what the next source has.
            _ if *passed_by => true,
            // A body that ends where one has ended before is all that there is.
            PullError::BlobSize { expected, got, .. } => got < expected && brought,
            _ => error.is_unavailable(),
        };
        // There are only so many mirrors to pass by, and the registry is to have all its tries.
        self.fruitless = if brought { 0 } else { self.fruitless + u32::from(!*passed_by) };
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
                let backoff = RetryBackoff { first: self.policy.first_delay, longest: LONGEST };
                Some(jittered(backoff.after(self.fruitless + 1)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: RetryPolicy =
        RetryPolicy { attempts: 3, first_delay: Duration::from_millis(100) };

    fn server_error(status: u16, retry_after: Option<u64>) -> Break {
        let retry_after = retry_after.map(Duration::from_secs);
        let (host, what) = ("r.io".to_owned(), "blob".to_owned());
        let error = RegistryError::ServerError { host, what, status, retry_after };
        PullError::from(error).into()
    }

    fn seconds(range: std::ops::Range<u64>, wait: Duration) -> bool {
        (Duration::from_millis(range.start)..Duration::from_millis(range.end)).contains(&wait)
    }

    #[test]
    fn waits_grow_and_end() {
        let mut retries = Retries::new(POLICY, 100, 100);
        for range in [100..200, 200..400] {
            let wait = retries.next(&server_error(500, None), 100).expect("a wait");
            assert!(seconds(range, wait));
        }
        assert_eq!(retries.next(&server_error(500, None), 100), None, "three in a row");
        let mut retries = Retries::new(POLICY, 100, 100);
        for brought in 1..64 {
            let wait = retries.next(&server_error(502, None), 100 - brought).expect("on");
            assert!(seconds(50..100, wait));
        }
        assert_eq!(retries.next(&server_error(502, None), 1), None, "not for ever");
    }

    #[test]
    fn what_comes_again_or_trickles_is_no_progress() {
        let mut retries = Retries::new(POLICY, 1 << 30, 1 << 30);
        let mut fails = |missing| {
            retries.restarted();
            retries.next(&server_error(500, None), missing)
        };
        fails(10).expect("the first time that only ten are missing");
        fails(10).expect("the same bytes again");
        fails(500).expect("fewer bytes");
        assert_eq!(fails(9), None, "it starts over too often, whatever it brings");
        let slow = |trickled| Break { trickled, ..server_error(500, None) };
        let mut retries = Retries::new(POLICY, 100, 100);
        retries.next(&slow(10), 90).expect("a trickle");
        retries.next(&slow(9), 80).expect("more than a trickle");
        retries.next(&slow(10), 70).expect("a trickle");
        retries.next(&slow(10), 60).expect("a trickle");
        assert_eq!(retries.next(&slow(10), 50), None, "three in a row");
    }

    #[test]
    fn a_body_that_ends_twice_at_the_same_place_is_all_that_there_is() {
        let digest = oci::Digest::of(b"");
        let short =
            || PullError::BlobSize { digest, expected: 100, got: 90, encoding: None }.into();
        let mut retries = Retries::new(POLICY, 100, 100);
        retries.next(&short(), 10).expect("it may have broken");
        assert_eq!(retries.next(&short(), 10), None, "it has not");
    }

    #[test]
    fn what_a_mirror_has_of_a_blob_is_no_word_of_the_next_source() {
        let digest = oci::Digest::of(b"");
        let short = |passed_by| {
            let error = PullError::BlobSize { digest, expected: 100, got: 90, encoding: None };
            Break { passed_by, ..error.into() }
        };
        let mut retries = Retries::new(POLICY, 100, 5);
        for _ in 0..4 {
            retries.next(&short(true), 10).expect("there is another to be asked");
        }
        assert_eq!(retries.next(&short(false), 10), None, "the registry has no more either");
    }

    #[test]
    fn a_registry_that_asks_for_patience_gets_it() {
        let mut retries = Retries::new(POLICY, 2, 2);
        let wait = retries.next(&server_error(503, Some(7)), 2).expect("patience");
        assert!(seconds(7_000..7_200, wait));
        assert_eq!(
            retries.next(&server_error(503, Some(3600)), 1),
            None,
            "too long to hold a flight"
        );
    }

    #[test]
    fn what_does_not_heal_is_not_tried_again() {
        let gone = RegistryError::NotFound { what: "blob".to_owned() };
        assert_eq!(Retries::new(POLICY, 2, 2).next(&PullError::from(gone).into(), 1), None);
    }

    #[test]
    fn an_address_that_expired_is_asked_for_at_once_and_other_faults_of_storage_later() {
        let wait = |status, retry_after: Option<u64>| {
            let (host, what) = ("s3".to_owned(), "blob".to_owned());
            let retry_after = retry_after.map(Duration::from_secs);
            let storage = RegistryError::Storage { host, what, status, retry_after };
            Retries::new(POLICY, 1, 1).next(&PullError::from(storage).into(), 1).expect("a wait")
        };
        assert_eq!(wait(403, None), Duration::ZERO);
        assert!(seconds(100..200, wait(503, None)));
        assert!(seconds(7_000..7_200, wait(429, Some(7))));
    }
}
