//! What the leader does with answers, without an API server.

use std::collections::BTreeMap;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;

use super::*;
use crate::api::NodeArtifactsSpec;
use crate::plan::facts::{Known, Node, Origin, Refusal};
use oci::Digest;

/// A registry that has `good`, and nothing else for as long as one asks.
struct Registry;

impl Look for Registry {
    fn look(&self, question: Question) -> BoxFuture<'static, Found> {
        async move {
            let path = question.reference.repository().path().to_owned();
            assert_ne!(path, "team/poison", "a registry's answer that nobody has thought of");
            let meaning = if path == "team/good" {
                let (reference, digest) = (question.written, Digest::of(b"good"));
                let (platforms, origin) = (Vec::new(), Origin::default());
                Meaning::Known(Known { reference, digest, platforms, bytes: None, origin })
            } else {
                Meaning::Refused(refusal(0))
            };
            Found { meaning: Some(meaning), access: Access::Open, plain: None }
        }
        .boxed()
    }
}

fn refusal(retry_at: i64) -> Refusal {
    let message = "it did not answer in time".to_owned();
    let (transient, unanswered) = (true, false);
    Refusal { reason: "RegistryUnavailable", message, transient, unanswered, retry_at }
}

fn fleet() -> Fleet {
    let nowhere = kube::Config::new("http://127.0.0.1:1".parse().expect("an address"));
    let client = Client::try_from(nowhere).expect("a client");
    Fleet::new(client, Arc::new(Registry), Pace::default(), Arc::default())
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

impl Fleet {
    /// Plans, and waits for all that was asked then.
    async fn plan_and_hear(&mut self) {
        self.plan();
        while let Some(done) = self.looks.join_next().await {
            let (preload, asked, found) = done.expect("an answer");
            self.found(&preload, &asked, found);
        }
    }

    fn meaning(&self, preload: &str) -> &Meaning {
        &self.world.preloads[preload].meaning
    }
}

#[tokio::test]
async fn whoever_is_asked_in_vain_again_and_again_keeps_nobody_from_being_asked() {
    let mut fleet = fleet();
    for index in 0..LOOKS_AT_ONCE {
        fleet.world.put_preload(&of(&format!("hangs-{index}")));
    }
    let mut last = of("good");
    last.metadata.name = Some("last".to_owned());
    fleet.world.put_preload(&last);
    for _ in 0..2 {
        fleet.plan_and_hear().await;
    }
    assert!(matches!(fleet.meaning("team/last"), Meaning::Known(_)));
}

#[tokio::test]
async fn secrets_that_cannot_be_read_for_a_moment_stay_what_they_were() {
    let mut fleet = fleet();
    let spec = serde_json::json!({"reference": "r.io/team/good:v1", "pullSecrets": ["robot"]});
    fleet.world.put_preload(&preload("tool", &spec));
    let (key, version): (Arc<str>, Arc<str>) = (Arc::from("team/tool"), Arc::from("1"));
    let asked = Asked {
        uid: "uid-of-tool".to_owned(),
        reference: "r.io/team/good:v1".to_owned(),
        pull_secrets: vec!["robot".to_owned()],
    };
    let told = |access, plain| Found { meaning: None, access, plain };
    let sealed = Access::Sealed { version: Arc::clone(&version), until: 100 };
    let plain = Plain::new(&[]).expect("credentials");
    fleet.found(&key, &asked, told(sealed, Some(plain)));
    fleet.found(&key, &asked, told(Access::Refused(refusal(120)), None));
    let access = &fleet.world.preloads[&key].access;
    assert_eq!(*access, Access::Sealed { version, until: 120 });
    assert!(fleet.readable.contains_key(&key));
    // Secrets that are gone are gone.
    let gone = Refusal { transient: false, ..refusal(160) };
    fleet.found(&key, &asked, told(Access::Refused(gone.clone()), None));
    assert_eq!(fleet.world.preloads[&key].access, Access::Refused(gone));
    assert!(fleet.readable.is_empty());
}

#[tokio::test]
async fn an_answer_that_comes_late_brings_back_nothing() {
    let mut fleet = fleet();
    let object = |owner: &str| {
        let mut object = NodeArtifacts::new("one", NodeArtifactsSpec::default());
        object.metadata.resource_version = Some("7".to_owned());
        object.metadata.owner_references = Some(vec![write::owner("one", owner)]);
        Written::Node(Box::new(object))
    };
    let node = || Target::Node(Arc::from("one"));
    fleet.written(node(), Ok(object("first")));
    assert!(fleet.world.objects.is_empty(), "the node has gone, and its object with it");
    let labels = BTreeMap::new();
    let known = Node { uid: "second".to_owned(), labels, created: 0, turn: 0, readiness: None };
    fleet.world.nodes.insert(Arc::from("one"), known);
    fleet.written(node(), Ok(object("first")));
    assert!(fleet.world.objects.is_empty(), "another node has its name now");
    fleet.written(node(), Ok(object("second")));
    assert_eq!(fleet.world.objects.len(), 1);

    let target = || Target::Preload(Arc::from("team/good"));
    let answer = || Ok(Written::Preload(Box::new(of("good"))));
    fleet.written(target(), answer());
    assert!(fleet.world.preloads.is_empty(), "it was deleted");
    let mut another = of("good");
    another.metadata.uid = Some("another".to_owned());
    fleet.world.put_preload(&another);
    fleet.written(target(), answer());
    assert_eq!(fleet.world.preloads["team/good"].uid, "another");
}

#[tokio::test]
async fn an_answer_that_nobody_has_thought_of_is_a_refusal_of_one_preload() {
    let mut fleet = fleet();
    fleet.world.put_preload(&of("poison"));
    fleet.plan_and_hear().await;
    let Meaning::Refused(refusal) = fleet.meaning("team/poison") else { panic!("it is known") };
    assert!(refusal.transient && refusal.retry_at > 0, "{refusal:?}");
    assert!(fleet.looking.is_empty());
}
