//! One signature with its certificate and proofs: a Sigstore bundle, or cosign's older form with the parts in the
//! annotations of a layer.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use oci_types::Digest;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sigstore_verify::crypto::parse_certificate_info;
use sigstore_verify::types::bundle::VerificationMaterialContent;
use sigstore_verify::types::{
    Artifact, ArtifactDigest, Bundle, DerCertificate, Sha256Hash, SignatureContent,
};
use text::printable::shorten;

use super::identity::SignerIdentity;
use super::trust_root::TrustRoot;
use super::{memory, ring_provider, strict_json};

/// The maximum size of a bundle in bytes. Certificate and proofs have about 10 KiB; the payload may be an attestation
/// with a bill of materials.
pub const MAXIMUM_BUNDLE_BYTES: usize = 4 << 20;
/// The maximum size of all but the payload in bytes.
pub(crate) const MAXIMUM_PROOF_BYTES: usize = 128 << 10;
/// The maximum number of log entries, of timestamps and of certificates. Each is verified; tools write one of each.
const MAXIMUM_PROOFS: usize = 8;
/// The maximum size of a log's checkpoint in bytes. Each of its signatures may be verified.
const CHECKPOINT_BYTES: usize = 16 << 10;
/// The maximum length of a reason in a message in bytes.
const SHOWN_BYTES: usize = 300;

/// The fields of a bundle at any depth.
const FIELDS: &[&str] = &[
    "algorithm",
    "canonicalizedBody",
    "certificate",
    "certificates",
    "checkpoint",
    "digest",
    "dsseEnvelope",
    "envelope",
    "hashes",
    "hint",
    "inclusionPromise",
    "inclusionProof",
    "integratedTime",
    "keyId",
    "keyid",
    "kind",
    "kindVersion",
    "logId",
    "logIndex",
    "mediaType",
    "messageDigest",
    "messageSignature",
    "payload",
    "payloadType",
    "publicKey",
    "rawBytes",
    "rfc3161Timestamps",
    "rootHash",
    "sig",
    "signature",
    "signatures",
    "signedEntryTimestamp",
    "signedTimestamp",
    "timestampVerificationData",
    "tlogEntries",
    "treeSize",
    "verificationMaterial",
    "version",
    "x509CertificateChain",
];

/// A signature with its certificate and proofs, of which nothing is verified yet.
#[derive(Debug)]
pub struct SignatureBundle {
    bundle: Bundle,
    identity: SignerIdentity,
}

/// cosign's older form: a payload, and annotations of its layer.
#[derive(Clone, Copy, Debug)]
pub struct AttachedSignature<'a> {
    /// The signature in base64.
    pub signature: &'a str,
    /// The certificate of the signer, as PEM.
    pub certificate: &'a str,
    /// The log entry with the log's promise, as JSON.
    pub log_entry: Option<&'a str>,
    /// The signed timestamp, as JSON.
    pub timestamp: Option<&'a str>,
}

/// The verified maker of a signature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VerifiedSigner {
    /// The identity in the certificate.
    #[serde(flatten)]
    pub identity: SignerIdentity,
    /// The earliest time at which a log or a timestamp authority saw the signature.
    pub signed_at: Timestamp,
    /// The index of the log entry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_index: Option<u64>,
}

/// The reason that bytes are no keyless signature.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum BundleError {
    /// The bundle has more bytes, proofs or certificates than any that a tool writes.
    #[error("it has more {0} than a signature needs")]
    Size(&'static str),
    /// The bundle is malformed.
    #[error("{0}")]
    Malformed(String),
    /// The signature was made with a key, and there is no certificate.
    #[error("it has no certificate")]
    NoCertificate,
    /// The certificate is not of a signer: it lacks a subject or the issuer of its identity.
    #[error("its certificate names no subject or no issuer")]
    NoIdentity,
}

/// The reason that a signature is not valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct VerificationError(String);

/// The annotation `dev.sigstore.cosign/bundle`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct AttachedLogEntry {
    signed_entry_timestamp: String,
    payload: AttachedLogPayload,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct AttachedLogPayload {
    body: String,
    integrated_time: i64,
    log_index: i64,
    #[serde(rename = "logID")]
    log_id: String,
}

/// The kind of a log entry, which its body names.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LogEntryKind {
    api_version: String,
    kind: String,
}

/// The annotation `dev.sigstore.cosign/rfc3161timestamp`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AttachedTimestamp {
    #[serde(rename = "SignedRFC3161Timestamp")]
    signed_timestamp: String,
}

impl SignatureBundle {
    /// Parses a Sigstore bundle of version 0.1 to 0.3.
    pub fn parse(json: &[u8]) -> Result<Self, BundleError> {
        if json.len() > MAXIMUM_BUNDLE_BYTES {
            return Err(BundleError::Size("bytes"));
        }
        strict_json::check(json, Some(FIELDS)).map_err(malformed)?;
        if json.len() - memory::payload(json).len() > MAXIMUM_PROOF_BYTES {
            return Err(BundleError::Size("bytes of proofs"));
        }
        Self::new(serde_json::from_slice(json).map_err(malformed)?)
    }

    /// Parses cosign's older form.
    pub fn attached(attached: AttachedSignature<'_>) -> Result<Self, BundleError> {
        let AttachedSignature { signature, certificate, log_entry, timestamp } = attached;
        let size = [Some(certificate), log_entry, timestamp].into_iter().flatten().map(str::len);
        if size.sum::<usize>() > MAXIMUM_BUNDLE_BYTES {
            return Err(BundleError::Size("bytes"));
        }
        let certificate = DerCertificate::from_pem(certificate).map_err(malformed)?;
        let entries = log_entry.map(bundle_log_entry).transpose()?;
        let timestamp: Option<AttachedTimestamp> =
            timestamp.map(serde_json::from_str).transpose().map_err(malformed)?;
        let timestamps =
            timestamp.iter().map(|stamp| json!({"signedTimestamp": stamp.signed_timestamp}));
        // Version 0.1 needs the promise of a log. Version 0.3 accepts a signature without a log.
        let media_type = match &entries {
            Some(_) => "application/vnd.dev.sigstore.bundle+json;version=0.1",
            None => "application/vnd.dev.sigstore.bundle.v0.3+json",
        };
        let bundle = json!({
            "mediaType": media_type,
            "verificationMaterial": {
                "certificate": {"rawBytes": certificate},
                "tlogEntries": entries.into_iter().collect::<Vec<_>>(),
                "timestampVerificationData": {"rfc3161Timestamps": timestamps.collect::<Vec<_>>()},
            },
            "messageSignature": {"signature": signature.trim()},
        });
        Self::new(serde_json::from_value(bundle).map_err(malformed)?)
    }

    fn new(bundle: Bundle) -> Result<Self, BundleError> {
        let material = &bundle.verification_material;
        let certificates = match &material.content {
            VerificationMaterialContent::X509CertificateChain { certificates } => {
                certificates.len()
            }
            _ => 1,
        };
        let timestamps = material.timestamp_verification_data.rfc3161_timestamps.len();
        for (what, count) in [
            ("certificates", certificates),
            ("log entries", material.tlog_entries.len()),
            ("timestamps", timestamps),
        ] {
            if count > MAXIMUM_PROOFS {
                return Err(BundleError::Size(what));
            }
        }
        let proofs =
            material.tlog_entries.iter().filter_map(|entry| entry.inclusion_proof.as_ref());
        if proofs.into_iter().any(|proof| proof.checkpoint.envelope().len() > CHECKPOINT_BYTES) {
            return Err(BundleError::Size("bytes in a checkpoint"));
        }
        let certificate = bundle.signing_certificate().ok_or(BundleError::NoCertificate)?;
        let certificate = parse_certificate_info(certificate).map_err(malformed)?;
        let identity = SignerIdentity::of(&certificate).ok_or(BundleError::NoIdentity)?;
        Ok(Self { bundle, identity })
    }

    /// Returns the identity that the certificate names. It is not verified.
    pub fn claimed_identity(&self) -> &SignerIdentity {
        &self.identity
    }

    /// Returns the signed statement, if the signature is over one. It is not verified.
    pub fn statement(&self) -> Option<&[u8]> {
        match &self.bundle.content {
            SignatureContent::DsseEnvelope(envelope) => Some(envelope.payload.as_bytes()),
            _ => None,
        }
    }

    /// Verifies a signature over a statement about `subject`.
    pub fn verify_statement(
        &self,
        subject: Digest,
        root: &TrustRoot,
    ) -> Result<VerifiedSigner, VerificationError> {
        let hash = Sha256Hash::from_hex(&subject.hex()).map_err(invalid)?;
        self.verify(Artifact::from_digest(ArtifactDigest::sha256(hash)), root)
    }

    /// Verifies a signature over the message itself.
    pub fn verify_message(
        &self,
        message: &[u8],
        root: &TrustRoot,
    ) -> Result<VerifiedSigner, VerificationError> {
        ring_provider::with_message(message, || self.verify(Artifact::from_blob(message), root))
    }

    fn verify(
        &self,
        artifact: Artifact<'_>,
        root: &TrustRoot,
    ) -> Result<VerifiedSigner, VerificationError> {
        if self.bundle.verification_material.tlog_entries.is_empty() && root.policy.verifies_tlog()
        {
            return Err(invalid(
                "it has no inclusion proof of a log, as a trust root without transparencyLog: None demands",
            ));
        }
        let verified =
            root.verifier.verify(artifact, &self.bundle, &root.policy).map_err(invalid)?;
        let times = verified.verified_timestamps().iter().min();
        let signed_at = *times.ok_or_else(|| invalid("nothing says when it was signed"))?;
        let entry = self.bundle.verification_material.tlog_entries.first();
        let log_index =
            entry.filter(|_| verified.tlog_verified()).map(|entry| entry.log_index.get());
        Ok(VerifiedSigner { identity: self.identity.clone(), signed_at, log_index })
    }
}

impl std::fmt::Display for VerifiedSigner {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} at {}", self.identity, self.signed_at)?;
        match self.log_index {
            Some(index) => write!(formatter, ", log index {index}"),
            None => Ok(()),
        }
    }
}

/// Returns the log entry of a bundle for the one of an annotation.
fn bundle_log_entry(annotation: &str) -> Result<serde_json::Value, BundleError> {
    let AttachedLogEntry { signed_entry_timestamp, payload } =
        serde_json::from_str(annotation).map_err(malformed)?;
    let body = STANDARD.decode(&payload.body).map_err(malformed)?;
    let LogEntryKind { api_version, kind } = serde_json::from_slice(&body).map_err(malformed)?;
    let log_id = Sha256Hash::from_hex(&payload.log_id).map_err(malformed)?;
    Ok(json!({
        "logIndex": payload.log_index.to_string(),
        "logId": {"keyId": log_id.to_base64()},
        "kindVersion": {"kind": kind, "version": api_version},
        "integratedTime": payload.integrated_time.to_string(),
        "inclusionPromise": {"signedEntryTimestamp": signed_entry_timestamp},
        "canonicalizedBody": payload.body,
    }))
}

#[expect(clippy::needless_pass_by_value, reason = "it is passed to map_err")]
fn malformed(error: impl ToString) -> BundleError {
    BundleError::Malformed(shorten(&error.to_string(), SHOWN_BYTES))
}

#[expect(clippy::needless_pass_by_value, reason = "it is passed to map_err")]
fn invalid(error: impl ToString) -> VerificationError {
    VerificationError(shorten(&error.to_string(), SHOWN_BYTES))
}
