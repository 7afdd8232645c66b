//! The attribute `artifacts`: a list that is accepted has one meaning however it is spelled, its folders
//! lie beside each other, and errors are bounded.

use std::collections::HashMap;

use csi_driver_oci::volume::volume_attributes::VolumeAttributes;
use sys::mount::MountFlags;

/// Runs one input.
pub(super) fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let parse = |text: &str| {
        VolumeAttributes::parse(&HashMap::from([("artifacts".to_owned(), text.to_owned())]))
    };
    let attributes = match parse(text) {
        Ok(attributes) => attributes,
        Err(error) => {
            assert!(error.to_string().len() < 4096);
            return;
        }
    };
    let artifacts = &attributes.artifacts;
    assert!(attributes.is_list && (1..=32).contains(&artifacts.len()));
    let mut spelled = Vec::new();
    for (number, artifact) in artifacts.iter().enumerate() {
        assert!(artifact.path.components().all(|name| name != b".."));
        let own = |path: &unpack::RelativePath| !path.is_root() && path.is_within(&artifact.path);
        let mut others = artifacts[number + 1..].iter().map(|other| &other.path);
        assert!(artifact.path.is_root() || !others.any(own));
        let (include, exclude) = artifact.shape.selection.attributes();
        let path = String::from_utf8_lossy(artifact.path.as_bytes()).into_owned();
        let (reference, strip) = (artifact.reference.to_string(), artifact.shape.sub_path_text());
        let fields = [
            ("reference", reference),
            ("path", path),
            ("include", include),
            ("exclude", exclude),
            ("strip", strip),
        ];
        let is_plain = |text: &str| text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        if !fields.iter().all(|(_, value)| is_plain(value)) {
            return;
        }
        let quoted = fields.map(|(key, value)| format!("{key}: '{}'", value.replace('\'', "''")));
        spelled.push(format!("- {{{}}}\n", quoted.join(", ")));
    }
    let (spelled, flags) = (spelled.concat(), MountFlags::default());
    if spelled.len() > 64 << 10 {
        return;
    }
    let again = parse(&spelled).expect("another spelling");
    assert_eq!(again.fingerprint(flags), attributes.fingerprint(flags), "{spelled}");
}
