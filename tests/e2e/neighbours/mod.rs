//! Tests hostile neighbours: during an attack an honest pod pulls a small artifact from a healthy registry, and another
//! one publishes from the cache. Both finish before the attack ends.

mod memory;
mod shares;
mod space;

use std::thread::{Scope, ScopedJoinHandle};

use axum::body::Bytes;
use tonic::Status;

use crate::support::{
    Answer, AnswerBody, FakeRegistry, Node, Pod, SmallArtifact, Volume, small_artifact, wait_until,
};

/// The pods of a namespace that is not part of the attack.
pub struct HonestPods<'a> {
    node: &'a Node,
    cached: SmallArtifact,
}

impl<'a> HonestPods<'a> {
    /// Makes the node cache an artifact. Called before the attack begins.
    #[track_caller]
    pub fn new(node: &'a Node) -> Self {
        let honest = Self { node, cached: small_artifact() };
        honest.publish(&honest.cached);
        honest
    }

    /// Pulls a new artifact and publishes the cached one, each in one call of the kubelet, while `goes_on` reports the
    /// attack as running.
    #[track_caller]
    pub fn are_served_while(&self, goes_on: impl Fn() -> bool) {
        assert!(goes_on(), "the attack has not begun");
        self.publish(&small_artifact());
        assert!(goes_on(), "the attack ended before a pull of a healthy registry");
        self.publish(&self.cached);
        assert!(goes_on(), "the attack ended before a publish from the cache");
    }

    #[track_caller]
    fn publish(&self, artifact: &SmallArtifact) {
        let pod = Pod { namespace: "honest".to_owned(), ..Pod::new() };
        let reference = self.node.proxy.reference(&artifact.name);
        let volume = self.node.kubelet.inline(&pod, "artifact", &reference);
        self.node.kubelet.publish_well(&volume);
        assert_eq!(volume.text("file.txt"), artifact.content);
        self.node.kubelet.unpublish(&volume);
    }
}

/// Returns a volume of a new pod of the attacker's namespace.
#[track_caller]
pub fn hostile_volume(node: &Node, reference: &str) -> Volume {
    volume_of(node, "hostile", reference)
}

/// Returns a volume of a new pod of a namespace.
#[track_caller]
pub fn volume_of(node: &Node, namespace: &str, reference: &str) -> Volume {
    let pod = Pod { namespace: namespace.to_owned(), ..Pod::new() };
    node.kubelet.inline(&pod, "artifact", reference)
}

/// One call of the kubelet.
pub type Call<'scope> = ScopedJoinHandle<'scope, Result<(), Status>>;

/// Publishes each volume in a thread of its own, in one call.
pub fn publish_each<'scope>(
    scope: &'scope Scope<'scope, '_>,
    node: &'scope Node,
    volumes: &[Volume],
) -> Vec<Call<'scope>> {
    let publish = |volume: &Volume| {
        node.kubelet.prepare(volume);
        let request = volume.request.clone();
        scope.spawn(move || node.kubelet.publish_request(request))
    };
    volumes.iter().map(publish).collect()
}

/// Returns whether none of the calls has ended.
pub fn all_go_on(calls: &[Call<'_>]) -> bool {
    calls.iter().all(|call| !call.is_finished())
}

#[test]
fn a_registry_that_never_answers_holds_up_its_own_pods_alone() {
    let node = Node::start();
    let honest = HonestPods::new(&node);
    let registry = FakeRegistry::new();
    registry.script(|_| {
        Some(Answer::body(AnswerBody::Stalled { announced: 100, bytes: Bytes::new() }))
    });
    std::thread::scope(|scope| {
        let volumes: Vec<_> =
            (0..8).map(|_| hostile_volume(&node, &registry.reference("v1"))).collect();
        let attack = publish_each(scope, &node, &volumes);
        wait_until("the attacker's registry is asked", || !registry.requests().is_empty());
        honest.are_served_while(|| all_go_on(&attack));
        node.driver.terminate_hard();
    });
}
