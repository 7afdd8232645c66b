//! Tests responses of real registries, gateways and storage, beyond the specification's examples.

use std::fs;

use nix::mount::{MsFlags, mount};
use tonic::Code;

use crate::support::{
    Answer, AnswerBody, FakeRegistry, Layer, Manifest, Nginx, Node, Sandbox, Volume,
    configuration_head, gzip, registry, small_artifact,
};

/// Mounts an artifact of the shared registry through an nginx with this behaviour.
#[track_caller]
fn mounts_through(node: &Node, name: &str, answer: &str) {
    let answer = format!(
        "{answer} proxy_set_header Host $http_host; proxy_pass http://{};",
        registry().host()
    );
    let nginx = Nginx::start(&node.sandbox.folder(name), &answer);
    let artifact = small_artifact();
    for _ in 0..2 {
        let reference = format!("127.0.0.1:{}/{}", nginx.port(), artifact.name);
        let always = |volume: Volume| volume.attribute("pullPolicy", "Always");
        let (volume, _) = node.mount_with(&reference, always);
        assert_eq!(volume.text("file.txt"), artifact.content, "{name}");
        node.kubelet.unpublish(&volume);
    }
}

#[test]
fn a_content_encoding_over_bytes_that_are_right_changes_nothing() {
    let node = Node::start();
    for (name, value) in [
        ("gzip", "gzip"),
        ("x-gzip", "x-gzip"),
        ("aws", "aws-chunked"),
        ("both", "aws-chunked,gzip"),
    ] {
        mounts_through(&node, name, &format!("add_header Content-Encoding {value} always;"));
    }
    let fake = FakeRegistry::new();
    Manifest::artifact([Layer::titled("file", "x")]).push(&fake, "any", "v1");
    fake.script(|request| {
        let empty = |answer: Answer| answer.with_header("content-encoding", "");
        request.path.contains("/blobs/").then(|| empty(Answer::bytes("x")))
    });
    let (volume, _) = node.mount(&fake.reference("v1"));
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_blob_that_is_really_gzipped_on_the_way_names_its_encoding() {
    let node = Node::start();
    let fake = FakeRegistry::new();
    let content = "content ".repeat(1000);
    Manifest::artifact([Layer::titled("file", content.clone())]).push(&fake, "any", "v1");
    let encoded = gzip(content.as_bytes());
    for is_chunked in [false, true] {
        let encoded = encoded.clone();
        fake.script(move |request| {
            let body = if is_chunked {
                Answer::body(AnswerBody::Unannounced(encoded.clone().into()))
            } else {
                Answer::bytes(encoded.clone())
            };
            let is_blob = request.path.contains("/blobs/") && request.method == "GET";
            is_blob.then(|| body.with_header("content-encoding", "gzip"))
        });
        let volume = node.kubelet.new_volume(&fake.reference("v1"));
        let message = node.kubelet.publish_badly(&volume, Code::Internal);
        assert!(message.contains("Content-Encoding: gzip"), "{message}");
    }
}

#[test]
fn a_manifest_that_is_really_gzipped_is_decoded_and_a_bomb_is_not() {
    let node = Node::start_configured(|_| {}, "limits: {manifestBytes: 65536}\n");
    let fake = FakeRegistry::new();
    let artifact = Manifest::artifact([Layer::titled("file", "decoded")]);
    artifact.push(&fake, "any", "v1");
    let manifest = gzip(artifact.json().to_string().as_bytes());
    fake.script(move |request| {
        let is_manifest = request.path.contains("/manifests/") && request.method == "GET";
        is_manifest.then(|| {
            Answer::bytes(manifest.clone())
                .with_header("content-encoding", "gzip")
                .with_header("content-type", "application/vnd.oci.image.manifest.v1+json")
        })
    });
    let (volume, _) = node.mount(&fake.reference("v1"));
    assert_eq!(volume.text("file"), "decoded");
    node.kubelet.unpublish(&volume);
    let bomb = gzip(&vec![b' '; 64 << 20]);
    fake.script(move |request| {
        let bomb = Answer::bytes(bomb.clone()).with_header("content-encoding", "gzip");
        request.path.contains("/manifests/").then_some(bomb)
    });
    let volume = node.kubelet.new_volume(&fake.reference("v2"));
    let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
    assert!(message.contains("larger than the limit"), "{message}");
}

#[test]
fn a_registrys_policy_is_named_as_what_refuses() {
    let node = Node::start();
    for (status, what) in
        [(412, "/manifests/"), (451, "/manifests/"), (402, "/blobs/"), (423, "/blobs/")]
    {
        let fake = FakeRegistry::new();
        Manifest::artifact([Layer::titled("file", format!("{status}"))]).push(&fake, "any", "v1");
        fake.script(move |request| {
            request.path.contains(what).then(|| Answer::error(status, "PROJECTPOLICYVIOLATION"))
        });
        let volume = node.kubelet.new_volume(&fake.reference("v1"));
        let message = node.kubelet.publish_badly(&volume, Code::PermissionDenied);
        let named = format!("the registry's policy refuses it ({status})");
        assert!(message.contains(&named) && !message.contains("secret"), "{message}");
        assert!(!message.contains("said by the test"), "{message}");
    }
}

#[test]
fn a_head_that_is_refused_blames_no_credential() {
    let node = Node::start();
    for status in [403, 405] {
        mounts_through(
            &node,
            &format!("head-{status}"),
            &format!("if ($request_method = HEAD) {{ return {status}; }}"),
        );
    }
}

#[test]
fn a_401_without_a_challenge_is_explained_by_the_api() {
    let node = Node::start();
    let fake = FakeRegistry::new();
    Manifest::artifact([Layer::titled("file", "x")]).push(&fake, "any", "v1");
    let realm = format!("Bearer realm=\"http://{}/token\",service=\"s\"", fake.host());
    fake.script(move |request| match request.path.as_str() {
        "/token" => Some(Answer::bytes("{\"token\":\"t\"}")),
        "/v2/" => Some(Answer::status(401).with_header("www-authenticate", &realm)),
        _ if request.header("authorization") == Some("Bearer t") => None,
        _ => Some(Answer::status(401)),
    });
    let (volume, _) = node.mount(&fake.reference("v1"));
    node.kubelet.unpublish(&volume);
}

#[test]
fn an_unsupported_digest_algorithm_is_a_failed_precondition() {
    let node = Node::start();
    let hex = "ab".repeat(64);
    let md5 = "md5:d41d8cd98f00b204e9800998ecf8427e".to_owned();
    for digest in [format!("sha512:{hex}"), "blake3:00".to_owned(), md5] {
        let reference = format!("{}/team/app@{digest}", registry().host());
        let volume = node.kubelet.new_volume(&reference);
        let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
        assert!(message.contains("use the content's sha256 digest"), "{message}");
    }
    let fake = FakeRegistry::new();
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "size": 2,
                   "digest": format!("sha512:{hex}")},
        "layers": [{"mediaType": "application/octet-stream", "size": 2,
                    "digest": format!("sha512:{hex}")}],
    });
    fake.put_json("v1", &manifest);
    let volume = node.kubelet.new_volume(&fake.reference("v1"));
    let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
    assert!(message.contains("sha512"), "{message}");
}

#[test]
fn a_redirect_with_bytes_beyond_ascii_is_followed() {
    let node = Node::start();
    mounts_through(
        &node,
        "umlauts",
        "if ($request_uri ~ ^/v2/.*/blobs/) { return 307 /größe$request_uri?name=é; } \
         rewrite ^/größe(/.*)$ $1 break;",
    );
}

#[test]
fn an_ipv6_address_is_a_registry() {
    let node = Node::start();
    let folder = node.sandbox.folder("ipv6");
    let answer =
        format!("proxy_set_header Host $http_host; proxy_pass http://{};", registry().host());
    let nginx = Nginx::start_with_ipv6(&folder, &answer);
    let artifact = small_artifact();
    let (volume, _) = node.mount(&format!("[::1]:{}/{}", nginx.port(), artifact.name));
    assert_eq!(volume.text("file.txt"), artifact.content);
    node.kubelet.unpublish(&volume);
    for refused in ["[::1:5000/app:v1", "[fe80::1%eth0]:5000/app:v1"] {
        let volume = node.kubelet.new_volume(refused);
        node.kubelet.publish_badly(&volume, Code::InvalidArgument);
    }
}

#[test]
fn a_slip_in_a_reference_is_answered_with_the_reference_that_is_meant() {
    let node = Node::start();
    for (reference, meant) in [
        ("https://r.example/team/app:v1", "r.example/team/app:v1"),
        ("oci://r.example/Team/app:V1", "r.example/team/app:V1"),
        ("r.example/Team/app", "r.example/team/app"),
        ("http://[::1]:5000/app:v1", "[::1]:5000/app:v1"),
    ] {
        let volume = node.kubelet.new_volume(reference);
        let message = node.kubelet.publish_badly(&volume, Code::InvalidArgument);
        assert!(message.contains(&format!("write \"{meant}\"")), "{message}");
    }
}

/// Starts a node that resolves these names to itself, with the administrator's permission to use them.
fn node_with_names(names: &str, lines: &str) -> Node {
    Node::start_with(|sandbox: &Sandbox, options| {
        let (hosts, none) = (sandbox.path().join("hosts"), None::<&str>);
        fs::write(&hosts, format!("127.0.0.1 localhost {names}\n")).expect("the names");
        mount(Some(&hosts), "/etc/hosts", none, MsFlags::MS_BIND, none).expect("names of its own");
        let folder = sandbox.folder("certs.d").display().to_string();
        let text =
            format!("{}registries:\n  hostsDir: \"{folder}\"\n{lines}", configuration_head());
        let path = sandbox.path().join("config.yaml");
        fs::write(&path, text).expect("the configuration");
        options.argument(&format!("--config={}", path.display()))
    })
}

/// A registry without TLS that requires a token, and keeps its blobs on a storage without TLS.
struct PlainRegistry {
    registry: FakeRegistry,
    storage: FakeRegistry,
}

impl PlainRegistry {
    fn new(realm_host: &str) -> Self {
        let (registry, storage) = (FakeRegistry::new(), FakeRegistry::new());
        for fake in [&registry, &storage] {
            Manifest::artifact([Layer::titled("file", "plain")]).push(fake, "any", "v1");
        }
        let port = |fake: &FakeRegistry| {
            fake.host().rsplit(':').next().map(str::to_owned).unwrap_or_default()
        };
        let realm = format!("Bearer realm=\"http://{realm_host}:{}/token\"", port(&registry));
        let location = format!("http://storage.example:{}", port(&storage));
        registry.script(move |request| match request.header("authorization") {
            _ if request.path == "/token" => Some(Answer::bytes("{\"token\":\"t\"}")),
            Some("Bearer t") if request.path.contains("/blobs/") => {
                let location = format!("{location}{}", request.path);
                Some(Answer::status(307).with_header("location", &location))
            }
            Some("Bearer t") => None,
            _ => Some(Answer::status(401).with_header("www-authenticate", &realm)),
        });
        Self { registry, storage }
    }

    /// Returns its name with its port.
    fn host(&self, name: &str) -> String {
        self.registry.host().replace("127.0.0.1", name)
    }

    fn storage_host(&self) -> String {
        self.storage.host().replace("127.0.0.1", "storage.example")
    }

    fn reference(&self) -> String {
        format!("{}/hostile:v1", self.host("plain.example"))
    }
}

#[test]
fn plain_http_is_followed_where_the_administrator_says_so_and_nowhere_else() {
    let names = "plain.example storage.example elsewhere.example";
    let node = node_with_names(names, "");
    let plain = PlainRegistry::new("plain.example");
    let host = plain.host("plain.example");
    let with_secret =
        |volume: Volume| volume.secret("username", "robot").secret("password", "planted");
    node.hosts_toml(&host, &format!("server = \"http://{host}\"\n"));
    // The token server is on the registry's own host. The storage is not, and is not configured.
    let volume = with_secret(node.kubelet.new_volume(&plain.reference()));
    let message = node.kubelet.publish_badly(&volume, Code::Internal);
    assert!(message.contains("a redirect to an address without TLS"), "{message}");
    let tokens = |fake: &FakeRegistry| {
        let requests = fake.requests().into_iter();
        requests.filter(|request| request.path == "/token").collect::<Vec<_>>()
    };
    assert!(tokens(&plain.registry)[0].header("authorization").is_some());
    assert!(plain.storage.requests().is_empty());
    let storage = plain.storage_host();
    node.hosts_toml(&storage, &format!("server = \"https://{storage}\"\n"));
    node.kubelet.publish_badly(&volume, Code::Internal);
    node.hosts_toml(&storage, &format!("server = \"http://{storage}\"\n"));
    node.kubelet.publish_well(&volume);
    assert_eq!(volume.text("file"), "plain");
    node.kubelet.unpublish(&volume);
    let asked = plain.storage.requests();
    assert!(!asked.is_empty());
    assert!(asked.iter().all(|request| request.header("authorization").is_none()));
    // A token server without TLS on another host gets no request and no secret.
    let other = PlainRegistry::new("elsewhere.example");
    let host = other.host("plain.example");
    node.hosts_toml(&host, &format!("server = \"http://{host}\"\n"));
    let volume = with_secret(node.kubelet.new_volume(&other.reference()));
    let message = node.kubelet.publish_badly(&volume, Code::Internal);
    assert!(message.contains("the token server's address must be https"), "{message}");
    assert!(tokens(&other.registry).is_empty());
    // The storage named in the configuration file.
    let third = PlainRegistry::new("plain.example");
    let lines = format!("  plainHTTPRedirects: [\"http://{}\"]\n", third.storage_host());
    let node = node_with_names(names, &lines);
    let host = third.host("plain.example");
    node.hosts_toml(&host, &format!("server = \"http://{host}\"\n"));
    let (volume, _) = node.mount(&third.reference());
    node.kubelet.unpublish(&volume);
}
