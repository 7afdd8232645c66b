//! Signatures of artifacts by public keys, as cosign makes them. Pure: bytes in, a verdict out.
//!
//! ```text
//! key      public keys, and what each kind verifies
//! simple   the older format: a payload with its signature beside it
//! bundle   the newer one: a Sigstore bundle with a DSSE envelope
//! ```
//!
//! A signature counts when a demanded key made it over the exact bytes, and these
//! bytes name the digest of the index or of the manifest that was chosen from it.

pub mod bundle;
pub mod key;
pub mod simple;

use std::sync::Arc;

use serde::Deserialize;

pub use key::{KeyError, PublicKey};

use super::Digest;

/// What makes older verdicts worthless: a change of what counts as signed.
const RULES_VERSION: u32 = 1;

/// What an artifact must be signed with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignatureDemand {
    /// What a missing signature means.
    pub mode: SignatureMode,
    /// Which formats count.
    pub format: SignatureFormat,
    /// Any of these suffices.
    pub keys: Arc<[NamedKey]>,
}

/// A key and what people call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedKey {
    /// Its name in the configuration.
    pub name: String,
    /// The key.
    pub key: PublicKey,
}

/// What a missing signature means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum SignatureMode {
    /// The volume is refused.
    #[default]
    Enforce,
    /// It is logged, and the volume mounted.
    Warn,
}

/// Which formats count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum SignatureFormat {
    /// Both.
    #[default]
    Any,
    /// The tag `sha256-<hex>.sig` alone.
    Legacy,
    /// Sigstore bundles alone.
    Bundle,
}

/// A signature as it was found.
#[derive(Clone, Debug)]
pub enum Found {
    /// A payload and the annotation beside it.
    Simple {
        /// What is signed.
        payload: Vec<u8>,
        /// base64.
        signature: String,
    },
    /// A bundle.
    Bundle(Vec<u8>),
}

/// Why a signature does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Flaw {
    /// It is none, or none that is understood.
    #[error("a signature in a format that is not understood")]
    Format,
    /// Somebody else's, or changed after it was made.
    #[error("signed, but by none of the demanded keys")]
    Key,
    /// Of something else.
    #[error("signed by a demanded key, but for another digest")]
    Subject,
}

impl SignatureDemand {
    /// Names the demand: a verdict for one says nothing about another.
    #[must_use]
    pub fn id(&self) -> Digest {
        let mut keys: Vec<String> = self.keys.iter().map(|named| named.key.id().hex()).collect();
        keys.sort_unstable();
        keys.dedup();
        // What a missing signature means does not change what is signed.
        let text = format!("{RULES_VERSION} {:?} {}", self.format, keys.join(" "));
        Digest::of(text.as_bytes())
    }

    /// The name of the key that signed, or what comes closest to a signature that counts.
    pub fn judge(&self, found: &[Found], subjects: &[Digest]) -> Result<&str, Option<Flaw>> {
        let keys: Vec<&PublicKey> = self.keys.iter().map(|named| &named.key).collect();
        let mut worst = None;
        for signature in found {
            let verified = match signature {
                Found::Simple { payload, signature } => {
                    simple::verify(payload, signature, subjects, &keys)
                }
                Found::Bundle(bytes) => bundle::verify(bytes, subjects, &keys),
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
