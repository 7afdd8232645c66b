//! Namespaces of tests, commands, and waiting for states of Kubernetes.

mod artifacts;
mod nodes;

use std::{
    fmt::Write as _,
    io::Write as _,
    process::{Command, Stdio},
    sync::{
        OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU32, Ordering},
    },
    thread::{panicking, sleep},
    time::{Duration, Instant},
};

use serde_json::Value;

pub use artifacts::{Artifact, push_perl, push_standard_images};
pub use nodes::{
    DRIVER_NAMESPACE, NODES, driver_log, driver_pod, in_driver, node, on_node, release,
    restart_driver, upgrade,
};

/// The longest wait for a state of Kubernetes. Two cores run the whole cluster.
pub const PATIENCE: Duration = Duration::from_mins(2);

/// Held shared by tests that leave nodes and driver alone, and exclusively by the others.
static CLUSTER: RwLock<()> = RwLock::new(());

/// Warnings about the driver before any test. The pods that tests replace give others as they end.
static FIRST_WARNINGS: OnceLock<String> = OnceLock::new();

enum Use {
    Shared {
        _guard: RwLockReadGuard<'static, ()>,
    },
    Alone {
        _guard: RwLockWriteGuard<'static, ()>,
    },
    /// The test's first namespace holds the lock.
    OfAnother,
}

/// A namespace of one test, deleted with its contents when the test ends. When the test fails, it prints the state of
/// Kubernetes and the nodes first.
pub struct TestNamespace {
    pub name: String,
    _use: Use,
}

impl TestNamespace {
    /// Creates a namespace of a test that runs beside others.
    pub fn new(name: &str) -> Self {
        let guard = CLUSTER.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        Self::create(name, Use::Shared { _guard: guard })
    }

    /// Creates a namespace of a test that runs alone.
    pub fn alone(name: &str) -> Self {
        let guard = CLUSTER.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        Self::create(name, Use::Alone { _guard: guard })
    }

    /// Creates a second namespace of the same test, which ends before the first one.
    pub fn another(&self, name: &str) -> Self {
        Self::create(name, Use::OfAnother)
    }

    fn create(name: &str, r#use: Use) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        FIRST_WARNINGS.get_or_init(|| {
            let kubeconfig = std::env::var_os("KUBECONFIG");
            assert!(
                kubeconfig.is_some() && std::env::var_os("CLUSTER_LOGS").is_some(),
                "these tests need their cluster: make test-cluster"
            );
            push_standard_images();
            kubectl(&[
                "--namespace",
                DRIVER_NAMESPACE,
                "get",
                "events",
                "--field-selector=type=Warning",
                "--output=jsonpath={range .items[*]}{.involvedObject.name} {.reason}: {.message}{\"\\n\"}{end}",
            ])
        });
        let name = format!("{name}-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        kubectl(&["create", "namespace", &name]);
        // Pods are refused until their namespace has the first, and warned about without the second.
        for object in ["serviceaccount/default", "configmap/kube-root-ca.crt"] {
            wait_until(object, || try_kubectl(&["--namespace", &name, "get", object], "").is_ok());
        }
        Self { name, _use: r#use }
    }

    /// Warnings about the driver from its start to the first test.
    pub fn first_warnings(&self) -> &'static str {
        FIRST_WARNINGS.get().expect("a namespace comes later")
    }

    /// Runs kubectl in this namespace.
    #[track_caller]
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        kubectl(&self.within(arguments))
    }

    /// Runs kubectl in this namespace. The command may fail.
    pub fn try_kubectl(&self, arguments: &[&str], input: &str) -> Result<String, String> {
        try_kubectl(&self.within(arguments), input)
    }

    fn within<'a>(&'a self, arguments: &[&'a str]) -> Vec<&'a str> {
        [&["--namespace", self.name.as_str()], arguments].concat()
    }

    /// Applies objects, strictly and without a warning.
    #[track_caller]
    pub fn apply(&self, yaml: &str) {
        self.try_apply(yaml).unwrap_or_else(|error| panic!("{error}\n{yaml}"));
    }

    /// Applies objects. Returns the API server's error.
    pub fn try_apply(&self, yaml: &str) -> Result<String, String> {
        let arguments =
            ["apply", "--server-side", "--validate=strict", "--warnings-as-errors", "--filename=-"];
        self.try_kubectl(&arguments, yaml)
    }

    /// Applies a pod of one container with busybox and one volume of the driver.
    #[track_caller]
    pub fn run(&self, pod: &Pod) {
        self.apply(&pod.yaml());
    }

    /// Runs a pod to its end and returns its log.
    #[track_caller]
    pub fn output(&self, pod: &Pod) -> String {
        self.run(pod);
        self.wait_for_phase(&pod.name, "Succeeded");
        self.logs(&pod.name)
    }

    /// Waits until a pod has this phase. Fails at once if it has ended with another one.
    #[track_caller]
    pub fn wait_for_phase(&self, pod: &str, phase: &str) {
        let mut seen = String::new();
        wait_until_with(
            || {
                seen = self.field("pod", pod, "{.status.phase}");
                let over = seen == "Failed" || seen == "Succeeded";
                assert!(
                    !over || seen == phase,
                    "{pod} is {seen} and not {phase}: {}",
                    self.logs(pod)
                );
                seen == phase
            },
            || format!("{pod} to be {phase}"),
        );
    }

    /// Waits until a pod is ready.
    #[track_caller]
    pub fn wait_for_ready(&self, pod: &str) {
        self.kubectl(&["wait", &format!("pod/{pod}"), "--for=condition=Ready", "--timeout=120s"]);
    }

    /// Waits for an event of an object that contains this text, and returns all its events.
    #[track_caller]
    pub fn wait_for_event(&self, object: &str, text: &str) -> String {
        self.wait_for_event_within(object, text, PATIENCE)
    }

    #[track_caller]
    pub fn wait_for_event_within(&self, object: &str, text: &str, patience: Duration) -> String {
        let mut last = String::new();
        wait_until_within(
            patience,
            || {
                last = self.events(object);
                last.contains(text)
            },
            || format!("an event of {object} with {text:?}"),
        );
        last
    }

    /// Returns reason and message of each event of an object.
    pub fn events(&self, object: &str) -> String {
        let selector = format!("--field-selector=involvedObject.name={object}");
        let format =
            "--output=jsonpath={range .items[*]}{.type} {.reason}: {.message}{\"\\n\"}{end}";
        self.try_kubectl(&["get", "events", &selector, format], "").unwrap_or_default()
    }

    /// Returns a field of an object; empty if there is none.
    pub fn field(&self, kind: &str, name: &str, path: &str) -> String {
        let format = format!("--output=jsonpath={path}");
        self.try_kubectl(&["get", kind, name, &format], "").unwrap_or_default()
    }

    pub fn logs(&self, pod: &str) -> String {
        self.try_kubectl(&["logs", pod, "--all-containers"], "").unwrap_or_else(|error| error)
    }

    /// Deletes a pod and waits until it is gone, with its volumes.
    #[track_caller]
    pub fn delete_pod(&self, pod: &str) {
        self.kubectl(&["delete", "pod", pod, "--timeout=120s"]);
    }

    /// Creates a secret for `private.example.com`.
    #[track_caller]
    pub fn pull_secret(&self, name: &str, password: &str) {
        let arguments = [
            "create",
            "secret",
            "docker-registry",
            name,
            "--docker-server=private.example.com",
            "--docker-username=robot",
            &format!("--docker-password={password}"),
            "--dry-run=client",
            "--output=yaml",
        ];
        let secret = self.kubectl(&arguments);
        self.try_kubectl(&["apply", "--filename=-"], &secret).expect("a secret");
    }

    fn report(&self) {
        let mut text = String::new();
        for (title, arguments) in [
            ("pods", &["get", "pods", "--output=wide"][..]),
            ("events", &["get", "events", "--sort-by=.lastTimestamp"]),
        ] {
            let said = self.try_kubectl(arguments, "").unwrap_or_else(|error| error);
            let _ = writeln!(text, "== {title} of {}\n{said}", self.name);
        }
        for name in NODES {
            let log = driver_log(name).unwrap_or_else(|error| error);
            let lines: Vec<_> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(40)..];
            let _ = writeln!(text, "== the driver on {name}\n{}", tail.join("\n"));
            let mounts =
                on_node(name, &["cat", "/proc/self/mountinfo"]).unwrap_or_else(|error| error);
            let kept = mounts
                .lines()
                .filter(|line| line.contains("oci.custom.io") || line.contains("~csi"));
            let _ = writeln!(text, "== mounts of {name}\n{}", kept.collect::<Vec<_>>().join("\n"));
        }
        eprintln!("{text}");
    }
}

impl Drop for TestNamespace {
    fn drop(&mut self) {
        if panicking() {
            self.report();
        }
        // Other tests wait for the cluster: the namespace is deleted before.
        let deleted = try_kubectl(&["delete", "namespace", &self.name, "--timeout=120s"], "");
        if let (Err(error), false) = (deleted, panicking()) {
            self.report();
            panic!("the namespace {} cannot be deleted: {error}", self.name);
        }
    }
}

/// A pod of one container, which runs a script of busybox with an artifact at `/artifact`.
pub struct Pod {
    pub name: String,
    pub reference: String,
    pub image: String,
    pub script: String,
    /// Further attributes of the volume.
    pub attributes: Vec<(&'static str, String)>,
    /// The `readOnly` field of the volume.
    pub volume_read_only: Option<bool>,
    /// The `readOnly` field of the mount.
    pub mount_read_only: Option<bool>,
    /// The container's security context, in YAML's flow style.
    pub security: &'static str,
    /// Further fields of the pod's spec, each a line of YAML.
    pub spec: String,
    /// The secret for the driver.
    pub secret: Option<&'static str>,
    pub node: Option<&'static str>,
}

impl Pod {
    pub fn new(name: &str, reference: &str, script: &str) -> Self {
        Self {
            name: name.into(),
            reference: reference.into(),
            image: "docker.io/library/busybox:1.37".into(),
            script: script.into(),
            attributes: Vec::new(),
            volume_read_only: Some(true),
            mount_read_only: Some(true),
            security: "{}",
            spec: String::new(),
            secret: None,
            node: None,
        }
    }

    /// Creates a pod that has the artifact mounted until it is deleted.
    pub fn holding(name: &str, reference: &str) -> Self {
        Self::new(name, reference, "trap exit TERM; while :; do sleep 3600 & wait $!; done")
    }

    pub fn on(mut self, node: &'static str) -> Self {
        self.node = Some(node);
        self
    }

    pub fn with_secret(mut self, secret: &'static str) -> Self {
        self.secret = Some(secret);
        self
    }

    pub fn yaml(&self) -> String {
        let read_only = |value: Option<bool>| {
            value.map(|value| format!(", readOnly: {value}")).unwrap_or_default()
        };
        let mut attributes = format!("reference: \"{}\"", self.reference);
        for (key, value) in &self.attributes {
            let _ = write!(attributes, ", {key}: \"{value}\"");
        }
        let secret = self
            .secret
            .map(|name| format!(", nodePublishSecretRef: {{name: {name}}}"))
            .unwrap_or_default();
        let node = self
            .node
            .map(|name| format!("nodeSelector: {{kubernetes.io/hostname: {name}}}"))
            .unwrap_or_default();
        format!(
            r#"
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  {node}
  {spec}
  containers:
    - name: main
      image: {image}
      command: ["sh", "-c", {script}]
      securityContext: {security}
      volumeMounts:
        - {{name: artifact, mountPath: /artifact{mount}}}
  volumes:
    - name: artifact
      csi: {{driver: oci.custom.io{volume}{secret}, volumeAttributes: {{{attributes}}}}}
"#,
            name = self.name,
            image = self.image,
            spec = self.spec,
            script = serde_json::to_string(&self.script).expect("a string"),
            security = self.security,
            mount = read_only(self.mount_read_only),
            volume = read_only(self.volume_read_only),
        )
    }
}

#[track_caller]
pub fn kubectl(arguments: &[&str]) -> String {
    try_kubectl(arguments, "").unwrap_or_else(|error| panic!("kubectl {arguments:?}: {error}"))
}

pub fn try_kubectl(arguments: &[&str], input: &str) -> Result<String, String> {
    run("kubectl", arguments, input)
}

/// Returns an object as JSON.
#[track_caller]
pub fn object(arguments: &[&str]) -> Value {
    let text = kubectl(&[arguments, &["--output=json"]].concat());
    serde_json::from_str(&text).expect("JSON of kubectl")
}

/// Runs a program to its end. Returns its output or its error.
pub fn run(program: &str, arguments: &[&str], input: &str) -> Result<String, String> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{program}: {error}"))?;
    // A program that fails early does not read its input.
    let _ = child.stdin.take().expect("its input").write_all(input.as_bytes());
    let output = child.wait_with_output().expect("its output");
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(format!("{}{}", text(&output.stderr), text(&output.stdout)))
    }
}

#[track_caller]
pub fn wait_until(what: &str, is_true: impl FnMut() -> bool) {
    wait_until_with(is_true, || what.to_owned());
}

/// Waits until the condition is true. Fails with a description of it.
#[track_caller]
pub fn wait_until_with(is_true: impl FnMut() -> bool, what: impl Fn() -> String) {
    wait_until_within(PATIENCE, is_true, what);
}

/// As [`wait_until_with`], with a time of its own.
#[track_caller]
pub fn wait_until_within(
    patience: Duration,
    mut is_true: impl FnMut() -> bool,
    what: impl Fn() -> String,
) {
    let end = Instant::now() + patience;
    while !is_true() {
        assert!(Instant::now() < end, "waited in vain for {}", what());
        sleep(Duration::from_millis(200));
    }
}
