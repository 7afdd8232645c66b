//! Tests of the planner.

use std::collections::HashMap;

use controller_runtime::ResolutionFailure;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::api::storage::v1::StorageClass;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::facts::{CheckedVolume, FailedWrite, LookupFacts, SecretName, VolumeRules};
use super::*;

const NOW: Seconds = 1_000_000;
const DRIVER: &str = "oci.custom.io";

/// Rules like those of the driver, for three attributes.
const RULES: VolumeRules = VolumeRules {
    keys: &["reference", "repository", "pullPolicy"],
    yaml: &[],
    naming: &["reference", "repository"],
    check: |context, options| {
        if let Some(option) = options.first().filter(|option| *option != "noexec") {
            return Err(format!("the mount option \"{option}\" cannot be honoured"));
        }
        let reference = context.get("reference").or(context.get("repository"));
        let reference = reference.ok_or("no reference")?.parse();
        let reference =
            reference.map_err(|error: oci::reference::ReferenceError| error.to_string());
        let asks_registry = context.get("pullPolicy").is_none_or(|policy| policy != "Never");
        Ok(CheckedVolume { references: vec![reference?], asks_registry })
    },
};

/// Merges a change as a merge patch does: null removes a field.
fn merged(mut base: Value, change: Value) -> Value {
    match (&mut base, change) {
        (Value::Object(fields), Value::Object(changes)) => {
            for (key, change) in changes {
                let field = fields.entry(key).or_insert(Value::Null);
                *field = merged(field.take(), change);
            }
            fields.retain(|_, field| !field.is_null());
            base
        }
        (_, change) => change,
    }
}

fn claim(name: &str, change: Value) -> PersistentVolumeClaim {
    let base = json!({
        "metadata": {
            "name": name, "namespace": "team", "uid": format!("uid-{name}"), "resourceVersion": "7",
            "creationTimestamp": "2026-11-30T08:00:00Z",
            "annotations": {"volume.kubernetes.io/storage-provisioner": DRIVER},
        },
        "spec": {
            "accessModes": ["ReadOnlyMany"], "storageClassName": "artifacts",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    });
    serde_json::from_value(merged(base, change)).expect("a claim")
}

fn class(change: Value) -> StorageClass {
    let base = json!({
        "metadata": {"name": "artifacts"}, "provisioner": DRIVER,
        "parameters": {"reference": "r.io/team/tool:v1"},
    });
    serde_json::from_value(merged(base, change)).expect("a class")
}

/// A state with one class and these claims.
fn state(class: &StorageClass, claims: &[PersistentVolumeClaim]) -> ProvisionState {
    let mut state = ProvisionState::new(DRIVER, RULES);
    if let Some(facts) = state.class(class) {
        state.classes.insert("artifacts".into(), facts);
    }
    for claim in claims {
        let key = controller_runtime::object_watch::key_of(claim).expect("a name");
        if let Some(facts) = state.claim(claim) {
            state.claims.insert(key.into(), facts);
        }
    }
    state
}

/// Answers all lookups that the plan wants.
fn answer(state: &mut ProvisionState, outcome: &Result<(), ResolutionFailure>) -> usize {
    let wanted = plan(state, NOW).lookups;
    for key in &wanted {
        let known = LookupFacts { outcome: outcome.clone(), until: NOW + 60, failures: 1 };
        state.lookups.insert(key.clone(), known);
    }
    wanted.len()
}

fn failure(message: &str, unanswered: bool) -> Result<(), ResolutionFailure> {
    let (message, transient) = (message.to_owned(), unanswered);
    Err(ResolutionFailure { reason: "Test", message, transient, unanswered, retry_at: NOW })
}

/// State of the claim `tool` once the registry has answered that the artifact exists.
fn decided(class: &StorageClass, claim: PersistentVolumeClaim) -> PendingClaim {
    let mut state = state(class, &[claim]);
    answer(&mut state, &Ok(()));
    plan(&state, NOW).pending.remove("team/tool").expect("a decision")
}

#[track_caller]
fn created(class: &StorageClass, claim: PersistentVolumeClaim) -> Value {
    match decided(class, claim) {
        PendingClaim::Create(volume, None) => serde_json::to_value(volume).expect("JSON"),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn refused(class: &StorageClass, claim: PersistentVolumeClaim) -> String {
    match decided(class, claim) {
        PendingClaim::Refused(reason) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_volume_is_what_external_provisioner_makes() {
    let class = class(json!({"mountOptions": ["noexec"], "parameters": {
        "csi.storage.k8s.io/node-publish-secret-name": "pull-${pvc.name}",
        "csi.storage.k8s.io/node-publish-secret-namespace": "${pvc.namespace}",
    }}));
    let expected = json!({
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {
            "name": "pvc-uid-tool",
            "annotations": {"pv.kubernetes.io/provisioned-by": DRIVER},
            "finalizers": ["external-provisioner.volume.kubernetes.io/finalizer"],
        },
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "capacity": {"storage": "1Gi"},
            "claimRef": {
                "apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": "team",
                "name": "tool", "uid": "uid-tool", "resourceVersion": "7",
            },
            "csi": {
                "driver": DRIVER, "volumeHandle": "pvc-uid-tool", "readOnly": true,
                "volumeAttributes": {"reference": "r.io/team/tool:v1"},
                "nodePublishSecretRef": {"name": "pull-tool", "namespace": "team"},
            },
            "mountOptions": ["noexec"],
            "persistentVolumeReclaimPolicy": "Delete",
            "storageClassName": "artifacts",
            "volumeMode": "Filesystem",
        },
    });
    assert_eq!(created(&class, claim("tool", json!({}))), expected);
}

#[test]
fn a_retained_volume_has_no_finalizer() {
    let volume = created(&class(json!({"reclaimPolicy": "Retain"})), claim("tool", json!({})));
    assert_eq!(volume["spec"]["persistentVolumeReclaimPolicy"], "Retain");
    assert_eq!(volume["metadata"]["finalizers"], Value::Null);
}

#[test]
fn claims_of_others_and_claims_that_wait_are_left_alone() {
    let annotated = |key: &str, value: &str| json!({"metadata": {"annotations": {key: value}}});
    let key = "volume.kubernetes.io/storage-provisioner";
    for change in [annotated(key, "ebs.csi.aws.com"), json!({"metadata": {"annotations": null}})] {
        assert!(state(&class(json!({})), &[claim("tool", change)]).claims.is_empty());
    }
    let beta = json!({"metadata": {"annotations": {
        key: null, "volume.beta.kubernetes.io/storage-provisioner": DRIVER,
    }}});
    created(&class(json!({})), claim("tool", beta));

    for done in [
        json!({"spec": {"volumeName": "other"}}),
        json!({"metadata": {"deletionTimestamp": "2026-11-30T09:00:00Z"}}),
    ] {
        let plan = plan(&state(&class(json!({})), &[claim("tool", done)]), NOW);
        assert_eq!((plan.pending.len(), plan.provisioned), (0, 1));
    }

    let later = class(json!({"volumeBindingMode": "WaitForFirstConsumer"}));
    assert_eq!(decided(&later, claim("tool", json!({}))), PendingClaim::WaitsForConsumer);
    let chosen = annotated("volume.kubernetes.io/selected-node", "worker-1");
    created(&later, claim("tool", chosen));
}

#[test]
fn a_claim_gets_one_volume() {
    let mut state = state(&class(json!({})), &[claim("tool", json!({}))]);
    answer(&mut state, &Ok(()));
    state.volumes.insert("pvc-uid-tool".into(), VolumeFacts::default());
    assert!(plan(&state, NOW).pending.is_empty());
}

#[test]
fn what_no_artifact_serves_is_refused() {
    for (change, reason) in [
        (json!({"spec": {"volumeMode": "Block"}}), "volumeMode: Filesystem"),
        (json!({"spec": {"selector": {}}}), "remove it"),
        (json!({"spec": {"dataSource": {"kind": "a", "name": "b"}}}), "dataSource"),
        (json!({"spec": {"dataSourceRef": {"kind": "a", "name": "b"}}}), "dataSourceRef"),
        (json!({"spec": {"volumeAttributesClassName": "a"}}), "volumeAttributesClassName"),
        (json!({"spec": {"accessModes": ["ReadWriteOnce"]}}), "ReadWriteOnce is not ReadOnlyMany"),
        (json!({"spec": {"accessModes": ["ReadOnlyMany", "ReadWriteMany"]}}), "allowAnyAccessMode"),
        (json!({"spec": {"storageClassName": "gone"}}), "there is no StorageClass \"gone\""),
    ] {
        let text = refused(&class(json!({})), claim("tool", change.clone()));
        assert!(text.contains(reason), "{change}: {text}");
    }
    let other = class(json!({"provisioner": "ebs.csi.aws.com"}));
    assert!(refused(&other, claim("tool", json!({}))).contains("there is no StorageClass"));
}

#[test]
fn a_class_may_allow_any_access_mode() {
    let class = class(json!({"parameters": {"allowAnyAccessMode": "true"}}));
    let modes = json!(["ReadWriteOnce", "ReadOnlyMany"]);
    let volume = created(&class, claim("tool", json!({"spec": {"accessModes": modes}})));
    assert_eq!(volume["spec"]["accessModes"], modes);
    assert_eq!(volume["spec"]["csi"]["readOnly"], true);
}

#[test]
fn a_wrong_class_is_refused_at_the_claim() {
    for (parameters, reason) in [
        (json!({"refrence": "a"}), "\"refrence\" is not known: use reference"),
        (json!({"reference": "UPPER/case"}), "UPPER/case"),
        (json!({"reference": "r.io/${pvc.uid}"}), "${pvc.uid} is not known"),
        (json!({"reference": "r.io/${pvc.annotations['a']}"}), "the claim has no annotation a"),
        (json!({"allowedRepositories": "r.io/other"}), "allowedRepositories: r.io/other"),
    ] {
        let text = refused(&class(json!({"parameters": parameters})), claim("tool", json!({})));
        assert!(text.contains(reason), "{parameters}: {text}");
    }
    let text = refused(&class(json!({"mountOptions": ["rw"]})), claim("tool", json!({})));
    assert!(text.contains("\"rw\""), "{text}");
}

#[test]
fn the_annotation_names_the_artifact_where_the_class_does_not() {
    let annotated = |reference: &str| {
        let annotations = json!({claim_volume::REFERENCE_ANNOTATION: reference});
        claim("tool", json!({"metadata": {"annotations": annotations}}))
    };
    let named = class(json!({}));
    let unnamed =
        class(json!({"parameters": {"reference": null, "allowedRepositories": "r.io/team"}}));
    let volume = created(&unnamed, annotated("r.io/team/other:v2"));
    assert_eq!(volume["spec"]["csi"]["volumeAttributes"]["reference"], "r.io/team/other:v2");
    assert!(refused(&unnamed, annotated("evil.org/tool:v1")).contains("r.io/team"));
    assert!(refused(&unnamed, claim("tool", json!({}))).contains("oci.custom.io/reference"));
    // Content that the author did not ask for would be a surprise.
    assert!(refused(&named, annotated("r.io/team/tool:v2")).contains("remove the annotation"));
    let template = "r.io/team/${pvc.annotations['oci.custom.io/reference']}";
    let templated = class(json!({"parameters": {"reference": template}}));
    let volume = created(&templated, annotated("deep/tool:v2"));
    assert_eq!(volume["spec"]["csi"]["volumeAttributes"]["reference"], "r.io/team/deep/tool:v2");
}

#[test]
fn the_registry_is_asked_once_for_equal_claims() {
    let secret = json!({"parameters": {
        "csi.storage.k8s.io/node-publish-secret-name": "pull",
        "csi.storage.k8s.io/node-publish-secret-namespace": "team",
    }});
    let claims: Vec<_> = (0..1000).map(|n| claim(&format!("tool-{n}"), json!({}))).collect();
    let mut state = state(&class(secret), &claims);
    let secret = SecretName { namespace: "team".to_owned(), name: "pull".to_owned() };
    let (namespace, reference) = ("team".to_owned(), "r.io/team/tool:v1".to_owned());
    let key = LookupKey { namespace, reference, secret: Some(secret) };
    assert_eq!(plan(&state, NOW).lookups, [key].into());
    answer(&mut state, &Ok(()));
    let plan = plan(&state, NOW);
    assert!(plan.lookups.is_empty());
    let is_created = |claim: &PendingClaim| matches!(claim, PendingClaim::Create(..));
    assert_eq!(plan.pending.values().filter(|claim| is_created(claim)).count(), 1000);
}

#[test]
fn the_registry_is_not_asked_where_nodes_never_do() {
    let never = class(json!({"parameters": {"pullPolicy": "Never"}}));
    let mut state = state(&never, &[claim("tool", json!({}))]);
    assert_eq!(answer(&mut state, &Ok(())), 0);
    created(&never, claim("tool", json!({})));
}

#[test]
fn a_missing_artifact_is_refused_and_looked_up_again() {
    let mut state = state(&class(json!({})), &[claim("tool", json!({}))]);
    answer(&mut state, &failure("there is no such tag", false));
    let planned = plan(&state, NOW);
    let expected = PendingClaim::Refused("there is no such tag".to_owned());
    assert_eq!(planned.pending["team/tool"], expected);
    assert_eq!((planned.wake, planned.lookups.len()), (Some(NOW + 60), 0));
    let planned = plan(&state, NOW + 60);
    assert_eq!(planned.pending["team/tool"], expected, "until there is another answer");
    assert_eq!(planned.lookups.len(), 1);
}

#[test]
fn a_registry_that_does_not_answer_holds_nothing_up() {
    let mut state = state(&class(json!({})), &[claim("tool", json!({}))]);
    answer(&mut state, &failure("no route to host", true));
    match &plan(&state, NOW).pending["team/tool"] {
        PendingClaim::Create(_, Some(reason)) => assert_eq!(reason, "no route to host"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_volume_that_the_api_server_refused_waits() {
    let mut state = state(&class(json!({})), &[claim("tool", json!({}))]);
    answer(&mut state, &Ok(()));
    let message = "a policy".to_owned();
    let failed = FailedWrite { message: message.clone(), retry_at: NOW + 10, failures: 1 };
    state.failed_writes.insert("uid-tool".to_owned(), failed);
    let planned = plan(&state, NOW);
    assert_eq!(planned.pending["team/tool"], PendingClaim::Refused(message));
    assert_eq!(planned.wake, Some(NOW + 10));
    assert!(matches!(plan(&state, NOW + 10).pending["team/tool"], PendingClaim::Create(..)));
}

#[test]
fn the_oldest_claims_of_a_namespace_count() {
    let at = |name: &str, time: &str, namespace: &str| {
        let change = json!({"metadata": {"creationTimestamp": time, "namespace": namespace}});
        claim(name, change)
    };
    let mut claims = vec![
        at("newest", "2026-11-30T08:00:03Z", "team"),
        at("older", "2026-11-30T08:00:01Z", "team"),
        at("other", "2026-11-30T08:00:04Z", "another"),
        at("oldest", "2026-11-30T08:00:00Z", "team"),
    ];
    // A claim with a volume counts too.
    claims[3].spec.as_mut().expect("a spec").volume_name = Some("pvc-uid-oldest".to_owned());
    let mut state = state(&class(json!({})), &claims);
    state.claims_per_namespace = Some(2);
    assert_eq!(answer(&mut state, &Ok(())), 2);
    let plan = plan(&state, NOW);
    let is_refused = |key: &str| match &plan.pending[key] {
        PendingClaim::Refused(reason) => {
            reason.contains("has 3 claims") && reason.contains("oldest 2")
        }
        _ => false,
    };
    assert!(is_refused("team/newest") && !is_refused("team/older") && !is_refused("another/other"));
}

#[test]
fn volumes_go_when_they_are_released() {
    let finalizer = vec![FINALIZER.to_owned()];
    for (phase, deletable, deleted, with_finalizer, expected) in [
        ("Bound", true, false, true, None),
        ("Bound", true, false, false, Some(VolumeChange::AddFinalizer)),
        ("Bound", true, true, true, None),
        ("Bound", false, false, true, Some(VolumeChange::RemoveFinalizer)),
        ("Bound", false, false, false, None),
        ("Released", true, false, true, Some(VolumeChange::Delete)),
        ("Released", true, true, true, Some(VolumeChange::RemoveFinalizer)),
        ("Released", true, true, false, None),
        ("Released", false, false, false, None),
        ("Available", true, false, true, None),
        ("Available", true, true, true, Some(VolumeChange::RemoveFinalizer)),
        ("", true, false, true, None),
    ] {
        let volume = VolumeFacts {
            phase: phase.to_owned(),
            is_deletable: deletable,
            is_deleted: deleted,
            finalizers: if with_finalizer { finalizer.clone() } else { Vec::new() },
            ..VolumeFacts::default()
        };
        assert_eq!(volume_change(&volume), expected, "{volume:?}");
    }
}

#[test]
fn volumes_of_others_are_no_facts() {
    let volume = |provisioner: &str, driver: &str| -> PersistentVolume {
        let annotations = json!({"pv.kubernetes.io/provisioned-by": provisioner});
        let csi = json!({"driver": driver, "volumeHandle": "a"});
        let metadata = json!({"name": "a", "uid": "1", "annotations": annotations});
        let object = json!({"metadata": metadata, "spec": {"csi": csi}});
        serde_json::from_value(object).expect("a volume")
    };
    let state = ProvisionState::new(DRIVER, RULES);
    assert!(state.volume(&volume(DRIVER, DRIVER)).is_some());
    assert!(state.volume(&volume("other", DRIVER)).is_none());
    assert!(state.volume(&volume(DRIVER, "other")).is_none());
    let mut manual = volume(DRIVER, DRIVER);
    manual.metadata.annotations = None;
    assert!(state.volume(&manual).is_none());
}

proptest! {
    /// No claim ever reaches an artifact, a secret or an access mode that its class does not allow.
    #[test]
    fn a_claim_gets_no_more_than_its_class_allows(
        reference in prop_oneof![
            "[a-z./:@${}']{0,24}",
            "(r\\.io|evil\\.org)/(team|other)(/[a-z]{1,3}){0,2}(:v[0-9])?",
        ],
        template in prop_oneof![
            Just(""), Just("r.io/team/${pvc.annotations['a']}"), Just("${pvc.annotations['a']}"),
            Just("r.io/${pvc.namespace}/${pvc.name}:v1"),
        ],
        allowed in prop_oneof![Just(""), Just("r.io/team"), Just("r.io")],
        secret_namespace in prop_oneof![Just(""), Just("${pvc.namespace}"), Just("platform")],
        modes in prop::collection::vec(prop_oneof![
            Just("ReadOnlyMany"), Just("ReadWriteOnce"), Just("ReadWriteMany"),
        ], 0..3),
    ) {
        let annotations = json!({"a": reference, "oci.custom.io/reference": reference});
        let change = json!({
            "metadata": {"annotations": annotations}, "spec": {"accessModes": modes},
        });
        let secret_name = if secret_namespace.is_empty() { "" } else { "${pvc.annotations['a']}" };
        let class = class(json!({"parameters": {
            "reference": template, "allowedRepositories": allowed,
            "csi.storage.k8s.io/node-publish-secret-name": secret_name,
            "csi.storage.k8s.io/node-publish-secret-namespace": secret_namespace,
        }}));
        if let PendingClaim::Create(volume, _) = decided(&class, claim("tool", change)) {
            let csi = volume.spec.expect("a spec").csi.expect("a source");
            let attributes: HashMap<_, _> = csi.volume_attributes.expect("some").into_iter().collect();
            let named = &attributes["reference"];
            let parsed: oci::Reference = named.parse().expect("it was checked");
            let repository = parsed.repository().to_string();
            let is_below = |parent: &str| {
                repository == parent || repository.starts_with(&format!("{parent}/"))
            };
            prop_assert!(allowed.is_empty() || is_below(allowed), "{} {}", repository, allowed);
            prop_assert!(modes.iter().all(|mode| *mode == "ReadOnlyMany"));
            if let Some(secret) = csi.node_publish_secret_ref {
                let namespace = secret.namespace.expect("a namespace");
                prop_assert!(namespace == "team" || !allowed.is_empty());
            }
        }
    }
}
