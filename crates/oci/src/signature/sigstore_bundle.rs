//! The newer format: a Sigstore bundle.
//!
//! cosign and GitHub sign an in-toto statement in a DSSE envelope. sigstore-python, and all that signs files, signs
//! the bytes of the manifest itself, which says nothing else: it has no annotations and is no attestation.
//!
//! A signature of a public key needs no log entry and no timestamp: they are ignored. The crate
//! `sigstore` verifies those of a signature with a certificate.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::IgnoredAny;
use sigstore::{SignatureBundle, TrustRoot};

use super::{AcceptedSignature, Bundle, SignatureFlaw, StatementDemand};
use crate::Digest;

/// Media type of the newest version: of the JSON, of the layer, and artifact type if a registry keeps it.
pub const MEDIA_TYPE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
/// Media types of all versions. The third version has two.
const MEDIA_TYPES: [&str; 4] = [
    MEDIA_TYPE,
    "application/vnd.dev.sigstore.bundle+json;version=0.3",
    "application/vnd.dev.sigstore.bundle+json;version=0.2",
    "application/vnd.dev.sigstore.bundle+json;version=0.1",
];

const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";
/// Types of statements. cosign signs with the first and attests with the second.
const STATEMENT_TYPES: [&str; 2] =
    ["https://in-toto.io/Statement/v1", "https://in-toto.io/Statement/v0.1"];
/// Predicate type of `cosign sign`. Predicates of other types by the same key, such as provenance,
/// do not count as signatures.
const PREDICATE_TYPE: &str = "https://sigstore.dev/cosign/sign/v1";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SigstoreBundle {
    media_type: String,
    #[serde(default)]
    verification_material: VerificationMaterial,
    dsse_envelope: Option<DsseEnvelope>,
    message_signature: Option<MessageSignature>,
}

#[derive(Deserialize)]
struct MessageSignature {
    signature: String,
}

/// The part of a bundle that says what the signature is over.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct BundleKind {
    message_signature: Option<IgnoredAny>,
}

/// The kinds of material, whose content does not matter here.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct VerificationMaterial {
    certificate: Option<IgnoredAny>,
    #[serde(rename = "x509CertificateChain")]
    certificates: Option<IgnoredAny>,
    public_key: Option<IgnoredAny>,
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
    /// Annotations of `cosign sign`.
    annotations: Option<BTreeMap<String, serde_json::Value>>,
}

impl VerificationMaterial {
    /// Returns whether it names one signer at most. Two readers could choose different ones.
    fn is_clear(&self) -> bool {
        let kinds = [&self.certificate, &self.certificates, &self.public_key];
        kinds.into_iter().flatten().count() <= 1
    }

    fn has_certificate(&self) -> bool {
        self.certificate.is_some() || self.certificates.is_some()
    }
}

/// Returns whether this is the media type of a bundle.
pub fn is_media_type(name: &str) -> bool {
    MEDIA_TYPES.contains(&name)
}

/// Returns whether a bundle may be a signature over the manifest itself.
pub fn signs_document(json: &[u8]) -> bool {
    serde_json::from_slice(json).is_ok_and(|kind: BundleKind| kind.message_signature.is_some())
}

/// Verifies a bundle, or returns its flaw: none if it is another statement than the demanded one.
pub(super) fn verify(
    bundle: &Bundle,
    subjects: &[Digest],
    demand: &StatementDemand,
) -> Result<AcceptedSignature, Option<SignatureFlaw>> {
    let parsed: SigstoreBundle = serde_json::from_slice(&bundle.json)
        .map_err(|_| SignatureFlaw::Format("it is no JSON of a bundle"))?;
    if !is_media_type(&parsed.media_type) {
        return Err(Some(SignatureFlaw::Format("the media type of the bundle is not known")));
    }
    if !parsed.verification_material.is_clear() {
        return Err(Some(SignatureFlaw::Format("it has more than one certificate or key")));
    }
    let by_identity = !demand.signers.identities.is_empty();
    let is_keyless = by_identity && parsed.verification_material.has_certificate();
    match (parsed.dsse_envelope, parsed.message_signature, &bundle.document) {
        (Some(envelope), None, _) => {
            let [signature] = &envelope.signatures[..] else {
                return Err(Some(SignatureFlaw::Format("its envelope has not one signature")));
            };
            if envelope.payload_type != PAYLOAD_TYPE {
                return Err(Some(SignatureFlaw::Format("its envelope is not of in-toto")));
            }
            let payload = decoded(&envelope.payload)?;
            let message = encoded_for_signing(&envelope.payload_type, &payload);
            // The signature is verified before the payload is parsed.
            if let Some(name) = key_of(demand, &message, &signature.sig)? {
                let digest = signed_subject(&payload, subjects, demand)?;
                return Ok(AcceptedSignature { digest, name, signer: None });
            }
            if !is_keyless {
                return Err(Some(SignatureFlaw::Key));
            }
            drop((envelope, payload, message));
            verify_keyless_statement(&bundle.json, subjects, demand)
        }
        (None, Some(_), Some(_)) if demand.predicate_type.is_some() => Err(None),
        (None, Some(signed), Some(document)) => {
            let digest = Digest::of(document);
            let accepted = match key_of(demand, document, &signed.signature)? {
                Some(name) => AcceptedSignature { digest, name, signer: None },
                None if is_keyless => {
                    let bundle =
                        SignatureBundle::parse(&bundle.json).map_err(SignatureFlaw::Keyless)?;
                    demand
                        .signers
                        .identity(digest, &bundle, |root| bundle.verify_message(document, root))?
                }
                None => return Err(Some(SignatureFlaw::Key)),
            };
            if !subjects.contains(&digest) {
                return Err(Some(SignatureFlaw::Subject));
            }
            demand.check_annotations(None)?;
            Ok(accepted)
        }
        _ => Err(Some(SignatureFlaw::Format("it has not one envelope or message signature"))),
    }
}

/// Returns the name of the key that made a signature.
fn key_of(
    demand: &StatementDemand,
    message: &[u8],
    signature: &str,
) -> Result<Option<String>, SignatureFlaw> {
    Ok(demand.signers.key(message, &decoded(signature)?).map(str::to_owned))
}

fn decoded(base64: &str) -> Result<Vec<u8>, SignatureFlaw> {
    STANDARD.decode(base64).map_err(|_| SignatureFlaw::Format("a part of it is no base64"))
}

fn verify_keyless_statement(
    json: &[u8],
    subjects: &[Digest],
    demand: &StatementDemand,
) -> Result<AcceptedSignature, Option<SignatureFlaw>> {
    let bundle = SignatureBundle::parse(json).map_err(SignatureFlaw::Keyless)?;
    let payload = bundle.statement().ok_or(SignatureFlaw::Format("it has no statement"))?;
    // The statement is not verified yet. The verification below compares its subject again.
    let subject = signed_subject(payload, subjects, demand)?;
    let verify = |root: &TrustRoot| bundle.verify_statement(subject, root);
    Ok(demand.signers.identity(subject, &bundle, verify)?)
}

/// Returns the digest that a statement is about, if it is a demanded one.
fn signed_subject(
    payload: &[u8],
    subjects: &[Digest],
    demand: &StatementDemand,
) -> Result<Digest, Option<SignatureFlaw>> {
    let statement: InTotoStatement = serde_json::from_slice(payload)
        .map_err(|_| SignatureFlaw::Format("its payload is no statement"))?;
    // An attestation is no signature, and a signature is no attestation.
    if statement.predicate_type != demand.predicate_type.as_deref().unwrap_or(PREDICATE_TYPE) {
        return Err(None);
    }
    if !STATEMENT_TYPES.contains(&&*statement.kind) {
        return Err(Some(SignatureFlaw::Format("its statement is of another version")));
    }
    let names = |digest: &&Digest, subject: &StatementSubject| {
        subject.digest.get("sha256").is_some_and(|hex| *hex == digest.hex())
    };
    let signed = statement.subject.iter().find_map(|subject| {
        Some((subjects.iter().find(|digest| names(digest, subject))?, subject))
    });
    let (digest, subject) = signed.ok_or(SignatureFlaw::Subject)?;
    demand.check_annotations(subject.annotations.as_ref())?;
    Ok(*digest)
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
