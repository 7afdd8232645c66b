//! Public keys of cosign, and the signature algorithms of each type.

use ring::signature::{self, UnparsedPublicKey, VerificationAlgorithm};
use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::pki_types::pem::PemObject as _;
use sha2::Digest as _;

use crate::Digest;

const EC_PUBLIC_KEY: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
const P256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
const P384: &[u8] = &[0x2b, 0x81, 0x04, 0x00, 0x22];
const ED25519: &[u8] = &[0x2b, 0x65, 0x70];
const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];

/// Algorithms of each type of key.
static ECDSA_P256: [&dyn VerificationAlgorithm; 1] = [&signature::ECDSA_P256_SHA256_ASN1];
static ECDSA_P384: [&dyn VerificationAlgorithm; 2] =
    [&signature::ECDSA_P384_SHA384_ASN1, &signature::ECDSA_P384_SHA256_ASN1];
static EDWARDS: [&dyn VerificationAlgorithm; 1] = [&signature::ED25519];
static RSA_BOTH: [&dyn VerificationAlgorithm; 2] =
    [&signature::RSA_PKCS1_2048_8192_SHA256, &signature::RSA_PSS_2048_8192_SHA256];

/// A key that signatures are verified with.
#[derive(Clone)]
pub struct PublicKey {
    algorithms: &'static [&'static dyn VerificationAlgorithm],
    /// Key in the encoding of the algorithms.
    bytes: Vec<u8>,
    is_edwards: bool,
    id: Digest,
}

/// Reason why a text is not a public key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// A text without `-----BEGIN PUBLIC KEY-----`.
    #[error("it is no PEM of a public key: write what cosign public-key prints")]
    NotPem,
    /// Malformed DER inside the PEM.
    #[error("it is damaged")]
    Damaged,
    /// A key of an unsupported type.
    #[error("it is of a kind that is not supported: use ECDSA P-256 or P-384, Ed25519 or RSA")]
    Kind,
}

impl std::fmt::Debug for PublicKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "PublicKey({})", self.id)
    }
}

impl PartialEq for PublicKey {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for PublicKey {}

impl PublicKey {
    /// Parses a PEM of `SubjectPublicKeyInfo`.
    pub fn from_pem(pem: &[u8]) -> Result<Self, KeyError> {
        let spki = SubjectPublicKeyInfoDer::from_pem_slice(pem).map_err(|_| KeyError::NotPem)?;
        Self::from_spki(&spki)
    }

    fn from_spki(spki: &[u8]) -> Result<Self, KeyError> {
        // SEQUENCE { SEQUENCE { algorithm OID, parameters }, BIT STRING }
        let (whole, rest) = element(spki, 0x30).ok_or(KeyError::Damaged)?;
        let (algorithm, key) = element(whole, 0x30).ok_or(KeyError::Damaged)?;
        let (kind, parameters) = element(algorithm, 0x06).ok_or(KeyError::Damaged)?;
        let (bits, after) = element(key, 0x03).ok_or(KeyError::Damaged)?;
        // The first byte is the number of unused bits, which must be zero.
        let (Some((0, bytes)), true, true) =
            (bits.split_first(), rest.is_empty(), after.is_empty())
        else {
            return Err(KeyError::Damaged);
        };
        let algorithms: &'static [_] = match kind {
            EC_PUBLIC_KEY => match element(parameters, 0x06).ok_or(KeyError::Damaged)?.0 {
                P256 => &ECDSA_P256,
                P384 => &ECDSA_P384,
                _ => return Err(KeyError::Kind),
            },
            ED25519 => &EDWARDS,
            RSA => &RSA_BOTH,
            _ => return Err(KeyError::Kind),
        };
        let is_edwards = kind == ED25519;
        Ok(Self { algorithms, bytes: bytes.to_vec(), is_edwards, id: Digest::of(spki) })
    }

    /// Returns the hash of the key's encoding, which identifies it.
    pub fn id(&self) -> Digest {
        self.id
    }

    /// Returns whether this key has signed a message.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        let verified = self.algorithms.iter().any(|&algorithm| {
            UnparsedPublicKey::new(algorithm, &self.bytes).verify(message, signature).is_ok()
        });
        verified || (self.is_edwards && self.verifies_prehashed(message, signature).is_some())
    }

    /// Verifies Ed25519ph of RFC 8032, without a context, which ring does not support.
    fn verifies_prehashed(&self, message: &[u8], signature: &[u8]) -> Option<()> {
        let key = ed25519_dalek::VerifyingKey::from_bytes(self.bytes.as_slice().try_into().ok()?);
        let signature = ed25519_dalek::Signature::from_slice(signature).ok()?;
        let hash = sha2::Sha512::new_with_prefix(message);
        key.ok()?.verify_prehashed_strict(hash, None, &signature).ok()
    }
}

/// Returns the content of the first DER element, which must have this tag, and the bytes after it.
fn element(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&found, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        // The lengths of keys fit into one or two bytes.
        0x81 | 0x82 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (bytes.iter().fold(0, |length, &byte| length << 8 | usize::from(byte)), rest)
        }
        _ => return None,
    };
    (found == tag).then(|| rest.split_at_checked(length))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anything_but_a_key_is_refused() {
        for (pem, error) in [
            ("", KeyError::NotPem),
            ("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n", KeyError::NotPem),
            ("-----BEGIN PUBLIC KEY-----\nMAA=\n-----END PUBLIC KEY-----\n", KeyError::Damaged),
            // X25519 is not a signature algorithm.
            (
                "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VuAyEAJQZwH8yUXkOZoxCQfQcKX3iq0aPCYfOTGEtp1ub2k1Y=\n-----END PUBLIC KEY-----\n",
                KeyError::Kind,
            ),
        ] {
            assert_eq!(PublicKey::from_pem(pem.as_bytes()), Err(error), "{pem}");
        }
    }

    #[test]
    fn lengths_are_read_as_der_has_them() {
        assert_eq!(element(&[0x30, 2, 1, 2, 3], 0x30), Some((&[1, 2][..], &[3][..])));
        assert_eq!(element(&[0x30, 0x81, 1, 7], 0x30), Some((&[7][..], &[][..])));
        for broken in [
            &[][..],
            &[0x30],
            &[0x30, 2, 1],
            &[0x31, 0],
            &[0x30, 0x84, 0, 0, 0, 0],
            &[0x30, 0x82, 1],
        ] {
            assert_eq!(element(broken, 0x30), None);
        }
    }
}
