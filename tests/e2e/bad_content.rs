//! Tests registries and artifacts that lie, break, or demand too much: the right code, nothing left behind, and no
//! effect on others.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use serde_json::{Value, json};
use tonic::Code;

use crate::support::{
    Answer, AnswerBody, FakeRegistry, Image, Layer, Manifest, Node, OCI_MANIFEST, OCI_TAR,
    OCI_TAR_GZIP, Tar, Tree, Volume, digest, gzip, unique,
};

/// The text in everything that must never reach the store.
const MARKER: &str = "marker-of-a-bad-artifact";

/// A node with a good volume, and a hostile registry.
struct HostileScene {
    node: Node,
    fake: FakeRegistry,
    good: Volume,
    good_tree: Tree,
    good_reference: String,
}

impl HostileScene {
    fn new() -> Self {
        let node = Node::start();
        let good_reference = node.proxy.reference(&node.small_artifact().name);
        let (good, good_tree) = node.mount(&good_reference);
        Self { node, fake: FakeRegistry::new(), good, good_tree, good_reference }
    }

    /// Publishes `hostile:tag` and expects this refusal. Returns its message.
    #[track_caller]
    fn refused(&self, tag: &str, code: Code) -> String {
        self.refused_with(tag, code, |volume| volume)
    }

    #[track_caller]
    fn refused_with(&self, tag: &str, code: Code, change: impl FnOnce(Volume) -> Volume) -> String {
        let volume = change(self.node.kubelet.new_volume(&self.fake.reference(tag)));
        // Slow machines need more than one call for large content, as with the kubelet.
        let mut answer = self.node.kubelet.publish(&volume);
        for _ in 0..4 {
            if answer.as_ref().is_err_and(|status| status.code() == Code::Aborted) {
                answer = self.node.kubelet.publish(&volume);
            }
        }
        let status = answer.expect_err("bad content is refused");
        assert_eq!(status.code(), code, "{}", status.message());
        volume.assert_nothing_left();
        let message = status.message().to_owned();
        assert!(!self.node.store_holds(MARKER.as_bytes()), "the store keeps bad content");
        assert!(!message.contains(MARKER), "the message repeats what the registry sent: {message}");
        assert_eq!(Tree::of(self.good.target()), self.good_tree, "another volume changed");
        let (after, _) = self.node.mount(&self.good_reference);
        self.node.kubelet.unpublish(&after);
        message
    }

    /// Serves this manifest unchanged under a tag of its own, and expects this refusal.
    #[track_caller]
    fn manifest_refused(&self, manifest: &Value, code: Code) -> String {
        let tag = unique("tag");
        self.fake.put_json(&tag, manifest);
        self.refused(&tag, code)
    }

    /// Serves an image of one layer with this archive and expects this refusal.
    #[track_caller]
    fn archive_refused(&self, archive: Vec<u8>, code: Code) -> String {
        self.image_refused(&Image::new().layer(archive), code)
    }

    #[track_caller]
    fn image_refused(&self, image: &Image, code: Code) -> String {
        let tag = unique("tag");
        image.push(&self.fake, "hostile", &tag);
        self.refused(&tag, code)
    }

    /// Serves an artifact of these titled files and expects this refusal.
    #[track_caller]
    fn titles_refused(&self, titles: &[&str]) -> String {
        let layers = titles
            .iter()
            .enumerate()
            .map(|(index, title)| Layer::titled(title, format!("{MARKER} {index}")));
        let tag = unique("tag");
        Manifest::artifact(layers).push(&self.fake, "hostile", &tag);
        self.refused(&tag, Code::FailedPrecondition)
    }
}

/// Returns a manifest of one titled file, with its blob in the registry.
fn one_file(fake: &FakeRegistry, content: &str) -> Manifest {
    let manifest = Manifest::artifact([Layer::titled("file", content)]);
    manifest.push_blobs(fake, "hostile");
    manifest
}

#[test]
fn what_the_registry_says_decides_the_code() {
    let scene = HostileScene::new();
    for (status, code) in [
        (401, Code::Unauthenticated),
        (403, Code::PermissionDenied),
        (404, Code::NotFound),
        (429, Code::Unavailable),
        (500, Code::Unavailable),
        (502, Code::Unavailable),
        (503, Code::Unavailable),
    ] {
        scene.fake.script(move |_| Some(Answer::bytes(MARKER).with_status(status)));
        let message = scene.refused(&format!("status-{status}"), code);
        assert!(message.contains("hostile"), "{message}");
    }
}

#[test]
fn codes_of_the_distribution_specification_decide_too() {
    let scene = HostileScene::new();
    for (status, error, code) in [
        (404, "MANIFEST_UNKNOWN", Code::NotFound),
        (404, "NAME_UNKNOWN", Code::NotFound),
        (401, "UNAUTHORIZED", Code::Unauthenticated),
        (403, "DENIED", Code::PermissionDenied),
        (429, "TOOMANYREQUESTS", Code::Unavailable),
    ] {
        scene.fake.script(move |_| Some(Answer::error(status, error)));
        scene.refused(&format!("error-{status}-{}", error.to_lowercase()), code);
    }
}

#[test]
fn a_blob_that_is_gone_is_not_found() {
    let scene = HostileScene::new();
    let manifest = Manifest::artifact([Layer::titled("file", "never pushed")]);
    scene.manifest_refused(&manifest.json(), Code::NotFound);
}

#[test]
fn a_manifest_that_is_not_what_its_digest_says_is_refused() {
    let scene = HostileScene::new();
    let good = one_file(&scene.fake, "x").json().to_string();
    let other = one_file(&scene.fake, "y").json().to_string();
    let asked = digest(good.as_bytes());
    scene.fake.script(move |request| {
        request
            .path
            .contains("/manifests/sha256:")
            .then(|| Answer::bytes(other.clone()).with_header("content-type", OCI_MANIFEST))
    });
    let reference = format!("{}/hostile@{asked}", scene.fake.host());
    let volume = scene.node.kubelet.new_volume(&reference);
    scene.node.kubelet.publish_badly(&volume, Code::Internal);
}

#[test]
fn a_manifest_that_is_too_large_is_refused_without_reading_it_all() {
    let scene = HostileScene::new();
    let mut manifest = one_file(&scene.fake, "x").json();
    manifest["annotations"] = json!({"padding": "p".repeat(5 << 20)});
    scene.manifest_refused(&manifest, Code::FailedPrecondition);
    // Also if its size is not announced.
    scene.fake.script(|request| {
        request
            .path
            .contains("/manifests/")
            .then(|| Answer::body(AnswerBody::Endless).with_header("content-type", OCI_MANIFEST))
    });
    scene.refused("endless", Code::FailedPrecondition);
}

#[test]
fn a_manifest_that_is_no_manifest_is_refused() {
    let scene = HostileScene::new();
    for (index, body) in
        ["", "not JSON", "null", "[]", "\"text\"", "12", "{\"schemaVersion\":", "{}", "\u{0}\u{1}"]
            .into_iter()
            .enumerate()
    {
        let tag = format!("body-{index}");
        scene.fake.put_manifest(&tag, OCI_MANIFEST, body);
        let status = scene
            .node
            .kubelet
            .publish(&scene.node.kubelet.new_volume(&scene.fake.reference(&tag)))
            .expect_err("not a manifest");
        assert!(
            matches!(status.code(), Code::Internal | Code::FailedPrecondition),
            "{body}: {:?}: {}",
            status.code(),
            status.message()
        );
    }
    scene.node.mount(&scene.good_reference);
}

#[test]
fn an_unsupported_media_type_is_refused_by_name() {
    let scene = HostileScene::new();
    for kind in [
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
        "text/html",
        "application/vnd.test.unknown+json",
    ] {
        let tag = unique("kind");
        scene.fake.put_manifest(
            &tag,
            kind,
            json!({"schemaVersion": 2, "mediaType": kind}).to_string(),
        );
        let message = scene.refused(&tag, Code::FailedPrecondition);
        assert!(message.contains(kind), "{message}");
    }
}

type Change = fn(&mut Value);

#[test]
fn a_manifest_with_wrong_members_is_refused() {
    let scene = HostileScene::new();
    let good = one_file(&scene.fake, "x").json();
    let changes: [(&str, Change); 12] = [
        ("no layers", |manifest| {
            manifest.as_object_mut().expect("an object").remove("layers");
        }),
        ("layers that are no list", |manifest| manifest["layers"] = json!("x")),
        ("a layer that is no object", |manifest| manifest["layers"] = json!([1])),
        ("a negative size", |manifest| manifest["layers"][0]["size"] = json!(-1)),
        ("an absurd size", |manifest| manifest["layers"][0]["size"] = json!(u64::MAX)),
        ("a size with a fraction", |manifest| manifest["layers"][0]["size"] = json!(1.5)),
        ("no size", |manifest| {
            manifest["layers"][0].as_object_mut().expect("an object").remove("size");
        }),
        ("no digest", |manifest| {
            manifest["layers"][0].as_object_mut().expect("an object").remove("digest");
        }),
        ("a digest that is a path", |manifest| {
            manifest["layers"][0]["digest"] = json!("sha256:../../../etc/passwd");
        }),
        ("a short digest", |manifest| manifest["layers"][0]["digest"] = json!("sha256:abcd")),
        ("an unknown algorithm", |manifest| {
            manifest["layers"][0]["digest"] = json!("md5:d41d8cd98f00b204e9800998ecf8427e");
        }),
        ("annotations that are no texts", |manifest| {
            manifest["layers"][0]["annotations"] = json!({"a": 1});
        }),
    ];
    for (what, change) in changes {
        let mut manifest = good.clone();
        change(&mut manifest);
        let tag = unique("members");
        scene.fake.put_json(&tag, &manifest);
        let status = scene
            .node
            .kubelet
            .publish(&scene.node.kubelet.new_volume(&scene.fake.reference(&tag)))
            .err()
            .unwrap_or_else(|| panic!("{what} was accepted"));
        assert!(
            matches!(
                status.code(),
                Code::FailedPrecondition | Code::Internal | Code::ResourceExhausted
            ),
            "{what}: {:?}: {}",
            status.code(),
            status.message()
        );
    }
    scene.node.mount(&scene.good_reference);
}

#[test]
fn an_artifact_larger_than_the_disk_is_refused_before_its_first_byte() {
    let scene = HostileScene::new();
    let mut manifest = one_file(&scene.fake, "x").json();
    manifest["layers"][0]["size"] = json!(1_u64 << 50);
    let tag = unique("huge");
    scene.fake.put_json(&tag, &manifest);
    let volume = scene.node.kubelet.new_volume(&scene.fake.reference(&tag));
    let status = scene.node.kubelet.publish(&volume).expect_err("a petabyte");
    assert!(
        matches!(status.code(), Code::ResourceExhausted | Code::FailedPrecondition),
        "{:?}: {}",
        status.code(),
        status.message()
    );
    assert!(scene.fake.requests().iter().all(|request| !request.path.contains("/blobs/")));
}

#[test]
fn too_many_layers_are_refused() {
    let scene = HostileScene::new();
    let mut manifest = one_file(&scene.fake, "x").json();
    let layer = json!({"mediaType": "a/b", "digest": digest(b"x"), "size": 1});
    manifest["layers"] = Value::Array(vec![layer; 10_001]);
    scene.manifest_refused(&manifest, Code::FailedPrecondition);
}

#[test]
fn a_blob_that_is_not_what_its_digest_says_is_refused() {
    let scene = HostileScene::new();
    let promised = "p".repeat(MARKER.len());
    let manifest = one_file(&scene.fake, &promised);
    scene.fake.put_lying_blob(&digest(promised.as_bytes()), MARKER);
    scene.manifest_refused(&manifest.json(), Code::Internal);
}

#[test]
fn a_blob_of_another_size_is_refused() {
    let scene = HostileScene::new();
    for (content, size) in [(MARKER, MARKER.len() - 1), (MARKER, MARKER.len() + 1), (MARKER, 0)] {
        let mut manifest = one_file(&scene.fake, content).json();
        manifest["layers"][0]["size"] = json!(size);
        scene.manifest_refused(&manifest, Code::Internal);
    }
}

#[test]
fn a_blob_without_an_end_is_refused() {
    let scene = HostileScene::new();
    let manifest = one_file(&scene.fake, "promised to be short");
    scene.fake.script(|request| {
        request.path.contains("/blobs/").then(|| Answer::body(AnswerBody::Endless))
    });
    scene.manifest_refused(&manifest.json(), Code::Internal);
}

#[test]
fn a_connection_that_breaks_is_tried_again_and_goes_on() {
    let scene = HostileScene::new();
    let content = crate::support::noise(1 << 20, 11);
    let manifest = Manifest::artifact([Layer::titled("file", content.clone())]);
    manifest.push(&scene.fake, "hostile", "v1");
    let tries = Arc::new(AtomicUsize::new(0));
    let (seen, bytes) = (Arc::clone(&tries), content.clone());
    scene.fake.script(move |request| {
        let first = request.path.contains("/blobs/") && seen.fetch_add(1, Ordering::SeqCst) == 0;
        first.then(|| {
            Answer::body(AnswerBody::Broken {
                announced: bytes.len() as u64,
                bytes: bytes[..bytes.len() / 2].to_vec().into(),
            })
        })
    });
    let volume = scene.node.kubelet.new_volume(&scene.fake.reference("v1"));
    scene.node.kubelet.publish_well(&volume);
    assert_eq!(std::fs::read(volume.target().join("file")).expect("the file"), content);
}

#[test]
fn a_blob_that_always_breaks_off_is_refused() {
    let scene = HostileScene::new();
    let manifest = one_file(&scene.fake, MARKER);
    scene.fake.script(|request| {
        request.path.contains("/blobs/").then(|| {
            let bytes = MARKER.as_bytes()[..4].to_vec().into();
            Answer::body(AnswerBody::Broken { announced: MARKER.len() as u64, bytes })
        })
    });
    let tag = unique("broken");
    scene.fake.put_json(&tag, &manifest.json());
    let status = scene
        .node
        .kubelet
        .publish(&scene.node.kubelet.new_volume(&scene.fake.reference(&tag)))
        .expect_err("a blob that never comes whole");
    assert!(
        matches!(status.code(), Code::Internal | Code::Unavailable),
        "{:?}: {}",
        status.code(),
        status.message()
    );
}

#[test]
fn a_redirect_in_a_circle_ends() {
    let scene = HostileScene::new();
    let itself = format!("http://{}/v2/hostile/manifests/circle", scene.fake.host());
    scene.fake.script(move |_| Some(Answer::status(307).with_header("location", &itself)));
    let status = scene
        .node
        .kubelet
        .publish(&scene.node.kubelet.new_volume(&scene.fake.reference("circle")))
        .expect_err("a circle");
    assert_ne!(status.code(), Code::DeadlineExceeded);
    scene.node.mount(&scene.good_reference);
}

#[test]
fn inline_content_that_is_not_what_its_digest_says_is_refused() {
    let scene = HostileScene::new();
    let mut manifest = Manifest::artifact([Layer::titled("file", "right").inline()]).json();
    for data in [json!("d3Jvbmc="), json!("not base64!"), json!(""), json!(5)] {
        manifest["layers"][0]["data"] = data.clone();
        let tag = unique("inline");
        scene.fake.put_json(&tag, &manifest);
        let volume = scene.node.kubelet.new_volume(&scene.fake.reference(&tag));
        let status = scene
            .node
            .kubelet
            .publish(&volume)
            .err()
            .unwrap_or_else(|| panic!("{data} was accepted"));
        assert!(
            matches!(status.code(), Code::Internal | Code::FailedPrecondition | Code::NotFound),
            "{data}: {:?}: {}",
            status.code(),
            status.message()
        );
    }
}

#[test]
fn layers_that_do_not_decompress_are_refused() {
    let scene = HostileScene::new();
    let archive = Tar::new().file("file", 0o644, MARKER).finish();
    let compressed = gzip(&archive);
    let mut garbled = compressed.clone();
    let middle = garbled.len() / 2;
    garbled[middle..middle + 4].fill(0xff);
    for (what, bytes) in [
        ("not gzip", b"plain text".to_vec()),
        ("cut off", compressed[..compressed.len() - 12].to_vec()),
        ("garbled", garbled),
    ] {
        let image = Image::new().packed_layer(OCI_TAR_GZIP, bytes, &archive);
        let message = scene.image_refused(&image, Code::Internal);
        assert!(!message.is_empty(), "{what}");
    }
}

#[test]
fn archives_that_are_cut_off_are_refused() {
    let scene = HostileScene::new();
    let whole = Tar::new().file("file", 0o644, vec![b'x'; 5000]).unfinished();
    scene.archive_refused(whole[..2000].to_vec(), Code::Internal);
    scene.archive_refused(
        Tar::new().lying_file("file", 1 << 40, MARKER.as_bytes()).finish(),
        Code::Internal,
    );
    scene.archive_refused(vec![b'x'; 2048], Code::Internal);
}

#[test]
fn absolute_names_stay_in_the_volume() {
    let scene = HostileScene::new();
    Image::new().layer(Tar::new().file("/etc/absolute", 0o644, "x").finish()).push(
        &scene.fake,
        "hostile",
        "absolute",
    );
    let volume = scene.node.kubelet.new_volume(&scene.fake.reference("absolute"));
    scene.node.kubelet.publish_well(&volume);
    assert_eq!(Tree::of(volume.target()).files(), ["etc/absolute"]);
    assert!(!std::path::Path::new("/etc/absolute").exists());
}

#[test]
fn names_that_climb_are_refused() {
    let scene = HostileScene::new();
    for name in ["../climb", "/../climb", "a/../../climb", "a/../b", "/a/..", ".."] {
        scene.archive_refused(
            Tar::new().file(name, 0o644, MARKER).finish(),
            Code::FailedPrecondition,
        );
    }
    let folder = Tar::new().folder("../climb", 0o755).finish();
    scene.archive_refused(folder, Code::FailedPrecondition);
}

#[test]
fn names_through_a_link_of_their_own_layer_stay_inside() {
    let scene = HostileScene::new();
    for (target, place) in [
        ("/etc", "etc/through"),
        ("../../../../etc", "etc/through"),
        ("..", "through"),
        ("inside", "inside/through"),
        ("/", "through"),
    ] {
        let archive = Tar::new().folder("inside", 0o755).symbolic_link("link", target).file(
            "link/through",
            0o644,
            "x",
        );
        let tag = unique("own");
        Image::new().layer(archive.finish()).push(&scene.fake, "hostile", &tag);
        let volume = scene.node.kubelet.new_volume(&scene.fake.reference(&tag));
        scene.node.kubelet.publish_well(&volume);
        assert!(Tree::of(volume.target()).names().contains(&place), "{target}");
    }
    assert!(!std::path::Path::new("/etc/through").exists());
}

#[test]
fn names_through_links_without_end_are_refused() {
    let scene = HostileScene::new();
    // Each layer is valid by itself, and may stay in the store until it is evicted.
    let circle = Tar::new().symbolic_link("a", "b").symbolic_link("b", "a");
    scene.archive_refused(circle.file("a/x", 0o644, "x").finish(), Code::FailedPrecondition);
    let link = |tar: Tar, n| tar.symbolic_link(&format!("l{n}"), &format!("l{}", n + 1));
    let chain = (0..41).fold(Tar::new(), link).file("l0/x", 0o644, "x");
    scene.archive_refused(chain.finish(), Code::FailedPrecondition);
}

#[test]
fn a_sparse_file_that_expands_beyond_the_limits_is_refused() {
    let scene = HostileScene::new();
    for size in ["1000000000", "9000000000000000000"] {
        let records = [("GNU.sparse.size", size), ("GNU.sparse.numblocks", "0")];
        let archive = Tar::new().pax(&records).file("bomb", 0o644, "").file("m", 0o644, MARKER);
        scene.archive_refused(archive.finish(), Code::FailedPrecondition);
    }
}

#[test]
fn names_through_a_lower_layers_link_stay_inside() {
    let scene = HostileScene::new();
    for target in ["/etc", "../../../../etc", "/../../etc"] {
        let image = Image::new()
            .layer(Tar::new().symbolic_link("link", target).finish())
            .layer(Tar::new().file("link/through-lower", 0o644, "x").finish());
        let tag = unique("lower");
        image.push(&scene.fake, "hostile", &tag);
        let volume = scene.node.kubelet.new_volume(&scene.fake.reference(&tag));
        match scene.node.kubelet.publish(&volume) {
            // Like containerd: the link is followed inside the root.
            Ok(()) => assert!(volume.target().join("etc/through-lower").exists()),
            Err(status) => panic!("{target}: {}", status.message()),
        }
        assert!(
            !std::path::Path::new("/etc/through-lower").exists(),
            "the driver wrote outside of its store"
        );
    }
}

#[test]
fn hard_links_out_of_the_tree_are_refused() {
    let scene = HostileScene::new();
    for target in ["/etc/passwd", "../../etc/passwd", "a/../../x"] {
        scene.archive_refused(
            Tar::new().hard_link("link", target).finish(),
            Code::FailedPrecondition,
        );
    }
    let through = Tar::new().symbolic_link("s", "/etc").hard_link("link", "s/passwd").finish();
    scene.archive_refused(through, Code::FailedPrecondition);
}

#[test]
fn hard_links_to_nothing_are_refused() {
    let scene = HostileScene::new();
    let status = {
        let tag = unique("dangling");
        Image::new().layer(Tar::new().hard_link("link", "nothing").finish()).push(
            &scene.fake,
            "hostile",
            &tag,
        );
        scene.node.kubelet.publish(&scene.node.kubelet.new_volume(&scene.fake.reference(&tag)))
    };
    let status = status.expect_err("a link to nothing");
    assert!(
        matches!(status.code(), Code::FailedPrecondition | Code::Internal),
        "{}",
        status.message()
    );
}

#[test]
fn whiteouts_cannot_reach_out_of_the_tree() {
    let scene = HostileScene::new();
    for name in ["../.wh.x", ".wh...", ".wh..", "/.wh.etc", "a/.wh.../b"] {
        let image = Image::new()
            .layer(Tar::new().file("kept", 0o644, "kept").finish())
            .layer(Tar::new().file(name, 0o644, "").finish());
        let tag = unique("whiteout");
        image.push(&scene.fake, "hostile", &tag);
        let volume = scene.node.kubelet.new_volume(&scene.fake.reference(&tag));
        match scene.node.kubelet.publish(&volume) {
            // As in containerd, only the last name of an entry makes a whiteout.
            Ok(()) if name == "a/.wh.../b" => assert!(volume.target().join(name).is_file()),
            Ok(()) => assert_eq!(Tree::of(volume.target()).names(), ["kept"], "{name}"),
            Err(status) => {
                assert_eq!(status.code(), Code::FailedPrecondition, "{name}: {}", status.message());
            }
        }
        assert_eq!(Tree::of(scene.good.target()), scene.good_tree);
    }
}

#[test]
fn devices_and_fifos_are_not_made() {
    let scene = HostileScene::new();
    for kind in [b'3', b'4', b'6'] {
        let tag = unique("special");
        let archive = Tar::new().special("dev/special", kind, "").file("f", 0o644, "x").finish();
        Image::new().layer(archive).push(&scene.fake, "hostile", &tag);
        let volume = scene.node.kubelet.new_volume(&scene.fake.reference(&tag));
        scene.node.kubelet.publish_well(&volume);
        assert_eq!(Tree::of(volume.target()).names(), ["dev", "f"]);
    }
}

#[test]
fn a_file_where_the_same_layer_has_a_directory_harms_no_other_volume() {
    let scene = HostileScene::new();
    let archives = [
        Tar::new().folder("x", 0o755).file("x/inner", 0o644, "i").file("x", 0o644, "file"),
        Tar::new().file("x", 0o644, "file").file("x/inner", 0o644, "i"),
        Tar::new().file("x", 0o644, "one").file("x", 0o755, "two"),
        Tar::new().folder("x", 0o755).folder("x", 0o700),
        Tar::new().symbolic_link("x", "/etc").folder("x", 0o755).file("x/passwd", 0o644, MARKER),
        Tar::new().file("", 0o644, "no name"),
        Tar::new().file("./", 0o644, "the root as a file"),
        Tar::new().symbolic_link("./", "/etc").file("passwd", 0o644, MARKER),
    ];
    for (index, archive) in archives.into_iter().enumerate() {
        let tag = unique("collision");
        Image::new().layer(archive.finish()).push(&scene.fake, "hostile", &tag);
        let volume = scene.node.kubelet.new_volume(&scene.fake.reference(&tag));
        match scene.node.kubelet.publish(&volume) {
            Ok(()) => {
                let tree = Tree::of(volume.target());
                scene.node.kubelet.unpublish(&volume);
                assert!(tree.entries.len() <= 2, "{index}: {tree:?}");
            }
            Err(status) => assert!(
                matches!(status.code(), Code::FailedPrecondition | Code::Internal),
                "{index}: {:?}: {}",
                status.code(),
                status.message()
            ),
        }
    }
    assert_eq!(Tree::of(scene.good.target()), scene.good_tree);
}

#[test]
fn the_last_of_two_entries_with_one_name_wins_as_tar_does() {
    let scene = HostileScene::new();
    let archive =
        Tar::new().file("x", 0o644, "one").file("y", 0o644, "between").file("x", 0o755, "two");
    Image::new().layer(archive.finish()).push(&scene.fake, "hostile", "twice");
    let volume = scene.node.kubelet.new_volume(&scene.fake.reference("twice"));
    scene.node.kubelet.publish_well(&volume);
    assert_eq!(std::fs::read_to_string(volume.target().join("x")).expect("the file"), "two");
    assert_eq!(Tree::of(volume.target()).mode("x"), 0o755);
}

#[test]
fn names_and_paths_that_are_too_long_or_too_deep_are_refused() {
    let scene = HostileScene::new();
    let name = "n".repeat(256);
    let deep = vec!["d"; 257].join("/");
    let path = vec!["p".repeat(200); 21].join("/");
    for name in [name, deep, path] {
        scene.archive_refused(
            Tar::new().file(&name, 0o644, MARKER).finish(),
            Code::FailedPrecondition,
        );
    }
}

#[test]
fn bombs_are_refused() {
    let scene = HostileScene::new();
    // A hundred mebibytes of zeros are a hundred kibibytes of gzip.
    let archive = Tar::new().file("zeros", 0o644, vec![0; 100 << 20]).finish();
    scene.archive_refused(archive, Code::FailedPrecondition);
}

#[test]
fn too_many_entries_are_refused() {
    let scene = HostileScene::new();
    // Not compressed, so that it is not refused as a bomb; with one name, so that it needs no million inodes.
    let archive = Tar::new().file("x", 0o644, "").unfinished().repeat(1_000_001);
    let image = Image::new().packed_layer(OCI_TAR, archive.clone(), &archive);
    scene.image_refused(&image, Code::FailedPrecondition);
}

#[test]
fn titles_that_leave_the_volume_are_refused() {
    let scene = HostileScene::new();
    for title in ["/etc/absolute", "../climb", "a/../../climb", "..", "a/.."] {
        let message = scene.titles_refused(&[title]);
        assert!(message.contains(title), "{message}");
    }
}

#[test]
fn titles_that_name_nothing_are_refused_or_taken_as_no_title() {
    let scene = HostileScene::new();
    for title in [".", "./", "/"] {
        let tag = unique("tag");
        Manifest::artifact([Layer::titled(title, MARKER)]).push(&scene.fake, "hostile", &tag);
        scene.refused(&tag, Code::FailedPrecondition);
    }
}

#[test]
fn two_layers_of_one_title_are_refused() {
    let scene = HostileScene::new();
    scene.titles_refused(&["same", "same"]);
    scene.titles_refused(&["a/same", "a//same"]);
    scene.titles_refused(&["same", "./same"]);
}

#[test]
fn a_title_where_another_has_a_folder_is_refused() {
    let scene = HostileScene::new();
    scene.titles_refused(&["a", "a/b"]);
    scene.titles_refused(&["a/b", "a"]);
}

#[test]
fn titles_that_are_too_long_or_too_deep_are_refused() {
    let scene = HostileScene::new();
    scene.titles_refused(&[&"n".repeat(256)]);
    scene.titles_refused(&[&vec!["d"; 257].join("/")]);
    scene.titles_refused(&["nul\0byte"]);
}

#[test]
fn an_unpacked_folder_may_not_leave_its_title() {
    let scene = HostileScene::new();
    for entry in ["../outside", "/outside"] {
        let archive = Tar::new().file(entry, 0o644, MARKER).finish();
        let layer = Layer::new(OCI_TAR_GZIP, gzip(&archive))
            .annotation("org.opencontainers.image.title", "d")
            .annotation("io.deis.oras.content.unpack", "true")
            .annotation("io.deis.oras.content.digest", &digest(&archive));
        let tag = unique("tag");
        Manifest::artifact([layer]).push(&scene.fake, "hostile", &tag);
        scene.refused(&tag, Code::FailedPrecondition);
    }
}

#[test]
fn nothing_selected_is_refused() {
    let scene = HostileScene::new();
    one_file(&scene.fake, MARKER).push(&scene.fake, "hostile", "v1");
    scene.refused_with("v1", Code::FailedPrecondition, |volume| {
        volume.attribute("include", "no/such/*")
    });
}

#[test]
fn an_index_that_contains_itself_or_more_indexes_ends() {
    let scene = HostileScene::new();
    let mut inner = one_file(&scene.fake, "x").json();
    let mut kind = OCI_MANIFEST;
    for _ in 0..20 {
        let bytes = inner.to_string();
        scene.fake.put_manifest(&unique("part"), kind, bytes.clone());
        kind = crate::support::OCI_INDEX;
        inner = json!({"schemaVersion": 2, "mediaType": kind, "manifests": [
            {"mediaType": inner["mediaType"], "digest": digest(bytes.as_bytes()), "size": bytes.len()}
        ]});
    }
    scene.manifest_refused(&inner, Code::FailedPrecondition);
}

#[test]
fn an_index_entry_of_another_size_is_refused() {
    let scene = HostileScene::new();
    let bytes = one_file(&scene.fake, "x").json().to_string();
    let digest = scene.fake.put_manifest("part", OCI_MANIFEST, bytes.clone());
    for size in [bytes.len() - 1, bytes.len() + 1] {
        let index = json!({"schemaVersion": 2, "mediaType": crate::support::OCI_INDEX, "manifests": [
            {"mediaType": OCI_MANIFEST, "digest": digest, "size": size}
        ]});
        scene.manifest_refused(&index, Code::Internal);
    }
}

#[test]
fn broken_model_metadata_is_refused() {
    let scene = HostileScene::new();
    for metadata in ["", "not JSON", "[]", "{\"mode\": -1}", "{\"mode\": \"0755\"}"] {
        let layer = Layer::new("application/vnd.cncf.model.weight.v1.raw", MARKER)
            .annotation("org.cncf.model.filepath", "file")
            .annotation("org.cncf.model.file.metadata+json", metadata);
        let tag = unique("model");
        Manifest::artifact([layer]).push(&scene.fake, "hostile", &tag);
        let volume = scene
            .node
            .kubelet
            .new_volume(&scene.fake.reference(&tag))
            .attribute("permissions", "Preserve");
        if let Err(status) = scene.node.kubelet.publish(&volume) {
            assert_eq!(status.code(), Code::FailedPrecondition, "{metadata}: {}", status.message());
        }
    }
}

#[test]
fn an_owner_that_no_file_can_have_is_refused_where_owners_are_kept() {
    let scene = HostileScene::new();
    let nobody = u64::from(u32::MAX);
    for owner in [(nobody, 0), (0, nobody)] {
        let archive = Tar::new().owned_file("file", 0o644, owner, MARKER).finish();
        let tag = unique("owner");
        Image::new().layer(archive).push(&scene.fake, "hostile", &tag);
        let preserve = |volume: Volume| volume.attribute("permissions", "Preserve");
        let message = scene.refused_with(&tag, Code::FailedPrecondition, preserve);
        assert!(message.contains("4294967295") && message.contains("Readable"), "{message}");
    }
    let (uid, gid) = (nobody, 0);
    let layer = Layer::new("application/vnd.cncf.model.weight.v1.raw", MARKER)
        .annotation("org.cncf.model.filepath", "file")
        .annotation(
            "org.cncf.model.file.metadata+json",
            &json!({"mode": 420, "uid": uid, "gid": gid}).to_string(),
        );
    let tag = unique("owner");
    Manifest::artifact([layer]).push(&scene.fake, "hostile", &tag);
    let preserve = |volume: Volume| volume.attribute("permissions", "Preserve");
    let message = scene.refused_with(&tag, Code::FailedPrecondition, preserve);
    assert!(message.contains("4294967295"), "{message}");
    // If everything belongs to root, ownership is not demanded.
    let volume = scene.node.kubelet.new_volume(&scene.fake.reference(&tag));
    scene.node.kubelet.publish_well(&volume);
}
