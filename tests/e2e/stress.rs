//! Tests pods, pulls and evictions at once, on a node that has space for a part of the artifacts.

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use serde_json::json;
use tonic::Code;

use crate::support::{
    Admin, Image, Layer, Manifest, Node, OCI_TAR_GZIP, Tar, Volume, gzip, noise, registry, unique,
    wait_until,
};

/// A quota for about half of the artifacts.
const TIGHT: &str = "cache: {maxBytes: 8Mi, minFreePercent: 0, minFreeInodesPercent: 0, \
                     highThresholdPercent: 100, lowThresholdPercent: 100, minimumAge: 0s}\n";
const WORKERS: usize = 4;
/// The number of volumes that each worker has mounted at a time.
const SHOWN: usize = 3;
const ROUNDS: usize = 60;

/// An artifact, and the content that it must show as long as it is mounted.
struct ExpectedArtifact {
    reference: String,
    files: Vec<(String, Vec<u8>)>,
}

impl ExpectedArtifact {
    #[track_caller]
    fn check(&self, target: &Path) {
        for (name, content) in &self.files {
            let read = fs::read(target.join(name));
            let read = read.unwrap_or_else(|error| panic!("{name} of a shown volume: {error}"));
            assert!(read == *content, "{name} of a shown volume is not what was pushed");
        }
    }
}

/// Pushes pairs of files that share a layer, and images that share one as well.
fn artifacts(node: &Node) -> Vec<ExpectedArtifact> {
    let mut artifacts = Vec::new();
    for pair in 0..3u64 {
        let shared = noise(1 << 20, 40 + pair);
        for half in 0..2u64 {
            let (own, repository) = (noise(1 << 20, 50 + 2 * pair + half), unique("stress"));
            Manifest::artifact([
                Layer::titled("shared", shared.clone()),
                Layer::titled("own", own.clone()),
            ])
            .push(registry(), &repository, "v1");
            let files = vec![("shared".to_owned(), shared.clone()), ("own".to_owned(), own)];
            let reference = node.proxy.reference(&format!("{repository}:v1"));
            artifacts.push(ExpectedArtifact { reference, files });
        }
    }
    let base = Tar::new().file("etc/base", 0o644, noise(500_000, 61)).finish();
    for number in 0..2u64 {
        let mut upper = Tar::new();
        let mut files = vec![("etc/base".to_owned(), noise(500_000, 61))];
        for file in 0..30u64 {
            let (name, content) = (format!("srv/{file}"), noise(10_000, 100 * number + file));
            upper = upper.file(&name, 0o644, &content);
            files.push((name, content));
        }
        let (upper, repository) = (upper.finish(), unique("stress"));
        Image::new()
            .packed_layer(OCI_TAR_GZIP, gzip(&base), &base)
            .packed_layer(OCI_TAR_GZIP, gzip(&upper), &upper)
            .push(registry(), &repository, "v1");
        let reference = node.proxy.reference(&format!("{repository}:v1"));
        artifacts.push(ExpectedArtifact { reference, files });
    }
    artifacts
}

/// Publishes, checks the content, and unpublishes the oldest. Returns the number of publishes.
fn work(node: &Node, artifacts: &[ExpectedArtifact], worker: usize) -> usize {
    let mut shown: Vec<(Volume, &ExpectedArtifact)> = Vec::new();
    let mut published = 0;
    for round in 0..ROUNDS {
        let artifact = &artifacts[(worker * 5 + round * 3) % artifacts.len()];
        let volume = node.kubelet.new_volume(&artifact.reference);
        match node.kubelet.publish(&volume) {
            Ok(()) => {
                published += 1;
                shown.push((volume, artifact));
            }
            Err(status) => {
                // All content is mounted, leased or reserved at that moment: the kubelet calls again.
                let code = status.code();
                assert_eq!(code, Code::ResourceExhausted, "{}", status.message());
                node.kubelet.unpublish(&volume);
            }
        }
        for (volume, artifact) in &shown {
            artifact.check(volume.target());
        }
        if shown.len() >= SHOWN {
            let (volume, _) = shown.remove(0);
            node.kubelet.unpublish(&volume);
        }
    }
    for (volume, artifact) in shown {
        artifact.check(volume.target());
        node.kubelet.unpublish(&volume);
    }
    published
}

#[test]
fn what_is_shown_stays_while_everything_else_comes_and_goes() {
    let (node, admin) = Admin::start(TIGHT);
    let artifacts = artifacts(&node);
    let (ended, collected) = (AtomicBool::new(false), AtomicUsize::new(0));
    let published: usize = std::thread::scope(|scope| {
        let (node, admin, artifacts) = (&node, &admin, &artifacts);
        let (ended, collected) = (&ended, &collected);
        // Evicts all unused content, all the time.
        let collector = scope.spawn(move || {
            while !ended.load(Ordering::SeqCst) {
                admin.text(&["gc", "--target", "0"]);
                collected.fetch_add(1, Ordering::SeqCst);
            }
        });
        let workers: Vec<_> =
            (0..WORKERS).map(|worker| scope.spawn(move || work(node, artifacts, worker))).collect();
        let worked: Vec<_> = workers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        ended.store(true, Ordering::SeqCst);
        collector.join().expect("the collector");
        worked.into_iter().map(|worked| worked.expect("a worker")).sum()
    });
    assert!(published > WORKERS * ROUNDS / 2, "only {published} volumes were published");
    assert!(collected.load(Ordering::SeqCst) > 3, "nothing was evicted beside the publishes");
    assert!(admin.json(&["status"])["evictedBytes"].as_u64() > Some(8 << 20));
    wait_until("no record is left", || admin.json(&["status"])["published"] == 0);
    assert_eq!(admin.json(&["verify"])["findings"], json!([]));
    admin.text(&["gc", "--target", "0"]);
    let status = admin.json(&["status"]);
    assert_eq!((&status["cacheObjects"], &status["cacheBytes"]), (&json!(0), &json!(0)));
    for folder in ["files", "layers", "trees", "staging", "partial", "publications"] {
        let left = fs::read_dir(node.driver.state().join(folder)).expect("a folder").count();
        assert_eq!(left, 0, "{folder} leaks");
    }
}
