//! Signatures and keys: no panic, and nothing counts that the key has not signed.

use oci::Digest;
use oci::signature::{
    Bundle, FoundSignature, NamedKey, PublicKey, SignatureDemand, SignatureVerification, Signers,
    SimpleSignature,
};

const KEY: &[u8] = b"-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=
-----END PUBLIC KEY-----
";

/// Runs one input.
pub(super) fn run(input: &[u8]) {
    let at = input.iter().rposition(|byte| *byte == b'\n').unwrap_or(input.len());
    let (bytes, signature) = input.split_at(at);
    let Ok(signature) = std::str::from_utf8(signature) else { return };
    let _ = PublicKey::from_pem(bytes);
    let key = PublicKey::from_pem(KEY).expect("a key");
    let keys = [NamedKey { name: "key".to_owned(), key }].into();
    let demand = SignatureDemand::signed_by(Signers { keys, ..Signers::default() });
    let simple = SimpleSignature {
        payload: bytes.to_vec().into(),
        signature: signature.to_owned(),
        ..SimpleSignature::default()
    };
    let bundle = Bundle { json: bytes.to_vec().into(), document: Some(bytes.to_vec().into()) };
    let mut verification = SignatureVerification::new(demand, vec![Digest::of(bytes)]);
    verification.add(&FoundSignature::Bundle(bundle));
    verification.add(&FoundSignature::Simple(simple));
    assert!(verification.finish().is_err());
}
