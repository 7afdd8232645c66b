//! Tests artifacts that are small on the wire and large in memory.

use tonic::Code;

use super::{HonestPods, all_go_on, hostile_volume, publish_each};
use crate::support::hostile::{empty_files, put_annotated_and_held_back, with_long_links};
use crate::support::{
    FakeRegistry, Image, Node, PeakMemory, Tar, Volume, anonymous_bytes, wait_until,
};

/// The limit on the driver's anonymous memory: half of the chart's limit.
const MOST: u64 = 256 << 20;

/// Publishes all at once, each again after ABORTED as the kubelet does. Returns the outcomes.
fn publish_to_the_end(node: &Node, volumes: &[Volume]) -> Vec<Result<(), tonic::Status>> {
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

/// Publishes 16 volumes of an artifact with nearly 4 MiB of annotations whose layer is held back, each with another
/// `exclude`. Honest pods are served meanwhile, and the memory of all keeps its bound.
#[track_caller]
fn excludes_take_no_memory_while_the_layer_is_held_back(exclude: impl Fn(usize) -> String) {
    const LAYER: &str = "a layer that comes late";
    let node = Node::start();
    let honest = HonestPods::new(&node);
    let registry = FakeRegistry::new();
    let gate = put_annotated_and_held_back(&registry, "v1", LAYER.as_bytes());
    let peak = PeakMemory::reset(node.driver.id());
    let volumes: Vec<_> = (0..16)
        .map(|number| {
            hostile_volume(&node, &registry.reference("v1")).attribute("exclude", &exclude(number))
        })
        .collect();
    std::thread::scope(|scope| {
        for volume in &volumes {
            scope.spawn(|| node.kubelet.publish_until_bytes_are_awaited(volume));
        }
    });
    std::thread::scope(|scope| {
        let attack = publish_each(scope, &node, &volumes);
        honest.are_served_while(|| all_go_on(&attack));
        assert!(peak.anonymous_bytes() < MOST, "{} MiB", peak.anonymous_bytes() >> 20);
        gate.open();
        for call in attack {
            call.join().expect("a call").expect("published");
        }
    });
    assert!(peak.anonymous_bytes() < MOST, "{} MiB", peak.anonymous_bytes() >> 20);
    for volume in &volumes {
        assert_eq!(volume.text("file"), LAYER);
        node.kubelet.unpublish(volume);
    }
}

#[test]
fn a_manifest_of_annotations_takes_no_memory_while_its_layer_trickles() {
    excludes_take_no_memory_while_the_layer_is_held_back(|number| format!("other{number}"));
}

#[test]
fn patterns_that_are_costly_to_compile_take_no_memory_while_a_layer_trickles() {
    excludes_take_no_memory_while_the_layer_is_held_back(|number| {
        let pattern = |part| format!("{}x{number}-{part}", "?/".repeat(125));
        (0..60).map(pattern).collect::<Vec<_>>().join(",")
    });
}

#[test]
fn long_targets_of_symbolic_links_are_not_held_in_memory() {
    const LINKS: usize = 30_000;
    let node = Node::start();
    let honest = HonestPods::new(&node);
    let registry = FakeRegistry::new();
    let archive = with_long_links(Tar::new().file("kept", 0o644, "content"), LINKS);
    Image::new().layer(archive.finish()).push(&registry, "hostile", "v1");
    let peak = PeakMemory::reset(node.driver.id());
    let volumes: Vec<_> = (0..8)
        .map(|number| {
            hostile_volume(&node, &registry.reference("v1"))
                .attribute("exclude", &format!("l,other{number}"))
        })
        .collect();
    std::thread::scope(|scope| {
        let attack = scope.spawn(|| publish_to_the_end(&node, &volumes));
        honest.are_served_while(|| !attack.is_finished());
        for outcome in attack.join().expect("an outcome") {
            outcome.expect("published");
        }
    });
    for volume in &volumes {
        assert_eq!(volume.text("kept"), "content");
        node.kubelet.unpublish(volume);
    }
    assert!(peak.anonymous_bytes() < MOST / 2, "{} MiB", peak.anonymous_bytes() >> 20);
    wait_until("memory is given back", || anonymous_bytes(node.driver.id()) < MOST / 4);
}

#[test]
fn trees_beyond_the_budget_are_refused_and_those_within_it_are_built_in_turn() {
    // Half of it is fixed, and 5.6 MiB are for one artifact.
    let node = Node::start_configured(|_| (), "pull: {memory: 16Mi, unpacks: 1}\n");
    let honest = HonestPods::new(&node);
    let registry = FakeRegistry::new();
    let put = |tag: &str, files: usize| {
        Image::new().layer(empty_files(files).finish()).push(&registry, "hostile", tag);
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
        let attack = scope.spawn(|| publish_to_the_end(&node, &fitting));
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
    let refused = publish_to_the_end(&node, &never).remove(0).expect_err("refused");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let text = refused.message();
    assert!(text.contains("MiB of memory") && text.contains("pull.memory"), "{text}");
    never[0].assert_nothing_left();
}
