//! cosign's newer format: a Sigstore bundle v0.3 with a DSSE envelope around an in-toto statement.
//!
//! The transparency log's entry and timestamps in it are not looked at: with a
//! public key the signature is all that is needed.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::{Flaw, PublicKey};
use crate::Digest;

/// The media type of the layer, and of the artifact where a registry keeps it.
pub const MEDIA_TYPE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";

const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";
const STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v1";
/// What `cosign sign` says of an image. Another predicate by the same key (where it was built,
/// what was found in it) says something else.
const PREDICATE_TYPE: &str = "https://sigstore.dev/cosign/sign/v1";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bundle {
    media_type: String,
    dsse_envelope: Option<Envelope>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<Signature>,
}

#[derive(Deserialize)]
struct Signature {
    sig: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Statement {
    #[serde(rename = "_type")]
    kind: String,
    subject: Vec<Subject>,
    predicate_type: String,
}

#[derive(Deserialize)]
struct Subject {
    digest: BTreeMap<String, String>,
}

/// Verifies one bundle: the index of the key that made it, or what is wrong.
pub fn verify(bundle: &[u8], subjects: &[Digest], keys: &[&PublicKey]) -> Result<usize, Flaw> {
    let bundle: Bundle = serde_json::from_slice(bundle).map_err(|_| Flaw::Format)?;
    let envelope = bundle.dsse_envelope.ok_or(Flaw::Format)?;
    let [signature] = &envelope.signatures[..] else { return Err(Flaw::Format) };
    if bundle.media_type != MEDIA_TYPE || envelope.payload_type != PAYLOAD_TYPE {
        return Err(Flaw::Format);
    }
    let payload = STANDARD.decode(&envelope.payload).map_err(|_| Flaw::Format)?;
    let signature = STANDARD.decode(&signature.sig).map_err(|_| Flaw::Format)?;
    let message = encoded_for_signing(&envelope.payload_type, &payload);
    // Before anything in it is believed.
    let key = keys.iter().position(|key| key.verifies(&message, &signature)).ok_or(Flaw::Key)?;
    let statement: Statement = serde_json::from_slice(&payload).map_err(|_| Flaw::Format)?;
    if statement.kind != STATEMENT_TYPE || statement.predicate_type != PREDICATE_TYPE {
        return Err(Flaw::Format);
    }
    let signed = statement.subject.iter().filter_map(|subject| subject.digest.get("sha256"));
    let names = |hex: &String| subjects.iter().any(|subject| subject.hex() == *hex);
    if signed.into_iter().any(names) { Ok(key) } else { Err(Flaw::Subject) }
}

/// DSSE's pre-authentication encoding.
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
