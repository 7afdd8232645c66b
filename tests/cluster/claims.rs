//! Claims: a volume for each, made by the controller, bound by Kubernetes, mounted by the kubelet.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use crate::support::{
    Artifact, DRIVER_NAMESPACE, TestNamespace, kubectl, object, try_kubectl, upgrade, wait_until,
    wait_until_within,
};

/// A `StorageClass` of one test, which ends with it.
struct Class(String);

impl Class {
    /// Creates a class with these fields, each a line of YAML.
    fn new(namespace: &TestNamespace, name: &str, fields: &str) -> Self {
        let name = format!("{}-{name}", namespace.name);
        namespace.apply(&format!(
            "apiVersion: storage.k8s.io/v1\nkind: StorageClass\nmetadata: {{name: {name}}}\nprovisioner: oci.custom.io\n{fields}\n"
        ));
        Self(name)
    }

    fn of(namespace: &TestNamespace, name: &str, reference: &str) -> Self {
        Self::new(namespace, name, &format!("parameters: {{reference: \"{reference}\"}}"))
    }

    fn claim(&self, name: &str, annotations: &str) -> String {
        claim(name, &self.0, "ReadOnlyMany", annotations)
    }
}

impl Drop for Class {
    fn drop(&mut self) {
        let _ = try_kubectl(&["delete", "storageclass", &self.0, "--ignore-not-found"], "");
    }
}

fn claim(name: &str, class: &str, mode: &str, annotations: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {{name: {name}, annotations: {{{annotations}}}}}\nspec: {{storageClassName: {class}, accessModes: [{mode}], resources: {{requests: {{storage: 1Gi}}}}}}\n"
    )
}

fn reader(name: &str, claim: &str, script: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: docker.io/library/busybox:1.37
      command: ["sh", "-c", "{script}"]
      volumeMounts: [{{name: artifact, mountPath: /artifact}}]
  volumes:
    - name: artifact
      persistentVolumeClaim: {{claimName: {claim}, readOnly: true}}
"#
    )
}

fn phase(namespace: &TestNamespace, claim: &str) -> String {
    namespace.field("persistentvolumeclaim", claim, "{.status.phase}")
}

#[track_caller]
fn wait_for_bound(namespace: &TestNamespace, claim: &str) -> String {
    wait_until(&format!("{claim} to be bound"), || phase(namespace, claim) == "Bound");
    namespace.field("persistentvolumeclaim", claim, "{.spec.volumeName}")
}

fn is_gone(volume: &str) -> bool {
    try_kubectl(&["get", "persistentvolume", volume, "--ignore-not-found", "--output=name"], "")
        .is_ok_and(|found| found.is_empty())
}

#[test]
fn a_claim_is_bound_read_and_let_go() {
    let namespace = TestNamespace::new("claims");
    let artifact = Artifact::push("tests/claims", &[("file", "claimed\n"), ("other", "no")]);
    let fields = format!(
        "parameters: {{reference: \"{}\", exclude: other}}\nmountOptions: [noexec]",
        artifact.reference()
    );
    let class = Class::new(&namespace, "tools", &fields);
    namespace.apply(&class.claim("tool", ""));
    let name = wait_for_bound(&namespace, "tool");
    let volume = object(&["get", "persistentvolume", &name]);
    let uid = namespace.field("persistentvolumeclaim", "tool", "{.metadata.uid}");
    assert_eq!(name, format!("pvc-{uid}"));
    let (metadata, spec) = (&volume["metadata"], &volume["spec"]);
    assert_eq!(metadata["annotations"]["pv.kubernetes.io/provisioned-by"], "oci.custom.io");
    let finalizers = metadata["finalizers"].to_string();
    assert!(finalizers.contains("external-provisioner.volume.kubernetes.io/finalizer"));
    assert_eq!(spec["persistentVolumeReclaimPolicy"], "Delete");
    assert_eq!(spec["csi"]["readOnly"], true);

    // Several pods at once, on any node, and none of them can write or execute.
    for pod in ["one", "two"] {
        let script = "exec 2>&1; cat /artifact/file; ls /artifact; touch /artifact/new || /artifact/file || echo refused";
        namespace.apply(&reader(pod, "tool", script));
        namespace.wait_for_phase(pod, "Succeeded");
        let log = namespace.logs(pod);
        assert!(log.contains("claimed\nfile\n") && log.contains("refused"), "{log}");
    }
    let events = namespace.events("tool");
    for reason in ["Normal Provisioning: ", "Normal ProvisioningSucceeded: "] {
        assert_eq!(events.matches(reason).count(), 1, "{events}");
    }
    assert!(!events.contains("ProvisioningFailed"), "{events}");
    namespace.kubectl(&["delete", "pod", "one", "two"]);
    namespace.kubectl(&["delete", "persistentvolumeclaim", "tool", "--timeout=60s"]);
    wait_until("the volume to be gone", || is_gone(&name));
}

#[test]
fn a_retained_volume_stays_and_any_access_mode_can_be_allowed() {
    let namespace = TestNamespace::new("retained");
    let artifact = Artifact::push("tests/retained", &[("file", "kept\n")]);
    let fields = format!(
        "parameters: {{reference: \"{}\", allowAnyAccessMode: \"true\"}}\nreclaimPolicy: Retain",
        artifact.reference()
    );
    let class = Class::new(&namespace, "kept", &fields);
    namespace.apply(&claim("tool", &class.0, "ReadWriteOnce", ""));
    let name = wait_for_bound(&namespace, "tool");
    namespace.apply(&reader(
        "reader",
        "tool",
        "cat /artifact/file; touch /artifact/new || echo refused",
    ));
    namespace.wait_for_phase("reader", "Succeeded");
    let log = namespace.logs("reader");
    assert!(log.contains("kept\n") && log.contains("refused"), "{log}");
    namespace.delete_pod("reader");
    namespace.kubectl(&["delete", "persistentvolumeclaim", "tool", "--timeout=60s"]);
    let phase =
        || kubectl(&["get", "persistentvolume", &name, "--output=jsonpath={.status.phase}"]);
    wait_until("the volume to be released", || phase() == "Released");
    // The administrator decides, and nothing holds the volume then.
    kubectl(&["delete", "persistentvolume", &name, "--timeout=60s"]);
}

#[test]
fn a_stateful_set_has_claims_of_its_own_with_the_teams_secret() {
    let namespace = TestNamespace::new("stateful");
    let artifact = Artifact::push("tests/stateful", &[("file", "of the set\n")]);
    namespace.pull_secret("credentials", "correct-password");
    let class = Class::new(
        &namespace,
        "annotated",
        "volumeBindingMode: WaitForFirstConsumer\nparameters: {allowedRepositories: private.example.com/tests, csi.storage.k8s.io/node-publish-secret-name: credentials, csi.storage.k8s.io/node-publish-secret-namespace: \"${pvc.namespace}\"}",
    );
    namespace.apply(&format!(
        r#"
apiVersion: apps/v1
kind: StatefulSet
metadata: {{name: web}}
spec:
  serviceName: web
  replicas: 2
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
        - name: main
          image: docker.io/library/busybox:1.37
          command: ["sh", "-c", "cat /artifact/file; trap exit TERM; while :; do sleep 3600 & wait $!; done"]
          volumeMounts: [{{name: artifact, mountPath: /artifact, readOnly: true}}]
  volumeClaimTemplates:
    - metadata:
        name: artifact
        annotations: {{oci.custom.io/reference: "{}"}}
      spec: {{storageClassName: {}, accessModes: [ReadOnlyMany], resources: {{requests: {{storage: 1Gi}}}}}}
"#,
        artifact.private(),
        class.0
    ));
    namespace.kubectl(&["rollout", "status", "statefulset/web", "--timeout=120s"]);
    for pod in ["web-0", "web-1"] {
        assert_eq!(namespace.logs(pod), "of the set\n");
        wait_for_bound(&namespace, &format!("artifact-{pod}"));
    }
    // Another repository of the same registry is not the class's.
    let annotation = "oci.custom.io/reference: private.example.com/other/tool:v1";
    namespace.apply(&class.claim("other", annotation));
    namespace.apply(&reader("reader", "other", "true"));
    namespace.wait_for_event("other", "ProvisioningFailed: ");
    assert!(namespace.events("other").contains("allowedRepositories"));
}

#[test]
fn a_claim_that_cannot_be_served_says_why_and_is_served_when_it_can_be() {
    let namespace = TestNamespace::new("refused-claims");
    let artifact = Artifact::push("tests/refused-claims", &[("file", "one\n")]);
    let good = Class::of(&namespace, "good", &artifact.reference());
    let misspelt = Class::new(
        &namespace,
        "misspelt",
        &format!("parameters: {{refrence: \"{}\"}}", artifact.reference()),
    );
    let missing = "registry.example.com/tests/refused-claims:v2";
    let absent = Class::of(&namespace, "absent", missing);
    let waiting = Class::new(
        &namespace,
        "waiting",
        &format!(
            "volumeBindingMode: WaitForFirstConsumer\nparameters: {{reference: \"{}\"}}",
            artifact.reference()
        ),
    );
    namespace.apply(&claim("written", &good.0, "ReadWriteOnce", ""));
    namespace.apply(&misspelt.claim("misspelt", ""));
    namespace.apply(&absent.claim("absent", ""));
    namespace.apply(&absent.claim("classless", ""));
    namespace.apply(&waiting.claim("waiting", ""));
    for (claim, text) in [
        ("written", "the access mode ReadWriteOnce is not ReadOnlyMany"),
        ("misspelt", "the parameter \"refrence\" is not known: use reference"),
        ("absent", "no manifest v2 of registry.example.com/tests/refused-claims"),
        ("classless", "no manifest v2 of registry.example.com/tests/refused-claims"),
    ] {
        let events = namespace.wait_for_event(claim, "Warning ProvisioningFailed: ");
        assert!(events.contains(text), "{claim}: {events}");
        assert_eq!(phase(&namespace, claim), "Pending");
    }
    assert!(!namespace.events("waiting").contains("ProvisioningFailed"));

    // The class goes, while the claim waits for the artifact.
    drop(absent);
    namespace.wait_for_event("classless", "there is no StorageClass");
    let _absent = Class::of(&namespace, "absent", missing);
    Artifact::push_tag("tests/refused-claims", "v2", &[("file", "two\n")]);
    for claim in ["absent", "classless"] {
        wait_for_bound(&namespace, claim);
    }
    // A class of the same name with the right parameters serves the claim.
    drop(misspelt);
    let _mended = Class::of(&namespace, "misspelt", &artifact.reference());
    wait_for_bound(&namespace, "misspelt");
    assert_eq!(phase(&namespace, "waiting"), "Pending");
    namespace.apply(&reader("reader", "waiting", "cat /artifact/file"));
    namespace.wait_for_phase("reader", "Succeeded");
    assert_eq!(namespace.logs("reader"), "one\n");
}

#[test]
fn a_namespace_has_so_many_claims_and_no_more() {
    let namespace = TestNamespace::new("many-claims");
    let artifact = Artifact::push("tests/many-claims", &[("file", "one\n")]);
    let class = Class::of(&namespace, "tools", &artifact.reference());
    let mut all = String::new();
    // The values of the harness allow eight.
    for number in 0..9 {
        let _ = write!(all, "{}", class.claim(&format!("tool-{number}"), ""));
    }
    namespace.apply(&all);
    let phases = || (0..9).map(|number| phase(&namespace, &format!("tool-{number}")));
    let bound = || phases().filter(|phase| phase == "Bound").count();
    wait_until("eight bound claims", || bound() == 8);
    let last = (0..9).map(|number| format!("tool-{number}"));
    let last = last.clone().find(|claim| phase(&namespace, claim) == "Pending").expect("one waits");
    namespace.wait_for_event(&last, "has 9 claims of oci.custom.io, of which the oldest 8 count");
    let served = if last == "tool-0" { "tool-1" } else { "tool-0" };
    namespace.kubectl(&["delete", "persistentvolumeclaim", served, "--timeout=60s"]);
    wait_for_bound(&namespace, &last);
}

#[test]
fn claims_are_served_when_the_leader_is_killed() {
    let namespace = TestNamespace::alone("claims-leader");
    let artifact = Artifact::push("tests/claims-leader", &[("file", "one\n")]);
    let class = Class::of(&namespace, "tools", &artifact.reference());
    let lease =
        ["get", "lease", "csi-driver-oci-fleet", "--output=jsonpath={.spec.holderIdentity}"];
    let in_driver =
        |arguments: &[&str]| kubectl(&[&["--namespace", DRIVER_NAMESPACE], arguments].concat());
    let leader = in_driver(&lease);
    let mut all = String::new();
    for number in 0..8 {
        let _ = write!(all, "{}", class.claim(&format!("tool-{number}"), ""));
    }
    namespace.apply(&all);
    in_driver(&["delete", "pod", &leader, "--force", "--grace-period=0"]);
    let names: std::collections::BTreeSet<_> =
        (0..8).map(|number| wait_for_bound(&namespace, &format!("tool-{number}"))).collect();
    assert_eq!(names.len(), 8);
    let volumes = object(&["get", "persistentvolumes"]);
    let of_test = volumes["items"].as_array().expect("a list").iter();
    let of_test =
        of_test.filter(|volume| volume["spec"]["claimRef"]["namespace"] == *namespace.name);
    assert_eq!(of_test.count(), 8, "one volume for each claim");
    in_driver(&["rollout", "status", "deployment/csi-driver-oci-fleet", "--timeout=120s"]);
}

#[test]
#[ignore = "takes minutes: make test-cluster-long"]
fn a_thousand_claims_at_once_are_served() {
    const CLAIMS: usize = 1000;
    const LONG: Duration = Duration::from_mins(8);
    let namespace = TestNamespace::alone("thousand-claims");
    let artifact = Artifact::push("tests/thousand-claims", &[("file", "one\n")]);
    upgrade(&["--set=provisioner.maxClaimsPerNamespace=0"], || {
        let class = Class::of(&namespace, "tools", &artifact.reference());
        let mut all = String::new();
        for number in 0..CLAIMS {
            let _ = write!(all, "{}", class.claim(&format!("tool-{number}"), ""));
        }
        let begun = Instant::now();
        namespace.apply(&all);
        let applied = begun.elapsed();
        let format = "--output=jsonpath={range .items[*]}{.status.phase}{\"\\n\"}{end}";
        let bound = || {
            let phases = namespace.kubectl(&["get", "persistentvolumeclaims", format]);
            phases.lines().filter(|phase| *phase == "Bound").count()
        };
        let all_bound = || format!("{CLAIMS} bound claims, of which {} are", bound());
        wait_until_within(LONG, || bound() == CLAIMS, all_bound);
        println!("{CLAIMS} claims: applied in {applied:?}, bound after {:?}", begun.elapsed());
        namespace.kubectl(&["delete", "persistentvolumeclaims", "--all", "--timeout=300s"]);
        let left = || {
            let volumes = object(&["get", "persistentvolumes"]);
            let all = volumes["items"].as_array().expect("a list").iter();
            all.filter(|volume| volume["spec"]["claimRef"]["namespace"] == *namespace.name).count()
        };
        wait_until_within(LONG, || left() == 0, || format!("the end of {} volumes", left()));
        println!("all volumes deleted after {:?}", begun.elapsed());
    });
}
