//! Verification of signatures and attestations, without I/O.
//!
//! ```text
//! verification     the signatures of one artifact, one after another
//! public_key       public keys and their algorithms
//! simple_signing   the older format: a payload with its signature beside it
//! sigstore_bundle  the newer format: a Sigstore bundle, over a statement or over the manifest itself
//! ```
//!
//! A signature is valid if a demanded key or identity made it over the exact bytes, and these bytes
//! name the digest of the index or of the manifest that was chosen from it. The crate `sigstore` knows
//! the proofs of identities.

pub mod public_key;
pub mod sigstore_bundle;
pub mod simple_signing;
mod verification;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sigstore::{
    BundleError, IdentityPattern, SignatureBundle, TrustRoot, VerificationError, VerifiedSigner,
};

pub use public_key::{KeyError, PublicKey};
pub use sigstore::MAXIMUM_BUNDLE_BYTES;
pub use verification::SignatureVerification;

use super::Digest;

/// Version of the rules. Increase it to invalidate recorded results when the meaning of a valid
/// signature changes.
const RULES_VERSION: u32 = 2;

/// Signatures and attestations that an artifact must have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SignatureDemand {
    /// Effect of a missing signature.
    pub mode: SignatureMode,
    /// Accepted signature formats.
    pub format: SignatureFormat,
    /// Statements about the artifact, each of which must be signed.
    pub statements: Arc<[StatementDemand]>,
}

/// A statement that a demanded signer must have signed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatementDemand {
    /// Predicate type of the attestation. None is a signature, which says nothing else.
    pub predicate_type: Option<String>,
    /// Signers, any of which is accepted.
    pub signers: Signers,
    /// Annotations that the signature must have.
    pub annotations: BTreeMap<String, String>,
}

/// Signers, any of which suffices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Signers {
    /// Public keys for signatures by key.
    pub keys: Arc<[NamedKey]>,
    /// Identities of keyless signatures.
    pub identities: Arc<[NamedIdentity]>,
}

/// A public key with its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedKey {
    /// Name in the configuration.
    pub name: String,
    /// Public key for verification.
    pub key: PublicKey,
}

/// An identity with its name.
#[derive(Clone, Debug)]
pub struct NamedIdentity {
    /// Name in the configuration.
    pub name: String,
    /// Demand on the certificate.
    pub pattern: IdentityPattern,
    /// Sigstore instances, any of which may have issued the certificate.
    pub roots: Arc<[NamedRoot]>,
}

/// A Sigstore instance with its name.
#[derive(Clone, Debug)]
pub struct NamedRoot {
    /// Name in the configuration.
    pub name: String,
    /// Trusted parts of the instance.
    pub root: Arc<TrustRoot>,
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

/// The object whose signature fulfils a demand for a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignedObject {
    /// The manifest itself, through whatever index it is chosen.
    Manifest,
    /// The index from which the manifest was chosen. Another index may give the manifest to another platform.
    Index(Digest),
    /// One that is not known any more. It is enough for a volume that shows the manifest already.
    AnyIndex,
}

/// A signature found in the registry.
#[derive(Clone, Debug)]
pub enum FoundSignature {
    /// A payload with the signature of its annotation.
    Simple(SimpleSignature),
    /// A Sigstore bundle.
    Bundle(Bundle),
    /// A signature that was not read, with the reason.
    Unread(String),
}

/// A Sigstore bundle, and what it may be a signature over.
#[derive(Clone, Debug, Default)]
pub struct Bundle {
    /// JSON of the bundle.
    pub json: Bytes,
    /// Manifest or index that the signature may be over, if it is over no statement.
    pub document: Option<Bytes>,
}

/// A payload, and the annotations of its layer.
#[derive(Clone, Debug, Default)]
pub struct SimpleSignature {
    /// Signed bytes of the payload.
    pub payload: Bytes,
    /// Signature in base64.
    pub signature: String,
    /// Certificate of a keyless signature, as PEM.
    pub certificate: Option<String>,
    /// Log entry of a keyless signature, as JSON.
    pub log_entry: Option<String>,
    /// Signed timestamp of a keyless signature, as JSON.
    pub timestamp: Option<String>,
}

/// The valid signature of a demanded statement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AcceptedSignature {
    /// Digest that was signed: of the manifest, or of its index.
    pub digest: Digest,
    /// Name of the key or the identity in the configuration.
    pub name: String,
    /// Signer of a keyless signature.
    #[serde(flatten)]
    pub signer: Option<VerifiedSigner>,
}

/// Reason why a signature is not valid. The last one is the closest to a valid signature.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum SignatureFlaw {
    /// An unsupported or malformed signature.
    #[error("a signature in a format that is not understood: {0}")]
    Format(&'static str),
    /// A certificate or proof that cannot be read.
    #[error("a keyless signature that cannot be read: {0}")]
    Keyless(BundleError),
    /// A signature by another key, or one whose content was changed.
    #[error("signed, but by none of the demanded keys or identities")]
    Key,
    /// A keyless signature by another identity.
    #[error("signed by {found}: {reason}")]
    Identity {
        /// Identity in the certificate.
        found: String,
        /// Part that is not as the last of the demanded identities has it.
        reason: String,
    },
    /// A signature that was not read.
    #[error("not every signature was read: {0}")]
    Unread(String),
    /// A certificate of a demanded identity without the proofs that it is one.
    #[error("the signature that names {found} is not valid: {reason}")]
    Proof {
        /// Identity in the certificate.
        found: String,
        /// First proof that fails, for each instance.
        reason: String,
    },
    /// A valid signature of another digest.
    #[error("signed, but for another digest")]
    Subject,
    /// A valid signature without a demanded annotation.
    #[error("signed, but without the annotation {0}")]
    Annotation(String),
}

/// A demanded statement that has no valid signature.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} ({signers})", self.found())]
pub struct UnmetDemand {
    /// Flaw of the closest signature. None means that there is no signature.
    pub flaw: Option<SignatureFlaw>,
    /// Predicate type of the demanded attestation.
    pub predicate_type: Option<String>,
    /// Names of the keys and identities, any of which would suffice.
    pub signers: String,
}

impl SignatureDemand {
    /// Demands a signature of one of these signers.
    pub fn signed_by(signers: Signers) -> Self {
        let statement = StatementDemand { signers, ..StatementDemand::default() };
        Self { statements: Arc::new([statement]), ..Self::default() }
    }

    /// Returns an identifier of the demand, under which results for a manifest are recorded.
    pub fn id(&self, signed: SignedObject) -> Digest {
        let statements: Vec<String> =
            self.statements.iter().map(StatementDemand::id_text).collect();
        // The mode does not affect whether a signature is valid.
        let signed = match signed {
            SignedObject::Manifest => String::new(),
            SignedObject::Index(digest) => format!(" {digest}"),
            SignedObject::AnyIndex => " index".to_owned(),
        };
        let text = format!("{RULES_VERSION} {:?} {}{signed}", self.format, statements.join("; "));
        Digest::of(text.as_bytes())
    }
}

impl StatementDemand {
    /// Returns a text that differs between demands that different signatures fulfil.
    fn id_text(&self) -> String {
        let mut keys: Vec<String> =
            self.signers.keys.iter().map(|key| key.key.id().hex()).collect();
        keys.sort_unstable();
        keys.dedup();
        let identities = self.signers.identities.iter().map(NamedIdentity::id_text);
        keys.extend(identities);
        if self.predicate_type.is_some() || !self.annotations.is_empty() {
            keys.push(format!("{:?} {:?}", self.predicate_type, self.annotations));
        }
        keys.join(" ")
    }

    /// Checks that a signature has the demanded annotations.
    fn check_annotations(
        &self,
        annotations: Option<&BTreeMap<String, serde_json::Value>>,
    ) -> Result<(), SignatureFlaw> {
        let has = |name: &String, value: &String| {
            let found = annotations.and_then(|annotations| annotations.get(name));
            found.and_then(serde_json::Value::as_str) == Some(value)
        };
        match self.annotations.iter().find(|(name, value)| !has(name, value)) {
            Some((name, value)) => Err(SignatureFlaw::Annotation(format!("{name}={value}"))),
            None => Ok(()),
        }
    }
}

impl Signers {
    /// Returns whether there is no signer at all.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.identities.is_empty()
    }

    /// Returns the name of the key that a signature verifies with.
    fn key(&self, message: &[u8], signature: &[u8]) -> Option<&str> {
        let mut keys = self.keys.iter();
        keys.find(|key| key.key.verifies(message, signature)).map(|key| &*key.name)
    }

    /// Verifies a keyless signature of this digest that names a demanded identity.
    fn identity(
        &self,
        digest: Digest,
        bundle: &SignatureBundle,
        verify: impl Fn(&TrustRoot) -> Result<VerifiedSigner, VerificationError>,
    ) -> Result<AcceptedSignature, SignatureFlaw> {
        let claimed = bundle.claimed_identity();
        let mut closest = SignatureFlaw::Key;
        for NamedIdentity { name, pattern, roots } in &*self.identities {
            let found = || claimed.to_string();
            // An identity that nothing proves yet decides only what is worth a verification.
            if let Err(reason) = pattern.check(claimed) {
                let reason = format!("for {name}, {reason}");
                closest = closest.max(SignatureFlaw::Identity { found: found(), reason });
                continue;
            }
            let mut reasons = Vec::new();
            for NamedRoot { name: instance, root } in &**roots {
                match verify(root) {
                    Ok(signer) => {
                        let (name, signer) = (name.clone(), Some(signer));
                        return Ok(AcceptedSignature { digest, name, signer });
                    }
                    Err(error) => reasons.push(format!("by {instance}: {error}")),
                }
            }
            let reason = reasons.join("; ");
            closest = closest.max(SignatureFlaw::Proof { found: found(), reason });
        }
        Err(closest)
    }
}

impl std::fmt::Display for Signers {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let keys: Vec<&str> = self.keys.iter().map(|key| &*key.name).collect();
        let identities: Vec<&str> =
            self.identities.iter().map(|identity| &*identity.name).collect();
        let kinds = [("keys", keys), ("identities", identities)].into_iter();
        let named = kinds.filter(|(_, names)| !names.is_empty());
        let named: Vec<_> =
            named.map(|(kind, names)| format!("{kind}: {}", names.join(", "))).collect();
        formatter.write_str(&named.join("; "))
    }
}

impl std::fmt::Display for AcceptedSignature {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.signer {
            Some(signer) => write!(formatter, "{}: {signer}", self.name),
            None => formatter.write_str(&self.name),
        }
    }
}

impl NamedIdentity {
    fn id_text(&self) -> String {
        let roots: Vec<Digest> = self.roots.iter().map(|root| root.root.id()).collect();
        format!("{:?} {roots:?}", self.pattern)
    }
}

impl PartialEq for NamedIdentity {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && self.id_text() == other.id_text()
    }
}

impl Eq for NamedIdentity {}

impl UnmetDemand {
    fn found(&self) -> String {
        match (&self.flaw, &self.predicate_type) {
            (Some(flaw), None) => format!("it is not signed as demanded: {flaw}"),
            (None, None) => "it is not signed, and a signature is demanded".to_owned(),
            (Some(flaw), Some(kind)) => format!("it has no valid attestation of {kind}: {flaw}"),
            (None, Some(kind)) => format!("it has no attestation of {kind}, and one is demanded"),
        }
    }
}

#[cfg(test)]
mod tests;
