//! Tests keyless signatures of real clients, which a private Sigstore instance has certified and logged.
//!
//! They were recorded, see `tests/sigstore/README.md`: nothing of the instance runs. `make test-sigstore` records anew
//! first, and names the folder in `SIGSTORE_RECORDED`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tonic::Code;

use crate::support::{
    Admin, Answer, Contents, FakeRegistry, Layer, Manifest, Node, OCI_INDEX, OCI_MANIFEST, Proxy,
    Sandbox, clean_environment, configuration_head, descriptor, digest, preload_cluster::Cluster,
    push_index, put_json, registry, small_artifact, tool, unique, wait_until,
};

const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
const PROVENANCE: &str = "https://slsa.dev/provenance/v1";
/// The content of the one file of the signed artifact.
const CONTENT: &str = "signed\n";

/// The artifact and what clients pushed beside it.
struct Recording(PathBuf);

impl Recording {
    fn new() -> Self {
        let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sigstore/recorded");
        Self(std::env::var_os("SIGSTORE_RECORDED").map_or(kept, PathBuf::from))
    }

    #[track_caller]
    fn text(&self, name: &str) -> String {
        let path = self.0.join(name);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    #[track_caller]
    fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.text(name)).expect("JSON")
    }

    /// Returns a policy that demands the identity of the recorded job.
    fn policy(&self) -> Value {
        let mut identity = self.json("identity.json");
        identity["name"] = json!("ci");
        json!({
            "trustRoots": [{"name": "private", "data": self.text("trusted_root.json")}],
            "identities": [identity],
            "rules": [{"signatures": {"identities": ["ci"]}}],
        })
    }

    /// Returns a policy that demands a provenance of that identity, and nothing else.
    fn provenance_policy(&self) -> Value {
        let demand = json!({"attestations": [{"predicateType": PROVENANCE, "identities": ["ci"]}]});
        changed(&self.policy(), "/rules/0/signatures", demand)
    }

    /// Pushes the artifact under the tag `v1`. Returns its digest.
    #[track_caller]
    fn push(&self, contents: &impl Contents, repository: &str) -> String {
        contents.put_blob(repository, CONTENT.as_bytes());
        contents.put_blob(repository, b"{}");
        let manifest = self.text("artifact.json");
        contents.put_manifest(repository, "v1", OCI_MANIFEST, manifest.as_bytes())
    }

    /// Pushes the artifact with what this client pushed, and an index of it where there are referrers.
    #[track_caller]
    fn push_signed(&self, contents: &impl Contents, repository: &str, client: &str) {
        let subject = self.push(contents, repository);
        for blob in ["config", "layer"] {
            contents.put_blob(repository, self.text(&format!("{client}/{blob}.json")).as_bytes());
        }
        let manifest = self.text(&format!("{client}/manifest.json"));
        let put =
            |tag: &str| contents.put_manifest(repository, tag, OCI_MANIFEST, manifest.as_bytes());
        let tag = subject.replace(':', "-");
        if client.starts_with("attached") {
            put(&format!("{tag}.sig"));
        } else {
            put(&digest(manifest.as_bytes()));
            let mut referrer = descriptor(OCI_MANIFEST, manifest.as_bytes());
            referrer["artifactType"] = json!(BUNDLE);
            push_index(contents, repository, &tag, &[referrer]);
        }
    }

    /// Pushes the artifact of a new repository with this client's signature. Returns repository and tag.
    #[track_caller]
    fn signed(&self, client: &str) -> String {
        let repository = unique("keyless");
        self.push_signed(registry(), &repository, client);
        format!("{repository}:v1")
    }
}

/// Pushes bytes as a bundle that refers to a digest.
#[track_caller]
fn push_bundle(repository: &str, subject: &str, bundle: &str) {
    let mut manifest = Manifest::artifact([Layer::new(BUNDLE, bundle)]);
    manifest.artifact_type = Some(BUNDLE.to_owned());
    let name = digest(manifest.json().to_string().as_bytes());
    manifest.push(registry(), repository, &name);
    let mut referrer = descriptor(OCI_MANIFEST, manifest.json().to_string().as_bytes());
    referrer["artifactType"] = json!(BUNDLE);
    push_index(registry(), repository, &subject.replace(':', "-"), &[referrer]);
}

/// Returns the value with another part; null removes it from an object.
#[track_caller]
fn changed(value: &Value, pointer: &str, part: Value) -> Value {
    let (mut value, (parent, name)) = (value.clone(), pointer.rsplit_once('/').expect("a pointer"));
    let parent = value.pointer_mut(parent).unwrap_or_else(|| panic!("{pointer}"));
    match parent {
        Value::Object(fields) if part.is_null() => drop(fields.remove(name)),
        Value::Object(fields) => drop(fields.insert(name.to_owned(), part)),
        Value::Array(list) => list[name.parse::<usize>().expect("a number")] = part,
        _ => panic!("{pointer}"),
    }
    value
}

/// Starts a node with a policy and an admin socket.
#[track_caller]
fn node_with(policy: &Value) -> (Node, Admin) {
    let mut endpoint = String::new();
    let node = Node::start_with(|sandbox, options| {
        endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
        let path = sandbox.path().join("config.yaml");
        fs::write(&path, format!("{}{}", configuration_head(), configuration(policy)))
            .expect("the configuration");
        options
            .argument(&format!("--config={}", path.display()))
            .argument(&format!("--admin-endpoint={endpoint}"))
    });
    (node, Admin::at(&endpoint))
}

/// Returns the section of a configuration file. JSON is YAML.
fn configuration(policy: &Value) -> String {
    format!("policy: {policy}\n")
}

fn set_policy(node: &Node, policy: &Value) {
    node.reconfigure(&configuration(policy));
}

#[track_caller]
fn mounts(node: &Node, reference: &str) {
    let (volume, _) = node.mount(reference);
    assert_eq!(volume.text("file.txt"), CONTENT);
    node.kubelet.unpublish(&volume);
}

#[track_caller]
fn refuses(node: &Node, reference: &str) -> String {
    let volume = node.kubelet.new_volume(reference);
    node.kubelet.publish_badly(&volume, Code::FailedPrecondition)
}

/// Runs `check` with the policy of a node.
fn check(node: &Node, reference: &str) -> Output {
    check_with(node, reference, &[])
}

fn check_with(node: &Node, reference: &str, arguments: &[&str]) -> Output {
    let mut check = tool(env!("CARGO_BIN_EXE_csi-driver-oci"));
    clean_environment(&mut check);
    let config = node.sandbox.path().join("config.yaml");
    check.args(["check", reference, "--output", "json", "--policy", "--config"]).arg(config);
    check.args(arguments);
    check.output().expect("the binary")
}

#[test]
fn signatures_of_every_client_count_and_say_who_signed() {
    let recording = Recording::new();
    let (signature, provenance) = (recording.policy(), recording.provenance_policy());
    let without_log = changed(&signature, "/trustRoots/0/transparencyLog", json!("None"));
    let (node, admin) = node_with(&signature);
    for (client, policy) in [
        ("cosign", &signature),
        ("python", &signature),
        ("attached-log", &signature),
        ("attached-timestamp", &without_log),
        ("cosign-attest", &provenance),
        ("python-attest", &provenance),
    ] {
        set_policy(&node, policy);
        let reference = node.proxy.reference(&recording.signed(client));
        mounts(&node, &reference);
        let report: Value = serde_json::from_slice(&check(&node, &reference).stdout).expect("JSON");
        let signer = &report["manifests"][0]["signatures"]["by"][0];
        let identity = recording.json("identity.json");
        assert_eq!(
            (&signer["issuer"], &signer["subject"]),
            (&identity["issuer"], &identity["subject"])
        );
        assert_eq!(signer["claims"]["sourceRepositoryRef"], "refs/heads/main", "{client}");
        let time = signer["signedAt"].as_str().expect("a time");
        assert_eq!(signer["logIndex"].is_null(), client == "attached-timestamp", "{client}");
        let inspected = admin.text(&["inspect", &reference]);
        let line = inspected.lines().find(|line| line.contains("signed by ci: "));
        let line = line.unwrap_or_else(|| panic!("{client}: {inspected}"));
        for part in [signer["subject"].as_str().expect("a subject"), time] {
            assert!(line.contains(part), "{client}: {line}");
        }
        assert_eq!(line.contains("log index"), client != "attached-timestamp", "{line}");
    }
}

#[test]
fn a_bundle_counts_also_where_the_registry_lists_referrers() {
    let recording = Recording::new();
    let (node, _) = node_with(&recording.policy());
    let registry = FakeRegistry::new();
    recording.push_signed(&registry, "hostile", "cosign");
    let subject = digest(recording.text("artifact.json").as_bytes());
    let tag = subject.replace(':', "-");
    let manifest = recording.text("cosign/manifest.json");
    let mut referrer = descriptor(OCI_MANIFEST, manifest.as_bytes());
    referrer["artifactType"] = json!(BUNDLE);
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [referrer]});
    registry.script(move |request| {
        let answer = Answer::bytes(index.to_string()).with_header("content-type", OCI_INDEX);
        request.path.ends_with(&format!("/referrers/{subject}")).then_some(answer)
    });
    mounts(&node, &registry.reference("v1"));
    let asked = registry.requests();
    assert!(!asked.iter().any(|request| request.path.ends_with(&tag)), "{asked:?}");
}

#[test]
fn another_identity_is_refused_with_what_was_demanded_and_found() {
    let recording = Recording::new();
    let policy = recording.policy();
    let [issuer, subject] =
        ["issuer", "subject"].map(|part| recording.json("identity.json")[part].clone());
    let other_subject = "https://github.com/team/app/.github/workflows/test.yml@refs/heads/main";
    let expression = |expression: &str| {
        let without = changed(&policy, "/identities/0/subject", Value::Null);
        changed(&without, "/identities/0/subjectRegExp", json!(expression))
    };
    let claim =
        |name: &str, value: &str| changed(&policy, "/identities/0/claims", json!({name: value}));
    let annotation =
        |value: &str| changed(&policy, "/rules/0/signatures/annotations", json!({"env": value}));
    let (node, _) = node_with(&policy);
    let reference = node.proxy.reference(&recording.signed("cosign"));
    for (policy, expected) in [
        (
            changed(&policy, "/identities/0/issuer", json!("https://issuer.example")),
            format!("the issuer must be \"https://issuer.example\", not be {issuer}"),
        ),
        (
            changed(&policy, "/identities/0/subject", json!(other_subject)),
            format!("the subject must be \"{other_subject}\", not be {subject}"),
        ),
        // A part of the subject is not enough.
        (
            changed(&policy, "/identities/0/subject", json!("https://github.com/team/app")),
            "the subject must be \"https://github.com/team/app\", not".to_owned(),
        ),
        (expression("github.com/team/app/.*"), "the subject must match \"github".to_owned()),
        (expression("https://github.com/team/app"), "the subject must match \"https".to_owned()),
        (
            claim("sourceRepositoryRef", "refs/heads/dev"),
            "sourceRepositoryRef must be \"refs/heads/dev\", not \"refs/heads/main\"".to_owned(),
        ),
        (claim("deploymentEnvironment", "prod"), "must be \"prod\", not absent".to_owned()),
        (annotation("test"), "without the annotation env=test".to_owned()),
    ] {
        set_policy(&node, &policy);
        let message = refuses(&node, &reference);
        assert!(message.contains(&expected), "{message}");
        let checked = check(&node, &reference);
        let message = String::from_utf8_lossy(&checked.stderr);
        assert!(!checked.status.success() && message.contains(&expected), "{message}");
    }
    assert_eq!(node.proxy.fetches(&digest(CONTENT.as_bytes())), 0, "nothing was fetched");
    for policy in [
        expression("https://github.com/team/app/[.]github/workflows/.*@refs/heads/main"),
        claim("sourceRepositoryURI", "https://github.com/team/app"),
        annotation("prod"),
    ] {
        set_policy(&node, &policy);
        mounts(&node, &reference);
    }
}

#[test]
fn only_a_trusted_instance_vouches_for_an_identity() {
    let recording = Recording::new();
    let policy = recording.policy();
    let (root, other) = (recording.json("trusted_root.json"), recording.json("other_root.json"));
    let with_root = |root: &Value| changed(&policy, "/trustRoots/0/data", json!(root.to_string()));
    let (node, _) = node_with(&policy);
    let [own, foreign] =
        ["cosign", "other"].map(|client| node.proxy.reference(&recording.signed(client)));
    let message = refuses(&node, &foreign);
    assert!(message.contains("is not valid"), "{message}");
    // Each part of another instance is another one, whatever the rest is.
    for (part, expected) in [
        ("certificateAuthorities", "certificate chain"),
        ("tlogs", "No matching Rekor key"),
        ("ctlogs", "invalid signed certificate timestamp"),
        ("timestampAuthorities", "any trusted TSA"),
    ] {
        set_policy(&node, &with_root(&changed(&root, &format!("/{part}"), other[part].clone())));
        let message = refuses(&node, &own);
        assert!(message.contains(expected), "{part}: {message}");
    }
    // An authority that was revoked before the signature.
    let validity = json!({"start": "2020-01-01T00:00:00Z", "end": "2026-01-01T00:00:00Z"});
    let revoked = changed(&root, "/certificateAuthorities/0/validFor", validity);
    set_policy(&node, &with_root(&revoked));
    let message = refuses(&node, &own);
    assert!(message.contains("no trusted certificate authority"), "{message}");
    // Without a log of certificates in the root, none must have it.
    set_policy(&node, &with_root(&changed(&root, "/ctlogs", Value::Null)));
    mounts(&node, &own);
    // Several instances count at once, unless an identity is limited to one.
    let mut both = policy.clone();
    let second = json!({"name": "other", "data": other.to_string()});
    both["trustRoots"].as_array_mut().expect("a list").push(second);
    set_policy(&node, &both);
    mounts(&node, &own);
    mounts(&node, &foreign);
    let limited = changed(&both, "/identities/0/trustRoots", json!(["other"]));
    set_policy(&node, &limited);
    mounts(&node, &foreign);
    refuses(&node, &own);
}

#[test]
fn changed_bundles_are_refused_with_their_reason() {
    let recording = Recording::new();
    let (node, _) = node_with(&recording.policy());
    let (bundle, other) =
        (recording.json("cosign/layer.json"), recording.json("python-attest/layer.json"));
    let entry = "/verificationMaterial/tlogEntries/0";
    let of_other =
        |pointer: &str| other.pointer(pointer).unwrap_or_else(|| panic!("{pointer}")).clone();
    let timestamps = "/verificationMaterial/timestampVerificationData";
    let many = json!(vec![bundle.pointer(entry).expect("an entry"); 9]);
    let certificate = "/verificationMaterial/certificate";
    let rows = [
        // The certificate has expired, and nothing says when it was used.
        (timestamps.to_owned(), Value::Null, "timestamp"),
        (timestamps.to_owned(), of_other(timestamps), "timestamp"),
        (certificate.to_owned(), of_other(certificate), "is not valid"),
        ("/verificationMaterial/tlogEntries".to_owned(), json!([]), "inclusion proof"),
        ("/verificationMaterial/tlogEntries".to_owned(), many, "log entries"),
        (format!("{entry}/inclusionProof"), Value::Null, "inclusion proof"),
        (
            format!("{entry}/inclusionProof"),
            of_other(&format!("{entry}/inclusionProof")),
            "inclusion proof",
        ),
        (format!("{entry}/logIndex"), json!("5"), "log index"),
        (entry.to_owned(), of_other(entry), "is not valid"),
        ("/dsseEnvelope/signatures/0/sig".to_owned(), json!("MAA="), "is not valid"),
        ("/more".to_owned(), json!(1), "\"more\" is not known"),
    ];
    let refused = |subject: Option<&str>, bundle: &str| {
        let repository = unique("keyless");
        let digest = recording.push(registry(), &repository);
        push_bundle(&repository, subject.unwrap_or(&digest), bundle);
        refuses(&node, &node.proxy.reference(&format!("{repository}:v1")))
    };
    for (pointer, part, expected) in rows {
        let message = refused(None, &changed(&bundle, &pointer, part).to_string());
        assert!(message.contains(expected), "{pointer}: {message}");
    }
    let twice =
        bundle.to_string().replace("\"tlogEntries\":", "\"tlogEntries\":[],\"tlogEntries\":");
    let message = refused(None, &twice);
    assert!(message.contains("twice"), "{message}");
    let large = changed(&bundle, "/dsseEnvelope/payload", json!("A".repeat(5 << 20)));
    let message = refused(None, &large.to_string());
    assert!(message.contains("the most is 4194304"), "{message}");
    // A statement of few bytes that would take hundreds of megabytes when it is parsed.
    let annotations = format!("{{\"a\":[{}0]}}", "{\"\":{\"\":0}},".repeat(200_000));
    let statement = format!(
        "{{\"_type\":\"https://in-toto.io/Statement/v1\",\"predicateType\":\"https://sigstore.dev/cosign/sign/v1\",\
         \"subject\":[{{\"digest\":{{\"sha256\":\"{}\"}},\"annotations\":{annotations}}}]}}",
        digest(recording.text("artifact.json").as_bytes()).trim_start_matches("sha256:")
    );
    let payload = STANDARD.encode(statement);
    let message =
        refused(None, &changed(&bundle, "/dsseEnvelope/payload", json!(payload)).to_string());
    assert!(message.contains("bytes of memory"), "{message}");
    assert_eq!(node.proxy.fetches(&digest(CONTENT.as_bytes())), 0, "nothing was fetched");
}

#[test]
fn a_bundle_in_a_file_counts_like_one_beside_the_artifact() {
    let recording = Recording::new();
    let (signature, provenance) = (recording.policy(), recording.provenance_policy());
    let (node, _) = node_with(&signature);
    let repository = unique("keyless");
    recording.push(registry(), &repository);
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let (path, another) = (node.sandbox.path().join("bundles"), small_artifact());
    let another = node.proxy.reference(&another.name);
    // A line each, as `gh attestation download` writes them.
    let lines = ["cosign", "python-attest"]
        .map(|client| recording.json(&format!("{client}/layer.json")).to_string());
    for (bundles, policy) in [
        (recording.text("cosign/layer.json"), &signature),
        (recording.text("python/layer.json"), &signature),
        (recording.text("cosign-attest/layer.json"), &provenance),
        (lines.join("\n"), &provenance),
    ] {
        fs::write(&path, bundles).expect("a file");
        set_policy(&node, policy);
        let with_bundle = ["--bundle", path.to_str().expect("a path")];
        assert!(!check(&node, &reference).status.success());
        let checked = check_with(&node, &reference, &with_bundle);
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
        assert!(!check_with(&node, &another, &with_bundle).status.success());
    }
}

#[test]
fn a_signature_of_another_artifact_is_refused() {
    let recording = Recording::new();
    let (node, _) = node_with(&recording.policy());
    let artifact = small_artifact();
    for (client, expected) in [("cosign", "for another digest"), ("python", "is not valid")] {
        let bundle = recording.text(&format!("{client}/layer.json"));
        push_bundle(&artifact.repository, &artifact.digest, &bundle);
        let message = refuses(&node, &node.proxy.reference(&artifact.name));
        assert!(message.contains(expected), "{client}: {message}");
    }
    // The same in the attached form.
    let artifact = small_artifact();
    for blob in ["config", "layer"] {
        registry().put_blob(
            &artifact.repository,
            recording.text(&format!("attached-log/{blob}.json")).as_bytes(),
        );
    }
    let tag = format!("{}.sig", artifact.digest.replace(':', "-"));
    let manifest = recording.json("attached-log/manifest.json");
    put_json(registry(), &artifact.repository, &tag, &manifest);
    let message = refuses(&node, &node.proxy.reference(&artifact.name));
    assert!(message.contains("for another digest"), "{message}");
}

#[test]
fn an_attestation_is_no_signature_and_a_signature_is_no_attestation() {
    let recording = Recording::new();
    let (signature, provenance) = (recording.policy(), recording.provenance_policy());
    let (node, _) = node_with(&signature);
    let [signed, attested] =
        ["cosign", "cosign-attest"].map(|client| node.proxy.reference(&recording.signed(client)));
    assert!(refuses(&node, &attested).contains("it is not signed"));
    set_policy(&node, &provenance);
    let message = refuses(&node, &signed);
    assert!(message.contains(PROVENANCE) && message.contains("identities: ci"), "{message}");
    let bill = "https://spdx.dev/Document";
    let pointer = "/rules/0/signatures/attestations/0/predicateType";
    set_policy(&node, &changed(&provenance, pointer, json!(bill)));
    let message = refuses(&node, &attested);
    assert!(message.contains(bill), "{message}");
}

#[test]
fn a_verdict_needs_no_registry_until_policy_or_root_change() {
    let recording = Recording::new();
    let root = |sandbox: &Sandbox| sandbox.path().join("trusted_root.json");
    let policy = changed(
        &recording.policy(),
        "/trustRoots/0",
        json!({"name": "private", "file": "{sandbox}/trusted_root.json"}),
    );
    let write = |sandbox: &Sandbox, text: &str| {
        fs::write(sandbox.path().join("new"), text).expect("a root");
        fs::rename(sandbox.path().join("new"), root(sandbox)).expect("a root");
    };
    let (own, other) = (recording.text("trusted_root.json"), recording.text("other_root.json"));
    let node = Node::start_configured(|sandbox| write(sandbox, &own), &configuration(&policy));
    let reference = node.proxy.reference(&recording.signed("cosign"));
    let (mounted, _) = node.mount(&reference);
    node.proxy.go_down();
    mounts(&node, &reference);
    // A broken root changes nothing.
    write(&node.sandbox, "{}");
    mounts(&node, &reference);
    assert!(node.driver.log().contains("no trusted_root.json"), "{}", node.driver.log());
    // Another root is another policy: verified anew, for which the registry is needed.
    write(&node.sandbox, &other);
    node.kubelet.publish_badly(&node.kubelet.new_volume(&reference), Code::Unavailable);
    node.proxy.come_back();
    refuses(&node, &reference);
    // Volumes that are mounted stay.
    node.kubelet.publish_well(&mounted);
    write(&node.sandbox, &own);
    mounts(&node, &reference);
    node.kubelet.unpublish(&mounted);
    // At a start, there is no last good policy.
    write(&node.sandbox, "{}");
    let driver = node.driver.restart();
    let kubelet = driver.kubelet();
    let message = kubelet.publish_badly(&kubelet.new_volume(&reference), Code::Unavailable);
    assert!(message.contains("\"private\" is no trust root"), "{message}");
}

#[test]
fn warm_verifies_before_it_fetches_and_warn_only_warns() {
    let recording = Recording::new();
    let policy = recording.policy();
    let (node, admin) = node_with(&policy);
    let reference = node.proxy.reference(&recording.signed("cosign-attest"));
    let warmed = admin.ask(&["warm", &reference]);
    let report = String::from_utf8_lossy(&warmed.stdout);
    assert!(!warmed.status.success() && report.contains("it is not signed"), "{report}");
    assert_eq!(node.proxy.fetches(&digest(CONTENT.as_bytes())), 0, "nothing was fetched");
    let warn = changed(&policy, "/rules/0/signatures/mode", json!("Warn"));
    set_policy(&node, &warn);
    mounts(&node, &reference);
    wait_until("it is warned of", || node.driver.log().contains("the policy only warns"));
    let checked = check(&node, &reference);
    let report: Value = serde_json::from_slice(&checked.stdout).expect("JSON");
    let signatures = &report["manifests"][0]["signatures"];
    assert_eq!(signatures["state"], "warned", "{report}");
    let signed = node.proxy.reference(&recording.signed("cosign"));
    set_policy(&node, &policy);
    admin.text(&["warm", &signed]);
    node.proxy.go_down();
    mounts(&node, &signed);
}

#[test]
fn a_preload_is_verified_before_nodes_fetch() {
    let recording = Recording::new();
    let mut cluster = Cluster::new(&["one"]);
    let _controller = cluster.controller();
    let node = cluster.options("one").configuration(&configuration(&recording.policy()));
    cluster.drivers.push(node.start());
    let proxy = Proxy::new(registry());
    let preload = |name: &str, client: &str, reason: &str| {
        let reference = proxy.reference(&recording.signed(client));
        cluster.preload(name, json!({"reference": reference, "backoffLimit": 0}));
        cluster.wait_for(name, reason);
    };
    preload("attested", "cosign-attest", "NodesFailed");
    let failed = cluster.status("attested")["failedNodes"][0].clone();
    let message = failed["message"].as_str().expect("a message");
    assert!(message.contains("it is not signed"), "{failed}");
    let fetches = || proxy.fetches(&digest(CONTENT.as_bytes()));
    assert_eq!(fetches(), 0, "nothing was fetched");
    preload("signed", "cosign", "Ready");
    assert_eq!(fetches(), 1);
}
