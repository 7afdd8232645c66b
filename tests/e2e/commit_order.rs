//! Tests the order of system calls before a name: nothing is renamed before it is synced.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

use nix::sys::signal::{Signal, kill};

use crate::support::{
    Image, Layer, Manifest, Node, OCI_TAR_GZIP, Tar, gzip, noise, registry, tool, unique,
};

/// The directories in which a name means durable content.
const DURABLE: [&str; 5] = ["blobs", "files", "layers", "trees", "resolutions"];

/// A trace of all calls of a process that write, sync or name.
struct Trace {
    strace: Child,
    output: PathBuf,
}

impl Trace {
    #[track_caller]
    fn attach(node: &Node) -> Self {
        let output = node.sandbox.path().join("trace");
        let calls = "trace=write,pwrite64,writev,pwritev,pwritev2,copy_file_range,ftruncate,fallocate,openat,\
                     mkdir,mkdirat,link,linkat,symlink,symlinkat,fsync,fdatasync,syncfs,sync,rename,renameat,renameat2";
        let mut strace = tool("strace")
            .args(["-f", "-y", "-s", "4096", "-e", calls, "-o"])
            .arg(&output)
            .args(["-p", &node.driver.id().to_string()])
            .stderr(Stdio::piped())
            .spawn()
            .expect("strace");
        let mut told = BufReader::new(strace.stderr.take().expect("a pipe")).lines();
        let attached = told.by_ref().map_while(Result::ok).find(|line| line.contains("attached"));
        attached.expect("strace attaches");
        // strace prints a line for each new thread, and ends if its output is not read.
        std::thread::spawn(move || told.map_while(Result::ok).for_each(drop));
        Self { strace, output }
    }

    /// Ends the trace. Returns the complete calls in their order.
    fn calls(mut self) -> Vec<Call> {
        let process = i32::try_from(self.strace.id()).expect("a process id");
        kill(nix::unistd::Pid::from_raw(process), Signal::SIGINT).expect("strace is told to end");
        self.strace.wait().expect("strace ends");
        let text = fs::read_to_string(&self.output).expect("the trace");
        let mut begun = std::collections::HashMap::new();
        let mut calls = Vec::new();
        for line in text.lines() {
            let Some((thread, rest)) = line.split_once(' ') else { continue };
            let rest = rest.trim_start();
            if let Some(start) = rest.strip_suffix("<unfinished ...>") {
                begun.insert(thread, start.trim_end().to_owned());
                continue;
            }
            let whole =
                match rest.strip_prefix("<... ").and_then(|rest| rest.split_once("resumed>")) {
                    Some((_, end)) => begun.remove(thread).unwrap_or_default() + end,
                    None => rest.to_owned(),
                };
            calls.extend(Call::parse(&whole));
        }
        calls
    }
}

/// A successful call.
struct Call {
    name: String,
    arguments: String,
}

impl Call {
    fn parse(line: &str) -> Option<Self> {
        let (call, result) = line.rsplit_once(" = ")?;
        if result.starts_with('-') {
            return None;
        }
        let (name, arguments) = call.split_once('(')?;
        let arguments = arguments.trim_end().strip_suffix(')')?;
        Some(Self { name: name.to_owned(), arguments: arguments.to_owned() })
    }

    /// Returns the path of its first descriptor.
    fn descriptor(&self) -> Option<PathBuf> {
        let (_, rest) = self.arguments.split_once('<')?;
        Some(PathBuf::from(rest.split_once('>')?.0))
    }

    /// Returns all paths; those relative to a descriptor are below its path.
    fn paths(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folder = PathBuf::from("/");
        let mut rest = self.arguments.as_str();
        while let Some(at) = rest.find(['<', '"']) {
            let (open, tail) = (rest.as_bytes()[at], &rest[at + 1..]);
            let end = if open == b'<' { '>' } else { '"' };
            let Some((text, after)) = tail.split_once(end) else { break };
            if open == b'<' {
                folder = PathBuf::from(text);
            } else {
                found.push(folder.join(text));
            }
            rest = after;
        }
        found
    }
}

/// Checks the calls. Returns the names that were created.
fn check(calls: &[Call], state: &Path) -> Vec<PathBuf> {
    let mut dirty = BTreeSet::<PathBuf>::new();
    let mut named = Vec::new();
    let mut unsynced_names = BTreeSet::new();
    for call in calls {
        let dirties = |path: &Path| path.starts_with(state).then(|| path.to_owned());
        let parent = |path: &Path| path.parent().map(Path::to_owned);
        match call.name.as_str() {
            "fsync" | "fdatasync" => {
                let Some(path) = call.descriptor() else { continue };
                dirty.remove(&path);
                unsynced_names.remove(&path);
            }
            "syncfs" | "sync" => {
                dirty.clear();
                unsynced_names.clear();
            }
            "rename" | "renameat" | "renameat2" => {
                let paths = call.paths();
                let [from, to] = paths.as_slice() else { panic!("two paths: {}", call.arguments) };
                let Ok(below) = to.strip_prefix(state) else { continue };
                let folder = below.iter().next().and_then(|name| name.to_str());
                let moved: Vec<_> =
                    dirty.iter().filter(|path| path.starts_with(from)).cloned().collect();
                if folder.is_some_and(|folder| DURABLE.contains(&folder)) {
                    assert!(
                        moved.is_empty(),
                        "{} has its name before {moved:?} are synced",
                        to.display()
                    );
                    named.push(to.clone());
                    unsynced_names.extend(parent(to));
                } else {
                    for path in moved {
                        dirty.remove(&path);
                        let rest = path.strip_prefix(from).expect("below it");
                        dirty.insert(if rest.as_os_str().is_empty() {
                            to.clone()
                        } else {
                            to.join(rest)
                        });
                    }
                }
            }
            "openat" => {
                if call.arguments.contains("O_CREAT") {
                    dirty.extend(call.paths().iter().filter_map(|path| dirties(path)));
                    dirty.extend(call.paths().iter().filter_map(|path| dirties(&parent(path)?)));
                }
            }
            "mkdir" | "mkdirat" | "link" | "linkat" | "symlink" | "symlinkat" => {
                let Some(made) = call.paths().pop() else { continue };
                dirty.extend(parent(&made).and_then(|folder| dirties(&folder)));
                if call.name.starts_with("mkdir") {
                    dirty.extend(dirties(&made));
                }
            }
            _ => dirty.extend(call.descriptor().and_then(|path| dirties(&path))),
        }
    }
    assert!(
        unsynced_names.is_empty(),
        "these folders have names that a power cut takes: {unsynced_names:?}"
    );
    named
}

#[test]
fn nothing_is_named_before_it_is_synced() {
    let node = Node::start();
    let file = unique("file");
    Manifest::artifact([Layer::titled("file", noise(3 << 20, 1)), Layer::titled("other", "small")])
        .push(registry(), &file, "v1");
    let image = unique("image");
    let mut archive = Tar::new().folder("etc", 0o755).symbolic_link("etc/link", "1");
    for number in 0..40 {
        archive = archive.file(&format!("etc/{number}"), 0o644, noise(2000, number));
    }
    let archive = archive.finish();
    Image::new().packed_layer(OCI_TAR_GZIP, gzip(&archive), &archive).push(
        registry(),
        &image,
        "v1",
    );
    let trace = Trace::attach(&node);
    for repository in [&file, &image] {
        let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
        node.kubelet.publish_well(&volume);
        node.kubelet.unpublish(&volume);
    }
    let state = node.driver.state().to_owned();
    let named = check(&trace.calls(), &state);
    let count =
        |folder: &str| named.iter().filter(|name| name.starts_with(state.join(folder))).count();
    assert_eq!(
        DURABLE.map(count),
        [3, 2, 1, 2, 2],
        "manifests and a configuration, two files, a layer, two trees, two resolutions: {named:?}"
    );
}

#[test]
fn a_name_before_its_sync_would_be_found() {
    let call =
        |name: &str, arguments: &str| Call { name: name.into(), arguments: arguments.into() };
    let state = Path::new("/s");
    let write = || call("write", "4</s/staging/a/file>, \"x\", 1");
    let sync = || call("fsync", "4</s/staging/a/file>");
    let rename = || call("rename", "\"/s/staging/a/file\", \"/s/files/k/1\"");
    let parent = || call("fsync", "5</s/files/k>");
    assert_eq!(check(&[write(), sync(), rename(), parent()], state), [Path::new("/s/files/k/1")]);
    for wrong in [
        vec![write(), rename(), parent()],
        vec![write(), sync(), write(), rename(), parent()],
        vec![write(), sync(), rename()],
    ] {
        assert!(std::panic::catch_unwind(|| check(&wrong, state)).is_err());
    }
}
