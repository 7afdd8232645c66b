//! Tests with signatures of cosign 3.1.1 and with invalid ones.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _};
use serde_json::json;

use super::*;

fn subject() -> Digest {
    Digest::of(b"the artifact")
}

/// Returns a new key pair, and its public key as in a file.
fn pair() -> (EcdsaKeyPair, PublicKey) {
    let random = SystemRandom::new();
    let algorithm = &ECDSA_P256_SHA256_ASN1_SIGNING;
    let document = EcdsaKeyPair::generate_pkcs8(algorithm, &random).expect("a key");
    let pair = EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref(), &random).expect("a key");
    let head = "3059301306072a8648ce3d020106082a8648ce3d030107034200";
    let key = pem(&unhex(head), pair.public_key().as_ref());
    (pair, PublicKey::from_pem(key.as_bytes()).expect("a public key"))
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex"))
        .collect()
}

fn pem(head: &[u8], key: &[u8]) -> String {
    let text = STANDARD.encode([head, key].concat());
    format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n")
}

fn sign(pair: &EcdsaKeyPair, message: &[u8]) -> String {
    STANDARD.encode(pair.sign(&SystemRandom::new(), message).expect("signed").as_ref())
}

fn payload(digest: Digest, kind: &str) -> Vec<u8> {
    json!({"critical": {"identity": {"docker-reference": "r.io/app"},
        "image": {"docker-manifest-digest": digest.to_string()}, "type": kind}, "optional": null})
    .to_string()
    .into_bytes()
}

fn simple(pair: &EcdsaKeyPair, payload: &[u8]) -> FoundSignature {
    FoundSignature::Simple { payload: payload.to_vec(), signature: sign(pair, payload) }
}

fn bundle(pair: &EcdsaKeyPair, digest: Digest, predicate: &str) -> serde_json::Value {
    let statement = json!({"_type": "https://in-toto.io/Statement/v1",
        "subject": [{"digest": {"sha256": digest.hex()}}], "predicateType": predicate, "predicate": {}})
    .to_string();
    let kind = "application/vnd.in-toto+json";
    let message = format!("DSSEv1 {} {kind} {} {statement}", kind.len(), statement.len());
    json!({"mediaType": sigstore_bundle::MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": "x"}},
        "dsseEnvelope": {"payload": STANDARD.encode(&statement), "payloadType": kind,
            "signatures": [{"sig": sign(pair, message.as_bytes())}]}})
}

const SIGNED: &str = "https://sigstore.dev/cosign/sign/v1";
const TYPE: &str = "cosign container image signature";

fn demand(keys: &[PublicKey]) -> SignatureDemand {
    let named = |(number, key): (usize, &PublicKey)| NamedKey {
        name: format!("key-{number}"),
        key: key.clone(),
    };
    SignatureDemand {
        mode: SignatureMode::Enforce,
        format: SignatureFormat::Any,
        keys: keys.iter().enumerate().map(named).collect(),
    }
}

#[test]
fn both_formats_are_verified_and_name_the_key() {
    let ((pair, key), (_, other)) = (pair(), pair());
    let demand = demand(&[other, key]);
    let subjects = [Digest::of(b"an index"), subject()];
    let simple = simple(&pair, &payload(subject(), TYPE));
    let bundle = FoundSignature::Bundle(bundle(&pair, subject(), SIGNED).to_string().into_bytes());
    assert_eq!(demand.judge(&[simple], &subjects), Ok("key-1"));
    assert_eq!(demand.judge(&[bundle], &subjects), Ok("key-1"));
}

#[test]
fn invalid_signatures_have_different_flaws() {
    let ((pair, key), (stranger, _)) = (pair(), pair());
    let demand = demand(&[key]);
    let judge = |found: FoundSignature| {
        demand.judge(&[found], &[subject()]).expect_err("it does not count")
    };
    let other = Digest::of(b"another artifact");
    assert_eq!(demand.judge(&[], &[subject()]), Err(None));
    assert_eq!(judge(simple(&stranger, &payload(subject(), TYPE))), Some(SignatureFlaw::Key));
    assert_eq!(judge(simple(&pair, &payload(other, TYPE))), Some(SignatureFlaw::Subject));
    assert_eq!(
        judge(simple(&pair, &payload(subject(), "something else"))),
        Some(SignatureFlaw::Format)
    );
    assert_eq!(judge(simple(&pair, b"no JSON")), Some(SignatureFlaw::Format));
    // The payload of one signature under another.
    let FoundSignature::Simple { signature, .. } = simple(&pair, &payload(other, TYPE)) else {
        panic!()
    };
    let swapped = FoundSignature::Simple { payload: payload(subject(), TYPE), signature };
    assert_eq!(judge(swapped), Some(SignatureFlaw::Key));
    let as_bundle =
        |value: serde_json::Value| FoundSignature::Bundle(value.to_string().into_bytes());
    assert_eq!(judge(as_bundle(bundle(&stranger, subject(), SIGNED))), Some(SignatureFlaw::Key));
    assert_eq!(judge(as_bundle(bundle(&pair, other, SIGNED))), Some(SignatureFlaw::Subject));
    // An attestation by the same key has another predicate.
    let provenance = bundle(&pair, subject(), "https://slsa.dev/provenance/v1");
    assert_eq!(judge(as_bundle(provenance)), Some(SignatureFlaw::Format));
    let mut swapped = bundle(&pair, other, SIGNED);
    swapped["dsseEnvelope"]["payload"] =
        bundle(&pair, subject(), SIGNED)["dsseEnvelope"]["payload"].clone();
    assert_eq!(judge(as_bundle(swapped)), Some(SignatureFlaw::Key));
    for (pointer, value) in [
        ("/mediaType", json!("application/vnd.dev.sigstore.bundle.v0.9+json")),
        ("/dsseEnvelope", json!(null)),
        ("/dsseEnvelope/signatures", json!([])),
        ("/dsseEnvelope/payloadType", json!("text/plain")),
        ("/dsseEnvelope/payload", json!("*")),
    ] {
        let mut broken = bundle(&pair, subject(), SIGNED);
        *broken.pointer_mut(pointer).expect("a field") = value;
        assert_eq!(judge(as_bundle(broken)), Some(SignatureFlaw::Format), "{pointer}");
    }
    // The flaw closest to a valid signature is returned.
    let all = [simple(&pair, b"{}"), simple(&stranger, b"x"), simple(&pair, &payload(other, TYPE))];
    assert_eq!(demand.judge(&all, &[subject()]), Err(Some(SignatureFlaw::Subject)));
}

#[test]
fn ed25519_signs_the_message_itself() {
    let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("a key");
    let pair = Ed25519KeyPair::from_pkcs8(document.as_ref()).expect("a key");
    let text = pem(&unhex("302a300506032b6570032100"), pair.public_key().as_ref());
    let key = PublicKey::from_pem(text.as_bytes()).expect("a public key");
    let signature = pair.sign(b"message");
    assert!(key.verifies(b"message", signature.as_ref()));
    assert!(!key.verifies(b"massage", signature.as_ref()));
}

#[test]
fn the_id_of_a_demand_depends_on_keys_and_format_only() {
    let ((_, one), (_, two)) = (pair(), pair());
    let base = demand(&[one.clone(), two.clone()]);
    assert_eq!(base.id(), demand(&[two.clone(), one.clone(), one.clone()]).id());
    assert_ne!(base.id(), demand(&[one]).id());
    assert_eq!(base.id(), SignatureDemand { mode: SignatureMode::Warn, ..base.clone() }.id());
    let legacy = SignatureDemand { format: SignatureFormat::Legacy, ..base.clone() };
    assert_ne!(base.id(), legacy.id());
}

proptest::proptest! {
    #[test]
    fn no_bytes_at_all_count(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
        let (_, key) = pair();
        let demand = demand(&[key]);
        let found = [
            FoundSignature::Bundle(bytes.clone()),
            FoundSignature::Simple { payload: bytes.clone(), signature: STANDARD.encode(&bytes) },
        ];
        proptest::prop_assert!(demand.judge(&found, &[subject()]).is_err());
        let _ = PublicKey::from_pem(&bytes);
    }
}
