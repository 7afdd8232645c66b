//! Tests mirrors by containerd's `hosts.toml`: which hosts are asked, in which order, with which requests.

use std::fs;

use axum::body::Bytes;
use tonic::Code;

use crate::support::{
    Answer, AnswerBody, FakeRegistry, ForwardProxy, Layer, Manifest, Nginx, Node, Proxy, Registry,
    RegistryKind, Volume, digest, noise, private_registry, registry, small_artifact, unique,
};

/// Configures a mirror of a registry that is unreachable.
fn only_mirror(node: &Node, mirror: &str) -> &'static str {
    let text = format!("server = \"{mirror}\"\n");
    node.hosts_toml("registry.invalid", &text);
    "registry.invalid"
}

fn host(address: &str, capabilities: &str) -> String {
    format!("[host.\"{address}\"]\ncapabilities = {capabilities}\n")
}

const ALL: &str = "[\"pull\", \"resolve\"]";

#[test]
fn a_mirror_that_fails_in_any_way_is_passed_over() {
    let node = Node::start_with_hosts("");
    let folder = node.sandbox.path();
    for answer in [
        "return 404;",
        "return 500;",
        "return 503;",
        "return 429;",
        "return 401;",
        "return 403;",
        "return 400;",
        // The connection is closed without a response.
        "return 444;",
        "return 200 'not what was asked for';",
        "return 302 http://169.254.169.254/latest;",
        "return 301 https://127.0.0.2:1/;",
    ] {
        let mirror = Nginx::start(folder, answer);
        let artifact = small_artifact();
        let by_digest =
            format!("{}/{}@{}", node.proxy.host(), artifact.repository, artifact.digest);
        node.hosts_toml(&node.proxy.host(), &host(&mirror.url(), ALL));
        let (volume, _) = node.mount(&by_digest);
        assert_eq!(volume.text("file.txt"), artifact.content, "{answer}");
        node.kubelet.unpublish(&volume);
    }
    // No process listens there.
    let artifact = small_artifact();
    node.hosts_toml(&node.proxy.host(), &host("http://127.0.0.1:1", ALL));
    let (volume, _) = node.mount(&node.proxy.reference(&artifact.name));
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_mirror_serves_the_content_and_the_registry_only_authorizes_it() {
    let node = Node::start_with_hosts("");
    let artifact = small_artifact();
    let upstream = format!("http://{}", registry().host());
    let mirror =
        Registry::start(&RegistryKind { mirror_of: Some(&upstream), ..RegistryKind::default() });
    node.hosts_toml(&node.proxy.host(), &host(&format!("http://{}", mirror.host()), ALL));
    let (volume, _) = node.mount(&node.proxy.reference(&artifact.name));
    assert_eq!(volume.text("file.txt"), artifact.content);
    let asked: Vec<_> = node.proxy.take_requests().into_iter().map(|one| one.path).collect();
    let manifest = format!("/v2/{}/manifests/{}", artifact.repository, artifact.digest);
    assert_eq!(asked, [manifest], "the registry behind the mirror was asked for more");
    node.mount(&node.proxy.reference(&artifact.name));
    assert_eq!(node.proxy.requests(), [], "proven once, nothing is asked again");
    node.kubelet.unpublish(&volume);
}

/// A registry that requires a password, and a mirror that serves its content to every client, like Spegel.
struct OpenMirror {
    mirror: FakeRegistry,
    proxy: Proxy,
    name: String,
    _private: Registry,
}

const USER: &str = "owner";
const PASSWORD: &str = "password-of-the-owner";

impl OpenMirror {
    fn new() -> Self {
        let private = private_registry(USER, PASSWORD);
        let (mirror, repository) = (FakeRegistry::new(), unique("private"));
        let layer = Layer::titled("secret", format!("of {repository}"));
        let manifest = Manifest::artifact([layer]);
        manifest.push(&private.as_user(USER, PASSWORD), &repository, "v1");
        manifest.push(&mirror, &repository, "v1");
        let proxy = Proxy::new(&private);
        Self { mirror, proxy, name: format!("{repository}:v1"), _private: private }
    }

    fn configure(&self, node: &Node) {
        let address = format!("http://{}", self.mirror.host());
        node.hosts_toml(&self.proxy.host(), &host(&address, ALL));
    }

    fn volume(&self, node: &Node, password: Option<&str>) -> Volume {
        let volume = node.kubelet.new_volume(&self.proxy.reference(&self.name));
        match password {
            // An account of its own, which proves nothing for another's password.
            Some(password) => volume
                .secret("username", USER)
                .secret("password", password)
                .attribute("csi.storage.k8s.io/serviceAccount.name", password),
            None => volume,
        }
    }
}

#[test]
fn a_mirror_that_asks_for_no_credential_opens_nothing_that_the_registry_refuses() {
    let node = Node::start_with_hosts("");
    let open = OpenMirror::new();
    open.configure(&node);
    let refused = |code| {
        for password in [None, Some("wrong")] {
            for policy in ["IfNotPresent", "Always"] {
                let volume = open.volume(&node, password).attribute("pullPolicy", policy);
                node.kubelet.publish_badly(&volume, code);
            }
        }
    };
    refused(Code::Unauthenticated);
    let owner = open.volume(&node, Some(PASSWORD));
    node.kubelet.publish_well(&owner);
    assert_eq!(open.proxy.fetches("/blobs/"), 0, "the mirror is good enough for content");
    refused(Code::Unauthenticated);
    // Proven access remains while no host can be asked, and nothing else does.
    open.proxy.go_down();
    node.kubelet.publish_well(&open.volume(&node, Some(PASSWORD)));
    refused(Code::Unavailable);
    node.kubelet.unpublish(&owner);
}

/// Only the repository's owner used the registry before it went down.
#[test]
fn a_private_repository_is_known_as_private_while_its_registry_is_down() {
    let node = Node::start_with_hosts("");
    let open = OpenMirror::new();
    open.configure(&node);
    let owner = open.volume(&node, Some(PASSWORD));
    node.kubelet.publish_well(&owner);
    open.proxy.go_down();
    for password in [None, Some("wrong")] {
        node.kubelet.publish_badly(&open.volume(&node, password), Code::Unavailable);
    }
    node.kubelet.unpublish(&owner);
}

#[test]
fn what_a_mirror_has_proven_is_forgotten_with_the_mirror() {
    let node = Node::start_with_hosts("");
    let mirror = FakeRegistry::new();
    Manifest::artifact([Layer::titled("file", "of a mirror")]).push(&mirror, "any", "v1");
    let (name, reference) = ("registry.invalid", "registry.invalid/team/any:v1");
    let configure = || node.hosts_toml(name, &host(&format!("http://{}", mirror.host()), ALL));
    configure();
    // The registry itself is unreachable: the mirror's response counts.
    let (first, _) = node.mount(reference);
    let before = mirror.requests().len();
    let (second, _) = node.mount(reference);
    assert_eq!(mirror.requests().len(), before, "proven once, nothing is asked again");
    let folder = configure();
    fs::remove_file(folder.join("hosts.toml")).expect("no mirror any more");
    let never = node.kubelet.new_volume(reference).attribute("pullPolicy", "Never");
    node.kubelet.publish_badly(&never, Code::NotFound);
    node.kubelet.publish_badly(&node.kubelet.new_volume(reference), Code::Unavailable);
    // When it is back it has to confirm access again.
    configure();
    mirror.script(|_| Some(Answer::status(503)));
    node.kubelet.publish_badly(&never, Code::NotFound);
    mirror.script(|_| None);
    let (third, _) = node.mount(reference);
    for volume in [first, second, third] {
        node.kubelet.unpublish(&volume);
    }
}

#[test]
fn what_the_registry_itself_has_proven_is_lost_by_no_change_of_mirrors() {
    let node = Node::start_with_hosts("");
    let artifact = small_artifact();
    let reference = node.proxy.reference(&artifact.name);
    let upstream = format!("http://{}", registry().host());
    let mirror =
        Registry::start(&RegistryKind { mirror_of: Some(&upstream), ..RegistryKind::default() });
    let mut volumes = vec![node.mount(&reference).0];
    let mirrors = host(&format!("http://{}", mirror.host()), ALL);
    let folder = node.hosts_toml(&node.proxy.host(), &mirrors);
    volumes.push(node.mount_with(&reference, |one| one.attribute("pullPolicy", "Always")).0);
    fs::remove_file(folder.join("hosts.toml")).expect("no mirror any more");
    node.proxy.go_down();
    volumes.push(node.mount(&reference).0);
    for volume in &volumes {
        node.kubelet.unpublish(volume);
    }
}

/// Proofs of a version that did not record the host of the proof.
#[test]
fn proofs_of_an_earlier_version_count_as_the_registrys_own() {
    let node = Node::start_with_hosts("");
    let artifact = small_artifact();
    let reference = node.proxy.reference(&artifact.name);
    let mirror = FakeRegistry::new();
    let mirrors = host(&format!("http://{}", mirror.host()), ALL);
    let (volume, _) = node.mount(&reference);
    for place in fs::read_dir(node.driver.state().join("access")).expect("proofs").flatten() {
        for proof in fs::read_dir(place.path()).expect("proofs").flatten() {
            fs::write(proof.path(), "{\"unix_seconds\":1700000000}").expect("an old proof");
        }
    }
    node.proxy.go_down();
    node.mount(&reference);
    let folder = node.hosts_toml(&node.proxy.host(), &mirrors);
    node.mount(&reference);
    fs::remove_file(folder.join("hosts.toml")).expect("no mirror any more");
    node.mount(&reference);
    assert_eq!(mirror.requests().len(), 0);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_mirror_in_the_servers_place_forbids_the_registry_itself() {
    let node = Node::start_with_hosts("");
    let artifact = small_artifact();
    let name = only_mirror(&node, &format!("http://{}", registry().host()));
    let (volume, _) = node.mount(&format!("{name}/{}", artifact.name));
    assert_eq!(volume.text("file.txt"), artifact.content);
    node.kubelet.unpublish(&volume);
}

#[test]
fn capabilities_order_and_default_folder_are_containerds() {
    let node = Node::start_with_hosts("");
    let (resolver, content) = (FakeRegistry::new(), FakeRegistry::new());
    let layer = Layer::titled("file", "by capability");
    let manifest = Manifest::artifact([layer]);
    manifest.push(&resolver, "any", "v1");
    manifest.push(&content, "any", "v1");
    let mirrors = host(&format!("http://{}", resolver.host()), "[\"resolve\"]")
        + &host(&format!("http://{}", content.host()), "[\"pull\"]");
    let folder = node.sandbox.folder("certs.d/_default");
    fs::write(folder.join("hosts.toml"), mirrors).expect("hosts.toml");
    let (volume, _) = node.mount("registry.invalid/team/any:v1");
    let asked = |registry: &FakeRegistry| -> Vec<String> {
        registry
            .requests()
            .into_iter()
            .map(|request| request.method + " " + &request.path)
            .collect()
    };
    assert_eq!(asked(&resolver), ["HEAD /v2/team/any/manifests/v1"]);
    let pulled = asked(&content);
    assert!(pulled[0].starts_with("GET /v2/team/any/manifests/sha256:"), "{pulled:?}");
    assert!(pulled.iter().all(|request| !request.ends_with("/v1")), "{pulled:?}");
    node.kubelet.unpublish(&volume);
}

#[test]
fn capabilities_of_other_clients_are_ignored() {
    let node = Node::start_with_hosts("");
    let mirror = FakeRegistry::new();
    Manifest::artifact([Layer::titled("file", "x")]).push(&mirror, "any", "v1");
    let all = "[\"pull\", \"resolve\", \"referrers\", \"dance\"]";
    node.hosts_toml("registry.invalid", &host(&format!("http://{}", mirror.host()), all));
    let (volume, _) = node.mount("registry.invalid/team/any:v1");
    node.kubelet.unpublish(&volume);
}

/// Spegel: plain HTTP on the node, `?ns=` with every request, tags and digests, no credentials.
#[test]
fn spegel_is_asked_as_it_wants_to_be_asked() {
    let node = Node::start_with_hosts("");
    let spegel = FakeRegistry::new();
    let manifest = Manifest::artifact([Layer::titled("file", "from a peer")]);
    manifest.push(&spegel, "any", "v1");
    node.hosts_toml(
        "registry.invalid",
        &format!("{}dial_timeout = \"200ms\"\n", host(&format!("http://{}", spegel.host()), ALL)),
    );
    let volume = node.kubelet.new_volume("registry.invalid/team/any:v1");
    let volume = volume.secret("username", "someone").secret("password", "for upstream alone");
    node.kubelet.publish_well(&volume);
    let requests = spegel.requests();
    assert!(requests.len() >= 2);
    for request in requests {
        assert_eq!(request.query, "ns=registry.invalid", "{} {}", request.method, request.path);
        assert_eq!(request.header("authorization"), None, "a credential went to a mirror");
        assert!(matches!(request.method.as_str(), "GET" | "HEAD"));
    }
    node.kubelet.unpublish(&volume);
}

/// Dragonfly: its header names the registry, and the registry's credentials pass through.
#[test]
fn dragonfly_is_asked_as_it_wants_to_be_asked() {
    let dragonfly = FakeRegistry::new();
    let address = format!("http://{}", dragonfly.host());
    let node = Node::start_with_hosts(&format!("  mirrorsWithCredentials: [\"{address}\"]\n"));
    Manifest::artifact([Layer::titled("file", "from peers")]).push(&dragonfly, "any", "v1");
    dragonfly.script(|request| {
        let known = request.header("authorization").is_some();
        (!known).then(|| Answer::status(401).with_header("www-authenticate", "Basic realm=\"x\""))
    });
    let header = format!(
        "{}[host.\"{address}\".header]\nX-Dragonfly-Registry = [\"https://registry.invalid\"]\n",
        host(&address, ALL)
    );
    node.hosts_toml("registry.invalid", &header);
    let volume = node.kubelet.new_volume("registry.invalid/team/any:v1");
    let volume = volume.secret("username", "someone").secret("password", "passed through");
    node.kubelet.publish_well(&volume);
    for request in dragonfly.requests() {
        assert_eq!(request.header("x-dragonfly-registry"), Some("https://registry.invalid"));
        assert_eq!(request.query, "ns=registry.invalid");
    }
    node.kubelet.unpublish(&volume);
}

#[test]
fn an_override_of_the_path_is_obeyed() {
    let node = Node::start_with_hosts("");
    let mirror = FakeRegistry::new();
    Manifest::artifact([Layer::titled("file", "x")]).push(&mirror, "any", "v1");
    let address = format!("http://{}/api/oci", mirror.host());
    node.hosts_toml("registry.invalid", &format!("server = \"{address}\"\noverride_path = true\n"));
    let (volume, _) = node.mount("registry.invalid/team/any:v1");
    assert!(mirror.requests().iter().all(|request| request.path.starts_with("/api/oci/team/any/")));
    node.kubelet.unpublish(&volume);
}

#[test]
fn hosts_toml_is_read_again_when_it_changes() {
    let node = Node::start_with_hosts("");
    let artifact = small_artifact();
    let reference = format!("registry.invalid/{}", artifact.name);
    let volume = node.kubelet.new_volume(&reference);
    node.kubelet.publish_badly(&volume, Code::Unavailable);
    only_mirror(&node, &format!("http://{}", registry().host()));
    node.kubelet.publish_well(&volume);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_broken_hosts_toml_is_named_and_stops_its_registry_alone() {
    let node = Node::start_with_hosts("");
    let artifact = small_artifact();
    for (text, named) in [
        (host("http://mirror:5000", "[\"pull\", 5]"), "capabilities"),
        ("server = ".to_owned(), "line 1"),
        ("ca = \"missing.pem\"\n".to_owned(), "missing.pem"),
    ] {
        node.hosts_toml(&node.proxy.host(), &text);
        let volume = node.kubelet.new_volume(&node.proxy.reference(&artifact.name));
        let message = node.kubelet.publish_badly(&volume, Code::Unavailable);
        assert!(message.contains("hosts.toml") || message.contains("pem"), "{message}");
        assert!(message.contains(named), "{message}");
    }
    let other = format!("{}/{}", registry().host(), artifact.name);
    let (volume, _) = node.mount(&other);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_mirrors_wrong_bytes_are_never_shown() {
    let node = Node::start_with_hosts("");
    let repository = unique("mirrored");
    let content = b"the right content";
    Manifest::artifact([Layer::titled("file", content)]).push(registry(), &repository, "v1");
    let liar = FakeRegistry::new();
    liar.put_lying_blob(&digest(content), &b"the wrong content"[..]);
    node.hosts_toml(&node.proxy.host(), &host(&format!("http://{}", liar.host()), ALL));
    let (volume, _) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    assert_eq!(volume.text("file"), "the right content");
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_mirror_that_breaks_off_is_passed_by() {
    type Body = fn(Bytes) -> AnswerBody;
    let node = Node::start_with_hosts("");
    let ways: [Body; 2] = [
        |content| AnswerBody::Broken { announced: 3_000_000, bytes: content.slice(..10) },
        // It ends as if that were all.
        |content| AnswerBody::Unannounced(content.slice(..2_000_000)),
    ];
    for (way, seed) in ways.into_iter().zip(5..) {
        let (repository, content) = (unique("mirrored"), noise(3_000_000, seed));
        let manifest = Manifest::artifact([Layer::titled("file", content.clone())]);
        manifest.push(registry(), &repository, "v1");
        let mirror = FakeRegistry::new();
        manifest.push(&mirror, &repository, "v1");
        let (blob, body) = (digest(&content), way(content.clone().into()));
        let suffix = blob.clone();
        mirror.script(move |request| {
            request.path.ends_with(&suffix).then(|| Answer::body(body.clone()))
        });
        node.hosts_toml(&node.proxy.host(), &host(&format!("http://{}", mirror.host()), ALL));
        let (volume, _) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
        assert!(fs::read(volume.target().join("file")).expect("the file") == content);
        let requests = mirror.requests();
        let asked = requests.iter().filter(|request| request.path.ends_with(&blob)).count();
        assert_eq!(asked, 1, "it was asked again");
        node.kubelet.unpublish(&volume);
    }
}

/// Both have the same part of it, and do not support requests for the rest.
#[test]
fn mirrors_with_a_part_of_a_blob_do_not_keep_pulls_from_the_registry() {
    let node = Node::start_with_hosts("");
    let (repository, content) = (unique("mirrored"), noise(3_000_000, 9));
    let manifest = Manifest::artifact([Layer::titled("file", content.clone())]);
    manifest.push(registry(), &repository, "v1");
    let mirrors = [FakeRegistry::new(), FakeRegistry::new()];
    let blob = digest(&content);
    for mirror in &mirrors {
        let part = Bytes::from(content.clone()).slice(..2_000_000);
        let suffix = blob.clone();
        mirror.script(move |request| {
            let body = AnswerBody::Unannounced(part.clone());
            request.path.ends_with(&suffix).then(|| Answer::body(body))
        });
    }
    let addresses =
        mirrors.each_ref().map(|mirror| host(&format!("http://{}", mirror.host()), ALL));
    node.hosts_toml(&node.proxy.host(), &addresses.concat());
    let (volume, _) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    assert!(fs::read(volume.target().join("file")).expect("the file") == content);
    for mirror in &mirrors {
        let requests = mirror.requests();
        let asked = requests.iter().filter(|request| request.path.ends_with(&blob)).count();
        // The second one cannot send what follows: the request for that is followed by one for all.
        assert!((1..=2).contains(&asked), "{asked} requests");
    }
    node.kubelet.unpublish(&volume);
}

/// Bytes of a well-known blob from an author's own registry prove nothing about the mirrors of another.
#[test]
fn a_registry_that_lies_about_a_blob_keeps_no_other_from_its_mirrors() {
    let node = Node::start_with_hosts("");
    let repository = unique("mirrored");
    let content = b"public content";
    let manifest = Manifest::artifact([Layer::titled("file", content)]);
    manifest.push(registry(), &repository, "v1");
    let (mirror, liar) = (FakeRegistry::new(), FakeRegistry::new());
    manifest.push(&mirror, &repository, "v1");
    manifest.push(&liar, "hostile", "v1");
    liar.put_lying_blob(&digest(content), &b"something different"[..]);
    node.kubelet.publish_badly(&node.kubelet.new_volume(&liar.reference("v1")), Code::Internal);
    node.hosts_toml(&node.proxy.host(), &host(&format!("http://{}", mirror.host()), ALL));
    let (volume, _) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    assert_eq!(volume.text("file"), "public content");
    assert_eq!(node.proxy.fetches(&digest(content)), 0, "its mirror was passed by");
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_mirror_that_never_connects_is_given_up_after_its_dial_timeout() {
    let node = Node::start_with_hosts("");
    // Accepts connections and never sends a byte: a handshake without an end.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = silent.local_addr().expect("an address");
    let artifact = small_artifact();
    let mirror = host(&format!("https://{address}"), ALL);
    node.hosts_toml(&node.proxy.host(), &format!("{mirror}dial_timeout = \"200ms\"\n"));
    let started = std::time::Instant::now();
    let (volume, _) = node.mount(&node.proxy.reference(&artifact.name));
    // Each request tries the mirror first; without the key one alone would take ten seconds.
    let taken = started.elapsed();
    assert!(taken < std::time::Duration::from_secs(9), "it took {taken:?}");
    assert_eq!(volume.text("file.txt"), artifact.content);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_hosts_own_proxy_is_used_for_it_alone() {
    let node = Node::start_with_hosts("");
    let proxy = ForwardProxy::start([("behind.example:80", registry().address())]);
    let text = format!("server = \"http://behind.example\"\nproxy = \"{}\"\n", proxy.url());
    node.hosts_toml("behind.example", &text);
    let artifact = small_artifact();
    // Only the proxy knows this name.
    let (volume, _) = node.mount(&format!("behind.example/{}", artifact.name));
    assert_eq!(volume.text("file.txt"), artifact.content);
    node.kubelet.unpublish(&volume);
    let asked = proxy.asked();
    assert!(asked.iter().all(|asked| asked.ends_with(" behind.example:80")), "{asked:?}");
    let (volume, _) = node.mount(&node.proxy.reference(&small_artifact().name));
    node.kubelet.unpublish(&volume);
    assert_eq!(proxy.asked(), asked);
}
