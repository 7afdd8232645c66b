//! The node's capacity for artifacts, as its status reports it.
//!
//! It is the space that artifacts could take if they were alone: the free space and the space of current artifacts,
//! less the space that is kept free. So it does not change with fetched artifacts, but with the disk and with other
//! files on it.

use store::{Store, StoreError};

/// Returns the capacity in bytes. Blocking.
///
/// # Errors
///
/// Errors of the filesystem.
pub(super) fn capacity(store: &Store) -> Result<u64, StoreError> {
    let (room, options) = (store.space().disk()?, store.space().options());
    let ours = room.free_bytes.saturating_add(store.inventory().usage()?.bytes);
    let allowed = ours.saturating_sub(room.floor(options).bytes);
    Ok(options.max_bytes.map_or(allowed, |max| allowed.min(max)))
}

/// Returns the capacity to report. It is rounded up to a quarter of a power of two, so that no artifact that fits is
/// refused. The value before is kept unless it is much too high.
pub(super) fn reported(capacity: u64, before: Option<u64>) -> u64 {
    match before {
        Some(before) if capacity <= before && capacity >= before - before / 4 => before,
        _ => {
            let step = (capacity.checked_ilog2().unwrap_or(0)).saturating_sub(2);
            capacity.div_ceil(1 << step).saturating_mul(1 << step)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_is_told_in_quarters_of_powers_of_two() {
        let mebibytes = |number: u64| number << 20;
        assert_eq!(reported(0, None), 0);
        assert_eq!(reported(mebibytes(1), None), mebibytes(1));
        assert_eq!(reported(mebibytes(100), None), mebibytes(112));
        assert_eq!(reported(mebibytes(100), Some(mebibytes(112))), mebibytes(112));
        assert_eq!(reported(mebibytes(113), Some(mebibytes(112))), mebibytes(128));
        assert_eq!(reported(mebibytes(83), Some(mebibytes(112))), mebibytes(96));
    }

    proptest! {
        #[test]
        fn nothing_that_fits_is_refused_and_little_changes_change_nothing(
            capacity in 0_u64..1 << 50,
            before in 0_u64..1 << 50,
        ) {
            let once = reported(capacity, Some(before));
            prop_assert!(once >= capacity);
            prop_assert!(once - capacity <= once / 4 + 1);
            prop_assert_eq!(reported(capacity, Some(once)), once);
            prop_assert_eq!(reported(capacity - capacity / 20, Some(reported(capacity, None))), reported(capacity, None));
        }
    }
}
