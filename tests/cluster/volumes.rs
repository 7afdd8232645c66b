//! Volumes in pods: their content, and that no pod can change it for another.

use std::{fs, path::Path};

use crate::support::{
    Artifact, NODES, Pod, TestNamespace, in_driver, object, on_node, push_perl, run, upgrade,
    wait_until,
};

const FILES: [(&str, &str); 3] =
    [("bin/tool", "#!/bin/sh\necho it runs\n"), ("etc/settings", "a=1\n"), ("data/a/b", "deep\n")];

/// The commands of a hostile pod on a file and its folder. Each may fail, and most do.
const ATTACK: &str = r#"
cd /artifact
try() { if $@ 2>/dev/null; then echo done: $@; fi; }
# setxattr(2), whose strings have to be variables.
attribute() {
    perl -e '
        $call = `uname -m` =~ /x86_64/ ? 188 : 5;
        ($path, $value, @names) = ($ARGV[0], "evil", "user.evil", "trusted.evil", "security.evil");
        for (@names) {
            print "done: $_\n" if syscall($call, $path, $_, $value, 4, 0) == 0;
        }
    ' $1
}
try mount -o remount,rw /artifact
try mount -o remount,bind,rw /artifact
attack() {
    (echo evil >> bin/tool) 2>/dev/null && echo done: append
    (echo evil > etc/settings) 2>/dev/null && echo done: truncate
    (echo evil > new) 2>/dev/null && echo done: create
    try chmod 777 bin/tool
    try chown 1234 etc/settings
    try touch -d 2001-01-01 data/a/b
    try ln bin/tool hard
    try ln -s /etc/passwd soft
    try mv data/a data/c
    try mkdir folder
    try mknod device c 1 3
    try chattr +i bin/tool
    try chattr -i bin/tool
    attribute bin/tool
    attribute data
    try rm -rf etc bin data
}
attack
mkdir -p /tmp/other
if mount --bind /artifact /tmp/other 2>/dev/null; then
    mount -o remount,bind,rw /tmp/other 2>/dev/null
    cd /tmp/other
    attack
fi
echo the attack is over
"#;

/// Takes a write lease on each named file, and keeps it when another process opens the file, until the kernel ends it.
const LEASES: &str = r#"
$SIG{IO} = "IGNORE";
for (@ARGV) {
    open($file, "<", $_) or die "$_: $!";
    push @files, $file;
    # F_SETLEASE, F_WRLCK
    print fcntl($file, 1024, 1) ? "leased $_\n" : "refused $_\n";
}
sleep 1 while 1;
"#;

const READ: &str = "cd /artifact && find . -type f | sort | xargs sha256sum && find . | sort | xargs stat -c '%n %a %u %g'";

const SECURITIES: [(&str, &str); 3] = [
    ("plain", "{runAsUser: 0}"),
    ("capable", "{runAsUser: 0, capabilities: {add: [ALL]}}"),
    ("privileged", "{runAsUser: 0, privileged: true}"),
];

/// Runs a hostile pod for each selected combination of rights and `readOnly`, and compares the volume of the next pod
/// with that of the pod before.
#[track_caller]
fn attack(
    namespace: &TestNamespace,
    artifact: &Artifact,
    is_asked: impl Fn(&str, Option<bool>) -> bool,
) {
    let read =
        |name: &str| namespace.output(&Pod::new(name, &artifact.reference(), READ).on("node-1"));
    let before = read("before");
    assert_eq!(before.matches("bin/tool").count(), 2, "{before}");
    let choices = [None, Some(false), Some(true)];
    let letter = |value: Option<bool>| value.map_or("none", |is| if is { "yes" } else { "no" });
    let (image, mut names) = (push_perl(), Vec::new());
    for (name, security) in SECURITIES {
        for (volume, mount) in
            choices.into_iter().flat_map(|volume| choices.map(|mount| (volume, mount)))
        {
            if is_asked(name, volume) {
                let name = format!("{name}-{}-{}", letter(volume), letter(mount));
                let mut pod = Pod::new(&name, &artifact.reference(), ATTACK).on("node-1");
                pod.image.clone_from(&image);
                (pod.security, pod.volume_read_only, pod.mount_read_only) =
                    (security, volume, mount);
                namespace.run(&pod);
                names.push(name);
            }
        }
    }
    for name in &names {
        namespace.wait_for_phase(name, "Succeeded");
        let log = namespace.logs(name);
        let is_change = |line: &&str| line.starts_with("done:") && !line.contains("mount");
        let changes: Vec<_> = log.lines().filter(is_change).collect();
        assert!(log.contains("the attack is over") && changes.is_empty(), "{name}: {log}");
    }
    assert_eq!(read("after"), before, "what the pods left");
    let verified = in_driver("node-1", &["verify"]).expect("what is on the node is whole");
    assert!(verified.contains(", 0 findings"), "{verified}");
}

#[test]
fn a_pod_that_writes_changes_nothing_for_the_next_one() {
    let namespace = TestNamespace::new("writing-pods");
    let artifact = Artifact::push("tests/writing", &FILES);
    // With `readOnly: true` it is a bind, whose flag CAP_SYS_ADMIN can clear: see docs/security.md.
    attack(&namespace, &artifact, |security, volume| security == "plain" || volume != Some(true));
}

#[test]
fn with_overlays_no_capability_helps_a_pod_to_write() {
    let namespace = TestNamespace::alone("overlays");
    let artifact = Artifact::push("tests/overlays", &FILES);
    upgrade(&["--set=config.volumes.mount=Overlay"], || {
        attack(&namespace, &artifact, |_, volume| volume == Some(true));
    });
}

#[test]
fn a_file_that_a_pod_wrote_through_its_read_only_bind_is_fetched_again() {
    let namespace = TestNamespace::alone("rewritten");
    let artifact = Artifact::push("tests/rewritten", &FILES);
    let script =
        "mount -o remount,bind,rw /artifact && echo evil >> /artifact/bin/tool && echo written";
    let mut writer = Pod::new("writer", &artifact.reference(), script).on("node-1");
    writer.security = SECURITIES[1].1;
    assert_eq!(namespace.output(&writer), "written\n", "what docs/security.md says is possible");
    // Another tree of the same files.
    let mut reader =
        Pod::new("reader", &artifact.reference(), "cat /artifact/bin/tool").on("node-1");
    reader.attributes.push(("exclude", "data/**".into()));
    assert_eq!(namespace.output(&reader), FILES[0].1);
    // The first tree keeps the damaged file until it is found and repaired.
    let _ = in_driver("node-1", &["verify"]);
    let verified = in_driver("node-1", &["verify"]).expect("what is on the node is whole");
    assert!(verified.contains(", 0 findings"), "{verified}");
    let again = Pod::new("again", &artifact.reference(), "cat /artifact/bin/tool").on("node-1");
    assert_eq!(namespace.output(&again), FILES[0].1);
}

#[test]
#[ignore = "takes minutes: make test-cluster-long"]
fn leases_of_a_pod_delay_the_next_one_at_most_and_the_charts_default_refuses_them() {
    let namespace = TestNamespace::alone("leases");
    let artifact = Artifact::push("tests/leases", &FILES[..1]);
    let script = format!("exec perl -e '$| = 1; {LEASES}' /artifact/bin/tool");
    let image = push_perl();
    let lease = |name: &str, expected: &str| {
        let mut holder = Pod::new(name, &artifact.reference(), &script).on("node-1");
        holder.image.clone_from(&image);
        holder.security = SECURITIES[0].1;
        namespace.run(&holder);
        wait_until("an answer to the lease", || namespace.logs(name).contains("bin/tool\n"));
        assert_eq!(namespace.logs(name), expected);
    };
    lease("holder", "leased /artifact/bin/tool\n");
    let reader = Pod::new("reader", &artifact.reference(), "cat /artifact/bin/tool").on("node-1");
    assert_eq!(namespace.output(&reader), FILES[0].1);
    // A file that is open elsewhere gives no write lease, whatever the setting is.
    namespace.delete_pod("holder");
    lease("again", "leased /artifact/bin/tool\n");
    let verified = in_driver("node-1", &["verify"]).expect("what is on the node is whole");
    assert!(verified.contains(", 0 findings"), "{verified}");
    namespace.delete_pod("again");

    let setting = "/proc/sys/fs/leases-enable";
    let before = on_node("node-1", &["cat", setting]).expect("the setting");
    upgrade(&["--set=node.leases=Disable"], || {
        lease("refused", "refused /artifact/bin/tool\n");
    });
    // The setting of this machine.
    let script = format!("echo {} > {setting}", before.trim());
    on_node("node-1", &["sh", "-c", &script]).expect("the setting as it was");
}

#[test]
fn every_example_runs_as_it_is() {
    let namespace = TestNamespace::new("examples");
    let tool = Artifact::push("team/tool", &FILES);
    Artifact::push_tag(
        "models/example",
        "q4",
        &[("model.gguf", "GGUF"), ("tokenizer.json", "{}"), ("README.md", "no")],
    );
    Artifact::push("models/chat", &[("config.json", "{}"), ("model.safetensors", "weights")]);
    for (name, tag) in [("models/detector", "v3"), ("models/classifier", "v7")] {
        Artifact::push_tag(name, tag, &[("config.pbtxt", "backend: x"), ("1/model.onnx", "ONNX")]);
    }
    Artifact::push_tag("models/base", "v3", &[("config.json", "{}"), ("README.md", "no")]);
    Artifact::push_tag("models/adapter", "v7", &[("adapter.json", "{}")]);
    Artifact::push("team/tools", &[("usr/local/bin/tool", "tool")]);
    Artifact::push("filters/headers", &[("filter.wasm", "\0asm")]);
    namespace.kubectl(&[
        "create",
        "secret",
        "docker-registry",
        "registry-credentials",
        "--docker-server=registry.example.com",
        "--docker-username=robot",
        "--docker-password=any",
    ]);
    let nobody = format!("sha256:{}", "0".repeat(64));
    let example = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name);
        // The one part that users have to fill in.
        fs::read_to_string(path).expect("an example").replace(&nobody, &tool.digest)
    };
    for (file, pod, says) in [
        ("pod-inline.yaml", "artifact-inline", "/artifact/bin/busybox"),
        ("pinned-digest.yaml", "artifact-pinned", "/artifact/bin/tool"),
        ("private-registry.yaml", "artifact-private", "/artifact/etc/settings"),
        ("user-namespace.yaml", "artifact-user-namespace", " 0        0 "),
        ("claim.yaml", "artifact-claimed", "/artifact/bin/tool"),
        ("several-artifacts.yaml", "several-artifacts", "/content/tools/tool"),
    ] {
        namespace.apply(&example(file));
        namespace.wait_for_phase(pod, "Succeeded");
        let log = namespace.logs(pod);
        assert!(log.contains(says), "{file}: {log}");
    }
    // The nodes of the tests have no accelerator, and less of all else than model servers ask for.
    let is_kept = |line: &&str| {
        let line = line.trim_start();
        !line.starts_with("requests: {") && !line.starts_with("limits: {")
    };
    for (file, object) in [
        ("models/llama-cpp.yaml", "deployment/llama-cpp"),
        ("models/vllm.yaml", "deployment/vllm"),
        ("models/triton.yaml", "deployment/triton"),
        ("warm-daemonset.yaml", "daemonset/artifact-warm"),
    ] {
        let text = example(file);
        let lines: Vec<_> = text.lines().filter(is_kept).collect();
        namespace.apply(&lines.join("\n"));
        namespace.kubectl(&["rollout", "status", object, "--timeout=120s"]);
    }
    namespace.apply(&example("wasm.yaml"));
    namespace.wait_for_ready("wasm-proxy");
    namespace.kubectl(&["label", "--overwrite", "nodes", "node-1", "pool=tools"]);
    namespace.apply(&example("preload.yaml"));
    namespace.kubectl(&["wait", "artifactpreload/tool", "--for=condition=Ready", "--timeout=120s"]);
    assert_eq!(namespace.field("artifactpreload", "tool", "{.status.ready}"), "1");
    namespace.kubectl(&["label", "nodes", "node-1", "pool-"]);
    let tested = [
        "pod-inline",
        "pinned-digest",
        "private-registry",
        "user-namespace",
        "models/llama-cpp",
        "models/vllm",
        "models/triton",
        // KServe is not in this cluster. check.py validates them.
        "models/kserve-pvc",
        "models/kserve-serving-runtime",
        "warm-daemonset",
        "wasm",
        "claim",
        "several-artifacts",
        "preload",
        // In tests of their own.
        "pv-pvc",
        "follow-a-tag",
    ];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let entries = [folder.clone(), folder.join("models")].map(fs::read_dir);
    for entry in entries.into_iter().flat_map(|entries| entries.expect("the examples")) {
        let path = entry.expect("an example").path();
        let name = path.strip_prefix(&folder).expect("a name").with_extension("");
        let name = name.to_string_lossy();
        let is_tested = tested.contains(&&*name);
        assert!(
            path.extension().is_none_or(|end| end != "yaml") || is_tested,
            "{name} is run by no test"
        );
    }
}

#[test]
fn prometheus_runs_from_a_persistent_volume() {
    let namespace = TestNamespace::new("persistent");
    let folder = tempfile::TempDir::new().expect("a folder");
    let script = format!(
        r#"
cd '{}'
program="$(command -v prometheus)"
real="$(sed -n 's/.* exec \(.*\) "$@"$/\1/p' "$program" | head -n 1)"
mkdir -p artifact/bin artifact/config image
cp "${{real:-$program}}" artifact/bin/prometheus
echo 'global: {{}}' > artifact/config/prometheus.yml
ldd artifact/bin/prometheus | grep -o '/[^ ]*' | xargs -I '{{}}' cp --dereference --parents '{{}}' image
tar -C image -cf image.tar .
crane append --oci-empty-base --new_layer image.tar --new_tag gcr.io/distroless/static-debian12:nonroot
crane mutate gcr.io/distroless/static-debian12:nonroot --user 65532:65532 --tag gcr.io/distroless/static-debian12:nonroot
"#,
        folder.path().display()
    );
    run("bash", &["-euc", &script], "").expect("an image with the libraries of Prometheus");
    Artifact::push_folder(
        "prometheus-custom",
        "v1",
        &folder.path().join("artifact"),
        &["bin", "config"],
    );
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/pv-pvc.yaml");
    let text = fs::read_to_string(example).expect("the example");
    // The namespace of the test in place of `default`.
    let text = text.replace("namespace: default", &format!("namespace: {}", namespace.name));
    namespace.apply(&text);
    namespace.wait_for_ready("prometheus");
    let mounts =
        namespace.kubectl(&["exec", "prometheus", "--", "/artifact/bin/prometheus", "--version"]);
    assert!(mounts.contains("prometheus, version"), "{mounts}");
    namespace.delete_pod("prometheus");
    namespace.kubectl(&["delete", "pvc", "prometheus-artifact"]);
    namespace.kubectl(&["delete", "pv", "prometheus-artifact"]);
}

#[test]
fn several_containers_see_parts_of_one_volume() {
    let namespace = TestNamespace::new("parts");
    let artifact = Artifact::push("tests/parts", &FILES);
    namespace.apply(&format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: parts}}
spec:
  restartPolicy: Never
  initContainers:
    - name: init
      image: docker.io/library/busybox:1.37
      command: ["sh", "-c", "/artifact/bin/tool > /shared/init"]
      volumeMounts:
        - {{name: artifact, mountPath: /artifact, readOnly: true}}
        - {{name: shared, mountPath: /shared}}
  containers:
    - name: part
      image: docker.io/library/busybox:1.37
      command: ["sh", "-c", "cat /settings /deep/b /shared/init"]
      env: [{{name: FOLDER, value: data/a}}]
      volumeMounts:
        - {{name: artifact, mountPath: /settings, subPath: etc/settings, readOnly: true}}
        - {{name: artifact, mountPath: /deep, subPathExpr: $(FOLDER), readOnly: true}}
        - {{name: shared, mountPath: /shared}}
    - name: whole
      image: docker.io/library/busybox:1.37
      command: ["/artifact/bin/tool"]
      volumeMounts:
        - {{name: artifact, mountPath: /artifact}}
  volumes:
    - name: shared
      emptyDir: {{}}
    - name: artifact
      csi: {{driver: oci.custom.io, readOnly: true, volumeAttributes: {{reference: "{}"}}}}
"#,
        artifact.reference()
    ));
    namespace.wait_for_phase("parts", "Succeeded");
    assert_eq!(namespace.kubectl(&["logs", "parts", "--container=part"]), "a=1\ndeep\nit runs\n");
    assert_eq!(namespace.kubectl(&["logs", "parts", "--container=whole"]), "it runs\n");
}

#[test]
fn a_pod_without_root_reads_and_executes() {
    let namespace = TestNamespace::new("users");
    let artifact = Artifact::push("tests/users", &FILES);
    let mut pod = Pod::new(
        "user",
        &artifact.reference(),
        "id -u; /artifact/bin/tool; touch /x || echo a read-only root",
    );
    pod.security = "{runAsUser: 1234, runAsGroup: 1234, readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}";
    pod.spec = "securityContext: {fsGroup: 4321}".into();
    assert_eq!(
        namespace
            .output(&pod)
            .lines()
            .filter(|line| !line.starts_with("touch"))
            .collect::<Vec<_>>(),
        ["1234", "it runs", "a read-only root"]
    );
}

#[test]
fn jobs_sets_and_deployments_roll() {
    let namespace = TestNamespace::new("workloads");
    let first = Artifact::push("tests/rolling", &[("version", "one\n")]);
    Artifact::push_tag("tests/rolling", "v2", &[("version", "two\n")]);
    let template = |restart: &str, command: &str, tag: &str| {
        format!(
            r#"
    metadata: {{labels: {{app: rolling}}}}
    spec:
      restartPolicy: {restart}
      terminationGracePeriodSeconds: 1
      containers:
        - name: main
          image: docker.io/library/busybox:1.37
          command: ["sh", "-c", "{command}"]
          volumeMounts: [{{name: artifact, mountPath: /artifact, readOnly: true}}]
      volumes:
        - name: artifact
          csi: {{driver: oci.custom.io, readOnly: true, volumeAttributes: {{reference: "registry.example.com/{}:{tag}"}}}}
"#,
            first.repository
        )
    };
    let stay = "cat /artifact/version; trap exit TERM; while :; do sleep 3600 & wait $!; done";
    let workload = |kind: &str, more: &str, tag: &str| {
        format!(
            "apiVersion: apps/v1\nkind: {kind}\nmetadata: {{name: rolling}}\nspec:\n  replicas: 3\n  {more}\n  selector: {{matchLabels: {{app: rolling}}}}\n  template:{}",
            template("Always", stay, tag)
        )
    };
    namespace.apply(&format!(
        "apiVersion: batch/v1\nkind: Job\nmetadata: {{name: once}}\nspec:\n  completions: 4\n  parallelism: 2\n  template:{}",
        template("Never", "cat /artifact/version", "v1").replace("app: rolling", "app: once")
    ));
    namespace.kubectl(&["wait", "job/once", "--for=condition=Complete", "--timeout=120s"]);
    for (kind, more) in
        [("Deployment", "strategy: {type: RollingUpdate}"), ("StatefulSet", "serviceName: rolling")]
    {
        for (tag, says) in [("v1", "one"), ("v2", "two")] {
            namespace.apply(&workload(kind, more, tag));
            namespace.kubectl(&["rollout", "status", &format!("{kind}/rolling"), "--timeout=120s"]);
            let selected =
                object(&["--namespace", &namespace.name, "get", "pods", "--selector=app=rolling"]);
            let running: Vec<_> = selected["items"]
                .as_array()
                .expect("pods")
                .iter()
                .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
                .map(|pod| pod["metadata"]["name"].as_str().expect("a name").to_owned())
                .collect();
            assert_eq!(running.len(), 3, "{running:?}");
            for pod in running {
                assert_eq!(namespace.logs(&pod).trim(), says, "{kind} {pod}");
            }
        }
        namespace.kubectl(&["delete", kind, "rolling", "--cascade=foreground", "--timeout=120s"]);
    }
}

#[test]
fn a_volume_is_gone_from_the_node_with_its_pod() {
    let namespace = TestNamespace::new("unmounted");
    let artifact = Artifact::push("tests/unmounted", &FILES);
    for name in NODES {
        let pod = Pod::holding(&format!("on-{name}"), &artifact.reference()).on(name);
        namespace.run(&pod);
        namespace.wait_for_phase(&pod.name, "Running");
        let uid = namespace.field("pod", &pod.name, "{.metadata.uid}");
        let mounts = || on_node(name, &["cat", "/proc/self/mountinfo"]).expect("mounts");
        assert!(mounts().contains(&uid), "the volume is mounted on {name}");
        namespace.delete_pod(&pod.name);
        wait_until("the volume's unmount", || !mounts().contains(&uid));
    }
}
