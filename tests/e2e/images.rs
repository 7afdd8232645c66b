//! Ordinary images, compared with what umoci and containerd unpack of them.

use std::{fs, os::unix::fs::PermissionsExt as _};

use tonic::Code;

use crate::support::{
    Containerd, Image, Kind, Node, OCI_TAR, OCI_TAR_GZIP, OCI_TAR_ZSTD, Tar, Tree, copy_layout,
    gzip, registry, run, tool, umoci_unpack, unique, zstandard,
};

/// Mounts the image and compares all of it, links and times included, with the unpacking of umoci and
/// of containerd.
#[track_caller]
fn same_as_others(node: &Node, name: &str) -> Tree {
    let at_registry = format!("{}/{name}", registry().host());
    let (rootfs, _folder) = umoci_unpack(&at_registry);
    let expected = Tree::of(&rootfs);
    let reference = node.proxy.reference(name);
    let (_, preserved) =
        node.mount_with(&reference, |volume| volume.attribute("permissions", "Preserve"));
    let (_, readable) = node.mount(&reference);
    let without_special_bits = |tree: Tree| {
        let mut tree = tree;
        for entry in tree.entries.values_mut() {
            entry.mode &= 0o777;
        }
        tree
    };
    // Folders that a layer only passes through have whatever time they were made at.
    let times = |mut tree: Tree| {
        for entry in tree.entries.values_mut() {
            if entry.kind == Kind::Folder {
                entry.modified = 0;
            }
        }
        tree
    };
    assert_eq!(
        times(preserved),
        times(without_special_bits(expected.clone())),
        "with permissions: Preserve"
    );
    assert_eq!(
        times(readable.clone()),
        times(expected.clone().readable()),
        "with permissions: Readable"
    );
    let (root, run) = (node.sandbox.folder("containerd"), node.sandbox.folder("run"));
    let mounted = node.sandbox.folder("by-containerd");
    Containerd::start(&root, &run).mount(&at_registry, &mounted);
    assert_eq!(times(Tree::of(&mounted)), times(expected), "containerd and umoci");
    nix::mount::umount(&mounted).expect("unmounted");
    readable
}

#[test]
fn an_image_of_umoci_with_whiteouts_and_opaque_folders_is_what_umoci_unpacks() {
    let node = Node::start();
    let folder =
        tempfile::Builder::new().prefix("e2e-image").tempdir_in("/var/tmp").expect("a folder");
    let layout = folder.path().join("layout");
    let image = format!("{}:image", layout.display());
    let source = folder.path().join("source");
    for (name, mode, text) in [
        ("kept", 0o644, "kept"),
        ("removed", 0o644, "removed"),
        ("dir/old", 0o600, "old"),
        ("dir/sub/older", 0o755, "older"),
        ("other/file", 0o444, "other"),
    ] {
        let path = source.join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("folders");
        fs::write(&path, text).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("a mode");
    }
    let fresh = folder.path().join("fresh");
    fs::create_dir(&fresh).expect("a folder");
    fs::write(fresh.join("new"), "new").expect("a file");
    run(tool("umoci").args(["init", "--layout"]).arg(&layout));
    run(tool("umoci").args(["new", "--image", &image]));
    run(tool("umoci").args(["insert", "--image", &image]).arg(&source).arg("/data"));
    run(tool("umoci").args(["insert", "--image", &image, "--whiteout", "/data/removed"]));
    run(tool("umoci").args(["insert", "--image", &image, "--opaque"]).arg(&fresh).arg("/data/dir"));
    let name = format!("{}:v1", unique("umoci"));
    copy_layout(&layout, "image", &format!("{}/{name}", registry().host()), &[]);
    let tree = same_as_others(&node, &name);
    assert_eq!(tree.files(), ["data/dir/new", "data/kept", "data/other/file"]);
}

#[test]
fn upper_layers_remove_replace_and_pass_through_links_as_umoci_does() {
    let node = Node::start();
    let repository = unique("layers");
    let lower = Tar::new()
        .folder("usr", 0o755)
        .folder("usr/lib", 0o755)
        .file("usr/lib/a", 0o644, "a")
        .symbolic_link("lib", "usr/lib")
        .folder("gone", 0o755)
        .file("gone/x", 0o644, "x")
        .folder("opaque", 0o700)
        .file("opaque/old", 0o644, "old")
        .folder("opaque/deep", 0o755)
        .file("opaque/deep/old", 0o644, "old")
        .folder("becomes-file", 0o755)
        .file("becomes-file/inner", 0o644, "inner")
        .file("becomes-folder", 0o644, "file")
        .file("linked", 0o644, "linked")
        .symbolic_link("dangling", "no/such/file")
        .symbolic_link("replaced-link", "usr");
    let middle = Tar::new()
        .file("lib/through", 0o644, "passes through the lower layer's link")
        .hard_link("hard", "linked")
        .file(".wh.gone", 0o000, "")
        .folder("opaque", 0o755)
        .file("opaque/.wh..wh..opq", 0o000, "")
        .file("opaque/new", 0o644, "new")
        .file("becomes-file", 0o644, "now a file")
        .folder("becomes-folder", 0o755)
        .file("becomes-folder/inner", 0o644, "inner");
    let upper = Tar::new()
        .file("no/parents/here", 0o644, "made")
        .file("usr/lib/.wh.a", 0o000, "")
        .file("replaced-link", 0o644, "a file now")
        .file(".wh.never-there", 0o000, "")
        .folder("usr/lib", 0o711);
    let image = Image::new().layer(lower.finish()).layer(middle.finish()).layer(upper.finish());
    image.push(registry(), &repository, "v1");
    let tree = same_as_others(&node, &format!("{repository}:v1"));
    assert!(tree.names().contains(&"usr/lib/through"));
    assert_eq!(tree.entry("linked").same_file_as.as_deref(), Some("hard"));
}

#[test]
fn a_whiteout_hides_lower_layers_only() {
    let node = Node::start();
    let repository = unique("whiteout");
    let lower = Tar::new().folder("d", 0o755).file("d/f", 0o644, "lower");
    // In either order within one layer, what the layer itself brings stays.
    let upper =
        Tar::new().folder("d", 0o755).file("d/f", 0o644, "upper").file("d/.wh..wh..opq", 0o000, "");
    Image::new().layer(lower.finish()).layer(upper.finish()).push(registry(), &repository, "v1");
    let (volume, tree) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    assert_eq!(tree.names(), ["d", "d/f"]);
    assert_eq!(fs::read_to_string(volume.target().join("d/f")).expect("the file"), "upper");
}

#[test]
fn every_compression_of_layers_gives_the_same_tree() {
    let node = Node::start();
    let archive = Tar::new()
        .folder("bin", 0o755)
        .file("bin/tool", 0o755, "#!/bin/sh\n")
        .file("data", 0o600, vec![b'x'; 300_000])
        .symbolic_link("link", "bin/tool")
        .hard_link("hard", "data")
        .finish();
    let half = archive.len() / 2;
    let several_members = [gzip(&archive[..half]), gzip(&archive[half..])].concat();
    let several_frames = [zstandard(&archive[..half]), zstandard(&archive[half..])].concat();
    let forms = [
        (OCI_TAR, archive.clone()),
        (OCI_TAR_GZIP, gzip(&archive)),
        (OCI_TAR_GZIP, several_members),
        (OCI_TAR_ZSTD, zstandard(&archive)),
        (OCI_TAR_ZSTD, several_frames),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", gzip(&archive)),
        ("application/vnd.docker.image.rootfs.diff.tar", archive.clone()),
    ];
    let mut trees = forms.map(|(kind, bytes)| {
        let repository = unique("compression");
        Image::new().packed_layer(kind, bytes, &archive).push(registry(), &repository, "v1");
        let (_, tree) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
        (kind, tree)
    });
    let (_, first) = trees[0].clone();
    assert_eq!(first.files(), ["bin/tool", "data", "hard", "link"]);
    for (kind, tree) in &mut trees {
        assert_eq!(*tree, first, "{kind}");
    }
}

#[test]
fn an_image_that_skopeo_turned_into_docker_types_is_the_same() {
    let node = Node::start();
    let repository = unique("docker");
    let archive = Tar::new().folder("app", 0o755).file("app/run", 0o755, "#!/bin/sh\n").finish();
    Image::new().layer(archive).push(registry(), &repository, "oci");
    let host = registry().host();
    run(tool("skopeo")
        .args([
            "--insecure-policy",
            "copy",
            "--quiet",
            "--src-tls-verify=false",
            "--dest-tls-verify=false",
        ])
        .args(["--format", "v2s2"])
        .arg(format!("docker://{host}/{repository}:oci"))
        .arg(format!("docker://{host}/{repository}:docker")));
    let (_, oci) = node.mount(&node.proxy.reference(&format!("{repository}:oci")));
    let (_, docker) = node.mount(&node.proxy.reference(&format!("{repository}:docker")));
    assert_eq!(oci, docker);
}

#[test]
fn special_bits_are_dropped_and_owners_kept_only_when_preserved() {
    let node = Node::start();
    let repository = unique("bits");
    let archive = Tar::new()
        .owned_file("setuid", 0o4755, (1000, 1001), "x")
        .owned_file("setgid", 0o2750, (0, 42), "x")
        .folder("sticky", 0o1777)
        .owned_file("private", 0o600, (65534, 65534), "private");
    Image::new().layer(archive.finish()).push(registry(), &repository, "v1");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let (_, readable) = node.mount(&reference);
    let (_, preserved) =
        node.mount_with(&reference, |volume| volume.attribute("permissions", "Preserve"));
    let modes = |tree: &Tree| ["private", "setgid", "setuid", "sticky"].map(|name| tree.mode(name));
    assert_eq!(modes(&readable), [0o644, 0o755, 0o755, 0o777]);
    assert_eq!(modes(&preserved), [0o600, 0o750, 0o755, 0o777]);
    for name in readable.names() {
        assert_eq!(readable.entry(name).owner, (0, 0), "{name}");
    }
    assert_eq!(preserved.entry("setuid").owner, (1000, 1001));
    assert_eq!(preserved.entry("private").owner, (65534, 65534));
}

#[test]
fn a_private_file_is_readable_by_a_pod_that_is_not_root_unless_preserved() {
    let node = Node::start();
    let repository = unique("private");
    let archive = Tar::new().folder("d", 0o700).file("d/private", 0o600, "for the pod").finish();
    Image::new().layer(archive).push(registry(), &repository, "v1");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let (readable, _) = node.mount(&reference);
    let (preserved, _) =
        node.mount_with(&reference, |volume| volume.attribute("permissions", "Preserve"));
    // Another user's view, through a mount of its own, as a container has it.
    let read = |target: &std::path::Path| {
        let own = node.sandbox.folder("container");
        let bound = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some(target), &own, None::<&str>, bound, None::<&str>)
            .expect("a container's mount");
        open_the_way(node.sandbox.path());
        let output = tool("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "cat"])
            .arg(own.join("d/private"))
            .output()
            .expect("setpriv");
        nix::mount::umount(&own).expect("unmount");
        output
    };
    assert_eq!(read(readable.target()).stdout, b"for the pod");
    assert!(!read(preserved.target()).status.success());
}

/// Lets other users pass through the sandbox's own folder.
fn open_the_way(folder: &std::path::Path) {
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).expect("the sandbox's mode");
}

#[test]
fn user_attributes_are_kept_and_others_dropped() {
    let node = Node::start();
    let repository = unique("xattr");
    let archive = Tar::new()
        .pax(&[("SCHILY.xattr.user.comment", "kept"), ("SCHILY.xattr.trusted.overlay.opaque", "y")])
        .file("file", 0o644, "x")
        .finish();
    Image::new().layer(archive).push(registry(), &repository, "v1");
    let (volume, _) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    let output = run(tool("getfattr")
        .args(["--dump", "--match=-", "--absolute-names"])
        .arg(volume.target().join("file")));
    assert!(output.contains(r#"user.comment="kept""#), "{output}");
    assert!(!output.contains("trusted."), "{output}");
}

#[test]
fn long_names_and_pax_names_are_whole() {
    let node = Node::start();
    let repository = unique("names");
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(255));
    let pax = "ünïcode/".to_owned() + &"p".repeat(120);
    let archive = Tar::new()
        .file(&long, 0o644, "long")
        .pax(&[("path", &pax), ("mtime", "1234567890.5")])
        .file("short", 0o644, "pax")
        .symbolic_link("link", &"t".repeat(300))
        .finish();
    Image::new().layer(archive).push(registry(), &repository, "v1");
    let (_, tree) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    assert!(tree.names().contains(&long.as_str()));
    assert_eq!(tree.entry(&pax).modified, 1_234_567_890);
    assert_eq!(tree.entry("link").kind, Kind::Link { target: "t".repeat(300) });
}

#[test]
fn names_may_start_at_the_current_folder() {
    let node = Node::start();
    let repository = unique("dot");
    // As `tar -c .` writes them, the root's own entry included.
    let archive = Tar::new()
        .folder("./", 0o700)
        .folder("./d", 0o755)
        .file("./d/f", 0o644, "x")
        .file("d/./g", 0o644, "y");
    Image::new().layer(archive.finish()).push(registry(), &repository, "v1");
    let (volume, tree) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    assert_eq!(tree.names(), ["d", "d/f", "d/g"]);
    let root = fs::metadata(volume.target()).expect("metadata").permissions().mode();
    assert_eq!(root & 0o555, 0o555, "the volume's root is readable too");
}

#[test]
fn an_image_without_layers_is_refused_or_empty_but_harms_nobody() {
    let node = Node::start();
    let repository = unique("none");
    Image::new().push(registry(), &repository, "v1");
    let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    if node.kubelet.publish(&volume).is_ok() {
        assert!(Tree::of(volume.target()).names().is_empty());
        node.kubelet.unpublish(&volume);
    }
}

#[test]
fn an_image_of_encrypted_layers_is_refused_and_not_shown_as_ciphertext() {
    let node = Node::start();
    let encrypted = format!("{OCI_TAR_GZIP}+encrypted");
    let ciphertext = crate::support::noise(1000, 75);
    for others in [0, 1] {
        let repository = unique("encrypted");
        let plain = Tar::new().file("plain", 0o644, "x").finish();
        let mut image = Image::new().packed_layer(&encrypted, ciphertext.clone(), b"plain");
        for _ in 0..others {
            image = image.layer(plain.clone());
        }
        image.push(registry(), &repository, "v1");
        let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
        let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
        assert!(message.contains("media type") && message.contains("encrypted"), "{message}");
        volume.assert_nothing_left();
    }
}
