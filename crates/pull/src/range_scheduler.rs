//! Divides the bytes of a blob among connections: pure, without network or clock.
//!
//! One connection starts with all missing bytes. If the network turns out to be slower than the node, its end is cut,
//! and others take the rest in pieces, lowest first, so that hashing is never far behind the writing.

use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes that are missing, and who brings them.
#[derive(Debug, Default)]
pub(super) struct Spans {
    /// The ranges without a connection, by start.
    open: BTreeMap<u64, u64>,
    /// The ranges with a connection, by its number: its position and its end.
    taken: BTreeMap<u32, Range<u64>>,
    next: u32,
}

/// The progress of a connection in its span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// More is wanted.
    More,
    /// The span is complete. Bytes behind its end belong to another connection.
    Complete,
}

impl Spans {
    /// All that is missing is open.
    pub(super) fn new(missing: impl IntoIterator<Item = Range<u64>>) -> Self {
        let open = missing.into_iter().map(|range| (range.start, range.end)).collect();
        Self { open, taken: BTreeMap::new(), next: 0 }
    }

    /// A blob of which nothing is here.
    pub(super) fn whole(size: u64) -> Self {
        Self::new(std::iter::once(0..size))
    }

    /// Takes the lowest open bytes, at most `limit` of them.
    pub(super) fn take(&mut self, limit: u64) -> Option<(u32, Range<u64>)> {
        let (start, end) = self.open.pop_first()?;
        let middle = end.min(start.saturating_add(limit.max(1)));
        if middle < end {
            self.open.insert(middle, end);
        }
        let number = self.next;
        self.next += 1;
        self.taken.insert(number, start..middle);
        Some((number, start..middle))
    }

    /// Returns the position of a connection, and the offset at which it has to stop now.
    pub(super) fn of(&self, number: u32) -> Range<u64> {
        self.taken.get(&number).cloned().unwrap_or_default()
    }

    /// A connection has brought so many bytes.
    pub(super) fn advance(&mut self, number: u32, bytes: u64) -> Step {
        match self.taken.get_mut(&number) {
            Some(span) => {
                span.start = (span.start + bytes).min(span.end);
                if span.start < span.end { Step::More } else { Step::Complete }
            }
            None => Step::Complete,
        }
    }

    /// A connection has ended; what it did not bring is open again.
    pub(super) fn finish(&mut self, number: u32) {
        if let Some(span) = self.taken.remove(&number)
            && span.start < span.end
        {
            self.open(span);
        }
    }

    /// Returns whether a range has no connection.
    pub(super) fn has_open(&self) -> bool {
        !self.open.is_empty()
    }

    /// Returns the number of bytes that have not arrived yet.
    pub(super) fn missing(&self) -> u64 {
        let open: u64 = self.open.iter().map(|(start, end)| end - start).sum();
        open + self.taken.values().map(|span| span.end - span.start).sum::<u64>()
    }

    /// Opens what lies more than `length` bytes ahead of a connection, if that is worth another one.
    pub(super) fn cut(&mut self, length: u64) -> bool {
        let longest = self.taken.iter_mut().max_by_key(|(_, span)| span.end - span.start);
        let Some((_, span)) = longest else { return false };
        if span.end - span.start < length.saturating_mul(2) {
            return false;
        }
        let behind = span.start + length..span.end;
        span.end = behind.start;
        self.open(behind);
        true
    }

    /// Joins ranges, since only one connection works at a time: a connection right before open bytes continues into
    /// them.
    pub(super) fn join(&mut self) {
        for span in self.taken.values_mut() {
            while let Some(end) = self.open.remove(&span.end) {
                span.end = end;
            }
        }
    }

    fn open(&mut self, mut span: Range<u64>) {
        if let Some(end) = self.open.remove(&span.end) {
            span.end = end;
        }
        let before = self.open.range(..span.start).next_back();
        if let Some((&start, &end)) = before
            && end == span.start
        {
            span.start = start;
        }
        self.open.insert(span.start, span.end);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever happens on the way, every byte is brought once and none is lost.
        #[test]
        fn every_byte_is_brought_once(
            size in 1..200_u64,
            steps in prop::collection::vec((0..6_u8, 0..8_usize, 1..30_u64), 0..60)
        ) {
            let mut spans = Spans::whole(size);
            let mut brought = vec![0_u8; usize::try_from(size).expect("small")];
            let mut running = Vec::new();
            let mut bring = |spans: &mut Spans, number: u32, bytes: u64| {
                let span = spans.of(number);
                let bytes = bytes.min(span.end - span.start);
                for place in span.start..span.start + bytes {
                    brought[usize::try_from(place).expect("small")] += 1;
                }
                spans.advance(number, bytes)
            };
            for (what, who, amount) in steps {
                match what {
                    0 => running.extend(spans.take(amount).map(|(number, _)| number)),
                    1 => { spans.cut(amount); }
                    2 => spans.join(),
                    _ if running.is_empty() => {}
                    3 => spans.finish(running.swap_remove(who % running.len())),
                    _ => {
                        let number = running[who % running.len()];
                        if bring(&mut spans, number, amount) == Step::Complete {
                            running.retain(|&other| other != number);
                            spans.finish(number);
                        }
                    }
                }
            }
            for number in running {
                spans.finish(number);
            }
            while let Some((number, span)) = spans.take(u64::MAX) {
                bring(&mut spans, number, span.end - span.start);
                spans.finish(number);
            }
            prop_assert_eq!(spans.missing(), 0);
            prop_assert!(brought.iter().all(|&count| count == 1), "{:?}", brought);
        }
    }

    #[test]
    fn a_cut_leaves_the_next_bytes_to_the_connection_that_has_them() {
        let mut spans = Spans::whole(100);
        let (first, all) = spans.take(u64::MAX).expect("all of it");
        assert_eq!(all, 0..100);
        spans.advance(first, 10);
        assert!(spans.cut(20));
        assert_eq!(spans.of(first), 10..30);
        assert_eq!(spans.take(20).map(|(_, span)| span), Some(30..50));
        assert!(!spans.cut(20), "nothing left to cut");
        spans.join();
        assert_eq!(spans.of(first), 10..30, "the next bytes are on their way already");
    }
}
