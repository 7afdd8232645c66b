//! Volumes that follow a tag, in containers that run on while it moves.

use std::{fs, path::Path};

use crate::support::{
    Artifact, Pod, TestNamespace, in_driver, restart_driver, upgrade, wait_until,
};

const PROGRAM: &str = "bin/busybox";

/// Moves the tag `v1` of a repository to content with this text.
#[track_caller]
fn push(repository: &str, text: &str) -> Artifact {
    Artifact::push(repository, &[(PROGRAM, text)])
}

/// Returns what a container of a pod reads now.
fn read(namespace: &TestNamespace, pod: &str, container: &str, path: &str) -> String {
    let arguments = ["exec", pod, "--container", container, "--", "cat", path];
    namespace.try_kubectl(&arguments, "").unwrap_or_default()
}

#[test]
fn running_containers_see_what_their_tag_means_now() {
    let namespace = TestNamespace::new("follow");
    let artifact = push("tests/follow", "one");
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/follow-a-tag.yaml");
    let example = fs::read_to_string(example).expect("the example");
    let reference = format!("reference: {}", artifact.reference());
    let example = example
        .replace("reference: docker.io/library/busybox:1.37", &reference)
        .replace("follow: 5m", "follow: 10s")
        .replace("sleep 60", "sleep 1");
    namespace.apply(&example);
    namespace.apply(&format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: parts}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: whole
      image: docker.io/library/busybox:1.37
      command: ["sleep", "3600"]
      volumeMounts: [{{name: artifact, mountPath: /artifact, readOnly: true}}]
    - name: part
      image: docker.io/library/busybox:1.37
      command: ["sleep", "3600"]
      volumeMounts: [{{name: artifact, mountPath: /part, subPath: bin, readOnly: true}}]
  volumes:
    - name: artifact
      csi:
        driver: oci.custom.io
        readOnly: true
        volumeAttributes: {{{reference}, follow: 10s}}
"#
    ));
    let whole = || read(&namespace, "parts", "whole", "/artifact/..data/bin/busybox");
    let shown = || read(&namespace, "follow-a-tag", "show", "/artifact/bin/busybox");
    for pod in ["parts", "follow-a-tag"] {
        namespace.wait_for_ready(pod);
    }
    assert_eq!((whole().as_str(), shown().as_str()), ("one", "one"));
    let moved = push("tests/follow", "a longer text");
    wait_until("both pods see the new content", || {
        whole() == "a longer text" && shown() == "a longer text"
    });
    // The size that `ls -l` prints.
    wait_until("the example's loop sees it", || namespace.logs("follow-a-tag").contains(" 13 "));
    assert_eq!(read(&namespace, "parts", "part", "/part/busybox"), "one", "a subPath");
    for pod in ["parts", "follow-a-tag"] {
        let restarts = "{.status.containerStatuses[*].restartCount}";
        let restarts = namespace.field("pod", pod, restarts);
        assert!(restarts.split(' ').all(|count| count == "0"), "{pod}: {restarts}");
    }
    let events = namespace.wait_for_event("parts", "Normal Switched: ");
    assert!(events.contains(&moved.digest), "{events}");
    Artifact::push("tests/follow", &[("..refused", "")]);
    let events = namespace.wait_for_event("parts", "Warning NotFollowed: ");
    assert!(events.contains("two dots"), "{events}");
    assert_eq!(whole(), "a longer text");
    namespace.kubectl(&["delete", "pod", "follow-a-tag", "parts", "--grace-period=1"]);
}

#[test]
#[ignore = "takes minutes: make test-cluster-long"]
fn a_private_tag_is_followed_after_a_restart_if_the_kubelet_repeats_its_call() {
    let namespace = TestNamespace::alone("follow-private");
    let artifact = push("tests/follow-private", "one");
    namespace.pull_secret("credentials", "correct-password");
    let mut pod = Pod::holding("reader", &artifact.private()).on("node-1");
    pod.secret = Some("credentials");
    pod.attributes.push(("follow", "10s".into()));
    namespace.run(&pod);
    namespace.wait_for_ready("reader");
    let shown = || read(&namespace, "reader", "main", "/artifact/bin/busybox");
    assert_eq!(shown(), "one");
    restart_driver();
    push("tests/follow-private", "two");
    wait_until("the volume says that its credentials were lost", || {
        in_driver("node-1", &["ls"]).is_ok_and(|listed| listed.contains("credentials were lost"))
    });
    namespace.wait_for_event("reader", "Warning NotFollowed: ");
    assert_eq!(shown(), "one");
    upgrade(&["--set=follow.enabled=true"], || {
        wait_until("the kubelet has sent them again", || shown() == "two");
    });
    assert_eq!(
        namespace.field("pod", "reader", "{.status.containerStatuses[0].restartCount}"),
        "0"
    );
}
