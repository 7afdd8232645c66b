//! Tests that a pod learns nothing about content of others, whether it is cached or not.

use serde_json::{Value, json};
use tonic::Code;

use crate::support::{
    Answer, FakeRegistry, Image, Layer, Manifest, Node, OCI_TAR_GZIP, Proxy, Tar, Volume, digest,
    gzip, noise, private_registry, registry, unique, wait_until,
};

const SECRET: &[u8] = b"what only its owner's repository holds";

/// The observations of a pod and of its registry, without the parts that differ between any two of them.
#[derive(Debug, PartialEq, Eq)]
struct Observations {
    code: Option<Code>,
    message: String,
    requests: Vec<String>,
}

/// Publishes and returns the observations. `names` are replaced by one name for the comparison.
fn seen(
    node: &Node,
    volume: &Volume,
    registry: Option<&FakeRegistry>,
    names: &[&str],
) -> Observations {
    let answer = node.kubelet.publish(volume);
    let plain = |text: &str| {
        names.iter().enumerate().fold(text.to_owned(), |text, (number, name)| {
            text.replace(name, &format!("<{number}>"))
        })
    };
    let requests = registry.map(FakeRegistry::requests).unwrap_or_default();
    let mut requests: Vec<_> = requests
        .iter()
        .map(|request| {
            let range = request.header("range").unwrap_or_default();
            plain(&format!("{} {} {range}", request.method, request.path))
        })
        .collect();
    // Timing decides whether the attacker's own layers are requested before the first refusal.
    requests.retain(|request| request.contains('<') || request.contains("/manifests/"));
    requests.sort();
    let (code, message) = match answer {
        Ok(()) => (None, String::new()),
        Err(status) => (Some(status.code()), plain(status.message())),
    };
    Observations { code, message, requests }
}

/// A manifest of an attacker, with the digest and the size of a layer that the attacker does not have.
type ForgeManifest = fn(&FakeRegistry, &str, usize) -> Value;

fn image(registry: &FakeRegistry, layers: &[Value]) -> Value {
    // A configuration of the attacker.
    let mut manifest = Image::new().manifest().json();
    registry.put_blob(Image::new().manifest().config.bytes);
    manifest["layers"] = json!(layers);
    manifest
}

fn layer(digest: &str, size: usize) -> Value {
    json!({"mediaType": OCI_TAR_GZIP, "digest": digest, "size": size})
}

fn own_layer(registry: &FakeRegistry, archive: Vec<u8>) -> Value {
    let bytes = gzip(&archive);
    let digest = registry.put_blob(bytes.clone());
    layer(&digest, bytes.len())
}

fn titled(digest: &str, size: usize) -> Value {
    let title = json!({"org.opencontainers.image.title": "stolen"});
    let kind = "application/vnd.test.file.v1";
    let stolen = json!({"mediaType": kind, "digest": digest, "size": size, "annotations": title});
    let mut manifest = Manifest::artifact([]).json();
    manifest["layers"] = json!([stolen]);
    manifest
}

/// All ways to name the layer, with the `include` of the volume.
const FORGED: [(&str, ForgeManifest, &str); 11] = [
    ("right size", |registry, digest, size| image(registry, &[layer(digest, size)]), ""),
    ("too long", |registry, digest, size| image(registry, &[layer(digest, size + 1)]), ""),
    ("too short", |registry, digest, _| image(registry, &[layer(digest, 1)]), ""),
    ("include matches", |registry, digest, size| image(registry, &[layer(digest, size)]), "dir/**"),
    ("include does not", |registry, digest, size| image(registry, &[layer(digest, size)]), "no/**"),
    (
        "a hard link to a file",
        |registry, digest, size| {
            let links = Tar::new().hard_link("link", "dir/secret");
            image(registry, &[layer(digest, size), own_layer(registry, links.finish())])
        },
        "",
    ),
    (
        "a hard link to nothing",
        |registry, digest, size| {
            let links = Tar::new().hard_link("link", "dir/nothing");
            image(registry, &[layer(digest, size), own_layer(registry, links.finish())])
        },
        "",
    ),
    (
        "a file below a file",
        |registry, digest, size| {
            let files = Tar::new().file("dir/secret/below", 0o644, "x");
            image(registry, &[layer(digest, size), own_layer(registry, files.finish())])
        },
        "",
    ),
    ("a titled file", |_, digest, size| titled(digest, size), ""),
    ("a titled file that is too long", |_, digest, size| titled(digest, size + 1), ""),
    (
        "a configuration",
        |registry, digest, size| {
            let mut manifest =
                image(registry, &[own_layer(registry, Tar::new().file("f", 0o644, "").finish())]);
            manifest["config"]["digest"] = json!(digest);
            manifest["config"]["size"] = json!(size);
            manifest
        },
        "",
    ),
];

/// A layer, a titled file and a configuration of a victim, cached on the node: digests and sizes.
struct Victim {
    manifest: Value,
    manifest_digest: String,
    layer: (String, usize),
    file: (String, usize),
    config: (String, usize),
    _volumes: [Volume; 2],
}

impl Victim {
    fn cached_on(
        node: &Node,
        reference: impl Fn(&str) -> String,
        push: impl Fn(&Manifest, &str) -> String,
    ) -> Self {
        let archive = Tar::new().folder("dir", 0o755).file("dir/secret", 0o644, SECRET).finish();
        // Of another platform, which its reader reports, so that its configuration has content.
        let image = Image::new().platform("linux", "s390x").layer(archive).manifest();
        let file = Manifest::artifact([Layer::titled("secret", noise(5000, 71))]);
        let (image_name, file_name) = (unique("victim"), unique("victim"));
        let manifest_digest = push(&image, &image_name);
        push(&file, &file_name);
        let (first, _) = node.mount_with(&reference(&image_name), |volume| {
            volume.attribute("platform", "linux/s390x")
        });
        let (second, _) = node.mount(&reference(&file_name));
        let of = |blob: &Layer| (digest(&blob.bytes), blob.bytes.len());
        Self {
            manifest: image.json(),
            manifest_digest,
            layer: of(&image.layers[0]),
            file: of(&file.layers[0]),
            config: of(&image.config),
            _volumes: [first, second],
        }
    }

    fn blob_for(&self, way: &str) -> &(String, usize) {
        match way {
            way if way.contains("titled") => &self.file,
            "a configuration" => &self.config,
            _ => &self.layer,
        }
    }
}

#[test]
fn whether_anothers_layer_is_cached_cannot_be_told_with_a_registry_of_ones_own() {
    let node = Node::start();
    let victim = Victim::cached_on(
        &node,
        |name| node.proxy.reference(&format!("{name}:v1")),
        |manifest, name| manifest.push(registry(), name, "v1"),
    );
    for (way, forged, include) in FORGED {
        let (cached, size) = victim.blob_for(way);
        let unknown = digest(way.as_bytes());
        let [told, expected] = [cached, &unknown].map(|blob| {
            let attacker = FakeRegistry::new();
            attacker.put_json("v1", &forged(&attacker, blob, *size));
            let volume = node.kubelet.new_volume(&attacker.reference("v1"));
            let volume = volume.attribute("include", include);
            let manifest = digest(forged(&attacker, blob, *size).to_string().as_bytes());
            seen(&node, &volume, Some(&attacker), &[blob, &manifest, &attacker.host()])
        });
        assert_eq!(told.code, Some(Code::NotFound), "{way}: {told:?}");
        assert_eq!(told, expected, "{way}");
    }
}

#[test]
fn whether_another_repositorys_layer_is_cached_cannot_be_told_at_the_same_registry() {
    let node = Node::start();
    let shared = FakeRegistry::new();
    let of =
        |repository: &str| shared.reference("v1").replace("/hostile:v1", &format!("/{repository}"));
    let victim = Victim::cached_on(
        &node,
        |name| of(&format!("owner:{name}")),
        |manifest, name| manifest.push(&shared, "owner", name),
    );
    // A registry decides for each repository.
    let private = [&victim.layer.0, &victim.file.0, &victim.config.0].map(Clone::clone);
    shared.script(move |request| {
        let is_private = private.iter().any(|blob| request.path.ends_with(blob));
        let elsewhere = is_private && !request.path.contains("/owner/");
        elsewhere.then(|| Answer::error(404, "BLOB_UNKNOWN"))
    });
    for (way, forged, include) in FORGED {
        let (cached, size) = victim.blob_for(way);
        let unknown = digest(way.as_bytes());
        let [told, expected] = [cached, &unknown].map(|blob| {
            let repository = unique("tenant");
            shared.put_json(&repository, &forged(&shared, blob, *size));
            let volume = node.kubelet.new_volume(&of(&format!("{repository}:{repository}")));
            let volume = volume.attribute("include", include);
            seen(&node, &volume, None, &[blob, &repository])
        });
        assert_eq!(told.code, Some(Code::NotFound), "{way}: {told:?}");
        assert_eq!(told, expected, "{way}");
    }
}

/// The store has a tree of the very same manifest.
#[test]
fn a_tree_of_the_same_manifest_needs_the_proof_too() {
    let node = Node::start();
    let victim = Victim::cached_on(
        &node,
        |name| node.proxy.reference(&format!("{name}:v1")),
        |manifest, name| manifest.push(registry(), name, "v1"),
    );
    let [told, expected] = [false, true].map(|is_other| {
        let attacker = FakeRegistry::new();
        let mut manifest = victim.manifest.clone();
        let mut layer = victim.layer.0.clone();
        if is_other {
            layer = digest(b"no one has it");
            manifest["layers"][0]["digest"] = json!(layer);
        }
        let config = json!({"os": "linux", "architecture": "s390x", "config": {},
            "rootfs": {"type": "layers", "diff_ids": [digest(b"")]}})
        .to_string();
        if is_other {
            manifest["config"]["digest"] = json!(digest(config.as_bytes()));
            manifest["config"]["size"] = json!(config.len());
            attacker.put_blob(config);
        } else {
            // The attacker knows all but the layer.
            let archive =
                Tar::new().folder("dir", 0o755).file("dir/secret", 0o644, SECRET).finish();
            let image = Image::new().platform("linux", "s390x").layer(archive).manifest();
            attacker.put_blob(image.config.bytes);
        }
        attacker.put_json("v1", &manifest);
        let volume = node.kubelet.new_volume(&attacker.reference("v1"));
        let volume = volume.attribute("platform", "linux/s390x");
        let config = manifest["config"]["digest"].as_str().expect("a digest").to_owned();
        let manifest = digest(manifest.to_string().as_bytes());
        seen(&node, &volume, Some(&attacker), &[&layer, &config, &manifest, &attacker.host()])
    });
    assert_eq!(told.code, Some(Code::NotFound), "{told:?}");
    assert_eq!(told, expected);
}

/// The node does not disclose either which manifest an index of others resolves to.
#[test]
fn a_kept_manifest_of_others_is_asked_for_as_if_it_were_not_here() {
    let node = Node::start();
    let victim = Victim::cached_on(
        &node,
        |name| node.proxy.reference(&format!("{name}:v1")),
        |manifest, name| manifest.push(registry(), name, "v1"),
    );
    let repository = unique("index");
    let image = Image::new().layer(Tar::new().file("f", 0o644, "").finish()).manifest();
    let chosen = image.push(registry(), &repository, "v1");
    let mut entry = crate::support::descriptor(
        "application/vnd.oci.image.manifest.v1+json",
        image.json().to_string().as_bytes(),
    );
    entry["platform"] = json!({"os": "linux", "architecture": crate::support::node_architecture()});
    let index = crate::support::push_index(registry(), &repository, "index", &[entry]);
    node.mount(&node.proxy.reference(&format!("{repository}:index")));
    for cached in [&victim.manifest_digest, &index, &chosen] {
        let unknown = digest(cached.as_bytes());
        let [told, expected] = [cached, &unknown].map(|manifest| {
            let attacker = FakeRegistry::new();
            let reference = attacker.reference("v1").replace(":v1", &format!("@{manifest}"));
            let volume = node.kubelet.new_volume(&reference);
            seen(&node, &volume, Some(&attacker), &[manifest, &attacker.host()])
        });
        assert_eq!(told.code, Some(Code::NotFound), "{told:?}");
        assert_eq!(told, expected);
    }
}

/// A pod with no credential, or a wrong one, learns neither that the tag is cached nor its digest.
#[test]
fn a_private_reference_of_others_is_refused_in_the_same_words_whether_it_is_cached_or_not() {
    const USER: &str = "owner";
    const PASSWORD: &str = "password of the owner";
    let private = private_registry(USER, PASSWORD);
    let proxy = Proxy::new(&private);
    let node = Node::start();
    let [cached, other] = [(); 2].map(|()| {
        let repository = unique("private");
        let layer = Layer::titled("secret", format!("of {repository}"));
        Manifest::artifact([layer]).push(&private.as_user(USER, PASSWORD), &repository, "v1");
        proxy.reference(&format!("{repository}:v1"))
    });
    let show = |volume: Volume, password: Option<&str>| match password {
        Some(password) => volume.secret("username", USER).secret("password", password),
        None => volume,
    };
    node.mount_with(&cached, |volume| show(volume, Some(PASSWORD)));
    for policy in ["Never", "IfNotPresent", "Always"] {
        for password in [None, Some("wrong")] {
            let [told, expected] = [&cached, &other].map(|reference| {
                let volume = node.kubelet.new_volume(reference).attribute("pullPolicy", policy);
                let name = reference.strip_suffix(":v1").expect("a tag");
                proxy.take_requests();
                let told = seen(&node, &show(volume, password), None, &[name]);
                let plain =
                    |path: &str| path.replace(name.split_once('/').expect("a path").1, "<0>");
                let requests = proxy.take_requests().into_iter();
                let requests: Vec<_> =
                    requests.map(|request| (request.method, plain(&request.path))).collect();
                (told, requests)
            });
            let code = if policy == "Never" { Code::NotFound } else { Code::Unauthenticated };
            assert_eq!(told.0.code, Some(code), "{policy}: {told:?}");
            assert_eq!(told, expected, "{policy}");
        }
    }
    proxy.go_down();
    let tell = |reference: &String| {
        let name = reference.strip_suffix(":v1").expect("a tag");
        seen(&node, &node.kubelet.new_volume(reference), None, &[name])
    };
    // A connection that the driver kept is reset.
    wait_until("no connection is kept", || tell(&other).message.contains("refused"));
    let [told, expected] = [&cached, &other].map(tell);
    assert_eq!(told.code, Some(Code::Unavailable));
    assert_eq!(told, expected);
}

/// The message has the space that a manifest needs, and not which parts of it are cached.
#[test]
fn room_that_is_missing_tells_nothing_of_what_is_cached() {
    let lines = "cache: {maxBytes: 10Mi, minFreePercent: 0, minFreeInodesPercent: 0, \
                 highThresholdPercent: 100, lowThresholdPercent: 100}\n";
    let (node, _admin) = crate::support::Admin::start(lines);
    let content = noise(1 << 20, 72);
    let repository = unique("victim");
    let manifest = Manifest::artifact([Layer::titled("secret", content.clone())]);
    manifest.push(registry(), &repository, "v1");
    node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    // Beside the cached content it does not fit; the first can never fit.
    for (size, answers, code) in [
        (20 << 20, false, Code::ResourceExhausted),
        ((9 << 20) - 8192, false, Code::NotFound),
        ((9 << 20) - 8192, true, Code::ResourceExhausted),
    ] {
        let ask = |blob: String| {
            let attacker = FakeRegistry::new();
            let mut manifest = titled(&blob, content.len());
            let large = titled(&digest(b"large"), size)["layers"][0].clone();
            manifest["layers"].as_array_mut().expect("layers").push(large);
            manifest["layers"][1]["annotations"]["org.opencontainers.image.title"] = json!("large");
            attacker.put_json("v1", &manifest);
            // The attacker may confirm every request.
            attacker.script(move |request| {
                (answers && request.path.contains("/blobs/")).then(|| Answer::status(200))
            });
            let volume = node.kubelet.new_volume(&attacker.reference("v1"));
            let large = digest(b"large");
            let mut seen =
                seen(&node, &volume, Some(&attacker), &[&blob, &large, &attacker.host()]);
            // Timing decides which of two refusals comes first.
            seen.message = seen.message.replace("<1>", "<0>");
            seen
        };
        let blobs = [digest(&content), digest(b"no one has it")];
        // The first time the attacker's own manifests take space.
        let _ = blobs.clone().map(ask);
        let [told, expected] = blobs.map(ask);
        assert_eq!(told.code, Some(code), "{told:?}");
        assert_eq!((&told.code, &told.message), (&expected.code, &expected.message));
    }
}

/// The victim's pull of the same manifest is running: a pod without access is refused at once.
#[test]
fn a_pull_that_is_under_way_is_no_news_for_another_repository() {
    let node = Node::start();
    let (repository, content) = (unique("victim"), noise(1 << 20, 73));
    let manifest = Manifest::artifact([Layer::titled("secret", content.clone())]);
    manifest.push(registry(), &repository, "v1");
    let gate = node.proxy.hold_blobs();
    let attacker = FakeRegistry::new();
    attacker.put_json("v1", &manifest.json());
    let victim = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    std::thread::scope(|scope| {
        scope.spawn(|| node.kubelet.publish_well(&victim));
        wait_until("the victim's pull is under way", || gate.waiting() > 0);
        let volume = node.kubelet.new_volume(&attacker.reference("v1"));
        let told = node.kubelet.publish(&volume).expect_err("the attacker has not got the blob");
        gate.open();
        assert_eq!(told.code(), Code::NotFound, "{}", told.message());
    });
    node.kubelet.unpublish(&victim);
}

/// The failure of a repository's content is reported to pods of that repository alone.
#[test]
fn the_failure_of_one_repository_is_not_told_to_another() {
    let node = Node::start();
    // Refused for a name that says something.
    let archive = Tar::new().file("../merger-with-acme.txt", 0o644, noise(1 << 20, 74)).finish();
    let manifest = Image::new().layer(archive).manifest();
    let repository = unique("victim");
    manifest.push(registry(), &repository, "v1");
    let gate = node.proxy.hold_blobs();
    let attacker = FakeRegistry::new();
    attacker.put_json("v1", &manifest.json());
    attacker.put_blob(manifest.config.bytes.clone());
    let blob = digest(&manifest.layers[0].bytes);
    let asked = || attacker.requests().iter().any(|request| request.path.ends_with(&blob));
    // The registry sends nothing until the victim has failed.
    let (suffix, answer) =
        (blob.clone(), std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false)));
    let may_answer = std::sync::Arc::clone(&answer);
    attacker.script(move |request| {
        while request.path.ends_with(&suffix)
            && !may_answer.load(std::sync::atomic::Ordering::SeqCst)
        {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        None
    });
    let victim = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    let volume = node.kubelet.new_volume(&attacker.reference("v1"));
    std::thread::scope(|scope| {
        let failing = scope.spawn(|| node.kubelet.publish_badly(&victim, Code::FailedPrecondition));
        wait_until("the victim's pull is under way", || gate.waiting() > 0);
        let told = scope.spawn(|| node.kubelet.publish(&volume));
        wait_until("the attacker waits as well", asked);
        gate.open();
        let of_victim = failing.join().expect("the victim");
        assert!(of_victim.contains("merger-with-acme"), "{of_victim}");
        answer.store(true, std::sync::atomic::Ordering::SeqCst);
        let told = told.join().expect("the attacker").expect_err("he has not got the blob");
        assert!(!told.message().contains("merger"), "{}", told.message());
        assert!(!told.message().contains(&repository), "{}", told.message());
        assert_eq!(told.code(), Code::NotFound, "{}", told.message());
    });
}
