//! cosign's older format: a layer of the tag `sha256-<hex>.sig`, signed as it is
//! (`SIGNATURE_SPEC.md` of cosign).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::{Flaw, PublicKey};
use crate::Digest;

/// The layer's media type.
pub const MEDIA_TYPE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";

const TYPE: &str = "cosign container image signature";

#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    image: Image,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Image {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

/// Verifies one signature: the index of the key that made it, or what is wrong.
/// The reference in the payload has no tag and may be a mirror's: it does not count.
pub fn verify(
    payload: &[u8],
    signature: &str,
    subjects: &[Digest],
    keys: &[&PublicKey],
) -> Result<usize, Flaw> {
    let signature = STANDARD.decode(signature.trim()).map_err(|_| Flaw::Format)?;
    // Before anything in it is believed.
    let key = keys.iter().position(|key| key.verifies(payload, &signature)).ok_or(Flaw::Key)?;
    let payload: Payload = serde_json::from_slice(payload).map_err(|_| Flaw::Format)?;
    if payload.critical.kind != TYPE {
        return Err(Flaw::Format);
    }
    let signed: Digest = payload.critical.image.digest.parse().map_err(|_| Flaw::Format)?;
    if subjects.contains(&signed) { Ok(key) } else { Err(Flaw::Subject) }
}
