//! Tests with signatures of cosign 3.1.1, with bundles of sigstore-conformance, and with invalid ones.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _};
use serde_json::json;
use sigstore::{TextPattern, TransparencyLog};

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
    let (payload, signature) = (Bytes::copy_from_slice(payload), sign(pair, payload));
    FoundSignature::Simple(SimpleSignature { payload, signature, ..SimpleSignature::default() })
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
    let keys = keys.iter().enumerate().map(named).collect();
    SignatureDemand::signed_by(Signers { keys, ..Signers::default() })
}

fn found_bundle(json: impl Into<Bytes>) -> FoundSignature {
    FoundSignature::Bundle(Bundle { json: json.into(), document: None })
}

fn verified(
    demand: &SignatureDemand,
    found: &[FoundSignature],
    subjects: &[Digest],
) -> Result<Vec<AcceptedSignature>, UnmetDemand> {
    let mut verification = SignatureVerification::new(demand.clone(), subjects.to_vec());
    for signature in found {
        verification.add(signature);
    }
    verification.finish()
}

/// Returns the name of the key that made one of these signatures.
fn judge(
    demand: &SignatureDemand,
    found: &[FoundSignature],
    subjects: &[Digest],
) -> Result<String, Option<SignatureFlaw>> {
    let accepted = verified(demand, found, subjects).map_err(|unmet| unmet.flaw)?;
    Ok(accepted[0].name.clone())
}

#[test]
fn both_formats_are_verified_and_name_the_key() {
    let ((pair, key), (_, other)) = (pair(), pair());
    let demand = demand(&[other, key]);
    let subjects = [Digest::of(b"an index"), subject()];
    let simple = simple(&pair, &payload(subject(), TYPE));
    let bundle = found_bundle(bundle(&pair, subject(), SIGNED).to_string().into_bytes());
    assert_eq!(judge(&demand, &[simple], &subjects), Ok("key-1".to_owned()));
    assert_eq!(judge(&demand, &[bundle], &subjects), Ok("key-1".to_owned()));
}

#[test]
fn invalid_signatures_have_different_flaws() {
    let ((pair, key), (stranger, _)) = (pair(), pair());
    let demand = demand(&[key]);
    let judge_all = |found: &[FoundSignature]| judge(&demand, found, &[subject()]);
    let judge = |found: FoundSignature| judge_all(&[found]).expect_err("it does not count");
    let other = Digest::of(b"another artifact");
    assert_eq!(judge_all(&[]), Err(None));
    assert_eq!(judge(simple(&stranger, &payload(subject(), TYPE))), Some(SignatureFlaw::Key));
    assert_eq!(judge(simple(&pair, &payload(other, TYPE))), Some(SignatureFlaw::Subject));
    let kind = judge(simple(&pair, &payload(subject(), "something else")));
    assert_eq!(kind, Some(SignatureFlaw::Format("its payload is of another type")));
    let no_json = judge(simple(&pair, b"no JSON"));
    assert_eq!(no_json, Some(SignatureFlaw::Format("its payload is none of cosign")));
    // The payload of one signature under another.
    let FoundSignature::Simple(mut swapped) = simple(&pair, &payload(other, TYPE)) else {
        panic!()
    };
    swapped.payload = payload(subject(), TYPE).into();
    assert_eq!(judge(FoundSignature::Simple(swapped)), Some(SignatureFlaw::Key));
    let as_bundle = |value: serde_json::Value| found_bundle(value.to_string().into_bytes());
    assert_eq!(judge(as_bundle(bundle(&stranger, subject(), SIGNED))), Some(SignatureFlaw::Key));
    assert_eq!(judge(as_bundle(bundle(&pair, other, SIGNED))), Some(SignatureFlaw::Subject));
    // An attestation by the same key has another predicate.
    let provenance = bundle(&pair, subject(), "https://slsa.dev/provenance/v1");
    assert_eq!(judge(as_bundle(provenance)), None);
    let mut swapped = bundle(&pair, other, SIGNED);
    swapped["dsseEnvelope"]["payload"] =
        bundle(&pair, subject(), SIGNED)["dsseEnvelope"]["payload"].clone();
    assert_eq!(judge(as_bundle(swapped)), Some(SignatureFlaw::Key));
    let other_version = json!("application/vnd.dev.sigstore.bundle.v0.9+json");
    for (pointer, value, flaw) in [
        ("/mediaType", other_version, "the media type of the bundle is not known"),
        ("/dsseEnvelope", json!(null), "it has not one envelope or message signature"),
        ("/dsseEnvelope/signatures", json!([]), "its envelope has not one signature"),
        ("/dsseEnvelope/payloadType", json!("text/plain"), "its envelope is not of in-toto"),
        ("/dsseEnvelope/payload", json!("*"), "a part of it is no base64"),
        ("/verificationMaterial", json!(1), "it is no JSON of a bundle"),
        (
            "/verificationMaterial",
            json!({"publicKey": {"hint": "x"}, "certificate": {"rawBytes": "MAA="}}),
            "it has more than one certificate or key",
        ),
    ] {
        let mut broken = bundle(&pair, subject(), SIGNED);
        *broken.pointer_mut(pointer).expect("a field") = value;
        assert_eq!(judge(as_bundle(broken)), Some(SignatureFlaw::Format(flaw)), "{pointer}");
    }
    // The flaw closest to a valid signature is returned.
    let all = [simple(&pair, b"{}"), simple(&stranger, b"x"), simple(&pair, &payload(other, TYPE))];
    assert_eq!(judge_all(&all), Err(Some(SignatureFlaw::Subject)));
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
fn a_signature_over_the_manifest_itself_counts() {
    const NOT_ONE: &str = "it has not one envelope or message signature";
    let ((pair, key), (stranger, _)) = (pair(), pair());
    let demand = demand(&[key]);
    let document = Bytes::from_static(b"the artifact");
    let signed = |pair: &EcdsaKeyPair| {
        json!({"mediaType": sigstore_bundle::MEDIA_TYPE,
            "verificationMaterial": {"publicKey": {"hint": "x"}},
            "messageSignature": {"signature": sign(pair, &document),
                "messageDigest": {"algorithm": "SHA2_256", "digest": STANDARD.encode(subject().as_bytes())}}})
    };
    let found = |bundle: &serde_json::Value, document: Option<&Bytes>| {
        let json = Bytes::from(bundle.to_string());
        assert!(sigstore_bundle::signs_document(&json));
        [FoundSignature::Bundle(Bundle { json, document: document.cloned() })]
    };
    let valid = found(&signed(&pair), Some(&document));
    assert_eq!(judge(&demand, &valid, &[subject()]), Ok("key-0".to_owned()));
    assert_eq!(judge(&demand, &valid, &[Digest::of(b"x")]), Err(Some(SignatureFlaw::Subject)));
    for (invalid, flaw) in [
        (found(&signed(&stranger), Some(&document)), SignatureFlaw::Key),
        (found(&signed(&pair), Some(&Bytes::from_static(b"another"))), SignatureFlaw::Key),
        (found(&signed(&pair), None), SignatureFlaw::Format(NOT_ONE)),
    ] {
        assert_eq!(judge(&demand, &invalid, &[subject()]), Err(Some(flaw)));
    }
    let mut both = bundle(&pair, subject(), SIGNED);
    both["messageSignature"] = signed(&pair)["messageSignature"].clone();
    let both = found(&both, Some(&document));
    assert_eq!(judge(&demand, &both, &[subject()]), Err(Some(SignatureFlaw::Format(NOT_ONE))));
    // It is no statement, so it attests nothing and has no annotations.
    let of = |statement| SignatureDemand { statements: Arc::new([statement]), ..demand.clone() };
    let signature = || demand.statements[0].clone();
    let attestation =
        of(StatementDemand { predicate_type: Some(PROVENANCE.to_owned()), ..signature() });
    assert_eq!(judge(&attestation, &valid, &[subject()]), Err(None));
    let annotated = of(StatementDemand {
        annotations: [("env".to_owned(), "prod".to_owned())].into(),
        ..signature()
    });
    let missing = SignatureFlaw::Annotation("env=prod".to_owned());
    assert_eq!(judge(&annotated, &valid, &[subject()]), Err(Some(missing)));
}

#[test]
fn a_signature_that_is_too_large_is_named() {
    let (_, key) = pair();
    let error = verified(
        &demand(&[key]),
        &[FoundSignature::Unread("one has 5242880 bytes".to_owned())],
        &[subject()],
    );
    let error = error.expect_err("it is not read").to_string();
    assert!(error.contains("not every signature was read: one has 5242880 bytes"), "{error}");
}

#[test]
fn the_id_of_a_demand_depends_on_keys_and_format_only() {
    let ((_, one), (_, two)) = (pair(), pair());
    let base = demand(&[one.clone(), two.clone()]);
    assert_eq!(
        base.id(SignedObject::Manifest),
        demand(&[two.clone(), one.clone(), one.clone()]).id(SignedObject::Manifest)
    );
    assert_ne!(base.id(SignedObject::Manifest), demand(&[one]).id(SignedObject::Manifest));
    assert_eq!(
        base.id(SignedObject::Manifest),
        SignatureDemand { mode: SignatureMode::Warn, ..base.clone() }.id(SignedObject::Manifest)
    );
    let legacy = SignatureDemand { format: SignatureFormat::Legacy, ..base.clone() };
    assert_ne!(base.id(SignedObject::Manifest), legacy.id(SignedObject::Manifest));
}

const PROVENANCE: &str = "https://slsa.dev/provenance/v1";
const ISSUER: &str = "https://token.actions.githubusercontent.com";
/// The repository whose job signed the bundles.
const SIGNER: &str =
    "https://github.com/sigstore-conformance/extremely-dangerous-public-oidc-beacon";

/// Returns a file of the crate `sigstore`.
fn vector(path: &str) -> Vec<u8> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../sigstore/testdata");
    std::fs::read(format!("{folder}/{path}")).expect("a file")
}

fn provenance() -> FoundSignature {
    found_bundle(vector("rekor2-dsse/bundle.sigstore.json"))
}

fn instance(log: TransparencyLog) -> Arc<TrustRoot> {
    let root = TrustRoot::parse(&vector("rekor2-dsse/trusted_root.json"), log);
    Arc::new(root.expect("a trust root"))
}

fn identity(issuer: &str, subject: &str, root: Arc<TrustRoot>) -> NamedIdentity {
    let issuer = TextPattern::parse("issuer", Some(issuer), None).expect("an issuer");
    let subject = TextPattern::parse("subject", None, Some(subject)).expect("a subject");
    let pattern = IdentityPattern::new(issuer, subject, BTreeMap::new()).expect("a pattern");
    let root = NamedRoot { name: "public".to_owned(), root };
    NamedIdentity { name: "ci".to_owned(), pattern, roots: Arc::new([root]) }
}

fn attested(kind: Option<&str>, identities: &[NamedIdentity]) -> SignatureDemand {
    let signers = Signers { identities: identities.into(), ..Signers::default() };
    let demand = StatementDemand {
        predicate_type: kind.map(str::to_owned),
        signers,
        annotations: BTreeMap::new(),
    };
    SignatureDemand { statements: Arc::new([demand]), ..SignatureDemand::default() }
}

#[test]
fn an_attestation_of_an_identity_is_verified_and_names_its_signer() {
    let ci = identity(ISSUER, &format!("{SIGNER}/.*"), instance(TransparencyLog::Required));
    let other = identity("https://accounts.google.com", ".*", Arc::clone(&ci.roots[0].root));
    let subject = Digest::of(&vector("a.txt"));
    let demand = attested(Some(PROVENANCE), &[other, ci]);
    let found = [found_bundle(b"{}".to_vec()), provenance()];
    let accepted = verified(&demand, &found, &[subject]).expect("valid");
    let signer = accepted[0].signer.as_ref().expect("a signer");
    assert_eq!((&*accepted[0].name, &*signer.identity.issuer), ("ci", ISSUER));
    assert!(signer.identity.subject.starts_with(SIGNER) && signer.log_index.is_some());
    let shown = accepted[0].to_string();
    assert!(
        shown.starts_with(&format!("ci: {SIGNER}")) && shown.contains(", log index "),
        "{shown}"
    );
}

#[test]
fn a_keyless_statement_that_is_not_as_demanded_says_why() {
    let root = instance(TransparencyLog::Required);
    let ci = identity(ISSUER, &format!("{SIGNER}/.*"), Arc::clone(&root));
    let subject = Digest::of(&vector("a.txt"));
    let refused = |demand: &SignatureDemand, subject| {
        verified(demand, &[provenance()], &[subject]).expect_err("not as demanded").to_string()
    };
    let stranger = identity(ISSUER, SIGNER, Arc::clone(&root));
    for (demand, expected) in [
        (attested(Some(PROVENANCE), &[stranger]), "for ci, the subject must match"),
        (
            attested(Some("https://spdx.dev/Document"), std::slice::from_ref(&ci)),
            "it has no attestation of",
        ),
        (
            attested(None, std::slice::from_ref(&ci)),
            "it is not signed, and a signature is demanded",
        ),
    ] {
        let error = refused(&demand, subject);
        assert!(error.contains(expected) && error.contains("(identities: ci)"), "{error}");
    }
    let of_other =
        refused(&attested(Some(PROVENANCE), std::slice::from_ref(&ci)), Digest::of(b"another"));
    assert!(of_other.contains("for another digest"), "{of_other}");
    // Keys do not sign with certificates, and the root of the logs decides.
    let (_, key) = pair();
    let error = refused(&demand(&[key]), subject);
    assert!(error.contains("none of the demanded keys"), "{error}");
    let mut without = vector("rekor2-dsse/trusted_root.json");
    let mut parsed: serde_json::Value = serde_json::from_slice(&without).expect("JSON");
    for log in parsed["tlogs"].as_array_mut().expect("logs") {
        log["publicKey"]["validFor"] = json!({"start": "2999-01-01T00:00:00Z"});
    }
    without = parsed.to_string().into_bytes();
    let without = TrustRoot::parse(&without, TransparencyLog::Required).expect("a trust root");
    let later = identity(ISSUER, &format!("{SIGNER}/.*"), Arc::new(without));
    let error = refused(&attested(Some(PROVENANCE), &[later]), subject);
    assert!(error.contains("is not valid: by public: invalid checkpoint"), "{error}");
}

#[test]
fn all_that_is_demanded_must_be_there() {
    let ((pair, key), root) = (pair(), instance(TransparencyLog::Required));
    let ci = identity(ISSUER, &format!("{SIGNER}/.*"), root);
    let subject = Digest::of(&vector("a.txt"));
    let [signature, attestation] = [demand(&[key]), attested(Some(PROVENANCE), &[ci])]
        .map(|demand| demand.statements[0].clone());
    let mut with_annotation = signature.clone();
    with_annotation.annotations = [("env".to_owned(), "prod".to_owned())].into();
    let both = |statements: [StatementDemand; 2]| SignatureDemand {
        statements: Arc::new(statements),
        ..SignatureDemand::default()
    };
    let mut signed = bundle(&pair, subject, SIGNED);
    let found = [found_bundle(signed.to_string().into_bytes()), provenance()];
    let demand = both([signature, attestation.clone()]);
    assert_eq!(verified(&demand, &found, &[subject]).expect("both").len(), 2);
    let error = verified(&demand, &found[..1], &[subject]).expect_err("one").to_string();
    assert!(error.contains(PROVENANCE), "{error}");
    let demand = both([with_annotation, attestation]);
    let error = verified(&demand, &found, &[subject]).expect_err("no annotation").to_string();
    assert!(error.contains("without the annotation env=prod (keys: key-0)"), "{error}");
    let statement = json!({"_type": "https://in-toto.io/Statement/v1", "predicateType": SIGNED,
        "subject": [{"digest": {"sha256": subject.hex()}, "annotations": {"env": "prod"}}]})
    .to_string();
    let kind = "application/vnd.in-toto+json";
    let message = format!("DSSEv1 {} {kind} {} {statement}", kind.len(), statement.len());
    signed["dsseEnvelope"]["payload"] = json!(STANDARD.encode(&statement));
    signed["dsseEnvelope"]["signatures"][0]["sig"] = json!(sign(&pair, message.as_bytes()));
    let found = [found_bundle(signed.to_string().into_bytes()), provenance()];
    assert!(verified(&demand, &found, &[subject]).is_ok());
}

#[test]
fn the_id_of_a_demand_depends_on_identities_and_trust_roots() {
    let of = |subject: &str, log| {
        let ci = identity(ISSUER, subject, instance(log));
        attested(None, &[ci])
    };
    let base = of("a", TransparencyLog::Required);
    assert_eq!(
        base.id(SignedObject::Manifest),
        of("a", TransparencyLog::Required).id(SignedObject::Manifest)
    );
    assert_eq!(base, of("a", TransparencyLog::Required));
    let ci = base.statements[0].signers.identities[0].clone();
    let annotated = StatementDemand {
        annotations: [("a".to_owned(), "b".to_owned())].into(),
        ..base.statements[0].clone()
    };
    let ((_, one), (_, two)) = (pair(), pair());
    let [one, two] = [one, two].map(|key| demand(&[key]).statements[0].clone());
    let with = |statements: &[StatementDemand]| SignatureDemand {
        statements: statements.into(),
        ..SignatureDemand::default()
    };
    let mut either = one.clone();
    either.signers.keys = [&one, &two].map(|demand| demand.signers.keys[0].clone()).into();
    let others = [
        of("b", TransparencyLog::Required),
        of("a", TransparencyLog::None),
        attested(Some(PROVENANCE), &[ci]),
        with(&[annotated]),
        with(&[one, two]),
        with(&[either]),
    ];
    let ids: std::collections::BTreeSet<_> = others
        .iter()
        .chain([&base])
        .map(|demand| demand.id(SignedObject::Manifest).hex())
        .collect();
    assert_eq!(ids.len(), others.len() + 1);
}

proptest::proptest! {
    #[test]
    fn no_bytes_at_all_count(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
        let (_, key) = pair();
        let demand = demand(&[key]);
        let found = [
            found_bundle(bytes.clone()),
            FoundSignature::Simple(SimpleSignature {
                signature: STANDARD.encode(&bytes),
                payload: bytes.clone().into(),
                ..SimpleSignature::default()
            }),
        ];
        proptest::prop_assert!(verified(&demand, &found, &[subject()]).is_err());
        let _ = PublicKey::from_pem(&bytes);
    }
}
