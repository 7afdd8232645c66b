//! What asks the Kubernetes API: the job before an uninstall, and the driver on a node that starts with a taint.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

use k8s_openapi::api::batch::v1::Job;
use serde_json::{Value, json};

use super::{
    container::{Image, Machine, NODE_NAME},
    deployed::Deployed,
    only, rendered,
};
use crate::support::{Authority, ending_with_this_thread, wait_until};

const TOKEN: &str = "the-token-of-the-service-account";

/// An API server with a few objects, and what a pod needs to reach it.
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
        let account = folder.path().join("account");
        fs::create_dir(&account).expect("a folder");
        fs::copy(authority.certificate(), account.join("ca.crt")).expect("the authority");
        fs::write(account.join("token"), format!("{TOKEN}\n")).expect("the token");
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

    /// What a machine needs so that its pods reach it.
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
