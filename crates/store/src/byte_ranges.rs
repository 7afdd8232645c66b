//! The bytes of a blob that are here: a set of ranges that do not touch.

use std::collections::BTreeMap;
use std::ops::Range;

/// Ranges of bytes, merged where they touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds a range.
    pub fn insert(&mut self, range: Range<u64>) {
        let Range { mut start, mut end } = range;
        if start >= end {
            return;
        }
        // Every range that starts at or before our end may reach us; the last of them first.
        while let Some((&other, &other_end)) = self.0.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            start = start.min(other);
            end = end.max(other_end);
            self.0.remove(&other);
        }
        self.0.insert(start, end);
    }

    /// Returns the end of the range that holds `position`; `position` itself when none does.
    pub fn end_from(&self, position: u64) -> u64 {
        let before = self.0.range(..=position).next_back();
        before.map_or(position, |(_, &end)| end.max(position))
    }

    /// Returns the ranges that are missing of the first `size` bytes, in order.
    pub fn missing(&self, size: u64) -> Vec<Range<u64>> {
        let (mut gaps, mut position) = (Vec::new(), 0);
        for (&start, &end) in &self.0 {
            if start >= size {
                break;
            }
            if position < start {
                gaps.push(position..start);
            }
            position = end;
        }
        if position < size {
            gaps.push(position..size);
        }
        gaps
    }

    /// Bytes in all ranges.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|(start, end)| end - start).sum()
    }

    /// All ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> {
        self.0.iter().map(|(&start, &end)| start..end)
    }
}

impl FromIterator<Range<u64>> for Ranges {
    fn from_iter<T: IntoIterator<Item = Range<u64>>>(iterator: T) -> Self {
        let mut ranges = Self::default();
        iterator.into_iter().for_each(|range| ranges.insert(range));
        ranges
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: usize = 40;

    proptest! {
        #[test]
        fn agrees_with_a_row_of_bits(
            inserted in prop::collection::vec((0..SIZE as u64, 0..12u64), 0..12)
        ) {
            let mut ranges = Ranges::default();
            let mut bits = [false; SIZE + 12];
            for (start, length) in inserted {
                ranges.insert(start..start + length);
                for place in start..start + length {
                    bits[usize::try_from(place).expect("small")] = true;
                }
            }
            prop_assert_eq!(ranges.bytes(), bits.iter().filter(|&&bit| bit).count() as u64);
            let mut gaps = [false; SIZE];
            for gap in ranges.missing(SIZE as u64) {
                prop_assert!(gap.start < gap.end);
                for place in gap {
                    gaps[usize::try_from(place).expect("small")] = true;
                }
            }
            for place in 0..SIZE {
                prop_assert_ne!(gaps[place], bits[place]);
                let end = bits[place..].iter().position(|bit| !bit).unwrap_or(bits.len() - place);
                prop_assert_eq!(ranges.end_from(place as u64), (place + end) as u64);
            }
            let starts: Vec<_> = ranges.iter().collect();
            prop_assert!(starts.windows(2).all(|pair| pair[0].end < pair[1].start), "merged");
            let again: Ranges = starts.into_iter().rev().collect();
            prop_assert_eq!(again, ranges);
        }
    }
}
