//! Tests the messages for a user while a pull takes longer than the kubelet waits.

use std::{fs, time::Duration};

use tonic::Code;

use crate::support::{
    Kubelet, Layer, Manifest, Node, Volume, digest, mounts_at, noise, registry, unique,
};

/// Shorter than a pull that is held back, longer than the driver needs to respond before it.
const SHORT_DEADLINE: Duration = Duration::from_secs(8);

#[test]
fn before_the_deadline_the_caller_learns_how_far_the_pull_is_and_a_retry_joins_it() {
    let node = Node::start();
    let repository = unique("progress");
    let content = noise(8 << 20, 5);
    Manifest::artifact([Layer::titled("big", content.clone())]).push(registry(), &repository, "v1");
    let gate = node.proxy.hold_blobs();
    let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    for _ in 0..2 {
        let status = node
            .kubelet
            .publish_within(&volume, SHORT_DEADLINE)
            .expect_err("a pull that is held back");
        assert_eq!(status.code(), Code::Aborted, "{}", status.message());
        let message = status.message();
        for part in [repository.as_str(), "%", "MiB", "/s"] {
            assert!(message.contains(part), "no {part} in: {message}");
        }
        assert!(message.contains('8'), "the total of 8 MiB is not in: {message}");
        assert_eq!(mounts_at(volume.target()), []);
    }
    gate.open();
    node.kubelet.publish_well(&volume);
    assert_eq!(node.proxy.fetches(&digest(&content)), 1, "the retries joined the first pull");
    assert_eq!(fs::read(volume.target().join("big")).expect("the file"), content);
}

#[test]
fn a_pull_goes_on_when_its_caller_hangs_up() {
    let node = Node::start();
    let repository = unique("left");
    let content = noise(1 << 20, 6);
    Manifest::artifact([Layer::titled("file", content.clone())]).push(
        registry(),
        &repository,
        "v1",
    );
    let gate = node.proxy.hold_blobs();
    let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    node.kubelet.prepare(&volume);
    hang_up_once(&node.kubelet, &volume, || gate.waiting() == 1);
    gate.open();
    node.kubelet.publish_well(&volume);
    assert_eq!(node.proxy.fetches(&digest(&content)), 1);
}

/// Calls, waits for the state, and hangs up without a response.
fn hang_up_once(kubelet: &Kubelet, volume: &Volume, mut reached: impl FnMut() -> bool) {
    let request = volume.request.clone();
    let answered = kubelet.node(async |mut client| {
        let under_way = async {
            while !reached() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            answer = client.node_publish_volume(request) => answer.map(|_| tonic::Response::new(true)),
            () = under_way => Ok(tonic::Response::new(false)),
        }
    });
    assert!(!answered.expect("no failure"), "the call ended before it was left");
}
