//! cosign's older format: a layer of the tag `sha256-<hex>.sig`, whose bytes are signed
//! (`SIGNATURE_SPEC.md` of cosign).

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use sigstore::{AttachedSignature, SignatureBundle};

use super::{AcceptedSignature, SignatureFlaw, SimpleSignature, StatementDemand};
use crate::Digest;

/// Media type of the layer.
pub const MEDIA_TYPE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";

const TYPE: &str = "cosign container image signature";

const NO_PAYLOAD: &str = "its payload is none of cosign";

#[derive(Deserialize)]
struct SimplePayload {
    critical: CriticalSection,
    /// Annotations of `cosign sign`.
    optional: Option<BTreeMap<String, serde_json::Value>>,
}

#[derive(Deserialize)]
struct CriticalSection {
    image: SignedImage,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct SignedImage {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

/// Verifies a signature, or returns its flaw.
///
/// The reference in the payload has no tag and may be a mirror's, so it is ignored.
pub(super) fn verify(
    found: &SimpleSignature,
    subjects: &[Digest],
    demand: &StatementDemand,
) -> Result<AcceptedSignature, Option<SignatureFlaw>> {
    // The signature is verified before the payload is parsed.
    let accepted = verify_payload(found, demand)?;
    let payload: SimplePayload =
        serde_json::from_slice(&found.payload).map_err(|_| SignatureFlaw::Format(NO_PAYLOAD))?;
    if payload.critical.kind != TYPE {
        return Err(Some(SignatureFlaw::Format("its payload is of another type")));
    }
    let digest: Digest =
        payload.critical.image.digest.parse().map_err(|_| SignatureFlaw::Format(NO_PAYLOAD))?;
    if !subjects.contains(&digest) {
        return Err(Some(SignatureFlaw::Subject));
    }
    demand.check_annotations(payload.optional.as_ref())?;
    Ok(AcceptedSignature { digest, ..accepted })
}

/// Verifies the bytes of the payload. What they say is not known yet: the returned digest is theirs.
fn verify_payload(
    found: &SimpleSignature,
    demand: &StatementDemand,
) -> Result<AcceptedSignature, SignatureFlaw> {
    let SimpleSignature { payload, signature, certificate, log_entry, timestamp } = found;
    let bytes = STANDARD.decode(signature.trim());
    let bytes = bytes.map_err(|_| SignatureFlaw::Format("its annotation is no base64"))?;
    let digest = Digest::of(payload);
    if let Some(name) = demand.signers.key(payload, &bytes) {
        return Ok(AcceptedSignature { digest, name: name.to_owned(), signer: None });
    }
    let certificate = certificate.as_deref().filter(|_| !demand.signers.identities.is_empty());
    let certificate = certificate.ok_or(SignatureFlaw::Key)?;
    let (log_entry, timestamp) = (log_entry.as_deref(), timestamp.as_deref());
    let attached = AttachedSignature { signature, certificate, log_entry, timestamp };
    let bundle = SignatureBundle::attached(attached).map_err(SignatureFlaw::Keyless)?;
    demand.signers.identity(digest, &bundle, |root| bundle.verify_message(payload, root))
}
