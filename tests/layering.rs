//! Checks rules that the compiler does not: which module of a crate names which crate or module, and where `unsafe` is.

use std::path::{Path, PathBuf};

/// A directory, the names that must not be used in it, and the reason.
const LAYERS: [(&str, &[&str], &str); 8] = [
    (
        "src/volume",
        &["tonic::", "prost::", "reqwest::", "crate::csi", "crate::admin"],
        "use cases know neither gRPC nor HTTP",
    ),
    ("src/csi", &["reqwest::", "nix::", "store::Store"], "the gRPC edge does no work of its own"),
    (
        "src/kubernetes",
        &[
            "tonic::",
            "prost::",
            "nix::",
            "store::",
            "pull::",
            "oci::",
            "crate::volume",
            "crate::csi",
        ],
        "what talks to the API server has no part in a publish",
    ),
    (
        "src/warming",
        &["tonic::", "prost::", "reqwest::", "nix::", "sys::mount", "crate::csi", "crate::admin"],
        "warming asks as a volume would",
    ),
    ("src/admin", &["reqwest::", "nix::"], "the admin socket changes no mount"),
    ("crates/pull", &["sys::mount"], "pulling needs no mount privilege"),
    (
        "crates/preload/src/plan",
        &["kube::", "tokio::", "crate::controller"],
        "planning is facts in, decisions out",
    ),
    (
        "crates/provision/src/plan",
        &["kube::", "tokio::", "crate::controller"],
        "planning is facts in, decisions out",
    ),
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

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the code without its comments, which may name anything.
fn code(path: &Path) -> String {
    let text = std::fs::read_to_string(path).expect("a source");
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// Returns whether a path is named as a whole: `unix::` does not name `nix::`.
fn names_it(code: &str, name: &str) -> bool {
    let of_a_word = |char: char| char.is_alphanumeric() || char == '_';
    code.match_indices(name).any(|(at, _)| {
        let after = &code[at + name.len()..];
        !code[..at].ends_with(of_a_word) && (name.ends_with(':') || !after.starts_with(of_a_word))
    })
}

#[test]
fn modules_name_only_what_lies_below_them() {
    for (folder, banned, why) in LAYERS {
        let files = sources(&root().join(folder));
        assert!(!files.is_empty(), "{folder} is gone: mend this test");
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
    let all = ["src", "crates"].into_iter().flat_map(|folder| sources(&root().join(folder)));
    let files: Vec<_> = all.filter(with_unsafe).collect();
    assert_eq!(files, [root().join("crates/sys/src/mount/syscalls.rs")]);
}
