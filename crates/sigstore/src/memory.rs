//! The memory that a verification of untrusted bytes takes at most, found out without taking it.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::json_walk::{JsonObserver, walk};
use super::signature_bundle::MAXIMUM_PROOF_BYTES;

/// Memory for each byte of a certificate, a log entry or another proof: JSON whose values are as small as they can be.
pub const BYTES_PER_PROOF_BYTE: u64 = 100;
/// Memory for each byte of a bundle: its copies as text and as bytes. Measured 12 for bundles with a large payload.
const BYTES_PER_BUNDLE_BYTE: u64 = 14;
/// A node of an object in memory, for six fields at least.
const OBJECT_NODE_BYTES: u64 = 740;
/// A value within a list, where the list grows by doubling.
const LIST_VALUE_BYTES: u64 = 64;
/// The memory of an allocation beside its content.
const ALLOCATION_BYTES: u64 = 32;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct BundlePayload<'a> {
    #[serde(borrow)]
    dsse_envelope: Option<EnvelopePayload<'a>>,
}

#[derive(Deserialize)]
struct EnvelopePayload<'a> {
    #[serde(borrow)]
    payload: Cow<'a, str>,
}

/// Returns the memory in bytes that the verification of a bundle takes at most.
pub fn of_bundle(json: &[u8]) -> u64 {
    let copies = json.len() as u64 * BYTES_PER_BUNDLE_BYTE;
    let payload = payload(json);
    let proofs = json.len().saturating_sub(payload.len()).min(MAXIMUM_PROOF_BYTES) as u64;
    let statement = STANDARD.decode(&*payload).map_or(0, |statement| of_json(&statement));
    copies + proofs * BYTES_PER_PROOF_BYTE + statement
}

/// Returns the payload of a bundle in base64; empty if there is none.
pub(crate) fn payload(json: &[u8]) -> Cow<'_, str> {
    let bundle = serde_json::from_slice::<BundlePayload<'_>>(json).ok();
    bundle
        .and_then(|bundle| bundle.dsse_envelope)
        .map(|envelope| envelope.payload)
        .unwrap_or_default()
}

/// Returns the memory of a JSON document as a tree of values, up to where it is malformed.
fn of_json(json: &[u8]) -> u64 {
    let mut bytes = TreeBytes(0);
    // Other readers stop at the same error.
    let _ = walk(json, &mut bytes);
    bytes.0
}

/// Adds up the memory of a tree of values.
struct TreeBytes(u64);

impl JsonObserver for TreeBytes {
    /// The number of fields so far.
    type Object = u64;

    fn field(&mut self, fields: &mut u64, name: String) -> Result<(), String> {
        if fields.is_multiple_of(6) {
            self.0 += OBJECT_NODE_BYTES;
        }
        *fields += 1;
        self.text(&name);
        Ok(())
    }

    fn text(&mut self, text: &str) {
        self.0 += ALLOCATION_BYTES + text.len() as u64;
    }

    fn list(&mut self) {
        self.0 += ALLOCATION_BYTES + 2 * LIST_VALUE_BYTES;
    }

    fn list_value(&mut self) {
        self.0 += LIST_VALUE_BYTES;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_statement(statement: &str) -> u64 {
        let payload = STANDARD.encode(statement);
        of_bundle(serde_json::json!({"dsseEnvelope": {"payload": payload}}).to_string().as_bytes())
    }

    #[test]
    fn small_values_count_for_what_they_take() {
        for (value, least) in
            [("{\"\":0}", 600), ("[]", 64), ("\"\"", 56), ("{\"\":{\"\":0}}", 1200)]
        {
            let list = format!("{{\"annotations\":[{}{value}]}}", format!("{value},").repeat(9999));
            let (bytes, most) = (of_statement(&list), 300 * list.len() as u64);
            assert!((10_000 * least..most).contains(&bytes), "{value}: {bytes}");
        }
        // One long text is hardly more than its copies.
        let text = format!("\"{}\"", "a".repeat(100_000));
        assert!(of_statement(&text) < 25 * text.len() as u64);
    }

    #[test]
    fn proofs_count_up_to_their_bound() {
        let proofs = serde_json::json!({"more": "a".repeat(1 << 20)}).to_string();
        assert!(of_bundle(proofs.as_bytes()) < 30 * proofs.len() as u64);
    }
}
