//! Tests registries that are slow, ignore ranges or limit rates: each affects its own tenant only.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::Bytes;
use nix::mount::{MsFlags, mount};
use tonic::{Code, Status};

use super::{HonestPods, all_go_on, hostile_volume, publish_each, volume_of};
use crate::support::hostile::{put_trickling, trickle};
use crate::support::{
    Answer, AnswerBody, FakeRegistry, Gate, Layer, Manifest, Node, OCI_MANIFEST, Request, digest,
    noise, wait_until,
};

/// Returns the start of the requested range of a blob.
fn first_byte(request: &Request) -> Option<usize> {
    request.header("range")?.strip_prefix("bytes=")?.split('-').next()?.parse().ok()
}

/// Returns the rest of a blob from the requested byte on, as a registry that supports ranges sends it.
fn rest(request: &Request, content: &[u8]) -> Answer {
    let Some(start) = first_byte(request) else { return Answer::bytes(content.to_vec()) };
    let last = content.len() - 1;
    Answer::bytes(content[start..].to_vec())
        .with_status(206)
        .with_header("content-range", &format!("bytes {start}-{last}/{}", content.len()))
}

#[test]
fn a_rate_limit_of_one_repository_stops_no_other_of_the_host() {
    let node = Node::start();
    let registry = FakeRegistry::new();
    let manifest = Manifest::artifact([Layer::titled("file", "content")]);
    manifest.push(&registry, "hostile", "v1");
    registry.script(|request| {
        let is_limited = request.path.starts_with("/v2/limited/");
        is_limited.then(|| Answer::status(429).with_header("retry-after", "600"))
    });
    let limited = registry.reference("v1").replace("/hostile:", "/limited:");
    let message = node.kubelet.publish_badly(&hostile_volume(&node, &limited), Code::Unavailable);
    assert!(message.contains("429") && message.contains("limited"), "{message}");
    let (honest, _) = node.mount(&registry.reference("v1"));
    assert_eq!(honest.text("file"), "content");
    // Still rate-limited, and the message does not name the other repository.
    let message = node.kubelet.publish_badly(&hostile_volume(&node, &limited), Code::Unavailable);
    assert!(message.contains("429") && !message.contains("/hostile"), "{message}");
    node.kubelet.unpublish(&honest);
}

/// Registries that ignore ranges and trickle hold connections that cannot be continued elsewhere.
fn trickling_registries_leave_connections(namespaces: &[&str]) {
    let node = Node::start();
    let honest = HonestPods::new(&node);
    let registries = [FakeRegistry::new(), FakeRegistry::new()];
    let mut volumes = Vec::new();
    for (number, registry) in registries.iter().enumerate() {
        put_trickling(registry, number as u64);
        for part in 0..2 {
            let namespace = namespaces[volumes.len() % namespaces.len()];
            volumes.push(volume_of(&node, namespace, &registry.reference(&format!("v{part}"))));
        }
    }
    let asked = || {
        let requests = registries.iter().flat_map(FakeRegistry::requests);
        requests.filter(|request| request.path.contains("/blobs/")).count()
    };
    std::thread::scope(|scope| {
        let attacks = publish_each(scope, &node, &volumes);
        // All connections that one namespace may have, or nearly all that there are.
        wait_until("the attack holds its connections", || asked() >= 12);
        for _ in 0..3 {
            honest.are_served_while(|| all_go_on(&attacks));
        }
        node.driver.terminate_hard();
        for attack in attacks {
            assert!(attack.join().expect("the call").is_err());
        }
    });
}

#[test]
fn registries_that_ignore_ranges_and_trickle_leave_connections_to_other_namespaces() {
    trickling_registries_leave_connections(&["hostile"]);
}

#[test]
fn namespaces_that_hold_all_connections_give_way_to_another() {
    trickling_registries_leave_connections(&["hostile", "second", "third", "fourth"]);
}

/// One blob in two repositories of a host; requests in the repository `slow` get it slowly.
struct PublicBlob {
    node: Node,
    registry: FakeRegistry,
    content: Vec<u8>,
    /// Set once the slow repository breaks all of its connections.
    is_over: Arc<AtomicBool>,
}

impl PublicBlob {
    fn new(slow: impl Fn(&Request, &[u8]) -> Answer + Send + Sync + 'static) -> Self {
        let (node, registry, content) = (Node::start(), FakeRegistry::new(), noise(4 << 20, 50));
        Manifest::artifact([Layer::titled("file", content.clone())])
            .push(&registry, "hostile", "v1");
        let is_over = Arc::new(AtomicBool::new(false));
        let (blob, served, over) = (digest(&content), content.clone(), Arc::clone(&is_over));
        registry.script(move |request| {
            if !request.path.ends_with(&blob) {
                return None;
            }
            if !request.path.starts_with("/v2/slow/") {
                return Some(rest(request, &served));
            }
            let is_over = over.load(Ordering::SeqCst);
            Some(if is_over { Answer::status(500) } else { slow(request, &served) })
        });
        Self { node, registry, content, is_over }
    }

    fn slow_reference(&self) -> String {
        self.registry.reference("v1").replace("/hostile:", "/slow:")
    }

    /// Returns the requests for the blob in a repository.
    fn asked(&self, repository: &str) -> Vec<Request> {
        let path = format!("/v2/{repository}/blobs/{}", digest(&self.content));
        self.registry.requests().into_iter().filter(|request| request.path == path).collect()
    }

    /// The pod of the healthy repository gets the blob while the other pod still waits. Returns the other pod's
    /// outcome.
    fn is_had_elsewhere_while_one_waits(&self) -> Result<(), Status> {
        std::thread::scope(|scope| {
            let volume = hostile_volume(&self.node, &self.slow_reference());
            let calls = publish_each(scope, &self.node, &[volume]);
            wait_until("the slow repository is asked first", || !self.asked("slow").is_empty());
            let (honest, _) = self.node.mount(&self.registry.reference("v1"));
            let file = std::fs::read(honest.target().join("file")).expect("the file");
            assert!(file == self.content, "other content than was pushed");
            self.node.kubelet.unpublish(&honest);
            self.is_over.store(true, Ordering::SeqCst);
            let slow = calls.into_iter().next().expect("a call");
            slow.join().expect("the call")
        })
    }
}

#[test]
fn a_slow_repository_loses_a_blob_to_a_faster_one_of_its_host() {
    let slow = |request: &Request, content: &[u8]| {
        let whole = rest(request, content);
        let AnswerBody::Whole(bytes) = whole.body else { return whole };
        let (announced, first) = (bytes.len() as u64, bytes.slice(..(1 << 20).min(bytes.len())));
        // A megabyte at once, and then nothing.
        Answer { body: AnswerBody::Stalled { announced, bytes: first }, ..whole }
    };
    let blob = PublicBlob::new(slow);
    let _ = blob.is_had_elsewhere_while_one_waits();
    let asked = blob.asked("hostile");
    let ranges: Vec<_> = asked.iter().map(first_byte).collect();
    assert!(
        ranges.contains(&Some(1 << 20)),
        "what the slow one has sent is not fetched again: {ranges:?}"
    );
}

#[test]
fn a_repository_that_trickles_keeps_a_public_blob_from_no_one() {
    let blob = PublicBlob::new(|_, content| trickle(content.to_vec()));
    let _ = blob.is_had_elsewhere_while_one_waits();
    // A registry on another host that knows nothing of the first.
    let other = FakeRegistry::new();
    Manifest::artifact([Layer::titled("file", blob.content.clone())]).push(&other, "hostile", "v1");
    let (elsewhere, _) = blob.node.mount(&other.reference("v1"));
    blob.node.kubelet.unpublish(&elsewhere);
}

#[test]
fn garbage_before_a_stall_is_no_failure_of_the_source_that_goes_on() {
    let blob = PublicBlob::new(|_, content| {
        let (announced, bytes) = (content.len() as u64, Bytes::from(noise(100_000, 51)));
        Answer::body(AnswerBody::Stalled { announced, bytes })
    });
    let of_garbage = blob.is_had_elsewhere_while_one_waits();
    let asked = blob.asked("hostile");
    let ranges: Vec<_> = asked.iter().map(first_byte).collect();
    let continued = ranges.iter().position(|range| *range == Some(100_000));
    let continued = continued.expect("it goes on behind the garbage");
    assert!(ranges[continued..].contains(&None), "and then fetches all by itself: {ranges:?}");
    // Not all of the wrong bytes came from this registry.
    let code = of_garbage.err().map(|status| status.code());
    assert_ne!(code, Some(Code::Internal));
}

#[test]
fn a_registry_that_is_asked_again_for_a_manifest_keeps_no_other_from_the_same_tree() {
    let node = Node::start();
    let [hostile, honest] = [FakeRegistry::new(), FakeRegistry::new()];
    let layer = Layer::titled("file", "content");
    let manifest = Manifest::artifact([layer.clone()]);
    let pushed = [&hostile, &honest].map(|registry| manifest.push(registry, "hostile", "v1"));
    let (_, hex) = pushed[0].split_once(':').expect("a digest");
    let document = node.driver.state().join("blobs").join(hex);
    let (blob, again) = (Gate::new(), Gate::new());
    let is_removed = Arc::new(AtomicBool::new(false));
    hostile.script({
        let (blob, again, is_removed) = (blob.clone(), again.clone(), is_removed.clone());
        let bytes = Bytes::from(layer.bytes.clone());
        move |request| {
            if request.path.contains("/blobs/") && request.method == "GET" {
                return Some(Answer::body(AnswerBody::Gated {
                    bytes: bytes.clone(),
                    gate: blob.clone(),
                }));
            }
            let is_again = request.path.contains("/manifests/sha256:") && request.method == "GET";
            (is_again && is_removed.load(Ordering::SeqCst)).then(|| {
                let bytes = Bytes::from(manifest.json().to_string());
                Answer::body(AnswerBody::Gated { bytes, gate: again.clone() })
                    .with_header("content-type", OCI_MANIFEST)
            })
        }
    });
    std::thread::scope(|scope| {
        let volume = hostile_volume(&node, &hostile.reference("v1"));
        let publishing = scope.spawn({
            let (node, volume) = (&node, volume.clone());
            move || node.kubelet.publish_well(&volume)
        });
        wait_until("half of the blob", || blob.waiting() > 0);
        // The removal of a damaged manifest does this.
        std::fs::remove_file(&document).expect("the manifest");
        is_removed.store(true, Ordering::SeqCst);
        blob.open();
        wait_until("a second request for the manifest", || again.waiting() > 0);
        let (mounted, _) = node.mount(&honest.reference("v1"));
        assert_eq!(mounted.text("file"), "content");
        again.open();
        publishing.join().expect("published");
        assert_eq!(volume.text("file"), "content");
        for volume in [&volume, &mounted] {
            node.kubelet.unpublish(volume);
        }
    });
}

#[test]
fn a_blob_that_always_answers_500_is_named_while_it_is_waited_for_and_at_the_end() {
    let node = Node::start();
    let registry = FakeRegistry::new();
    Manifest::artifact([Layer::titled("file", "content")]).push(&registry, "hostile", "v1");
    registry.script(|request| request.path.contains("/blobs/").then(|| Answer::status(500)));
    let volume = node.kubelet.new_volume(&registry.reference("v1"));
    // Five seconds before its deadline the caller gets the progress.
    let deadline = Duration::from_secs(7);
    let told = node.kubelet.publish_within(&volume, deadline).expect_err("it always fails");
    assert_eq!(told.code(), Code::Aborted, "{told}");
    assert!(told.message().contains("answered 500"), "{told}");
    let message = node.kubelet.publish_badly(&volume, Code::Unavailable);
    assert!(message.contains("answered 500"), "{message}");
}

#[test]
fn host_names_without_an_answer_take_no_threads_from_others() {
    const NAMES: usize = 300;
    // Queries are received and never answered.
    let _name_server =
        std::net::UdpSocket::bind("127.0.0.153:53").expect("a port of a name server");
    let node = Node::start_with(|sandbox, options| {
        let file = sandbox.path().join("resolv.conf");
        std::fs::write(&file, "nameserver 127.0.0.153\n").expect("a file");
        let none = None::<&str>;
        mount(Some(&file), "/etc/resolv.conf", none, MsFlags::MS_BIND, none).expect("a resolver");
        options
    });
    let honest = HonestPods::new(&node);
    let before = node.driver.threads();
    std::thread::scope(|scope| {
        let name = |number| format!("h{number}.silent.example/x:v1");
        let volumes: Vec<_> =
            (0..NAMES).map(|number| hostile_volume(&node, &name(number))).collect();
        let attacks = publish_each(scope, &node, &volumes);
        wait_until("names are looked up", || node.driver.threads() >= before + 30);
        for _ in 0..3 {
            honest.are_served_while(|| attacks.iter().any(|attack| !attack.is_finished()));
            assert!(node.driver.threads() < before + 150, "{}", node.driver.threads());
        }
        node.driver.terminate_hard();
    });
}
