//! Tests signatures by a real cosign, in both its formats, and invalid ones.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use serde_json::json;
use tonic::Code;

use crate::support::{
    Admin, Answer, AnswerBody, Contents as _, Cosign, FakeRegistry, Format, Gate, Image, Layer,
    Manifest, Node, OCI_INDEX, OCI_MANIFEST, Port, SmallArtifact, Tar, Tree, configuration_head,
    digest, node_architecture, push_index, registry, run, small_artifact, tool, unique, wait_until,
};

/// Starts a node that demands this key's signature.
fn node_with(key: (&str, &Cosign), rest: &str) -> Node {
    Node::start_configured(|_| {}, &policy_with(key, rest))
}

fn policy_with((name, signer): (&str, &Cosign), rest: &str) -> String {
    format!(
        "policy:\n  keys:\n  - {{name: {name}, file: \"{}\"}}\n\
         \x20 rules:\n  - signatures: {{keys: [{name}]{rest}}}\n",
        signer.public_key().display()
    )
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/var/tmp").expect("a folder")
}

#[test]
fn every_kind_of_key_counts_in_both_formats() {
    let folder = folder();
    let signers: Vec<_> = crate::support::COSIGN_KEY_KINDS
        .iter()
        .enumerate()
        .map(|(number, kind)| Cosign::with_key(folder.path(), &format!("key{number}"), kind))
        .collect();
    for signer in &signers {
        let node = node_with(("release", signer), "");
        for format in [Format::Legacy, Format::Bundle] {
            let artifact = small_artifact();
            signer.sign(format, registry(), &artifact.repository, &artifact.digest);
            let (volume, _) = node.mount(&node.proxy.reference(&artifact.name));
            assert_eq!(volume.text("file.txt"), artifact.content);
            node.kubelet.unpublish(&volume);
        }
    }
}

#[test]
fn what_is_not_signed_as_demanded_is_refused_before_anything_is_fetched() {
    let folder = folder();
    let (signer, stranger) =
        (Cosign::new(folder.path(), "release"), Cosign::new(folder.path(), "stranger"));
    let node = node_with(("release", &signer), "");
    let refused = |name: &str, named: &str| {
        let volume = node.kubelet.new_volume(&node.proxy.reference(name));
        let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
        assert!(message.contains(named) && message.contains("release"), "{message}");
    };
    let unsigned = small_artifact();
    refused(&unsigned.name, "it is not signed, and");
    for format in [Format::Legacy, Format::Bundle] {
        let strange = small_artifact();
        stranger.sign(format, registry(), &strange.repository, &strange.digest);
        refused(&strange.name, "by none of the demanded keys");
    }
    // A signature of another artifact in place of this one's.
    let (whole, other) = (small_artifact(), small_artifact());
    signer.sign(Format::Legacy, registry(), &whole.repository, &whole.digest);
    let tag = |digest: &str| format!("{}.sig", digest.replace(':', "-"));
    let fetch = |path: String| {
        let url = format!("http://{}/v2/{}/{path}", registry().host(), whole.repository);
        let accept = "accept: application/vnd.oci.image.manifest.v1+json";
        crate::support::run(crate::support::tool("curl").args(["-sf", "-H", accept, &url]))
    };
    let manifest = fetch(format!("manifests/{}", tag(&whole.digest)));
    let parsed: serde_json::Value = serde_json::from_str(&manifest).expect("a manifest");
    let digest_of =
        |value: &serde_json::Value| value["digest"].as_str().expect("a digest").to_owned();
    let put = |bytes: &[u8]| registry().put_blob(&other.repository, bytes);
    put(fetch(format!("blobs/{}", digest_of(&parsed["config"]))).as_bytes());
    let payload = fetch(format!("blobs/{}", digest_of(&parsed["layers"][0])));
    put(payload.as_bytes());
    let put_manifest = |value: &serde_json::Value| {
        crate::support::put_json(registry(), &other.repository, &tag(&other.digest), value);
    };
    put_manifest(&parsed);
    refused(&other.name, "for another digest");
    // The same with a fitting payload under the old signature.
    let swapped = payload.replace(&whole.digest, &other.digest);
    put(swapped.as_bytes());
    let mut forged = parsed.clone();
    forged["layers"][0]["digest"] = json!(digest(swapped.as_bytes()));
    forged["layers"][0]["size"] = json!(swapped.len());
    put_manifest(&forged);
    refused(&other.name, "by none of the demanded keys");
    // In no format at all.
    forged["layers"][0]["annotations"] = json!({"dev.cosignproject.cosign/signature": "*"});
    put_manifest(&forged);
    refused(&other.name, "format");
    let contents = [&unsigned.content, &other.content, &whole.content];
    assert!(contents.iter().all(|content| !node.store_holds(content.as_bytes())));
}

#[test]
fn the_manifest_of_a_refused_artifact_is_counted_and_evicted() {
    let folder = folder();
    let signer = Cosign::new(folder.path(), "release");
    let (node, admin) = Admin::start(&policy_with(("release", &signer), ""));
    let cache_bytes = || admin.json(&["status"])["cacheBytes"].as_u64().expect("a number");
    let before = cache_bytes();
    let unsigned = small_artifact();
    let volume = node.kubelet.new_volume(&node.proxy.reference(&unsigned.name));
    node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
    let hex = unsigned.digest.strip_prefix("sha256:").expect("a digest");
    let manifest = node.driver.state().join("blobs").join(hex);
    assert!(manifest.exists());
    let takes = fs::metadata(&manifest).expect("metadata").blocks() * 512;
    assert!(cache_bytes() >= before + takes);
    admin.text(&["gc", "--target", "0"]);
    assert!(!manifest.exists());
    assert_eq!(cache_bytes(), before);
}

#[test]
fn an_index_or_its_manifest_may_be_signed() {
    let folder = folder();
    let signer = Cosign::new(folder.path(), "release");
    let node = node_with(("release", &signer), "");
    for sign_index in [true, false] {
        let repository = unique("multi");
        let image = |text: &str| Image::new().layer(Tar::new().file("a", 0o644, text).finish());
        let own = image(&repository).platform("linux", node_architecture());
        let manifest = own.push(registry(), &repository, "own");
        let entry = json!({
            "mediaType": OCI_MANIFEST,
            "digest": manifest,
            "size": own.manifest().json().to_string().len(),
            "platform": {"os": "linux", "architecture": node_architecture()},
        });
        let index = push_index(registry(), &repository, "v1", std::slice::from_ref(&entry));
        let subject = if sign_index { &index } else { &manifest };
        signer.sign(Format::Bundle, registry(), &repository, subject);
        let reference = |name: &str| node.proxy.reference(&format!("{repository}{name}"));
        let (volume, _) = node.mount(&reference(":v1"));
        node.kubelet.unpublish(&volume);
        // The signature of an index is none of its manifests, which another index may give to another platform.
        push_index(registry(), &repository, "other", &[entry.clone(), entry]);
        for name in [":other", &format!("@{manifest}")] {
            if sign_index {
                let volume = node.kubelet.new_volume(&reference(name));
                node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
            } else {
                let (volume, _) = node.mount(&reference(name));
                node.kubelet.unpublish(&volume);
            }
        }
        node.proxy.go_down();
        let (volume, _) = node.mount(&reference(":v1"));
        node.kubelet.unpublish(&volume);
        node.proxy.come_back();
    }
}

/// Returns what curl downloads from the shared registry.
fn fetched(repository: &str, path: &str) -> String {
    let url = format!("http://{}/v2/{repository}/{path}", registry().host());
    let accept = format!("accept: {OCI_MANIFEST}, {OCI_INDEX}");
    run(tool("curl").args(["-sf", "-H", &accept, &url]))
}

/// Copies a manifest and its blobs, also under this tag.
fn copied(repository: &str, name: &str, tag: &str, to: &FakeRegistry) {
    let manifest = fetched(repository, &format!("manifests/{name}"));
    let parsed: serde_json::Value = serde_json::from_str(&manifest).expect("a manifest");
    let layers = parsed["layers"].as_array().expect("layers");
    for blob in layers.iter().chain([&parsed["config"]]) {
        let digest = blob["digest"].as_str().expect("a digest");
        to.put_blob(fetched(repository, &format!("blobs/{digest}")));
    }
    to.put_manifest(tag, OCI_MANIFEST, manifest);
}

#[test]
fn a_bundle_is_found_by_its_referrers_also_behind_a_mirror_that_knows_none_or_others() {
    let folder = folder();
    let signer = Cosign::new(folder.path(), "release");
    for (mirrored, mirror_knows_others, forgets_kinds) in
        [(false, false, false), (false, false, true), (true, false, false), (true, true, false)]
    {
        let artifact = small_artifact();
        signer.sign(Format::Bundle, registry(), &artifact.repository, &artifact.digest);
        let (hub, mirror) = (FakeRegistry::new(), FakeRegistry::new());
        copied(&artifact.repository, "v1", "v1", &hub);
        copied(&artifact.repository, "v1", "v1", &mirror);
        copy_referrers(&artifact, &hub, forgets_kinds);
        if mirror_knows_others {
            refer_to(&mirror, &artifact.digest);
        }
        let node = Node::start_with_hosts(&policy_with(("release", &signer), ""));
        if mirrored {
            node.hosts_toml(&hub.host(), &host_of(&mirror));
        }
        let (volume, _) = node.mount(&hub.reference("v1"));
        assert_eq!(volume.text("file.txt"), artifact.content);
        let asked: Vec<_> = hub.requests().into_iter().map(|request| request.path).collect();
        let tag = artifact.digest.replace(':', "-");
        assert!(!asked.iter().any(|path| path.ends_with(&tag)), "there was no need for a tag");
        let files = asked.iter().filter(|path| path.contains("/manifests/v1")).count();
        assert_eq!(files == 0, mirrored, "the mirror has the artifact: {asked:?}");
        node.kubelet.unpublish(&volume);
    }
}

/// Copies what refers to an artifact. The shared registry does not support referrers, so cosign has pushed them under a
/// tag.
fn copy_referrers(artifact: &SmallArtifact, to: &FakeRegistry, forgets_kinds: bool) {
    let tag = artifact.digest.replace(':', "-");
    let referrers = fetched(&artifact.repository, &format!("manifests/{tag}"));
    let mut referrers: serde_json::Value = serde_json::from_str(&referrers).expect("an index");
    for entry in referrers["manifests"].as_array_mut().expect("entries") {
        let digest = entry["digest"].as_str().expect("a digest").to_owned();
        copied(&artifact.repository, &digest, &digest, to);
        if forgets_kinds {
            entry["artifactType"] = json!("application/vnd.oci.empty.v1+json");
        }
    }
    serve_referrers(to, &artifact.digest, &referrers);
}

fn serve_referrers(registry: &FakeRegistry, subject: &str, index: &serde_json::Value) {
    let (path, index) = (format!("/v2/hostile/referrers/{subject}"), index.to_string());
    registry.script(move |request| {
        let index = Answer::bytes(index.clone()).with_header("content-type", OCI_INDEX);
        (request.path == path).then_some(index)
    });
}

/// Adds a referrer that is said to be a signature.
fn refer_to(registry: &FakeRegistry, subject: &str) {
    let kind = "application/vnd.dev.sigstore.bundle.v0.3+json";
    let other = Manifest::artifact([Layer::new(kind, "{}")]).push(registry, "hostile", "other");
    let entry =
        json!({"mediaType": OCI_MANIFEST, "digest": other, "size": 2, "artifactType": kind});
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]});
    serve_referrers(registry, subject, &index);
}

/// Returns the `hosts.toml` of a registry with this mirror.
fn host_of(mirror: &FakeRegistry) -> String {
    format!("[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n", mirror.host())
}

#[test]
fn a_mirror_with_the_signature_suffices_where_the_registry_is_down() {
    let folder = folder();
    let signer = Cosign::new(folder.path(), "release");
    let stranger = Cosign::new(folder.path(), "stranger");
    let (artifact, mirror, down) = (small_artifact(), FakeRegistry::new(), Port::new());
    stranger.sign(Format::Bundle, registry(), &artifact.repository, &artifact.digest);
    copied(&artifact.repository, "v1", "v1", &mirror);
    copy_referrers(&artifact, &mirror, false);
    let node = Node::start_with_hosts(&policy_with(("release", &signer), ""));
    let host = down.address().to_string();
    node.hosts_toml(&host, &host_of(&mirror));
    let volume = node.kubelet.new_volume(&format!("{host}/hostile:v1"));
    // The registry itself may have the signature.
    node.kubelet.publish_badly(&volume, Code::Unavailable);
    let trusting = policy_with(("release", &stranger), "");
    node.reconfigure(&format!(
        "registries:\n  hostsDir: \"{}/certs.d\"\n{trusting}",
        node.sandbox.path().display()
    ));
    node.kubelet.publish_well(&volume);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_verdict_is_kept_with_the_content_and_belongs_to_its_policy() {
    let folder = folder();
    let (first, second) =
        (Cosign::new(folder.path(), "first"), Cosign::new(folder.path(), "second"));
    let node = node_with(("release", &first), "");
    let artifact = small_artifact();
    first.sign(Format::Bundle, registry(), &artifact.repository, &artifact.digest);
    let reference = node.proxy.reference(&artifact.name);
    let (volume, _) = node.mount(&reference);
    // A warm cache needs no registry.
    node.proxy.go_down();
    let (again, _) = node.mount(&reference);
    node.kubelet.unpublish(&again);
    // Another key in the same file is another policy: verified again, while the registry is unreachable.
    fs::copy(second.public_key(), folder.path().join("swap")).expect("copied");
    fs::rename(folder.path().join("swap"), first.public_key()).expect("swapped");
    node.kubelet.publish_badly(&node.kubelet.new_volume(&reference), Code::Unavailable);
    node.proxy.come_back();
    node.kubelet.publish_badly(&node.kubelet.new_volume(&reference), Code::FailedPrecondition);
    second.sign(Format::Bundle, registry(), &artifact.repository, &artifact.digest);
    let (last, _) = node.mount(&reference);
    node.kubelet.unpublish(&last);
    node.kubelet.unpublish(&volume);
}

#[test]
fn warn_mounts_and_says_so_and_a_volume_can_demand_more() {
    let folder = folder();
    let signer = Cosign::new(folder.path(), "release");
    let lines = policy_with(("release", &signer), ", mode: Warn");
    let port = Port::new();
    let address = port.address();
    let node = Node::start_with(|sandbox, options| {
        let path = sandbox.path().join("config.yaml");
        fs::write(&path, format!("{}{lines}", configuration_head())).expect("the policy");
        options
            .argument(&format!("--config={}", path.display()))
            .argument(&format!("--metrics-endpoint={address}"))
    });
    let warnings = || {
        let url = format!("http://{address}/metrics");
        let metrics = run(tool("curl").args(["-sf", &url]));
        let line =
            metrics.lines().find(|line| line.starts_with("csi_oci_signature_warnings_total "));
        line.and_then(|line| line.rsplit(' ').next()).expect("the metric").to_owned()
    };
    assert_eq!(warnings(), "0");
    let artifact = small_artifact();
    let reference = node.proxy.reference(&artifact.name);
    let (volume, _) = node.mount(&reference);
    wait_until("it is warned of", || warnings() == "1");
    assert!(node.driver.log().contains("the policy only warns"));
    let demanding = node.kubelet.new_volume(&reference).attribute("requireSignature", "true");
    node.kubelet.publish_badly(&demanding, Code::FailedPrecondition);
    signer.sign(Format::Legacy, registry(), &artifact.repository, &artifact.digest);
    node.kubelet.publish_well(&demanding);
    assert_eq!(warnings(), "1", "a refusal and what is signed warn of nothing");
    node.kubelet.unpublish(&demanding);
    node.kubelet.unpublish(&volume);
}

#[test]
fn cached_content_waits_for_no_registry_where_a_policy_only_warns() {
    let folder = folder();
    let signer = Cosign::new(folder.path(), "release");
    let lines = policy_with(("release", &signer), ", mode: Warn");
    let node = Node::start_configured(|_| {}, &lines);
    let reference = node.proxy.reference(&small_artifact().name);
    let (first, tree) = node.mount(&reference);
    node.kubelet.unpublish(&first);
    // What it has looked for lately is forgotten.
    let driver = node.driver.restart();
    node.proxy.go_down();
    // Connections are accepted by the kernel, and nothing is answered.
    let hanging = std::net::TcpListener::bind(node.proxy.host()).expect("the registry's address");
    let kubelet = driver.kubelet();
    let second = kubelet.new_volume(&reference);
    // The driver waits 30 seconds for an answer.
    let published = kubelet.publish_within(&second, Duration::from_secs(20));
    published.expect("mounted without an answer");
    assert_eq!(Tree::of(second.target()), tree);
    hanging.set_nonblocking(true).expect("an option of a socket");
    wait_until("the signature is looked for in the background", || hanging.accept().is_ok());
    kubelet.unpublish(&second);
}

#[test]
fn a_search_for_signatures_goes_on_when_the_time_of_its_publish_is_over() {
    let folder = folder();
    let signer = Cosign::new(folder.path(), "release");
    let (artifact, hub, gate) = (small_artifact(), FakeRegistry::new(), Gate::new());
    signer.sign(Format::Legacy, registry(), &artifact.repository, &artifact.digest);
    copied(&artifact.repository, "v1", "v1", &hub);
    let tag = format!("{}.sig", artifact.digest.replace(':', "-"));
    copied(&artifact.repository, &tag, &tag, &hub);
    let bytes = Bytes::from(fetched(&artifact.repository, &format!("manifests/{tag}")));
    let (path, held) = (format!("/v2/hostile/manifests/{tag}"), Arc::clone(&gate));
    hub.script(move |request| {
        let body = AnswerBody::Gated { bytes: bytes.clone(), gate: Arc::clone(&held) };
        let answer = Answer::body(body).with_header("content-type", OCI_MANIFEST);
        (request.path == path).then_some(answer)
    });
    let node = node_with(("release", &signer), "");
    let volume = node.kubelet.new_volume(&hub.reference("v1"));
    for _ in 0..2 {
        let status = node.kubelet.publish_within(&volume, Duration::from_secs(6));
        assert_eq!(status.expect_err("it waits").code(), Code::Aborted);
        assert_eq!(gate.waiting(), 1, "the next try joins the search");
    }
    gate.open();
    node.kubelet.publish_well(&volume);
    assert_eq!(gate.waiting(), 1);
    node.kubelet.unpublish(&volume);
}

#[test]
fn what_was_warned_of_is_refused_once_the_policy_enforces() {
    let folder = folder();
    let signer = Cosign::new(folder.path(), "release");
    let policy = |mode| policy_with(("release", &signer), mode);
    let node = Node::start_configured(|_| {}, &policy(", mode: Warn"));
    let artifact = small_artifact();
    let reference = node.proxy.reference(&artifact.name);
    let pulled = node.mount(&reference).0;
    let cached = node.mount(&reference).0;
    node.reconfigure(&policy(""));
    node.kubelet.publish_badly(&node.kubelet.new_volume(&reference), Code::FailedPrecondition);
    signer.sign(Format::Bundle, registry(), &artifact.repository, &artifact.digest);
    let verified = node.mount(&reference).0;
    for volume in [pulled, cached, verified] {
        node.kubelet.unpublish(&volume);
    }
}

#[test]
fn require_signature_uses_the_nodes_keys_and_only_the_formats_that_count() {
    let folder = folder();
    let signer = Cosign::new(folder.path(), "release");
    let lines = format!(
        "policy:\n  keys: [{{name: release, file: \"{}\"}}]\n",
        signer.public_key().display()
    );
    let node = Node::start_configured(|_| {}, &lines);
    let artifact = small_artifact();
    let demanding = node
        .kubelet
        .new_volume(&node.proxy.reference(&artifact.name))
        .attribute("requireSignature", "true");
    node.kubelet.publish_badly(&demanding, Code::FailedPrecondition);
    signer.sign(Format::Bundle, registry(), &artifact.repository, &artifact.digest);
    node.kubelet.publish_well(&demanding);
    node.kubelet.unpublish(&demanding);
    let legacy_only = node_with(("release", &signer), ", format: Legacy");
    let volume = legacy_only.kubelet.new_volume(&legacy_only.proxy.reference(&artifact.name));
    legacy_only.kubelet.publish_badly(&volume, Code::FailedPrecondition);
}

#[test]
fn a_key_that_cannot_be_read_fails_closed() {
    let lines = "policy:\n  keys: [{name: release, file: \"{sandbox}/release.pub\"}]\n";
    let node = Node::start_configured(|_| {}, lines);
    let reference = node.proxy.reference(&small_artifact().name);
    let volume = node.kubelet.new_volume(&reference);
    let message = node.kubelet.publish_badly(&volume, Code::Unavailable);
    assert!(message.contains("release.pub"), "{message}");
    fs::write(node.sandbox.path().join("release.pub"), "no key").expect("written");
    let message = node.kubelet.publish_badly(&volume, Code::Unavailable);
    assert!(message.contains("\"release\""), "{message}");
    let signer = Cosign::new(&node.sandbox.folder("keys"), "release");
    fs::copy(signer.public_key(), node.sandbox.path().join("release.pub")).expect("copied");
    node.kubelet.publish_well(&volume);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_registry_with_endless_signatures_is_not_listened_to_for_ever() {
    let folder = folder();
    let signer = Cosign::new(folder.path(), "release");
    let node = node_with(("release", &signer), ", format: Legacy");
    let hostile = FakeRegistry::new();
    let manifest = Manifest::artifact([Layer::titled("file", "x")]);
    let artifact = manifest.push(&hostile, "hostile", "v1");
    let payload = hostile.put_blob(&b"{}"[..]);
    let layer = json!({"mediaType": "application/vnd.dev.cosign.simplesigning.v1+json",
        "digest": payload, "size": 2, "annotations": {"dev.cosignproject.cosign/signature": "AAAA"}});
    let tag = format!("{}.sig", artifact.replace(':', "-"));
    let config = hostile.put_blob(&b"{}"[..]);
    hostile.put_json(&tag, &json!({"schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": 2},
        "layers": vec![layer; 500]}));
    let volume = node.kubelet.new_volume(&hostile.reference("v1"));
    let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
    assert!(message.contains("more than 256"), "{message}");
    let fetched = hostile.requests().iter().filter(|seen| seen.path.contains("/blobs/")).count();
    assert_eq!(fetched, 256, "signatures were fetched");
}

#[test]
fn no_more_than_a_few_large_signatures_are_read_one_after_another() {
    const MEDIA_TYPE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
    let folder = folder();
    let signer = Cosign::new(folder.path(), "release");
    let node = node_with(("release", &signer), ", format: Bundle");
    let hostile = FakeRegistry::new();
    let artifact = Manifest::artifact([Layer::titled("file", "x")]).push(&hostile, "hostile", "v1");
    let config = hostile.put_blob(&b"{}"[..]);
    let referrers: Vec<_> = (0..20_u32)
        .map(|number| {
            let bundle = format!("{number:02}").repeat(2 << 20);
            let layer = json!({"mediaType": MEDIA_TYPE, "digest": hostile.put_blob(bundle.clone()),
                "size": bundle.len()});
            let manifest = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": MEDIA_TYPE,
                "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": config, "size": 2},
                "layers": [layer]});
            let digest = hostile.put_json(&format!("signature-{number}"), &manifest);
            json!({"mediaType": OCI_MANIFEST, "digest": digest, "size": manifest.to_string().len(),
                "artifactType": MEDIA_TYPE})
        })
        .collect();
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": referrers});
    hostile.put_json(&artifact.replace(':', "-"), &index);
    let volume = node.kubelet.new_volume(&hostile.reference("v1"));
    let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
    assert!(message.contains("more than 67108864 bytes"), "{message}");
    let fetched = hostile.requests().iter().filter(|seen| seen.path.contains("/blobs/")).count();
    assert_eq!(fetched, 16, "64 MiB of signatures are read");
}
