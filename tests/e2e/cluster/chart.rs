//! Manifests as data: what Helm, Kubernetes' schemas and its types say, and what the binary says of its configuration.

use std::fs;

use k8s_openapi::api::{
    admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding},
    apps::v1::{DaemonSet, StatefulSet},
    batch::v1::Job,
    core::v1::{
        ConfigMap, Namespace, PersistentVolume, PersistentVolumeClaim, Pod, ResourceQuota, Secret,
        Service, ServiceAccount,
    },
    networking::v1::NetworkPolicy,
    rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
    storage::v1::CSIDriver,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{check, rendered};
use crate::support::{clean_environment, run, tool};

#[test]
fn helm_lint_finds_nothing() {
    check("lint");
}

#[test]
fn wrong_values_are_refused_with_a_reason() {
    check("refused");
}

#[test]
fn every_value_is_explained() {
    check("commented");
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
fn all_manifests_survive_kubernetes_own_types() {
    let mut seen = 0;
    for group in ["chart", "plain", "kustomize"] {
        for (name, objects) in rendered(group) {
            for object in &objects {
                seen += usize::from(round_trip(&name, object));
            }
        }
    }
    assert!(seen > 50, "only {seen} objects were looked at");
}

/// Whether the object is one of Kubernetes' own; if so, a misspelt or mistyped field is a failure.
#[track_caller]
pub fn round_trip(name: &str, object: &Value) -> bool {
    let kind = object["kind"].as_str().expect("a kind");
    let check = match kind {
        "ClusterRole" => same::<ClusterRole>,
        "ClusterRoleBinding" => same::<ClusterRoleBinding>,
        "ConfigMap" => same::<ConfigMap>,
        "CSIDriver" => same::<CSIDriver>,
        "DaemonSet" => same::<DaemonSet>,
        "Job" => same::<Job>,
        "Namespace" => same::<Namespace>,
        "NetworkPolicy" => same::<NetworkPolicy>,
        "PersistentVolume" => same::<PersistentVolume>,
        "PersistentVolumeClaim" => same::<PersistentVolumeClaim>,
        "Pod" => same::<Pod>,
        "ResourceQuota" => same::<ResourceQuota>,
        "Role" => same::<Role>,
        "RoleBinding" => same::<RoleBinding>,
        "Secret" => same::<Secret>,
        "Service" => same::<Service>,
        "ServiceAccount" => same::<ServiceAccount>,
        "StatefulSet" => same::<StatefulSet>,
        "ValidatingAdmissionPolicy" => same::<ValidatingAdmissionPolicy>,
        "ValidatingAdmissionPolicyBinding" => same::<ValidatingAdmissionPolicyBinding>,
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
    assert_eq!(&without_empty(object), &without_empty(&again), "{name}");
}

/// Fields that say nothing, such as `{}` and `[]`, are not kept by types.
fn without_empty(value: &Value) -> Value {
    let is_empty = |value: &Value| match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    };
    match value {
        Value::Array(items) => items.iter().map(without_empty).collect(),
        Value::Object(fields) => fields
            .iter()
            .map(|(key, value)| (key.clone(), without_empty(value)))
            .filter(|(_, value)| !is_empty(value))
            .collect(),
        other => other.clone(),
    }
}

#[test]
fn the_binary_takes_every_configuration_that_the_chart_writes() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("config.yaml");
    let mut seen = 0;
    for (row, objects) in rendered("chart") {
        let texts = objects.iter().filter_map(|object| object["data"]["config.yaml"].as_str());
        for text in texts {
            fs::write(&file, text).expect("the configuration");
            let mut command = tool(env!("CARGO_BIN_EXE_csi-driver-oci"));
            clean_environment(&mut command);
            let said = run(command.arg("check-config").arg(&file));
            assert!(said.contains("can be used"), "{row}: {said}");
            seen += 1;
        }
    }
    assert!(seen > 0, "no row has a configuration");
}
