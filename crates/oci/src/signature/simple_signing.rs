//! cosign's older format: a layer of the tag `sha256-<hex>.sig`, whose bytes are signed
//! (`SIGNATURE_SPEC.md` of cosign).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::{PublicKey, SignatureFlaw};
use crate::Digest;

/// Media type of the layer.
pub const MEDIA_TYPE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";

const TYPE: &str = "cosign container image signature";

#[derive(Deserialize)]
struct SimplePayload {
    critical: CriticalSection,
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

/// Verifies a signature. Returns the index of the key that made it.
///
/// The reference in the payload has no tag and may be a mirror's, so it is ignored.
pub fn verify(
    payload: &[u8],
    signature: &str,
    subjects: &[Digest],
    keys: &[&PublicKey],
) -> Result<usize, SignatureFlaw> {
    let signature = STANDARD.decode(signature.trim()).map_err(|_| SignatureFlaw::Format)?;
    // The signature is verified before the payload is parsed.
    let key =
        keys.iter().position(|key| key.verifies(payload, &signature)).ok_or(SignatureFlaw::Key)?;
    let payload: SimplePayload =
        serde_json::from_slice(payload).map_err(|_| SignatureFlaw::Format)?;
    if payload.critical.kind != TYPE {
        return Err(SignatureFlaw::Format);
    }
    let signed: Digest =
        payload.critical.image.digest.parse().map_err(|_| SignatureFlaw::Format)?;
    if subjects.contains(&signed) { Ok(key) } else { Err(SignatureFlaw::Subject) }
}
