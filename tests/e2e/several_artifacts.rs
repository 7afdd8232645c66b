//! Tests the attribute `artifacts`: several artifacts in one volume.

use std::{fs, path::Path};

use serde_json::json;
use tonic::Code;

use crate::support::{
    Admin, Cosign, Format, Image, Layer, Manifest, Node, Pod, Proxy, SmallArtifact, Tar, Tree,
    Volume, digest, mounts_at, private_registry, registry, small_artifact, unique, wait_until,
};

const ROOMY: &str = "cache: {minFreePercent: 0, minFreeInodesPercent: 0, highThresholdPercent: 100, \
                     lowThresholdPercent: 100, minimumAge: 0s, scrubInterval: 0}\n";

/// Pushes an artifact of these files. Returns its repository.
fn files(titles: &[&str]) -> String {
    let repository = unique("several");
    let layers = titles.iter().map(|title| Layer::titled(title, format!("{repository}: {title}")));
    Manifest::artifact(layers).push(registry(), &repository, "v1");
    repository
}

fn list(entries: &[&str]) -> String {
    let entries: Vec<_> = entries.iter().map(|entry| format!("- {entry}\n")).collect();
    entries.concat()
}

fn volume_of(node: &Node, list: &str) -> Volume {
    node.kubelet.new_volume("").attribute("artifacts", list)
}

fn mount(node: &Node, list: &str) -> (Volume, Tree) {
    node.mount_with("", |volume| volume.attribute("artifacts", list))
}

fn entry(node: &Node, repository: &str, more: &str) -> String {
    format!("{{reference: {}, {more}}}", node.proxy.reference(&format!("{repository}:v1")))
}

#[test]
fn each_artifact_has_its_own_folder_in_one_mount() {
    let node = Node::start();
    let (model, tools) = (files(&["model.bin", "notes.txt"]), unique("several-image"));
    let archive = Tar::new()
        .folder("usr/bin", 0o755)
        .file("usr/bin/run", 0o755, "#!/bin/sh\n")
        .symbolic_link("usr/bin/link", "/usr/bin/run")
        .hard_link("usr/bin/same", "usr/bin/run")
        .finish();
    Image::new().layer(archive).push(registry(), &tools, "v1");
    let entries = [
        entry(&node, &model, "path: models/first, exclude: '*.txt'"),
        entry(&node, &tools, "path: tools, strip: usr/bin"),
        entry(&node, &model, "path: notes, include: '*.txt'"),
    ];
    let entries: Vec<_> = entries.iter().map(String::as_str).collect();
    let (volume, tree) = mount(&node, &list(&entries));
    let expected = [
        "models",
        "models/first",
        "models/first/model.bin",
        "notes",
        "notes/notes.txt",
        "tools",
        "tools/link",
        "tools/run",
        "tools/same",
    ];
    assert_eq!(tree.names(), expected);
    assert_eq!(tree.mode("tools/run"), 0o755);
    assert_eq!(volume.text("models/first/model.bin"), format!("{model}: model.bin"));
    assert_eq!(mounts_at(volume.target()).len(), 1);
    for title in ["model.bin", "notes.txt"] {
        let blob = digest(format!("{model}: {title}").as_bytes());
        assert_eq!(node.proxy.fetches(&blob), 1, "{title}");
    }
    node.kubelet.publish_well(&volume);
    node.kubelet.unpublish(&volume);
    volume.assert_nothing_left();
}

#[test]
fn artifacts_without_a_path_are_merged_at_the_root() {
    let node = Node::start();
    let (one, two) = (files(&["conf/a", "x"]), files(&["conf/b", "y"]));
    let entries = json!([
        {"reference": node.proxy.reference(&format!("{one}:v1"))},
        {"reference": node.proxy.reference(&format!("{two}:v1")), "exclude": "y"},
    ]);
    let (_, tree) = mount(&node, &entries.to_string());
    assert_eq!(tree.names(), ["conf", "conf/a", "conf/b", "x"]);
}

#[test]
fn a_name_that_two_artifacts_have_is_refused_with_both() {
    let node = Node::start();
    let (one, two) = (files(&["conf/a", "x"]), files(&["conf/a", "y"]));
    let (first, second) = (entry(&node, &one, ""), entry(&node, &two, ""));
    for (entries, path) in [
        ([first.clone(), second.clone()], "conf/a"),
        ([first.clone(), entry(&node, &two, "path: conf")], "conf"),
        ([entry(&node, &two, "path: conf"), first.clone()], "conf"),
        ([first.clone(), entry(&node, &two, "path: x/below")], "x"),
        ([first.clone(), entry(&node, &one, "include: x")], "x"),
    ] {
        let volume = volume_of(&node, &list(&[&entries[0], &entries[1]]));
        let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
        assert!(message.contains(&format!("\"{path}\" is in")), "{message}");
        assert!(message.matches(":v1").count() == 2, "{message}");
        volume.assert_nothing_left();
    }
    let apart = [first, entry(&node, &two, "exclude: conf/a")];
    assert_eq!(
        mount(&node, &list(&[&apart[0], &apart[1]])).1.names(),
        ["conf", "conf/a", "x", "y"]
    );
}

#[test]
fn a_list_that_is_wrong_is_refused_before_the_registry_is_asked() {
    let node = Node::start();
    let good = format!("{{reference: {}}}", node.proxy.reference("good:v1"));
    let wrong: [(String, &str); 9] = [
        ("neither: this".into(), "list"),
        (list(&[&good, "{reference: 'UPPER/x'}"]), "entry 2"),
        (list(&[&good, "{reference: x.io/a, path: ../up}"]), "\"..\""),
        (list(&[&good, "{reference: x.io/a, path: /etc}"]), "absolute"),
        (list(&["{reference: x.io/a, path: p}", "{reference: x.io/b, path: p/q}"]), "x.io/b"),
        (list(&["{reference: x.io/a, platform: linux/amd64}"]), "platform"),
        (list(&vec![good.as_str(); 33]), "32"),
        ("[]".into(), "32"),
        (format!("- {good}\n{}", "#".repeat(70_000)), "longer"),
    ];
    for (text, expected) in &wrong {
        let message = node.kubelet.publish_badly(&volume_of(&node, text), Code::InvalidArgument);
        assert!(message.contains("artifacts") && message.contains(expected), "{message}");
    }
    for (key, value) in
        [("reference", "x.io/a"), ("repository", "x.io/a"), ("tag", "v1"), ("subPath", "x")]
    {
        let volume = volume_of(&node, &list(&[&good])).attribute(key, value);
        let message = node.kubelet.publish_badly(&volume, Code::InvalidArgument);
        assert!(message.contains(key) && message.contains("artifacts"), "{message}");
    }
    assert_eq!(node.proxy.requests(), []);
}

#[test]
fn what_fails_is_named_before_anything_is_fetched() {
    let private = private_registry("robot", "planted-password");
    let proxy = Proxy::new(&private);
    let secret = unique("private");
    Manifest::artifact([Layer::titled("s", "secret")]).push(
        &private.as_user("robot", "planted-password"),
        &secret,
        "v1",
    );
    let node = Node::start();
    let one = files(&["a"]);
    let first = entry(&node, &one, "path: a");
    let missing = entry(&node, &unique("missing"), "path: b");
    let volume = volume_of(&node, &list(&[&first, &missing]));
    let message = node.kubelet.publish_badly(&volume, Code::NotFound);
    assert!(message.contains("missing") && !message.contains(&one), "{message}");
    let locked = proxy.reference(&format!("{secret}:v1"));
    let text = list(&[&first, &format!("{{reference: {locked}, path: b}}")]);
    let message = node.kubelet.publish_badly(&volume_of(&node, &text), Code::Unauthenticated);
    assert!(message.contains(&locked), "{message}");
    assert_eq!(node.proxy.fetches("/blobs/"), 0, "nothing is fetched for a volume that is refused");
    // Credentials of the pod count for each artifact by its own host.
    let auths =
        json!({"auths": {proxy.host(): {"username": "robot", "password": "planted-password"}}});
    let volume = volume_of(&node, &text).secret(".dockerconfigjson", &auths.to_string());
    node.kubelet.publish_well(&volume);
    assert_eq!(volume.text("b/s"), "secret");
    // Without them the cached content stays closed.
    for policy in ["Never", "IfNotPresent"] {
        let other = volume_of(&node, &text).attribute("pullPolicy", policy);
        let refused = node.kubelet.publish(&other).expect_err("no proof");
        assert!(matches!(refused.code(), Code::NotFound | Code::Unauthenticated), "{refused}");
    }
    // A password without a host is that of the first artifact's registry alone.
    let basic = |text: &str| {
        let volume = volume_of(&node, text).attribute("pullPolicy", "Always");
        volume.secret("username", "robot").secret("password", "planted-password")
    };
    node.kubelet.publish_badly(&basic(&text), Code::Unauthenticated);
    let turned = list(&[&format!("{{reference: {locked}, path: b}}"), &first]);
    node.kubelet.publish_well(&basic(&turned));
    let seen = node.proxy.requests();
    assert!(seen.iter().all(|request| !request.authorized), "{seen:?}");
}

#[test]
fn the_policy_counts_for_each_artifact() {
    let (allowed, denied, large) = (files(&["a"]), files(&["b"]), unique("large"));
    Manifest::artifact([Layer::titled("file", vec![b'x'; 200_000])]).push(registry(), &large, "v1");
    let lines = format!(
        "policy:\n  rules:\n  - references: [\"*/{denied}\"]\n    action: Deny\n  - maxArtifactBytes: 100k\n"
    );
    let node = Node::start_configured(|_| {}, &lines);
    let first = entry(&node, &allowed, "path: a");
    for (repository, expected) in [(&denied, "does not allow"), (&large, "maxArtifactBytes")] {
        let volume = volume_of(&node, &list(&[&first, &entry(&node, repository, "path: b")]));
        let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
        assert!(message.contains(expected) && message.contains(repository.as_str()), "{message}");
    }
    assert_eq!(node.proxy.fetches("/blobs/"), 0);
}

#[test]
fn signatures_are_demanded_of_each_artifact() {
    let folder = tempfile::tempdir().expect("a folder");
    let key = Cosign::new(folder.path(), "release");
    let pushed = [small_artifact(), small_artifact()];
    let SmallArtifact { repository, digest, .. } = &pushed[0];
    key.sign(Format::Bundle, registry(), repository, digest);
    let lines =
        format!("policy:\n  keys: [{{name: release, file: \"{}\"}}]\n", key.public_key().display());
    let node = Node::start_configured(|_| {}, &lines);
    let entries: Vec<_> = pushed
        .iter()
        .map(|artifact| {
            entry(&node, &artifact.repository, &format!("path: {}", artifact.repository))
        })
        .collect();
    let both = list(&[&entries[0], &entries[1]]);
    let volume = volume_of(&node, &both).attribute("requireSignature", "true");
    let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
    assert!(message.contains(&pushed[1].repository) && message.contains("sign"), "{message}");
    let SmallArtifact { repository, digest, .. } = &pushed[1];
    key.sign(Format::Bundle, registry(), repository, digest);
    node.kubelet.publish_well(&volume);
}

#[test]
fn a_composite_in_the_cache_needs_no_registry() {
    let node = Node::start();
    let (one, two) = (files(&["a"]), files(&["b"]));
    let text = list(&[&entry(&node, &one, "path: a"), &entry(&node, &two, "path: b")]);
    let (volume, sound) = mount(&node, &text);
    node.proxy.go_down();
    let (_, shown) = mount(&node, &text);
    assert_eq!(shown, sound);
    let never = volume_of(&node, &text).attribute("pullPolicy", "Never");
    node.kubelet.publish_well(&never);
    node.proxy.take_requests();
    let unavailable = volume_of(&node, &text).attribute("pullPolicy", "Always");
    let refused = node.kubelet.publish(&unavailable).expect_err("down");
    assert_eq!(refused.code(), Code::Unavailable);
    let cached = volume_of(&node, &text).attribute("pullPolicy", "Always");
    node.kubelet.publish_well(&cached.attribute("ifUnavailable", "UseCached"));
    // Another way to put them together needs no registry either.
    let (_, merged) = mount(&node, &list(&[&entry(&node, &two, ""), &entry(&node, &one, "")]));
    assert_eq!(merged.names(), ["a", "b"]);
    // The same volume comes back after a restart.
    let driver = node.driver.restart();
    driver.kubelet().publish_well(&volume);
    assert_eq!(Tree::of(volume.target()), sound);
}

#[test]
fn pods_that_start_together_share_one_composite() {
    let (node, admin) = Admin::start(ROOMY);
    let (one, two) = (files(&["a"]), files(&["b"]));
    let text = list(&[&entry(&node, &one, "path: a"), &entry(&node, &two, "path: b")]);
    let volumes: Vec<_> = (0..8).map(|_| volume_of(&node, &text)).collect();
    std::thread::scope(|scope| {
        for volume in &volumes {
            scope.spawn(|| node.kubelet.publish_well(volume));
        }
    });
    let artifacts = admin.json(&["ls"])["artifacts"].clone();
    let composites: Vec<_> = artifacts
        .as_array()
        .expect("a list")
        .iter()
        .filter(|artifact| artifact["parts"] != json!([]))
        .collect();
    assert_eq!(composites.len(), 1, "{artifacts}");
    assert_eq!(composites[0]["volumes"].as_array().expect("volumes").len(), 8);
    assert_eq!(node.proxy.fetches("/blobs/"), 2);
}

#[test]
fn an_administrator_sees_and_removes_composites() {
    let (node, admin) = Admin::start(ROOMY);
    let (one, two) = (files(&["a", "other"]), files(&["b"]));
    let references = [&one, &two].map(|name| node.proxy.reference(&format!("{name}:v1")));
    let text = list(&[&entry(&node, &one, "path: a, include: a"), &entry(&node, &two, "path: b")]);
    let pod = Pod::new();
    let volume = node.kubelet.inline(&pod, "artifact", "").attribute("artifacts", &text);
    node.kubelet.publish_well(&volume);
    let is_composite = |artifact: &&serde_json::Value| artifact["parts"] != json!([]);
    let composite = || {
        let listed = admin.json(&["ls"])["artifacts"].as_array().expect("a list").clone();
        listed.iter().find(is_composite).cloned()
    };
    let found = composite().expect("a composite");
    assert_eq!(found["kind"], "2 artifacts");
    assert_eq!(found["parts"][0]["path"], "a");
    assert_eq!(found["parts"][0]["include"], "a");
    let mut known = references.to_vec();
    known.sort();
    assert_eq!(found["references"], json!(known));
    let inspected = admin.json(&["inspect", &references[1]]);
    assert!(
        inspected["artifacts"].as_array().expect("a list").iter().any(|of| is_composite(&of)),
        "{inspected}"
    );
    assert!(admin.text(&["inspect", &references[1]]).contains("artifacts=2"));
    // A mounted composite stays. After that, `rm` of its first reference removes it.
    let removed = admin.json(&["rm", &references[0]])[0].clone();
    assert!(removed["volumes"].as_array().expect("volumes").len() == 1, "{removed}");
    assert_eq!(volume.text("a/a"), format!("{one}: a"));
    node.kubelet.unpublish(&volume);
    wait_until("the composite is gone", || {
        admin.json(&["gc"]);
        composite().is_none()
    });
    assert!(admin.holds(&references[1]), "the other artifact stays");
}

#[test]
fn records_of_all_artifacts_stay_as_long_as_the_composite() {
    let (node, admin) = Admin::start(ROOMY);
    let (one, two) = (files(&["a"]), files(&["b"]));
    let text = list(&[&entry(&node, &one, "path: a"), &entry(&node, &two, "path: b")]);
    let (volume, sound) = mount(&node, &text);
    // The trees of the artifacts themselves go, and what the composite needs stays.
    let collected = admin.json(&["gc", "--target", "0"]);
    assert_eq!(
        collected["victims"]
            .as_array()
            .map(|removed| removed.iter().filter(|of| of["digest"] != json!(null)).count()),
        Some(2),
        "{collected}"
    );
    node.proxy.go_down();
    let (second, shown) = mount(&node, &text);
    assert_eq!(shown, sound);
    node.proxy.come_back();
    assert_eq!(admin.json(&["verify"])["findings"], json!([]));
    node.kubelet.unpublish(&volume);
    node.kubelet.unpublish(&second);
    admin.json(&["gc", "--target", "0"]);
    let trees = fs::read_dir(node.driver.state().join("trees")).expect("trees");
    assert_eq!(trees.count(), 0);
    let files = fs::read_dir(node.driver.state().join("files")).expect("files");
    assert_eq!(files.count(), 0, "nothing is left behind");
}

/// Returns the folder of the generation that shows this name.
fn generation(state: &Path, name: &str) -> std::path::PathBuf {
    let trees = fs::read_dir(state.join("trees")).expect("trees").flatten();
    let mut found = trees
        .map(|tree| tree.path().join("1"))
        .filter(|path| path.join("root").join(name).exists());
    found.next().expect("a tree")
}

#[test]
fn damage_of_a_composite_is_found_and_repaired() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 6] = [
        ("a lost name", |tree| fs::remove_file(tree.join("root/a/a")).expect("removed")),
        ("a foreign name", |tree| fs::write(tree.join("root/b/more"), "x").expect("written")),
        ("lost links", |tree| fs::write(tree.join("objects.json"), "[]").expect("written")),
        ("another path", |tree| {
            let text = fs::read_to_string(tree.join("tree.json")).expect("a record");
            fs::write(tree.join("tree.json"), text.replace("\"path\":\"a\"", "\"path\":\"c\""))
                .expect("written");
        }),
        ("other numbers", |tree| {
            let text = fs::read_to_string(tree.join("tree.json")).expect("a record");
            fs::write(tree.join("tree.json"), text.replace("\"inodes\":", "\"inodes\":1"))
                .expect("written");
        }),
        ("content", |tree| fs::write(tree.join("root/a/a"), "changed").expect("written")),
    ];
    for (what, damage) in damages {
        let (node, admin) = Admin::start(ROOMY);
        let (one, two) = (files(&["a"]), files(&["b"]));
        let text = list(&[&entry(&node, &one, "path: a"), &entry(&node, &two, "path: b")]);
        let (volume, sound) = mount(&node, &text);
        assert_eq!(admin.json(&["verify"])["findings"], json!([]));
        let tree = generation(node.driver.state(), "a/a");
        damage(&tree);
        if what == "another path" {
            let message = admin.refused(&["verify", "--repair"]);
            assert!(message.contains("damaged"), "{message}");
        } else {
            let repaired = admin.json(&["verify", "--repair"]);
            assert_ne!(repaired["findings"], json!([]), "{what}: {repaired}");
            assert_eq!(repaired["unrepaired"], 0, "{what}: {repaired}");
        }
        assert!(tree.with_extension("damaged").exists(), "{what}");
        let (other, shown) = mount(&node, &text);
        // A single file has the time at which it was fetched.
        assert_eq!(shown.without_times(), sound.without_times(), "{what}");
        assert_eq!(other.text("a/a"), format!("{one}: a"), "{what}");
        assert_eq!(admin.json(&["verify"])["findings"], json!([]), "{what}");
        node.kubelet.unpublish(&volume);
    }
}

#[test]
fn the_size_of_all_artifacts_is_limited_together() {
    let node = Node::start_configured(|_| {}, "limits: {unpackedBytes: 1500}\n");
    let large = || {
        let repository = unique("half");
        let layer = Layer::titled("x", crate::support::noise(1000, 3));
        Manifest::artifact([layer]).push(registry(), &repository, "v1");
        repository
    };
    let (one, two) = (large(), large());
    let volume = volume_of(&node, &list(&[&entry(&node, &one, "path: a")]));
    node.kubelet.publish_well(&volume);
    // One file that both have counts once.
    let same = list(&[&entry(&node, &one, "path: a"), &entry(&node, &two, "path: b")]);
    node.kubelet.publish_well(&volume_of(&node, &same));
    let other = unique("half");
    Manifest::artifact([Layer::titled("x", crate::support::noise(1000, 4))]).push(
        registry(),
        &other,
        "v1",
    );
    let text = list(&[&entry(&node, &one, "path: a"), &entry(&node, &other, "path: b")]);
    let message = node.kubelet.publish_badly(&volume_of(&node, &text), Code::FailedPrecondition);
    assert!(message.contains("unpackedBytes"), "{message}");
}

#[test]
fn the_example_of_the_documents_works() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let example = fs::read_to_string(root.join("examples/several-artifacts.yaml")).expect("it");
    let pod: serde_json::Value = serde_saphyr::from_str(&example).expect("a pod");
    let attributes = &pod["spec"]["volumes"][0]["csi"]["volumeAttributes"];
    let text = attributes["artifacts"].as_str().expect("a list");
    let page = fs::read_to_string(root.join("docs/how-to/several-artifacts.md")).expect("a page");
    let shown = |line: &str| page.lines().any(|of_page| of_page.trim_start() == line.trim_start());
    assert!(text.lines().all(shown), "the page shows another list");
    let node = Node::start();
    let layers = |titles: [&str; 2]| titles.map(|title| Layer::titled(title, title));
    Manifest::artifact(layers(["weights.safetensors", "README.md"])).push(
        registry(),
        "models/base",
        "v3",
    );
    Manifest::artifact(layers(["adapter.safetensors", "config.json"])).push(
        registry(),
        "models/adapter",
        "v7",
    );
    let archive = Tar::new().file("usr/local/bin/tool", 0o755, "tool").file("etc/x", 0o644, "");
    Image::new().layer(archive.finish()).push(registry(), "team/tools", "v1");
    let (_, tree) = mount(&node, &text.replace("registry.example.com", &node.proxy.host()));
    let expected = [
        "model-adapter/adapter.safetensors",
        "model-adapter/config.json",
        "model/weights.safetensors",
        "tools/tool",
    ];
    assert_eq!(tree.files(), expected);
}
