//! Tests the rendered `Deployment` of the controller in a container: its command line, environment and user start the
//! binary, its probes succeed, and it becomes the leader.

use std::{fs, process::Child};

use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{Container, PodSpec},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::{
    chart::{assert_metrics_served, lint_metrics},
    container::{Image, Machine, NAMESPACE, POD_NAME, TOKEN, service_account},
    deployed::{ask, files, flag, request},
    only, rendered,
};
use crate::support::{
    Authority, Nginx,
    api_server::{ApiServer, Kind},
    wait_until,
};

/// The controller of one rendered `Deployment`, and an API server that its pod reaches as in a cluster.
struct Controller {
    machine: Machine,
    pod: PodSpec,
    container: Container,
    process: Child,
    api: ApiServer,
    _entrance: Nginx,
}

impl Controller {
    #[track_caller]
    fn start(objects: &[Value]) -> Self {
        let mut machine = Machine::new();
        let deployment: Deployment =
            serde_json::from_value(only(objects, "Deployment").clone()).expect("a Deployment");
        let pod = deployment.spec.and_then(|spec| spec.template.spec).expect("a pod");
        let container = pod.containers[0].clone();
        let api = ApiServer::new();
        // The server needs TLS with a certificate of the cluster's authority, and accepts the pod's token.
        let folder = machine.path("/api");
        let authority = Authority::new(&folder);
        let (certificate, key) = authority.issue("server", &["127.0.0.1"]);
        let answer = format!(
            "if ($http_authorization != \"Bearer {TOKEN}\") {{ return 401; }} \
             proxy_pass http://{}; proxy_http_version 1.1; proxy_buffering off;",
            api.listen()
        );
        let entrance = Nginx::start_with_tls(&folder, (&certificate, &key), &answer);
        machine.api = Some((service_account(&folder, &authority), entrance.port()));
        machine.files = files(&pod, objects);
        let process = machine.start(&pod, &container, &Image::of_the_driver());
        Self { machine, pod, container, process, api, _entrance: entrance }
    }

    /// Returns a line of the kernel's status of the process.
    fn kernel(&self, name: &str) -> String {
        let path = format!("/proc/{}/status", self.process.id());
        let status = fs::read_to_string(path).expect("its status");
        let mut lines = status.lines();
        let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.expect("a line").trim().to_owned()
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("the container's log:\n{}", self.machine.log(&self.container));
        }
    }
}

#[track_caller]
fn leads(objects: &[Value]) {
    let mut controller = Controller::start(objects);
    let container = controller.container.clone();
    let [readiness, liveness] = [&container.readiness_probe, &container.liveness_probe]
        .map(|probe| probe.as_ref().expect("a probe"));
    wait_until("the controller is ready", || {
        let ended = controller.process.try_wait().expect("its state");
        assert!(ended.is_none(), "it ended:\n{}", controller.machine.log(&container));
        ask(readiness, &container).contains("200")
    });
    assert!(ask(liveness, &container).contains("200"));

    // The pod runs as a user without rights, and the machine has applied that.
    let security = container.security_context.as_ref().expect("a security context");
    assert_eq!(security.read_only_root_filesystem, Some(true));
    assert_eq!(security.allow_privilege_escalation, Some(false));
    let dropped = security.capabilities.as_ref().and_then(|all| all.drop.clone());
    assert_eq!(dropped, Some(vec!["ALL".to_owned()]));
    let of_the_pod = controller.pod.security_context.as_ref().expect("a security context");
    assert_eq!(of_the_pod.run_as_non_root, Some(true));
    let user = of_the_pod.run_as_user.expect("a user").to_string();
    assert!(controller.kernel("Uid").split_whitespace().all(|id| id == user));
    for kind in ["CapPrm", "CapEff"] {
        assert_eq!(controller.kernel(kind).trim_start_matches('0'), "", "it has {kind}");
    }

    // It leads and works: a preload gets a status, and a claim an event.
    let lease = flag(&container, "lease-name");
    let holder =
        || controller.api.get(Kind::Lease, NAMESPACE, &lease)["spec"]["holderIdentity"].clone();
    wait_until("it leads", || holder() == POD_NAME);
    let arguments = container.args.clone().unwrap_or_default();
    let has = |argument: &str| arguments.iter().any(|known| known == argument);
    if !has("--preloads=false") {
        controller.api.apply(json!({
            "kind": "ArtifactPreload",
            "metadata": {"namespace": "team", "name": "tool"},
            "spec": {"reference": "UPPER/case:of:nothing"},
        }));
        wait_until("it answers", || {
            let status = &controller.api.get(Kind::Preload, "team", "tool")["status"];
            status["conditions"].to_string().contains("InvalidSpec")
        });
    }
    if has("--provisioner") {
        let annotations =
            json!({"volume.kubernetes.io/storage-provisioner": flag(&container, "driver-name")});
        controller.api.apply(json!({
            "kind": "PersistentVolumeClaim",
            "metadata": {"namespace": "team", "name": "tool", "annotations": annotations},
            "spec": {"storageClassName": "gone", "accessModes": ["ReadOnlyMany"]},
        }));
        wait_until("it answers", || {
            let events = controller.api.list(Kind::Event);
            events.iter().any(|event| event["reason"] == "ProvisioningFailed")
        });
    }
    let ports = container.ports.iter().flatten();
    let port = ports.clone().find(|port| port.name.as_deref() == Some("metrics"));
    let port = port.expect("a port for metrics").container_port;
    let served = request("GET", "127.0.0.1", port, "/metrics");
    assert!(served.contains("csi_oci_controller_leader 1"), "{served}");
    lint_metrics(&served);
    let of_monitoring = objects.iter().filter(|object| {
        object["kind"] == "PrometheusRule" || object["data"]["csi-driver-oci.json"].is_string()
    });
    let text: String = of_monitoring.map(Value::to_string).collect();
    if !text.is_empty() {
        assert_metrics_served(&text, true, &served);
    }

    // Its use of memory is far below its limit.
    let limits = container.resources.as_ref().and_then(|resources| resources.limits.clone());
    if let Some(limit) = limits.unwrap_or_default().get("memory") {
        let limit = limit.0.strip_suffix("Gi").expect("a limit in Gi");
        let limit = limit.parse::<u64>().expect("a number") << 20;
        let taken = controller.kernel("VmHWM");
        let taken: u64 = taken.trim_end_matches(" kB").parse().expect("a number");
        assert!(taken < limit / 4, "{taken} of {limit} KiB with nothing to do");
    }

    // A deleted pod ends in time, and releases its lease.
    let process = i32::try_from(controller.process.id()).expect("a process");
    kill(Pid::from_raw(process), Signal::SIGTERM).expect("a signal");
    let ended = controller.process.wait().expect("its end");
    assert!(ended.success(), "{ended}");
    assert_ne!(holder(), POD_NAME);
}

#[test]
fn a_controller_by_the_defaults_leads() {
    leads(&rendered("chart")["fleet-default"]);
}

#[test]
fn a_controller_of_claims_alone_leads() {
    leads(&rendered("chart")["provisioner"]);
}

#[test]
fn a_controller_with_all_that_it_can_be_given_leads() {
    leads(&rendered("chart")["fleet"]);
}
