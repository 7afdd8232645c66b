//! Adds up the layers of an artifact while they arrive.
//!
//! Each layer by itself stays within the limits; thousands of them together may not. So they are added up as they
//! arrive, and the artifact is refused at the first that exceeds a limit, before the rest is fetched and stored.

use std::collections::HashSet;

use oci::Digest;
use unpack::{Limits, UnpackError};

/// The layers of one artifact so far.
pub(super) struct Sums<'a> {
    limits: &'a Limits,
    entries: u64,
    bytes: u64,
    blobs: HashSet<Digest>,
}

impl<'a> Sums<'a> {
    pub(super) fn new(limits: &'a Limits) -> Self {
        Self { limits, entries: 0, bytes: 0, blobs: HashSet::new() }
    }

    /// Adds a layer of so many entries, which has unpacked to so many bytes.
    pub(super) fn add(
        &mut self,
        blob: Digest,
        entries: u64,
        bytes: u64,
    ) -> Result<(), UnpackError> {
        let Limits { entries: most_entries, unpacked_bytes: most_bytes, .. } = *self.limits;
        // Entries are merged once for each layer, bytes are on the disk once for each blob.
        self.entries = self.entries.saturating_add(entries);
        if self.blobs.insert(blob) {
            self.bytes = self.bytes.saturating_add(bytes);
        }
        if self.entries > most_entries {
            return Err(UnpackError::TooManyEntries { limit: most_entries });
        }
        if self.bytes > most_bytes {
            return Err(UnpackError::TooManyBytes { limit: most_bytes });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_layers_are_refused_as_soon_as_they_are_too_much_together() {
        let limits = Limits { entries: 10, unpacked_bytes: 100, ..Limits::default() };
        let [one, two, three] = [b"1", b"2", b"3"].map(|text| Digest::of(text));
        let mut sums = Sums::new(&limits);
        assert!(sums.add(one, 5, 60).is_ok());
        // The same blob once more takes memory while it is merged, and nothing of the disk.
        assert!(sums.add(one, 4, 60).is_ok());
        assert!(sums.add(two, 1, 40).is_ok());
        let refused = sums.add(three, 1, 0);
        assert!(matches!(refused, Err(UnpackError::TooManyEntries { limit: 10 })));
        let mut sums = Sums::new(&limits);
        assert!(sums.add(one, 1, 100).is_ok());
        let refused = sums.add(two, 1, 1);
        assert!(matches!(refused, Err(UnpackError::TooManyBytes { limit: 100 })));
    }
}
