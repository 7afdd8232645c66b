//! Tests with bundles of sigstore-conformance, and with changed ones. None is changed in a way that a time could heal.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use oci_types::Digest;
use serde_json::{Value, json};
use sigstore_verify::trust_root::SIGSTORE_PRODUCTION_TRUSTED_ROOT as PUBLIC_ROOT;

use super::signature_bundle::MAXIMUM_BUNDLE_BYTES;
use super::trust_root::MAXIMUM_TRUST_ROOT_BYTES;
use super::*;

/// The identity of bundles whose folder names no other.
const ISSUER: &str = "https://token.actions.githubusercontent.com";
const SUBJECT: &str = "https://github.com/sigstore-conformance/extremely-dangerous-public-oidc-beacon/.github/workflows/extremely-dangerous-oidc-beacon.yml@refs/heads/main";

fn file(path: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(path);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn bundle(name: &str) -> Value {
    serde_json::from_slice(&file(&format!("{name}/bundle.sigstore.json"))).expect("JSON")
}

fn root(json: &[u8]) -> TrustRoot {
    TrustRoot::parse(json, TransparencyLog::Required).expect("a trust root")
}

fn public_root() -> TrustRoot {
    root(PUBLIC_ROOT.as_bytes())
}

fn rekor2_root() -> TrustRoot {
    root(&file("rekor2-dsse/trusted_root.json"))
}

fn subject() -> Digest {
    Digest::of(&file("a.txt"))
}

/// Returns the reason that a bundle is not a valid statement about the subject.
fn reason(bundle: &Value, root: &TrustRoot) -> String {
    match SignatureBundle::parse(bundle.to_string().as_bytes()) {
        Ok(bundle) => bundle.verify_statement(subject(), root).expect_err("invalid").to_string(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn statements_in_both_kinds_of_logs_are_verified() {
    for (name, root, log_index) in
        [("rekor1-dsse", public_root(), 155_690_850), ("rekor2-dsse", rekor2_root(), 4_026_478)]
    {
        let bundle = SignatureBundle::parse(bundle(name).to_string().as_bytes()).expect("a bundle");
        let statement = bundle.statement().expect("a statement");
        assert!(statement.starts_with(b"{\"_type\":\"https://in-toto.io/Statement/v1\""));
        let signer = bundle.verify_statement(subject(), &root).expect("valid");
        assert_eq!(&signer.identity, bundle.claimed_identity());
        assert_eq!(signer.identity.issuer, ISSUER);
        assert_eq!(
            (signer.identity.subject.as_str(), signer.log_index),
            (SUBJECT, Some(log_index))
        );
        let other = bundle.verify_statement(Digest::of(b"another"), &root).expect_err("another");
        assert!(other.to_string().contains("artifact"), "{other}");
    }
}

#[test]
fn a_message_is_verified_by_itself() {
    let parsed = bundle("rekor1-message");
    let parsed = SignatureBundle::parse(parsed.to_string().as_bytes()).expect("a bundle");
    assert_eq!(parsed.statement(), None);
    let signer = parsed.verify_message(&file("a.txt"), &public_root()).expect("valid");
    assert_eq!(signer.identity.claims["sourceRepositoryRef"], "refs/heads/main");
    assert!(parsed.verify_message(b"another", &public_root()).is_err());
    // The message of an earlier verification does not count.
    assert!(parsed.verify_statement(subject(), &public_root()).is_err());
}

#[test]
fn the_attached_form_has_the_same_verdict() {
    let bundle = bundle("rekor1-message");
    let text = |pointer: &str| bundle.pointer(pointer).and_then(Value::as_str).expect("a text");
    let entry = |field: &str| text(&format!("/verificationMaterial/tlogEntries/0/{field}"));
    let number = |field: &str| entry(field).parse::<i64>().expect("a number");
    let certificate = format!(
        "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
        text("/verificationMaterial/certificate/rawBytes")
    );
    let log = STANDARD.decode(entry("logId/keyId")).expect("an id");
    let log = Digest::from_bytes(log.try_into().expect("32 bytes")).hex();
    let log_entry = json!({
        "SignedEntryTimestamp": entry("inclusionPromise/signedEntryTimestamp"),
        "Payload": {
            "body": entry("canonicalizedBody"), "integratedTime": number("integratedTime"),
            "logIndex": number("logIndex"), "logID": log,
        }
    });
    let verify = |log_entry: Option<&str>, message: &[u8]| {
        let signature = text("/messageSignature/signature");
        let attached =
            AttachedSignature { signature, certificate: &certificate, log_entry, timestamp: None };
        let attached = SignatureBundle::attached(attached).map_err(|error| error.to_string())?;
        attached.verify_message(message, &public_root()).map_err(|error| error.to_string())
    };
    let as_bundle = SignatureBundle::parse(bundle.to_string().as_bytes()).expect("a bundle");
    let expected = as_bundle.verify_message(&file("a.txt"), &public_root()).expect("valid");
    assert_eq!(verify(Some(&log_entry.to_string()), &file("a.txt")), Ok(expected));
    assert!(verify(Some(&log_entry.to_string()), b"another").is_err());
    assert!(verify(None, &file("a.txt")).expect_err("no log").contains("inclusion proof"));
    let mut later = log_entry.clone();
    later["Payload"]["integratedTime"] = json!(number("integratedTime") + 1);
    let error = verify(Some(&later.to_string()), &file("a.txt")).expect_err("another time");
    assert!(error.contains("SET"), "{error}");
    for broken in ["", "{}", "[]", "{\"SignedEntryTimestamp\":\"*\",\"Payload\":{}}"] {
        assert!(verify(Some(broken), &file("a.txt")).is_err());
    }
}

#[test]
fn changed_bundles_are_refused_with_their_reason() {
    let (first, second) = (public_root(), rekor2_root());
    let entry = "/verificationMaterial/tlogEntries/0";
    for (name, pointer, value, expected) in [
        ("rekor1-dsse", format!("{entry}/inclusionProof"), Value::Null, "inclusion proof"),
        ("rekor1-dsse", "/verificationMaterial/tlogEntries".into(), json!([]), "inclusion proof"),
        (
            "rekor1-dsse",
            format!("{entry}/inclusionProof/hashes/0"),
            json!("A".repeat(43) + "="),
            "inclusion proof",
        ),
        ("rekor1-dsse", format!("{entry}/inclusionProof/logIndex"), json!("1"), "inclusion proof"),
        ("rekor1-dsse", format!("{entry}/logIndex"), json!("-1"), "log"),
        (
            "rekor1-dsse",
            format!("{entry}/integratedTime"),
            json!("1734374577"),
            "inclusion promise",
        ),
        ("rekor1-dsse", format!("{entry}/canonicalizedBody"), json!("e30="), "inclusion"),
        ("rekor1-dsse", "/dsseEnvelope/signatures/0/sig".into(), json!("MAA="), "signature"),
        ("rekor1-dsse", "/dsseEnvelope/signatures".into(), json!([]), "exactly one signature"),
        ("rekor1-dsse", "/dsseEnvelope/payloadType".into(), json!("text/plain"), "payload type"),
        (
            "rekor1-dsse",
            "/mediaType".into(),
            json!("application/vnd.dev.sigstore.bundle.v9+json"),
            "media type",
        ),
        ("rekor2-dsse", format!("{entry}/inclusionProof"), Value::Null, "inclusion proof"),
        (
            "rekor2-dsse",
            "/verificationMaterial/timestampVerificationData".into(),
            Value::Null,
            "timestamp",
        ),
        ("rekor2-dsse", format!("{entry}/logIndex"), json!("1"), "inclusion proof"),
    ] {
        let root = if name == "rekor1-dsse" { &first } else { &second };
        let mut changed = bundle(name);
        *changed.pointer_mut(&pointer).unwrap_or_else(|| panic!("{pointer}")) = value;
        let reason = reason(&changed, root);
        assert!(reason.to_lowercase().contains(expected), "{name} {pointer}: {reason}");
    }
    // A bundle of another instance.
    assert!(reason(&bundle("rekor2-dsse"), &first).contains("timestamp"));
    let other = reason(&bundle("rekor1-dsse"), &second);
    assert!(other.contains("log"), "{other}");
}

#[test]
fn bundles_are_bounded_and_strict() {
    let text = bundle("rekor1-dsse").to_string();
    let refused = |json: &str| match SignatureBundle::parse(json.as_bytes()) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("{}", json.get(..200).unwrap_or(json)),
    };
    assert!(refused(&text.replacen('{', "{\"more\":1,", 1)).contains("\"more\" is not known"));
    let twice = text.replacen('{', "{\"dsseEnvelope\":null,", 1);
    assert!(refused(&twice).contains("\"dsseEnvelope\" is there twice"));
    assert!(refused(&" ".repeat(MAXIMUM_BUNDLE_BYTES + 1)).contains("bytes"));
    let many = |pointer: &str| {
        let mut changed = bundle("rekor1-dsse");
        let list = changed.pointer_mut(pointer).and_then(Value::as_array_mut).expect("a list");
        *list = vec![list[0].clone(); 9];
        refused(&changed.to_string())
    };
    assert!(many("/verificationMaterial/tlogEntries").contains("log entries"));
    let mut long = bundle("rekor1-dsse");
    let envelope = "/verificationMaterial/tlogEntries/0/inclusionProof/checkpoint/envelope";
    let checkpoint = long.pointer(envelope).and_then(Value::as_str).expect("a checkpoint");
    let line = checkpoint.lines().next_back().expect("a signature").to_owned() + "\n";
    let checkpoint = format!("{checkpoint}{}", line.repeat(200));
    *long.pointer_mut(envelope).expect("there") = json!(checkpoint);
    assert!(refused(&long.to_string()).contains("checkpoint"));
    for json in ["", "{}", "[]", "null", "{\"mediaType\":1}"] {
        refused(json);
    }
    let mut key = bundle("rekor1-dsse");
    let material = key["verificationMaterial"].as_object_mut().expect("an object");
    material.remove("certificate");
    material.insert("publicKey".to_owned(), json!({"hint": "x"}));
    assert_eq!(refused(&key.to_string()), BundleError::NoCertificate.to_string());
}

#[test]
fn broken_trust_roots_are_refused_with_their_reason() {
    let good: Value = serde_json::from_str(PUBLIC_ROOT).expect("JSON");
    let parse = |root: &Value, log| TrustRoot::parse(root.to_string().as_bytes(), log);
    let refused = |root: &Value, log| parse(root, log).expect_err("broken").to_string();
    let changed = |pointer: &str, value: Value| {
        let mut root = good.clone();
        *root.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer}")) = value;
        root
    };
    for (pointer, value, expected) in [
        ("/mediaType", json!("application/json"), "media type"),
        ("/certificateAuthorities", json!([]), "certificateAuthorities"),
        ("/tlogs", json!([]), "transparencyLog: None"),
        ("/tlogs/0/publicKey/rawBytes", json!("MAA="), "key"),
        ("/tlogs/0/logId/keyId", json!("MAA="), "hash"),
        (
            "/certificateAuthorities/0/certChain/certificates/0/rawBytes",
            json!("MAA="),
            "certificate",
        ),
        ("/certificateAuthorities/0/certChain/certificates", json!([]), "empty certificate chain"),
    ] {
        let reason = refused(&changed(pointer, value), TransparencyLog::Required);
        assert!(reason.contains(expected), "{pointer}: {reason}");
    }
    let without = changed("/timestampAuthorities", json!([]));
    assert!(refused(&without, TransparencyLog::None).contains("timestampAuthorities"));
    let parse =
        |json: &[u8]| TrustRoot::parse(json, TransparencyLog::Required).map(|root| root.id());
    let twice = PUBLIC_ROOT.replacen('{', "{\"tlogs\":[],", 1);
    assert!(parse(twice.as_bytes()).expect_err("twice").to_string().contains("there twice"));
    let large = usize::try_from(MAXIMUM_TRUST_ROOT_BYTES).expect("small") + 1;
    assert_eq!(parse(&vec![b' '; large]), Err(TrustRootError::Size));
    for json in [&b""[..], b"{}", b"\xff", b"[1]"] {
        assert!(parse(json).is_err());
    }
    // Fields of later versions are ignored.
    assert!(parse(PUBLIC_ROOT.replacen('{', "{\"later\":[],", 1).as_bytes()).is_ok());
}

#[test]
fn the_id_of_a_trust_root_depends_on_its_file_and_demands() {
    let id = |json: &str, log| TrustRoot::parse(json.as_bytes(), log).expect("valid").id();
    let one = id(PUBLIC_ROOT, TransparencyLog::Required);
    assert_eq!(one, public_root().id());
    assert_ne!(one, id(PUBLIC_ROOT, TransparencyLog::None));
    assert_ne!(one, id(&format!("{PUBLIC_ROOT} "), TransparencyLog::Required));
}

/// Verifies the bundles of a folder as sigstore-conformance describes them.
#[test]
fn vectors_are_verified_as_their_names_say() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let folder = std::env::var_os("SIGSTORE_VECTORS").map_or(own, PathBuf::from);
    let mut wrong = Vec::new();
    for entry in fs::read_dir(&folder).expect("a folder").flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        // Bundles of public keys are verified without Sigstore's proofs.
        if !path.is_dir() || path.join("key.pub").exists() || name.starts_with("managed-key") {
            continue;
        }
        let verified = verify_vector(&path);
        if verified.is_ok() == name.ends_with("_fail") {
            wrong.push(format!("{name}: {verified:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn verify_vector(folder: &Path) -> Result<(), String> {
    let read = |name: &str| fs::read(folder.join(name)).ok();
    let json = read("trusted_root.json").unwrap_or_else(|| PUBLIC_ROOT.as_bytes().to_vec());
    let root =
        TrustRoot::parse(&json, TransparencyLog::Required).map_err(|error| error.to_string())?;
    let artifact = read("artifact").unwrap_or_else(|| file("a.txt"));
    let bundle = read("bundle.sigstore.json").expect("a bundle");
    let bundle = SignatureBundle::parse(&bundle).map_err(|error| error.to_string())?;
    let verified = match bundle.statement() {
        Some(_) => bundle.verify_statement(Digest::of(&artifact), &root),
        None => bundle.verify_message(&artifact, &root),
    };
    let signer = verified.map_err(|error| error.to_string())?;
    let exact = |name: &str, default: &str| {
        let text = read(name).unwrap_or_else(|| default.into());
        TextPattern::parse(name, Some(String::from_utf8_lossy(&text).trim()), None)
    };
    let (issuer, subject) = (exact("issuer", ISSUER)?, exact("identity", SUBJECT)?);
    IdentityPattern::new(issuer, subject, BTreeMap::new())?.check(&signer.identity)?;
    Ok(())
}
