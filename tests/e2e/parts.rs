//! Tests the attribute `subPath`: a folder of an artifact as the root of a volume, or one file as its content.

use std::{fs, os::unix::fs::MetadataExt as _};

use tonic::Code;

use crate::support::{
    Admin, Image, Layer, Manifest, Node, Tar, Volume, digest, gzip, noise, registry, unique,
};

const TAR_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// Pushes an artifact of titled files and of a folder that ORAS packed.
fn artifact() -> String {
    let repository = unique("parts");
    let archive = Tar::new()
        .folder("docs", 0o755)
        .file("docs/de/a", 0o644, "a")
        .file("docs/de/run", 0o755, "run")
        .symbolic_link("docs/now", "de")
        .hard_link("docs/b", "docs/de/a")
        .finish();
    let folder = Layer::new(TAR_GZIP, gzip(&archive))
        .annotation("org.opencontainers.image.title", "docs")
        .annotation("io.deis.oras.content.unpack", "true");
    let files = ["model/weights.bin", "model/config.json", "README.md"]
        .map(|title| Layer::titled(title, content(&repository, title)));
    Manifest::artifact(files.into_iter().chain([folder])).push(registry(), &repository, "v1");
    repository
}

fn content(repository: &str, title: &str) -> String {
    format!("{repository}: {title}")
}

fn part(volume: Volume, sub_path: &str) -> Volume {
    volume.attribute("subPath", sub_path)
}

#[test]
fn a_folder_is_shown_as_the_root_and_only_its_layers_are_fetched() {
    let node = Node::start();
    let repository = artifact();
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    for sub_path in ["model", "./model/", "model//"] {
        let (volume, tree) = node.mount_with(&reference, |volume| part(volume, sub_path));
        assert_eq!(tree.names(), ["config.json", "weights.bin"]);
        node.kubelet.unpublish(&volume);
    }
    for (title, fetches) in [("model/weights.bin", 1), ("README.md", 0)] {
        let blob = digest(content(&repository, title).as_bytes());
        assert_eq!(node.proxy.fetches(&blob), fetches, "{title}");
    }
    let (volume, tree) = node.mount_with(&reference, |volume| part(volume, "docs/de"));
    assert_eq!(tree.names(), ["a", "run"]);
    assert_eq!(tree.mode("run"), 0o755);
    // Outside of the part the file has another name.
    let file = fs::metadata(volume.target().join("a")).expect("shown");
    let (_, whole) = node.mount_with(&reference, |volume| volume);
    assert_eq!(whole.files().len(), 7);
    assert_eq!(file.len(), 1);
}

#[test]
fn a_file_is_the_only_content_under_its_own_name() {
    let node = Node::start();
    let repository = artifact();
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let (volume, tree) = node.mount_with(&reference, |volume| part(volume, "model/config.json"));
    assert_eq!(tree.names(), ["config.json"]);
    assert_eq!(volume.text("config.json"), content(&repository, "model/config.json"));
    assert_eq!(fs::metadata(volume.target()).expect("the root").mode() & 0o7777, 0o755);
    assert_eq!(node.proxy.fetches("/blobs/"), 1, "only its own layer is fetched");
}

#[test]
fn a_part_of_an_image_is_found_through_its_links_and_keeps_its_owner() {
    let node = Node::start();
    let repository = unique("image-parts");
    let lower = Tar::new()
        .owned_folder("opt", 0o755, (0, 0))
        .owned_folder("opt/v1", 0o750, (1000, 1001))
        .owned_file("opt/v1/tool", 0o750, (1000, 1001), "tool")
        .symbolic_link("opt/now", "/opt/v1")
        .symbolic_link("opt/v1/up", "../../etc/passwd")
        .finish();
    let upper = Tar::new().file("opt/now/more", 0o644, "more").finish();
    Image::new().layer(lower).layer(upper).push(registry(), &repository, "v1");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let (volume, tree) = node.mount_with(&reference, |volume| {
        part(volume, "opt/now").attribute("permissions", "Preserve")
    });
    assert_eq!(tree.names(), ["more", "tool", "up"]);
    let root = fs::metadata(volume.target()).expect("the root");
    assert_eq!((root.mode() & 0o7777, root.uid(), root.gid()), (0o750, 1000, 1001));
    // A link out of the part stays as it is.
    let link = fs::read_link(volume.target().join("up")).expect("a link");
    assert_eq!(link.to_str(), Some("../../etc/passwd"));
    let (_, tree) = node.mount_with(&reference, |volume| part(volume, "opt/now/tool"));
    assert_eq!(tree.names(), ["tool"]);
}

#[test]
fn patterns_match_paths_of_the_artifact() {
    let node = Node::start();
    let reference = node.proxy.reference(&format!("{}:v1", artifact()));
    let (_, tree) = node.mount_with(&reference, |volume| {
        part(volume, "model").attribute("include", "model/*.json")
    });
    assert_eq!(tree.names(), ["config.json"]);
    let volume = part(node.kubelet.new_volume(&reference), "model").attribute("include", "*.json");
    let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
    assert!(message.contains("selected"), "{message}");
}

#[test]
fn a_part_that_is_not_there_is_refused_with_what_is() {
    let node = Node::start();
    let repository = artifact();
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    for (sub_path, expected) in [
        ("modle", "in \".\" is README.md, docs, model"),
        ("model/weights", "in \"model\" is config.json, weights.bin"),
        ("README.md/x", "in \".\" is"),
    ] {
        let volume = part(node.kubelet.new_volume(&reference), sub_path);
        let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
        assert!(message.contains(expected) && message.contains("subPath"), "{message}");
        volume.assert_nothing_left();
    }
    assert_eq!(node.proxy.fetches("/blobs/"), 0, "the titles tell");
    for (sub_path, expected) in [
        ("docs/fr", "in \"docs\" is de, now, b"),
        ("docs/now", "\"now\" is a symbolic link"),
        ("docs/now/a", "\"now\" is a symbolic link"),
        ("docs/b/x", "no folder"),
    ] {
        let volume = part(node.kubelet.new_volume(&reference), sub_path);
        let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
        assert!(message.contains(expected), "{message}");
    }
    for sub_path in ["/model", "../model", "model/..", "model/../docs"] {
        let volume = part(node.kubelet.new_volume(&reference), sub_path);
        let message = node.kubelet.publish_badly(&volume, Code::InvalidArgument);
        assert!(message.contains("subPath"), "{message}");
    }
}

#[test]
fn a_part_is_cached_verified_and_repaired_like_any_tree() {
    let (node, admin) =
        Admin::start("cache: {minFreePercent: 0, minFreeInodesPercent: 0, scrubInterval: 0}\n");
    let repository = unique("part");
    let files = ["a/one", "a/two", "b/three"].map(|title| Layer::titled(title, noise(5000, 7)));
    Manifest::artifact(files).push(registry(), &repository, "v1");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let (volume, sound) = node.mount_with(&reference, |volume| part(volume, "a"));
    assert_eq!(admin.json(&["verify"])["findings"], serde_json::json!([]));
    let listed = admin.json(&["ls"]);
    assert_eq!(listed["artifacts"][0]["subPath"], "a", "{listed}");
    node.proxy.go_down();
    let (_, shown) = node.mount_with(&reference, |volume| part(volume, "a"));
    assert_eq!(shown, sound);
    node.proxy.come_back();
    let trees = fs::read_dir(node.driver.state().join("trees")).expect("trees").flatten();
    for tree in trees {
        fs::remove_file(tree.path().join("1/root/one")).expect("a name of the tree");
    }
    let repaired = admin.json(&["verify", "--repair"]);
    assert_eq!(repaired["unrepaired"], 0, "{repaired}");
    let (_, shown) = node.mount_with(&reference, |volume| part(volume, "a"));
    assert_eq!(shown, sound);
    node.kubelet.unpublish(&volume);
    volume.assert_nothing_left();
}
