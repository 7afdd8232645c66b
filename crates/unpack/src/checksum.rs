//! What finds out later whether a file of a layer is still what was unpacked.
//!
//! That it came from the right blob is proven by the blob's digest. What is left to find is
//! what disks do, for which a fast hash will do: SHA-256 of every file again cost up to a seventh of
//! a pull.

use twox_hash::xxhash3_128::Hasher;

use oci_types::Digest;

/// Of a file's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// XXH3 with 128 bits and the seed 0.
    Xxh3(u128),
    /// SHA-256: of layers that were unpacked before there was the other one.
    Sha256(Digest),
}

/// Makes the checksum of content that comes in pieces.
pub struct Checksummer(Hasher);

impl Checksum {
    /// Of content in memory.
    #[must_use]
    pub fn of(content: &[u8]) -> Self {
        Self::Xxh3(Hasher::oneshot(content))
    }
}

impl Default for Checksummer {
    fn default() -> Self {
        Self(Hasher::new())
    }
}

impl Checksummer {
    /// The next piece.
    pub fn update(&mut self, piece: &[u8]) {
        self.0.write(piece);
    }

    /// Of all pieces.
    #[must_use]
    pub fn finish(self) -> Checksum {
        Checksum::Xxh3(self.0.finish_128())
    }
}
