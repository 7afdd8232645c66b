//! Verification of cosign signatures with public keys, without I/O.
//!
//! ```text
//! public_key       public keys and their algorithms
//! simple_signing   the older format: a payload with its signature beside it
//! sigstore_bundle  the newer format: a Sigstore bundle with a DSSE envelope
//! ```
//!
//! A signature is valid if a required key made it over the exact bytes, and these bytes name the
//! digest of the index or of the manifest that was chosen from it.

pub mod public_key;
pub mod sigstore_bundle;
pub mod simple_signing;

use std::sync::Arc;

use serde::Deserialize;

pub use public_key::{KeyError, PublicKey};

use super::Digest;

/// Version of the rules. Increase it to invalidate recorded results when the meaning of a valid
/// signature changes.
const RULES_VERSION: u32 = 1;

/// Signature that an artifact must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignatureDemand {
    /// Effect of a missing signature.
    pub mode: SignatureMode,
    /// Accepted signature formats.
    pub format: SignatureFormat,
    /// Keys, any of which suffices.
    pub keys: Arc<[NamedKey]>,
}

/// A public key with its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedKey {
    /// Name in the configuration.
    pub name: String,
    /// Public key for verification.
    pub key: PublicKey,
}

/// Effect of a missing signature.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum SignatureMode {
    /// The volume is refused.
    #[default]
    Enforce,
    /// The volume is mounted, and a warning is logged.
    Warn,
}

/// Accepted signature formats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum SignatureFormat {
    /// Both formats are accepted.
    #[default]
    Any,
    /// Only the tag `sha256-<hex>.sig`.
    Legacy,
    /// Only Sigstore bundles.
    Bundle,
}

/// A signature found in the registry.
#[derive(Clone, Debug)]
pub enum FoundSignature {
    /// A payload with the signature of its annotation.
    Simple {
        /// Signed bytes of the payload.
        payload: Vec<u8>,
        /// Signature in base64.
        signature: String,
    },
    /// A Sigstore bundle.
    Bundle(Vec<u8>),
}

/// Reason why a signature is not valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum SignatureFlaw {
    /// An unsupported or malformed signature.
    #[error("a signature in a format that is not understood")]
    Format,
    /// A signature by another key, or one whose content was changed.
    #[error("signed, but by none of the demanded keys")]
    Key,
    /// A valid signature of another digest.
    #[error("signed by a demanded key, but for another digest")]
    Subject,
}

impl SignatureDemand {
    /// Returns an identifier of the demand, under which verification results are recorded.
    pub fn id(&self) -> Digest {
        let mut keys: Vec<String> = self.keys.iter().map(|named| named.key.id().hex()).collect();
        keys.sort_unstable();
        keys.dedup();
        // The mode does not affect whether a signature is valid.
        let text = format!("{RULES_VERSION} {:?} {}", self.format, keys.join(" "));
        Digest::of(text.as_bytes())
    }

    /// Returns the name of the key that signed, or the flaw that is closest to a valid signature.
    pub fn judge(
        &self,
        found: &[FoundSignature],
        subjects: &[Digest],
    ) -> Result<&str, Option<SignatureFlaw>> {
        let keys: Vec<&PublicKey> = self.keys.iter().map(|named| &named.key).collect();
        let mut worst = None;
        for signature in found {
            let verified = match signature {
                FoundSignature::Simple { payload, signature } => {
                    simple_signing::verify(payload, signature, subjects, &keys)
                }
                FoundSignature::Bundle(bytes) => sigstore_bundle::verify(bytes, subjects, &keys),
            };
            match verified {
                Ok(key) => return Ok(self.keys.get(key).map_or("", |named| &named.name)),
                Err(flaw) => worst = worst.max(Some(flaw)),
            }
        }
        Err(worst)
    }
}

#[cfg(test)]
mod tests;
