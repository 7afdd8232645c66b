//! Tests the requests to the Kubernetes API: the job before an uninstall, and the driver on a node that starts with a
//! taint.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

use k8s_openapi::api::batch::v1::{CronJob, Job};
use serde_json::{Value, json};

use super::{
    container::{Image, Machine, NODE_NAME, TOKEN, service_account},
    deployed::Deployed,
    only, rendered,
};
use crate::support::{
    Authority, Layer, Manifest, Pod, Proxy, Release, TufRepository, ending_with_this_thread, noise,
    own_registry, unique, wait_until,
};
use crate::trust::TRUST_ROOT;

/// An API server with a few objects, and the files that a pod needs to reach it.
struct ApiServer {
    folder: tempfile::TempDir,
    port: u16,
    process: Child,
}

impl ApiServer {
    #[track_caller]
    fn start(objects: Value) -> Self {
        let folder = tempfile::tempdir_in("/var/tmp").expect("a folder");
        let authority = Authority::new(&folder.path().join("authority"));
        let (certificate, key) = authority.issue("server", &["127.0.0.1"]);
        service_account(folder.path(), &authority);
        let state = folder.path().join("state.json");
        fs::write(&state, json!({"token": TOKEN, "objects": objects}).to_string())
            .expect("the objects");
        let tools = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("tools");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster/api_server.py");
        let mut process = ending_with_this_thread(tools.join("python/bin/python"))
            .arg(script)
            .args([certificate, key, state])
            .stdout(Stdio::piped())
            .spawn()
            .expect("an API server");
        let mut line = String::new();
        let output = process.stdout.take().expect("its output");
        BufReader::new(output).read_line(&mut line).expect("its port");
        let port = line.trim().parse().expect("a port");
        Self { folder, port, process }
    }

    /// Returns the files and the port that a machine needs so that its pods reach the server.
    fn access(&self) -> (PathBuf, u16) {
        (self.folder.path().join("account"), self.port)
    }

    fn objects(&self) -> Value {
        let text = fs::read(self.state()).expect("the objects");
        serde_json::from_slice::<Value>(&text).expect("JSON")["objects"].clone()
    }

    fn change(&self, change: impl FnOnce(&mut Value)) {
        let mut objects = self.objects();
        change(&mut objects);
        let next = self.state().with_extension("next");
        fs::write(&next, json!({"token": TOKEN, "objects": objects}).to_string()).expect("objects");
        fs::rename(next, self.state()).expect("the objects");
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state.json")
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn pod(name: &str, volume: &Value) -> Value {
    json!({
        "metadata": {"namespace": "team", "name": name},
        "spec": {"volumes": [volume]},
        "status": {"phase": "Running"},
    })
}

#[test]
fn an_uninstall_is_refused_while_pods_use_the_driver() {
    let inline = json!({"name": "a", "csi": {"driver": "oci.custom.io"}});
    let claim = json!({"name": "a", "persistentVolumeClaim": {"claimName": "tool"}});
    let other = json!({"name": "a", "emptyDir": {}});
    let mut machine = Machine::new();
    let server = ApiServer::start(json!({
        // More than a page.
        "/api/v1/pods": [
            pod("first", &other), pod("second", &other), pod("third", &inline),
            pod("fourth", &other), pod("fifth", &claim),
        ],
        "/api/v1/persistentvolumes": [
            {"spec": {"csi": {"driver": "oci.custom.io"}, "claimRef": {"namespace": "team", "name": "tool"}}},
        ],
    }));
    machine.api = Some(server.access());
    let job: Job =
        serde_json::from_value(only(&rendered("chart")["defaults"], "Job").clone()).expect("a job");
    let pod_spec = job.spec.and_then(|spec| spec.template.spec).expect("a pod");
    let container = &pod_spec.containers[0];
    let checks = || {
        let mut process = machine.start(&pod_spec, container, &Image::of_the_driver());
        process.wait().expect("the job's end").success()
    };
    assert!(!checks());
    let log = machine.log(container);
    assert!(log.contains("2 pods") && log.contains("team/fifth, team/third"), "{log}");
    assert!(log.contains("helm rollback NAME REVISION"), "{log}");
    assert!(!log.contains(TOKEN), "the token is in the log");

    server.change(|objects| {
        objects["/api/v1/pods"].as_array_mut().expect("pods").retain(|pod| {
            let name = &pod["metadata"]["name"];
            name != "third" && name != "fifth"
        });
    });
    assert!(checks(), "{}", machine.log(container));
}

#[test]
fn the_job_of_the_chart_updates_a_trust_root_and_refuses_an_older_one() {
    let mut machine = Machine::new();
    let repository = TufRepository::start(TRUST_ROOT.as_bytes());
    let path = "/api/v1/namespaces/csi-driver-oci/configmaps/csi-driver-oci-trust-team";
    let server = ApiServer::start(json!({path: {"metadata": {"resourceVersion": "7"}}}));
    machine.api = Some(server.access());
    let root = fs::read_to_string(repository.first_root(machine.root.as_path())).expect("a root");
    machine.files.insert("roots".to_owned(), [("team.json".to_owned(), root)].into());
    let job = only(&rendered("chart")["trust-roots"], "CronJob").clone();
    let job: CronJob = serde_json::from_value(job).expect("a job");
    let job = job.spec.job_template.spec.expect("a job");
    let pod = job.template.spec.expect("a pod");
    let mut container = pod.containers[2].clone();
    for argument in container.args.iter_mut().flatten() {
        *argument = argument.replace("https://tuf.example.com", &repository.url());
    }
    let fetches = || {
        let mut process = machine.start(&pod, &container, &Image::of_the_driver());
        process.wait().expect("the job's end").success()
    };
    let data = || server.objects()[path]["data"].clone();
    let first = repository.files();
    repository.release(&Release::new(2, TRUST_ROOT.as_bytes()));
    assert!(fetches(), "{}", machine.log(&container));
    assert_eq!(data()["trusted_root.json"], TRUST_ROOT);
    let seen = data();
    repository.restore(first);
    assert!(!fetches());
    let log = machine.log(&container);
    assert!(log.contains("rollback detected for timestamp"), "{log}");
    assert_eq!(data(), seen);
    server.change(|objects| *objects = json!({}));
    assert!(!fetches());
    let log = machine.log(&container);
    let named = "there is no ConfigMap csi-driver-oci/csi-driver-oci-trust-team: create it first";
    assert!(log.contains(named), "{log}");
}

#[test]
fn a_node_loses_its_startup_taint_once_the_driver_is_registered() {
    let csi_node = format!("/apis/storage.k8s.io/v1/csinodes/{NODE_NAME}");
    let node = format!("/api/v1/nodes/{NODE_NAME}");
    let other = json!({"key": "dedicated", "value": "storage", "effect": "NoSchedule"});
    let mut machine = Machine::new();
    let server = ApiServer::start(json!({
        &csi_node: {"spec": {"drivers": [{"name": "another"}]}},
        &node: {"spec": {"taints": [
            other, {"key": "oci.custom.io/agent-not-ready", "effect": "NoExecute"},
        ]}},
    }));
    machine.api = Some(server.access());
    let _deployed = Deployed::start_on(machine, &rendered("chart")["tainted-nodes"]);
    assert_eq!(server.objects()[&node]["spec"]["taints"].as_array().map(Vec::len), Some(2));

    server.change(|objects| {
        let drivers = objects[&csi_node]["spec"]["drivers"].as_array_mut().expect("drivers");
        drivers.push(json!({"name": "oci.custom.io"}));
    });
    wait_until("the taint is taken", || {
        server.objects()[&node]["spec"]["taints"] == json!([other])
    });
}

/// Returns the Events of a pod on the API server: reason, text, count.
fn events(server: &ApiServer, pod: &str) -> Vec<(String, String, i64)> {
    let objects = server.objects();
    let events = objects.as_object().expect("objects").iter().filter(|(path, event)| {
        path.contains("/events/") && event["involvedObject"]["name"] == pod
    });
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    events
        .map(|(_, event)| {
            assert_eq!(event["involvedObject"]["kind"], "Pod");
            assert!(event["involvedObject"]["uid"].is_string(), "{event}");
            assert_eq!(event["source"]["host"], NODE_NAME);
            (text(&event["reason"]), text(&event["message"]), event["count"].as_i64().unwrap_or(0))
        })
        .collect()
}

#[test]
fn pods_get_events_of_their_pulls_and_the_api_delays_no_pod() {
    let mut machine = Machine::new();
    let mut server = ApiServer::start(json!({}));
    machine.api = Some(server.access());
    machine.mount_disk("/var/lib/csi-driver-oci");
    let deployed = Deployed::start_on(machine, &rendered("chart")["events"]);
    // The node has a network of its own.
    let registry = own_registry();
    let proxy = Proxy::new(&registry);
    let repository = unique("told");
    let content = noise(4 << 20, 3);
    Manifest::artifact([Layer::titled("big", content)]).push(&registry, &repository, "v1");
    let reference = proxy.reference(&format!("{repository}:v1"));
    let pod = Pod::new();
    let of = |reference: &str, name: &str| deployed.kubelet().inline(&pod, name, reference);

    let volume = of(&reference, "artifact");
    let gate = proxy.hold_blobs();
    std::thread::scope(|scope| {
        scope.spawn(|| deployed.publish(&volume));
        wait_until("the pull is told while it goes on", || {
            events(&server, &pod.name).iter().any(|(reason, text, _)| {
                reason == "Pulling" && text.contains(&reference) && text.contains("4.0 MiB")
            })
        });
        gate.open();
    });
    wait_until("its end is told", || {
        events(&server, &pod.name).iter().any(|(reason, text, _)| {
            reason == "Pulled"
                && text.contains(&reference)
                && text.contains("sha256:")
                && text.contains("4.0 MiB")
        })
    });
    // A publish from the cache makes no Event.
    deployed.publish(&of(&reference, "again"));

    // A repeated failure is one event.
    let missing = of(&proxy.reference("there/is/none:v1"), "missing");
    for _ in 0..5 {
        deployed.try_publish(&missing).expect_err("nothing of this name");
    }
    let failed = |server: &ApiServer| {
        let events = events(server, &pod.name).into_iter();
        events.filter(|(reason, ..)| reason == "Failed").collect::<Vec<_>>()
    };
    wait_until("the failure is told", || failed(&server).len() == 1);
    assert!(failed(&server)[0].1.contains("no manifest v1"), "{:?}", failed(&server));
    assert_eq!(events(&server, &pod.name).len(), 3, "{:?}", events(&server, &pod.name));

    // Without an API server everything else continues.
    server.process.kill().expect("killed");
    server.process.wait().expect("its end");
    Manifest::artifact([Layer::titled("small", "x")]).push(&registry, &repository, "v2");
    deployed.publish(&of(&proxy.reference(&format!("{repository}:v2")), "without"));
    let log = || deployed.machine.log(&deployed.container);
    let told = || log().matches("an event on a pod is not written").count();
    wait_until("the log says that it is not told", || told() > 0);
    for number in 0..5 {
        let reference = proxy.reference(&format!("{repository}:v2"));
        deployed.publish(&of(&reference, &format!("without-{number}")));
    }
    // Once for each reason: a request that was cut off, and a server that does not exist.
    assert!(told() <= 2, "{}", log());
    assert!(!log().contains(TOKEN), "the token is in the log");
}

/// Returns the one file that an artifact of a file has in the store.
fn stored_file(folder: &Path) -> PathBuf {
    let entry = fs::read_dir(folder).expect("a folder").flatten().next().expect("an entry").path();
    if entry.is_dir() { stored_file(&entry) } else { entry }
}

#[test]
fn pods_are_told_of_damage_in_what_they_show() {
    let mut machine = Machine::new();
    let server = ApiServer::start(json!({}));
    machine.api = Some(server.access());
    machine.mount_disk("/var/lib/csi-driver-oci");
    let mut deployed = Deployed::start_on(machine, &rendered("chart")["events"]);
    let registry = own_registry();
    let proxy = Proxy::new(&registry);
    let repository = unique("damaged");
    Manifest::artifact([Layer::titled("file", "content")]).push(&registry, &repository, "v1");
    let reference = proxy.reference(&format!("{repository}:v1"));
    let pod = Pod::new();
    deployed.publish(&deployed.kubelet().inline(&pod, "artifact", &reference));
    // The state of an earlier version, whose pods could write.
    let state = deployed.machine.path("/var/lib/csi-driver-oci");
    fs::write(stored_file(&state.join("files")), "changed").expect("written");
    fs::write(state.join("format"), "csi-driver-oci 1\n").expect("written");
    deployed.restart();
    wait_until("the pod is told", || {
        events(&server, &pod.name)
            .iter()
            .any(|(reason, text, _)| reason == "Damaged" && text.contains(&reference))
    });
}
