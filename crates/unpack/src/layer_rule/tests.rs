use serde_json::{Value, json};

use super::super::error::Class;
use super::super::volume_path::PathError;
use super::*;
use oci_types::manifest::Manifest;

const IMAGE_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
const TAR_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

fn layer(media_type: &str, annotations: &Value) -> Value {
    let digest = Digest::of(b"layer");
    json!({"mediaType": media_type, "digest": digest, "size": 5, "annotations": annotations})
}

fn titled(media_type: &str, title: &str) -> Value {
    layer(media_type, &json!({TITLE: title}))
}

fn untitled(media_type: &str) -> Value {
    layer(media_type, &json!({}))
}

fn rules_of(
    artifact_type: Option<&str>,
    config: &str,
    layers: &[Value],
) -> Result<Vec<LayerRule>, UnpackError> {
    rules_with(UnpackMode::Auto, artifact_type, config, layers)
}

fn rules_with(
    unpack: UnpackMode,
    artifact_type: Option<&str>,
    config: &str,
    layers: &[Value],
) -> Result<Vec<LayerRule>, UnpackError> {
    let config = layer(config, &json!({}));
    let manifest = json!({"schemaVersion": 2, "artifactType": artifact_type, "config": config, "layers": layers});
    let limits = Limits::default();
    let bytes = manifest.to_string();
    match Manifest::parse(bytes.as_bytes(), None, limits.manifest()).unwrap() {
        Manifest::Image(manifest) => classify(&manifest, unpack, &limits),
        Manifest::Index(_) => panic!("an index"),
    }
}

/// Returns rules as `file PATH`, `tar`, `image` or `skip`.
fn summary(artifact_type: Option<&str>, config: &str, layers: &[Value]) -> Vec<String> {
    summary_with(UnpackMode::Auto, artifact_type, config, layers)
}

fn summary_with(
    unpack: UnpackMode,
    artifact_type: Option<&str>,
    config: &str,
    layers: &[Value],
) -> Vec<String> {
    let text = |rule: &LayerRule| match rule {
        LayerRule::File(rule) => format!("file {}", rule.path),
        LayerRule::Archive(rule) if rule.whiteouts => "image".into(),
        LayerRule::Archive(ArchiveRule { within: Some(title), .. }) => format!("tar in {title}"),
        LayerRule::Archive(_) => "tar".into(),
        LayerRule::Skip => "skip".into(),
    };
    let rules = rules_with(unpack, artifact_type, config, layers);
    rules.unwrap().iter().map(text).collect()
}

fn artifact(layers: &[Value]) -> Vec<String> {
    summary(Some("application/x"), media_type::OCI_EMPTY, layers)
}

fn refusal(layers: &[Value]) -> UnpackError {
    let error = rules_of(None, "application/x", layers).expect_err("a refusal");
    assert_eq!(error.class(), Class::Refused);
    assert!(error.to_string().len() < 1024);
    error
}

#[test]
fn oras_files_and_folders() {
    let folder = json!({TITLE: "conf", ORAS_UNPACK: "true", ORAS_DIGEST: Digest::of(b"tar")});
    let layers = [
        titled(TAR, "bin/tool"),
        titled("application/x", "./a//b"),
        layer(TAR_GZIP, &folder),
        layer("application/x", &json!({TITLE: "c", ORAS_UNPACK: "false"})),
        untitled("application/x"),
        untitled(TAR_GZIP),
    ];
    let expected = ["file bin/tool", "file a/b", "tar in conf", "file c", "skip", "skip"];
    assert_eq!(artifact(&layers), expected);
    let rules = rules_of(None, "application/x", &layers).unwrap();
    let LayerRule::Archive(rule) = &rules[2] else { panic!("{rules:?}") };
    assert_eq!(rule.tar_digest, Some(Digest::of(b"tar")));
    assert_eq!(rule.decoder(), "tar");
}

#[test]
fn an_artifact_with_the_configuration_of_an_image_is_not_an_image() {
    let layers = [
        untitled(TAR),
        untitled(TAR_GZIP),
        untitled("application/vnd.oci.image.layer.v1.tar+zstd"),
        untitled("application/vnd.docker.image.rootfs.diff.tar.gzip"),
    ];
    assert_eq!(summary(None, IMAGE_CONFIG, &layers), ["image"; 4]);
    let docker = "application/vnd.docker.container.image.v1+json";
    assert_eq!(summary(None, docker, &layers), ["image"; 4]);
    // `oras push --artifact-platform` writes the configuration of an image.
    let expected =
        ["file layer-0.tar", "file layer-1.tar.gz", "file layer-2.tar.zst", "file layer-3.tar.gz"];
    assert_eq!(summary(Some("application/x"), IMAGE_CONFIG, &layers), expected);
}

#[test]
fn an_image_with_an_unknown_layer_is_refused() {
    let encrypted = format!("{TAR_GZIP}+encrypted");
    let error = rules_of(None, IMAGE_CONFIG, &[untitled(TAR), untitled(&encrypted)]).unwrap_err();
    assert!(matches!(error, UnpackError::MediaType { layer: 1, .. }));
    for config in [IMAGE_CONFIG, "application/x"] {
        let error = rules_of(None, config, &[untitled(&encrypted), untitled(&encrypted)]);
        assert!(matches!(error, Err(UnpackError::MediaType { layer: 0, .. })), "{config}");
    }
}

#[test]
fn model_pack_in_both_spellings() {
    let metadata = json!({"name": "f", "mode": 493, "uid": 1, "gid": 2, "size": 5, "mtime": "2025-01-01T00:00:00Z", "typeflag": 48});
    for vendor in ["cncf", "cnai"] {
        let kind = |suffix| format!("application/vnd.{vendor}.model.weight.config.v1.{suffix}");
        let path = |name: &str| json!({format!("org.{vendor}.model.filepath"): name});
        let mut raw = path("dir/config.json");
        raw[format!("org.{vendor}.model.file.metadata+json")] = metadata.to_string().into();
        let layers = [
            layer(&kind("raw"), &raw),
            layer(&kind("tar"), &path("d")),
            layer(&kind("tar+gzip"), &path("e")),
            layer(&kind("tar+zstd"), &json!({})),
        ];
        assert_eq!(artifact(&layers), ["file dir/config.json", "tar", "tar", "tar"]);
        let rules = rules_of(None, "application/x", &layers).unwrap();
        let LayerRule::File(rule) = &rules[0] else { panic!("{rules:?}") };
        assert_eq!(rule.recorded, Some(Permissions { mode: 0o755, uid: 1, gid: 2 }));
    }
    let both = json!({TITLE: "title", "org.cncf.model.filepath": "path"});
    assert_eq!(artifact(&[layer("application/vnd.cncf.model.doc.v1.raw", &both)]), ["file title"]);
    let unnamed = untitled("application/vnd.cncf.model.doc.v1.raw");
    assert_eq!(artifact(&[unnamed]), ["file layer-0"]);
}

#[test]
fn tars_of_kitops_and_of_dockers_models_are_unpacked_whatever_their_paths() {
    let at = |kind: &str| layer(kind, &json!({"org.cncf.model.filepath": "model.onnx"}));
    let kitops = "application/vnd.kitops.modelkit.model.v1.tar";
    let layers = [
        untitled(kitops),
        at(kitops),
        untitled("application/vnd.kitops.modelkit.dataset.v1.tar+gzip"),
        untitled("application/vnd.kitops.modelkit.code.v1.tar+zstd"),
        at("application/vnd.kitops.modelkit.model.v1.raw"),
        untitled("application/vnd.docker.ai.vllm.config.tar"),
        untitled("application/vnd.docker.ai.dir.tar"),
        untitled("application/vnd.docker.ai.gguf.v3"),
    ];
    let expected = ["tar", "tar", "tar", "tar", "file model.onnx", "tar", "tar", "skip"];
    assert_eq!(artifact(&layers), expected);
    let config = "application/vnd.docker.ai.model.config.v0.1+json";
    let untitled = [untitled("application/vnd.docker.ai.gguf.v3"), layers[5].clone()];
    assert_eq!(summary(None, config, &untitled), ["file layer-0.gguf", "tar"]);
}

#[test]
fn the_attribute_unpack_selects_every_tar_or_none() {
    let folder = layer(TAR_GZIP, &json!({TITLE: "d", ORAS_UNPACK: "true"}));
    let layers = [
        untitled(TAR_GZIP),
        untitled("application/x-tar"),
        untitled("application/vnd.acme.bundle"),
        untitled("application/vnd.acme.settings+json"),
        untitled(FLUX_CONTENT),
        untitled(HELM_CHART),
        untitled("application/vnd.kitops.modelkit.model.v1.tar"),
        untitled(media_type::OCI_EMPTY),
    ];
    let with = |unpack, layers: &[Value]| {
        summary_with(unpack, Some("application/x"), media_type::OCI_EMPTY, layers)
    };
    let always = ["tar", "tar", "tar", "file layer-3.json", "tar", "tar", "tar", "skip"];
    assert_eq!(with(UnpackMode::Always, &layers), always);
    let never = [
        "file layer-0.tar.gz",
        "file layer-1.tar",
        "file layer-2",
        "file layer-3.json",
        "file layer-4.tar.gz",
        "file chart.tgz",
        "file layer-6.tar",
        "skip",
    ];
    assert_eq!(with(UnpackMode::Never, &layers), never);
    let titled = [
        folder,
        titled(TAR, "notes.txt"),
        titled(TAR_GZIP, "a.TAR.gz"),
        titled("application/x", "b.tgz"),
        titled("application/vnd.acme.v1.tar+zstd", "c"),
        untitled("application/x-tar"),
        untitled("text/plain"),
    ];
    let always = ["tar in d", "file notes.txt", "tar", "tar", "tar", "tar", "skip"];
    assert_eq!(with(UnpackMode::Always, &titled), always);
    let never =
        ["file d", "file notes.txt", "file a.TAR.gz", "file b.tgz", "file c", "skip", "skip"];
    assert_eq!(with(UnpackMode::Never, &titled), never);
    for unpack in [UnpackMode::Always, UnpackMode::Never] {
        assert_eq!(summary_with(unpack, None, IMAGE_CONFIG, &[untitled(TAR)]), ["image"]);
        let encrypted = [untitled(&format!("{TAR_GZIP}+encrypted"))];
        let refused = rules_with(unpack, Some("application/x"), "application/x", &encrypted);
        assert!(matches!(refused, Err(UnpackError::MediaType { .. })), "{refused:?}");
    }
}

#[test]
fn charts_and_modules_have_known_names() {
    let helm = [untitled(HELM_CHART), untitled(HELM_PROVENANCE)];
    assert_eq!(summary(None, HELM_CONFIG, &helm), ["file chart.tgz", "file chart.tgz.prov"]);
    assert_eq!(summary(None, HELM_CONFIG, &[untitled(HELM_OLD_CHART)]), ["file chart.tgz"]);
    let flux = "application/vnd.cncf.flux.config.v1+json";
    assert_eq!(summary(None, flux, &[untitled(FLUX_CONTENT)]), ["tar"]);
    let wasm = [untitled("application/wasm"), untitled("application/wasm")];
    let config = "application/vnd.wasm.config.v0+json";
    assert_eq!(summary(None, config, &wasm), ["file module.wasm", "file module-1.wasm"]);
}

#[test]
fn untitled_layers_are_named_by_their_index() {
    let layers = [
        untitled("application/vnd.docker.ai.gguf.v3"),
        untitled("application/vnd.ollama.image.model"),
        untitled("application/vnd.in-toto+json"),
        untitled("text/plain"),
        untitled(media_type::OCI_EMPTY),
        untitled("application/tar+gzip"),
    ];
    let expected = [
        "file layer-0.gguf",
        "file layer-1",
        "file layer-2.json",
        "file layer-3.txt",
        "skip",
        "file layer-5.tar.gz",
    ];
    assert_eq!(artifact(&layers), expected);
}

#[test]
fn titles_that_leave_the_volume_are_refused() {
    for (title, expected) in [
        ("/etc/passwd", PathError::Absolute),
        ("../x", PathError::Parent),
        ("a/../../x", PathError::Parent),
        (".", PathError::Root),
    ] {
        let error = refusal(&[titled(TAR, title)]);
        assert!(
            matches!(&error, UnpackError::Title { layer: 0, reason, .. } if *reason == expected),
            "{title}: {error:?}"
        );
    }
    let unpacked = layer(TAR, &json!({TITLE: "/abs", ORAS_UNPACK: "true"}));
    assert!(matches!(refusal(&[unpacked]), UnpackError::Title { .. }));
    assert!(matches!(refusal(&[titled(TAR, &"x".repeat(3000))]), UnpackError::Title { .. }));
}

#[test]
fn duplicate_and_colliding_titles_are_refused() {
    let folder = |title| layer(TAR, &json!({TITLE: title, ORAS_UNPACK: "true"}));
    let other = |mut layer: Value| {
        layer["digest"] = json!(Digest::of(b"other"));
        layer
    };
    for layers in [
        [titled(TAR, "a"), other(titled(TAR, "./a/"))],
        [titled(TAR, "a"), folder("a")],
        [folder("a"), other(folder("a"))],
    ] {
        let error = refusal(&layers);
        assert!(matches!(error, UnpackError::DuplicateTitle { first: 0, second: 1, .. }));
    }
    // The same content under the same title is taken once.
    let twice = [titled(TAR, "a"), titled("text/plain", "./a"), folder("b"), folder("b/")];
    assert_eq!(artifact(&twice), ["file a", "skip", "tar in b", "skip"]);
    let error = refusal(&[titled(TAR, "a/b/c"), titled(TAR, "a/b.c"), titled(TAR, "a")]);
    assert!(matches!(error, UnpackError::TitleBelowFile { other: 2, .. }), "{error:?}");
    assert_eq!(artifact(&[folder("a"), titled(TAR, "a/b"), folder("a/c")]).len(), 3);
}

#[test]
fn annotations_that_cannot_be_read_are_refused() {
    let digest = layer(TAR, &json!({TITLE: "a", ORAS_UNPACK: "true", ORAS_DIGEST: "sha512:00"}));
    let error = refusal(&[digest]);
    assert!(matches!(error, UnpackError::Annotation { annotation: ORAS_DIGEST, .. }));
    for metadata in ["", "{", r#"{"mode": -1}"#, r#"{"mode": "0644"}"#] {
        let raw = json!({TITLE: "a", FILE_METADATA[0]: metadata});
        let error = refusal(&[layer("application/vnd.cncf.model.doc.v1.raw", &raw)]);
        assert!(matches!(error, UnpackError::Annotation { .. }), "{metadata}");
    }
}

#[test]
fn a_layer_is_skipped_only_if_its_title_proves_it_unselected() {
    let folder = layer(TAR, &json!({TITLE: "conf", ORAS_UNPACK: "true"}));
    let model = layer("application/vnd.cncf.model.doc.v1.tar", &json!({TITLE: "docs"}));
    let layers = [titled(TAR, "bin/tool"), folder, model, untitled("application/x")];
    let rules = rules_of(None, "application/x", &layers).unwrap();
    let needed = |include, exclude| -> Vec<bool> {
        let selection = Selection::parse(include, exclude).unwrap();
        rules.iter().map(|rule| rule.is_needed(&selection)).collect()
    };
    assert_eq!(needed("", ""), [true, true, true, false]);
    assert_eq!(needed("bin", ""), [true, false, true, false]);
    assert_eq!(needed("*/x", ""), [false, true, true, false]);
    assert_eq!(needed("", "conf, bin/*"), [false, false, true, false]);
}

#[test]
fn a_layer_is_left_out_if_its_title_proves_it_outside_the_sub_path() {
    let folder = layer(TAR, &json!({TITLE: "conf/app", ORAS_UNPACK: "true"}));
    let layers = [titled(TAR, "bin/tool"), folder, titled(TAR, "conf/x"), untitled("x")];
    let rules = rules_of(None, "application/x", &layers).unwrap();
    let path = |text: &str| RelativePath::parse(text.as_bytes(), &Limits::default()).unwrap();
    let needed = |text| rules.iter().map(|rule| rule.may_have(&path(text))).collect::<Vec<_>>();
    assert_eq!(needed("."), [true, true, true, false]);
    assert_eq!(needed("bin"), [true, false, false, false]);
    assert_eq!(needed("bin/tool"), [true, false, false, false]);
    assert_eq!(needed("conf"), [false, true, true, false]);
    assert_eq!(needed("conf/app/a/b"), [false, true, false, false]);
    let missing = |text| match check_sub_path(&rules, &path(text)) {
        Err(UnpackError::SubPath { problem, .. }) => problem.to_string(),
        other => panic!("{text}: {other:?}"),
    };
    assert!(missing("con").ends_with("in \".\" is bin, conf"));
    assert!(missing("conf/y/z").ends_with("in \"conf\" is app, x"));
    assert!(missing("bin/tool/x").ends_with("in \"bin\" is tool"));
    let untitled = layer("application/vnd.cncf.model.doc.v1.tar", &json!({}));
    let rules = rules_of(None, "application/x", &[untitled]).unwrap();
    check_sub_path(&rules, &path("con")).expect("an archive may have anything");
}
