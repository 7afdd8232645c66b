//! Tests of the reconciler with results of tasks, without an API server.

use std::collections::BTreeMap;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;

use super::*;
use crate::api::NodeArtifactsSpec;
use crate::plan::cluster_facts::{AnswerOrigin, ClusterNode, ResolutionFailure, ResolvedArtifact};
use oci::Digest;

/// A registry that has `good`, and never answers for other repositories.
struct Registry;

impl ReferenceResolver for Registry {
    fn resolve(&self, request: ResolveRequest) -> BoxFuture<'static, ResolveResult> {
        async move {
            let path = request.reference.repository().path().to_owned();
            assert_ne!(path, "team/poison", "a registry's answer that nobody has thought of");
            let resolution = if path == "team/good" {
                let (reference, digest) = (request.written, Digest::of(b"good"));
                let (platforms, origin) = (Vec::new(), AnswerOrigin::default());
                ReferenceResolution::Known(ResolvedArtifact {
                    reference,
                    digest,
                    platforms,
                    bytes: None,
                    origin,
                })
            } else {
                ReferenceResolution::Refused(refusal(0))
            };
            ResolveResult {
                resolution: Some(resolution),
                access: RegistryAccess::Open,
                plain: None,
            }
        }
        .boxed()
    }
}

fn refusal(retry_at: i64) -> ResolutionFailure {
    let message = "it did not answer in time".to_owned();
    let (transient, unanswered) = (true, false);
    ResolutionFailure { reason: "RegistryUnavailable", message, transient, unanswered, retry_at }
}

fn reconciler() -> PreloadReconciler {
    let nowhere = kube::Config::new("http://127.0.0.1:1".parse().expect("an address"));
    let client = Client::try_from(nowhere).expect("a client");
    let mut families = controller_runtime::controller_metrics::metric_families();
    PreloadReconciler::new(
        client,
        Arc::new(Registry),
        ControllerPace::default(),
        ClusterState::default(),
        WriteRate::new(50),
        Arc::new(PreloadMetrics::new(&mut families)),
        Arc::new(ControllerMetrics::new(&mut families)),
    )
}

fn preload(name: &str, spec: &serde_json::Value) -> ArtifactPreload {
    let spec = serde_json::from_value(spec.clone()).expect("a spec");
    let mut object = ArtifactPreload::new(name, spec);
    object.metadata.namespace = Some("team".to_owned());
    object.metadata.uid = Some(format!("uid-of-{name}"));
    object.metadata.resource_version = Some("1".to_owned());
    object.metadata.generation = Some(1);
    object
}

fn of(name: &str) -> ArtifactPreload {
    preload(name, &serde_json::json!({"reference": format!("r.io/team/{name}:v1")}))
}

impl PreloadReconciler {
    /// Plans, and waits for all resolutions that this starts.
    async fn plan_and_resolve(&mut self) {
        self.plan();
        while let Some(done) = self.resolutions.join_next().await {
            let (preload, input, result) = done.expect("an answer");
            self.apply_resolution(&preload, &input, result);
        }
    }

    fn resolution(&self, preload: &str) -> &ReferenceResolution {
        &self.state.preloads[preload].resolution
    }
}

#[tokio::test]
async fn slow_registries_do_not_delay_other_preloads() {
    let mut reconciler = reconciler();
    for index in 0..CONCURRENT_RESOLUTIONS {
        reconciler.state.put_preload(&of(&format!("hangs-{index}")));
    }
    let mut last = of("good");
    last.metadata.name = Some("last".to_owned());
    reconciler.state.put_preload(&last);
    for _ in 0..2 {
        reconciler.plan_and_resolve().await;
    }
    assert!(matches!(reconciler.resolution("team/last"), ReferenceResolution::Known(_)));
}

#[tokio::test]
async fn known_secrets_survive_a_transient_failure() {
    let mut reconciler = reconciler();
    let spec = serde_json::json!({"reference": "r.io/team/good:v1", "pullSecrets": ["robot"]});
    reconciler.state.put_preload(&preload("tool", &spec));
    let (key, version): (Arc<str>, Arc<str>) = (Arc::from("team/tool"), Arc::from("1"));
    let input = ResolutionInput {
        uid: "uid-of-tool".to_owned(),
        reference: "r.io/team/good:v1".to_owned(),
        pull_secrets: vec!["robot".to_owned()],
    };
    let result = |access, plain| ResolveResult { resolution: None, access, plain };
    let sealed = RegistryAccess::Sealed { version: Arc::clone(&version), until: 100 };
    let plain = PlainCredentials::new(&[]).expect("credentials");
    reconciler.apply_resolution(&key, &input, result(sealed, Some(plain)));
    reconciler.apply_resolution(&key, &input, result(RegistryAccess::Refused(refusal(120)), None));
    let access = &reconciler.state.preloads[&key].access;
    assert_eq!(*access, RegistryAccess::Sealed { version, until: 120 });
    assert!(reconciler.readable.contains_key(&key));
    // Deleted secrets are dropped.
    let gone = ResolutionFailure { transient: false, ..refusal(160) };
    reconciler.apply_resolution(&key, &input, result(RegistryAccess::Refused(gone.clone()), None));
    assert_eq!(reconciler.state.preloads[&key].access, RegistryAccess::Refused(gone));
    assert!(reconciler.readable.is_empty());
}

#[tokio::test]
async fn a_late_result_of_a_write_restores_nothing() {
    let mut reconciler = reconciler();
    let object = |owner: &str| {
        let mut object = NodeArtifacts::new("one", NodeArtifactsSpec::default());
        object.metadata.resource_version = Some("7".to_owned());
        object.metadata.owner_references = Some(vec![api_write::owner("one", owner)]);
        WriteResult::Node(Box::new(object))
    };
    let node = || WriteTarget::Node(Arc::from("one"));
    reconciler.apply_write(node(), Ok(object("first")));
    assert!(reconciler.state.objects.is_empty(), "the node has gone, and its object with it");
    let labels = BTreeMap::new();
    let known = ClusterNode {
        uid: "second".to_owned(),
        labels,
        created: 0,
        start_order: 0,
        readiness: None,
        condition: None,
    };
    reconciler.state.nodes.insert(Arc::from("one"), known);
    reconciler.apply_write(node(), Ok(object("first")));
    assert!(reconciler.state.objects.is_empty(), "another node has its name now");
    reconciler.apply_write(node(), Ok(object("second")));
    assert_eq!(reconciler.state.objects.len(), 1);

    let target = || WriteTarget::Preload(Arc::from("team/good"));
    let answer = || Ok(WriteResult::Preload(Box::new(of("good"))));
    reconciler.apply_write(target(), answer());
    assert!(reconciler.state.preloads.is_empty(), "it was deleted");
    let mut another = of("good");
    another.metadata.uid = Some("another".to_owned());
    reconciler.state.put_preload(&another);
    reconciler.apply_write(target(), answer());
    assert_eq!(reconciler.state.preloads["team/good"].uid, "another");
}

#[tokio::test]
async fn a_panic_of_the_resolver_fails_one_preload() {
    let mut reconciler = reconciler();
    reconciler.state.put_preload(&of("poison"));
    reconciler.plan_and_resolve().await;
    let ReferenceResolution::Refused(refusal) = reconciler.resolution("team/poison") else {
        panic!("it is known")
    };
    assert!(refusal.transient && refusal.retry_at > 0, "{refusal:?}");
    assert!(reconciler.resolving.is_empty());
}
