//! Tests the output of every command of the real binary against recordings.
//!
//! Values that differ from run to run are normalised: ports, ages, times, digests, and the space on the disk. To record
//! an intended change: `INSTA_UPDATE=always make test ARGUMENTS='--test e2e recorded::'`.

use std::{
    collections::HashMap,
    fmt::Write as _,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output},
};

use regex::{Captures, Regex};

use crate::support::{
    Admin, Image, Layer, Manifest, Node, OCI_TAR_GZIP, Registry, Sandbox, Tar, Volume,
    clean_environment, commands, gzip, noise, own_registry, run, stop_listening, tool, wait_until,
};

const ROOMY: &str = "cache: {minFreePercent: 0, minFreeInodesPercent: 0, highThresholdPercent: 100, \
                     lowThresholdPercent: 100, minimumAge: 0s}\n";

/// Commands as they are typed, and their output.
struct Transcript {
    endpoint: String,
    text: String,
    sandbox: String,
    registry: String,
}

impl Transcript {
    fn new(endpoint: &str, sandbox: &Sandbox, registry: &Registry) -> Self {
        Self {
            endpoint: endpoint.to_owned(),
            text: String::new(),
            sandbox: sandbox.path().display().to_string(),
            registry: registry.host(),
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command: Command = tool(env!("CARGO_BIN_EXE_csi-driver-oci"));
        clean_environment(&mut command);
        command
            .args(arguments)
            .env("CSI_OCI_ADMIN_ENDPOINT", &self.endpoint)
            .env("HOME", "/nonexistent")
            .env_remove("DOCKER_CONFIG");
        command
    }

    /// Runs a command, and records it with its output.
    fn run(&mut self, arguments: &[&str]) {
        let output = self.command(arguments).output().expect("the binary");
        self.write(arguments, &output);
    }

    /// Runs a command whose lines have no fixed order, and records it.
    fn run_sorted(&mut self, arguments: &[&str]) {
        let mut output = self.command(arguments).output().expect("the binary");
        let text = String::from_utf8(output.stdout).expect("text");
        let mut lines: Vec<_> = text.split_inclusive('\n').collect();
        lines.sort_unstable();
        output.stdout = lines.concat().into_bytes();
        self.write(arguments, &output);
    }

    fn write(&mut self, arguments: &[&str], output: &Output) {
        let words = arguments.iter().map(|word| {
            if word.is_empty() || word.contains(' ') { format!("'{word}'") } else { (*word).into() }
        });
        let (out, err) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let text = &mut self.text;
        let _ = writeln!(text, "$ csi-driver-oci {}", words.collect::<Vec<_>>().join(" "));
        text.push_str(&out);
        for line in err.lines() {
            let _ = writeln!(text, "! {line}");
        }
        let status = output.status.code().expect("a status");
        if status != 0 {
            let _ = writeln!(text, "exit status {status}");
        }
        text.push('\n');
    }

    /// Normalises the values that differ from run to run, and keeps the widths of columns.
    fn normal(&self) -> String {
        let text =
            self.text.replace(&self.sandbox, "/node").replace(&self.registry, "127.0.0.1:00000");
        let mut text = text.replace(env!("CARGO_PKG_VERSION"), "VERSION");
        for (pattern, to) in [
            (r"linux/(amd64|arm64)", "linux/ARCH"),
            (r"\(.* of .* free, .* stay free\)", "(ROOM)"),
            (r#""(freeBytes|totalBytes|floorBytes)":\d+"#, r#""$1":0"#),
            // The setting of this machine.
            (r"(?m)^(file leases ).*", "${1}(SETTING)"),
            (r#""fileLeasesEnabled":\w+"#, r#""fileLeasesEnabled":false"#),
            (r#""(lastUsed)":"[0-9TZ:-]+"#, r#""$1":"TIME"#),
            (r"(\s)\d\ds ", "${1}0s  "),
            (r"(\s)\d\d?s(\s)", "${1}0s${2}"),
            (r"again in \d+s", "again in 0s"),
            (r#""nextSeconds":\d+"#, r#""nextSeconds":0"#),
            (r"default/pod-[0-9-]+", "default/pod"),
        ] {
            text = Regex::new(pattern).expect("a pattern").replace_all(&text, to).into_owned();
        }
        // Digests become numbers, in the order of their first appearance.
        let mut seen = HashMap::new();
        let digests = Regex::new("([0-9a-f]{12})([0-9a-f]{52})?").expect("a pattern");
        let numbered = digests.replace_all(&text, |found: &Captures<'_>| {
            let next = seen.len() + 1;
            let number = *seen.entry(found[1].to_owned()).or_insert(next);
            let rest = if found.get(2).is_some() { "…" } else { "" };
            format!("{number:012}{rest}")
        });
        numbered.into_owned()
    }
}

/// Pushes three artifacts of different kinds, and one of ten whose tag does not exist.
fn push(registry: &Registry) {
    let file =
        [Layer::titled("tool", "#!/bin/sh\necho tool\n"), Layer::titled("notes.txt", "words\n")];
    Manifest::artifact(file).push(registry, "team/tool", "v1");
    let archive =
        Tar::new().folder("etc", 0o755).file("etc/app.conf", 0o644, noise(5000, 1)).finish();
    Image::new().packed_layer(OCI_TAR_GZIP, gzip(&archive), &archive).push(
        registry,
        "team/image",
        "v1",
    );
}

fn unpublish(node: &Node, transcript: &Transcript, volume: &Volume) {
    node.kubelet.unpublish(volume);
    wait_until("the record is gone", || {
        let status =
            transcript.command(&["status", "--output", "json"]).output().expect("the binary");
        String::from_utf8_lossy(&status.stdout).contains("\"published\":0")
    });
}

/// Starts a node whose state is on ext4, where files and directories take the same space everywhere. Returns its admin
/// socket.
fn node_with(configuration: &str) -> (Node, String) {
    let mut endpoint = String::new();
    let node = Node::start_with(|sandbox, options| {
        endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
        sandbox.filesystem_of(512 << 20, "ext4", "state", "rw");
        options.configuration(configuration).argument(&format!("--admin-endpoint={endpoint}"))
    });
    (node, endpoint)
}

#[test]
fn a_day_of_an_administrator() {
    let registry = own_registry();
    push(&registry);
    let (node, endpoint) = node_with(ROOMY);
    let mut typed = Transcript::new(&endpoint, &node.sandbox, &registry);
    let of = |name: &str| format!("{}/{name}", registry.host());
    let (tool, image, missing) = (of("team/tool:v1"), of("team/image:v1"), of("team/none:v1"));
    typed.run(&["status"]);
    typed.run(&["ls"]);
    typed.run_sorted(&["warm", &tool, &image, &missing]);
    typed.run(&["warm", "--pin", &tool, "--output", "json"]);
    let volume = node.kubelet.new_volume(&image);
    node.kubelet.publish_well(&volume);
    typed.run(&["ls"]);
    typed.run(&["ls", "--output", "json"]);
    typed.run(&["inspect", &image]);
    typed.run(&["inspect", &image, "--output", "json"]);
    typed.run(&["inspect", &missing]);
    typed.run(&["pin", &image]);
    typed.run(&["pin", &image, "--output", "json"]);
    typed.run(&["pin", &missing]);
    typed.run(&["rm", &image]);
    typed.run(&["unpin", &image]);
    typed.run(&["unpin", &image]);
    typed.run(&["unpin", &image, "--output", "json"]);
    typed.run(&["verify"]);
    typed.run(&["verify", "--output", "json"]);
    typed.run(&["rm", &image]);
    unpublish(&node, &typed, &volume);
    wait_until("it is gone", || {
        let list = typed.command(&["ls"]).output().expect("the binary");
        !String::from_utf8_lossy(&list.stdout).contains("image")
    });
    typed.run(&["rm", &image]);
    typed.run(&["unpin", &tool, "--output", "json"]);
    typed.run(&["gc", "--dry-run", "--target", "0"]);
    typed.run(&["gc", "--target", "0", "--output", "json"]);
    typed.run(&["gc"]);
    let layout = node.sandbox.path().join("layout");
    crate::support::run(
        crate::support::tool("oras")
            .args(["copy", "--from-plain-http", "--to-oci-layout", &image])
            .arg(format!("{}:v1", layout.display())),
    );
    let layout = layout.to_str().expect("a path");
    typed.run(&["import", layout, "--as", "registry.example.com/team/image:v1"]);
    typed.run(&[
        "import",
        layout,
        "--as",
        "registry.example.com/team/image:v1",
        "--output",
        "json",
    ]);
    typed.run(&["import", "/nonexistent", "--as", "registry.example.com/team/image:v1"]);
    typed.run(&["status"]);
    typed.run(&["status", "--output", "json"]);
    insta::assert_snapshot!("a_day_of_an_administrator", typed.normal());
}

#[test]
fn what_the_configuration_keeps() {
    let registry = own_registry();
    push(&registry);
    let of = |name: &str| format!("{}/{name}", registry.host());
    let (tool, missing) = (of("team/tool:v1"), of("team/none:v1"));
    let list = format!("warm: {{references: [\"{tool}\", \"{missing}\"], spread: 0s}}\n");
    let (node, endpoint) = node_with(&format!("{ROOMY}{list}"));
    let admin = Admin::at(&endpoint);
    wait_until("both have been tried", || {
        let status = admin.json(&["status"]);
        status["warm"][0]["state"] == "failed" && status["warm"][1]["state"] == "present"
    });
    let mut typed = Transcript::new(&endpoint, &node.sandbox, &registry);
    typed.run(&["status"]);
    typed.run(&["status", "--output", "json"]);
    typed.run(&["ls"]);
    typed.run(&["inspect", &tool]);
    typed.run(&["inspect", &missing]);
    typed.run(&["inspect", &missing, "--output", "json"]);
    typed.run(&["unpin", &tool]);
    insta::assert_snapshot!("what_the_configuration_keeps", typed.normal());
}

#[test]
fn what_needs_no_node() {
    let registry = own_registry();
    push(&registry);
    let sandbox = Sandbox::new();
    let mut typed = Transcript::new("unix:///nonexistent/admin.sock", &sandbox, &registry);
    let of = |name: &str| format!("{}/{name}", registry.host());
    let folder = |name: &str| sandbox.path().join(name).display().to_string();
    typed.run(&["check", &of("team/tool:v1")]);
    typed.run(&["check", &of("team/tool:v1"), "--require-file", "tool:exec", "--output", "json"]);
    typed.run(&["check", &of("team/image:v1"), "--require-file", "bin/none"]);
    typed.run(&["check", &of("team/none:v1")]);
    typed.run(&["check", "not a reference"]);
    let good = "apiVersion: oci.custom.io/v1alpha1\nkind: NodeConfiguration\n";
    fs::write(sandbox.path().join("good.yaml"), good).expect("a file");
    fs::write(sandbox.path().join("bad.yaml"), format!("{good}warm:\n  references: [\"a b\"]\n"))
        .expect("a file");
    typed.run(&["check-config", &folder("good.yaml")]);
    typed.run(&["check-config", &folder("bad.yaml")]);
    typed.run(&["check-config", &folder("none.yaml")]);
    let (state, target) = (folder("state"), folder("mounted"));
    typed.run(&["mount", &of("team/tool:v1"), &target, "--state-dir", &state]);
    typed.run(&["mount", &of("team/tool:v1"), &target, "--state-dir", &state, "--output", "json"]);
    typed.run(&["unmount", &target, "--state-dir", &state]);
    typed.run(&["unmount", &target, "--state-dir", &state]);
    typed.run(&["check-uninstall"]);
    insta::assert_snapshot!("what_needs_no_node", typed.normal());
}

#[test]
fn help_and_wrong_usage() {
    let registry = own_registry();
    let sandbox = Sandbox::new();
    let mut typed = Transcript::new("", &sandbox, &registry);
    typed.run(&["--help"]);
    for command in commands() {
        typed.run(&[&command, "--help"]);
    }
    typed.run(&["trust", "fetch", "--help"]);
    typed.run(&["warm"]);
    typed.run(&["gc", "--target", "much"]);
    typed.run(&["node"]);
    typed.run(&["completions", "tcsh"]);
    insta::assert_snapshot!("help_and_wrong_usage", typed.normal());
}

#[test]
fn what_goes_wrong_is_one_line() {
    let registry = own_registry();
    push(&registry);
    let (node, _) = Admin::start(ROOMY);
    let endpoint = |name: &str| format!("unix://{}", node.sandbox.path().join(name).display());
    let mut typed = Transcript::new(&endpoint("none.sock"), &node.sandbox, &registry);
    typed.run(&["status"]);
    // A socket that a node plugin has left behind.
    stop_listening(
        std::os::unix::net::UnixListener::bind(node.sandbox.path().join("left.sock"))
            .expect("a socket"),
    );
    typed.endpoint = endpoint("left.sock");
    typed.run(&["ls"]);
    typed.endpoint = String::new();
    typed.run(&["ls"]);
    typed.endpoint = endpoint("admin.sock");
    let path = |name: &str| node.sandbox.path().join(name).display().to_string();
    // A user who is not root. The binary must be readable for that user.
    let binary = node.sandbox.path().join("csi-driver-oci");
    // Copied by another process: a program cannot run while a process that was just forked here holds it for writing.
    run(tool("cp").args([Path::new(env!("CARGO_BIN_EXE_csi-driver-oci")), &binary]));
    fs::set_permissions(node.sandbox.path(), fs::Permissions::from_mode(0o755)).expect("a mode");
    let output = tool("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&binary)
        .args(["ls", "--admin-endpoint", &typed.endpoint])
        .output()
        .expect("setpriv");
    typed.write(&["ls"], &output);
    fs::write(path("list"), "# what we need\n# r.io/app:v1\nnot a reference\n").expect("a list");
    typed.run(&["warm", "--file", &path("list")]);
    fs::write(path("list"), "# nothing\n").expect("a list");
    typed.run(&["warm", "--file", &path("list")]);
    typed.run(&["warm", "--file", &path("none")]);
    typed.run(&["warm", "r.io/app:v1", "not a reference"]);
    typed.run(&["warm", "r.io/app:v1", "--docker-config", &path("none")]);
    fs::write(path("config.json"), "{").expect("a file");
    typed.run(&["warm", "r.io/app:v1", "--docker-config", &path("config.json")]);
    typed.run(&["warm", "r.io/app:v1", "--platform", "plan9"]);
    // Ten that exist, and one that does not.
    let tags: Vec<_> = (0..10).map(|number| format!("v{number}")).collect();
    for tag in &tags {
        Manifest::artifact([Layer::titled("file", tag.as_str())]).push(&registry, "team/ten", tag);
    }
    let mut list: Vec<_> =
        tags.iter().map(|tag| format!("{}/team/ten:{tag}\n", registry.host())).collect();
    list.insert(4, format!("{}/team/ten:none\n", registry.host()));
    fs::write(path("list"), list.concat()).expect("a list");
    typed.run_sorted(&["warm", "--file", &path("list")]);
    insta::assert_snapshot!("what_goes_wrong_is_one_line", typed.normal());
}
