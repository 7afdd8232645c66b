//! Hostile neighbours: an attack goes on while an honest pod pulls a small artifact from a healthy
//! registry, and another one publishes from the cache. Both finish before the attack ends.

mod memory;
mod shares;
mod space;

use crate::support::{Node, Pod, SmallArtifact, Volume, small_artifact};

/// The pods of a namespace that has nothing to do with the attack.
pub struct HonestPods<'a> {
    node: &'a Node,
    cached: SmallArtifact,
}

impl<'a> HonestPods<'a> {
    /// Has the node cache an artifact. To be called before the attack begins.
    #[track_caller]
    pub fn new(node: &'a Node) -> Self {
        let honest = Self { node, cached: small_artifact() };
        honest.publish(&honest.cached);
        honest
    }

    /// Pulls a new artifact, and publishes the cached one, each in one call of the kubelet, while
    /// `goes_on` says that the attack does.
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

/// A volume of a new pod of the attacker's namespace.
#[track_caller]
pub fn hostile_volume(node: &Node, reference: &str) -> Volume {
    let pod = Pod { namespace: "hostile".to_owned(), ..Pod::new() };
    node.kubelet.inline(&pod, "artifact", reference)
}

#[test]
fn a_registry_that_never_answers_holds_up_its_own_pods_alone() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    let node = Node::start();
    let honest = HonestPods::new(&node);
    let registry = crate::support::FakeRegistry::new();
    let is_over = Arc::new(AtomicBool::new(false));
    let (over, asked) = (Arc::clone(&is_over), Arc::new(AtomicBool::new(false)));
    let was_asked = Arc::clone(&asked);
    registry.script(move |_| {
        was_asked.store(true, Ordering::SeqCst);
        while !over.load(Ordering::SeqCst) {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        None
    });
    std::thread::scope(|scope| {
        let attacks: Vec<_> = (0..8)
            .map(|_| {
                let volume = hostile_volume(&node, &registry.reference("v1"));
                node.kubelet.prepare(&volume);
                let kubelet = &node.kubelet;
                scope.spawn(move || kubelet.publish_request(volume.request))
            })
            .collect();
        crate::support::wait_until("the attacker's registry is asked", || {
            asked.load(Ordering::SeqCst)
        });
        honest.are_served_while(|| attacks.iter().all(|attack| !attack.is_finished()));
        is_over.store(true, Ordering::SeqCst);
    });
}
