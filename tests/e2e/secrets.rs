//! Tests credentials of pods: which ones open a registry, and that others do not see the content.

use base64::Engine as _;
use serde_json::json;
use tonic::Code;

use crate::support::{
    Answer, FakeRegistry, Layer, Manifest, Node, Proxy, Registry, Volume, digest, private_registry,
    unique,
};

const USER: &str = "someone";
const PASSWORD: &str = "correct-horse-battery";

/// A registry that requires a password, with one artifact, and the proxy in front of it.
struct PrivateRegistry {
    proxy: Proxy,
    name: String,
    _registry: Registry,
}

impl PrivateRegistry {
    fn new() -> Self {
        let registry = private_registry(USER, PASSWORD);
        let repository = unique("private");
        Manifest::artifact([Layer::titled("secret.txt", "for the eyes of some")]).push(
            &registry.as_user(USER, PASSWORD),
            &repository,
            "v1",
        );
        Self { proxy: Proxy::new(&registry), name: format!("{repository}:v1"), _registry: registry }
    }

    fn reference(&self) -> String {
        self.proxy.reference(&self.name)
    }

    fn volume(&self, node: &Node) -> Volume {
        node.kubelet.new_volume(&self.reference())
    }
}

fn encoded(user: &str, password: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"))
}

fn docker_config(host: &str, user: &str, password: &str) -> String {
    json!({"auths": {host: {"auth": encoded(user, password)}}}).to_string()
}

fn basic(volume: Volume, user: &str, password: &str) -> Volume {
    volume.secret("username", user).secret("password", password)
}

/// The registry knows one of several credentials, and tells that one what is wrong.
#[test]
fn a_credential_that_is_unknown_does_not_hide_what_another_is_told() {
    let node = Node::start();
    let registry = FakeRegistry::new();
    let host = registry.host();
    let by_path = format!("{host}/hostile");
    let config = json!({"auths": {
        &by_path: {"auth": encoded("unknown", "wrong")},
        &host: {"auth": encoded(USER, PASSWORD)},
    }});
    let known = format!("Basic {}", encoded(USER, PASSWORD));
    registry.script(move |request| {
        let is_known = request.header("authorization") == Some(known.as_str());
        Some(if is_known {
            Answer::error(404, "MANIFEST_UNKNOWN")
        } else {
            Answer::error(401, "UNAUTHORIZED")
                .with_header("www-authenticate", "Basic realm=\"test\"")
        })
    });
    let volume = node.kubelet.new_volume(&registry.reference("missing"));
    let volume = volume.secret(".dockerconfigjson", &config.to_string());
    node.kubelet.publish_badly(&volume, Code::NotFound);
}

#[test]
fn every_kind_of_secret_opens_a_private_registry() {
    let node = Node::start();
    let private = PrivateRegistry::new();
    let host = private.proxy.host();
    let by_name = json!({"auths": {&host: {"username": USER, "password": PASSWORD}}}).to_string();
    let with_scheme = docker_config(&format!("http://{host}/v2/"), USER, PASSWORD);
    let old =
        json!({&host: {"username": USER, "password": PASSWORD, "email": "a@b.c"}}).to_string();
    let repository = private.name.split(':').next().expect("a repository");
    let by_path = docker_config(&format!("{host}/{repository}"), USER, PASSWORD);
    let secrets: [&[(&str, &str)]; 6] = [
        &[(".dockerconfigjson", &docker_config(&host, USER, PASSWORD))],
        &[(".dockerconfigjson", &by_name)],
        &[(".dockerconfigjson", &with_scheme)],
        &[(".dockerconfigjson", &by_path)],
        &[(".dockercfg", &old)],
        &[("username", USER), ("password", PASSWORD)],
    ];
    for (index, secret) in secrets.into_iter().enumerate() {
        let mut volume = private.volume(&node).attribute("pullPolicy", "Always");
        for (key, value) in secret {
            volume = volume.secret(key, value);
        }
        if let Err(status) = node.kubelet.publish(&volume) {
            panic!("secret {index} did not open the registry: {}", status.message());
        }
    }
}

#[test]
fn a_missing_or_wrong_password_is_unauthenticated() {
    let node = Node::start();
    let private = PrivateRegistry::new();
    node.kubelet.publish_badly(&private.volume(&node), Code::Unauthenticated);
    let wrong = basic(private.volume(&node), USER, "wrong-password-said-nobody");
    let message = node.kubelet.publish_badly(&wrong, Code::Unauthenticated);
    assert!(!message.contains("wrong-password-said-nobody"), "{message}");
    let elsewhere = docker_config("registry.example.org", USER, PASSWORD);
    let volume = private.volume(&node).secret(".dockerconfigjson", &elsewhere);
    node.kubelet.publish_badly(&volume, Code::Unauthenticated);
}

#[test]
fn of_two_credentials_the_one_that_works_is_used() {
    let node = Node::start();
    let private = PrivateRegistry::new();
    let host = private.proxy.host();
    let repository = private.name.split(':').next().expect("a repository");
    // The kubelet's keyring tries the longest match first and continues with the others.
    let both = json!({"auths": {
        &host: {"auth": encoded(USER, PASSWORD)},
        format!("{host}/{repository}"): {"auth": encoded(USER, "outdated")},
    }});
    node.kubelet
        .publish_well(&private.volume(&node).secret(".dockerconfigjson", &both.to_string()));
}

#[test]
fn malformed_secrets_are_refused_without_showing_them() {
    let node = Node::start();
    let private = PrivateRegistry::new();
    let marker = "do-not-show-this";
    let secrets: [&[(&str, &str)]; 6] = [
        &[(".dockerconfigjson", &format!("{{\"auths\": {marker}"))],
        &[(".dockerconfigjson", &format!("[\"{marker}\"]"))],
        &[(".dockerconfigjson", &json!({"auths": {"host": {"auth": marker}}}).to_string())],
        &[(".dockercfg", marker)],
        &[("username", marker)],
        &[("token", marker)],
    ];
    for secret in secrets {
        let mut volume = private.volume(&node);
        for (key, value) in secret {
            volume = volume.secret(key, value);
        }
        let status = node.kubelet.publish(&volume).expect_err("a malformed secret");
        assert!(
            matches!(status.code(), Code::InvalidArgument | Code::Unauthenticated),
            "{:?}: {}",
            status.code(),
            status.message()
        );
        assert!(!status.message().contains(marker), "{}", status.message());
    }
    assert!(!node.driver.log().contains(marker), "the log shows a secret");
}

#[test]
fn cached_private_content_is_refused_without_a_proof_of_access() {
    let mut node = Node::start();
    let private = PrivateRegistry::new();
    let allowed = basic(private.volume(&node), USER, PASSWORD);
    node.kubelet.publish_well(&allowed);
    for restart in [false, true] {
        if restart {
            node.driver = node.driver.restart();
        }
        let without = private.volume(&node);
        let status = node.kubelet.publish(&without).expect_err("no credentials");
        assert!(
            matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied),
            "{}",
            status.message()
        );
        let wrong = basic(private.volume(&node), USER, "wrong");
        let status = node.kubelet.publish(&wrong).expect_err("wrong credentials");
        assert!(
            matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied),
            "{}",
            status.message()
        );
        let digest = private.volume(&node).attribute("pullPolicy", "Never");
        let status = node.kubelet.publish(&digest).expect_err("Never proves nothing");
        assert!(is_final_refusal(status.code()), "{:?}: {}", status.code(), status.message());
    }
}

fn is_final_refusal(code: Code) -> bool {
    matches!(code, Code::Unauthenticated | Code::PermissionDenied | Code::NotFound)
}

#[test]
fn credentials_that_were_proven_open_cached_content_without_the_registry() {
    let node = Node::start();
    let private = PrivateRegistry::new();
    node.kubelet.publish_well(&basic(private.volume(&node), USER, PASSWORD));
    private.proxy.go_down();
    node.kubelet.publish_well(&basic(private.volume(&node), USER, PASSWORD));
    let status =
        node.kubelet.publish(&private.volume(&node)).expect_err("nothing proven, and no registry");
    assert!(
        matches!(status.code(), Code::Unavailable | Code::PermissionDenied | Code::Unauthenticated),
        "{:?}: {}",
        status.code(),
        status.message()
    );
}

#[test]
fn a_refused_caller_does_not_spoil_the_pull_of_another() {
    let node = Node::start();
    let private = PrivateRegistry::new();
    let allowed = basic(private.volume(&node), USER, PASSWORD);
    let refused = basic(private.volume(&node), USER, "wrong");
    for _ in 0..3 {
        std::thread::scope(|scope| {
            let bad = scope.spawn(|| node.kubelet.publish(&refused));
            let good = scope.spawn(|| node.kubelet.publish_well(&allowed));
            assert!(bad.join().expect("a call").is_err());
            good.join().expect("a call");
        });
    }
}

#[test]
fn no_password_is_written_anywhere() {
    let node = Node::start();
    let private = PrivateRegistry::new();
    node.kubelet.publish_well(&basic(private.volume(&node), USER, PASSWORD));
    let secret = docker_config(&private.proxy.host(), USER, PASSWORD);
    let always = private
        .volume(&node)
        .attribute("pullPolicy", "Always")
        .secret(".dockerconfigjson", &secret);
    let token = always.attribute("csi.storage.k8s.io/serviceAccount.tokens", "a-token-of-the-pod");
    node.kubelet.publish_well(&token);
    for text in [PASSWORD, &encoded(USER, PASSWORD), "a-token-of-the-pod"] {
        assert!(!node.driver.log().contains(text), "the log holds a secret");
        assert!(!node.store_holds(text.as_bytes()), "the state holds a secret");
    }
}

/// Starts a registry with the token flow: it names a realm, and the realm issues a token for credentials.
fn token_registry() -> (FakeRegistry, String) {
    let fake = FakeRegistry::new();
    Manifest::artifact([Layer::titled("file", "behind a token")]).push(&fake, "hostile", "v1");
    let realm = format!("http://{}/token", fake.host());
    fake.script(move |request| {
        if request.path == "/token" {
            let expected = format!("Basic {}", encoded(USER, PASSWORD));
            return Some(if request.header("authorization") == Some(&expected) {
                Answer::bytes(json!({"token": "the-token", "expires_in": 300}).to_string())
                    .with_header("content-type", "application/json")
            } else {
                Answer::error(401, "UNAUTHORIZED")
            });
        }
        if request.header("authorization") == Some("Bearer the-token") {
            return None;
        }
        let challenge =
            format!(r#"Bearer realm="{realm}",service="fake",scope="repository:hostile:pull""#);
        Some(Answer::error(401, "UNAUTHORIZED").with_header("www-authenticate", &challenge))
    });
    let reference = fake.reference("v1");
    (fake, reference)
}

#[test]
fn the_token_flow_works_and_its_refusal_is_unauthenticated() {
    let node = Node::start();
    let (fake, reference) = token_registry();
    node.kubelet.publish_well(&basic(node.kubelet.new_volume(&reference), USER, PASSWORD));
    let wrong =
        basic(node.kubelet.new_volume(&reference), USER, "wrong").attribute("pullPolicy", "Always");
    node.kubelet.publish_badly(&wrong, Code::Unauthenticated);
    assert!(
        fake.requests()
            .iter()
            .any(|request| request.path == "/token" && request.query.contains("pull"))
    );
}

#[test]
fn credentials_do_not_follow_a_redirect_to_another_host() {
    let node = Node::start();
    let storage = FakeRegistry::new();
    let content = b"kept elsewhere".to_vec();
    let fake = FakeRegistry::new();
    Manifest::artifact([Layer::titled("file", content.clone())]).push(&fake, "hostile", "v1");
    storage.put_blob(content.clone());
    let elsewhere = format!(
        "http://localhost:{}/v2/x/blobs/{}",
        storage.host().rsplit(':').next().expect("a port"),
        digest(&content)
    );
    let path = format!("/blobs/{}", digest(&content));
    fake.script(move |request| {
        if request.header("authorization").is_none() {
            return Some(
                Answer::error(401, "UNAUTHORIZED")
                    .with_header("www-authenticate", r#"Basic realm="fake""#),
            );
        }
        request
            .path
            .ends_with(&path)
            .then(|| Answer::status(307).with_header("location", &elsewhere))
    });
    node.kubelet.publish_well(&basic(
        node.kubelet.new_volume(&fake.reference("v1")),
        USER,
        PASSWORD,
    ));
    let requests = storage.requests();
    assert!(!requests.is_empty());
    assert!(
        requests.iter().all(|request| request.header("authorization").is_none()),
        "{requests:?}"
    );
}
