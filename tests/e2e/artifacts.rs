//! Artifacts of every kind, pushed by the clients of users if one makes the shape.

use std::{fs, os::unix::fs::symlink, process::Command};

use serde_json::json;
use tonic::Code;

use crate::support::{
    Image, Kind, Layer, Manifest, Node, OCI_CONFIG, OCI_MANIFEST, OCI_TAR_GZIP, Oras, Tar, Tree,
    digest, empty_config, gzip, node_architecture, push_index, registry, unique, zstandard,
};

const UNPACK: &str = "io.deis.oras.content.unpack";
const UNPACKED_DIGEST: &str = "io.deis.oras.content.digest";

/// Returns the tree that `oras pull` writes, with the modes that the contract gives to single files.
#[track_caller]
fn pulled(name: &str, arguments: &[&str]) -> Tree {
    let folder = Oras::pull(&format!("{}/{name}", registry().host()), arguments);
    Tree::of(folder.path())
}

fn extension(name: &str) -> Option<&str> {
    std::path::Path::new(name).extension()?.to_str()
}

fn comparable(tree: Tree) -> Tree {
    tree.without_times().without_folder_modes().without_sharing()
}

#[track_caller]
fn push(oras: &Oras, name: &str, arguments: &[&str]) -> String {
    oras.push(&format!("{}/{name}", registry().host()), arguments)
}

#[test]
fn oras_files_appear_under_their_titles_and_programs_run() {
    let node = Node::start();
    let name = format!("{}:v1", unique("files"));
    let script = "#!/bin/sh\necho runs from the volume\n";
    let program = fs::read("/bin/true").expect("a program");
    let oras = Oras::new()
        .file("bin/tool", 0o644, script)
        .file("bin/program", 0o644, &program)
        .file("config/settings.yml", 0o600, "a: 1\n")
        .file("top", 0o755, "text");
    push(
        &oras,
        &name,
        &[
            "--config",
            "/dev/null:application/vnd.custom.config.v1+json",
            "bin/tool:application/vnd.custom.binary.v1",
            "bin/program:application/vnd.custom.binary.v1",
            "config/settings.yml:application/vnd.custom.config.v1+yaml",
            "top",
        ],
    );
    let (volume, tree) = node.mount(&node.proxy.reference(&name));
    let expected = pulled(&name, &[])
        .with_file_modes(|name| if name.starts_with("bin/") { 0o555 } else { 0o444 });
    assert_eq!(comparable(tree), comparable(expected));
    let output = Command::new(volume.target().join("bin/tool")).output().expect("the script runs");
    assert_eq!(output.stdout, b"runs from the volume\n");
    let status =
        Command::new(volume.target().join("bin/program")).status().expect("the program runs");
    assert!(status.success());
}

#[test]
fn a_file_that_oras_types_as_a_tar_is_a_file() {
    let node = Node::start();
    let name = format!("{}:v1", unique("typed"));
    let oras = Oras::new().file("notes.txt", 0o644, "not an archive").file(
        "really.tar",
        0o644,
        Tar::new().file("inside", 0o644, "x").finish(),
    );
    push(&oras, &name, &["notes.txt", "really.tar"]);
    let (_, tree) = node.mount(&node.proxy.reference(&name));
    assert_eq!(comparable(tree), comparable(pulled(&name, &[]).with_file_modes(|_| 0o444)));
}

#[test]
fn an_oras_folder_is_unpacked_with_its_modes_and_links() {
    let node = Node::start();
    let name = format!("{}:v1", unique("folder"));
    let oras = Oras::new()
        .file("app/bin/run", 0o755, "#!/bin/sh\necho folder\n")
        .file("app/bin/private", 0o600, "private")
        .file("app/lib/deep/er/data", 0o640, "data")
        .link("app/latest", "bin/run");
    fs::create_dir(oras.path().join("app/empty")).expect("an empty folder");
    push(&oras, &name, &["app"]);
    let (volume, tree) = node.mount(&node.proxy.reference(&name));
    let mut source = Tree::of(oras.path()).readable();
    source = source.without_times().without_sharing();
    assert_eq!(tree.clone().without_times().without_sharing(), source);
    // The same result as the kind's own client, as far as that keeps metadata.
    assert_eq!(tree.names(), pulled(&name, &[]).names());
    let output =
        Command::new(volume.target().join("app/latest")).output().expect("the linked program runs");
    assert_eq!(output.stdout, b"folder\n");
}

#[test]
fn the_original_flows_push_script_is_no_image_though_its_configuration_is_typed_as_one() {
    let node = Node::start();
    let repository = unique("script");
    let reference = format!("{}/{repository}", registry().host());
    let mut entries = Vec::new();
    for architecture in ["amd64", "arm64"] {
        // The configuration that `oras push --artifact-platform` of newer versions creates.
        let config = json!({"architecture": architecture, "os": "linux"}).to_string();
        let oras = Oras::new()
            .file("bin/prometheus", 0o755, format!("#!/bin/sh\necho {architecture}\n"))
            .file("config/prometheus.yml", 0o644, "global: {}\n")
            .file("config.json", 0o644, config);
        let digest = oras.push(
            &format!("{reference}:v1-{architecture}"),
            &[
                "--artifact-type",
                "application/vnd.custom.prometheus.v1",
                "--config",
                &format!("config.json:{OCI_CONFIG}"),
                "bin:application/vnd.custom.binary.v1.tar+gzip",
                "config:application/vnd.custom.prometheus.config.v1.tar+gzip",
            ],
        );
        let fetched =
            oras.call(&["manifest", "fetch", "--plain-http", &format!("{reference}@{digest}")]);
        assert!(fetched.contains("artifactType"), "{fetched}");
        entries.push(json!({
            "mediaType": OCI_MANIFEST,
            "digest": digest,
            "size": fetched.trim_end().len(),
            "artifactType": "application/vnd.custom.prometheus.v1",
            "platform": {"os": "linux", "architecture": architecture},
        }));
    }
    push_index(registry(), &repository, "v1", &entries);

    let index = node.proxy.reference(&format!("{repository}:v1"));
    let (volume, tree) = node.mount(&index);
    assert_eq!(tree.files(), ["bin/prometheus", "config/prometheus.yml"]);
    let output =
        Command::new(volume.target().join("bin/prometheus")).output().expect("the program runs");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), node_architecture());

    for architecture in ["amd64", "arm64"] {
        let platform = format!("linux/{architecture}");
        let (volume, tree) =
            node.mount_with(&index, |volume| volume.attribute("platform", &platform));
        let text = fs::read_to_string(volume.target().join("bin/prometheus")).expect("the program");
        assert!(text.contains(architecture));
        let expected = pulled(&format!("{repository}:v1"), &["--platform", &platform]);
        assert_eq!(tree.files(), expected.files());
    }

    let volume = node.kubelet.new_volume(&index).attribute("platform", "linux/riscv64");
    let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
    assert!(message.contains("linux/amd64"), "the message names what there is: {message}");
}

#[test]
fn an_unpacked_folder_that_is_not_what_its_annotation_says_is_refused() {
    let node = Node::start();
    let archive = Tar::new()
        .folder("d", 0o755)
        .file("d/marker", 0o644, "annotated-with-another-digest")
        .finish();
    for (tag, annotated) in [("good", digest(&archive)), ("bad", digest(b"something else"))] {
        let repository = unique("annotated");
        let layer = Layer::new(OCI_TAR_GZIP, gzip(&archive))
            .annotation("org.opencontainers.image.title", "d")
            .annotation(UNPACK, "true")
            .annotation(UNPACKED_DIGEST, &annotated);
        Manifest::artifact([layer]).push(registry(), &repository, tag);
        let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:{tag}")));
        if tag == "good" {
            node.kubelet.publish_well(&volume);
            assert_eq!(Tree::of(volume.target()).names(), ["d", "d/marker"]);
        } else {
            // Other content, so that the store has nothing of it.
            node.kubelet.publish_badly(&volume, Code::Internal);
        }
    }
}

#[test]
fn configurations_of_no_bytes_of_two_and_of_any_kind_are_accepted() {
    let node = Node::start();
    let configurations = [
        Layer::new("application/vnd.unknown.config.v1+json", ""),
        empty_config(),
        Layer::new("application/vnd.custom.config.v1+json", "not JSON at all"),
        Layer::new("application/vnd.oci.image.config.v1+json", "{}"),
    ];
    for config in configurations {
        let repository = unique("config");
        let kind = config.media_type.clone();
        let mut manifest = Manifest::with_config(config, [Layer::titled("file", "content")]);
        manifest.artifact_type = Some("application/vnd.test.artifact.v1".to_owned());
        manifest.push(registry(), &repository, "v1");
        let (_, tree) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
        assert_eq!(tree.names(), ["file"], "{kind}");
    }
}

#[test]
fn inline_content_is_taken_from_the_manifest() {
    let node = Node::start();
    let repository = unique("inline");
    let mut manifest =
        Manifest::artifact([Layer::titled("inline.txt", "in the manifest").inline()]);
    manifest.config = manifest.config.inline();
    // A real registry requires the blobs; the driver must not fetch them.
    let mut kept = manifest.clone();
    kept.layers[0].inline = false;
    kept.config.inline = false;
    kept.push_blobs(registry(), &repository);
    manifest.push(registry(), &repository, "v1");
    let (volume, _) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    assert_eq!(
        fs::read_to_string(volume.target().join("inline.txt")).expect("the file"),
        "in the manifest"
    );
    assert_eq!(node.proxy.fetches("/blobs/"), 0);
}

#[test]
fn one_blob_under_two_titles_is_two_files_and_one_download() {
    let node = Node::start();
    let repository = unique("twice");
    let manifest = Manifest::artifact([
        Layer::titled("one", "same bytes"),
        Layer::titled("b/two", "same bytes"),
    ]);
    manifest.push(registry(), &repository, "v1");
    let (volume, tree) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    assert_eq!(tree.files(), ["b/two", "one"]);
    for file in ["one", "b/two"] {
        assert_eq!(fs::read_to_string(volume.target().join(file)).expect("the file"), "same bytes");
    }
    assert_eq!(node.proxy.fetches(&digest(b"same bytes")), 1);
}

#[test]
fn an_empty_file_is_a_file() {
    let node = Node::start();
    let repository = unique("empty");
    Manifest::artifact([Layer::titled("nothing", "")]).push(registry(), &repository, "v1");
    let (volume, _) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    assert_eq!(fs::read(volume.target().join("nothing")).expect("the file"), b"");
}

#[test]
fn titles_may_hold_blanks_and_any_script() {
    let node = Node::start();
    let repository = unique("titles");
    let titles =
        ["with blank", "тест/файл", "日本語.txt", "a,b", "-dash", ".hidden", "weird\"quote"];
    Manifest::artifact(titles.map(|title| Layer::titled(title, title))).push(
        registry(),
        &repository,
        "v1",
    );
    let (volume, _) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    for title in titles {
        assert_eq!(fs::read_to_string(volume.target().join(title)).expect("the file"), title);
    }
}

#[test]
fn untitled_layers_beside_titled_ones_are_skipped_as_oras_does() {
    let node = Node::start();
    let name = unique("mixed");
    let untitled = Layer::new("application/vnd.test.other.v1", "untitled");
    Manifest::artifact([Layer::titled("named", "content"), untitled]).push(registry(), &name, "v1");
    let (_, tree) = node.mount(&node.proxy.reference(&format!("{name}:v1")));
    assert_eq!(tree.names(), ["named"]);
    assert_eq!(tree.names(), pulled(&format!("{name}:v1"), &[]).names());
}

#[test]
fn untitled_layers_have_the_same_names_on_every_node() {
    let repository = unique("untitled");
    let layers = ["first", "second"].map(|text| Layer::new("application/vnd.test.other.v1", text));
    Manifest::artifact(layers).push(registry(), &repository, "v1");
    // One after the other: a thread has one mount namespace at a time.
    let trees = [(), ()].map(|()| {
        let node = Node::start();
        let (volume, tree) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
        node.kubelet.unpublish(&volume);
        tree.without_times()
    });
    assert_eq!(trees[0], trees[1]);
    assert_eq!(trees[0].files().len(), 2);
}

#[test]
fn an_index_leaves_attestations_out_and_takes_entries_without_platform_last() {
    let node = Node::start();
    let repository = unique("index");
    let manifest = |text: &str| Manifest::artifact([Layer::titled("file", text)]);
    let entry = |text: &str, platform: Option<(&str, &str)>| {
        let digest = manifest(text).push(registry(), &repository, &unique("part"));
        let mut entry = json!({
            "mediaType": OCI_MANIFEST, "digest": digest, "size": manifest(text).json().to_string().len(),
        });
        if let Some((os, architecture)) = platform {
            entry["platform"] = json!({"os": os, "architecture": architecture});
        }
        entry
    };
    let attestation = || entry("attestation", Some(("unknown", "unknown")));
    let here = node_architecture();
    let cases = [
        (
            "platform",
            vec![attestation(), entry("any", None), entry("node", Some(("linux", here)))],
            "node",
        ),
        (
            "fallback",
            vec![attestation(), entry("any", None), entry("other", Some(("linux", "s390x")))],
            "any",
        ),
        ("single", vec![entry("only", None)], "only"),
    ];
    for (tag, entries, expected) in cases {
        push_index(registry(), &repository, tag, &entries);
        let (volume, _) = node.mount(&node.proxy.reference(&format!("{repository}:{tag}")));
        assert_eq!(
            fs::read_to_string(volume.target().join("file")).expect("the file"),
            expected,
            "{tag}"
        );
    }
    push_index(registry(), &repository, "attested", &[attestation()]);
    let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:attested")));
    node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
    push_index(registry(), &repository, "nothing", &[]);
    let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:nothing")));
    node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
}

#[test]
fn a_docker_manifest_list_is_an_index() {
    let node = Node::start();
    let repository = unique("list");
    let image = Image::new().layer(Tar::new().file("etc/os", 0o644, "here").finish());
    let digest = image.push(registry(), &repository, "part");
    let list = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.list.v2+json",
        "manifests": [{
            "mediaType": OCI_MANIFEST,
            "digest": digest,
            "size": image.manifest().json().to_string().len(),
            "platform": {"os": "linux", "architecture": node_architecture()},
        }],
    });
    crate::support::put_json(registry(), &repository, "v1", &list);
    let (_, tree) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    assert_eq!(tree.files(), ["etc/os"]);
}

#[test]
fn a_single_manifest_for_another_platform_is_refused_when_a_platform_is_asked_for() {
    let node = Node::start();
    let repository = unique("platform");
    let image =
        Image::new().platform("linux", "s390x").layer(Tar::new().file("f", 0o644, "x").finish());
    image.push(registry(), &repository, "v1");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let volume = node.kubelet.new_volume(&reference).attribute("platform", "linux/amd64");
    node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
    node.mount_with(&reference, |volume| volume.attribute("platform", "linux/s390x"));
}

#[test]
fn a_fifo_in_a_pushed_folder_is_left_out_as_oras_does() {
    let node = Node::start();
    let name = format!("{}:v1", unique("fifo"));
    let oras = Oras::new().file("app/run", 0o755, "#!/bin/sh\n");
    crate::support::run(Command::new("mkfifo").arg(oras.path().join("app/pipe")));
    push(&oras, &name, &["app"]);
    let (_, tree) = node.mount(&node.proxy.reference(&name));
    assert_eq!(tree.names(), ["app", "app/run"]);
    assert_eq!(tree.names(), pulled(&name, &[]).names());
}

#[test]
fn null_annotations_and_a_configuration_without_size_are_taken_as_oras_takes_them() {
    let node = Node::start();
    let repository = unique("null");
    let manifest = Manifest::artifact([Layer::titled("file", "content")]);
    manifest.push_blobs(registry(), &repository);
    let mut json = manifest.json();
    json["layers"][0]["annotations"]["vnd.test.null"] = json!(null);
    json["annotations"] = json!({"vnd.test.null": null});
    // A registry that checks sizes would refuse the other one.
    crate::support::put_json(registry(), &repository, "v1", &json);
    let (_, tree) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    assert_eq!(tree.names(), pulled(&format!("{repository}:v1"), &[]).names());
    let fake = crate::support::FakeRegistry::new();
    manifest.push_blobs(&fake, "null");
    json["config"].as_object_mut().expect("an object").remove("size");
    crate::support::put_json(&fake, "null", "v1", &json);
    let (_, tree) = node.mount(&fake.reference("v1"));
    assert_eq!(tree.names(), ["file"]);
}

#[test]
fn modelkits_and_dockers_models_are_unpacked_as_they_are_pushed() {
    let node = Node::start();
    let archive = |name: &str| Tar::new().file(name, 0o644, format!("content of {name}")).finish();
    let repository = unique("kitops");
    let kind = |kind: &str| format!("application/vnd.kitops.modelkit.{kind}");
    let layers = [
        Layer::new(&kind("model.v1.tar"), archive("model/weights.bin")),
        Layer::new(&kind("dataset.v1.tar+gzip"), gzip(&archive("data/train.csv"))),
        Layer::new(&kind("docs.v1.tar+zstd"), zstandard(&archive("README.md"))),
    ];
    let config =
        Layer::new(&kind("config.v1+json"), json!({"manifestVersion": "1.0.0"}).to_string());
    let mut manifest = Manifest::with_config(config, layers);
    manifest.artifact_type = Some(kind("manifest.v1+json"));
    manifest.push(registry(), &repository, "v1");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let (_, tree) = node.mount(&reference);
    assert_eq!(tree.files(), ["README.md", "data/train.csv", "model/weights.bin"]);
    let (_, tree) = node.mount_with(&reference, |volume| volume.attribute("unpack", "Never"));
    assert_eq!(tree.files(), ["layer-0.tar", "layer-1.tar.gz", "layer-2.tar.zst"]);

    let repository = unique("docker-model");
    let layers = [
        Layer::new("application/vnd.docker.ai.safetensors", "weights"),
        Layer::new("application/vnd.docker.ai.vllm.config.tar", archive("config.json")),
        Layer::new("application/vnd.docker.ai.dir.tar", archive("vae/config.json")),
    ];
    let config = Layer::new("application/vnd.docker.ai.model.config.v0.1+json", "{}");
    Manifest::with_config(config, layers).push(registry(), &repository, "v1");
    let (_, tree) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    assert_eq!(tree.files(), ["config.json", "layer-0.safetensors", "vae/config.json"]);
}

#[test]
fn a_volume_says_whether_other_tars_are_unpacked() {
    let node = Node::start();
    let repository = unique("unpack");
    let archive = Tar::new().file("etc/settings", 0o644, "x").file("/rooted", 0o644, "y").finish();
    let layer = Layer::new("application/vnd.acme.bundle.v1.tar+gzip", gzip(&archive));
    Manifest::artifact([layer]).push(registry(), &repository, "v1");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    // One after the other: each is a tree of its own.
    for (unpack, expected) in [
        ("", &["layer-0.tar.gz"][..]),
        ("Always", &["etc/settings", "rooted"][..]),
        ("Never", &["layer-0.tar.gz"][..]),
        ("Auto", &["layer-0.tar.gz"][..]),
        ("Always", &["etc/settings", "rooted"][..]),
    ] {
        let (_, tree) = node.mount_with(&reference, |volume| volume.attribute("unpack", unpack));
        assert_eq!(tree.files(), expected, "{unpack}");
    }
    let volume = node.kubelet.new_volume(&reference).attribute("unpack", "always");
    let message = node.kubelet.publish_badly(&volume, Code::InvalidArgument);
    assert!(message.contains("Auto, Always or Never"), "{message}");
}

#[test]
fn models_of_both_names_show_their_files_under_their_paths() {
    let node = Node::start();
    for (vendor, prefix) in [("cncf", "org.cncf.model"), ("cnai", "org.cnai.model")] {
        let repository = unique("model");
        let kind =
            |kind: &str, form: &str| format!("application/vnd.{vendor}.model.{kind}.v1.{form}");
        let path = format!("{prefix}.filepath");
        let archive =
            |name: &str| Tar::new().file(name, 0o640, format!("content of {name}")).finish();
        let layers = [
            Layer::new(&kind("weight", "raw"), "raw weights")
                .annotation(&path, "weights/model.safetensors"),
            Layer::new(&kind("weight.config", "tar"), archive("config.json"))
                .annotation(&path, "config.json"),
            Layer::new(&kind("doc", "tar+gzip"), gzip(&archive("docs/README.md")))
                .annotation(&path, "docs/README.md"),
            Layer::new(&kind("dataset", "tar+zstd"), zstandard(&archive("data.bin")))
                .annotation(&path, "data.bin"),
        ];
        let config = Layer::new(
            &format!("application/vnd.{vendor}.model.config.v1+json"),
            json!({"descriptor": {"name": "model"}, "config": {}, "modelfs": {"type": "layers", "diffIds": []}}).to_string(),
        );
        let mut manifest = Manifest::with_config(config, layers);
        manifest.artifact_type = Some(format!("application/vnd.{vendor}.model.manifest.v1+json"));
        manifest.push(registry(), &repository, "v1");
        let (volume, tree) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
        assert_eq!(
            tree.files(),
            ["config.json", "data.bin", "docs/README.md", "weights/model.safetensors"]
        );
        assert_eq!(
            fs::read(volume.target().join("weights/model.safetensors")).expect("the file"),
            b"raw weights"
        );
        assert_eq!(
            fs::read(volume.target().join("data.bin")).expect("the file"),
            b"content of data.bin"
        );
        assert_eq!(tree.mode("config.json"), 0o644);
    }
}

#[test]
fn a_models_file_metadata_gives_mode_and_owner_when_preserved() {
    let node = Node::start();
    let repository = unique("model");
    let metadata = json!({
        "name": "tool.bin", "mode": 0o750, "uid": 1000, "gid": 1001, "size": 4,
        "mtime": "2020-01-02T03:04:05Z", "typeflag": 0,
    });
    let layer = Layer::new("application/vnd.cncf.model.code.v1.raw", "code")
        .annotation("org.cncf.model.filepath", "tool.bin")
        .annotation("org.cncf.model.file.metadata+json", &metadata.to_string());
    let mut manifest = Manifest::artifact([layer]);
    manifest.artifact_type = Some("application/vnd.cncf.model.manifest.v1+json".to_owned());
    manifest.push(registry(), &repository, "v1");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let (_, tree) =
        node.mount_with(&reference, |volume| volume.attribute("permissions", "Preserve"));
    assert_eq!(tree.mode("tool.bin"), 0o750);
    assert_eq!(tree.entry("tool.bin").owner, (1000, 1001));
    let (_, tree) = node.mount(&reference);
    assert_eq!(tree.mode("tool.bin"), 0o755);
    assert_eq!(tree.entry("tool.bin").owner, (0, 0));
}

#[test]
fn a_helm_chart_is_its_tgz() {
    let node = Node::start();
    let repository = unique("chart");
    let chart =
        gzip(&Tar::new().file("demo/Chart.yaml", 0o644, "name: demo\nversion: 1.2.3\n").finish());
    let config = Layer::new(
        "application/vnd.cncf.helm.config.v1+json",
        json!({"name": "demo", "version": "1.2.3", "apiVersion": "v2"}).to_string(),
    );
    let layer = Layer::new("application/vnd.cncf.helm.chart.content.v1.tar+gzip", chart.clone());
    Manifest::with_config(config, [layer]).push(registry(), &repository, "1.2.3");
    let (_, tree) = node.mount(&node.proxy.reference(&format!("{repository}:1.2.3")));
    let [name] = tree.names()[..] else { panic!("one file, not {tree:?}") };
    assert_eq!(extension(name), Some("tgz"), "{name}");
    assert_eq!(
        tree.entry(name).kind,
        Kind::File { sha256: crate::support::hexadecimal_sha256(&chart) }
    );
}

#[test]
fn a_flux_artifact_is_extracted() {
    let node = Node::start();
    let repository = unique("flux");
    let archive = Tar::new()
        .folder("apps", 0o755)
        .file("apps/deployment.yaml", 0o644, "kind: Deployment\n")
        .finish();
    let layer = Layer::new("application/vnd.cncf.flux.content.v1.tar+gzip", gzip(&archive));
    let config = Layer::new("application/vnd.cncf.flux.config.v1+json", "{}");
    Manifest::with_config(config, [layer]).push(registry(), &repository, "v1");
    let (_, tree) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    assert_eq!(tree.names(), ["apps", "apps/deployment.yaml"]);
}

#[test]
fn a_wasm_module_is_one_wasm_file() {
    let node = Node::start();
    let repository = unique("wasm");
    let module = b"\0asm\x01\0\0\0".to_vec();
    let config = Layer::new(
        "application/vnd.wasm.config.v0+json",
        json!({"architecture": "wasm", "os": "wasip1", "layerDigests": [digest(&module)]})
            .to_string(),
    );
    Manifest::with_config(config, [Layer::new("application/wasm", module.clone())]).push(
        registry(),
        &repository,
        "v1",
    );
    let (volume, tree) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    let [name] = tree.names()[..] else { panic!("one file, not {tree:?}") };
    assert_eq!(extension(name), Some("wasm"), "{name}");
    assert_eq!(fs::read(volume.target().join(name)).expect("the module"), module);
}

#[test]
fn a_link_in_the_artifact_can_not_be_used_to_read_the_node() {
    // Links may point anywhere, and the pod resolves them in its own root. The driver's own reads never follow one.
    let node = Node::start();
    let name = format!("{}:v1", unique("links"));
    let oras = Oras::new().file("d/file", 0o644, "x");
    symlink("file", oras.path().join("d/inside")).expect("a link");
    push(&oras, &name, &["d"]);
    let (_, tree) = node.mount(&node.proxy.reference(&name));
    assert_eq!(tree.entry("d/inside").kind, Kind::Link { target: "file".to_owned() });
}
