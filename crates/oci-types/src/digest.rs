//! Content digests: the `sha256` algorithm of the OCI image specification.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::Digest as _;
use text::printable::excerpt;

/// The SHA-256 hash of some content, and its name everywhere.
///
/// Only `sha256` is accepted: registries and clients produce it, and a second
/// algorithm would give the same content two names in the store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// The reason that a text is not a digest.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum DigestError {
    /// The text is no digest of any algorithm.
    #[error("\"{0}\" is not a digest: write sha256:<64 lower-case hexadecimal digits>")]
    Malformed(String),
    /// The text is a digest of an algorithm that is not supported.
    #[error("digest algorithm \"{0}\" is not supported: use the content's sha256 digest")]
    Algorithm(String),
}

impl Digest {
    /// Wraps a finished hash.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Hashes content that is in memory.
    pub fn of(content: &[u8]) -> Self {
        Self(sha2::Sha256::digest(content).into())
    }

    /// Returns the bytes of the hash.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Returns 64 lower-case hexadecimal digits, without the algorithm: safe as a file name.
    pub fn hex(&self) -> String {
        use fmt::Write as _;
        self.0.iter().fold(String::with_capacity(64), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }

    /// Parses the output of [`Digest::hex`].
    pub fn from_hex(hex: &str) -> Option<Self> {
        let digits = hex.as_bytes();
        if digits.len() != 64 {
            return None;
        }
        let value = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = value(pair[0])? << 4 | value(pair[1])?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        // The quoted text is bounded: an attribute may be as long as a pod's specification.
        let shown = || excerpt(text, 100);
        let Some((algorithm, hex)) = text.split_once(':') else {
            return Err(DigestError::Malformed(shown()));
        };
        if algorithm == "sha256" {
            return Self::from_hex(hex).ok_or_else(|| DigestError::Malformed(shown()));
        }
        if is_algorithm(algorithm) && is_encoded(hex) {
            return Err(DigestError::Algorithm(excerpt(algorithm, 100)));
        }
        Err(DigestError::Malformed(shown()))
    }
}

/// Checks the grammar of algorithms in the OCI image specification: `sha512`, `sha256+b64u`.
fn is_algorithm(text: &str) -> bool {
    let is_component = |component: &str| {
        !component.is_empty()
            && component.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    };
    text.split(['+', '.', '_', '-']).all(is_component)
}

/// Checks the grammar of the encoded hash that follows the algorithm.
fn is_encoded(text: &str) -> bool {
    let is_encoded = |byte: u8| byte.is_ascii_alphanumeric() || b"=_-".contains(&byte);
    !text.is_empty() && text.bytes().all(is_encoded)
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_survives_its_text_form() {
        let digest = Digest::of(b"{}");
        assert_eq!(
            digest.to_string(),
            "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
        );
        assert_eq!(digest.to_string().parse(), Ok(digest));
    }

    #[test]
    fn malformed_digests_are_refused() {
        for text in ["", "sha256:", "sha256:zz", "44136fa3", "sha256:../../../etc/passwd"] {
            assert!(matches!(text.parse::<Digest>(), Err(DigestError::Malformed(_))), "{text}");
        }
        let upper = Digest::of(b"").to_string().to_uppercase();
        assert!(upper.parse::<Digest>().is_err());
    }

    #[test]
    fn other_algorithms_are_distinguished_from_malformed_digests() {
        for algorithm in ["sha512", "sha384", "blake3", "md5", "sha256+b64u", "multihash.x_y-z"] {
            let parsed = format!("{algorithm}:LCa0a2j_xo=").parse::<Digest>();
            assert_eq!(parsed, Err(DigestError::Algorithm(algorithm.into())));
        }
        for text in ["sha512:", ":00", "SHA512:00", "sha512:a/b", "sha+:00", "sha 512:00", "r.io/a"]
        {
            assert!(matches!(text.parse::<Digest>(), Err(DigestError::Malformed(_))), "{text}");
        }
    }
}
