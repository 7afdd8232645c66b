//! Computes when a reference is refreshed. Pure except for its jitter.

use std::time::Duration;

use oci::Digest;
use oci::backoff::{RetryBackoff, jittered};

/// The delays after failures. The longest one is also the longest until a registry that is back is noticed.
const RETRY: RetryBackoff =
    RetryBackoff { first: Duration::from_secs(5), longest: Duration::from_mins(10) };

/// Returns the part of `spread` that a node waits before its first refresh. It follows from the node's name, so it is
/// the same at every start, and the nodes of a cluster start one after the other.
#[must_use]
pub fn initial_delay(node_id: &str, spread: Duration) -> Duration {
    let digest = Digest::of(node_id.as_bytes()).hex();
    let part = u32::from_str_radix(&digest[..8], 16).unwrap_or_default();
    spread.mul_f64(f64::from(part) / f64::from(u32::MAX))
}

/// Returns the delay until a tag is resolved again: the interval with a tenth of jitter either way, so that references
/// and nodes that were refreshed together do not stay together.
pub(super) fn next_refresh(interval: Duration) -> Duration {
    let fifth = interval / 5;
    interval.saturating_sub(fifth / 2) + (jittered(fifth) * 2).saturating_sub(fifth)
}

/// Returns the delay until the next refresh after this many failures in a row.
pub(super) fn retry(failures: u32, interval: Duration) -> Duration {
    jittered(RETRY.after(failures).min(interval.max(RETRY.first)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_begin_one_after_the_other_and_each_at_its_own_time() {
        let spread = Duration::from_mins(10);
        let delays: Vec<_> =
            (0..200).map(|node| initial_delay(&format!("worker-{node}"), spread)).collect();
        assert_eq!(delays[7], initial_delay("worker-7", spread));
        for minute in 0..10 {
            let within = |delay: &&Duration| delay.as_secs() / 60 == minute;
            let nodes = delays.iter().filter(within).count();
            assert!((8..35).contains(&nodes), "{nodes} of 200 nodes begin in minute {minute}");
        }
        assert_eq!(initial_delay("worker", Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn looks_vary_and_waits_grow_to_a_bound() {
        let hour = Duration::from_hours(1);
        for _ in 0..100 {
            let delay = next_refresh(hour);
            assert!((Duration::from_mins(54)..=Duration::from_mins(66)).contains(&delay));
        }
        let waits = |failures| retry(failures, hour);
        assert!((Duration::from_millis(2500)..=Duration::from_secs(5)).contains(&waits(1)));
        assert!((Duration::from_secs(10)..=Duration::from_secs(20)).contains(&waits(3)));
        assert!((Duration::from_mins(5)..=Duration::from_mins(10)).contains(&waits(1000)));
        assert!(retry(1000, Duration::from_secs(1)) <= Duration::from_secs(5));
    }
}
