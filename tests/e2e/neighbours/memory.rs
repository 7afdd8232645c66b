//! Artifacts that are small on the wire and large in memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;
use tonic::Code;

use super::{HonestPods, hostile_volume};
use crate::support::{
    FakeRegistry, Node, OCI_CONFIG, OCI_MANIFEST, OCI_TAR_GZIP, Tar, Volume, digest, gzip,
    wait_until,
};

/// What the driver may have, of memory that no file is behind: half of the chart's limit.
const MOST: u64 = 256 << 20;

/// The largest `RssAnon` of a process while this is there.
struct Peak {
    bytes: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
}

impl Peak {
    fn of(process: u32) -> Self {
        let peak = Self { bytes: Arc::default(), is_over: Arc::default() };
        let (bytes, is_over) = (Arc::clone(&peak.bytes), Arc::clone(&peak.is_over));
        std::thread::spawn(move || {
            while !is_over.load(Ordering::SeqCst) {
                bytes.fetch_max(anonymous_bytes(process), Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        peak
    }

    fn so_far(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }
}

impl Drop for Peak {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
    }
}

fn anonymous_bytes(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kibibytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
    kibibytes.unwrap_or(0_u64) * 1024
}

/// An image of one layer.
fn put_image(registry: &FakeRegistry, tag: &str, layer: &[u8]) {
    let config = br#"{"architecture":"amd64","os":"linux"}"#;
    let descriptor = |kind: &str, bytes: &[u8]| json!({"mediaType": kind, "digest": registry.put_blob(bytes.to_vec()), "size": bytes.len()});
    registry.put_json(
        tag,
        &json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor(OCI_CONFIG, config),
            "layers": [descriptor(OCI_TAR_GZIP, layer)],
        }),
    );
}

/// Publishes all at once, and asks again as the kubelet does. Returns the outcomes.
fn publish_all(node: &Node, volumes: &[Volume]) -> Vec<Result<(), tonic::Status>> {
    std::thread::scope(|scope| {
        let publishes: Vec<_> = volumes
            .iter()
            .map(|volume| {
                scope.spawn(|| {
                    node.kubelet.prepare(volume);
                    loop {
                        match node.kubelet.publish_request(volume.request.clone()) {
                            Err(status) if status.code() == Code::Aborted => {}
                            done => return done,
                        }
                    }
                })
            })
            .collect();
        publishes.into_iter().map(|publish| publish.join().expect("an outcome")).collect()
    })
}

#[test]
fn a_manifest_of_annotations_takes_no_memory_while_its_layer_trickles() {
    const VOLUMES: usize = 16;
    let node = Node::start();
    let honest = HonestPods::new(&node);
    let registry = FakeRegistry::new();
    let layer = b"a layer that never comes".to_vec();
    let blob = digest(&layer);
    // Ten or eleven bytes for each: most of the 4 MiB that a manifest may have.
    let annotations: Vec<_> = (0..380_000).map(|n| format!(r#""{n:x}":"""#)).collect();
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","artifactType":"a/b","config":{{"mediaType":"application/vnd.oci.empty.v1+json","digest":"{}","size":2}},"layers":[{{"mediaType":"a/b","digest":"{blob}","size":{},"annotations":{{"org.opencontainers.image.title":"file",{}}}}}]}}"#,
        registry.put_blob("{}"),
        layer.len(),
        annotations.join(","),
    );
    assert!(manifest.len() <= 4 << 20, "{} bytes", manifest.len());
    registry.put_manifest("v1", OCI_MANIFEST, manifest);
    let (is_over, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let (over, was_asked) = (Arc::clone(&is_over), Arc::clone(&asked));
    registry.script(move |request| {
        if request.path.contains(&blob) {
            was_asked.fetch_add(1, Ordering::SeqCst);
            while !over.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        None
    });
    let peak = Peak::of(node.driver.id());
    std::thread::scope(|scope| {
        let attacks: Vec<_> = (0..VOLUMES)
            .map(|number| {
                let volume = hostile_volume(&node, &registry.reference("v1"))
                    .attribute("exclude", &format!("other{number}"));
                let kubelet = &node.kubelet;
                scope.spawn(move || kubelet.publish_within(&volume, Duration::from_secs(30)))
            })
            .collect();
        wait_until("the layer is waited for", || asked.load(Ordering::SeqCst) > 0);
        honest.are_served_while(|| attacks.iter().all(|attack| !attack.is_finished()));
        for attack in attacks {
            // All wait for the layer by now, and go on doing so for a minute.
            let status = attack.join().expect("an outcome").expect_err("it never comes");
            assert_eq!(status.code(), Code::Aborted, "{status}");
        }
        is_over.store(true, Ordering::SeqCst);
    });
    assert!(peak.so_far() < MOST, "{} MiB", peak.so_far() >> 20);
}

#[test]
fn long_targets_of_symbolic_links_are_not_held_in_memory() {
    const LINKS: usize = 30_000;
    let node = Node::start();
    let honest = HonestPods::new(&node);
    let registry = FakeRegistry::new();
    let target = "t/".repeat(2000);
    let tar = (0..LINKS).fold(Tar::new().file("kept", 0o644, "content"), |tar, number| {
        tar.symbolic_link(&format!("links/{number}"), &target)
    });
    put_image(&registry, "v1", &gzip(&tar.finish()));
    let peak = Peak::of(node.driver.id());
    let volumes: Vec<_> = (0..8)
        .map(|number| {
            hostile_volume(&node, &registry.reference("v1"))
                .attribute("exclude", &format!("links,other{number}"))
        })
        .collect();
    std::thread::scope(|scope| {
        let attack = scope.spawn(|| publish_all(&node, &volumes));
        honest.are_served_while(|| !attack.is_finished());
        for outcome in attack.join().expect("an outcome") {
            outcome.expect("published");
        }
    });
    for volume in &volumes {
        assert_eq!(volume.text("kept"), "content");
        node.kubelet.unpublish(volume);
    }
    assert!(peak.so_far() < MOST / 2, "{} MiB", peak.so_far() >> 20);
}

#[test]
fn trees_beyond_the_budget_are_refused_and_those_within_it_are_built_in_turn() {
    // Half of it is fixed, and 5.6 MiB are for one artifact.
    let node = Node::start_configured(|_| (), "pull: {memory: 16Mi, unpacks: 1}\n");
    let honest = HonestPods::new(&node);
    let registry = FakeRegistry::new();
    let put = |tag: &str, files: usize| {
        let tar = (0..files).fold(Tar::new(), |tar, n| tar.file(&format!("f/{n}"), 0o644, ""));
        put_image(&registry, tag, &gzip(&tar.finish()));
    };
    put("fits", 30_000);
    put("never", 60_000);
    let fitting: Vec<_> = (0..4)
        .map(|number| {
            hostile_volume(&node, &registry.reference("fits"))
                .attribute("include", &format!("f/{number},f/2999?"))
        })
        .collect();
    let never = [hostile_volume(&node, &registry.reference("never"))];
    std::thread::scope(|scope| {
        let attack = scope.spawn(|| publish_all(&node, &fitting));
        honest.are_served_while(|| !attack.is_finished());
        for outcome in attack.join().expect("an outcome") {
            outcome.expect("published");
        }
    });
    for (number, volume) in fitting.iter().enumerate() {
        assert_eq!(volume.text(&format!("f/{number}")), "");
        assert!(!volume.target().join("f/11").exists());
        node.kubelet.unpublish(volume);
    }
    let refused = publish_all(&node, &never).remove(0).expect_err("refused");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let text = refused.message();
    assert!(text.contains("MiB of memory") && text.contains("pull.memory"), "{text}");
    never[0].assert_nothing_left();
}
