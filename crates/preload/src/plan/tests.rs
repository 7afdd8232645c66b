//! The planner against a cluster of facts: what it decides is written, and nodes do what they please.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use proptest::prelude::*;

use super::cluster_facts::{
    AnswerOrigin, ClusterNode, ClusterState, NamespaceQuota, NodeReadiness, ReferenceResolution,
    RegistryAccess, ResolutionFailure, ResolvedArtifact, start_order,
};
use super::node_status::{LABEL_PREFIX, LABEL_VALUE, NodeStatusRules, ready_label};
use super::{PreloadPlan, plan};
use crate::api::{
    ArtifactPreload, ArtifactPreloadSpec, ArtifactPreloadStatus, HeldArtifact, NodeArtifacts,
    NodeArtifactsSpec, NodeArtifactsStatus, NodeSelector, Phase, SealedCredentials, WantedArtifact,
};
use oci::{Digest, Reference};

const BEGIN: i64 = 1_800_000_000;

/// A cluster in memory. Plans and nodes write its objects.
struct Cluster {
    state: ClusterState,
    preloads: BTreeMap<String, ArtifactPreload>,
    objects: BTreeMap<String, NodeArtifacts>,
    now: i64,
    version: u64,
}

impl Cluster {
    fn new(nodes: usize) -> Self {
        let mut cluster = Self {
            state: ClusterState::default(),
            preloads: BTreeMap::new(),
            objects: BTreeMap::new(),
            now: BEGIN,
            version: 0,
        };
        for index in 0..nodes {
            cluster.add_node(&format!("node-{index}"));
        }
        cluster
    }

    fn version(&mut self) -> String {
        self.version += 1;
        self.version.to_string()
    }

    fn time(&self) -> Time {
        Time(jiff::Timestamp::from_second(self.now).expect("a time"))
    }

    fn add_node(&mut self, name: &str) {
        let zone = if name.ends_with(['0', '2', '4', '6', '8']) { "a" } else { "b" };
        let node = ClusterNode {
            uid: format!("uid-{name}"),
            labels: BTreeMap::from([("zone".to_owned(), zone.to_owned())]),
            created: self.now,
            start_order: start_order(name),
            readiness: None,
            condition: None,
        };
        let name = self.state.text(name);
        self.state.nodes.insert(name, node);
    }

    /// Starts the plugin of a node.
    fn start_plugin(&mut self, name: &str) {
        let status = NodeArtifactsStatus {
            platform: "linux/amd64".to_owned(),
            public_key: format!("key-of-{name}"),
            ..NodeArtifactsStatus::default()
        };
        self.change_object(name, |object| object.status = Some(status));
    }

    fn remove_node(&mut self, name: &str) {
        self.state.nodes.remove(name);
        self.state.objects.remove(name);
        self.objects.remove(name);
    }

    fn change_object(&mut self, name: &str, change: impl FnOnce(&mut NodeArtifacts)) {
        let version = self.version();
        let object = self.objects.get_mut(name).expect("an object");
        change(object);
        object.metadata.resource_version = Some(version);
        let object = object.clone();
        self.state.put_object(&object);
    }

    fn apply(&mut self, name: &str, change: impl FnOnce(&mut ArtifactPreloadSpec)) {
        let known = self.preloads.get(name).cloned();
        let mut object = known.unwrap_or_else(|| {
            let spec = serde_json::json!({"reference": "r.io/tool:v1", "parallelism": 3});
            let mut object =
                ArtifactPreload::new(name, serde_json::from_value(spec).expect("a spec"));
            object.metadata.namespace = Some("team".to_owned());
            object.metadata.uid = Some(format!("uid-{name}"));
            object.metadata.creation_timestamp = Some(self.time());
            object
        });
        change(&mut object.spec);
        object.metadata.generation = Some(object.metadata.generation.unwrap_or_default() + 1);
        object.metadata.resource_version = Some(self.version());
        self.state.put_preload(&object);
        self.preloads.insert(name.to_owned(), object);
    }

    /// Sets the resolution of a preload.
    fn answer(&mut self, preload: &str, resolution: ReferenceResolution) {
        let key = format!("team/{preload}");
        self.state.preloads.get_mut(key.as_str()).expect("a preload").resolution = resolution;
    }

    fn resolve(&mut self, preload: &str) -> String {
        let reference = self.preloads[preload].spec.reference.clone();
        let digest = Digest::of(reference.as_bytes());
        let origin = AnswerOrigin {
            resolved_at: Some(self.now),
            pull_secrets: self.preloads[preload].spec.pull_secrets.clone(),
            unavailable: None,
        };
        let known = ResolvedArtifact {
            reference,
            digest,
            platforms: Vec::new(),
            bytes: Some(5 << 30),
            origin,
        };
        self.answer(preload, ReferenceResolution::Known(known));
        digest.to_string()
    }

    /// Records that the registry does not answer.
    fn silence(&mut self, preload: &str) {
        let refusal = ResolutionFailure {
            reason: "RegistryUnavailable",
            message: "it cannot be reached".to_owned(),
            transient: true,
            unanswered: true,
            retry_at: self.now + 20,
        };
        let (key, now) = (format!("team/{preload}"), self.now);
        let known = self.state.preloads.get_mut(key.as_str()).expect("a preload");
        known.apply_resolution(ReferenceResolution::Refused(refusal), now);
    }

    /// Rolls out a reference that the registry has to all nodes. Returns it with its digest.
    fn roll(&mut self, preload: &str, reference: &str) -> String {
        self.apply(preload, |spec| spec.reference = reference.to_owned());
        self.resolve(preload);
        self.run_until_done();
        self.status(preload).ready_reference.expect("ready")
    }

    /// Sets the condition Ready of a node.
    fn is_ready(&mut self, node: &str, is_ready: bool) {
        let readiness = NodeReadiness { is_ready, until: self.now + 20 };
        let node = self.state.nodes.get_mut(node).expect("a node");
        node.readiness = Some(readiness);
    }

    fn status(&self, preload: &str) -> ArtifactPreloadStatus {
        self.preloads[preload].status.clone().unwrap_or_default()
    }

    fn reason(&self, preload: &str) -> String {
        let conditions = self.status(preload).conditions;
        conditions
            .into_iter()
            .find(|one| one.type_ == "Ready")
            .map_or_else(String::new, |one| one.reason)
    }

    fn plan(&self) -> PreloadPlan {
        plan(&self.state, self.now)
    }

    /// Plans and writes the decisions.
    fn step(&mut self) -> PreloadPlan {
        let decided = self.plan();
        for name in &decided.create {
            let mut object = NodeArtifacts::new(name, NodeArtifactsSpec::default());
            object.metadata = ObjectMeta {
                name: Some(name.to_string()),
                resource_version: Some(self.version()),
                creation_timestamp: Some(self.time()),
                ..ObjectMeta::default()
            };
            self.state.put_object(&object);
            self.objects.insert(name.to_string(), object);
        }
        for (name, wanted) in &decided.assign {
            let artifacts = wanted.iter().map(|wanted| WantedArtifact {
                preload: self.state.key(wanted.preload).to_string(),
                reference: wanted.reference.to_string(),
                pin: wanted.pin,
                timeout_seconds: wanted.timeout,
                backoff_limit: wanted.backoff,
                since: Time(jiff::Timestamp::from_second(wanted.since).expect("a time")),
                resolved_at: wanted
                    .resolved_at
                    .map(|seconds| Time(jiff::Timestamp::from_second(seconds).expect("a time"))),
                credentials: wanted.sealed.as_ref().map(|sealed| SealedCredentials {
                    key: sealed.key.to_string(),
                    version: sealed.version.to_string(),
                    data: String::new(),
                }),
            });
            let artifacts: Vec<_> = artifacts.collect();
            let bound = self.state.quota.pinned_bytes;
            let bound = bound.map(|bytes| i64::try_from(bytes).expect("a number"));
            self.change_object(name, |object| {
                object.spec.artifacts = artifacts;
                object.spec.max_pinned_bytes_per_namespace = bound;
            });
        }
        for change in &decided.report {
            let version = self.version();
            let name = change.preload.strip_prefix("team/").expect("a key").to_owned();
            let object = self.preloads.get_mut(&name).expect("a preload");
            object.status = Some(change.status.clone());
            object.metadata.resource_version = Some(version);
            let object = object.clone();
            self.state.put_preload(&object);
        }
        for (name, status) in &decided.node_status {
            let node = self.state.nodes.get_mut(name).expect("a node");
            if let Some(wanted) = &status.labels {
                node.labels.retain(|key, _| !key.starts_with(LABEL_PREFIX));
                let labels = wanted.iter().map(|key| (key.to_string(), LABEL_VALUE.to_owned()));
                node.labels.extend(labels);
            }
            node.condition = status.condition.clone();
        }
        decided
    }

    /// Returns the labels of a node that say what it holds.
    fn labels(&self, node: &str) -> BTreeSet<String> {
        let labels = self.state.nodes[node].labels.keys();
        labels.filter(|key| key.starts_with(LABEL_PREFIX)).cloned().collect()
    }

    /// Returns status and reason of the condition of a node.
    fn condition(&self, node: &str) -> (&'static str, &'static str) {
        let condition = self.state.nodes[node].condition.as_ref();
        condition.map_or(("", ""), |condition| (condition.status, condition.reason))
    }

    /// Plans until there are no decisions.
    fn settle(&mut self) {
        for _ in 0..10 {
            let decided = self.step();
            if decided.assign.is_empty()
                && decided.report.is_empty()
                && decided.create.is_empty()
                && decided.node_status.is_empty()
            {
                return;
            }
        }
        panic!("it is decided again and again");
    }

    /// Returns the assigned artifacts that are not ready.
    fn open(&self) -> Vec<(String, WantedArtifact)> {
        let mut open = Vec::new();
        for (name, object) in &self.objects {
            for wanted in &object.spec.artifacts {
                if self.held(name, wanted).is_none_or(|held| held.phase != Phase::Ready) {
                    open.push((name.clone(), wanted.clone()));
                }
            }
        }
        open
    }

    fn held(&self, node: &str, wanted: &WantedArtifact) -> Option<HeldArtifact> {
        let held = self.objects[node].status.as_ref()?.artifacts.iter();
        held.into_iter()
            .find(|held| held.preload == wanted.preload && held.reference == wanted.reference)
            .cloned()
    }

    /// Reports the progress of one artifact on a node.
    fn says(&mut self, node: &str, wanted: &WantedArtifact, phase: Phase) {
        let reason = if phase == Phase::Failed { "NoRoom" } else { "" };
        self.says_with_reason(node, wanted, phase, reason);
    }

    fn says_with_reason(
        &mut self,
        node: &str,
        wanted: &WantedArtifact,
        phase: Phase,
        reason: &str,
    ) {
        let held = HeldArtifact {
            preload: wanted.preload.clone(),
            reference: wanted.reference.clone(),
            digest: digest_of(wanted),
            phase,
            percent: None,
            since: None,
            reason: reason.to_owned(),
            message: String::new(),
        };
        self.change_object(node, |object| {
            let status = object.status.as_mut().expect("a plugin");
            let is_other = |other: &HeldArtifact| {
                (&other.preload, &other.reference) != (&held.preload, &held.reference)
            };
            status.artifacts.retain(is_other);
            status.artifacts.push(held.clone());
        });
    }

    /// Makes all assigned artifacts ready.
    fn nodes_work(&mut self) {
        for (node, wanted) in self.open() {
            self.says(&node, &wanted, Phase::Ready);
        }
    }

    fn run_until_done(&mut self) {
        for _ in 0..200 {
            self.settle();
            if self.open().is_empty() {
                return;
            }
            self.nodes_work();
        }
        panic!("it never ends");
    }

    /// Reports the capacity of a node.
    fn has_room(&mut self, node: &str, bytes: Option<i64>) {
        self.change_object(node, |object| {
            object.status.as_mut().expect("a plugin").capacity_bytes = bytes;
        });
    }

    fn wants(&self, node: &str) -> Vec<String> {
        self.objects[node].spec.artifacts.iter().map(|one| one.reference.clone()).collect()
    }
}

fn digest_of(wanted: &WantedArtifact) -> String {
    let reference: Reference = wanted.reference.parse().expect("a reference");
    reference.digest().expect("a digest").to_string()
}

/// Returns a cluster with running plugins and one resolved preload.
fn cluster(nodes: usize) -> Cluster {
    let mut cluster = Cluster::new(nodes);
    cluster.settle();
    for name in cluster.objects.keys().cloned().collect::<Vec<_>>() {
        cluster.start_plugin(&name);
    }
    cluster.apply("tool", |_| {});
    assert_eq!(cluster.plan().resolve, [Arc::from("team/tool")]);
    cluster.resolve("tool");
    cluster
}

#[test]
fn nodes_start_in_order_and_the_last_one_makes_the_preload_ready() {
    let mut cluster = cluster(10);
    for round in 0..4 {
        cluster.settle();
        assert_eq!(cluster.open().len(), if round < 3 { 3 } else { 1 });
        assert_eq!(cluster.reason("tool"), "Preloading");
        assert_eq!(cluster.status("tool").ready_reference, None);
        cluster.nodes_work();
    }
    cluster.settle();
    let status = cluster.status("tool");
    assert_eq!((status.desired, status.ready, status.active), (10, 10, 0));
    assert_eq!(cluster.reason("tool"), "Ready");
    let digest = Digest::of(b"r.io/tool:v1");
    assert_eq!(status.ready_reference, Some(format!("r.io/tool:v1@{digest}")));
    assert!(status.completion_time.is_some());
    assert_eq!(cluster.plan().resolve, [] as [Arc<str>; 0]);
}

#[test]
fn preloads_beyond_the_quota_hold_nothing_and_report_it() {
    let mut cluster = cluster(3);
    cluster.state.quota = NamespaceQuota { preloads: Some(2), ..NamespaceQuota::default() };
    // Its name sorts first, and it is younger.
    for name in ["second", "a-third"] {
        cluster.now += 1;
        cluster.apply(name, |spec| spec.reference = format!("r.io/{name}:v1"));
    }
    assert_eq!(cluster.plan().resolve, [Arc::from("team/second")], "a registry is asked in vain");
    cluster.resolve("second");
    cluster.run_until_done();
    assert_eq!(cluster.reason("tool"), "Ready");
    assert_eq!(cluster.reason("second"), "Ready");
    assert_eq!(cluster.reason("a-third"), "QuotaExceeded");
    let status = cluster.status("a-third");
    assert_eq!((status.desired, status.ready, status.active), (3, 0, 0));
    let stalled = status.conditions.iter().find(|one| one.type_ == "Stalled").expect("Stalled");
    assert_eq!((stalled.status.as_str(), stalled.reason.as_str()), ("True", "QuotaExceeded"));
    assert!(stalled.message.contains("team has 3 preloads"), "{}", stalled.message);
    assert_eq!(cluster.wants("node-0").len(), 2);

    // A deleted preload frees its place for the next one.
    cluster.state.preloads.remove("team/second");
    cluster.preloads.remove("second");
    cluster.settle();
    cluster.resolve("a-third");
    cluster.run_until_done();
    assert_eq!(cluster.reason("a-third"), "Ready");

    // A lower quota withdraws assigned artifacts.
    cluster.state.quota.preloads = Some(1);
    cluster.settle();
    assert_eq!(cluster.reason("a-third"), "QuotaExceeded");
    assert_eq!(cluster.reason("tool"), "Ready");
    assert_eq!(cluster.wants("node-0").len(), 1);
}

#[test]
fn nodes_get_the_limit_of_pinned_bytes() {
    let mut cluster = cluster(2);
    cluster.run_until_done();
    let bounds = |cluster: &Cluster| -> Vec<_> {
        cluster.objects.values().map(|one| one.spec.max_pinned_bytes_per_namespace).collect()
    };
    assert_eq!(bounds(&cluster), [None, None]);
    cluster.state.quota.pinned_bytes = Some(1 << 30);
    cluster.add_node("idle");
    cluster.settle();
    assert_eq!(bounds(&cluster), [None, Some(1 << 30), Some(1 << 30)], "idle, node-0, node-1");
}

#[test]
fn a_preload_that_fails_only_by_quota_reports_it() {
    let mut cluster = cluster(2);
    cluster.apply("tool", |spec| spec.backoff_limit = 0);
    cluster.settle();
    for (node, wanted) in cluster.open() {
        cluster.says_with_reason(&node, &wanted, Phase::Failed, "QuotaExceeded");
    }
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "QuotaExceeded");
    let (node, wanted) = cluster.open().remove(0);
    cluster.says(&node, &wanted, Phase::Failed);
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "NodesFailed");
}

#[test]
fn a_percentage_of_parallelism_is_rounded_up() {
    for (nodes, percent, at_once) in [(10, "25%", 3), (3, "1%", 1), (7, "100%", 7)] {
        let mut cluster = cluster(nodes);
        let percent = IntOrString::String(percent.to_owned());
        cluster.apply("tool", |spec| spec.parallelism = percent);
        cluster.settle();
        assert_eq!(cluster.open().len(), at_once);
    }
}

#[test]
fn a_new_node_gets_the_artifact_and_readiness_stays() {
    let mut cluster = cluster(3);
    cluster.run_until_done();
    cluster.add_node("late");
    cluster.settle();
    assert_eq!(cluster.status("tool").desired, 3, "its plugin is not there yet");
    cluster.start_plugin("late");
    cluster.settle();
    let status = cluster.status("tool");
    assert_eq!((status.desired, status.ready, status.active), (4, 3, 1));
    assert_eq!(cluster.reason("tool"), "Ready");
    cluster.run_until_done();
    assert_eq!(cluster.status("tool").ready, 4);
    cluster.remove_node("late");
    cluster.settle();
    assert_eq!(cluster.status("tool").desired, 3);
}

#[test]
fn readiness_waits_for_new_nodes_for_a_limited_time() {
    let mut cluster = Cluster::new(2);
    cluster.apply("tool", |_| {});
    cluster.resolve("tool");
    cluster.apply("one", |spec| spec.selector.names = vec!["node-0".into()]);
    cluster.resolve("one");
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "Preloading", "no plugin has said that it is there");
    cluster.start_plugin("node-0");
    cluster.run_until_done();
    let counts = |cluster: &Cluster| {
        let status = cluster.status("tool");
        (status.desired, status.ready, status.active, status.failed)
    };
    assert_eq!((counts(&cluster), cluster.reason("tool").as_str()), ((2, 1, 0, 0), "Preloading"));
    assert_eq!(cluster.reason("one"), "Ready", "the other node is not selected");
    assert_eq!(cluster.plan().wake, Some(BEGIN + 121));
    // The node has no driver: the gate and the count no longer wait for it.
    cluster.now += 121;
    cluster.settle();
    assert_eq!((counts(&cluster), cluster.reason("tool").as_str()), ((1, 1, 0, 0), "Ready"));
    // After a loss of the objects, the next version of the preload starts from the beginning.
    cluster.objects.clear();
    cluster.state.objects.clear();
    cluster.apply("tool", |spec| spec.timeout_seconds += 1);
    let lost = cluster.step();
    assert_eq!((lost.create.len(), cluster.status("tool").desired), (2, 2));
    cluster.start_plugin("node-0");
    cluster.run_until_done();
    assert_eq!(cluster.reason("tool"), "Preloading");
    cluster.start_plugin("node-1");
    cluster.run_until_done();
    assert_eq!((counts(&cluster), cluster.reason("tool").as_str()), ((2, 2, 0, 0), "Ready"));
}

#[test]
fn a_rollout_keeps_the_old_artifact_until_the_new_one_is_everywhere() {
    let mut cluster = cluster(4);
    cluster.run_until_done();
    let first = cluster.status("tool").ready_reference.expect("ready");
    cluster.apply("tool", |spec| spec.reference = "r.io/tool:v2".to_owned());
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "Resolving");
    assert!((0..4).all(|node| cluster.wants(&format!("node-{node}")) == [first.clone()]));
    cluster.resolve("tool");
    cluster.add_node("late");
    cluster.settle();
    cluster.start_plugin("late");
    cluster.settle();
    assert_eq!(cluster.status("tool").ready_reference, Some(first.clone()), "it is sticky");
    assert!(cluster.objects.values().all(|object| {
        object.spec.artifacts.is_empty()
            || object.spec.artifacts.iter().any(|wanted| wanted.reference == first)
    }));
    cluster.run_until_done();
    let second = cluster.status("tool").ready_reference.expect("ready");
    assert_ne!(first, second);
    // Nodes keep the previous artifact for a rollback, and no older one.
    let both = [first.clone(), second.clone()];
    assert!((0..4).all(|node| cluster.wants(&format!("node-{node}")) == both));
    cluster.add_node("last");
    cluster.settle();
    cluster.start_plugin("last");
    cluster.run_until_done();
    assert_eq!(
        cluster.wants("last"),
        std::slice::from_ref(&second),
        "it fetches what is not in use"
    );
    let third = cluster.roll("tool", "r.io/tool:v3");
    assert!(
        cluster.objects.keys().all(|node| cluster.wants(node) == [second.clone(), third.clone()])
    );
}

#[test]
fn an_invalid_reference_changes_no_assignment() {
    let mut cluster = cluster(2);
    cluster.run_until_done();
    let first = cluster.status("tool").ready_reference;
    for (reference, resolution, reason) in [
        ("r.io/NOT/one", None, "InvalidSpec"),
        (
            "r.io/tool:gone",
            Some(ReferenceResolution::Refused(ResolutionFailure {
                reason: "ReferenceNotFound",
                message: "there is none".to_owned(),
                transient: false,
                unanswered: false,
                retry_at: BEGIN + 60,
            })),
            "ReferenceNotFound",
        ),
    ] {
        cluster.apply("tool", |spec| spec.reference = reference.to_owned());
        if let Some(resolution) = resolution {
            cluster.answer("tool", resolution);
        }
        cluster.settle();
        assert_eq!(cluster.reason("tool"), reason);
        assert_eq!(cluster.status("tool").ready_reference, first);
        assert!(super::preload_status::is_stalled(&cluster.status("tool")));
        assert_eq!(cluster.wants("node-0"), [first.clone().expect("ready")]);
        assert_eq!(cluster.plan().resolve, [] as [Arc<str>; 0], "not before its time");
    }
    cluster.now += 61;
    assert_eq!(cluster.plan().resolve.len(), 1);
    cluster.apply("tool", |spec| spec.reference = "r.io/tool:v1".to_owned());
    cluster.resolve("tool");
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "Ready", "nodes hold it all the time");
}

#[test]
fn failed_nodes_are_listed_and_do_not_block_others() {
    let mut cluster = cluster(6);
    cluster.settle();
    let (node, wanted) = cluster.open().remove(0);
    cluster.says(&node, &wanted, Phase::Failed);
    for _ in 0..5 {
        cluster.settle();
        for (other, wanted) in cluster.open() {
            if other != node {
                cluster.says(&other, &wanted, Phase::Ready);
            }
        }
    }
    cluster.settle();
    let status = cluster.status("tool");
    assert_eq!((status.ready, status.failed, status.active), (5, 1, 0));
    assert_eq!(status.failed_nodes[0].node, node);
    assert_eq!(status.failed_nodes[0].reason, "NoRoom");
    assert_eq!(cluster.reason("tool"), "NodesFailed");
    assert!(super::preload_status::is_stalled(&status));
    assert!(status.completion_time.is_some());
    cluster.says(&node, &wanted, Phase::Ready);
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "Ready", "it has tried again by itself");
}

#[test]
fn a_silent_node_frees_its_slot() {
    let mut cluster = cluster(4);
    cluster.apply("tool", |spec| spec.parallelism = IntOrString::Int(1));
    cluster.settle();
    let (silent, _) = cluster.open().remove(0);
    cluster.now += 200;
    cluster.settle();
    assert_eq!(cluster.open().len(), 2);
    assert_eq!(cluster.status("tool").failed_nodes[0].node, silent);
    assert_eq!(cluster.status("tool").failed_nodes[0].reason, "NoAnswer");
    cluster.run_until_done();
    assert_eq!(cluster.reason("tool"), "Ready", "it has come back");
}

#[test]
fn selectors_and_platforms_select_nodes() {
    let mut cluster = cluster(10);
    cluster.apply("tool", |spec| {
        spec.selector.match_labels = BTreeMap::from([("zone".to_owned(), "a".to_owned())]);
    });
    cluster.run_until_done();
    assert_eq!(cluster.status("tool").desired, 5);
    cluster.apply("tool", |spec| spec.selector.names = vec!["node-2".into(), "gone".into()]);
    cluster.run_until_done();
    assert_eq!(cluster.status("tool").desired, 1);
    assert!(
        cluster
            .objects
            .iter()
            .all(|(name, object)| { object.spec.artifacts.is_empty() == (name != "node-2") })
    );
    cluster.apply("tool", |spec| spec.selector.names = vec!["gone".into()]);
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "NoNodes");
    cluster.apply("tool", |spec| {
        spec.selector = NodeSelector::default();
        spec.platforms = vec!["linux/arm64".into()];
    });
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "NoNodes");
}

/// Returns the resolution of `r.io/tool:v1` to an index for one platform.
fn index_for(platform: &str) -> ReferenceResolution {
    ReferenceResolution::Known(ResolvedArtifact {
        reference: "r.io/tool:v1".to_owned(),
        digest: Digest::of(b"index"),
        platforms: vec![platform.parse().expect("a platform")],
        bytes: None,
        origin: AnswerOrigin::default(),
    })
}

#[test]
fn a_missing_platform_is_reported_before_any_node_starts() {
    let mut cluster = cluster(2);
    cluster.answer("tool", index_for("linux/arm64"));
    cluster.settle();
    assert_eq!(cluster.status("tool").failed_nodes[0].reason, "PlatformMissing");
    assert_eq!(cluster.reason("tool"), "NodesFailed");
    assert!(cluster.open().is_empty());
    cluster.apply("tool", |spec| spec.platforms = vec!["linux/amd64".into()]);
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "PlatformMissing");
}

#[test]
fn a_node_without_capacity_is_skipped() {
    let mut cluster = cluster(4);
    cluster.apply("tool", |spec| spec.parallelism = IntOrString::Int(1));
    cluster.has_room("node-0", Some(4 << 30));
    cluster.has_room("node-1", Some(5 << 30));
    cluster.run_until_done();
    let status = cluster.status("tool");
    assert_eq!((status.desired, status.ready, status.failed), (4, 3, 1));
    assert_eq!(status.bytes, Some(5 << 30));
    let failed = &status.failed_nodes[0];
    assert_eq!((failed.node.as_str(), failed.reason.as_str()), ("node-0", "NoRoom"));
    for part in ["5.0 GiB", "4.0 GiB", "cache.maxBytes", "spec.selector"] {
        assert!(failed.message.contains(part), "{}", failed.message);
    }
    assert_eq!(cluster.reason("tool"), "NodesFailed");
    assert!(cluster.wants("node-0").is_empty());
    // A node that holds it counts, whatever its capacity is now.
    cluster.has_room("node-1", Some(1));
    cluster.settle();
    assert_eq!(cluster.status("tool").ready, 3);
    // A larger disk is enough, and so is an unknown capacity.
    for room in [Some(6 << 30), None] {
        cluster.has_room("node-0", Some(1));
        cluster.apply("tool", |spec| spec.reference.push('x'));
        cluster.resolve("tool");
        cluster.has_room("node-1", None);
        cluster.run_until_done();
        assert_eq!(cluster.reason("tool"), "NodesFailed");
        cluster.has_room("node-0", room);
        cluster.run_until_done();
        assert_eq!(cluster.reason("tool"), "Ready");
    }
}

#[test]
fn the_next_leader_restores_the_resolution_from_the_status() {
    let mut cluster = cluster(1);
    cluster.has_room("node-0", Some(1));
    cluster.settle();
    let mut state = ClusterState::default();
    state.put_preload(&cluster.preloads["tool"]);
    let known = ResolvedArtifact {
        reference: "r.io/tool:v1".to_owned(),
        digest: Digest::of(b"r.io/tool:v1"),
        platforms: Vec::new(),
        bytes: Some(5 << 30),
        origin: AnswerOrigin { resolved_at: Some(BEGIN), ..AnswerOrigin::default() },
    };
    assert_eq!(state.preloads["team/tool"].resolution, ReferenceResolution::Known(known));
}

#[test]
fn pause_spread_and_ttl() {
    let mut cluster = cluster(6);
    cluster.apply("tool", |spec| spec.paused = true);
    cluster.settle();
    assert_eq!((cluster.open().len(), cluster.reason("tool").as_str()), (0, "Paused"));
    cluster.apply("tool", |spec| {
        spec.paused = false;
        spec.spread = Some("1h".to_owned());
        spec.parallelism = IntOrString::Int(100);
        spec.ttl_seconds_after_finished = Some(60);
    });
    cluster.settle();
    assert!(cluster.open().len() < 6, "not all at once");
    assert!(cluster.plan().wake.is_some_and(|wake| wake <= BEGIN + 3600));
    cluster.now += 3600;
    cluster.run_until_done();
    assert_eq!(cluster.reason("tool"), "Ready");
    assert_eq!(cluster.plan().delete.len(), 0);
    cluster.now += 61;
    assert_eq!(cluster.plan().delete, [Arc::from("team/tool")]);
    cluster.state.preloads.remove("team/tool");
    cluster.preloads.remove("tool");
    cluster.settle();
    assert!(cluster.objects.values().all(|object| object.spec.artifacts.is_empty()));
}

#[test]
fn credentials_are_sealed_to_the_current_key_of_nodes_that_need_them() {
    let mut cluster = cluster(1);
    cluster.apply("tool", |spec| spec.pull_secrets = vec!["robot".into()]);
    cluster.settle();
    assert!(cluster.open().is_empty(), "the secret is not read yet");
    assert_eq!(cluster.plan().resolve.len(), 1);
    let sealed =
        |version: &str| RegistryAccess::Sealed { version: Arc::from(version), until: BEGIN + 120 };
    let key = "team/tool";
    cluster.state.preloads.get_mut(key).expect("one").access = sealed("1");
    cluster.settle();
    let credentials = |cluster: &Cluster| {
        let wanted = cluster.objects["node-0"].spec.artifacts[0].clone();
        wanted.credentials.map(|one| (one.key, one.version))
    };
    let of = |key: &str, version: &str| Some((key.to_owned(), version.to_owned()));
    assert_eq!(credentials(&cluster), of("key-of-node-0", "1"));
    cluster.change_object("node-0", |object| {
        object.status.as_mut().expect("a status").public_key = "another".to_owned();
    });
    cluster.settle();
    assert_eq!(credentials(&cluster), of("another", "1"), "the plugin was restarted");
    cluster.state.preloads.get_mut(key).expect("one").access = sealed("2");
    cluster.settle();
    assert_eq!(credentials(&cluster), of("another", "2"), "the secret was changed");
    cluster.nodes_work();
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "Ready");
    // No write happens only to remove unneeded credentials.
    assert_eq!(credentials(&cluster), of("another", "2"));
    cluster.apply("other", |_| {});
    cluster.resolve("other");
    cluster.settle();
    let wanted = &cluster.objects["node-0"].spec.artifacts;
    assert!(wanted.len() == 2 && wanted.iter().all(|one| one.credentials.is_none()));
}

#[test]
fn two_preloads_of_one_artifact_are_independent() {
    let mut cluster = cluster(2);
    cluster.apply("twin", |_| {});
    cluster.resolve("twin");
    cluster.run_until_done();
    assert_eq!(cluster.objects["node-0"].spec.artifacts.len(), 2);
    cluster.state.preloads.remove("team/tool");
    cluster.preloads.remove("tool");
    cluster.settle();
    assert_eq!(cluster.objects["node-0"].spec.artifacts[0].preload, "team/twin");
    assert_eq!(cluster.reason("twin"), "Ready");
}

#[test]
fn a_new_process_makes_the_same_plan() {
    let mut cluster = cluster(5);
    cluster.settle();
    let (node, wanted) = cluster.open().remove(0);
    cluster.says(&node, &wanted, Phase::Ready);
    cluster.settle();
    begin_anew(&mut cluster);
    let decided = cluster.plan();
    assert!(decided.assign.is_empty() && decided.report.is_empty() && decided.resolve.is_empty());
}

#[test]
fn assignments_fit_the_object_of_a_node() {
    let mut cluster = cluster(1);
    for index in 0..300 {
        let name = format!("tool-{index}");
        cluster.apply(&name, |spec| spec.reference = format!("r.io/tool:{index}"));
        cluster.resolve(&name);
    }
    cluster.settle();
    assert_eq!(cluster.objects["node-0"].spec.artifacts.len(), 256);
    let refused = (0..300).filter(|index| {
        let status = cluster.status(&format!("tool-{index}"));
        status.failed_nodes.first().is_some_and(|failed| failed.reason == "TooManyPreloads")
    });
    assert_eq!(refused.count(), 300 + 1 - 256);
}

/// Replaces the facts by those that the next leader reads.
fn begin_anew(cluster: &mut Cluster) {
    let rules = std::mem::take(&mut cluster.state.node_status);
    let mut state = ClusterState::new(NamespaceQuota::default(), rules);
    state.nodes = std::mem::take(&mut cluster.state.nodes);
    for node in state.nodes.values_mut() {
        node.condition = None;
    }
    for object in cluster.objects.values() {
        state.put_object(object);
    }
    for object in cluster.preloads.values() {
        state.put_preload(object);
    }
    cluster.state = state;
}

/// Sets the access of a preload.
fn read_secrets(cluster: &mut Cluster, preload: &str, version: &str) {
    let until = cluster.now + 120;
    let access = RegistryAccess::Sealed { version: Arc::from(version), until };
    let key = format!("team/{preload}");
    cluster.state.preloads.get_mut(key.as_str()).expect("a preload").access = access;
}

#[test]
fn unread_secrets_do_not_block_other_preloads() {
    let mut cluster = cluster(1);
    cluster.apply("tool", |spec| spec.pull_secrets = vec!["robot".into()]);
    read_secrets(&mut cluster, "tool", "1");
    cluster.run_until_done();
    assert_eq!(cluster.reason("tool"), "Ready");
    assert!(cluster.objects["node-0"].spec.artifacts[0].credentials.is_some());
    begin_anew(&mut cluster);
    cluster.apply("other", |_| {});
    cluster.resolve("other");
    let decided = cluster.plan();
    assert_eq!(decided.resolve, [] as [Arc<str>; 0]);
    let [(_, wanted)] = decided.assign.as_slice() else { panic!("{decided:?}") };
    assert!(wanted.len() == 2 && wanted.iter().all(|one| one.sealed.is_none()));
}

#[test]
fn an_assignment_is_written_again_once_its_secrets_are_read() {
    let mut cluster = cluster(1);
    cluster.apply("tool", |spec| spec.pull_secrets = vec!["robot".into()]);
    read_secrets(&mut cluster, "tool", "1");
    cluster.settle();
    begin_anew(&mut cluster);
    cluster.apply("other", |_| {});
    cluster.resolve("other");
    let decided = cluster.plan();
    assert_eq!(decided.resolve, [Arc::from("team/tool")]);
    assert!(decided.assign.is_empty(), "nobody could seal what stays: {decided:?}");
    read_secrets(&mut cluster, "tool", "1");
    cluster.settle();
    let wanted = &cluster.objects["node-0"].spec.artifacts;
    assert_eq!(wanted.iter().filter(|one| one.credentials.is_some()).count(), 1);
    assert_eq!(wanted.len(), 2);
}

#[test]
fn credentials_of_one_repository_are_not_sealed_for_another_one() {
    let mut cluster = cluster(1);
    cluster.apply("tool", |spec| {
        spec.reference = "old.io/tool:v1".to_owned();
        spec.parallelism = IntOrString::Int(10);
        spec.pull_secrets = vec!["robot".into()];
    });
    cluster.resolve("tool");
    read_secrets(&mut cluster, "tool", "1");
    cluster.run_until_done();
    for reference in ["new.io/tool:v2", "old.io/other:v2"] {
        cluster.apply("tool", |spec| spec.reference = reference.to_owned());
        cluster.resolve("tool");
        read_secrets(&mut cluster, "tool", "2");
        cluster.add_node("late");
        cluster.settle();
        cluster.start_plugin("late");
        cluster.settle();
        // A plugin that has lost what it had gets as little.
        cluster.start_plugin("node-0");
        cluster.settle();
        for name in ["node-0", "late"] {
            let wanted = &cluster.objects[name].spec.artifacts;
            assert_eq!(wanted.len(), 2, "{name}");
            for one in wanted {
                let own = one.reference.starts_with(reference);
                assert_eq!(one.credentials.is_some(), own, "{name}: {}", one.reference);
            }
        }
        cluster.remove_node("late");
    }
}

#[test]
fn reports_without_references_are_matched_by_digest() {
    let mut cluster = cluster(1);
    cluster.run_until_done();
    cluster.change_object("node-0", |object| {
        object.status.as_mut().expect("a status").artifacts[0].reference.clear();
    });
    cluster.settle();
    assert_eq!((cluster.reason("tool").as_str(), cluster.status("tool").ready), ("Ready", 1));
}

#[test]
fn a_later_pull_has_the_full_deadline() {
    let mut cluster = cluster(1);
    cluster.run_until_done();
    cluster.now += 1_000_000;
    let since = cluster.time();
    cluster.change_object("node-0", |object| {
        let held = &mut object.status.as_mut().expect("a status").artifacts[0];
        (held.phase, held.since) = (Phase::Pulling, Some(since));
    });
    cluster.settle();
    let counts = |cluster: &Cluster| (cluster.status("tool").active, cluster.status("tool").failed);
    assert_eq!(counts(&cluster), (1, 0));
    cluster.now += 10_000;
    cluster.settle();
    assert_eq!(counts(&cluster), (0, 1));
    assert_eq!(cluster.status("tool").failed_nodes[0].reason, "Overdue");
}

#[test]
fn the_same_content_under_another_name_is_another_artifact() {
    let mut cluster = cluster(2);
    cluster.run_until_done();
    let first = cluster.status("tool").ready_reference.expect("ready");
    let digest: Digest = cluster.status("tool").digest.expect("known").parse().expect("a digest");
    for reference in ["r.io/production/tool:v1", "r.io/production/tool:v2"] {
        let before = cluster.status("tool").ready_reference.expect("ready");
        cluster.apply("tool", |spec| spec.reference = reference.to_owned());
        let known = ResolvedArtifact {
            reference: reference.to_owned(),
            digest,
            platforms: Vec::new(),
            bytes: None,
            origin: AnswerOrigin::default(),
        };
        cluster.answer("tool", ReferenceResolution::Known(known));
        cluster.settle();
        assert_eq!(cluster.reason("tool"), "Preloading", "no node has said that it may have it");
        let both = [format!("{reference}@{digest}"), before];
        for node in ["node-0", "node-1"] {
            let mut wants = cluster.wants(node);
            wants.sort_by_key(|text| !text.starts_with(reference));
            assert_eq!(wants, both, "{node}");
        }
        cluster.run_until_done();
        assert_eq!(cluster.reason("tool"), "Ready");
        assert!(cluster.wants("node-0").contains(&both[0]));
    }
    assert_ne!(cluster.status("tool").ready_reference, Some(first));
}

#[test]
fn new_artifacts_never_displace_assigned_ones() {
    let mut cluster = cluster(1);
    cluster.settle();
    for index in 1..256 {
        let name = format!("tool-{index}");
        cluster.apply(&name, |spec| spec.reference = format!("r.io/tool:{index}"));
        cluster.resolve(&name);
    }
    cluster.settle();
    assert_eq!(cluster.objects["node-0"].spec.artifacts.len(), 256);
    cluster.apply("a", |_| {});
    cluster.resolve("a");
    cluster.settle();
    assert_eq!(cluster.objects["node-0"].spec.artifacts.len(), 256);
    assert_eq!(cluster.status("a").failed_nodes[0].reason, "TooManyPreloads");
    cluster.state.preloads.remove("team/tool-7");
    cluster.preloads.remove("tool-7");
    cluster.run_until_done();
    assert_eq!(cluster.reason("a"), "Ready");
}

#[test]
fn the_old_artifact_stays_until_the_status_reports_the_new_one() {
    let mut cluster = cluster(1);
    cluster.run_until_done();
    cluster.apply("tool", |spec| spec.reference = "r.io/tool:v2".to_owned());
    cluster.resolve("tool");
    cluster.settle();
    assert_eq!(cluster.wants("node-0").len(), 2);
    cluster.nodes_work();
    let decided = cluster.step();
    assert!(
        decided.assign.is_empty(),
        "whoever leads next may still read the old one: {decided:?}"
    );
    assert_eq!(cluster.reason("tool"), "Ready");
    cluster.settle();
    assert_eq!(cluster.wants("node-0").len(), 2, "it is kept for the way back");
}

#[test]
fn the_previous_artifact_yields_on_nodes_with_large_assignments() {
    let mut cluster = cluster(1);
    for index in 1..128 {
        let name = format!("tool-{index}");
        cluster.apply(&name, |spec| spec.reference = format!("r.io/tool:{index}"));
        cluster.resolve(&name);
    }
    cluster.run_until_done();
    let second = cluster.roll("tool", "r.io/tool:v2");
    let wants = cluster.wants("node-0");
    assert_eq!(wants.len(), 128);
    assert!(wants.contains(&second) && !wants.contains(&"r.io/tool:v1".to_owned()));
}

#[test]
fn an_unavailable_registry_leaves_its_earlier_answer_in_use() {
    let mut cluster = cluster(2);
    cluster.run_until_done();
    let first = cluster.status("tool").ready_reference.expect("ready");
    let second = cluster.roll("tool", "r.io/tool:v2");
    cluster.now += 100;
    cluster.apply("tool", |spec| spec.reference = "r.io/tool:v1".to_owned());
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "Resolving");
    cluster.silence("tool");
    cluster.run_until_done();
    let status = cluster.status("tool");
    assert_eq!(cluster.reason("tool"), "Ready");
    assert_eq!(
        (status.ready_reference, status.previous_reference),
        (Some(first.clone()), Some(second.clone()))
    );
    assert_eq!(status.registry_unavailable_since.expect("since").0.as_second(), BEGIN + 100);
    let resolved = status.conditions.iter().find(|one| one.type_ == "Resolved").expect("one");
    assert_eq!((&*resolved.status, &*resolved.reason), ("True", "EarlierAnswer"));
    for condition in status.conditions.iter().filter(|one| one.type_ != "Stalled") {
        assert!(
            condition.message.contains("has not answered since 2027-01-15T08:01:40Z"),
            "{condition:?}"
        );
    }
    assert_eq!(status.history.len(), 2, "{:?}", status.history);
    let objects = &cluster.objects["node-0"].spec.artifacts;
    assert!(objects.iter().all(|wanted| wanted.resolved_at.is_none()), "{objects:?}");

    // It is asked again, also by the next leader, and its new answer counts.
    assert_eq!(cluster.plan().resolve, [] as [Arc<str>; 0]);
    cluster.now += 21;
    assert_eq!(cluster.plan().resolve, [Arc::from("team/tool")]);
    begin_anew(&mut cluster);
    assert_eq!(cluster.plan().resolve, [Arc::from("team/tool")]);
    cluster.silence("tool");
    cluster.settle();
    let since = cluster.status("tool").registry_unavailable_since.expect("since");
    assert_eq!(since.0.as_second(), BEGIN + 100, "it was away all the while");
    cluster.resolve("tool");
    cluster.settle();
    let status = cluster.status("tool");
    assert_eq!(
        (status.registry_unavailable_since, cluster.reason("tool").as_str()),
        (None, "Ready")
    );
    assert_eq!(status.history[0].resolved_at.0.as_second(), cluster.now);

    // A digest, with or without a tag.
    let digest = second.split_once('@').expect("a digest").1;
    for reference in [second.clone(), format!("r.io/tool@{digest}")] {
        cluster.apply("tool", |spec| spec.reference = reference.clone());
        cluster.silence("tool");
        cluster.run_until_done();
        assert_eq!(cluster.status("tool").ready_reference, Some(reference));
    }
    // A digest that this object never had.
    let unknown = Digest::of(b"unknown");
    let before = cluster.wants("node-0");
    for reference in
        ["r.io/tool:v3".to_owned(), format!("r.io/tool@{unknown}"), format!("r.io/other@{digest}")]
    {
        cluster.apply("tool", |spec| spec.reference = reference);
        cluster.silence("tool");
        cluster.settle();
        assert_eq!(cluster.reason("tool"), "RegistryUnavailable");
        assert_eq!(cluster.wants("node-0"), before);
    }
    cluster.apply("other", |_| {});
    cluster.silence("other");
    cluster.settle();
    assert_eq!(cluster.reason("other"), "RegistryUnavailable");
}

#[test]
fn an_earlier_answer_needs_the_same_present_secrets() {
    let mut cluster = cluster(1);
    cluster.apply("tool", |spec| spec.pull_secrets = vec!["robot".into(), "other".into()]);
    cluster.resolve("tool");
    read_secrets(&mut cluster, "tool", "1");
    cluster.run_until_done();
    cluster.roll("tool", "r.io/tool:v2");
    for (secrets, reason) in [
        (vec!["robot"], "RegistryUnavailable"),
        (vec![], "RegistryUnavailable"),
        (vec!["other", "robot"], "Ready"),
    ] {
        cluster.apply("tool", |spec| {
            spec.reference = "r.io/tool:v1".to_owned();
            spec.pull_secrets = secrets.into_iter().map(str::to_owned).collect();
        });
        read_secrets(&mut cluster, "tool", "1");
        cluster.silence("tool");
        cluster.run_until_done();
        assert_eq!(cluster.reason("tool"), reason);
    }
    let preload = cluster.state.preloads.get_mut("team/tool").expect("a preload");
    let refusal = |transient| ResolutionFailure {
        reason: "SecretMissing",
        message: String::new(),
        transient,
        unanswered: false,
        retry_at: BEGIN + 1000,
    };
    preload.lose_secrets(&refusal(true));
    assert!(matches!(preload.resolution, ReferenceResolution::Known(_)));
    preload.lose_secrets(&refusal(false));
    assert_eq!(preload.resolution, ReferenceResolution::Unknown);
}

#[test]
fn nodes_are_asked_anew_where_an_earlier_answer_was_had_with_secrets() {
    let mut cluster = cluster(1);
    cluster.apply("tool", |spec| spec.pull_secrets = vec!["robot".into()]);
    cluster.resolve("tool");
    read_secrets(&mut cluster, "tool", "1");
    cluster.run_until_done();
    let first = cluster.status("tool").ready_reference.expect("ready");
    cluster.apply("tool", |spec| spec.reference = "r.io/tool:v2".to_owned());
    cluster.resolve("tool");
    read_secrets(&mut cluster, "tool", "1");
    cluster.run_until_done();
    let second = cluster.status("tool").ready_reference.expect("ready");
    let digest = first.split_once('@').expect("a digest").1;
    let without_tag = format!("r.io/tool@{digest}");
    cluster.apply("tool", |spec| spec.reference = "r.io/tool:v1".to_owned());
    read_secrets(&mut cluster, "tool", "2");
    cluster.silence("tool");
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "Preloading", "nodes hold it by secrets of before");
    assert_eq!(cluster.wants("node-0"), [first.clone(), second.clone(), without_tag]);
    cluster.run_until_done();
    assert_eq!(cluster.status("tool").ready_reference, Some(first.clone()));
    cluster.resolve("tool");
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "Ready");
    assert_eq!(cluster.wants("node-0"), [first, second]);
}

#[test]
fn a_tag_that_has_moved_is_not_taken_back_to_an_older_answer() {
    let mut cluster = cluster(1);
    cluster.run_until_done();
    cluster.apply("tool", |spec| spec.reference = "r.io/tool:v2".to_owned());
    cluster.resolve("tool");
    cluster.settle();
    // The tag resolves to another digest with other secrets.
    cluster.apply("tool", |spec| {
        spec.reference = "r.io/tool:v1".to_owned();
        spec.pull_secrets = vec!["robot".into()];
    });
    read_secrets(&mut cluster, "tool", "1");
    let digest = Digest::of(b"moved");
    let origin = AnswerOrigin {
        resolved_at: Some(cluster.now),
        pull_secrets: vec!["robot".into()],
        unavailable: None,
    };
    let reference = "r.io/tool:v1".to_owned();
    let known = ResolvedArtifact { reference, digest, platforms: Vec::new(), bytes: None, origin };
    cluster.answer("tool", ReferenceResolution::Known(known));
    cluster.settle();
    cluster.apply("tool", |spec| spec.reference = "r.io/tool:v2".to_owned());
    cluster.settle();
    cluster.apply("tool", |spec| {
        spec.reference = "r.io/tool:v1".to_owned();
        spec.pull_secrets = Vec::new();
    });
    cluster.silence("tool");
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "RegistryUnavailable");
}

#[test]
fn the_history_is_bounded() {
    let mut cluster = cluster(1);
    for version in 0..15 {
        cluster.now += 1;
        cluster.roll("tool", &format!("r.io/tool:v{version}"));
    }
    let history = cluster.status("tool").history;
    assert_eq!(history.len(), 10);
    assert_eq!((&*history[0].reference, &*history[9].reference), ("r.io/tool:v14", "r.io/tool:v5"));
}

#[test]
fn nodes_get_the_time_of_a_tags_resolution() {
    let mut cluster = cluster(1);
    cluster.settle();
    let told = |cluster: &Cluster| {
        let wanted = &cluster.objects["node-0"].spec.artifacts;
        let told =
            wanted.iter().map(|wanted| wanted.resolved_at.as_ref().map(|time| time.0.as_second()));
        told.collect::<Vec<_>>()
    };
    assert_eq!(told(&cluster), [Some(BEGIN)]);
    cluster.run_until_done();
    cluster.now += 50;
    let second = cluster.roll("tool", "r.io/tool:v2");
    assert_eq!(told(&cluster), [None, Some(BEGIN + 50)], "what a tag meant is not said again");
    cluster.roll("tool", &second);
    assert_eq!(told(&cluster).last(), Some(&None), "a digest says nothing of a tag");
}

#[test]
fn nodes_that_are_away_are_tolerated_up_to_a_number() {
    let mut cluster = cluster(4);
    cluster.apply("tool", |spec| {
        spec.parallelism = IntOrString::Int(10);
        spec.tolerated_nodes = IntOrString::Int(1);
    });
    let check = |cluster: &Cluster| {
        cluster.plan().check.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let most_work = |cluster: &mut Cluster, away: &[&str]| {
        cluster.settle();
        for (node, wanted) in cluster.open() {
            if !away.contains(&node.as_str()) {
                cluster.says(&node, &wanted, Phase::Ready);
            }
        }
        cluster.settle();
    };
    most_work(&mut cluster, &["node-2", "node-3"]);
    assert_eq!(check(&cluster), [] as [&str; 0], "two are more than may stay away");
    most_work(&mut cluster, &["node-3"]);
    assert_eq!(
        (check(&cluster), cluster.reason("tool")),
        (vec!["node-3".to_owned()], "Preloading".to_owned())
    );
    cluster.is_ready("node-3", true);
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "Preloading", "it is well, and only slow");
    cluster.now += 30;
    assert_eq!(check(&cluster), ["node-3"], "it may not be well any more");
    cluster.is_ready("node-3", false);
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "Ready");
    let status = cluster.status("tool");
    assert_eq!((status.desired, status.ready, status.away), (4, 3, 1));
    let ready = status.conditions.iter().find(|one| one.type_ == "Ready").expect("one");
    assert!(
        ready.message.contains("3 of 4 nodes hold it; spec.toleratedNodes allows for 1"),
        "{}",
        ready.message
    );
    assert!(check(&cluster).is_empty());

    // A node with a silent plugin is away, whatever its condition is; others have failed.
    cluster.apply("tool", |spec| spec.reference = "r.io/tool:v2".to_owned());
    cluster.resolve("tool");
    cluster.now += 30;
    most_work(&mut cluster, &["node-3"]);
    assert_eq!(cluster.reason("tool"), "Preloading");
    cluster.now += 130;
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "Ready");
    cluster.apply("tool", |spec| spec.reference = "r.io/tool:v3".to_owned());
    cluster.resolve("tool");
    most_work(&mut cluster, &["node-3"]);
    let is_new = |(_, wanted): &(String, WantedArtifact)| wanted.reference.contains(":v3@");
    let (node, wanted) = cluster.open().into_iter().find(is_new).expect("it is asked for");
    cluster.says(&node, &wanted, Phase::Failed);
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "NodesFailed");

    // 24 % of four nodes are rounded down to none. At least one node has to hold the artifact.
    cluster.says(&node, &wanted, Phase::Waiting);
    for (tolerated, away, reason) in [
        (IntOrString::String("24%".to_owned()), vec!["node-3"], "Preloading"),
        (IntOrString::String("25%".to_owned()), vec!["node-3"], "Ready"),
        (
            IntOrString::String("100%".to_owned()),
            vec!["node-0", "node-1", "node-2", "node-3"],
            "Preloading",
        ),
    ] {
        cluster.apply("tool", |spec| {
            spec.reference = format!("r.io/tool:v{}", spec.reference.len() + away.len());
            spec.tolerated_nodes = tolerated;
        });
        cluster.resolve("tool");
        for node in &away {
            cluster.is_ready(node, false);
        }
        most_work(&mut cluster, &away);
        assert_eq!(cluster.reason("tool"), reason, "{away:?}");
    }
}

#[test]
fn an_index_without_a_required_platform_is_never_ready() {
    let mut cluster = cluster(1);
    cluster.answer("tool", index_for("linux/amd64"));
    cluster.run_until_done();
    assert_eq!(cluster.reason("tool"), "Ready");
    let platforms = vec!["linux/amd64".into(), "linux/arm64".into()];
    cluster.apply("tool", |spec| spec.platforms = platforms);
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "PlatformMissing");
    assert!(super::preload_status::is_stalled(&cluster.status("tool")));
    assert_eq!(cluster.wants("node-0").len(), 1, "pods still use it");
}

#[test]
fn secrets_are_not_awaited_without_nodes() {
    let mut cluster = cluster(1);
    cluster.apply("tool", |spec| {
        spec.pull_secrets = vec!["robot".into()];
        spec.selector.names = vec!["gone".into()];
    });
    cluster.settle();
    assert_eq!(cluster.reason("tool"), "NoNodes");
}

#[test]
fn a_recreated_node_is_awaited() {
    let mut cluster = cluster(2);
    for name in ["node-0", "node-1"] {
        cluster.change_object(name, |object| {
            object.metadata.owner_references = Some(vec![OwnerReference {
                kind: "Node".to_owned(),
                uid: format!("uid-{name}"),
                ..OwnerReference::default()
            }]);
        });
    }
    cluster.now += 1000;
    cluster.add_node("node-1");
    let name = cluster.state.text("node-1");
    cluster.state.nodes.get_mut(&name).expect("a node").uid = "another".to_owned();
    cluster.run_until_done();
    assert_eq!(cluster.reason("tool"), "Preloading", "its object is its predecessor's");
    assert_eq!(cluster.plan().wake, Some(cluster.now + 121));
}

/// Has labels and conditions written.
fn with_node_status(mut cluster: Cluster) -> Cluster {
    let condition_namespaces = BTreeSet::from(["team".to_owned()]);
    cluster.state.node_status = NodeStatusRules { labels: true, condition_namespaces };
    cluster
}

/// Returns the label of an artifact whose preload names a tag.
fn label_of(wanted: &WantedArtifact) -> String {
    let (written, _) = wanted.reference.split_once('@').expect("a digest");
    ready_label("team", &written.parse().expect("a reference"))
}

#[test]
fn a_label_is_the_hash_of_namespace_and_full_reference() {
    let label = |namespace, text: &str| ready_label(namespace, &text.parse().expect("a reference"));
    // printf %s team/r.io/tool:v1 | sha256sum | cut -c1-32
    assert_eq!(
        label("team", "r.io/tool:v1"),
        "oci.custom.io/ready.0744506b8b21d6a98805d45b601334fa"
    );
    let busybox = "oci.custom.io/ready.7598a956845b290a89986028ee95c943";
    assert_eq!(label("team", "busybox"), busybox);
    assert_eq!(label("team", "docker.io/library/busybox:latest"), busybox);
    assert_ne!(label("other", "busybox"), busybox);
    assert!(busybox.split_once('/').is_some_and(|(_, name)| name.len() <= 63));
}

#[test]
fn a_node_has_the_labels_of_what_it_holds() {
    let mut cluster = with_node_status(cluster(2));
    let [first, second, third] = ["v1", "v2", "v3"]
        .map(|tag| ready_label("team", &format!("r.io/tool:{tag}").parse().expect("a reference")));
    let set =
        |labels: &[&String]| labels.iter().map(|label| (*label).clone()).collect::<BTreeSet<_>>();
    cluster.settle();
    assert_eq!(cluster.status("tool").node_label.as_ref(), Some(&first));
    assert_eq!(cluster.labels("node-0"), set(&[]));
    let (_, wanted) = cluster.open().remove(0);
    cluster.says("node-0", &wanted, Phase::Pulling);
    cluster.settle();
    assert_eq!(cluster.labels("node-0"), set(&[]));
    cluster.says("node-0", &wanted, Phase::Ready);
    cluster.settle();
    assert_eq!((cluster.labels("node-0"), cluster.labels("node-1")), (set(&[&first]), set(&[])));
    cluster.run_until_done();
    // Others add and change labels.
    let node = cluster.state.nodes.get_mut("node-1").expect("a node");
    node.labels.insert(first.clone(), "false".to_owned());
    node.labels.insert(format!("{LABEL_PREFIX}unknown"), LABEL_VALUE.to_owned());
    cluster.settle();
    assert_eq!(cluster.labels("node-1"), set(&[&first]));
    assert_eq!(cluster.state.nodes["node-1"].labels[&first], LABEL_VALUE);

    // A rollout: a node has both labels while it holds both versions.
    cluster.apply("tool", |spec| spec.reference = "r.io/tool:v2".to_owned());
    cluster.settle();
    assert_eq!(cluster.labels("node-0"), set(&[&first]), "the reference is not resolved yet");
    cluster.resolve("tool");
    cluster.settle();
    cluster.says("node-0", &cluster.open()[0].1.clone(), Phase::Ready);
    cluster.settle();
    assert_eq!(cluster.labels("node-0"), set(&[&first, &second]));
    assert_eq!(cluster.labels("node-1"), set(&[&first]));
    cluster.run_until_done();
    begin_anew(&mut cluster);
    cluster.settle();
    assert_eq!(cluster.labels("node-1"), set(&[&first, &second]));
    cluster.roll("tool", "r.io/tool:v3");
    assert_eq!(cluster.labels("node-1"), set(&[&second, &third]));

    cluster.apply("tool", |spec| spec.selector.names = vec!["node-0".to_owned()]);
    cluster.settle();
    assert_eq!((cluster.labels("node-0").len(), cluster.labels("node-1").len()), (2, 0));
    cluster.apply("tool", |spec| spec.pin = false);
    cluster.settle();
    assert_eq!((cluster.labels("node-0"), cluster.status("tool").node_label), (set(&[]), None));
    cluster.apply("tool", |spec| spec.pin = true);
    cluster.settle();
    assert_eq!(
        cluster.labels("node-0"),
        set(&[&third]),
        "only pinned artifacts are kept for a rollback"
    );
    cluster.state.preloads.clear();
    cluster.settle();
    assert_eq!(cluster.labels("node-0"), set(&[]));
    assert_eq!(cluster.state.nodes["node-0"].labels.len(), 1, "the labels of others stay");
}

#[test]
fn labels_and_a_true_condition_survive_a_restart_of_the_plugin() {
    let mut cluster = with_node_status(cluster(1));
    cluster.run_until_done();
    let labels = cluster.labels("node-0");
    let begin = cluster.time();
    let restart = |cluster: &mut Cluster| {
        cluster.change_object("node-0", |object| {
            let held = &mut object.status.as_mut().expect("a plugin").artifacts[0];
            held.phase = Phase::Pulling;
            held.since = Some(begin.clone());
        });
        cluster.settle();
    };
    restart(&mut cluster);
    assert_eq!((cluster.labels("node-0"), cluster.condition("node-0").0), (labels, "True"));
    let wake = cluster.plan().wake.expect("a time");
    assert!(wake <= cluster.now + 16, "{wake}");
    cluster.now = wake;
    cluster.settle();
    assert_eq!(cluster.labels("node-0"), BTreeSet::new());
    assert_eq!(cluster.condition("node-0"), ("False", "ArtifactsMissing"));
    // A restart adds no label that the node did not have.
    cluster.now -= 16;
    restart(&mut cluster);
    assert_eq!((cluster.labels("node-0").len(), cluster.condition("node-0").0), (0, "False"));
}

#[test]
fn the_condition_says_whether_a_node_has_what_the_others_have() {
    let mut cluster = with_node_status(Cluster::new(2));
    cluster.settle();
    assert_eq!(cluster.condition("node-0"), ("", ""), "it may have no driver");
    cluster.start_plugin("node-0");
    cluster.start_plugin("node-1");
    cluster.settle();
    assert_eq!(cluster.condition("node-0"), ("True", "ArtifactsReady"));
    // A new preload takes no node out of service, whatever comes of it.
    cluster.now += 1;
    cluster.apply("tool", |_| {});
    cluster.resolve("tool");
    cluster.settle();
    let (_, wanted) = cluster.open().remove(0);
    cluster.says("node-0", &wanted, Phase::Failed);
    cluster.settle();
    assert_eq!(cluster.condition("node-0"), ("True", "ArtifactsReady"));
    // It counts for younger nodes.
    cluster.now += 1;
    cluster.add_node("late");
    cluster.settle();
    cluster.start_plugin("late");
    cluster.settle();
    assert_eq!(cluster.condition("late"), ("False", "ArtifactsMissing"));
    cluster.says("late", &wanted, Phase::Failed);
    cluster.settle();
    assert_eq!(cluster.condition("late"), ("False", "ArtifactsFailed"));
    let message = &cluster.state.nodes["late"].condition.as_ref().expect("a condition").message;
    assert_eq!(
        message,
        "the node holds 0 of 1 preloaded artifacts, and team/tool has failed: NoRoom"
    );
    cluster.run_until_done();
    assert_eq!(cluster.condition("late"), ("True", "ArtifactsReady"));

    // While the next version is on its way, the previous one is enough.
    cluster.apply("tool", |spec| spec.reference = "r.io/tool:v2".to_owned());
    cluster.settle();
    cluster.resolve("tool");
    cluster.settle();
    assert_eq!(cluster.open().len(), 3);
    assert_eq!(cluster.condition("late").0, "True");
    cluster.run_until_done();
    // Afterwards it is not.
    let (current, previous) =
        (&cluster.wants("late")[1].clone(), &cluster.wants("late")[0].clone());
    assert_eq!(cluster.status("tool").ready_reference.as_ref(), Some(current), "not {previous}");
    cluster.change_object("late", |object| {
        object
            .status
            .as_mut()
            .expect("a plugin")
            .artifacts
            .retain(|held| held.reference != *current);
    });
    cluster.settle();
    assert_eq!(cluster.condition("late"), ("False", "ArtifactsMissing"));
    cluster.now += 121;
    cluster.settle();
    assert_eq!(cluster.condition("late"), ("Unknown", "NoAnswer"));
    // Preloads of other namespaces have no say.
    cluster.state.node_status.condition_namespaces = BTreeSet::from(["other".to_owned()]);
    cluster.settle();
    assert_eq!(cluster.condition("late"), ("True", "ArtifactsReady"));
}

/// An event in a cluster.
#[derive(Clone, Debug)]
enum ClusterEvent {
    Says(usize, Phase),
    Joins,
    Leaves(usize),
    Rolls(usize, u8),
    Passes(i64),
    Paused(usize, bool),
    HasRoom(usize, bool),
    Forgets,
}

fn cluster_event() -> impl Strategy<Value = ClusterEvent> {
    let phase = prop_oneof![
        1 => Just(Phase::Waiting),
        1 => Just(Phase::Pulling),
        1 => Just(Phase::Failed),
        3 => Just(Phase::Ready),
    ];
    prop_oneof![
        8 => (0..100_usize, phase).prop_map(|(which, phase)| ClusterEvent::Says(which, phase)),
        1 => Just(ClusterEvent::Joins),
        1 => (0..100_usize).prop_map(ClusterEvent::Leaves),
        1 => (0..3_usize, 0..3_u8).prop_map(|(which, version)| ClusterEvent::Rolls(which, version)),
        1 => (1..400_i64).prop_map(ClusterEvent::Passes),
        1 => (0..3_usize, any::<bool>()).prop_map(|(which, is)| ClusterEvent::Paused(which, is)),
        1 => (0..100_usize, any::<bool>()).prop_map(|(which, has)| ClusterEvent::HasRoom(which, has)),
        1 => Just(ClusterEvent::Forgets),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Invariants under random events: parallelism holds, no artifact is assigned twice, a ready artifact stays until
    /// the next one is ready, and finally all nodes hold all artifacts.
    #[test]
    fn invariants_hold_under_random_events(events in proptest::collection::vec(cluster_event(), 1..60)) {
        let names = ["tool-0", "tool-1", "tool-2"];
        let mut cluster = with_node_status(cluster(5));
        for name in names {
            cluster.apply(name, |spec| spec.parallelism = IntOrString::Int(2));
            cluster.resolve(name);
        }
        let mut joined = 0;
        // A node that failed, or was not heard of, gives its place to others, and may come back.
        let mut orderly = true;
        for cluster_event in events {
            match cluster_event {
                ClusterEvent::Says(which, phase) => {
                    let open = cluster.open();
                    if let Some((node, wanted)) = open.get(which % open.len().max(1)) {
                        orderly &= phase != Phase::Failed;
                        cluster.says(node, wanted, phase);
                    }
                }
                ClusterEvent::Joins => {
                    joined += 1;
                    let name = format!("late-{joined}");
                    cluster.add_node(&name);
                    cluster.settle();
                    cluster.start_plugin(&name);
                }
                ClusterEvent::Leaves(which) => {
                    let names: Vec<_> = cluster.objects.keys().cloned().collect();
                    if names.len() > 2 {
                        cluster.remove_node(&names[which % names.len()]);
                    }
                }
                ClusterEvent::Rolls(which, version) => {
                    cluster.apply(names[which], |spec| spec.reference = format!("r.io/tool:v{version}"));
                    cluster.resolve(names[which]);
                }
                ClusterEvent::Passes(seconds) => {
                    orderly = false;
                    cluster.now += seconds;
                }
                ClusterEvent::Paused(which, paused) => {
                    cluster.apply(names[which], |spec| spec.paused = paused);
                }
                ClusterEvent::HasRoom(which, has) => {
                    orderly = false;
                    let names: Vec<_> = cluster.objects.keys().cloned().collect();
                    cluster.has_room(&names[which % names.len()], Some(if has { i64::MAX } else { 0 }));
                }
                ClusterEvent::Forgets => {
                    begin_anew(&mut cluster);
                    for name in names {
                        let key = format!("team/{name}");
                        if cluster.state.preloads[key.as_str()].resolution == ReferenceResolution::Unknown {
                            cluster.resolve(name);
                        }
                    }
                }
            }
            let before: Vec<_> = names.iter().map(|name| cluster.status(name)).collect();
            cluster.settle();
            for (name, before) in names.iter().zip(before) {
                let status = cluster.status(name);
                prop_assert!(status.ready + status.active + status.failed <= status.desired);
                prop_assert!(!orderly || status.active <= 2, "{name}: {status:?}");
                prop_assert!(status.ready_reference.is_some() || before.ready_reference.is_none());
                if let Some(ready) = &status.ready_reference {
                    let keeps = cluster.objects.iter().all(|(node, object)| {
                        let wants = object.spec.artifacts.iter().any(|wanted| {
                            wanted.preload == format!("team/{name}") && wanted.reference == *ready
                        });
                        wants || node.starts_with("late") || before.ready_reference.as_ref() != Some(ready)
                    });
                    prop_assert!(keeps, "{name}: a node was told to drop {ready}");
                }
            }
            for (node, object) in &cluster.objects {
                let holds = |wanted: &&WantedArtifact| {
                    cluster.held(node, wanted).is_some_and(|held| held.phase == Phase::Ready)
                };
                let held: Vec<_> = object.spec.artifacts.iter().filter(holds).collect();
                prop_assert_eq!(cluster.labels(node), held.iter().map(|held| label_of(held)).collect());
                if cluster.condition(node).0 == "True" {
                    let ready = names.iter().filter(|name| cluster.status(name).ready_reference.is_some());
                    for name in ready {
                        let key = format!("team/{name}");
                        prop_assert!(held.iter().any(|held| held.preload == key), "{node} lacks {name}");
                    }
                }
            }
        }
        for name in names {
            cluster.apply(name, |spec| spec.paused = false);
        }
        for node in cluster.objects.keys().cloned().collect::<Vec<_>>() {
            cluster.has_room(&node, None);
        }
        cluster.run_until_done();
        for name in names {
            prop_assert_eq!(cluster.reason(name), "Ready");
        }
        for node in cluster.objects.keys() {
            prop_assert_eq!(cluster.condition(node), ("True", "ArtifactsReady"));
        }
    }
}
