//! Tests concurrent callers: each blob is fetched once, each volume has one mount, and no call waits for another's
//! failure.

use tonic::Code;

use crate::support::{
    Layer, Manifest, Node, Tree, digest, mounts_at, noise, registry, unique, wait_until,
};

#[test]
fn fifty_publishes_at_once_fetch_each_thing_once() {
    let node = Node::start();
    let repository = unique("fifty");
    let contents = [noise(3 << 20, 1), noise(1 << 20, 2), b"small".to_vec()];
    let layers = contents
        .iter()
        .enumerate()
        .map(|(index, bytes)| Layer::titled(&format!("f{index}"), bytes.clone()));
    let manifest = Manifest::artifact(layers);
    manifest.push(registry(), &repository, "v1");
    let gate = node.proxy.hold_blobs();
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let volumes: Vec<_> = (0..50).map(|_| node.kubelet.new_volume(&reference)).collect();
    std::thread::scope(|scope| {
        for volume in &volumes {
            scope.spawn(|| node.kubelet.publish_well(volume));
        }
        wait_until("downloads wait for the test", || gate.waiting() >= 1);
        gate.open();
    });
    for bytes in &contents {
        assert_eq!(node.proxy.fetches(&digest(bytes)), 1);
    }
    assert_eq!(node.proxy.fetches("/manifests/"), 1);
    let first = Tree::of(volumes[0].target());
    assert_eq!(first.files().len(), 3);
    std::thread::scope(|scope| {
        for volume in &volumes {
            scope.spawn(|| node.kubelet.unpublish(volume));
        }
    });
}

#[test]
fn one_volume_published_by_many_callers_at_once_is_mounted_once() {
    let node = Node::start();
    let volume = node.kubelet.new_volume(&node.proxy.reference(&node.small_artifact().name));
    node.kubelet.prepare(&volume);
    let answers: Vec<_> = std::thread::scope(|scope| {
        let calls: Vec<_> = (0..20)
            .map(|_| scope.spawn(|| node.kubelet.publish_request(volume.request.clone())))
            .collect();
        calls.into_iter().map(|call| call.join().expect("a call")).collect()
    });
    for answer in answers {
        assert!(
            answer.as_ref().err().is_none_or(|status| status.code() == Code::Aborted),
            "{answer:?}"
        );
    }
    node.kubelet.publish_well(&volume);
    assert_eq!(mounts_at(volume.target()).len(), 1);
    node.kubelet.unpublish(&volume);
}

#[test]
fn publishing_and_unpublishing_at_once_ends_in_one_of_both() {
    let node = Node::start();
    let volume = node.kubelet.new_volume(&node.proxy.reference(&node.small_artifact().name));
    node.kubelet.prepare(&volume);
    for _ in 0..10 {
        std::thread::scope(|scope| {
            let publish = scope.spawn(|| node.kubelet.publish_request(volume.request.clone()));
            let unpublish = scope.spawn(|| {
                node.kubelet
                    .unpublish_request(&volume.request.volume_id, &volume.request.target_path)
            });
            let _ = publish.join().expect("a call");
            let _ = unpublish.join().expect("a call");
        });
        assert!(mounts_at(volume.target()).len() <= 1);
    }
    node.kubelet.unpublish(&volume);
}

#[test]
fn an_unpublish_does_not_wait_for_a_pull_and_the_pull_attaches_nothing_afterwards() {
    let node = Node::start();
    let repository = unique("withdrawn");
    Manifest::artifact([Layer::titled("slow", noise(1 << 20, 3))]).push(
        registry(),
        &repository,
        "v1",
    );
    let gate = node.proxy.hold_blobs();
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let volume = node.kubelet.new_volume(&reference);
    node.kubelet.prepare(&volume);
    std::thread::scope(|scope| {
        let call = scope.spawn(|| node.kubelet.publish_request(volume.request.clone()));
        wait_until("the download waits", || gate.waiting() == 1);
        node.kubelet
            .unpublish_request(&volume.request.volume_id, &volume.request.target_path)
            .expect("unpublish during a pull");
        gate.open();
        let _ = call.join().expect("the call");
    });
    // Another volume of the same artifact waits until the pull has ended.
    node.mount(&reference);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_slow_pull_does_not_hold_up_other_volumes() {
    let node = Node::start();
    let repository = unique("slow");
    Manifest::artifact([Layer::titled("slow", noise(1 << 20, 4))]).push(
        registry(),
        &repository,
        "v1",
    );
    let quick = node.proxy.reference(&node.small_artifact().name);
    node.mount(&quick);
    let gate = node.proxy.hold_blobs();
    let slow = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    std::thread::scope(|scope| {
        let call = scope.spawn(|| node.kubelet.publish_well(&slow));
        wait_until("the download waits", || gate.waiting() == 1);
        let (volume, _) = node.mount(&quick);
        node.kubelet.unpublish(&volume);
        gate.open();
        call.join().expect("the slow call");
    });
}

#[test]
fn a_failed_pull_is_tried_anew_by_the_next_caller() {
    let node = Node::start();
    let repository = unique("retried");
    let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    for _ in 0..3 {
        node.kubelet.publish_badly(&volume, Code::NotFound);
    }
    Manifest::artifact([Layer::titled("file", "x")]).push(registry(), &repository, "v1");
    node.kubelet.publish_well(&volume);
}
