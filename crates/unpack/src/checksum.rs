//! Checksums that detect later damage to the files of unpacked layers.
//!
//! The digest of the blob proves where a file comes from. The checksum has to find damage on disk
//! only, for which a fast hash is enough: SHA-256 of every file again took up to a seventh of a
//! pull.

use twox_hash::xxhash3_128::Hasher;

use oci_types::Digest;

/// Checksum of the content of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// XXH3 with 128 bits and seed 0.
    Xxh3(u128),
    /// SHA-256, which layers of older versions have.
    Sha256(Digest),
}

/// Incremental computation of a checksum.
#[derive(Default)]
pub struct Checksummer(Hasher);

impl Checksum {
    /// Computes the checksum of content in memory.
    pub fn of(content: &[u8]) -> Self {
        Self::Xxh3(Hasher::oneshot(content))
    }
}

impl Checksummer {
    /// Adds the next bytes.
    pub fn update(&mut self, piece: &[u8]) {
        self.0.write(piece);
    }

    /// Returns the checksum of all added bytes.
    pub fn finish(self) -> Checksum {
        Checksum::Xxh3(self.0.finish_128())
    }
}
