//! Restarts, crashes and upgrades, also during a pull.

use std::time::Duration;

use crate::support::{
    Artifact, DRIVER_NAMESPACE, NODES, Pod, TestNamespace, driver_pod, in_driver, kubectl, node,
    on_node, release, restart_driver, run, try_kubectl, wait_until,
};

/// A script that reads all the time and prints `ok`; any other line is a failed read.
const READER: &str = "trap exit TERM; n=0; while :; do if cat /artifact/file > /dev/null; then n=$((n + 1)); else echo failed; fi; echo $n > /tmp/reads; sleep 0.1; done";

/// A pod that reads a volume until it is deleted.
struct Reader<'a> {
    namespace: &'a TestNamespace,
    name: String,
    node: &'static str,
}

impl<'a> Reader<'a> {
    fn start(namespace: &'a TestNamespace, name: &str, reference: &str, on: &'static str) -> Self {
        Self::start_pod(namespace, Pod::new(name, reference, READER), on)
    }

    fn start_pod(namespace: &'a TestNamespace, pod: Pod, node: &'static str) -> Self {
        let pod = pod.on(node);
        namespace.run(&pod);
        namespace.wait_for_phase(&pod.name, "Running");
        Self { namespace, name: pod.name, node }
    }

    fn reads(&self) -> u64 {
        let arguments = ["exec", &self.name, "--", "cat", "/tmp/reads"];
        let said = self.namespace.try_kubectl(&arguments, "").unwrap_or_default();
        said.trim().parse().unwrap_or(0)
    }

    /// Waits for reads that began after this call, and asserts that none has failed.
    #[track_caller]
    fn still_reads(&self) {
        let before = self.reads();
        wait_until("further reads", || self.reads() > before + 2);
        assert_eq!(self.namespace.logs(&self.name), "", "failed reads of {}", self.name);
        // A container has its own copy of the mount; the next container of the pod gets that of the node.
        let uid = self.namespace.field("pod", &self.name, "{.metadata.uid}");
        let mounts = on_node(self.node, &["cat", "/proc/self/mountinfo"]).expect("the mounts");
        let volumes = format!("/pods/{}/volumes/kubernetes.io~csi/", uid.trim());
        assert!(mounts.contains(&volumes), "the volume of {} is not mounted", self.name);
    }
}

fn helm(arguments: &[&str]) -> Result<String, String> {
    run("helm", &[arguments, &["--namespace", DRIVER_NAMESPACE]].concat(), "")
}

#[track_caller]
fn uninstall() {
    helm(&["uninstall", "csi-driver-oci", "--wait", "--timeout=2m"]).expect("no pod has a volume");
    let selector =
        "--selector=app.kubernetes.io/name in (csi-driver-oci, csi-driver-oci-controller)";
    let pods = ["--namespace", DRIVER_NAMESPACE, "get", "pods", selector, "--output=name"];
    wait_until("no driver", || kubectl(&pods).is_empty());
}

/// Kills the driver's process on a node, like the kernel when memory is short.
fn kill_driver(name: &str) {
    let script = r#"for process in /proc/[0-9]*; do
        if tr '\0' ' ' < "$process/cmdline" | grep -q '^/usr/local/bin/csi-driver-oci node '; then
            kill -KILL "${process#/proc/}"
        fi
    done"#;
    on_node(name, &["sh", "-c", script]).expect("a killed driver");
}

#[test]
fn a_pod_that_is_deleted_during_its_pull_is_gone_and_its_pull_goes_on() {
    let namespace = TestNamespace::new("deleted");
    let artifact = Artifact::push_large("tests/deleted", 8 << 20);
    let pod = Pod::holding("first", &artifact.slow()).on("node-1");
    namespace.run(&pod);
    wait_until("the pull", || {
        crate::support::driver_log("node-1").is_ok_and(|log| log.contains("tests/deleted"))
            || namespace.events("first").contains("Pulling")
    });
    namespace.delete_pod("first");
    wait_until("the end of the pull, which no pod waits for", || {
        let listed = in_driver("node-1", &["ls", "--output", "json"]);
        listed.is_ok_and(|list| {
            let list: serde_json::Value = serde_json::from_str(&list).expect("JSON");
            list["artifacts"].to_string().contains(&artifact.digest)
        })
    });
    assert_eq!(
        namespace
            .output(&Pod::new("second", &artifact.slow(), "wc -c < /artifact/large").on("node-1"))
            .trim(),
        (8 << 20).to_string()
    );
}

#[test]
fn a_pod_that_is_deleted_by_force_leaves_no_mount() {
    let namespace = TestNamespace::new("forced");
    let artifact = Artifact::push("tests/forced", &[("file", "x\n")]);
    let pod = Pod::holding("pod", &artifact.reference()).on("node-1");
    namespace.run(&pod);
    namespace.wait_for_phase("pod", "Running");
    let uid = namespace.field("pod", "pod", "{.metadata.uid}");
    namespace.kubectl(&["delete", "pod", "pod", "--force", "--grace-period=0"]);
    let mounts = || on_node("node-1", &["cat", "/proc/self/mountinfo"]).expect("mounts");
    wait_until("no mount of the pod", || !mounts().contains(&uid));
    wait_until("no folder of the pod", || {
        on_node("node-1", &["test", "!", "-e", &format!("/var/lib/kubelet/pods/{uid}")]).is_ok()
    });
}

#[test]
fn a_volume_that_the_kubelet_has_forgotten_is_unmounted() {
    let namespace = TestNamespace::alone("forgotten");
    let artifact = Artifact::push("tests/forgotten", &[("file", "x\n")]);
    let other = Reader::start(&namespace, "other", &artifact.reference(), "node-2");
    let pod = Pod::holding("pod", &artifact.reference()).on("node-2");
    namespace.run(&pod);
    namespace.wait_for_phase("pod", "Running");
    let uid = namespace.field("pod", "pod", "{.metadata.uid}");
    let mounts = || on_node("node-2", &["cat", "/proc/self/mountinfo"]).expect("mounts");
    assert!(mounts().contains(&uid));
    // Without the file the kubelet cannot unmount the volume, and asks the driver for nothing.
    let volume = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~csi/artifact");
    on_node("node-2", &["rm", &format!("{volume}/vol_data.json")]).expect("a lost file");
    namespace.kubectl(&["delete", "pod", "pod", "--force", "--grace-period=0"]);
    // The driver looks every minute, and when it starts.
    kill_driver("node-2");
    wait_until("the end of the mount", || !mounts().contains(&uid));
    other.still_reads();
    let folder = format!("/var/lib/kubelet/pods/{uid}");
    on_node("node-2", &["rm", "-r", &folder]).expect("what an administrator removes");
    node(&["restart", "node-2", "kubelet"]);
    assert_eq!(
        namespace
            .output(&Pod::new("next", &artifact.reference(), "cat /artifact/file").on("node-2")),
        "x\n"
    );
}

#[test]
fn a_drain_moves_pods_with_volumes_to_another_node() {
    let namespace = TestNamespace::alone("drain");
    let artifact = Artifact::push("tests/drain", &[("file", "x\n")]);
    namespace.apply(&format!(
        r#"
apiVersion: apps/v1
kind: Deployment
metadata: {{name: moving}}
spec:
  replicas: 2
  selector: {{matchLabels: {{app: moving}}}}
  template:
    metadata: {{labels: {{app: moving}}}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
        - name: main
          image: docker.io/library/busybox:1.37
          command: ["sh", "-c", "cat /artifact/file; trap exit TERM; while :; do sleep 3600 & wait $!; done"]
          volumeMounts: [{{name: artifact, mountPath: /artifact}}]
      volumes:
        - name: artifact
          csi: {{driver: oci.custom.io, readOnly: true, volumeAttributes: {{reference: "{}"}}}}
"#,
        artifact.reference()
    ));
    namespace.kubectl(&["rollout", "status", "deployment/moving", "--timeout=120s"]);
    kubectl(&[
        "drain",
        "node-1",
        "--ignore-daemonsets",
        "--delete-emptydir-data",
        "--timeout=120s",
        "--pod-selector=app=moving",
    ]);
    namespace.kubectl(&["rollout", "status", "deployment/moving", "--timeout=120s"]);
    let nodes = namespace.kubectl(&[
        "get",
        "pods",
        "--selector=app=moving",
        "--output=jsonpath={.items[*].spec.nodeName}",
    ]);
    kubectl(&["uncordon", "node-1"]);
    assert!(!nodes.contains("node-1"), "{nodes}");
}

#[test]
fn volumes_outlive_restarts_of_kubelet_and_containerd() {
    let namespace = TestNamespace::alone("restarts");
    let artifact = Artifact::push("tests/restarts", &[("file", "x\n")]);
    let reader = Reader::start(&namespace, "reader", &artifact.reference(), "node-1");
    for program in ["kubelet", "containerd"] {
        node(&["restart", "node-1", program]);
        let name = format!("after-{program}");
        assert_eq!(
            namespace
                .output(&Pod::new(&name, &artifact.reference(), "cat /artifact/file").on("node-1")),
            "x\n"
        );
        reader.still_reads();
    }
    namespace.delete_pod("reader");
}

#[test]
fn twenty_pods_start_while_the_driver_is_killed_again_and_again() {
    let namespace = TestNamespace::alone("killed");
    let artifact = Artifact::push_large("tests/killed", 1 << 20);
    let reader_artifact = Artifact::push("tests/killed-reader", &[("file", "x\n")]);
    let reader = Reader::start(&namespace, "reader", &reader_artifact.reference(), "node-1");
    let names: Vec<_> = (0..20).map(|number| format!("pod-{number}")).collect();
    for name in &names {
        namespace
            .run(&Pod::new(name, &artifact.reference(), "wc -c < /artifact/large").on("node-1"));
    }
    for _ in 0..3 {
        kill_driver("node-1");
        wait_until("the driver to be back", || in_driver("node-1", &["status"]).is_ok());
    }
    for name in &names {
        namespace.wait_for_phase(name, "Succeeded");
        assert_eq!(namespace.logs(name).trim(), (1 << 20).to_string());
    }
    reader.still_reads();
    namespace.delete_pod("reader");
}

#[test]
fn fifty_pods_start_while_the_driver_is_rolled() {
    let namespace = TestNamespace::alone("rolled");
    let artifact = Artifact::push_large("tests/rolled", 1 << 20);
    let names: Vec<_> = (0..50).map(|number| format!("pod-{number}")).collect();
    let mut all = String::new();
    for name in &names {
        all.push_str("---");
        all.push_str(&Pod::new(name, &artifact.reference(), "wc -c < /artifact/large").yaml());
    }
    namespace.apply(&all);
    restart_driver();
    for name in &names {
        namespace.wait_for_phase(name, "Succeeded");
    }
}

#[test]
fn cached_content_starts_pods_while_the_registry_is_down() {
    let namespace = TestNamespace::alone("down");
    let artifact = Artifact::push("tests/down", &[("file", "x\n")]);
    let other = Artifact::push("tests/down-other", &[("file", "y\n")]);
    namespace.output(&Pod::new("before", &artifact.slow(), "cat /artifact/file").on("node-1"));
    let address = |verb: &str| {
        run("ip", &["address", verb, "198.51.100.4/24", "dev", "cluster0"], "")
            .expect("the address")
    };
    address("del");
    let during = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        assert_eq!(
            namespace
                .output(&Pod::new("during", &artifact.slow(), "cat /artifact/file").on("node-1")),
            "x\n"
        );
        namespace.run(&Pod::new("waiting", &other.slow(), "cat /artifact/file").on("node-1"));
        namespace.wait_for_event("waiting", "cannot be reached");
    }));
    address("add");
    if let Err(failed) = during {
        std::panic::resume_unwind(failed);
    }
    namespace.wait_for_phase("waiting", "Succeeded");
}

#[test]
fn a_node_that_loses_power_comes_back_with_its_volumes() {
    let namespace = TestNamespace::alone("power");
    let artifact = Artifact::push("tests/power", &[("file", "x\n")]);
    let mut pod = Pod::new(
        "reader",
        &artifact.slow(),
        "cat /artifact/file; trap exit TERM; while :; do sleep 3600 & wait $!; done",
    )
    .on("node-2");
    pod.spec = String::new();
    let yaml = pod.yaml().replace("restartPolicy: Never", "restartPolicy: Always");
    namespace.apply(&yaml);
    namespace.wait_for_phase("reader", "Running");
    let uid = namespace.field("pod", "reader", "{.metadata.uid}");
    node(&["crash", "node-2"]);
    node(&["start", "node-2"]);
    wait_until("the container's restart", || {
        namespace
            .field("pod", "reader", "{.status.containerStatuses[0].restartCount}")
            .parse()
            .unwrap_or(0)
            > 0
    });
    namespace.wait_for_ready("reader");
    assert_eq!(namespace.field("pod", "reader", "{.metadata.uid}"), uid, "the same pod");
    assert!(namespace.logs("reader").contains('x'));
    wait_until("the driver", || {
        in_driver("node-2", &["status"]).is_ok_and(|said| said.contains("ready"))
    });
    namespace.delete_pod("reader");
    wait_until("no mount of the pod", || {
        !on_node("node-2", &["cat", "/proc/self/mountinfo"]).expect("mounts").contains(&uid)
    });
}

#[test]
fn helm_upgrades_refuses_uninstalls_and_installs_again() {
    let namespace = TestNamespace::alone("helm");
    let artifact = Artifact::push("tests/helm", &[("file", "x\n")]);
    let [chart, values] = release();
    let reader = Reader::start(&namespace, "reader", &artifact.reference(), "node-1");
    let before = driver_pod("node-1").expect("the driver");
    helm(&[
        "upgrade",
        "csi-driver-oci",
        &chart,
        &values,
        "--set=podAnnotations.upgraded=yes",
        "--wait",
        "--timeout=3m",
    ])
    .expect("an upgrade");
    assert_ne!(driver_pod("node-1").expect("the driver"), before, "its pod is replaced");
    reader.still_reads();
    let refused = helm(&["uninstall", "csi-driver-oci", "--wait", "--timeout=2m"])
        .expect_err("a pod has a volume");
    assert!(refused.contains("uninstall"), "{refused}");
    let log =
        try_kubectl(&["--namespace", DRIVER_NAMESPACE, "logs", "job/csi-driver-oci-uninstall"], "")
            .expect("the job's log");
    assert!(log.contains(&format!("{}/reader", namespace.name)), "{log}");
    reader.still_reads();
    namespace.delete_pod("reader");
    uninstall();
    helm(&["install", "csi-driver-oci", &chart, &values, "--wait", "--timeout=3m"])
        .expect("an installation");
    for name in NODES {
        wait_until("the driver", || in_driver(name, &["status"]).is_ok());
    }
    // The content has stayed.
    assert_eq!(
        namespace
            .output(&Pod::new("again", &artifact.reference(), "cat /artifact/file").on("node-1")),
        "x\n"
    );
}

#[test]
#[ignore = "needs a build of an earlier commit: make test-cluster-long"]
fn an_upgrade_from_an_earlier_commit_and_its_rollback_interrupt_no_reader() {
    let namespace = TestNamespace::alone("upgraded");
    let artifact = Artifact::push("tests/upgraded", &[("file", "x\n"), ("other", "y\n")]);
    let [chart, values] = release();
    let earlier = std::env::var("EARLIER_CHART").expect("an earlier chart: make test-cluster-long");
    uninstall();
    for name in NODES {
        let script = "rm -rf /var/lib/csi-driver-oci";
        on_node(name, &["sh", "-c", script]).expect("a node without content");
    }
    let image = "--set=image.tag=earlier";
    let wait = ["--wait", "--timeout=3m"];
    let install = ["install", "csi-driver-oci", &earlier, &values, image];
    helm(&[&install[..], &wait].concat()).expect("an earlier version");
    let bind = Reader::start(&namespace, "bind", &artifact.reference(), "node-1");
    let mut pod = Pod::new("overlay", &artifact.reference(), READER);
    (pod.volume_read_only, pod.mount_read_only) = (None, None);
    let overlay = Reader::start_pod(&namespace, pod, "node-1");
    let uids =
        [&bind, &overlay].map(|reader| namespace.field("pod", &reader.name, "{.metadata.uid}"));
    let upgrade = ["upgrade", "csi-driver-oci", &chart, &values];
    let steps = [
        ("upgraded", &upgrade[..]),
        ("back", &["rollback", "csi-driver-oci", "1"]),
        ("forth", &upgrade),
    ];
    for (step, command) in steps {
        let before = driver_pod("node-1").expect("the driver");
        helm(&[command, &wait].concat()).unwrap_or_else(|error| panic!("{step}: {error}"));
        assert_ne!(driver_pod("node-1").expect("the driver"), before, "{step}");
        bind.still_reads();
        overlay.still_reads();
        let mut pod = Pod::new(step, &artifact.reference(), "cat /artifact/file").on("node-1");
        pod.attributes.push(("exclude", if step == "back" { "none" } else { "other" }.into()));
        assert_eq!(namespace.output(&pod), "x\n", "{step}");
    }
    namespace.delete_pod("bind");
    namespace.delete_pod("overlay");
    let mounts = || on_node("node-1", &["cat", "/proc/self/mountinfo"]).expect("mounts");
    wait_until("no mount of the readers", || !uids.iter().any(|uid| mounts().contains(uid)));
    let verified = in_driver("node-1", &["verify"]).expect("what is on the node is whole");
    assert!(verified.contains(", 0 findings"), "{verified}");
}

#[test]
fn a_node_is_purged_once_no_pod_and_no_driver_needs_its_content() {
    let namespace = TestNamespace::alone("purge");
    let artifact = Artifact::push("tests/purge", &[("file", "x\n")]);
    let reader = Reader::start(&namespace, "reader", &artifact.reference(), "node-2");
    let [chart, values] = release();
    let purge = |ends: &str| {
        let manifest = run(
            "helm",
            &[
                "template",
                "csi-driver-oci",
                &chart,
                &values,
                "--namespace",
                DRIVER_NAMESPACE,
                "--set=purge.nodes={node-2}",
                "--show-only=templates/purge.yaml",
            ],
            "",
        )
        .expect("a job");
        let namespace = ["--namespace", DRIVER_NAMESPACE];
        try_kubectl(&[&namespace[..], &["apply", "--filename=-"]].concat(), &manifest)
            .expect("an applied job");
        let selected = "--selector=app.kubernetes.io/name=csi-driver-oci-purge";
        let ended = format!("--for=condition={ends}");
        let job = kubectl(&[&namespace[..], &["get", "jobs", "--output=name"]].concat());
        let job = job.lines().find(|name| name.contains("purge")).expect("the job");
        let waited =
            try_kubectl(&[&namespace[..], &["wait", job, &ended, "--timeout=60s"]].concat(), "");
        let log = kubectl(&[&namespace[..], &["logs", selected, "--tail=-1"]].concat());
        kubectl(&[&namespace[..], &["delete", job, "--cascade=foreground"]].concat());
        assert!(waited.is_ok(), "the job's end is not {ended}: {log}");
        log
    };
    let refused = purge("Failed");
    assert!(refused.contains("move the pods away first"), "{refused}");
    reader.still_reads();
    namespace.delete_pod("reader");
    let refused = purge("Failed");
    assert!(refused.contains("the driver runs on this node"), "{refused}");
    // The chart's affinity excludes nodes with this label.
    kubectl(&["label", "node", "node-2", "type=virtual-kubelet"]);
    let without = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let on_node_2 = [
            "--namespace",
            DRIVER_NAMESPACE,
            "get",
            "pods",
            "--field-selector=spec.nodeName=node-2",
            "--selector=app.kubernetes.io/name=csi-driver-oci",
            "--output=name",
        ];
        wait_until("no driver on node-2", || kubectl(&on_node_2).is_empty());
        let purged = purge("Complete");
        assert!(purged.contains("The content is deleted."), "{purged}");
        let left = on_node("node-2", &["ls", "-A", "/var/lib/csi-driver-oci"]).expect("the folder");
        assert_eq!(left.trim(), "lock");
    }));
    kubectl(&["label", "node", "node-2", "type-"]);
    if let Err(failed) = without {
        std::panic::resume_unwind(failed);
    }
    wait_until("the driver", || in_driver("node-2", &["status"]).is_ok());
    let pod = Pod::new("again", &artifact.reference(), "cat /artifact/file").on("node-2");
    assert_eq!(namespace.output(&pod), "x\n");
}

#[test]
#[ignore = "takes minutes: make test-cluster-long"]
fn a_pull_longer_than_the_kubelets_call_tells_how_far_it_is() {
    let namespace = TestNamespace::alone("long");
    let artifact = Artifact::push_large("tests/long", 64 << 20);
    let rate = std::env::var("SLOW_RATE_FILE").expect("the cluster's folder");
    std::fs::write(&rate, "20000").expect("a slower line");
    namespace.run(&Pod::new("reader", &artifact.slow(), "wc -c < /artifact/large"));
    let waited = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        // The kubelet's call ends after two minutes.
        namespace.wait_for_event_within("reader", "the pull goes on", Duration::from_mins(3));
    }));
    std::fs::write(&rate, (100 << 20).to_string()).expect("a faster line");
    let finished = waited.map(|()| namespace.wait_for_phase("reader", "Succeeded"));
    std::fs::write(&rate, (1 << 20).to_string()).expect("the line as it was");
    if let Err(failed) = finished {
        std::panic::resume_unwind(failed);
    }
}
