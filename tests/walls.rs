//! Keeps the walls between the rooms up: which crate and which room may be named where.

use std::path::{Path, PathBuf};

/// A room, what it must not name, and why.
const WALLS: [(&str, &[&str], &str); 12] = [
    (
        "volume",
        &["tonic::", "prost::", "reqwest::", "oci_client::", "crate::csi", "crate::admin"],
        "use cases know neither gRPC nor HTTP",
    ),
    (
        "pull",
        &[
            "tonic::",
            "prost::",
            "reqwest::",
            "oci_client::",
            "nix::",
            "crate::csi",
            "crate::volume",
            "crate::mount",
        ],
        "pulling needs no mount privilege",
    ),
    (
        "oci",
        &[
            "tonic::",
            "prost::",
            "nix::",
            "crate::store",
            "crate::pull",
            "crate::mount",
            "crate::unpack",
            "crate::volume",
        ],
        "the specifications stand alone",
    ),
    (
        "unpack",
        &[
            "tonic::",
            "prost::",
            "reqwest::",
            "oci_client::",
            "tokio::",
            "nix::",
            "crate::store",
            "crate::pull",
            "crate::mount",
            "crate::volume",
        ],
        "unpacking is pure",
    ),
    (
        "store",
        &[
            "tonic::",
            "reqwest::",
            "oci_client::",
            "tokio::",
            "crate::pull",
            "crate::volume",
            "crate::csi",
        ],
        "the store is synchronous and knows no network",
    ),
    (
        "mount",
        &[
            "tonic::",
            "prost::",
            "reqwest::",
            "oci_client::",
            "tokio::",
            "crate::store",
            "crate::oci",
            "crate::pull",
            "crate::volume",
        ],
        "mounting knows only the kernel",
    ),
    (
        "csi",
        &["reqwest::", "oci_client::", "nix::", "crate::store::Store"],
        "the edge does no work of its own",
    ),
    (
        "kubernetes",
        &[
            "tonic::",
            "prost::",
            "oci_client::",
            "nix::",
            "crate::store",
            "crate::pull",
            "crate::volume",
            "crate::csi",
            "crate::oci",
        ],
        "what talks to the API server has no part in a publish",
    ),
    (
        "warming",
        &[
            "tonic::",
            "prost::",
            "reqwest::",
            "oci_client::",
            "nix::",
            "crate::csi",
            "crate::admin",
            "crate::mount",
        ],
        "warming asks as a volume would",
    ),
    (
        "fleet/plan",
        &[
            "kube::",
            "tokio::",
            "reqwest::",
            "crate::store",
            "crate::pull",
            "crate::volume",
            "crate::fleet::controller",
            "crate::fleet::node",
        ],
        "planning is facts in, decisions out",
    ),
    (
        "fleet/controller",
        &[
            "tonic::",
            "reqwest::",
            "nix::",
            "crate::store",
            "crate::pull",
            "crate::volume",
            "crate::mount",
            "crate::fleet::node",
        ],
        "the controller is on no node",
    ),
    ("admin", &["reqwest::", "oci_client::", "nix::"], "who looks on touches nothing"),
];

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            found.push(path);
        }
    }
    found
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The code without its comments, which may name anything.
fn code(path: &Path) -> String {
    let text = std::fs::read_to_string(path).expect("a source");
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// Whether a path is named as a whole: `unix::` does not name `nix::`.
fn names_it(code: &str, name: &str) -> bool {
    let of_a_word = |char: char| char.is_alphanumeric() || char == '_';
    code.match_indices(name).any(|(at, _)| {
        let after = &code[at + name.len()..];
        !code[..at].ends_with(of_a_word) && (name.ends_with(':') || !after.starts_with(of_a_word))
    })
}

#[test]
fn rooms_name_only_what_lies_below_them() {
    for (room, banned, why) in WALLS {
        let files = sources(&source().join(room));
        assert!(!files.is_empty(), "the room {room} is gone: mend this test");
        for file in files {
            let code = code(&file);
            for name in banned {
                assert!(!names_it(&code, name), "{} names {name}: {why}", file.display());
            }
        }
    }
}

#[test]
fn unsafe_stands_in_one_file() {
    let with_unsafe = |path: &PathBuf| code(path).contains("unsafe {");
    let files: Vec<_> = sources(&source()).into_iter().filter(with_unsafe).collect();
    assert_eq!(files, [source().join("mount/syscalls.rs")]);
}
