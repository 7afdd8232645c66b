//! Text to a reference: what is accepted means the same when written and read again.

use oci::Reference;

/// Runs one input.
pub(super) fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(reference) = text.parse::<Reference>() {
        let again: Reference = reference.to_string().parse().expect("what was written");
        assert_eq!(again.repository(), reference.repository());
        assert_eq!(again.digest(), reference.digest());
        assert_eq!(again.tag_or_latest(), reference.tag_or_latest());
        assert!(!reference.repository().path().split('/').any(|name| name == ".."));
    }
}
