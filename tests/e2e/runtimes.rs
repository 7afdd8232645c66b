//! Tests how a container runtime uses a volume, and what a process in the container can do then.
//!
//! runc 1.2 and later bind a volume into the container and clear the read-only flag of that copy, unless the pod asks
//! for a read-only volume. These tests do the same, as root.

use std::{fs, path::Path, process::Command};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tonic::Code;

use crate::support::{
    Admin, Image, Node, Tar, Tree, Volume, mount_with_shifted_owners, mounts_at, noise, registry,
    run, tool, unique, wait_until,
};

/// The argument of mount(2) where it needs no text.
const NONE: Option<&str> = None;

const EVICTS_AT_ONCE: &str = "cache: {minFreePercent: 0, minFreeInodesPercent: 0, \
                              highThresholdPercent: 100, lowThresholdPercent: 100, minimumAge: 0s}\n";

/// Pushes an artifact with a program and directories. Returns its reference below a registry.
fn artifact() -> String {
    let repository = unique("runtime");
    let archive = Tar::new()
        .folder("d", 0o755)
        .file("d/run", 0o755, "#!/bin/sh\necho it runs\n")
        .file("data", 0o644, noise(4096, 7))
        .symbolic_link("link", "d/run");
    Image::new().layer(archive.finish()).push(registry(), &repository, "v1");
    format!("{repository}:v1")
}

/// Every way to change a volume, a line each: the name of the way, and the kernel's answer.
const ATTACKS: &str = r#"
mount --rbind "$1" "$2"
mount -o remount,bind,rw "$2"
if [ "$3" = privileged ]; then mount -o remount,rw "$2" 2>/dev/null; fi
try() { name=$1; shift; if answer=$("$@" 2>&1); then echo "$name: done"; else echo "$name: $answer"; fi; }
try create touch "$2/new"
try append sh -c "echo more >> '$2/data'"
try truncate truncate -s 0 "$2/data"
try overwrite sh -c "echo other > '$2/d/run'"
try chmod chmod 777 "$2/d/run"
try chown chown 1:1 "$2/data"
try touch touch -d 2001-01-01 "$2/data"
try rename mv "$2/data" "$2/renamed"
try link ln "$2/data" "$2/another"
try mkdir mkdir "$2/folder"
try rmdir rmdir "$2/d"
try unlink rm -f "$2/data"
try attribute setfattr -n user.x -v y "$2/data"
echo "executable: $("$2/d/run")"
"#;

/// Gives the volume to a container as runc does, attacks it from there as root, and asserts that
/// nothing changed.
#[track_caller]
fn assert_cannot_be_written(node: &Node, volume: &Volume, path: &Path) {
    let before = Tree::of(volume.target());
    for privilege in ["ordinary", "privileged"] {
        let container = node.sandbox.folder(&unique("container"));
        let output = tool("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", ATTACKS, "sh"])
            .args([path, container.as_path()])
            .arg(privilege)
            .env("LC_ALL", "C")
            .output()
            .expect("a mount namespace");
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        let attacks: Vec<_> = told.lines().filter(|line| !line.starts_with("exec")).collect();
        assert_eq!(attacks.len(), 13, "{told}{}", String::from_utf8_lossy(&output.stderr));
        for attack in attacks {
            assert!(attack.contains("Read-only file system"), "{privilege}: {attack}");
        }
        assert!(told.contains("executable: it runs"), "{told}");
    }
    assert_eq!(Tree::of(volume.target()), before);
}

fn read_only(mut volume: Volume) -> Volume {
    volume.request.readonly = true;
    volume
}

fn filesystem(volume: &Volume) -> String {
    let mounts = mounts_at(volume.target());
    assert_eq!(mounts.len(), 1, "{mounts:?}");
    mounts[0].filesystem.clone()
}

#[test]
fn a_pod_without_read_only_cannot_write_into_the_cache() {
    let node = Node::start();
    let reference = node.proxy.reference(&artifact());
    let (volume, tree) = node.mount(&reference);
    assert_cannot_be_written(&node, &volume, volume.target());
    let (second, same) = node.mount(&reference);
    assert_eq!(tree, same);
    node.kubelet.unpublish(&volume);
    node.kubelet.unpublish(&second);
}

#[test]
fn a_part_of_a_volume_cannot_be_written_either() {
    let node = Node::start();
    let repository = unique("nested");
    let archive = Tar::new()
        .folder("part/d", 0o755)
        .file("part/d/run", 0o755, "#!/bin/sh\necho it runs\n")
        .file("part/data", 0o644, "content");
    Image::new().layer(archive.finish()).push(registry(), &repository, "v1");
    let (volume, _) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    // The kubelet does this for a subPath.
    let part = node.sandbox.folder("subpath");
    mount(Some(&volume.target().join("part")), &part, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .expect("a bind");
    assert_cannot_be_written(&node, &volume, &part);
    umount2(&part, MntFlags::empty()).expect("unmounted");
}

#[test]
fn kernels_without_detached_mounts_are_as_safe() {
    let mut node = Node::start_with(|_, options| options.argument("--staged-mounts"));
    let reference = node.proxy.reference(&artifact());
    let (volume, _) = node.mount(&reference);
    assert_eq!(filesystem(&volume), "overlay");
    assert_cannot_be_written(&node, &volume, volume.target());
    node.kubelet.publish_well(&volume);
    node.driver = node.driver.restart();
    node.kubelet.publish_well(&volume);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_developers_mount_cannot_be_written_either() {
    let node = Node::start();
    let target = node.sandbox.folder("mounted");
    let mut command = Command::new(env!("CARGO_BIN_EXE_csi-driver-oci"));
    command.arg("mount").arg(node.proxy.reference(&artifact())).arg(&target);
    command.arg("--state-dir").arg(node.sandbox.folder("developer"));
    run(&mut command);
    let mut volume = node.kubelet.new_volume("unused:v1");
    volume.request.target_path = target.to_string_lossy().into_owned();
    assert_cannot_be_written(&node, &volume, &target);
    let mut command = Command::new(env!("CARGO_BIN_EXE_csi-driver-oci"));
    run(command
        .arg("unmount")
        .arg(&target)
        .arg("--state-dir")
        .arg(node.sandbox.folder("developer")));
    assert_eq!(mounts_at(&target), []);
}

/// Publishes and attacks with the state directory at this place, before and after a restart.
#[track_caller]
fn is_safe_with_state_at(arguments: &[&str], place: impl FnOnce(&Node) -> std::path::PathBuf) {
    let mut node = Node::start();
    let state = place(&node);
    let mut options = node.driver.kill().state(&state);
    options.arguments.extend(arguments.iter().map(|&argument| argument.to_owned()));
    node.driver = options.start();
    let reference = node.proxy.reference(&artifact());
    let (volume, _) = node.mount(&reference);
    let (bind, _) = node.mount_with(&reference, read_only);
    assert_cannot_be_written(&node, &volume, volume.target());
    node.driver = node.driver.restart();
    for volume in [&volume, &bind] {
        node.kubelet.publish_well(volume);
        node.kubelet.unpublish(volume);
    }
}

#[test]
fn the_cache_is_safe_on_ext4_without_programs() {
    is_safe_with_state_at(&[], |node| node.sandbox.filesystem("ext4", "ext4", "noexec"));
}

#[test]
fn the_cache_is_safe_on_xfs() {
    is_safe_with_state_at(&[], |node| node.sandbox.filesystem("xfs", "xfs", "rw"));
}

#[test]
fn the_cache_is_safe_on_btrfs() {
    is_safe_with_state_at(&[], |node| node.sandbox.filesystem("btrfs", "btrfs", "rw"));
}

/// Returns a path that is longer than the kernel's limit on all lower directories of an overlay together.
fn long_path(node: &Node) -> std::path::PathBuf {
    let path = node.sandbox.folder("long").join("a".repeat(200)).join("b".repeat(200));
    fs::create_dir_all(&path).expect("folders");
    path
}

#[test]
fn the_path_of_the_state_may_be_long() {
    is_safe_with_state_at(&[], long_path);
}

#[test]
fn the_path_of_the_state_may_be_long_on_old_kernels() {
    is_safe_with_state_at(&["--staged-mounts"], long_path);
}

#[test]
fn read_only_decides_the_form_of_the_mount() {
    let node = Node::start();
    let reference = node.proxy.reference(&artifact());
    let (overlay, tree) = node.mount(&reference);
    let (bind, same) = node.mount_with(&reference, read_only);
    assert_eq!(filesystem(&overlay), "overlay");
    assert_ne!(filesystem(&bind), "overlay");
    assert_eq!(tree, same);
    // A pod with a user namespace gets this: a copy of the mount with shifted owners.
    let mapped = node.sandbox.folder("mapped");
    mount_with_shifted_owners(bind.target(), &mapped, 100_000);
    umount2(&mapped, MntFlags::empty()).expect("unmounted");
}

#[test]
fn a_publish_in_the_other_form_replaces_the_mount() {
    let mut node = Node::start();
    let mut volume = node.kubelet.new_volume(&node.proxy.reference(&artifact()));
    node.kubelet.publish_well(&volume);
    let tree = Tree::of(volume.target());
    let file = fs::File::open(volume.target().join("data")).expect("open");
    node.proxy.go_down();
    for lost in [false, true] {
        for readonly in [true, false, true] {
            volume.request.readonly = readonly;
            if lost {
                for record in
                    fs::read_dir(node.driver.state().join("publications")).expect("records")
                {
                    fs::remove_file(record.expect("a record").path()).expect("removed");
                }
            }
            node.kubelet.publish_well(&volume);
            assert_eq!(filesystem(&volume) == "overlay", !readonly);
            assert_eq!(Tree::of(volume.target()), tree);
            node.kubelet.publish_well(&volume);
        }
    }
    node.driver = node.driver.restart();
    volume.request.readonly = false;
    node.kubelet.publish_well(&volume);
    assert_cannot_be_written(&node, &volume, volume.target());
    drop(file);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_stack_of_both_forms_is_undone() {
    let node = Node::start();
    let reference = node.proxy.reference(&artifact());
    let (overlay, _) = node.mount(&reference);
    let (bind, _) = node.mount_with(&reference, read_only);
    for source in [&bind, &overlay, &bind] {
        mount(Some(source.target()), overlay.target(), NONE, MsFlags::MS_BIND, NONE)
            .expect("a bind");
    }
    assert_eq!(mounts_at(overlay.target()).len(), 4);
    node.kubelet.publish_well(&overlay);
    assert_eq!(filesystem(&overlay), "overlay");
    node.kubelet.unpublish(&overlay);
    node.kubelet.unpublish(&bind);
}

fn start_with_mode(mode: &str) -> Node {
    Node::start_configured(|_| {}, &format!("volumes: {{mount: {mode}}}\n"))
}

#[test]
fn overlay_for_every_volume() {
    let node = start_with_mode("Overlay");
    let (volume, _) = node.mount_with(&node.proxy.reference(&artifact()), read_only);
    assert_eq!(filesystem(&volume), "overlay");
    node.kubelet.unpublish(&volume);
}

#[test]
fn bind_refuses_what_a_pod_could_write_to() {
    let node = start_with_mode("Bind");
    let reference = node.proxy.reference(&artifact());
    let volume = node.kubelet.new_volume(&reference);
    let told = node.kubelet.publish_badly(&volume, Code::InvalidArgument);
    assert!(told.contains("readOnly: true") && told.contains("volumes.mount: Bind"), "{told}");
    assert_eq!(node.proxy.requests().len(), 0, "refused before anything is fetched");
    let (bind, _) = node.mount_with(&reference, read_only);
    assert_ne!(filesystem(&bind), "overlay");
}

#[test]
fn content_of_which_a_part_is_still_mounted_is_not_evicted() {
    for change in [std::convert::identity as fn(Volume) -> Volume, read_only] {
        let (node, admin) = Admin::start(EVICTS_AT_ONCE);
        let (volume, _) = node.mount_with(&node.proxy.reference(&artifact()), change);
        let part = node.sandbox.folder("subpath");
        mount(Some(&volume.target().join("d")), &part, NONE, MsFlags::MS_BIND, NONE)
            .expect("a bind");
        node.kubelet.unpublish(&volume);
        wait_until("it is unpublished", || admin.json(&["status"])["published"] == 0);
        admin.text(&["gc", "--target", "0"]);
        assert_ne!(admin.json(&["status"])["cacheObjects"], 0, "its tree is in use");
        umount2(&part, MntFlags::empty()).expect("unmounted");
        admin.text(&["gc", "--target", "0"]);
        assert_eq!(admin.json(&["status"])["cacheObjects"], 0);
    }
}

#[test]
fn a_mounted_overlay_without_a_record_is_not_evicted() {
    let (node, admin) = Admin::start(EVICTS_AT_ONCE);
    let (volume, tree) = node.mount(&node.proxy.reference(&artifact()));
    let Node { driver, kubelet, proxy, sandbox } = node;
    // A mount that no kubelet publishes again is known to the mount table only.
    let elsewhere = sandbox.folder("elsewhere");
    mount(Some(volume.target()), &elsewhere, NONE, MsFlags::MS_BIND, NONE).expect("a bind");
    kubelet.unpublish(&volume);
    let driver = driver.restart();
    admin.text(&["gc", "--target", "0"]);
    assert_eq!(Tree::of(&elsewhere), tree);
    umount2(&elsewhere, MntFlags::empty()).expect("unmounted");
    drop((driver, proxy));
}

#[test]
fn a_mount_of_another_program_inside_of_a_volume_is_not_lost() {
    let node = Node::start();
    for change in [std::convert::identity as fn(Volume) -> Volume, read_only] {
        let (volume, _) = node.mount_with(&node.proxy.reference(&artifact()), change);
        let inside = volume.target().join("d");
        mount(Some("other"), &inside, Some("tmpfs"), MsFlags::empty(), NONE).expect("a tmpfs");
        fs::write(inside.join("precious"), "data").expect("a file");
        let Volume { request, .. } = &volume;
        let refused = node
            .kubelet
            .unpublish_request(&request.volume_id, &request.target_path)
            .expect_err("a mount inside");
        assert_eq!(refused.code(), Code::Aborted, "{refused}");
        assert!(refused.message().contains("unmount that first"), "{refused}");
        assert_eq!(fs::read_to_string(inside.join("precious")).expect("kept"), "data");
        umount2(&inside, MntFlags::empty()).expect("unmounted");
        // One that is in use is unmounted all the same, lazily.
        let file = fs::File::open(volume.target().join("data")).expect("open");
        node.kubelet.unpublish(&volume);
        drop(file);
    }
}

#[test]
fn what_lies_in_the_empty_directory_is_never_shown() {
    let node = Node::start();
    let reference = node.proxy.reference(&artifact());
    let foreign = node.driver.state().join("empty/foreign");
    fs::write(&foreign, "not of the artifact").expect("a file");
    let volume = node.kubelet.new_volume(&reference);
    let told = node.kubelet.publish_badly(&volume, Code::Unavailable);
    assert!(told.contains("is not empty"), "{told}");
    fs::remove_file(foreign).expect("removed");
    node.kubelet.publish_well(&volume);
}

/// A lease on a file (fcntl(2), `F_SETLEASE`), as any process may take on a file of its own user.
struct Lease(fs::File);

#[allow(unsafe_code, reason = "nix has no wrapper")]
impl Lease {
    /// Takes the lease.
    ///
    /// # Errors
    ///
    /// Errors of the kernel, which has no leases if `fs.leases-enable` is 0.
    fn take(path: &Path) -> std::io::Result<Self> {
        use std::os::fd::AsRawFd as _;
        let file = fs::File::open(path)?;
        // SAFETY: the descriptor is open and the other arguments are numbers.
        match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) } {
            0 => Ok(Self(file)),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    /// Returns whether no other process has opened the file since.
    fn is_undisturbed(&self) -> bool {
        use std::os::fd::AsRawFd as _;
        // SAFETY: the descriptor is open and the other argument is a number.
        let kind = unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_GETLEASE) };
        kind == libc::F_WRLCK
    }
}

/// Opens and reads a file in another process. An open that waits for a lease ends with the lease.
#[track_caller]
fn read_as_another_process(path: &Path) {
    run(tool("cat").arg(path));
}

#[test]
fn a_lease_taken_through_an_overlay_stops_no_other_pod() {
    // SIGIO tells the holder of a lease that another process opens the file. It is not needed here.
    let ignored = nix::sys::signal::SigHandler::SigIgn;
    #[allow(unsafe_code, reason = "the signal is ignored, nothing is run")]
    // SAFETY: ignoring a signal runs no code.
    unsafe { nix::sys::signal::signal(nix::sys::signal::Signal::SIGIO, ignored) }.expect("SIGIO");
    for (configuration, attacker, victim) in [
        // By default the attacker chooses the form by `readOnly`.
        ("", false, true),
        ("", false, false),
        // If all are overlays, it cannot.
        ("volumes: {mount: Overlay}\n", true, true),
        ("volumes: {mount: Overlay}\n", true, false),
    ] {
        let node = Node::start_configured(|_| {}, configuration);
        let reference = node.proxy.reference(&artifact());
        let mounted = |readonly: bool| {
            node.mount_with(&reference, |mut volume| {
                volume.request.readonly = readonly;
                volume
            })
        };
        let ((attacker, _), (victim, _)) = (mounted(attacker), mounted(victim));
        let lease = Lease::take(&attacker.target().join("data")).expect("a lease");
        read_as_another_process(&victim.target().join("data"));
        assert!(lease.is_undisturbed(), "{configuration}");
    }
}
