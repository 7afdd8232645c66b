//! Tests `csi-driver-oci mount` and `unmount`, on a developer's machine.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

use crate::support::{
    Layer, Manifest, Proxy, Sandbox, SmallArtifact, Tree, clean_environment, commands, mounts_at,
    registry, small_artifact, tool, unique,
};

/// A developer's machine: a sandbox, a state directory, a registry.
struct Machine {
    proxy: Proxy,
    artifact: SmallArtifact,
    folder: PathBuf,
    sandbox: Sandbox,
}

impl Machine {
    fn new() -> Self {
        let sandbox = Sandbox::new();
        let folder = sandbox.folder("mounted");
        Self { proxy: Proxy::new(registry()), artifact: small_artifact(), folder, sandbox }
    }

    fn reference(&self) -> String {
        self.proxy.reference(&self.artifact.name)
    }

    fn command(&self, name: &str, arguments: &[&str]) -> Output {
        let mut command: Command = tool(env!("CARGO_BIN_EXE_csi-driver-oci"));
        clean_environment(&mut command);
        command.arg(name).args(arguments);
        if name == "mount" {
            command.arg("--state-dir").arg(self.sandbox.folder("state"));
        }
        command.output().expect("the binary")
    }

    fn folder(&self) -> &str {
        self.folder.to_str().expect("a path")
    }
}

#[track_caller]
fn assert_done(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn mount_shows_the_artifact_and_unmount_takes_it_away() {
    let machine = Machine::new();
    assert_done(&machine.command("mount", &[&machine.reference(), machine.folder()]));
    assert_eq!(Tree::of(&machine.folder).names(), ["file.txt"]);
    assert!(fs::write(machine.folder.join("new"), "x").is_err());
    assert_done(&machine.command("unmount", &[machine.folder()]));
    assert_eq!(mounts_at(&machine.folder), []);
    // A tag is asked for again, unless the policy says otherwise.
    machine.proxy.go_down();
    let output = machine.command("mount", &[&machine.reference(), machine.folder()]);
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("`--pull-policy IfNotPresent` mounts what"), "{message}");
    let cached = ["--pull-policy=IfNotPresent", &machine.reference(), machine.folder()];
    assert_done(&machine.command("mount", &cached));
    assert_done(&machine.command("umount", &[machine.folder()]));
}

#[test]
fn mount_shows_what_was_pushed_last() {
    let machine = Machine::new();
    let mounted = || {
        assert_done(&machine.command("mount", &[&machine.reference(), machine.folder()]));
        let content = fs::read_to_string(machine.folder.join("file.txt")).expect("the file");
        assert_done(&machine.command("unmount", &[machine.folder()]));
        content
    };
    assert_eq!(mounted(), machine.artifact.content);
    assert_done(&machine.command("mount", &[&machine.reference(), machine.folder()]));
    let moved = unique("moved");
    Manifest::artifact([Layer::titled("file.txt", moved.as_str())]).push(
        registry(),
        &machine.artifact.repository,
        "v1",
    );
    // A mounted folder is not replaced by the new content.
    let output = machine.command("mount", &[&machine.reference(), machine.folder()]);
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains(&machine.artifact.digest) && message.contains("unmount it first"));
    assert_done(&machine.command("unmount", &[machine.folder()]));
    assert_eq!(mounted(), moved);
}

#[test]
fn the_cache_of_mount_is_listed_and_cleared() {
    let machine = Machine::new();
    let list = || -> serde_json::Value {
        let output = machine.command("mount", &["--list", "-o", "json"]);
        assert_done(&output);
        serde_json::from_slice(&output.stdout).expect("JSON")
    };
    assert_eq!(list()["artifacts"], serde_json::json!([]));
    let quiet = machine.command("mount", &["-q", &machine.reference(), machine.folder()]);
    assert_done(&quiet);
    assert_eq!((quiet.stdout, quiet.stderr), (Vec::new(), Vec::new()));
    assert_eq!(list()["artifacts"][0]["volumes"], serde_json::json!([machine.folder()]));
    let names = machine.command("mount", &["--list", "-q"]);
    assert_eq!(String::from_utf8_lossy(&names.stdout), format!("{}\n", machine.reference()));
    // The cache keeps mounted content when it is cleared.
    assert_done(&machine.command("mount", &["--clear"]));
    assert_eq!(list()["artifacts"][0]["digest"], machine.artifact.digest.as_str());
    assert_eq!(Tree::of(&machine.folder).names(), ["file.txt"]);
    // Unmounted by another program: the record is stale.
    nix::mount::umount(&machine.folder).expect("unmounted");
    let output = machine.command("mount", &["--clear"]);
    assert_done(&output);
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(told.contains("freed; the cache has 0 B now"), "{told}");
    assert_eq!(list()["artifacts"], serde_json::json!([]));
}

/// Runs the binary.
fn run_with(arguments: &[&str], set: impl FnOnce(&mut Command)) -> (Option<i32>, String, String) {
    let mut command = tool(env!("CARGO_BIN_EXE_csi-driver-oci"));
    clean_environment(&mut command);
    set(command.args(arguments));
    let Output { status, stdout, stderr } = command.output().expect("the binary");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn mounts_without_the_capability_say_what_they_need() {
    for command in [&["mount", "r.io/app:v1", "/mnt"] as &[_], &["unmount", "/mnt"]] {
        let mut setpriv = tool("setpriv");
        clean_environment(&mut setpriv);
        setpriv.args(["--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]);
        let output = setpriv.arg(env!("CARGO_BIN_EXE_csi-driver-oci")).args(command).output();
        let output = output.expect("setpriv");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains("need root (CAP_SYS_ADMIN): use `sudo`"), "{told}");
    }
}

#[test]
fn the_version_is_a_command_too() {
    let version = env!("CARGO_PKG_VERSION");
    let (status, text, _) = run_with(&["version"], |_| ());
    assert!(status == Some(0) && text.starts_with(&format!("csi-driver-oci {version} linux/")));
    let (_, text, _) = run_with(&["version", "-o", "yaml"], |_| ());
    assert!(text.contains(&format!("version: \"{version}\"\n")), "{text}");
    assert_eq!(run_with(&["version", "-q"], |_| ()), (Some(0), String::new(), String::new()));
}

#[test]
fn wrong_values_are_wrong_usage() {
    for arguments in [
        &["mount", "r.io/app:v1", "/mnt", "--pull-policy", "Sometimes"] as &[_],
        &["mount", "r.io/app:v1", "/mnt", "--permissions", "All"],
        &["mount", "r.io/app:v1", "/mnt", "--platform", "plan9"],
        &["mount", "r.io/app:v1", "/mnt", "--file-mode", "rwx"],
        &["mount", "r.io/app:v1", "/mnt", "--include", "["],
        &["mount", "https://r.io/app:v1", "/mnt"],
        &["mount", "r.io/App:v1", "/mnt"],
        &["mount", "--list", "--clear"],
        &["warm", "not a reference"],
        &["warm", "r.io/app:v1", "--platform", "plan9"],
        &["inspect", "not a reference"],
        &["pin", "r.io/app:v1", "not a reference"],
        &["pin"],
        &["rm"],
        &["import", "layout", "--as", "not a reference"],
        &["ls", "--admin-endpoint", ""],
        &["ls", "--admin-endpoint", "relative"],
        &["ls", "-o", "xml"],
        &["check-uninstall", "--driver-name", "No_Name"],
        &["node", "--node-id", ""],
        &["node", "--node-id", "one", "--kubelet-dir", "relative"],
        &["node", "--node-id", "one", "--log-level", "verbose"],
        &["node", "--node-id", "one", "--health-endpoint", "localhost"],
        &["controller", "--identity", "", "--namespace", "default"],
        &["controller", "--identity", "one", "--namespace", "default", "--log-level", "loud"],
    ] {
        let (status, _, told) = run_with(arguments, |_| ());
        assert_eq!(status, Some(2), "{arguments:?}: {told}");
        assert!(told.starts_with("error: "), "{arguments:?}: {told}");
    }
    let (_, _, told) = run_with(&["check", "https://r.io/Team/App:v1"], |_| ());
    assert!(told.contains("write \"r.io/team/app:v1\""), "{told}");
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    for arguments in [
        &["--help"] as &[_],
        &["version"],
        &["crds"],
        &["completions", "bash"],
        &["version", "-o", "json"],
    ] {
        let full = || fs::File::options().write(true).open("/dev/full").expect("the device");
        let (status, _, told) = run_with(arguments, |command| {
            command.stdout(full());
        });
        assert_eq!(status, Some(1), "{arguments:?}");
        assert!(told.contains("standard output cannot be written: No space left"), "{told}");
    }
}

#[test]
fn variables_have_a_prefix_and_earlier_names_count_without_it() {
    let invalid = |name: &str, value: &str| {
        let node = ["node", "--node-id=one"];
        let (status, _, told) = run_with(&node, |command| {
            command.env("CSI_OCI_ENDPOINT", "nowhere").env("CSI_ENDPOINT", "").env(name, value);
        });
        assert_eq!(status, Some(2), "{told}");
        told
    };
    assert!(invalid("CSI_OCI_LOG_LEVEL", "loud").contains("nowhere"), "the first wrong value");
    let endpoint = |variables: &[(&str, &str)]| {
        let (_, _, told) = run_with(&["ls"], |command| {
            command.envs(variables.iter().copied());
        });
        told
    };
    let (old, new) =
        (("ADMIN_ENDPOINT", "unix:///old.sock"), ("CSI_OCI_ADMIN_ENDPOINT", "unix:///new.sock"));
    assert!(endpoint(&[old]).contains("/old.sock"));
    assert!(endpoint(&[new]).contains("/new.sock"));
    assert!(endpoint(&[old, new]).contains("/new.sock"));
    assert!(endpoint(&[]).contains("/run/csi-driver-oci/admin.sock"));
}

#[test]
fn switches_in_the_environment_take_numbers_and_words() {
    for (value, accepted) in [("1", true), ("true", true), ("yes", true), ("0", true), ("2", false)]
    {
        // Ends with the next wrong value.
        let (status, _, told) = run_with(&["node", "--node-id=one"], |command| {
            command.envs([("FLEET", value), ("CSI_OCI_EVENTS", value), ("LEASES", "Never")]);
        });
        assert_eq!(status, Some(2));
        assert_eq!(told.contains("--leases"), accepted, "{value}: {told}");
    }
}

#[test]
fn no_color_is_respected_on_a_terminal() {
    let shown = |set: &[(&str, &str)], arguments: &str| {
        let mut script = tool("script");
        clean_environment(&mut script);
        let line = format!("{} {arguments}", env!("CARGO_BIN_EXE_csi-driver-oci"));
        script.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
        let output = script.env("TERM", "xterm").envs(set.iter().copied()).output();
        String::from_utf8(output.expect("script").stdout).expect("text")
    };
    for arguments in ["--help", "no-such-command", "ls -v --admin-endpoint=/nonexistent.sock"] {
        assert!(shown(&[], arguments).contains('\x1b'), "{arguments}");
        let plain = shown(&[("NO_COLOR", "1")], arguments);
        assert!(!plain.is_empty() && !plain.contains('\x1b'), "{arguments}: {plain}");
    }
}

#[test]
fn bash_completes_commands_flags_and_values() {
    let (_, script, _) = run_with(&["completions", "bash"], |_| ());
    let complete = |words: &[&str]| -> Vec<String> {
        let words = words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
        let ask = format!(
            "{script}\nCOMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n\
             function_of=$(complete -p csi-driver-oci | sed 's/.*-F \\([^ ]*\\) .*/\\1/')\n\
             $function_of csi-driver-oci \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD-1]}}\"\n\
             printf '%s\\n' \"${{COMPREPLY[@]}}\""
        );
        let text = crate::support::run(tool("bash").args(["--norc", "-c", &ask]));
        text.lines().map(str::to_owned).collect()
    };
    let program = "csi-driver-oci";
    assert_eq!(complete(&[program, "sta"]), ["status"]);
    assert_eq!(complete(&[program, "mount", "--pull-p"]), ["--pull-policy"]);
    assert_eq!(
        complete(&[program, "mount", "--pull-policy", ""]),
        ["Always", "IfNotPresent", "Never"]
    );
    assert_eq!(complete(&[program, "ls", "-o", "y"]), ["yaml"]);
    assert_eq!(complete(&[program, "ls", "--output", ""]), ["table", "json", "yaml"]);
    assert_eq!(complete(&[program, "node", "--log-level", "d"]), ["debug"]);
    assert_eq!(complete(&[program, "node", "--leases", "D"]), ["Disable"]);
    assert_eq!(complete(&[program, "completions", "z"]), ["zsh"]);
}

#[test]
fn a_failed_mount_says_why_in_one_line_and_leaves_nothing() {
    let machine = Machine::new();
    let output =
        machine.command("mount", &[&machine.proxy.reference("no/such:v1"), machine.folder()]);
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> = message.lines().filter(|line| line.contains("no/such")).collect();
    assert_eq!(lines.len(), 1, "{message}");
    assert_eq!(mounts_at(&machine.folder), []);
}

#[test]
fn wrong_usage_has_a_status_of_its_own() {
    let machine = Machine::new();
    assert_eq!(machine.command("mount", &[]).status.code(), Some(2));
    assert_eq!(machine.command("mount", &["--no-such-flag"]).status.code(), Some(2));
    let output = tool(env!("CARGO_BIN_EXE_csi-driver-oci"))
        .arg("no-such-command")
        .output()
        .expect("the binary");
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn help_of_every_command_has_an_example() {
    for command in commands() {
        let output = tool(env!("CARGO_BIN_EXE_csi-driver-oci"))
            .args([&command, "--help"])
            .output()
            .expect("the binary");
        assert_done(&output);
        let help = String::from_utf8_lossy(&output.stdout).to_lowercase();
        assert!(help.contains("example"), "{command} --help has no example:\n{help}");
    }
}

#[test]
fn shells_take_their_completions() {
    for (shell, parse) in [("bash", Some(["-n", "/dev/stdin"])), ("zsh", None), ("fish", None)] {
        let output = tool(env!("CARGO_BIN_EXE_csi-driver-oci"))
            .args(["completions", shell])
            .output()
            .expect("the binary");
        assert_done(&output);
        let script = String::from_utf8(output.stdout).expect("text");
        for word in ["warm", "check-config", "--admin-endpoint"] {
            assert!(script.contains(word.trim_start_matches('-')), "{shell}: no {word}");
        }
        let Some(arguments) = parse else { continue };
        let mut shell = Command::new(shell)
            .args(arguments)
            .stdin(std::process::Stdio::piped())
            .spawn()
            .expect("a shell");
        let mut stdin = shell.stdin.take().expect("its input");
        std::io::Write::write_all(&mut stdin, script.as_bytes()).expect("written");
        drop(stdin);
        assert!(shell.wait().expect("its end").success(), "it does not parse");
    }
}

#[test]
fn a_reader_that_has_had_enough_is_no_failure() {
    let mut child = tool(env!("CARGO_BIN_EXE_csi-driver-oci"))
        .args(["completions", "bash"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("the binary");
    drop(child.stdout.take());
    assert!(child.wait().expect("its end").success());
}

#[test]
fn a_state_folder_that_a_driver_uses_is_refused() {
    let machine = Machine::new();
    let options = crate::support::DriverOptions::new(&machine.sandbox)
        .state(&machine.sandbox.folder("state"));
    let driver = options.start();
    let output = machine.command("mount", &[&machine.reference(), machine.folder()]);
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("in use") || message.contains(&driver.id().to_string()), "{message}");
    assert_eq!(mounts_at(&machine.folder), []);
}

#[test]
fn unmount_leaves_the_volumes_of_pods_to_the_node_plugin() {
    let node = crate::support::Node::start();
    let (volume, _) = node.mount(&node.proxy.reference(&node.small_artifact().name));
    let target = volume.target().to_str().expect("a path");
    let output = Machine::new().command("unmount", &[target]);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("delete the pod"), "{message}");
    volume.assert_mounted();
    node.kubelet.unpublish(&volume);
}

#[test]
fn unmount_touches_nothing_that_is_not_ours() {
    let machine = Machine::new();
    let foreign = machine.sandbox.tmpfs("foreign", nix::mount::MsFlags::empty());
    fs::write(foreign.join("precious"), "data").expect("a file");
    let _ = machine.command("unmount", &[foreign.to_str().expect("a path")]);
    assert!(foreign.join("precious").exists());
    let plain = machine.sandbox.folder("plain");
    fs::write(plain.join("precious"), "data").expect("a file");
    let _ = machine.command("unmount", &[plain.to_str().expect("a path")]);
    assert!(plain.join("precious").exists());
}
