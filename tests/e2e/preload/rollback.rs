//! Tests preloads and pods while the registry is down.

use base64::Engine as _;
use jiff::Timestamp;
use serde_json::{Value, json};
use tonic::Code;

use super::{DOCKER, secret};
use crate::support::{
    Admin, Answer, Driver, FakeRegistry, Layer, Manifest, Pod, Proxy, Registry, Volume,
    api_server::Kind,
    preload_cluster::{Cluster, Controller, NAMESPACE},
    private_registry, registry, unique, wait_until,
};

const NODES: [&str; 2] = ["one", "two"];
const USER: &str = "robot";
const PASSWORD: &str = "password-of-the-robot";

/// Two nodes and a controller with a registry that can go down.
struct Setup {
    proxy: Proxy,
    cluster: Cluster,
    controller: Controller,
    repository: String,
    /// References by tag, each with its digest.
    versions: Vec<(String, String)>,
    is_private: bool,
}

impl Setup {
    #[track_caller]
    fn start(registry: &Registry, is_private: bool) -> Self {
        Self::start_with(registry, is_private, "")
    }

    #[track_caller]
    fn start_with(registry: &Registry, is_private: bool, configuration: &str) -> Self {
        let (proxy, repository) = (Proxy::new(registry), unique("rollback"));
        let mut cluster = Cluster::before(registry, &NODES);
        let controller = cluster.controller();
        for node in NODES {
            let driver = cluster.options(node).configuration(configuration).start();
            cluster.drivers.push(driver);
        }
        let mut versions = Vec::new();
        for tag in ["v0", "v1", "v2"] {
            let layer = Layer::titled("version", format!("{tag} of {repository}"));
            let artifact = Manifest::artifact([layer]);
            let digest = if is_private {
                artifact.push(&registry.as_user(USER, PASSWORD), &repository, tag)
            } else {
                artifact.push(registry, &repository, tag)
            };
            versions.push((proxy.reference(&format!("{repository}:{tag}")), digest));
        }
        let setup = Self { proxy, cluster, controller, repository, versions, is_private };
        setup.make_secret(PASSWORD);
        setup
    }

    fn make_secret(&self, password: &str) {
        if self.is_private {
            secret(&self.cluster.api, "robot", DOCKER, &self.proxy.host(), USER, password);
        }
    }

    fn spec(&self, reference: &str) -> Value {
        let secrets: &[&str] = if self.is_private { &["robot"] } else { &[] };
        json!({"reference": reference, "pullSecrets": secrets, "backoffLimit": 0})
    }

    fn tag(&self, version: usize) -> &str {
        &self.versions[version].0
    }

    fn pinned(&self, version: usize) -> String {
        let (tag, digest) = &self.versions[version];
        format!("{tag}@{digest}")
    }

    #[track_caller]
    fn roll(&self, name: &str, reference: &str, reason: &str) {
        self.cluster.preload(name, self.spec(reference));
        self.cluster.wait_for(name, reason);
    }

    /// Restarts the controller and both nodes.
    #[track_caller]
    fn restart(&mut self) {
        self.controller.end();
        let drivers = std::mem::take(&mut self.cluster.drivers);
        self.cluster.drivers = drivers.into_iter().map(Driver::restart).collect();
        self.controller = self.cluster.controller();
    }

    /// Restarts the nodes, and waits until they hold what they are to hold.
    #[track_caller]
    fn restart_nodes(&mut self) {
        let status = |setup: &Self, node| {
            setup.cluster.api.get(Kind::NodeArtifacts, "", node)["status"].clone()
        };
        let keys = NODES.map(|node| status(self, node)["publicKey"].clone());
        let drivers = std::mem::take(&mut self.cluster.drivers);
        self.cluster.drivers = drivers.into_iter().map(Driver::restart).collect();
        for (node, key) in NODES.into_iter().zip(keys) {
            wait_until("the node holds all that it is to hold", || {
                let status = status(self, node);
                let held = self.cluster.wanted(node).len();
                status["publicKey"] != key && status["ready"] == held
            });
        }
    }

    /// Returns a volume of a pod of a namespace. Private artifacts have the secret.
    fn volume(&self, node: usize, namespace: &str, reference: &str) -> Volume {
        let pod = Pod { namespace: namespace.to_owned(), ..Pod::new() };
        let volume = self.cluster.drivers[node].kubelet().inline(&pod, "artifact", reference);
        if !self.is_private {
            return volume;
        }
        let login = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
        let config = json!({"auths": {self.proxy.host(): {"auth": login}}}).to_string();
        volume.secret(".dockerconfigjson", &config)
    }

    /// Asserts that pods of both nodes show this version.
    #[track_caller]
    fn shows(&self, namespace: &str, reference: &str, version: usize) {
        for node in 0..2 {
            let kubelet = self.cluster.drivers[node].kubelet();
            let volume = self.volume(node, namespace, reference);
            kubelet.publish_well(&volume);
            assert_eq!(volume.text("version"), format!("v{version} of {}", self.repository));
            kubelet.unpublish(&volume);
        }
    }

    fn events(&self, name: &str) -> Vec<String> {
        let of = |event: &Value| {
            event["involvedObject"]["name"] == name && event["metadata"]["namespace"] == NAMESPACE
        };
        let events = self.cluster.api.list(Kind::Event);
        let told = events.iter().filter(|event| of(event));
        told.map(|event| event["reason"].as_str().unwrap_or_default().to_owned()).collect()
    }
}

#[track_caller]
fn roll_back(registry: &Registry, is_private: bool) {
    let mut setup = Setup::start(registry, is_private);
    for version in 0..3 {
        setup.roll("tool", setup.tag(version), "Ready");
    }
    setup.proxy.go_down();
    setup.restart();

    // By the tag: the previous version, which nodes keep, and an older one, which is cached.
    for version in [1, 0] {
        setup.roll("tool", setup.tag(version), "Ready");
        let status = setup.cluster.status("tool");
        assert_eq!(status["readyReference"], setup.pinned(version).as_str());
        assert!(status["registryUnavailableSince"].is_string(), "{status}");
        let resolved = setup.cluster.condition("tool", "Resolved");
        assert_eq!(resolved["reason"], "EarlierAnswer");
        let ready = setup.cluster.condition("tool", "Ready");
        let message = ready["message"].as_str().expect("a message");
        assert!(message.contains("the registry has not answered since"), "{message}");
        setup.shows(NAMESPACE, &setup.pinned(version), version);
        let wanted = setup.cluster.wanted("one");
        assert!(wanted.iter().all(|wanted| wanted["resolvedAt"].is_null()), "{wanted:?}");
    }
    // By the digest, with the tag and without.
    let digest = &setup.versions[1].1;
    let bare = setup.proxy.reference(&format!("{}@{digest}", setup.repository));
    for (reference, version) in [(setup.pinned(2), 2), (bare, 1)] {
        setup.roll("tool", &reference, "Ready");
        assert_eq!(setup.cluster.status("tool")["readyReference"], reference.as_str());
        setup.shows(NAMESPACE, &reference, version);
    }

    // A digest that was never there, another preload, and one of another namespace.
    let unknown = format!("{}@sha256:{}", setup.tag(1), "0".repeat(64));
    setup.roll("tool", &unknown, "RegistryUnavailable");
    setup.roll("other", setup.tag(1), "RegistryUnavailable");
    wait_until("it is told once", || setup.events("other") == ["Held"]);
    setup.roll("other", &setup.pinned(1), "RegistryUnavailable");
    let strange = json!({
        "kind": "ArtifactPreload",
        "metadata": {"namespace": "strangers", "name": "tool"},
        "spec": {"reference": setup.tag(1)},
    });
    setup.cluster.api.apply(strange);
    wait_until("the preload of the other namespace is held", || {
        let preload = setup.cluster.api.get(Kind::Preload, "strangers", "tool");
        let conditions = preload["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions
            .iter()
            .any(|one| one["type"] == "Ready" && one["reason"] == "RegistryUnavailable")
    });

    if is_private {
        // The secret is deleted, is no longer named, or is another one: nodes have proofs of one alone.
        setup.roll("tool", setup.tag(1), "Ready");
        setup.cluster.api.delete(Kind::Secret, NAMESPACE, "robot");
        setup.cluster.wait_for("tool", "SecretMissing");
        setup.roll("tool", setup.tag(0), "SecretMissing");
        setup.cluster.preload("tool", json!({"reference": setup.tag(0)}));
        setup.cluster.wait_for("tool", "RegistryUnavailable");
        setup.make_secret("another-password");
        setup.roll("tool", setup.tag(0), "NodesFailed");
        let failed = setup.cluster.status("tool")["failedNodes"].clone();
        assert_eq!(failed[0]["reason"], "RegistryUnavailable", "{failed}");
        setup.make_secret(PASSWORD);
        // Another version is requested, so that the secret is read again at once.
        setup.roll("tool", setup.tag(2), "Ready");
    }
    setup.roll("tool", setup.tag(0), "Ready");
    setup.proxy.come_back();
    wait_until("the registry is asked again", || {
        setup.cluster.status("tool")["registryUnavailableSince"].is_null()
    });
    setup.cluster.wait_for("tool", "Ready");
    assert_eq!(setup.cluster.condition("tool", "Resolved")["reason"], "Resolved");
    assert_eq!(setup.cluster.status("tool")["history"].as_array().map(Vec::len), Some(3));
    let events = setup.events("tool");
    assert!(events.starts_with(&["Resolved", "Ready"].map(str::to_owned)), "{events:?}");
}

#[test]
fn a_rollback_of_a_public_artifact_needs_no_registry() {
    roll_back(registry(), false);
}

#[test]
fn a_rollback_of_a_private_artifact_needs_no_registry_and_its_secret() {
    roll_back(&private_registry(USER, PASSWORD), true);
}

#[test]
fn a_rollback_with_another_secret_of_the_same_name_waits_for_the_registry() {
    let private = private_registry(USER, PASSWORD);
    let mut setup = Setup::start(&private, true);
    for version in 0..2 {
        setup.roll("tool", setup.tag(version), "Ready");
    }
    setup.proxy.go_down();
    setup.restart();
    setup.make_secret("another-password");
    // Nodes have it pinned, and no proof for this password.
    for reference in [setup.tag(0).to_owned(), setup.pinned(0)] {
        setup.roll("tool", &reference, "NodesFailed");
        let status = setup.cluster.status("tool");
        assert_eq!(status["readyReference"], setup.pinned(1).as_str());
        assert_eq!(status["failedNodes"][0]["reason"], "RegistryUnavailable", "{status}");
    }
    setup.make_secret(PASSWORD);
    setup.roll("tool", setup.tag(0), "Ready");
    assert_eq!(setup.cluster.status("tool")["readyReference"], setup.pinned(0).as_str());
    setup.shows(NAMESPACE, &setup.pinned(0), 0);
    setup.proxy.come_back();
    wait_until("nodes hold it under its own name", || {
        NODES.iter().all(|node| {
            let references = setup.cluster.pins(node).into_iter().map(|(_, reference)| reference);
            references.eq([setup.pinned(0), setup.pinned(1)])
        })
    });
    setup.cluster.wait_for("tool", "Ready");
}

#[test]
fn a_preloaded_tag_serves_pods_of_its_namespace_while_the_registry_is_down() {
    let private = private_registry(USER, PASSWORD);
    let mut setup = Setup::start(&private, true);
    setup.roll("tool", setup.tag(1), "Ready");
    setup.proxy.go_down();
    setup.restart();
    setup.shows(NAMESPACE, setup.tag(1), 1);
    let kubelet = setup.cluster.drivers[0].kubelet();
    kubelet.publish_badly(&setup.volume(0, "strangers", setup.tag(1)), Code::Unavailable);
    // Without the secret the content is treated as absent.
    let mut stranger = setup.volume(0, NAMESPACE, setup.tag(1));
    stranger.request.secrets.clear();
    kubelet.publish_badly(&stranger, Code::Unavailable);

    // The tag moves, and a pod resolves it on one node: the later resolution counts for all.
    setup.proxy.come_back();
    let repository = setup.repository.clone();
    let layer = Layer::titled("version", format!("v2 of {repository}"));
    Manifest::artifact([layer]).push(&private.as_user(USER, PASSWORD), &repository, "v1");
    let asks = setup.volume(0, "strangers", setup.tag(1)).attribute("pullPolicy", "Always");
    kubelet.publish_well(&asks);
    assert_eq!(asks.text("version"), format!("v2 of {repository}"));
    setup.proxy.go_down();
    // The preload's answer comes to both nodes again, and is older than that of the one.
    setup.restart_nodes();
    for (node, version) in [(0, 2), (1, 1)] {
        let kubelet = setup.cluster.drivers[node].kubelet();
        let volume = setup.volume(node, NAMESPACE, setup.tag(1));
        kubelet.publish_well(&volume);
        assert_eq!(volume.text("version"), format!("v{version} of {repository}"));
        kubelet.unpublish(&volume);
    }
    setup.cluster.drivers[0].kubelet().unpublish(&asks);
}

#[test]
fn of_two_answers_about_a_tag_the_later_one_serves_pods() {
    let mut setup = Setup::start(registry(), false);
    let reference = setup.tag(1).to_owned();
    // Nodes begin with preloads by name: the one with the later answer first.
    setup.roll("tool-b", &reference, "Ready");
    let answered = setup.cluster.status("tool-b")["history"][0]["resolvedAt"].clone();
    let answered: Timestamp = answered.as_str().expect("a time").parse().expect("a time");
    // Answers are compared by the second.
    wait_until("it is later", || Timestamp::now().as_second() > answered.as_second());
    let layer = Layer::titled("version", format!("v2 of {}", setup.repository));
    Manifest::artifact([layer]).push(registry(), &setup.repository, "v1");
    setup.roll("tool-a", &reference, "Ready");
    setup.proxy.go_down();
    setup.restart_nodes();
    setup.shows(NAMESPACE, &reference, 2);
}

/// Asks for a name and a password, and answers those that `answers` has for this password; with 200, the contents.
fn script(registry: &FakeRegistry, answers: [(&'static str, u16); 2]) {
    let login = |password| {
        let login = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{password}"));
        format!("Basic {login}")
    };
    let answers = answers.map(|(password, status)| (login(password), status));
    registry.script(move |request| {
        let Some(said) = request.header("authorization") else {
            let asks = Answer::error(401, "UNAUTHORIZED");
            return Some(asks.with_header("www-authenticate", "Basic realm=\"registry\""));
        };
        let status = answers.iter().find(|(login, _)| login == said).map_or(401, |found| found.1);
        (status != 200).then(|| Answer::error(status, "DENIED"))
    });
}

#[test]
fn a_registry_that_refuses_is_not_one_that_does_not_answer() {
    let registry = FakeRegistry::new();
    let mut cluster = Cluster::new(&["one"]);
    let _controller = cluster.controller();
    cluster.start_node("one");
    let secrets = ["first", "second"];
    for name in secrets {
        secret(&cluster.api, name, DOCKER, &registry.host(), USER, name);
    }
    let spec = |tag: &str| json!({"reference": registry.reference(tag), "pullSecrets": secrets});
    script(&registry, [("first", 200), ("second", 200)]);
    let mut pinned = Vec::new();
    for tag in ["v1", "v2"] {
        let artifact = Manifest::artifact([Layer::titled("version", tag)]);
        let digest = artifact.push(&registry, "hostile", tag);
        pinned.push(format!("{}@{digest}", registry.reference(tag)));
        cluster.preload("tool", spec(tag));
        cluster.wait_for("tool", "Ready");
    }
    for (first, second, reason) in [
        (401, 401, "Unauthorized"),
        (403, 403, "Forbidden"),
        (404, 404, "ReferenceNotFound"),
        // One of them is refused: that is an answer.
        (401, 503, "RegistryUnavailable"),
    ] {
        script(&registry, [("first", first), ("second", second)]);
        cluster.preload("tool", spec("v1"));
        cluster.wait_for("tool", reason);
        let status = cluster.status("tool");
        assert_eq!(status["readyReference"], pinned[1].as_str(), "{status}");
        assert!(status["registryUnavailableSince"].is_null(), "{status}");
        script(&registry, [("first", 200), ("second", 200)]);
        cluster.preload("tool", spec("v2"));
        cluster.wait_for("tool", "Ready");
    }
    script(&registry, [("first", 503), ("second", 401)]);
    cluster.preload("tool", spec("v1"));
    cluster.wait_for("tool", "Ready");
    assert_eq!(cluster.condition("tool", "Resolved")["reason"], "EarlierAnswer");
    assert_eq!(cluster.status("tool")["readyReference"], pinned[0].as_str());
}

#[test]
fn the_version_before_stays_on_a_node_that_is_emptied() {
    let setup = {
        let configuration = "cache: {minFreePercent: 0, minFreeInodesPercent: 0, highThresholdPercent: 100, \
                             lowThresholdPercent: 100, minimumAge: 0s}\n";
        Setup::start_with(registry(), false, configuration)
    };
    for version in 0..3 {
        setup.roll("tool", setup.tag(version), "Ready");
    }
    for node in NODES {
        let pinned = [1, 2].map(|version| ("preload/team/tool".to_owned(), setup.pinned(version)));
        wait_until("older versions are let go", || setup.cluster.pins(node) == pinned);
        let folder = setup.cluster.sandbox.path().join(node);
        let admin = Admin::at(&format!("unix://{}/admin.sock", folder.display()));
        admin.text(&["gc", "--target", "0"]);
    }
    setup.proxy.go_down();
    setup.roll("tool", setup.tag(1), "Ready");
    setup.shows(NAMESPACE, &setup.pinned(1), 1);
    setup.roll("tool", setup.tag(0), "NodesFailed");
    let failed = setup.cluster.status("tool")["failedNodes"].clone();
    assert_eq!(failed[0]["reason"], "RegistryUnavailable", "{failed}");
    // One of the same name has no history.
    setup.cluster.api.delete(Kind::Preload, NAMESPACE, "tool");
    setup.roll("tool", setup.tag(1), "RegistryUnavailable");
}

#[test]
fn a_node_that_is_not_ready_does_not_hold_up_a_preload_that_tolerates_it() {
    let mut setup = Setup::start(registry(), false);
    let spec = |version: usize| {
        let mut spec = setup.spec(setup.tag(version));
        spec["toleratedNodes"] = json!("50%");
        spec
    };
    let (first, second) = (spec(0), spec(1));
    setup.cluster.preload("tool", first);
    setup.cluster.wait_for("tool", "Ready");
    let node = setup.cluster.drivers.remove(1).kill();
    setup.cluster.api.set_node_ready("two", true);
    setup.cluster.preload("tool", second);
    wait_until("one node holds it", || setup.cluster.status("tool")["ready"] == 1);
    assert_eq!(
        setup.cluster.condition("tool", "Ready")["status"],
        "False",
        "the other may be well"
    );
    setup.cluster.api.set_node_ready("two", false);
    setup.cluster.wait_for("tool", "Ready");
    assert_eq!(setup.cluster.status("tool")["readyReference"], setup.pinned(1).as_str());
    assert_eq!(setup.cluster.status("tool")["away"], 1);
    setup.cluster.drivers.push(node.start());
    setup.cluster.api.set_node_ready("two", true);
    wait_until("the node has it when it is back", || setup.cluster.status("tool")["ready"] == 2);
    wait_until("none is away", || setup.cluster.status("tool")["away"] == 0);
}
