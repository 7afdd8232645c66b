//! Tests the objects that users apply: the chart, the manifests and the examples, against Kubernetes' own types and the
//! binary.
//!
//! Python renders them, since Helm's engine is available as a Python package (`tests/cluster`). Then their containers
//! run here, rooted in a directory that plays the node.

mod api;
mod chart;
mod container;
mod controller;
mod crossplane;
mod crossplane_tables;
mod daemonset;
mod deployed;
mod publish;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

use serde_json::Value;

use crate::support::tool;

/// The output of `tests/cluster/render.py`: objects by group and name.
pub type Rendered = BTreeMap<String, Vec<Value>>;

/// Returns a group of objects. Everything is rendered once.
pub fn rendered(group: &str) -> Rendered {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("rendered");
        if folder.exists() {
            fs::remove_dir_all(&folder).expect("the last run's manifests");
        }
        let output = python("render.py").arg(&folder).output().expect("python");
        assert!(output.status.success(), "render.py: {}", said(&output));
        folder
    });
    let entries = fs::read_dir(folder.join(group)).expect("a group of manifests");
    let read = |path: PathBuf| {
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let objects = serde_json::from_slice(&fs::read(&path).expect("manifests")).expect("JSON");
        (name, objects)
    };
    entries.map(|entry| read(entry.expect("an entry").path())).collect()
}

/// Returns the one object of this kind.
#[track_caller]
pub fn only<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    let mut found = objects.iter().filter(|object| object["kind"] == kind);
    let first = found.next().unwrap_or_else(|| panic!("no {kind}"));
    assert!(found.next().is_none(), "more than one {kind}");
    first
}

/// Runs a check of `tests/cluster/check.py`, which prints the errors.
#[track_caller]
fn check(name: &str) {
    let output = python("check.py").arg(name).output().expect("python");
    assert!(output.status.success(), "{name}:\n{}", said(&output));
}

pub fn python(script: &str) -> Command {
    let tools = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("tools");
    let mut command = tool(&tools.join("python/bin/python").to_string_lossy());
    // Bytecode beside the scripts would appear in `git status`.
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster").join(script));
    command
}

fn said(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!("{}{}", String::from_utf8_lossy(out), String::from_utf8_lossy(err))
}
