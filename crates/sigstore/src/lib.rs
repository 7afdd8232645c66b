//! Keyless signatures of Sigstore, verified without a network.
//!
//! ```text
//! identity          the signer that a certificate names, and what a policy demands of it
//! trust_root        one Sigstore instance: its authorities, logs and timestamp authorities
//! trust_update      a newer trust root, from a TUF repository
//! signature_bundle  one signature with its certificate and proofs, in two formats
//! memory            what a verification takes at most
//! ring_provider     the cryptography of `sigstore-verify`, by ring
//! strict_json       JSON without duplicate and unknown fields
//! json_walk         the values of a JSON document, one after another
//! ```

pub mod identity;
mod json_walk;
pub mod memory;
mod ring_provider;
pub mod signature_bundle;
mod strict_json;
pub mod trust_root;
pub mod trust_update;

pub use identity::{IdentityPattern, SignerIdentity, TextPattern};
pub use signature_bundle::{
    AttachedSignature, BundleError, MAXIMUM_BUNDLE_BYTES, SignatureBundle, VerificationError,
    VerifiedSigner,
};
pub use trust_root::{TransparencyLog, TrustRoot, TrustRootError};
pub use trust_update::{SigstoreInstance, TrustUpdate, TrustUpdateError, update_trust_root};

#[cfg(test)]
mod tests;
