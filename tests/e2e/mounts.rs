//! Tests what a pod can and cannot do in its volume, on every filesystem of the node.

use std::{fs, io, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use nix::mount::MsFlags;

use crate::support::{
    DriverOptions, Image, Layer, Manifest, Node, Tar, Tree, Volume, mount_with_shifted_owners,
    mounts_at, mounts_under, registry, unique,
};

const SCRIPT: &str = "#!/bin/sh\necho it runs\n";

/// An artifact with a program, an archive and a link.
fn program() -> String {
    let repository = unique("program");
    let archive = Tar::new()
        .folder("d", 0o755)
        .file("d/run", 0o755, SCRIPT)
        .symbolic_link("link", "d/run")
        .hard_link("hard", "d/run");
    Image::new().layer(archive.finish()).push(registry(), &repository, "v1");
    format!("{repository}:v1")
}

#[track_caller]
fn assert_runs(volume: &Volume) {
    let output =
        Command::new(volume.target().join("link")).output().expect("the program of the volume");
    assert_eq!(output.stdout, b"it runs\n");
}

#[track_caller]
fn assert_read_only<T>(result: io::Result<T>) {
    let error = result.err().expect("a change in a read-only volume");
    assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{error}");
}

/// Mounts, runs and unmounts with the state at this place.
#[track_caller]
fn works_with_state_at(place: impl FnOnce(&Node) -> std::path::PathBuf) {
    let mut node = Node::start();
    let state = place(&node);
    let options = node.driver.kill().state(&state);
    node.driver = options.start();
    let reference = node.proxy.reference(&program());
    let (first, tree) = node.mount(&reference);
    assert_runs(&first);
    assert_read_only(fs::write(first.target().join("new"), "x"));
    let (second, same) = node.mount_with(&reference, |mut volume| {
        volume.request.readonly = true;
        volume
    });
    assert_eq!(tree, same);
    node.driver = node.driver.restart();
    for volume in [&first, &second] {
        node.kubelet.publish_well(volume);
    }
    node.kubelet.unpublish(&first);
    assert_runs(&second);
    node.kubelet.unpublish(&second);
    second.assert_nothing_left();
}

#[test]
fn nothing_can_be_changed_in_a_volume() {
    let node = Node::start();
    let (volume, tree) = node.mount(&node.proxy.reference(&program()));
    let file = volume.target().join("d/run");
    assert_read_only(fs::write(volume.target().join("new"), "x"));
    assert_read_only(fs::File::options().write(true).open(&file));
    assert_read_only(fs::File::options().append(true).open(&file));
    assert_read_only(fs::remove_file(&file));
    assert_read_only(fs::rename(&file, volume.target().join("renamed")));
    assert_read_only(fs::create_dir(volume.target().join("folder")));
    assert_read_only(fs::set_permissions(&file, fs::Permissions::from_mode(0o777)));
    assert_read_only(std::os::unix::fs::chown(&file, Some(1), Some(1)));
    assert_read_only(fs::hard_link(&file, volume.target().join("another")));
    assert_eq!(Tree::of(volume.target()), tree);
}

#[test]
fn a_volume_is_read_only_whatever_read_only_says() {
    let node = Node::start();
    let reference = node.proxy.reference(&program());
    for readonly in [false, true] {
        let (volume, _) = node.mount_with(&reference, |mut volume| {
            volume.request.readonly = readonly;
            volume
        });
        assert_read_only(fs::write(volume.target().join("new"), "x"));
    }
}

#[test]
fn the_state_may_lie_on_a_mount_without_programs() {
    works_with_state_at(|node| {
        node.sandbox.tmpfs("noexec", MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV)
    });
}

#[test]
fn the_state_may_lie_on_ext4() {
    works_with_state_at(|node| node.sandbox.filesystem("ext4", "ext4", "noexec"));
}

#[test]
fn the_state_may_lie_on_xfs() {
    works_with_state_at(|node| node.sandbox.filesystem("xfs", "xfs", "noatime"));
}

#[test]
fn the_state_may_lie_on_btrfs() {
    works_with_state_at(|node| node.sandbox.filesystem("btrfs", "btrfs", "noatime"));
}

#[test]
fn the_state_may_lie_on_an_overlay() {
    works_with_state_at(|node| {
        let disk = node.sandbox.tmpfs("disk", MsFlags::empty());
        for name in ["lower", "upper", "work"] {
            fs::create_dir(disk.join(name)).expect("a folder");
        }
        let root = node.sandbox.folder("container-root");
        let disk = disk.display();
        let options = format!("lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work");
        let (none, kind) = (MsFlags::empty(), Some("overlay"));
        nix::mount::mount(Some("overlay"), &root, kind, none, Some(options.as_str()))
            .expect("an overlay");
        root.join("state")
    });
}

#[test]
fn the_state_may_lie_in_a_folder_of_another_filesystem() {
    works_with_state_at(|node| {
        let path = node.sandbox.filesystem("ext4", "other", "noatime").join("deep/er");
        fs::create_dir_all(&path).expect("folders");
        path
    });
}

#[test]
fn the_state_may_be_reached_through_a_symbolic_link() {
    works_with_state_at(|node| {
        let link = node.sandbox.path().join("link-to-state");
        std::os::unix::fs::symlink(node.sandbox.folder("real-state"), &link).expect("a link");
        link
    });
}

#[test]
fn the_state_may_be_reached_through_a_link_to_another_filesystem() {
    works_with_state_at(|node| {
        let link = node.sandbox.path().join("link-to-state");
        let disk = node.sandbox.filesystem("ext4", "disk", "rw");
        std::os::unix::fs::symlink(disk, &link).expect("a link");
        link
    });
}

#[test]
fn the_kubelets_folder_may_be_another_filesystem_that_is_shared() {
    let mut node = Node::start();
    let kubelet = node.driver.options.kubelet.clone();
    let options = node.driver.kill();
    remove_sockets(&options);
    node.sandbox.tmpfs("kubelet", MsFlags::empty());
    nix::mount::mount(None::<&str>, &kubelet, None::<&str>, MsFlags::MS_SHARED, None::<&str>)
        .expect("make it shared");
    fs::create_dir_all(kubelet.join("plugins/oci.custom.io")).expect("the kubelet's folders");
    node.driver = options.start();
    let (volume, _) = node.mount(&node.proxy.reference(&program()));
    assert_runs(&volume);
    node.kubelet.unpublish(&volume);
}

/// Removes the sockets of a killed driver from a directory that is about to be covered.
fn remove_sockets(options: &DriverOptions) {
    let _ = fs::remove_file(&options.socket);
    let _ = fs::remove_file(options.registration_socket());
}

#[test]
fn a_pod_in_a_user_namespace_can_have_the_volume_idmapped() {
    let node = Node::start();
    let (volume, _) = node.mount_with(&node.proxy.reference(&program()), |mut volume| {
        volume.request.readonly = true;
        volume
    });
    // The container runtime does this for `hostUsers: false`: a copy of the mount with shifted owners.
    let mapped = node.sandbox.folder("mapped");
    mount_with_shifted_owners(volume.target(), &mapped, 100_000);
    let owner = |path: &Path| {
        use std::os::unix::fs::MetadataExt as _;
        fs::metadata(path).expect("metadata").uid()
    };
    assert_eq!(owner(&volume.target().join("d/run")), 0);
    assert_eq!(owner(&mapped.join("d/run")), 100_000);
    assert_read_only(fs::write(mapped.join("new"), "x"));
    nix::mount::umount(&mapped).expect("unmount");
    node.kubelet.unpublish(&volume);
}

#[test]
fn pods_that_share_content_do_not_share_their_mount() {
    let node = Node::start();
    let reference = node.proxy.reference(&program());
    let (one, _) = node.mount(&reference);
    let (other, _) = node.mount_with(&reference, |volume| volume.mount_option("noexec"));
    assert_runs(&one);
    assert!(Command::new(other.target().join("d/run")).status().is_err(), "noexec is honoured");
    node.kubelet.unpublish(&other);
    assert_runs(&one);
    assert_eq!(mounts_at(other.target()), []);
}

/// Mounts something inside a volume, with the state on a shared mount.
#[track_caller]
fn shares_no_mounts_with_others(argument: &[&str]) {
    let mut node = Node::start_with(|_, options| {
        argument.iter().fold(options, |options, argument| options.argument(argument))
    });
    let options = node.driver.kill();
    let state = node.sandbox.tmpfs("shared", MsFlags::empty());
    let nothing = None::<&str>;
    nix::mount::mount(nothing, &state, nothing, MsFlags::MS_SHARED, nothing)
        .expect("make it shared");
    node.driver = options.state(&state).start();
    let reference = node.proxy.reference(&program());
    let [one, other] = [(); 2].map(|()| {
        let read_only = |mut volume: Volume| {
            volume.request.readonly = true;
            volume
        };
        node.mount_with(&reference, read_only).0
    });
    let inside = one.target().join("d");
    nix::mount::mount(Some("inside"), &inside, Some("tmpfs"), MsFlags::empty(), nothing)
        .expect("a mount inside of the volume");
    assert_eq!(mounts_under(other.target()).len(), 1, "the other volume shows it");
    assert_runs(&other);
    nix::mount::umount(&inside).expect("unmount");
    for volume in [&one, &other] {
        node.kubelet.unpublish(volume);
        volume.assert_nothing_left();
    }
}

#[test]
fn volumes_share_no_mounts_that_are_made_inside_of_them() {
    shares_no_mounts_with_others(&[]);
}

#[test]
fn volumes_share_no_mounts_on_kernels_without_detached_mounts() {
    shares_no_mounts_with_others(&["--staged-mounts"]);
}

#[test]
fn files_of_one_artifact_are_stored_once() {
    use std::os::unix::fs::MetadataExt as _;
    let node = Node::start();
    let repository = unique("shared");
    let (one, two) = (Layer::titled("a", "shared bytes"), Layer::titled("own", "own bytes"));
    Manifest::artifact([one.clone()]).push(registry(), &repository, "v1");
    Manifest::artifact([one, two]).push(registry(), &repository, "v2");
    let inode = |tag: &str| {
        let (volume, _) = node.mount(&node.proxy.reference(&format!("{repository}:{tag}")));
        fs::metadata(volume.target().join("a")).expect("metadata").ino()
    };
    assert_eq!(inode("v1"), inode("v2"));
}

#[test]
fn kernels_without_detached_mounts_get_the_same_volume() {
    let node = Node::start_with(|_, options| options.argument("--staged-mounts"));
    let reference = node.proxy.reference(&program());
    let (first, tree) = node.mount(&reference);
    assert_runs(&first);
    assert_read_only(fs::write(first.target().join("new"), "x"));
    let table = mounts_at(first.target());
    assert_eq!(table.len(), 1);
    for option in ["ro", "nosuid", "nodev"] {
        assert!(table[0].options.iter().any(|found| found == option), "{option}");
    }
    // At once, since they use one staging directory in turns.
    let volumes: Vec<_> = (0..8).map(|_| node.kubelet.new_volume(&reference)).collect();
    std::thread::scope(|scope| {
        for volume in &volumes {
            scope.spawn(|| node.kubelet.publish_well(volume));
        }
    });
    for volume in &volumes {
        assert_eq!(Tree::of(volume.target()), tree);
        node.kubelet.unpublish(volume);
    }
    node.kubelet.unpublish(&first);
    assert_eq!(mounts_under(node.driver.state()), [], "nothing stays staged");
}
