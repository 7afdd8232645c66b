//! Tests the rendered `DaemonSet` on a node: its command line, mounts and environment start the binary, and a pod's
//! volume is published through it.

use std::{fs, os::unix::fs::PermissionsExt as _};

use csi_driver_oci::proto::{csi::v1::NodeGetInfoRequest, pluginregistration::InfoRequest};
use k8s_openapi::api::batch::v1::Job;
use serde_json::{Value, json};
use tonic::Code;

use super::{
    container::{Image, Machine, NODE_NAME},
    deployed::{Deployed, ask, request},
    rendered,
};
use crate::support::{
    Authority, Layer, Manifest, Registry, RegistryKind, clean_environment, own_registry, registry,
    run, small_artifact, tool, wait_until,
};

/// Checks registration, probes, a volume that outlives the driver, and its end.
#[track_caller]
fn serves(objects: &[Value]) {
    let mut deployed = Deployed::start(objects);
    let sidecars = deployed.pod.containers.len() > 1;
    let kubelet = deployed.kubelet();
    let info = kubelet.node(async |mut client| client.node_get_info(NodeGetInfoRequest {}).await);
    assert_eq!(info.expect("NodeGetInfo").node_id, NODE_NAME);
    if sidecars {
        assert!(!deployed.registration_socket().exists(), "two would register");
    } else {
        let registration = kubelet
            .registration(&deployed.registration_socket(), async |mut client| {
                client.get_info(InfoRequest {}).await
            });
        let info = registration.expect("GetInfo");
        assert_eq!(info.name, deployed.driver_name);
        assert_eq!(deployed.machine.path(&info.endpoint), deployed.socket());
        let liveness = deployed.container.liveness_probe.as_ref().expect("a liveness probe");
        let mut answer = String::new();
        wait_until("the liveness probe is answered", || {
            answer = ask(liveness, &deployed.container);
            answer.contains("200")
        });
        // Readiness needs more: the kubelet must have registered the driver.
        let readiness = deployed.container.readiness_probe.as_ref().expect("a readiness probe");
        assert!(
            ask(readiness, &deployed.container).contains("503"),
            "{}",
            ask(readiness, &deployed.container)
        );
    }

    // The command in the container, as `kubectl exec` runs it.
    let inside =
        format!("unix:///proc/{}/root/run/csi-driver-oci/admin.sock", deployed.process.id());
    let mut status = tool(env!("CARGO_BIN_EXE_csi-driver-oci"));
    clean_environment(&mut status);
    let said = run(status.args(["status", "--output", "json", "--admin-endpoint", &inside]));
    assert!(said.contains(NODE_NAME), "{said}");
    // Disabled by the chart, unless its values say otherwise.
    let keeps = deployed.container.args.iter().flatten().any(|word| word == "--leases=Keep");
    let setting = fs::read_to_string(deployed.machine.leases_setting()).expect("the setting");
    assert_eq!(setting.trim(), if keeps { "1" } else { "0" });
    assert!(said.contains(&format!("\"fileLeasesEnabled\":{keeps}")), "{said}");
    if let Some(port) = deployed.metrics_port() {
        let served = request("GET", "127.0.0.1", port, "/metrics");
        assert!(served.contains("csi_oci_build_info"), "{served}");
        let leases = format!("csi_oci_file_leases_enabled {}", u8::from(keeps));
        assert!(served.contains(&leases), "{served}");
    }

    let registry = own_registry();
    Manifest::artifact([Layer::titled("tool", "#!/bin/sh\necho hello\n")]).push(
        &registry,
        "team/tool",
        "v1",
    );
    let volume = kubelet.new_volume(&format!("{}/team/tool:v1", registry.host()));
    deployed.publish(&volume);
    let file = volume.target().join("tool");
    assert_eq!(fs::metadata(&file).expect("the file").permissions().mode() & 0o777, 0o555);

    deployed.restart();
    volume.assert_mounted();
    assert!(file.exists());
    deployed.publish(&volume);
    let target = deployed.on_the_node(&volume);
    kubelet.unpublish_request(&volume.request.volume_id, &target).expect("unpublish");
    assert!(!volume.target().exists());
}

/// One test for each row, so that rows run in parallel and each failure has its row's name.
macro_rules! rows {
    ($group:literal: $($test:ident $row:literal),+ $(,)?) => {
        $(
            #[test]
            fn $test() {
                serves(&rendered($group)[$row]);
            }
        )+
    };
}

rows! { "chart":
    the_defaults_serve "defaults",
    everything_switched_on_serves "everything",
    the_pod_network_serves "pod-network",
    a_pod_with_sidecars_serves "sidecars",
    what_others_make_serves "given",
    registries_of_every_kind_serve "registries",
    a_docker_configuration_of_the_node_serves "node-docker-config",
    a_policy_with_its_key_serves "policy",
    a_node_beside_a_mutating_policy_serves "pod-pull-secrets",
    a_node_beside_a_provisioner_serves "provisioner",
    // The API server is unreachable, which does not matter for pods.
    a_node_that_preloads_serves "fleet-default",
    a_node_that_preloads_beside_a_policy_serves "fleet",
    a_node_before_its_first_trust_root_serves "trust-roots",
}

rows! { "kustomize":
    the_plain_manifests_serve "deploy",
    another_kubelets_folder_serves "deploy__overlays__k0s",
    a_snaps_folder_serves "deploy__overlays__microk8s",
}

#[test]
fn every_row_is_started_by_a_test() {
    let rows: Vec<String> = rendered("chart").into_keys().collect();
    assert_eq!(
        rows,
        [
            "defaults",
            "disk",
            "events",
            "everything",
            "fleet",
            "fleet-default",
            "given",
            "node-docker-config",
            "pod-network",
            "pod-pull-secrets",
            "policy",
            "provisioner",
            "registries",
            "sidecars",
            "tainted-nodes",
            "trust-roots"
        ],
        "a row without its test"
    );
}

#[test]
fn a_private_registry_is_reached_with_what_the_chart_mounts() {
    // The artifact is in the registry that all tests share, which this test's network does not reach later.
    let artifact = small_artifact();
    let machine = Machine::new();
    let authority = Authority::new(&machine.path("/root/authority"));
    let (certificate, key) = authority.issue("registry", &["127.0.0.1"]);
    let registry = Registry::start(&RegistryKind {
        credentials: Some(("robot", "password")),
        tls: Some((&certificate, &key, None)),
        content_of: Some(registry()),
        ..RegistryKind::default()
    });
    // The node's containerd uses TLS, and so does the driver, with the authority of the values.
    let hosts = machine.path("/etc/containerd/certs.d").join(registry.host());
    fs::create_dir_all(&hosts).expect("the node's registries");
    let server = format!("server = \"https://{}\"\n", registry.host());
    fs::write(hosts.join("hosts.toml"), server).expect("the node's registry");
    let mut objects = rendered("chart")["registries"].clone();
    let authorities = objects.iter_mut().find(|object| object["data"]["ca.crt"].is_string());
    let pem = fs::read_to_string(authority.certificate()).expect("the authority");
    authorities.expect("authorities")["data"]["ca.crt"] = pem.into();
    machine.mount_disk("/var/lib/csi-driver-oci");
    let deployed = Deployed::start_on(machine, &objects);

    let volume = deployed.kubelet().new_volume(&format!("{}/{}", registry.host(), artifact.name));
    let refused = deployed.try_publish(&volume).expect_err("the secret has no credentials yet");
    assert_eq!(refused.code(), Code::Unauthenticated, "{}", refused.message());
    // A changed secret takes effect.
    let auths = json!({"auths": {registry.host(): {"username": "robot", "password": "password"}}});
    let secret = deployed.machine.volume("docker-config-secret").join("config.json");
    fs::write(secret, auths.to_string()).expect("the secret");
    deployed.publish(&volume);
    let shown = fs::read_to_string(volume.target().join("file.txt")).expect("the file");
    assert_eq!(shown, artifact.content);
}

#[test]
fn a_node_without_its_disk_publishes_nothing_until_it_is_mounted() {
    let deployed = Deployed::start_on(Machine::new(), &rendered("chart")["disk"]);
    let registry = own_registry();
    Manifest::artifact([Layer::titled("file", "content")]).push(&registry, "team/tool", "v1");
    let volume = deployed.kubelet().new_volume(&format!("{}/team/tool:v1", registry.host()));
    let refused = deployed.try_publish(&volume).expect_err("there is no disk");
    assert_eq!(refused.code(), Code::Unavailable, "{}", refused.message());
    assert!(refused.message().contains("requireMountpoint"), "{}", refused.message());
    let state = deployed.machine.path("/data/artifacts");
    assert_eq!(fs::read_dir(&state).expect("the folder").count(), 0, "the node's root is filled");

    deployed.machine.mount_disk("/data/artifacts");
    wait_until("the driver has seen its disk", || deployed.try_publish(&volume).is_ok());
    volume.assert_mounted();
    let target = deployed.on_the_node(&volume);
    let kubelet = deployed.kubelet();
    kubelet.unpublish_request(&volume.request.volume_id, &target).expect("unpublish");
}

#[test]
fn a_purge_deletes_content_but_not_under_a_driver_or_a_pod() {
    let objects = &rendered("chart")["everything"];
    let mut deployed = Deployed::start(objects);
    let job = objects.iter().find(|object| object["kind"] == "Job").expect("a job");
    let job: Job = serde_json::from_value(job.clone()).expect("a job");
    let pod = job.spec.and_then(|spec| spec.template.spec).expect("a pod");
    let container = pod.containers[0].clone();
    let programs = ["sh", "grep", "flock", "find", "rm"];
    let purges_with = |deployed: &Deployed, programs: &[&str]| {
        let image = Image::of_libraries(&[]).with_programs(programs);
        let mut process = deployed.machine.start(&pod, &container, &image);
        process.wait().expect("the job's end").success()
    };
    let purges = |deployed: &Deployed| purges_with(deployed, &programs);
    let state = deployed.machine.path("/data/artifacts");
    let names = || -> Vec<_> {
        let entries = fs::read_dir(&state).expect("the state");
        entries.map(|entry| entry.expect("an entry").file_name()).collect()
    };
    assert!(names().len() > 1, "the driver made its store");

    assert!(!purges(&deployed), "the driver runs");
    deployed.process.kill().expect("kill the driver");
    deployed.process.wait().expect("its end");
    let pods = deployed.machine.path(&deployed.kubelet_dir).join("pods");
    let volume = pods.join("uid/volumes/kubernetes.io~csi/artifact");
    fs::create_dir_all(&volume).expect("a pod's volume");
    let data = volume.join("vol_data.json");
    fs::write(&data, format!(r#"{{"driverName":"{}"}}"#, deployed.driver_name)).expect("its data");
    assert!(!purges(&deployed), "a pod has a volume");
    for missing in ["grep", "flock", "find"] {
        let others: Vec<_> = programs.into_iter().filter(|name| *name != missing).collect();
        assert!(
            !purges_with(&deployed, &others),
            "a pod has a volume, which {missing} cannot tell"
        );
        let log = deployed.machine.log(&container);
        assert!(log.contains(&format!("purge.image has no {missing}")), "{log}");
    }
    assert!(names().len() > 1, "nothing is deleted so far");
    fs::remove_file(data).expect("the volume's end");
    assert!(purges(&deployed), "{}", deployed.machine.log(&container));
    assert_eq!(names(), ["lock"]);
}
