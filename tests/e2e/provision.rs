//! Tests volumes for claims: the real controller, a simulated API server, and a real registry.

use std::{collections::BTreeSet, fs};

use base64::Engine as _;
use serde_json::{Value, json};

use crate::support::{
    Layer, Manifest, Proxy,
    api_server::{Fault, Kind},
    preload_cluster::{Cluster, NAMESPACE},
    private_registry, registry, unique, wait_until,
};

const DRIVER: &str = "oci.custom.io";
const ARGUMENTS: [&str; 3] = ["--provisioner", "--preloads=false", "--writes-per-second=1000"];

impl Cluster {
    fn class(&self, name: &str, parameters: Value) {
        self.api.apply(json!({
            "kind": "StorageClass", "metadata": {"name": name}, "provisioner": DRIVER,
            "reclaimPolicy": "Delete", "volumeBindingMode": "Immediate", "parameters": parameters,
        }));
    }

    /// Creates a claim, as it is when Kubernetes has found its provisioner.
    fn claim(&self, name: &str, class: &str, annotations: Value) {
        let mut annotations = annotations;
        annotations["volume.kubernetes.io/storage-provisioner"] = DRIVER.into();
        self.api.apply(json!({
            "kind": "PersistentVolumeClaim",
            "metadata": {"namespace": NAMESPACE, "name": name, "annotations": annotations},
            "spec": {
                "accessModes": ["ReadOnlyMany"], "storageClassName": class,
                "resources": {"requests": {"storage": "1Gi"}},
            },
        }));
    }

    /// Returns the volume of a claim, or null.
    fn volume(&self, claim: &str) -> Value {
        let claim = self.api.get(Kind::Claim, NAMESPACE, claim);
        let uid = claim["metadata"]["uid"].as_str().expect("a uid").to_owned();
        self.api.get(Kind::Volume, "", &format!("pvc-{uid}"))
    }

    /// Returns reason and message of each event of a claim.
    fn claim_events(&self, claim: &str) -> String {
        let mut events = self.api.list(Kind::Event);
        events.retain(|event| event["involvedObject"]["name"] == claim);
        let text =
            |event: &Value, field: &str| event[field].as_str().unwrap_or_default().to_owned();
        let line = |event| format!("{}: {}\n", text(event, "reason"), text(event, "message"));
        events.iter().map(line).collect()
    }

    #[track_caller]
    fn wait_for_volume(&self, claim: &str) -> Value {
        wait_until(&format!("a volume of {claim}"), || self.volume(claim).is_object());
        wait_until("its event", || self.claim_events(claim).contains("ProvisioningSucceeded"));
        self.volume(claim)["spec"].clone()
    }

    #[track_caller]
    fn wait_for_refusal(&self, claim: &str, reason: &str) {
        let mut last = String::new();
        wait_until(&format!("{claim} is refused with {reason:?}"), || {
            let events = self.claim_events(claim);
            if events != last {
                eprintln!("{claim}: {events}");
                last.clone_from(&events);
            }
            events.contains("ProvisioningFailed: ") && events.contains(reason)
        });
        assert!(self.volume(claim).is_null(), "{claim} has a volume");
    }
}

#[test]
fn a_claim_that_cannot_be_served_says_why_and_the_others_go_on() {
    let cluster = Cluster::new(&[]);
    let policy = cluster.sandbox.path().join("policy.yaml");
    let text = format!(
        "apiVersion: oci.custom.io/v1alpha1\nkind: NodeConfiguration\npolicy:\n  rules:\n    - references: [\"**/forbidden-*\"]\n      namespaces: [{NAMESPACE}]\n      action: Deny\n"
    );
    fs::write(&policy, text).expect("a configuration");
    let config = format!("--config={}", policy.display());
    let _controller = cluster.controller_with(&[&ARGUMENTS[..], &[config.as_str()]].concat());
    let (good, _) = cluster.artifact("v1");
    let (forbidden, _) = cluster.push(&unique("forbidden"), "v1");
    let late = unique("late");
    let gone = cluster.reference(&format!("{late}:v1"));
    cluster.class("good", json!({"reference": good, "include": "**/*.txt"}));
    cluster.class("misspelt", json!({"refrence": good}));
    cluster.class("wrong", json!({"reference": good, "pullPolicy": "Sometimes"}));
    cluster.class("gone", json!({"reference": gone}));
    cluster.class("forbidden", json!({"reference": forbidden}));
    cluster.class("unreachable", json!({"reference": "127.0.0.1:1/tool:v1"}));
    cluster.class("open", json!({"allowedRepositories": cluster.reference("fleet")}));
    let (allowed, _) = good.rsplit_once(':').expect("a tag");
    let list = "${pvc.annotations['list']}";
    cluster.class("list", json!({"artifacts": list, "allowedRepositories": allowed}));
    for class in ["good", "misspelt", "wrong", "gone", "forbidden", "unreachable", "missing"] {
        cluster.claim(class, class, json!({}));
    }
    cluster.claim("open", "open", json!({"oci.custom.io/reference": good}));
    let listed = format!("[{{reference: '{good}'}}, {{reference: '{gone}', path: other}}]");
    cluster.claim("list", "list", json!({"list": listed}));
    for (claim, reason) in [
        ("list", &*format!("{gone} is in none of its allowedRepositories")),
        ("misspelt", "the parameter \"refrence\" is not known: use reference, "),
        ("wrong", "use Always, IfNotPresent or Never"),
        ("gone", "the registry has no manifest v1 of "),
        ("forbidden", "policy"),
        ("missing", "there is no StorageClass \"missing\" of the provisioner oci.custom.io"),
        ("open", "allowedRepositories"),
    ] {
        cluster.wait_for_refusal(claim, reason);
    }
    let volume = cluster.wait_for_volume("good");
    let expected = json!({"reference": good, "include": "**/*.txt"});
    assert_eq!(volume["csi"]["volumeAttributes"], expected);
    assert_eq!(volume["claimRef"]["name"], "good");
    // Nodes may have the content.
    cluster.wait_for_volume("unreachable");
    assert!(cluster.claim_events("unreachable").contains("RegistryUnavailable: "));

    // The whole list of a class is asked for.
    let both = json!({"artifacts": listed.replace(&gone, &forbidden), "pullPolicy": "Always"});
    cluster.class("both", both);
    cluster.claim("both", "both", json!({}));
    cluster.wait_for_refusal("both", "policy");

    // After the mistakes are corrected, the same claims get volumes.
    cluster.push(&late, "v1");
    cluster.class("misspelt", json!({"reference": good}));
    cluster.class("missing", json!({"reference": good}));
    cluster.class("open", json!({}));
    for claim in ["gone", "misspelt", "missing", "open"] {
        cluster.wait_for_volume(claim);
    }
    // A class that is deleted in between takes no volume away.
    cluster.api.delete(Kind::Class, "", "good");
    cluster.claim("later", "good", json!({}));
    cluster.wait_for_refusal("later", "there is no StorageClass \"good\"");
    assert!(cluster.volume("good").is_object());
}

#[test]
fn the_registry_is_asked_with_the_secret_of_the_class() {
    const PASSWORD: &str = "planted-password-of-claims";
    let private = private_registry("robot", PASSWORD);
    let cluster = Cluster::before(&private, &[]);
    let _controller = cluster.controller_with(&ARGUMENTS);
    let repository = unique("private");
    let layer = Layer::titled("secret.txt", format!("of {repository}"));
    Manifest::artifact([layer]).push(&private.as_user("robot", PASSWORD), &repository, "v1");
    let reference = cluster.reference(&format!("{repository}:v1"));
    let secret = |namespace: &str, name: &str, password: &str| {
        let auths = json!({private.host(): {"username": "robot", "password": password}});
        let config = json!({"auths": auths}).to_string();
        let data = base64::engine::general_purpose::STANDARD.encode(config);
        cluster.api.apply(json!({
            "kind": "Secret", "metadata": {"namespace": namespace, "name": name},
            "type": "kubernetes.io/dockerconfigjson", "data": {".dockerconfigjson": data},
        }));
    };
    let class = |name: &str, namespace: &str| {
        cluster.class(
            name,
            json!({
                "reference": reference,
                "csi.storage.k8s.io/node-publish-secret-name": "pull-${pvc.name}",
                "csi.storage.k8s.io/node-publish-secret-namespace": namespace,
            }),
        );
    };
    secret(NAMESPACE, "pull-right", PASSWORD);
    secret(NAMESPACE, "pull-wrong", "another");
    secret("platform", "pull-central", PASSWORD);
    class("own", "${pvc.namespace}");
    class("central", "platform");
    cluster.class("anonymous", json!({"reference": reference}));
    for (claim, class, reason) in [
        ("wrong", "own", "401"),
        ("absent", "own", "there is no secret team/pull-absent"),
        ("right-elsewhere", "central", "there is no secret platform/pull-right-elsewhere"),
        ("anonymous", "anonymous", "401"),
    ] {
        cluster.claim(claim, class, json!({}));
        cluster.wait_for_refusal(claim, reason);
    }
    for (claim, class, namespace) in
        [("right", "own", NAMESPACE), ("central", "central", "platform")]
    {
        cluster.claim(claim, class, json!({}));
        let volume = cluster.wait_for_volume(claim);
        let expected = json!({"name": format!("pull-{claim}"), "namespace": namespace});
        assert_eq!(volume["csi"]["nodePublishSecretRef"], expected);
    }
    let log = fs::read_to_string(cluster.sandbox.path().join("controller.log")).expect("a log");
    let written =
        format!("{:?}{:?}", cluster.api.list(Kind::Event), cluster.api.list(Kind::Volume));
    assert!(!log.contains(PASSWORD) && !written.contains(PASSWORD));
}

#[test]
fn a_thousand_claims_have_one_volume_each_though_the_leader_is_killed() {
    const CLAIMS: usize = 1000;
    let proxy = Proxy::new(registry());
    let cluster = Cluster::before(registry(), &[]);
    let repository = unique("many");
    cluster.push(&repository, "v1");
    cluster.class("many", json!({"reference": proxy.reference(&format!("{repository}:v1"))}));
    for number in 0..CLAIMS {
        cluster.claim(&format!("data-web-{number}"), "many", json!({}));
    }
    let arguments = ["--provisioner", "--preloads=false", "--max-claims-per-namespace=0"];
    let mut first = cluster.controller_with(&arguments);
    let volumes = || cluster.api.list(Kind::Volume);
    wait_until("some volumes", || volumes().len() > CLAIMS / 10);
    let _second =
        cluster.controller_with(&[&arguments[..], &["--writes-per-second=1000"]].concat());
    first.kill();
    let left = volumes().len();
    assert!(left < CLAIMS, "all were there before the leader was killed");
    wait_until("all volumes", || volumes().len() == CLAIMS);
    let succeeded = |event: &&Value| event["reason"] == "ProvisioningSucceeded";
    wait_until("the events of the second controller", || {
        cluster.api.list(Kind::Event).iter().filter(succeeded).count() >= CLAIMS - left
    });
    let claims: BTreeSet<_> = volumes()
        .iter()
        .map(|volume| volume["spec"]["claimRef"]["name"].as_str().unwrap_or_default().to_owned())
        .collect();
    assert_eq!((claims.len(), volumes().len()), (CLAIMS, CLAIMS));
    let asked = proxy.fetches("/manifests/");
    assert!(asked <= 10, "the registry was asked {asked} times for one artifact");
}

#[test]
fn an_api_server_that_is_troubled_is_borne_by_claims() {
    let cluster = Cluster::new(&[]);
    let _controller = cluster.controller_with(&ARGUMENTS);
    let (reference, _) = cluster.artifact("v1");
    cluster.class("tools", json!({"reference": reference}));
    for round in 0..3 {
        for (kind, writes, status) in [
            (Kind::Volume, true, 429),
            (Kind::Volume, true, 409),
            (Kind::Volume, true, 500),
            (Kind::Claim, false, 503),
            (Kind::Event, true, 500),
        ] {
            cluster.api.fail(Fault { kind, writes, status, times: 1 });
        }
        cluster.api.forget_history();
        cluster.api.break_watches();
        let claim = format!("tool-{round}");
        cluster.claim(&claim, "tools", json!({}));
        wait_until("a volume", || cluster.volume(&claim).is_object());
    }
    // A refusal is told and tried again.
    cluster.api.fail(Fault { kind: Kind::Volume, writes: true, status: 403, times: 1 });
    cluster.claim("refused", "tools", json!({}));
    wait_until("the refusal", || {
        cluster.claim_events("refused").contains("the API server refuses its volume")
    });
    cluster.wait_for_volume("refused");
}

#[test]
fn a_namespace_has_so_many_claims_and_no_more() {
    let cluster = Cluster::new(&[]);
    let _controller =
        cluster.controller_with(&[&ARGUMENTS[..], &["--max-claims-per-namespace=2"]].concat());
    let (reference, _) = cluster.artifact("v1");
    cluster.class("tools", json!({"reference": reference}));
    for name in ["a", "b"] {
        cluster.claim(name, "tools", json!({}));
        cluster.wait_for_volume(name);
    }
    cluster.claim("c", "tools", json!({}));
    cluster.wait_for_refusal("c", "has 3 claims of oci.custom.io, of which the oldest 2 count");
    cluster.api.delete(Kind::Claim, NAMESPACE, "a");
    cluster.wait_for_volume("c");
}
