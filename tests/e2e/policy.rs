//! Tests the administrator's rules on artifacts, namespaces and sizes.

use tonic::Code;

use crate::support::{Layer, Manifest, Node, Pod, Volume, registry, small_artifact, unique};

fn of(node: &Node, namespace: &str, reference: &str) -> Volume {
    let pod = Pod { namespace: namespace.to_owned(), ..Pod::new() };
    node.kubelet.inline(&pod, "artifact", reference)
}

#[test]
fn rules_say_which_namespaces_may_mount_which_references() {
    let artifact = small_artifact();
    let lines = format!(
        "policy:\n  default: Deny\n  rules:\n  - references: [\"*/{}\"]\n    namespaces: [\"team-*\"]\n",
        artifact.repository
    );
    let node = Node::start_configured(|_| {}, &lines);
    let reference = node.proxy.reference(&artifact.name);
    let allowed = of(&node, "team-one", &reference);
    node.kubelet.publish_well(&allowed);
    for (namespace, reference) in
        [("other", reference.clone()), ("team-one", node.proxy.reference(&small_artifact().name))]
    {
        let volume = of(&node, namespace, &reference);
        let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
        assert!(message.contains("policy") && message.contains(namespace), "{message}");
    }
    // A refused artifact causes no request to the registry.
    assert_eq!(node.proxy.fetches(&format!("{}/", small_artifact().repository)), 0);
    node.kubelet.unpublish(&allowed);
}

#[test]
fn a_digest_and_a_size_can_be_demanded() {
    let repository = unique("sized");
    let large = Manifest::artifact([Layer::titled("file", vec![b'x'; 200_000])]);
    let digest = large.push(registry(), &repository, "v1");
    let lines = "policy:\n  rules:\n  - requireDigest: true\n    maxArtifactBytes: 100k\n";
    let node = Node::start_configured(|_| {}, lines);
    let artifact = small_artifact();
    let by_tag = node.kubelet.new_volume(&node.proxy.reference(&artifact.name));
    let message = node.kubelet.publish_badly(&by_tag, Code::FailedPrecondition);
    assert!(message.contains("digest"), "{message}");
    let by_digest = format!("{}@{}", artifact.repository, artifact.digest);
    let (volume, _) = node.mount(&node.proxy.reference(&by_digest));
    node.kubelet.unpublish(&volume);
    let too_large = node.proxy.reference(&format!("{repository}@{digest}"));
    let message =
        node.kubelet.publish_badly(&node.kubelet.new_volume(&too_large), Code::FailedPrecondition);
    assert!(message.contains("maxArtifactBytes"), "{message}");
    assert_eq!(node.proxy.fetches("/blobs/"), 1, "nothing of the large one was fetched");
    // Cached content is checked by the current rule.
    node.reconfigure("policy:\n  rules: []\n");
    let (volume, _) = node.mount(&too_large);
    node.reconfigure(lines);
    let next = node.kubelet.new_volume(&too_large);
    node.kubelet.publish_badly(&next, Code::FailedPrecondition);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_policy_with_an_unknown_key_fails_closed_and_unpublishing_works() {
    let artifact = small_artifact();
    let node = Node::start_configured(|_| {}, "policy:\n  default: Allow\n");
    let reference = node.proxy.reference(&artifact.name);
    let (mounted, _) = node.mount(&reference);
    // A bad change keeps the last good policy ...
    node.reconfigure("policy:\n  default: Allow\n  ruls: []\n");
    let (second, _) = node.mount(&reference);
    node.kubelet.unpublish(&second);
    assert!(node.driver.log().contains("ruls"), "the mistake is logged");
    // ... and at a start there is none.
    let driver = node.driver.restart();
    let kubelet = driver.kubelet();
    let volume = kubelet.new_volume(&reference);
    let message = kubelet.publish_badly(&volume, Code::Unavailable);
    assert!(message.contains("ruls") && message.contains("line 6"), "{message}");
    kubelet.unpublish(&mounted);
}

#[test]
fn a_changed_policy_counts_at_the_next_publish() {
    let artifact = small_artifact();
    let node = Node::start_configured(|_| {}, "policy:\n  default: Allow\n");
    let reference = node.proxy.reference(&artifact.name);
    let (mounted, _) = node.mount(&reference);
    node.reconfigure("policy:\n  default: Deny\n");
    node.kubelet.publish_badly(&node.kubelet.new_volume(&reference), Code::FailedPrecondition);
    // A mounted volume stays, also when the kubelet publishes it again.
    node.kubelet.publish_well(&mounted);
    node.kubelet.unpublish(&mounted);
}
