//! Tests manifests as data against Helm, Kubernetes' schemas and types, and the binary's own check of its
//! configuration.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    net::TcpListener,
    path::Path,
};

use csi_driver_oci::volume::volume_attributes::VolumeAttributes;
use preload::api::ArtifactPreload;

use k8s_openapi::api::{
    admissionregistration::v1::{
        MutatingAdmissionPolicy, MutatingAdmissionPolicyBinding, ValidatingAdmissionPolicy,
        ValidatingAdmissionPolicyBinding,
    },
    apps::v1::{DaemonSet, Deployment, StatefulSet},
    batch::v1::{CronJob, Job},
    core::v1::{
        ConfigMap, Namespace, PersistentVolume, PersistentVolumeClaim, Pod, ResourceQuota, Secret,
        Service, ServiceAccount,
    },
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
    rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
    storage::v1::{CSIDriver, StorageClass},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{check, deployed::request, only, rendered};
use crate::support::{Node, clean_environment, run, tool, wait_until};

#[test]
fn helm_lint_finds_nothing() {
    check("lint");
}

#[test]
fn the_notes_say_what_to_try_next() {
    check("notes");
}

#[test]
fn wrong_values_are_refused_with_a_reason() {
    check("refused");
}

#[test]
fn an_image_that_no_release_has_is_refused_and_a_mirror_serves_all_images() {
    check("published");
}

#[test]
fn every_value_is_explained() {
    check("commented");
    check("readme");
}

#[test]
fn monitors_find_the_pods_and_alerts_name_a_runbook() {
    for name in ["runbooks", "metrics", "dashboard", "monitors", "alerts"] {
        check(name);
    }
}

#[test]
fn the_kubelet_repeats_its_call_only_if_private_tags_are_followed() {
    let rows = rendered("chart");
    for (row, expected) in [("defaults", false), ("everything", true)] {
        let driver = only(&rows[row], "CSIDriver");
        assert_eq!(driver["spec"]["requiresRepublish"], expected, "{row}");
    }
}

#[test]
fn the_chart_takes_every_documented_key_of_the_configuration() {
    check("documented");
}

#[test]
fn the_manifests_name_the_version_that_is_built() {
    check("versions");
}

#[test]
fn all_manifests_are_strictly_valid_on_every_kubernetes_they_are_for() {
    check("schemas");
}

#[test]
fn the_plain_manifests_are_what_the_chart_renders_to() {
    check("deploy");
}

#[test]
fn the_admission_policy_refuses_what_it_should_and_nothing_else() {
    check("admission");
}

#[test]
fn the_policy_on_pull_secrets_finds_the_right_one() {
    check("pod_pull_secrets");
}

#[test]
fn a_node_writes_its_own_object_only() {
    check("node_identity");
}

#[test]
fn a_node_removes_its_startup_taint_and_changes_nothing_else() {
    check("startup_taint");
}

#[test]
fn the_controller_labels_nodes_and_changes_nothing_else() {
    check("node_status");
}

#[test]
fn the_definition_of_preloads_lets_pass_what_it_should() {
    check("preload_values");
}

#[test]
fn the_fleet_has_the_rights_it_needs_and_no_more() {
    check("rights");
}

#[test]
fn every_volume_is_asked_for_read_only() {
    check("volumes");
}

#[test]
fn argo_cd_checks_warms_and_rolls_one_version() {
    check("argo_cd");
}

#[test]
fn argo_cd_passes_the_digest_on_without_a_secret() {
    check("argo_cd_by_digest");
}

#[test]
fn flux_checks_warms_and_rolls_one_version() {
    check("flux");
}

#[test]
fn the_driver_knows_the_attributes_of_every_volume() {
    let mut seen = 0;
    for group in ["chart", "plain", "composed"] {
        for (name, objects) in rendered(group) {
            // The substitutions of Flux and the patches of Crossplane are missing.
            if !name.contains("flux") && !name.contains("crossplane__composition") {
                for attributes in objects.iter().flat_map(volume_attributes) {
                    let parsed = VolumeAttributes::parse(&attributes);
                    assert!(parsed.is_ok(), "{name}: {attributes:?}: {parsed:?}");
                    seen += 1;
                }
            }
        }
    }
    assert!(seen >= 10, "only {seen} volumes were looked at");
}

/// Returns the attributes of every volume of the driver in an object.
fn volume_attributes(value: &Value) -> Vec<HashMap<String, String>> {
    if value["driver"] == "oci.custom.io" {
        let attributes = value["volumeAttributes"].clone();
        return vec![serde_json::from_value(attributes).expect("attributes")];
    }
    match value {
        Value::Array(items) => items.iter().flat_map(volume_attributes).collect(),
        Value::Object(fields) => fields.values().flat_map(volume_attributes).collect(),
        _ => Vec::new(),
    }
}

/// Checks names, types, units and help texts as promtool does.
#[track_caller]
pub fn lint_metrics(served: &str) {
    let (_, text) = served.split_once("\r\n\r\n").expect("a body");
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(file.path(), text).expect("the metrics");
    let mut promtool = tool("promtool");
    let input = fs::File::open(file.path()).expect("the metrics");
    let said = run(promtool.args(["check", "metrics"]).stdin(input));
    assert_eq!(said, "", "promtool has something to say");
}

#[test]
fn each_alert_fires_when_it_should_and_not_otherwise() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/monitoring/alerts.test.yaml");
    run(tool("promtool").args(["test", "rules"]).arg(&tests));
    let text = fs::read_to_string(&tests).expect("the tests");
    let rules = fs::read_to_string(tests.with_file_name("alerts.yaml")).expect("the rules");
    let alerts = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    for alert in alerts {
        assert!(text.contains(&format!("alertname: {alert}")), "{alert} has no test");
    }
}

#[test]
fn alerts_and_dashboard_ask_for_metrics_that_there_are() {
    // A port that is in use is counted.
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let health = taken.local_addr().expect("its address");
    let node = Node::start_with(|_, options| {
        options
            .argument("--metrics-endpoint=127.0.0.1:0")
            .argument(&format!("--health-endpoint={health}"))
    });
    let (_volume, _) = node.mount(&node.proxy.reference(&node.small_artifact().name));
    let mut listening = String::new();
    wait_until("metrics are served", || {
        let log = node.driver.log();
        let line = log.lines().find(|line| line.contains("metrics") && line.contains("local"));
        listening = line.unwrap_or_default().to_owned();
        !listening.is_empty()
    });
    let address = listening.split("127.0.0.1:").nth(1).expect("an address");
    let port: String = address.chars().take_while(char::is_ascii_digit).collect();
    let port = port.parse().expect("a port");
    let served = request("GET", "127.0.0.1", port, "/metrics");

    let objects = &rendered("chart")["everything"];
    let rules = &only(objects, "PrometheusRule")["spec"];
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("rules.json");
    fs::write(&file, rules.to_string()).expect("the rules");
    run(tool("promtool").args(["check", "rules"]).arg(&file));
    lint_metrics(&served);
    let dashboard = objects
        .iter()
        .find_map(|object| object["data"]["csi-driver-oci.json"].as_str())
        .expect("a dashboard");
    let dashboard: Value = serde_json::from_str(dashboard).expect("JSON");

    assert_metrics_served(&format!("{rules}{dashboard}"), false, &served);
}

/// Checks that each metric of the controller, or of the node plugin, that a text names is served.
#[track_caller]
pub fn assert_metrics_served(text: &str, of_controller: bool, served: &str) {
    let names: BTreeSet<&str> = text
        .split(|byte: char| !(byte.is_ascii_alphanumeric() || byte == '_'))
        .filter(|word| word.starts_with("csi_oci_"))
        .filter(|word| {
            let controllers = ["csi_oci_claim", "csi_oci_controller_", "csi_oci_preload"];
            controllers.iter().any(|prefix| word.starts_with(prefix)) == of_controller
        })
        .collect();
    assert!(names.len() > 3, "{names:?}");
    for name in names {
        // The description of a histogram has its name without the suffixes of its samples.
        let family = ["_bucket", "_count", "_sum"]
            .iter()
            .find_map(|suffix| name.strip_suffix(suffix))
            .unwrap_or(name);
        assert!(served.contains(&format!("# TYPE {family} ")), "{name} is not served:\n{served}");
    }
}

#[test]
fn all_manifests_survive_kubernetes_own_types() {
    let mut seen = 0;
    for group in ["chart", "plain", "kustomize", "composed"] {
        for (name, objects) in rendered(group) {
            for object in &objects {
                seen += usize::from(round_trip(&name, object));
            }
        }
    }
    assert!(seen > 50, "only {seen} objects were looked at");
}

/// Returns whether the object is one of Kubernetes' own. If so, a misspelt or mistyped field is a failure.
#[track_caller]
pub fn round_trip(name: &str, object: &Value) -> bool {
    let kind = object["kind"].as_str().expect("a kind");
    let check = match kind {
        "ClusterRole" => same::<ClusterRole>,
        "ClusterRoleBinding" => same::<ClusterRoleBinding>,
        "ConfigMap" => same::<ConfigMap>,
        "CronJob" => same::<CronJob>,
        "CSIDriver" => same::<CSIDriver>,
        "ArtifactPreload" => same::<ArtifactPreload>,
        "DaemonSet" => same::<DaemonSet>,
        "Deployment" => same::<Deployment>,
        "Job" => same::<Job>,
        "MutatingAdmissionPolicy" => same::<MutatingAdmissionPolicy>,
        "MutatingAdmissionPolicyBinding" => same::<MutatingAdmissionPolicyBinding>,
        "Namespace" => same::<Namespace>,
        "NetworkPolicy" => same::<NetworkPolicy>,
        "PersistentVolume" => same::<PersistentVolume>,
        "PersistentVolumeClaim" => same::<PersistentVolumeClaim>,
        "Pod" => same::<Pod>,
        "StorageClass" => same::<StorageClass>,
        "PodDisruptionBudget" => same::<PodDisruptionBudget>,
        "ResourceQuota" => same::<ResourceQuota>,
        "Role" => same::<Role>,
        "RoleBinding" => same::<RoleBinding>,
        "Secret" => same::<Secret>,
        "Service" => same::<Service>,
        "ServiceAccount" => same::<ServiceAccount>,
        "StatefulSet" => same::<StatefulSet>,
        "ValidatingAdmissionPolicy" => same::<ValidatingAdmissionPolicy>,
        "ValidatingAdmissionPolicyBinding" => same::<ValidatingAdmissionPolicyBinding>,
        // Generated from the types that it defines; a test beside them compares the files.
        "CustomResourceDefinition" => return false,
        _ => {
            let version = object["apiVersion"].as_str().expect("an apiVersion");
            let group = version.split('/').next().unwrap_or_default();
            let foreign = group.contains('.') && !group.ends_with("k8s.io");
            assert!(foreign, "{name}: no type is known for {version} {kind}");
            return false;
        }
    };
    check(name, object);
    true
}

#[track_caller]
fn same<T: DeserializeOwned + Serialize>(name: &str, object: &Value) {
    let typed: T = serde_json::from_value(object.clone())
        .unwrap_or_else(|error| panic!("{name}: {}: {error}", object["kind"]));
    let again = serde_json::to_value(&typed).expect("JSON");
    let mut lost = Vec::new();
    what_is_lost("", object, &again, &mut lost);
    assert!(lost.is_empty(), "{name}: {}: {lost:?}", object["kind"]);
}

/// Collects fields that are missing or different in the other value. Types add fields of their own, and keep no empty
/// ones.
fn what_is_lost(path: &str, value: &Value, again: &Value, lost: &mut Vec<String>) {
    match value {
        Value::Null => {}
        Value::Object(fields) => {
            for (key, value) in fields {
                what_is_lost(&format!("{path}.{key}"), value, &again[key], lost);
            }
        }
        Value::Array(items) => {
            for (index, value) in items.iter().enumerate() {
                what_is_lost(&format!("{path}[{index}]"), value, &again[index], lost);
            }
        }
        value if value != again => lost.push(format!("{path}: {value} is {again}")),
        _ => {}
    }
}

#[test]
fn the_binary_takes_every_configuration_that_the_chart_writes() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("config.yaml");
    let mut seen = 0;
    for (row, objects) in rendered("chart") {
        for map in objects.iter().filter(|object| object["data"]["config.yaml"].is_string()) {
            // Files are beside the configuration here, and elsewhere in the container.
            for (name, text) in map["data"].as_object().expect("files") {
                let here = format!("{}/", folder.path().display());
                let text = text.as_str().expect("text").replace("/etc/csi-driver-oci/", &here);
                fs::write(folder.path().join(name), text).expect("a file of the configuration");
            }
            let mut command = tool(env!("CARGO_BIN_EXE_csi-driver-oci"));
            clean_environment(&mut command);
            let said = run(command.arg("check-config").arg(&file));
            assert!(said.contains("can be used"), "{row}: {said}");
            seen += 1;
        }
    }
    assert!(seen > 0, "no row has a configuration");
}

#[test]
fn the_page_of_api_objects_is_what_the_definitions_say() {
    check("resources");
}
