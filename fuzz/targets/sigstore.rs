//! Keyless signatures and trust roots: no panic, and nothing counts that no log and no authority vouches for.

use oci::Digest;
use sigstore::{AttachedSignature, SignatureBundle, TransparencyLog, TrustRoot};

const ROOT: &[u8] = include_bytes!("../seeds/sigstore/trusted_root");

/// Runs one input: a bundle, a trust root, or the lines of cosign's older form.
pub(super) fn run(input: &[u8]) {
    let _ = TrustRoot::parse(input, TransparencyLog::Required);
    let _ = sigstore::memory::of_bundle(input);
    let _ = sigstore::trust_update::SeenMetadata::parse(input, "https://tuf.example/");
    let root = TrustRoot::parse(ROOT, TransparencyLog::None).expect("a trust root");
    if let Ok(bundle) = SignatureBundle::parse(input) {
        assert!(bundle.verify_statement(Digest::of(input), &root).is_err());
        assert!(bundle.verify_message(input, &root).is_err());
    }
    let Ok(text) = std::str::from_utf8(input) else { return };
    let mut parts = text.split('\n');
    let mut part = || parts.next();
    let (signature, log_entry, timestamp) = (part().unwrap_or_default(), part(), part());
    let certificate = parts.collect::<Vec<_>>().join("\n");
    let attached = AttachedSignature { signature, certificate: &certificate, log_entry, timestamp };
    if let Ok(bundle) = SignatureBundle::attached(attached) {
        assert!(bundle.verify_message(input, &root).is_err());
    }
}
