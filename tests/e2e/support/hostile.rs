//! Artifacts that are small on the wire and large in memory.

use super::{FakeRegistry, OCI_MANIFEST, Tar, digest};

/// Puts an artifact of one file into the registry, whose manifest has nearly the 4 MiB that it may have by default:
/// 380,000 annotations of the layer, of ten or eleven bytes each. Returns the layer's digest.
#[track_caller]
pub fn put_annotated(registry: &FakeRegistry, tag: &str, layer: &[u8]) -> String {
    let blob = digest(layer);
    let annotations: Vec<_> = (0..380_000).map(|n| format!(r#""{n:x}":"""#)).collect();
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","artifactType":"a/b","config":{{"mediaType":"application/vnd.oci.empty.v1+json","digest":"{}","size":2}},"layers":[{{"mediaType":"a/b","digest":"{blob}","size":{},"annotations":{{"org.opencontainers.image.title":"file",{}}}}}]}}"#,
        registry.put_blob("{}"),
        layer.len(),
        annotations.join(","),
    );
    assert!(manifest.len() <= 4 << 20, "{} bytes", manifest.len());
    registry.put_manifest(tag, OCI_MANIFEST, manifest);
    blob
}

/// An archive of empty files: `f/0`, `f/1`, ...
pub fn empty_files(count: usize) -> Tar {
    (0..count).fold(Tar::new(), |tar, number| tar.file(&format!("f/{number}"), 0o644, ""))
}

/// Adds symbolic links with targets of 4,000 bytes: `l/0`, `l/1`, ...
pub fn with_long_links(archive: Tar, count: usize) -> Tar {
    let target = "t/".repeat(2000);
    (0..count).fold(archive, |tar, number| tar.symbolic_link(&format!("l/{number}"), &target))
}
