//! Every attribute of a volume, with good and bad values.

use tonic::Code;

use crate::support::{
    Image, Layer, Manifest, Node, SmallArtifact, Tar, Tree, digest, mounts_at, registry, unique,
};

type Attributes<'a> = &'a [(&'a str, &'a str)];

/// Publishes a small artifact with one attribute changed, and returns the refusal's message.
#[track_caller]
fn refusal(attributes: Attributes) -> String {
    let node = Node::start();
    let mut volume = node.kubelet.new_volume(&node.proxy.reference(&node.small_artifact().name));
    for (key, value) in attributes {
        volume = volume.attribute(key, value);
    }
    let message = node.kubelet.publish_badly(&volume, Code::InvalidArgument);
    assert_eq!(node.proxy.requests(), [], "the registry was asked for a bad attribute");
    message
}

/// Returns the files that `attributes` select of an artifact of several titled files.
#[track_caller]
fn selected(node: &Node, reference: &str, attributes: Attributes) -> Vec<String> {
    let (_, tree) = node.mount_with(reference, |mut volume| {
        for (key, value) in attributes {
            volume = volume.attribute(key, value);
        }
        volume
    });
    tree.files().into_iter().map(str::to_owned).collect()
}

const TITLES: [&str; 6] =
    ["README.md", "bin/tool", "bin/x/deep", "config/a.yml", "config/b.yml", "odd,name"];

/// Pushes an artifact of six files with different content.
fn several_files(repository: &str) {
    Manifest::artifact(TITLES.map(|title| Layer::titled(title, format!("{repository}: {title}"))))
        .push(registry(), repository, "v1");
}

#[test]
fn a_reference_in_parts_is_a_reference() {
    let node = Node::start();
    let SmallArtifact { repository, digest, .. } = node.small_artifact();
    let repository = node.proxy.reference(&repository);
    for parts in [
        vec![("tag", "v1")],
        vec![("digest", digest.as_str())],
        vec![("tag", "other"), ("digest", &digest)],
    ] {
        let (_, tree) = node.mount_with("", |mut volume| {
            volume = volume.attribute("repository", &repository);
            for (key, value) in &parts {
                volume = volume.attribute(key, value);
            }
            volume
        });
        assert_eq!(tree.names(), ["file.txt"], "{parts:?}");
    }
}

#[test]
fn neither_tag_nor_digest_means_latest() {
    let node = Node::start();
    let repository = unique("latest");
    Manifest::artifact([Layer::titled("latest", "x")]).push(registry(), &repository, "latest");
    let reference = node.proxy.reference(&repository);
    assert_eq!(node.mount(&reference).1.names(), ["latest"]);
    let (_, tree) = node.mount_with("", |volume| volume.attribute("repository", &reference));
    assert_eq!(tree.names(), ["latest"]);
}

#[test]
fn a_digest_decides_over_a_tag() {
    let node = Node::start();
    let first = node.small_artifact();
    Manifest::artifact([Layer::titled("moved", "x")]).push(registry(), &first.repository, "v1");
    let reference = node.proxy.reference(&format!("{}:v1@{}", first.repository, first.digest));
    assert_eq!(node.mount(&reference).1.names(), ["file.txt"]);
}

#[test]
fn an_empty_value_means_absent() {
    let node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    node.mount_with(&reference, |mut volume| {
        for key in [
            "repository",
            "tag",
            "digest",
            "pullPolicy",
            "ifUnavailable",
            "platform",
            "include",
            "exclude",
            "permissions",
            "fileMode",
            "unpack",
            "subPath",
            "artifacts",
            "requireSignature",
        ] {
            volume = volume.attribute(key, "");
        }
        volume
    });
}

#[test]
fn no_reference_at_all_is_refused() {
    refusal(&[("reference", "")]);
}

#[test]
fn a_reference_and_its_parts_together_are_refused() {
    for key in ["repository", "tag", "digest"] {
        let value = if key == "digest" { digest(b"") } else { "value".to_owned() };
        refusal(&[(key, &value)]);
    }
}

#[test]
fn a_tag_without_a_repository_is_refused() {
    refusal(&[("reference", ""), ("tag", "v1")]);
}

#[test]
fn malformed_references_are_refused() {
    for reference in [
        "127.0.0.1:1/UPPER:v1",
        "127.0.0.1:1/name:bad tag",
        "127.0.0.1:1/name@sha256:short",
        "http://127.0.0.1:1/name:v1",
        "127.0.0.1:1/../name:v1",
        ":v1",
        "@",
    ] {
        refusal(&[("reference", reference)]);
    }
}

#[test]
fn malformed_values_are_refused_by_name() {
    for (key, value) in [
        ("pullPolicy", "Sometimes"),
        ("pullPolicy", "always"),
        ("ifUnavailable", "Maybe"),
        ("platform", "linux"),
        ("platform", "linux/amd64/v1/more"),
        ("include", "["),
        ("permissions", "Open"),
        ("fileMode", "rwx"),
        ("unpack", "yes"),
        ("subPath", "../etc"),
        ("artifacts", "[]"),
        ("fileMode", "0999"),
        ("fileMode", "7777777"),
        ("requireSignature", "yes"),
    ] {
        let message = refusal(&[(key, value)]);
        assert!(message.contains(key), "{key}={value}: {message}");
    }
}

#[test]
fn an_unknown_attribute_is_refused_with_the_known_ones() {
    let message = refusal(&[("refrence", "typo")]);
    for key in ["refrence", "reference", "pullPolicy", "include", "fileMode"] {
        assert!(message.contains(key), "{message}");
    }
}

#[test]
fn unknown_keys_of_the_kubelet_are_ignored() {
    let node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    node.mount_with(&reference, |volume| {
        volume.attribute("csi.storage.k8s.io/from.the.future", "x")
    });
}

#[test]
fn include_and_exclude_select_whole_paths() {
    let node = Node::start();
    let repository = unique("select");
    several_files(&repository);
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let cases: [(Attributes, &[&str]); 9] = [
        (&[("include", "bin")], &["bin/tool", "bin/x/deep"]),
        (&[("include", "bin/tool,README.md")], &["README.md", "bin/tool"]),
        (&[("include", "**/*.yml")], &["config/a.yml", "config/b.yml"]),
        (&[("include", "*.md")], &["README.md"]),
        (&[("exclude", "bin,config")], &["README.md", "odd,name"]),
        (&[("include", "config"), ("exclude", "**/b.yml")], &["config/a.yml"]),
        (&[("include", "bin,config"), ("exclude", "bin")], &["config/a.yml", "config/b.yml"]),
        (&[("include", "odd\\,name")], &["odd,name"]),
        (&[("include", "bin/*")], &["bin/tool", "bin/x/deep"]),
    ];
    for (attributes, expected) in cases {
        assert_eq!(selected(&node, &reference, attributes), expected, "{attributes:?}");
    }
}

#[test]
fn selection_is_case_sensitive_and_of_whole_names() {
    let node = Node::start();
    let repository = unique("select");
    several_files(&repository);
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    for pattern in ["readme.md", "READ", "tool", "in/tool"] {
        let volume = node.kubelet.new_volume(&reference).attribute("include", pattern);
        node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
    }
}

#[test]
fn only_selected_files_are_fetched() {
    let node = Node::start();
    let repository = unique("fetch");
    several_files(&repository);
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    selected(&node, &reference, &[("include", "config/*")]);
    for title in TITLES {
        let expected = usize::from(title.starts_with("config/"));
        assert_eq!(
            node.proxy.fetches(&digest(format!("{repository}: {title}").as_bytes())),
            expected,
            "{title}"
        );
    }
    // A file that is selected later is fetched then, and none twice.
    selected(&node, &reference, &[]);
    for title in TITLES {
        assert_eq!(
            node.proxy.fetches(&digest(format!("{repository}: {title}").as_bytes())),
            1,
            "{title}"
        );
    }
}

#[test]
fn selection_works_inside_archives() {
    let node = Node::start();
    let repository = unique("inside");
    let archive = Tar::new()
        .folder("bin", 0o755)
        .file("bin/tool", 0o755, "tool")
        .file("share/doc/manual", 0o644, "manual")
        .finish();
    Image::new().layer(archive).push(registry(), &repository, "v1");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    assert_eq!(selected(&node, &reference, &[("include", "bin/**")]), ["bin/tool"]);
    assert_eq!(selected(&node, &reference, &[("exclude", "share")]), ["bin/tool"]);
    assert_eq!(selected(&node, &reference, &[]), ["bin/tool", "share/doc/manual"]);
}

#[test]
fn a_file_mode_is_that_of_single_files_only() {
    let node = Node::start();
    let repository = unique("mode");
    let archive = Tar::new().folder("d", 0o755).file("d/inside", 0o644, "x").finish();
    let folder =
        Layer::new("application/vnd.oci.image.layer.v1.tar+gzip", crate::support::gzip(&archive))
            .annotation("org.opencontainers.image.title", "d")
            .annotation("io.deis.oras.content.unpack", "true");
    Manifest::artifact([Layer::titled("single", "text"), folder]).push(
        registry(),
        &repository,
        "v1",
    );
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    for (mode, expected) in [("0755", 0o755), ("555", 0o555), ("0444", 0o444)] {
        let (_, tree) = node.mount_with(&reference, |volume| volume.attribute("fileMode", mode));
        assert_eq!(tree.mode("single"), expected, "fileMode {mode}");
        assert_eq!(tree.mode("d/inside"), 0o644, "fileMode {mode}");
    }
    let (_, tree) = node.mount_with(&reference, |volume| {
        volume.attribute("fileMode", "0600").attribute("permissions", "Preserve")
    });
    assert_eq!(tree.mode("single"), 0o600);
}

#[test]
fn one_blob_has_as_many_modes_as_its_volumes_ask_for() {
    let node = Node::start();
    let repository = unique("modes");
    Manifest::artifact([Layer::titled("one", "text"), Layer::titled("two", "more")]).push(
        registry(),
        &repository,
        "v1",
    );
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let cases = [("0555", "", 2), ("0444", "", 2), ("0555", "one", 1), ("0444", "one", 1)];
    let volumes = cases.map(|(mode, include, _)| {
        node.kubelet
            .new_volume(&reference)
            .attribute("fileMode", mode)
            .attribute("include", include)
    });
    std::thread::scope(|scope| {
        for volume in &volumes {
            scope.spawn(|| node.kubelet.publish_well(volume));
        }
    });
    for (volume, (mode, _, count)) in volumes.iter().zip(cases) {
        let tree = Tree::of(volume.target());
        assert_eq!(tree.files().len(), count);
        assert_eq!(tree.mode("one"), u32::from_str_radix(mode, 8).expect("octal"));
    }
    assert_eq!(node.proxy.fetches(&digest(b"text")), 1);
}

#[test]
fn a_signature_that_no_key_can_check_is_refused() {
    let node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    let volume = node.kubelet.new_volume(&reference).attribute("requireSignature", "true");
    node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
    node.mount_with(&reference, |volume| volume.attribute("requireSignature", "false"));
}

#[test]
fn mount_options_that_only_restrict_are_honoured() {
    let node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    let (volume, _) = node.mount_with(&reference, |volume| {
        volume.mount_option("noexec").mount_option("noatime").mount_option("ro")
    });
    let options = &mounts_at(volume.target())[0].options;
    for option in ["noexec", "noatime", "ro"] {
        assert!(options.iter().any(|found| found == option), "{option} is not among {options:?}");
    }
    let (volume, _) = node.mount(&reference);
    let options = &mounts_at(volume.target())[0].options;
    assert!(!options.iter().any(|found| found == "noexec"), "{options:?}");
}
