//! Compares ordinary images with the unpacking of umoci and containerd.

use std::{
    fs,
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::Path,
};

use serde_json::json;
use tonic::Code;

use crate::support::{
    Containerd, FakeRegistry, Image, Kind, Layer, Manifest, Node, OCI_INDEX, OCI_MANIFEST, OCI_TAR,
    OCI_TAR_GZIP, OCI_TAR_ZSTD, Tar, Tree, Volume, copy_layout, gzip, node_architecture,
    push_index, put_json, registry, run, tool, umoci_unpack, unique, zstandard,
};

/// Mounts the image and compares all of it, links and times included, with the unpacking of umoci and of containerd.
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
    // Directories that a layer only passes through have the time of their creation.
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
        times(without_special_bits(expected.clone().without_special_files())),
        "with permissions: Preserve"
    );
    assert_eq!(
        times(readable.clone()),
        times(expected.clone().without_special_files().readable()),
        "with permissions: Readable"
    );
    let (root, run) = (node.sandbox.folder("containerd"), node.sandbox.folder("run"));
    let mounted = node.sandbox.folder("by-containerd");
    Containerd::start(&root, &run).mount(&at_registry, &mounted);
    assert_eq!(times(Tree::of(&mounted)), times(expected), "containerd and umoci");
    // Children of other tests may have inherited the directory for a moment.
    nix::mount::umount2(&mounted, nix::mount::MntFlags::MNT_DETACH).expect("unmounted");
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

/// Archives a directory's content with GNU tar.
#[track_caller]
fn tar_of(folder: &Path, arguments: &[&str]) -> Vec<u8> {
    tar_by("tar", folder, arguments)
}

/// Archives a directory's content with this program.
#[track_caller]
fn tar_by(program: &str, folder: &Path, arguments: &[&str]) -> Vec<u8> {
    let archive = folder.with_extension("tar");
    run(tool(program).arg("-C").arg(folder).arg("-cf").arg(&archive).args(arguments));
    fs::read(&archive).expect("the archive")
}

#[test]
fn absolute_names_are_rooted_as_others_do_it() {
    let node = Node::start();
    let folder = node.sandbox.folder("source");
    fs::create_dir_all(folder.join("app/lib")).expect("folders");
    for (name, text) in [("app/run", "run"), ("app/lib/a", "a"), ("app/old", "old")] {
        fs::write(folder.join(name), text).expect("a file");
    }
    fs::hard_link(folder.join("app/lib/a"), folder.join("app/z")).expect("a link");
    // The flag leaves the targets of symbolic links as they are; those of hard links are rooted as well.
    let rooted = ["-P", "--transform", "s,^,/,S", "app"];
    let lower = tar_of(&folder, &rooted);
    let upper = Tar::new()
        .folder("/", 0o755)
        .folder("/usr", 0o755)
        .folder("//usr//bin", 0o755)
        .file("/usr/bin/x", 0o644, "x")
        .hard_link("/usr/bin/y", "/usr/bin/x")
        .symbolic_link("/bin", "/usr/bin")
        .file("/bin/through", 0o644, "through")
        .file("/app/.wh.old", 0o000, "");
    let name = format!("{}:v1", unique("absolute"));
    let (repository, _) = name.split_once(':').expect("a tag");
    Image::new().layer(lower).layer(upper.finish()).push(registry(), repository, "v1");
    let tree = same_as_others(&node, &name);
    let expected =
        ["app/lib/a", "app/run", "app/z", "bin", "usr/bin/through", "usr/bin/x", "usr/bin/y"];
    assert_eq!(tree.files(), expected);
}

#[test]
fn every_format_of_gnu_tar_and_bsdtar_is_unpacked_as_others_do_it() {
    let node = Node::start();
    let folder = node.sandbox.folder("source");
    let deep = format!("{}/{}", "d".repeat(90), "e".repeat(60));
    fs::create_dir_all(folder.join(&deep)).expect("folders");
    let long = format!("{deep}/{}", "f".repeat(99));
    for name in ["plain", "ünïcode", "with space\nand line", &long] {
        fs::write(folder.join(name), name).expect("a file");
    }
    fs::write(folder.join("setuid"), "x").expect("a file");
    fs::set_permissions(folder.join("setuid"), fs::Permissions::from_mode(0o4711)).expect("a mode");
    std::os::unix::fs::chown(folder.join("plain"), Some(3_000_000), Some(4_000_000_000))
        .expect("an owner");
    fs::hard_link(folder.join("plain"), folder.join("z-hard")).expect("a link");
    std::os::unix::fs::symlink("t".repeat(150), folder.join("long-link")).expect("a link");
    run(tool("setfattr").args(["-n", "user.comment", "-v", "kept"]).arg(folder.join("setuid")));
    for (program, format) in [
        ("tar", "--format=gnu"),
        ("tar", "--format=pax"),
        ("bsdtar", "--format=pax"),
        ("bsdtar", "--format=gnutar"),
    ] {
        let arguments: &[&str] = match (program, format) {
            ("tar", "--format=pax") => &[format, "--xattrs", "."],
            _ => &[format, "."],
        };
        let name = format!("{}:v1", unique("formats"));
        let (repository, _) = name.split_once(':').expect("a tag");
        let archive = tar_by(program, &folder, arguments);
        Image::new().layer(archive).push(registry(), repository, "v1");
        let tree = same_as_others(&node, &name);
        assert!(tree.names().contains(&long.as_str()), "{program} {format}: {:?}", tree.names());
    }
}

#[test]
fn links_of_the_same_layer_are_followed_as_others_do_it() {
    let node = Node::start();
    let name = format!("{}:v1", unique("own-links"));
    let (repository, _) = name.split_once(':').expect("a tag");
    let lower = Tar::new()
        .folder("usr", 0o755)
        .folder("usr/lib", 0o755)
        .file("usr/lib/old", 0o644, "old")
        .file("usr/lib/gone", 0o644, "gone")
        .folder("usr/opaque", 0o755)
        .file("usr/opaque/old", 0o644, "old")
        .symbolic_link("up", "../../../usr/lib");
    let upper = Tar::new()
        .symbolic_link("lib", "usr/lib")
        .symbolic_link("lib64", "lib")
        .symbolic_link("opt", "/usr/opaque")
        .symbolic_link("new", "made/by/link")
        .file("lib/a", 0o644, "a")
        .folder("lib64/sub", 0o711)
        .file("lib64/sub/b", 0o644, "b")
        .hard_link("c", "lib64/sub/b")
        .file("new/d", 0o644, "d")
        .file("up/e", 0o644, "e")
        .file("lib/.wh.gone", 0o000, "")
        .file("opt/.wh..wh..opq", 0o000, "")
        .file("opt/f", 0o644, "f");
    Image::new().layer(lower.finish()).layer(upper.finish()).push(registry(), repository, "v1");
    let tree = same_as_others(&node, &name);
    let in_lib = ["usr/lib/a", "usr/lib/e", "usr/lib/old", "usr/lib/sub/b"];
    assert!(in_lib.iter().all(|name| tree.names().contains(name)), "{:?}", tree.names());
    assert!(!tree.names().contains(&"usr/lib/gone") && !tree.names().contains(&"usr/opaque/old"));
}

#[test]
fn device_nodes_and_fifos_are_left_out_of_what_others_unpack() {
    let node = Node::start();
    let name = format!("{}:v1", unique("special"));
    let (repository, _) = name.split_once(':').expect("a tag");
    let folder = node.sandbox.folder("source");
    fs::create_dir(folder.join("dev")).expect("a folder");
    for (name, arguments) in
        [("dev/console", &["c", "5", "1"][..]), ("dev/loop", &["b", "7", "0"][..])]
    {
        run(tool("mknod").arg(folder.join(name)).args(arguments));
    }
    run(tool("mkfifo").arg(folder.join("pipe")));
    fs::write(folder.join("file"), "file").expect("a file");
    let lower = Tar::new().file("pipe", 0o644, "becomes a fifo").file("kept", 0o644, "kept");
    let upper = tar_of(&folder, &["dev", "pipe", "file"]);
    let last = Tar::new().file("dev/loop", 0o644, "a file now");
    let image = Image::new().layer(lower.finish()).layer(upper).layer(last.finish());
    image.push(registry(), repository, "v1");
    let tree = same_as_others(&node, &name);
    assert_eq!(tree.names(), ["dev", "dev/loop", "file", "kept"]);
    assert!(node.driver.log().contains("\"skipped\":3"), "{}", node.driver.log());
}

#[test]
fn sparse_files_of_every_form_are_expanded_as_others_do_it() {
    let node = Node::start();
    let folder = node.sandbox.folder("source");
    let sparse = |name: &str, size: u64, data: &[u64]| {
        let file = fs::File::create(folder.join(name)).expect("a file");
        file.set_len(size).expect("a size");
        for offset in data {
            file.write_all_at(format!("data at {offset}").as_bytes(), *offset).expect("data");
        }
    };
    sparse("holes", 1 << 20, &[]);
    sparse("end", 3 << 20, &[(3 << 20) - 20]);
    sparse("start", 2 << 20, &[0]);
    // More extents than a header and one block after it hold.
    sparse("many", 8 << 20, &(0..60).map(|number| number * (128 << 10) + 5).collect::<Vec<_>>());
    fs::write(folder.join("dense"), "dense").expect("a file");
    for (program, form) in [
        ("tar", &["-S", "--format=gnu"][..]),
        ("tar", &["-S", "--format=oldgnu"]),
        ("tar", &["-S", "--format=pax", "--sparse-version=0.0"]),
        ("tar", &["-S", "--format=pax", "--sparse-version=0.1"]),
        ("tar", &["-S", "--format=pax", "--sparse-version=1.0"]),
        ("bsdtar", &["--format=pax"]),
        ("bsdtar", &[]),
    ] {
        let archive = tar_by(program, &folder, &[form, &["."]].concat());
        assert!(archive.len() < 4 << 20, "{program} {form:?}: no sparse archive");
        let name = format!("{}:v1", unique("sparse"));
        let (repository, _) = name.split_once(':').expect("a tag");
        Image::new().layer(archive).push(registry(), repository, "v1");
        // Neither umoci nor containerd reads the old form, which Go's reader expands.
        let tree = if program == "bsdtar" || form[1].contains("pax") {
            same_as_others(&node, &name)
        } else {
            node.mount(&node.proxy.reference(&name)).1
        };
        let content = |tree: &Tree, name: &str| tree.entry(name).kind.clone();
        assert_eq!(tree.files(), ["dense", "end", "holes", "many", "start"], "{form:?}");
        for name in tree.files() {
            assert_eq!(content(&tree, name), content(&Tree::of(&folder), name), "{form:?}: {name}");
        }
    }
}

#[test]
fn a_whiteout_hides_lower_layers_only() {
    let node = Node::start();
    let repository = unique("whiteout");
    let lower = Tar::new().folder("d", 0o755).file("d/f", 0o644, "lower");
    // In either order within one layer, the layer's own entries stay.
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
    // The view of another user, through a mount of its own, as in a container.
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

/// Lets other users traverse the sandbox's directory.
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
    // As written by `tar -c .`, the root's own entry included.
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
fn an_image_without_layers_holds_no_files() {
    let node = Node::start();
    let fake = FakeRegistry::new();
    let manifest = Image::new().manifest();
    manifest.push_blobs(&fake, "none");
    for layers in [Some(json!([])), Some(json!(null)), None] {
        let mut manifest = manifest.json();
        match layers {
            Some(layers) => manifest["layers"] = layers,
            None => drop(manifest.as_object_mut().expect("an object").remove("layers")),
        }
        let tag = unique("none");
        put_json(&fake, "none", &tag, &manifest);
        let volume = node.kubelet.new_volume(&fake.reference(&tag));
        let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
        assert!(message.contains("holds no files"), "{message}");
    }
}

#[test]
fn an_images_configuration_that_is_no_json_is_internal_and_tells_why() {
    let node = Node::start();
    for config in ["secret words", ""] {
        let mut manifest = Image::new().layer(Tar::new().file("f", 0o644, "x").finish()).manifest();
        manifest.config.bytes = config.into();
        let repository = unique("no-json");
        manifest.push(registry(), &repository, "v1");
        let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
        let message = node.kubelet.publish_badly(&volume, Code::Internal);
        assert!(message.contains("configuration") && message.contains("JSON"), "{message}");
        assert!(!message.contains("secret"), "{message}");
    }
}

#[test]
fn folders_of_aufs_are_what_others_unpack() {
    let node = Node::start();
    let archive = Tar::new()
        .folder(".wh..wh.plnk", 0o755)
        .file(".wh..wh.plnk/123.4", 0o644, "linked")
        .hard_link("real", ".wh..wh.plnk/123.4")
        .finish();
    let repository = unique("aufs");
    Image::new().layer(archive).push(registry(), &repository, "v1");
    let tree = same_as_others(&node, &format!("{repository}:v1"));
    assert_eq!(tree.names(), [".wh..wh.plnk", ".wh..wh.plnk/123.4", "real"]);
}

#[test]
fn an_entry_that_needs_features_of_the_system_is_not_chosen() {
    let node = Node::start();
    let repository = unique("features");
    let entry = |name: &str, features: serde_json::Value| {
        let image = Image::new().layer(Tar::new().file(name, 0o644, name).finish());
        let digest = image.push(registry(), &repository, name);
        json!({
            "mediaType": OCI_MANIFEST,
            "digest": digest,
            "size": image.manifest().json().to_string().len(),
            "platform": {"os": "linux", "architecture": node_architecture(), "os.features": features},
        })
    };
    let (erofs, plain) = (entry("erofs", json!(["erofs"])), entry("plain", json!([])));
    for (tag, entries) in [("first", [&erofs, &plain]), ("last", [&plain, &erofs])] {
        push_index(registry(), &repository, tag, &entries.map(Clone::clone));
        let (_, tree) = node.mount(&node.proxy.reference(&format!("{repository}:{tag}")));
        assert_eq!(tree.names(), ["plain"], "{tag}");
    }
}

/// Returns the level of amd64 that this machine has, as `ld.so` determines it.
fn level() -> usize {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").expect("the processor");
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let levels = [&["sse4_2", "popcnt"][..], &["avx2", "bmi2", "fma"], &["avx512f", "avx512vl"]];
    let has = |flag: &&str| flags.split_whitespace().any(|known| known == *flag);
    1 + levels.iter().take_while(|level| level.iter().all(has)).count()
}

#[test]
fn the_best_variant_that_this_processor_runs_is_chosen_whatever_the_order() {
    if node_architecture() != "amd64" {
        return;
    }
    let node = Node::start();
    let repository = unique("variants");
    let entry = |architecture: &str, variant: Option<&str>| {
        let text = variant.unwrap_or(architecture);
        let image = Image::new().layer(Tar::new().file("is", 0o644, text).finish());
        let digest = image.push(registry(), &repository, &unique("part"));
        let size = image.manifest().json().to_string().len();
        let mut platform = json!({"os": "linux", "architecture": architecture});
        if let Some(variant) = variant {
            platform["variant"] = json!(variant);
        }
        json!({"mediaType": OCI_MANIFEST, "digest": digest, "size": size, "platform": platform})
    };
    let [v4, v3, v2] = ["v4", "v3", "v2"].map(|level| entry("amd64", Some(level)));
    let (plain, old) = (entry("amd64", None), entry("386", None));
    let level = level();
    let best = |levels: &[usize]| match levels.iter().find(|offered| **offered <= level) {
        None | Some(1) => "amd64".to_owned(),
        Some(level) => format!("v{level}"),
    };
    for (tag, entries, expected) in [
        ("three", vec![&v4, &v2, &plain], best(&[4, 2, 1])),
        ("all", vec![&old, &v2, &plain, &v3, &v4], best(&[4, 3, 2, 1])),
        ("old", vec![&plain, &v3], best(&[3, 1])),
    ] {
        let entries: Vec<_> = entries.into_iter().cloned().collect();
        push_index(registry(), &repository, tag, &entries);
        let (volume, _) = node.mount(&node.proxy.reference(&format!("{repository}:{tag}")));
        let is = fs::read_to_string(volume.target().join("is")).expect("the file");
        assert_eq!(is, expected, "{tag} on level {level}");
    }
}

#[test]
fn an_index_in_an_index_is_chosen_through_online_and_from_the_cache() {
    let node = Node::start();
    let repository = unique("nested");
    let image = Image::new().layer(Tar::new().file("inside", 0o644, "x").finish());
    let digest = image.push(registry(), &repository, "image");
    let platform = json!({"os": "linux", "architecture": node_architecture()});
    let mut inner = json!({
        "mediaType": OCI_MANIFEST, "digest": digest, "platform": platform,
        "size": image.manifest().json().to_string().len(),
    });
    let other = json!({
        "mediaType": OCI_INDEX, "digest": digest, "size": 5,
        "platform": {"os": "linux", "architecture": "s390x"},
    });
    // The first is the only level, and the last the fifth.
    for depth in 0..=4 {
        let index =
            json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [other, inner]});
        let size = index.to_string().len();
        let tag = format!("depth{depth}");
        let digest = put_json(registry(), &repository, &tag, &index);
        inner = json!({"mediaType": OCI_INDEX, "digest": digest, "size": size});
        let by_digest = node.proxy.reference(&format!("{repository}@{digest}"));
        if depth == 4 {
            let volume = node.kubelet.new_volume(&by_digest);
            let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
            assert!(message.contains("one index too many"), "{message}");
            continue;
        }
        let (_, tree) = node.mount(&by_digest);
        assert_eq!(tree.names(), ["inside"], "{depth}");
        let never = |volume: Volume| volume.attribute("pullPolicy", "Never");
        let (_, tree) = node.mount_with(&by_digest, never);
        assert_eq!(tree.names(), ["inside"], "{depth}");
        node.mount(&node.proxy.reference(&format!("{repository}:{tag}")));
    }
}

#[test]
fn a_models_docker_configuration_is_for_no_platform() {
    let node = Node::start();
    let repository = unique("ollama");
    let architecture = if node_architecture() == "amd64" { "arm64" } else { "amd64" };
    let config = json!({"model_format": "gguf", "os": "linux", "architecture": architecture,
        "rootfs": {"type": "layers", "diff_ids": []}});
    let manifest = Manifest::with_config(
        Layer::new("application/vnd.docker.container.image.v1+json", config.to_string()),
        [Layer::new("application/vnd.ollama.image.model", "weights")],
    );
    manifest.push(registry(), &repository, "v1");
    let (_, tree) = node.mount(&node.proxy.reference(&format!("{repository}:v1")));
    assert_eq!(tree.names(), ["layer-0"]);
}

#[test]
fn owners_that_linux_does_not_have_matter_only_where_owners_are_kept() {
    let node = Node::start();
    let repository = unique("owners");
    let archive = Tar::new().pax(&[("uid", "9999999999"), ("gid", "-1")]).file("f", 0o644, "x");
    Image::new().layer(archive.finish()).push(registry(), &repository, "v1");
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    let (_, tree) = node.mount(&reference);
    assert_eq!(tree.entry("f").owner, (0, 0));
    let preserve = node.kubelet.new_volume(&reference).attribute("permissions", "Preserve");
    let message = node.kubelet.publish_badly(&preserve, Code::FailedPrecondition);
    assert!(message.contains("9999999999:-1") && message.contains("Readable"), "{message}");
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
