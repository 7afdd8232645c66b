//! How much the node has room for, as its status says it.
//!
//! It is what artifacts could take if nothing else of them were there: what is free now and what they take now, less
//! what stays free. So it does not change with what is fetched, but with the disk and with what others have on it.

use store::{Store, StoreError};

/// Bytes that there is room for. Blocking.
///
/// # Errors
///
/// The filesystem's.
pub(super) fn capacity(store: &Store) -> Result<u64, StoreError> {
    let (room, options) = (store.room()?, store.cache_options());
    let ours = room.free_bytes.saturating_add(store.usage()?.bytes);
    let allowed = ours.saturating_sub(room.floor(options).bytes);
    Ok(options.max_bytes.map_or(allowed, |max| allowed.min(max)))
}

/// What is told of a capacity: rounded up to a quarter of a power of two, so that nothing that fits is ever refused, and
/// the same as before as long as that is not much too high.
pub(super) fn told(capacity: u64, before: Option<u64>) -> u64 {
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
        assert_eq!(told(0, None), 0);
        assert_eq!(told(mebibytes(1), None), mebibytes(1));
        assert_eq!(told(mebibytes(100), None), mebibytes(112));
        assert_eq!(told(mebibytes(100), Some(mebibytes(112))), mebibytes(112));
        assert_eq!(told(mebibytes(113), Some(mebibytes(112))), mebibytes(128));
        assert_eq!(told(mebibytes(83), Some(mebibytes(112))), mebibytes(96));
    }

    proptest! {
        #[test]
        fn nothing_that_fits_is_refused_and_little_changes_change_nothing(
            capacity in 0_u64..1 << 50,
            before in 0_u64..1 << 50,
        ) {
            let once = told(capacity, Some(before));
            prop_assert!(once >= capacity);
            prop_assert!(once - capacity <= once / 4 + 1);
            prop_assert_eq!(told(capacity, Some(once)), once);
            prop_assert_eq!(told(capacity - capacity / 20, Some(told(capacity, None))), told(capacity, None));
        }
    }
}
