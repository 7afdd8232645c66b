//! cosign's newer format: a Sigstore bundle v0.3 with a DSSE envelope around an in-toto statement.
//!
//! The transparency log entry and the timestamps are ignored: with a public key, the signature
//! suffices.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::{PublicKey, SignatureFlaw};
use crate::Digest;

/// Media type of the layer, and artifact type if a registry keeps it.
pub const MEDIA_TYPE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";

const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";
const STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v1";
/// Predicate type of `cosign sign`. Predicates of other types by the same key, such as provenance,
/// do not count as signatures.
const PREDICATE_TYPE: &str = "https://sigstore.dev/cosign/sign/v1";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SigstoreBundle {
    media_type: String,
    dsse_envelope: Option<DsseEnvelope>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DsseEnvelope {
    payload: String,
    payload_type: String,
    signatures: Vec<DsseSignature>,
}

#[derive(Deserialize)]
struct DsseSignature {
    sig: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct InTotoStatement {
    #[serde(rename = "_type")]
    kind: String,
    subject: Vec<StatementSubject>,
    predicate_type: String,
}

#[derive(Deserialize)]
struct StatementSubject {
    digest: BTreeMap<String, String>,
}

/// Verifies a bundle. Returns the index of the key that signed it.
pub fn verify(
    bundle: &[u8],
    subjects: &[Digest],
    keys: &[&PublicKey],
) -> Result<usize, SignatureFlaw> {
    let bundle: SigstoreBundle =
        serde_json::from_slice(bundle).map_err(|_| SignatureFlaw::Format)?;
    let envelope = bundle.dsse_envelope.ok_or(SignatureFlaw::Format)?;
    let [signature] = &envelope.signatures[..] else { return Err(SignatureFlaw::Format) };
    if bundle.media_type != MEDIA_TYPE || envelope.payload_type != PAYLOAD_TYPE {
        return Err(SignatureFlaw::Format);
    }
    let payload = STANDARD.decode(&envelope.payload).map_err(|_| SignatureFlaw::Format)?;
    let signature = STANDARD.decode(&signature.sig).map_err(|_| SignatureFlaw::Format)?;
    let message = encoded_for_signing(&envelope.payload_type, &payload);
    // The signature is verified before the payload is parsed.
    let key =
        keys.iter().position(|key| key.verifies(&message, &signature)).ok_or(SignatureFlaw::Key)?;
    let statement: InTotoStatement =
        serde_json::from_slice(&payload).map_err(|_| SignatureFlaw::Format)?;
    if statement.kind != STATEMENT_TYPE || statement.predicate_type != PREDICATE_TYPE {
        return Err(SignatureFlaw::Format);
    }
    let signed = statement.subject.iter().filter_map(|subject| subject.digest.get("sha256"));
    let names = |hex: &String| subjects.iter().any(|subject| subject.hex() == *hex);
    if signed.into_iter().any(names) { Ok(key) } else { Err(SignatureFlaw::Subject) }
}

/// Returns DSSE's pre-authentication encoding.
fn encoded_for_signing(kind: &str, payload: &[u8]) -> Vec<u8> {
    let mut message = format!("DSSEv1 {} {kind} {} ", kind.len(), payload.len()).into_bytes();
    message.extend_from_slice(payload);
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_encoding_is_that_of_the_specification() {
        let encoded = encoded_for_signing("http://example.com/HelloWorld", b"hello world");
        assert_eq!(encoded, b"DSSEv1 29 http://example.com/HelloWorld 11 hello world");
    }
}
