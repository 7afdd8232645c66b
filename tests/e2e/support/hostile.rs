//! Artifacts and registries of hostile neighbours, for the tests and the benches.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use serde_json::{Value, json};

use super::{
    Answer, AnswerBody, FakeRegistry, Gate, Layer, Manifest, OCI_MANIFEST, Tar, digest, noise,
};

const TITLE: &str = "org.opencontainers.image.title";
/// The default limit on layers of an artifact.
pub const LAYERS: usize = 10_000;
/// The default limit on a manifest's bytes.
pub const MANIFEST_BYTES: usize = 4 << 20;
/// Partial downloads in a state directory, spread over several registries so that no limit of one of them applies.
const BROKEN_DOWNLOADS: usize = 3900;

/// Puts an artifact of one file, whose manifest has nearly [`MANIFEST_BYTES`]: 380,000 annotations of the layer, of
/// ten or eleven bytes each. Returns the gate that holds back the layer.
#[track_caller]
pub fn put_annotated_and_held_back(
    registry: &FakeRegistry,
    tag: &str,
    layer: &'static [u8],
) -> Arc<Gate> {
    let blob = digest(layer);
    let annotations: Vec<_> = (0..380_000).map(|n| format!(r#""{n:x}":"""#)).collect();
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","artifactType":"a/b","config":{{"mediaType":"application/vnd.oci.empty.v1+json","digest":"{}","size":2}},"layers":[{{"mediaType":"a/b","digest":"{blob}","size":{},"annotations":{{"org.opencontainers.image.title":"file",{}}}}}]}}"#,
        registry.put_blob("{}"),
        layer.len(),
        annotations.join(","),
    );
    assert!(manifest.len() <= MANIFEST_BYTES, "{} bytes", manifest.len());
    registry.put_manifest(tag, OCI_MANIFEST, manifest);
    let gate = Gate::new();
    let held = Arc::clone(&gate);
    registry.script(move |request| {
        let body = AnswerBody::Gated { bytes: layer.into(), gate: Arc::clone(&held) };
        request.path.contains(&blob).then(|| Answer::body(body))
    });
    gate
}

/// Returns an archive of empty files: `f/0`, `f/1`, ...
pub fn empty_files(count: usize) -> Tar {
    (0..count).fold(Tar::new(), |tar, number| tar.file(&format!("f/{number}"), 0o644, ""))
}

/// Adds symbolic links with targets of 4,000 bytes: `l/0`, `l/1`, ...
pub fn with_long_links(archive: Tar, count: usize) -> Tar {
    let target = "t/".repeat(2000);
    (0..count).fold(archive, |tar, number| tar.symbolic_link(&format!("l/{number}"), &target))
}

/// Puts artifacts `v0`, `v1`, ... of [`LAYERS`] files each, which the registry announces and never sends.
pub fn put_files_never_sent(registry: &FakeRegistry, artifacts: usize) {
    registry.script(|request| {
        let body = AnswerBody::Stalled { announced: 100, bytes: "".into() };
        request.path.contains("/blobs/").then(|| Answer::body(body))
    });
    for number in 0..artifacts {
        let layers = (0..LAYERS).map(|layer| layer_never_pushed(&format!("{number}-{layer}")));
        registry.put_json(&format!("v{number}"), &manifest_of(layers.collect()));
    }
}

/// Puts an artifact whose manifest has nearly [`MANIFEST_BYTES`], and whose one layer does not exist.
pub fn put_large_manifest_without_layer(registry: &FakeRegistry, tag: &str, content: &str) {
    let mut manifest = manifest_of(vec![layer_never_pushed(content)]);
    manifest["padding"] = "x".repeat(MANIFEST_BYTES - 1000).into();
    registry.put_json(tag, &manifest);
}

/// Creates partial downloads in a state directory that no driver uses yet.
pub fn leave_broken_downloads(state: &Path) {
    let partial = state.join("partial");
    std::fs::create_dir_all(&partial).expect("a folder");
    for number in 0..BROKEN_DOWNLOADS {
        let name = digest(number.to_string().as_bytes()).replace("sha256:", "");
        let registry = number % 20;
        std::fs::write(partial.join(format!("{name}-{registry:016x}")), "half").expect("a file");
    }
}

/// Puts artifacts `v0` and `v1` of four files each, which the registry sends at 2 KiB/s from the first byte on, whatever
/// range is asked for. Four layers of an artifact are fetched at once, so that each takes four connections.
pub fn put_trickling(registry: &FakeRegistry, seed: u64) {
    let contents: Vec<_> = (0..8).map(|layer| noise(1 << 20, seed * 8 + layer)).collect();
    for (part, contents) in contents.chunks(4).enumerate() {
        let file = |(layer, content): (usize, &Vec<u8>)| {
            Layer::titled(&format!("file{layer}"), content.clone())
        };
        let manifest = Manifest::artifact(contents.iter().enumerate().map(file));
        manifest.push(registry, "hostile", &format!("v{part}"));
    }
    let blobs: Vec<_> =
        contents.into_iter().map(|content| (digest(&content), Bytes::from(content))).collect();
    registry.script(move |request| {
        let (_, content) = blobs.iter().find(|(blob, _)| request.path.ends_with(blob))?;
        Some(trickle(content.clone()))
    });
}

/// Returns an answer whose body is sent at 2 KiB/s.
pub fn trickle(bytes: impl Into<Bytes>) -> Answer {
    let bytes = bytes.into();
    let (piece, pause) = (1024, Duration::from_millis(500));
    Answer::body(AnswerBody::Slow { announced: bytes.len() as u64, bytes, piece, pause })
}

fn layer_never_pushed(content: &str) -> Value {
    json!({
        "mediaType": "application/vnd.test.file.v1",
        "digest": digest(content.as_bytes()),
        "size": 100,
        "annotations": {TITLE: content},
    })
}

fn manifest_of(layers: Vec<Value>) -> Value {
    json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": "application/vnd.test.artifact.v1",
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest(b"{}"), "size": 2},
        "layers": layers,
    })
}
