//! Measures honest pods while hostile pods attack the node: pulls of a small artifact from a healthy registry, and
//! publishes from the cache, alone on the node and during each attack.
//!
//! `tests/e2e/neighbours` asserts the effects of each attack.

use std::io::Write as _;
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::Scope;
use std::time::{Duration, Instant};

use crate::common::disk::node_in_memory;
use crate::common::figures::{milliseconds, quantile};
use crate::common::support::hostile::{
    empty_files, leave_broken_downloads, put_annotated_and_held_back, put_files_never_sent,
    put_large_manifest_without_layer, put_trickling, with_long_links,
};
use crate::common::support::{
    FakeRegistry, Image, Kubelet, Node, Pod, Port, SmallArtifact, Tar, small_artifact, wait_until,
};

const PULLS: usize = 20;
const PUBLISHES: usize = 200;
/// The time between two honest calls. All of them together take longer than an attack needs before it unpacks.
const PULL_PAUSE: Duration = Duration::from_millis(200);
const PUBLISH_PAUSE: Duration = Duration::from_millis(20);

/// One attack on a node.
struct Attack {
    name: &'static str,
    /// Prepares the state directory before the driver starts.
    prepare: fn(&Path),
    /// Starts the attack's threads. Returns once the attack is running.
    begin: for<'scope> fn(&'scope Scope<'scope, '_>, &'scope Attacker<'_>),
}

/// The state that the threads of an attack share.
struct Attacker<'a> {
    node: &'a Node,
    metrics: &'a Port,
    registries: [FakeRegistry; 2],
    is_over: AtomicBool,
    /// The number of calls of the kubelet, or of connections, that the attack has made.
    calls: AtomicUsize,
}

const ATTACKS: [Attack; 7] = [
    Attack {
        name: "16 manifests of 4 MiB, the layer held back",
        prepare: |_| (),
        begin: |scope, attacker| {
            let registry = &attacker.registries[0];
            // The gate stays closed: the driver is killed in the end.
            let _gate = put_annotated_and_held_back(registry, "v1", b"a layer that never comes");
            for number in 0..16 {
                let patterns = move |_| format!("other{number}");
                attacker.publish_again_and_again(scope, "v1", "exclude", patterns);
            }
        },
    },
    Attack {
        name: "990,000 empty files, 4 volumes",
        prepare: |_| (),
        begin: |scope, attacker| {
            attacker.push(empty_files(990_000));
            for number in 0..4 {
                let patterns = move |round| format!("f/{}*,f/*{number}", round % 90 + 1);
                attacker.publish_again_and_again(scope, "v1", "include", patterns);
            }
        },
    },
    Attack {
        name: "30,000 links of 4,000 bytes, 8 volumes",
        prepare: |_| (),
        begin: |scope, attacker| {
            attacker.push(with_long_links(Tar::new(), 30_000));
            for number in 0..8 {
                let patterns = move |round| format!("l/{round}{number}*");
                attacker.publish_again_and_again(scope, "v1", "exclude", patterns);
            }
        },
    },
    Attack {
        name: "4 x 10,000 layers, 3,900 broken downloads",
        prepare: leave_broken_downloads,
        begin: |scope, attacker| {
            put_files_never_sent(&attacker.registries[0], 4);
            for tag in ["v0", "v1", "v2", "v3"] {
                attacker.publish_again_and_again(scope, tag, "exclude", |_| "other".to_owned());
            }
        },
    },
    Attack {
        name: "2 registries at 2 KiB/s without ranges",
        prepare: |_| (),
        begin: |scope, attacker| {
            for (number, registry) in attacker.registries.iter().enumerate() {
                put_trickling(registry, number as u64);
                for tag in ["v0", "v1"] {
                    attacker.publish_from(scope, registry, tag, "exclude", |_| "other".to_owned());
                }
            }
        },
    },
    Attack {
        name: "ever new manifests of 4 MiB that fail",
        prepare: |_| (),
        begin: |scope, attacker| {
            scope.spawn(|| {
                while !attacker.is_over.load(Ordering::SeqCst) {
                    let number = attacker.calls.load(Ordering::SeqCst);
                    let registry = &attacker.registries[0];
                    put_large_manifest_without_layer(registry, "v1", &number.to_string());
                    attacker.publish_once(&registry.reference("v1"), "pullPolicy", "Always");
                }
            });
        },
    },
    Attack {
        name: "64 connections to /metrics that send half",
        prepare: |_| (),
        begin: |scope, attacker| {
            for _ in 0..64 {
                scope.spawn(move || {
                    while !attacker.is_over.load(Ordering::SeqCst) {
                        // The server closes the connection, and the attack makes it again.
                        let Ok(mut connection) = TcpStream::connect(attacker.metrics.address())
                        else {
                            continue;
                        };
                        let _ = connection.write_all(b"GET ");
                        attacker.calls.fetch_add(1, Ordering::SeqCst);
                        let _ = std::io::copy(&mut connection, &mut std::io::sink());
                    }
                });
            }
        },
    },
];

pub fn neighbours() {
    println!(
        "{PULLS} pulls of a small artifact, and {PUBLISHES} publishes from the cache, milliseconds:\n"
    );
    println!(
        "{:<44} {:>12} {:>14} {:>12} {:>14}",
        "attack", "pull median", "beside it", "cached 95 %", "beside it"
    );
    for attack in &ATTACKS {
        measure(attack);
    }
}

fn measure(attack: &Attack) {
    let metrics = Port::new();
    let node = node_in_memory(|options| {
        (attack.prepare)(&options.state);
        options.argument(&format!("--metrics-endpoint={}", metrics.address()))
    });
    let cached = small_artifact();
    publish(&node.kubelet, &node.proxy.reference(&cached.name));
    let alone = honest_times(&node, &cached);
    let attacker = Attacker {
        node: &node,
        metrics: &metrics,
        registries: [FakeRegistry::new(), FakeRegistry::new()],
        is_over: AtomicBool::new(false),
        calls: AtomicUsize::new(0),
    };
    let beside = std::thread::scope(|scope| {
        (attack.begin)(scope, &attacker);
        wait_until("the attack is under way", || attacker.calls.load(Ordering::SeqCst) > 0);
        let beside = honest_times(&node, &cached);
        attacker.is_over.store(true, Ordering::SeqCst);
        node.driver.terminate_hard();
        beside
    });
    println!(
        "{:<44} {:>12} {:>14} {:>12} {:>14}",
        attack.name, alone[0], beside[0], alone[1], beside[1]
    );
}

/// Returns the median of pulls and the 95th percentile of publishes from the cache.
fn honest_times(node: &Node, cached: &SmallArtifact) -> [String; 2] {
    let artifacts: Vec<_> = (0..PULLS).map(|_| small_artifact()).collect();
    let time_after = |pause: Duration, artifact: &SmallArtifact| {
        std::thread::sleep(pause);
        publish(&node.kubelet, &node.proxy.reference(&artifact.name))
    };
    let mut pulls: Vec<_> =
        artifacts.iter().map(|artifact| time_after(PULL_PAUSE, artifact)).collect();
    let mut publishes: Vec<_> = (0..PUBLISHES).map(|_| time_after(PUBLISH_PAUSE, cached)).collect();
    [milliseconds(quantile(&mut pulls, 0.5)), milliseconds(quantile(&mut publishes, 0.95))]
}

/// Publishes in a new pod of an honest namespace. Returns the time of the call.
fn publish(kubelet: &Kubelet, reference: &str) -> Duration {
    let pod = Pod { namespace: "honest".to_owned(), ..Pod::new() };
    let volume = kubelet.inline(&pod, "artifact", reference);
    kubelet.prepare(&volume);
    let started = Instant::now();
    kubelet.publish_request(volume.request.clone()).expect("an honest pod is served");
    let took = started.elapsed();
    kubelet.unpublish(&volume);
    took
}

impl Attacker<'_> {
    fn push(&self, archive: Tar) {
        Image::new().layer(archive.finish()).push(&self.registries[0], "hostile", "v1");
    }

    fn publish_again_and_again<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        tag: &str,
        attribute: &'static str,
        value: impl Fn(usize) -> String + Send + 'scope,
    ) {
        self.publish_from(scope, &self.registries[0], tag, attribute, value);
    }

    /// Publishes in a thread of its own, in a new pod each time, with an attribute that makes a tree of its own.
    fn publish_from<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        registry: &FakeRegistry,
        tag: &str,
        attribute: &'static str,
        value: impl Fn(usize) -> String + Send + 'scope,
    ) {
        let reference = registry.reference(tag);
        scope.spawn(move || {
            let rounds = (0..).take_while(|_| !self.is_over.load(Ordering::SeqCst));
            rounds.for_each(|round| self.publish_once(&reference, attribute, &value(round)));
        });
    }

    fn publish_once(&self, reference: &str, attribute: &str, value: &str) {
        let kubelet = &self.node.kubelet;
        let pod = Pod { namespace: "hostile".to_owned(), ..Pod::new() };
        let volume = kubelet.inline(&pod, "artifact", reference).attribute(attribute, value);
        kubelet.prepare(&volume);
        self.calls.fetch_add(1, Ordering::SeqCst);
        if kubelet.publish_request(volume.request.clone()).is_ok() {
            let _ =
                kubelet.unpublish_request(&volume.request.volume_id, &volume.request.target_path);
        }
    }
}
