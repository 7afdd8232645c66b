//! Amounts of disk space: bytes and inodes.

/// An amount of disk space: taken, claimed, or to be freed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceAmount {
    /// The number of bytes.
    pub bytes: u64,
    /// The number of inodes.
    pub inodes: u64,
}

impl SpaceAmount {
    /// All there is.
    pub const EVERYTHING: Self = Self { bytes: u64::MAX, inodes: u64::MAX };

    /// The larger of each.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self { bytes: self.bytes.max(other.bytes), inodes: self.inodes.max(other.inodes) }
    }

    /// The smaller of each.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        Self { bytes: self.bytes.min(other.bytes), inodes: self.inodes.min(other.inodes) }
    }

    /// The sum of both.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        let bytes = self.bytes.saturating_add(other.bytes);
        Self { bytes, inodes: self.inodes.saturating_add(other.inodes) }
    }

    /// Multiplies both numbers.
    #[must_use]
    pub fn times(self, count: u64) -> Self {
        let bytes = self.bytes.saturating_mul(count);
        Self { bytes, inodes: self.inodes.saturating_mul(count) }
    }

    /// Subtracts an amount, down to zero.
    #[must_use]
    pub fn less(self, other: Self) -> Self {
        let bytes = self.bytes.saturating_sub(other.bytes);
        Self { bytes, inodes: self.inodes.saturating_sub(other.inodes) }
    }

    /// Returns whether both numbers are zero.
    pub fn is_nothing(self) -> bool {
        self == Self::default()
    }

    pub(super) fn is_met_by(self, freed: Self) -> bool {
        freed.bytes >= self.bytes && freed.inodes >= self.inodes
    }
}
