//! Tests `csi-driver-oci mount` and `unmount`, on a developer's machine.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

use crate::support::{
    Proxy, Sandbox, SmallArtifact, Tree, clean_environment, commands, mounts_at, registry,
    small_artifact, tool,
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
    // The second mount uses the cache.
    machine.proxy.go_down();
    assert_done(&machine.command("mount", &[&machine.reference(), machine.folder()]));
    assert_done(&machine.command("unmount", &[machine.folder()]));
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
