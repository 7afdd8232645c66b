//! Tests reading content back: that of an earlier format before it is shown, all of it in turns, and content that pods
//! could have changed.

use std::{
    ffi::CStr,
    fs::{self, File},
    os::{
        fd::AsFd as _,
        unix::fs::{PermissionsExt as _, lchown, symlink},
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};
use sys::extended_attributes;
use tonic::Code;

use crate::support::{
    Admin, Driver, DriverOptions, HostileLeases, Image, Kubelet, Layer, Manifest, Node, OCI_TAR,
    Port, Proxy, Tar, Tree, Volume, metrics, mounts_under, noise, registry, run, tool, unique,
    wait_until,
};

const ROOMY: &str = "cache: {minFreePercent: 0, minFreeInodesPercent: 0, highThresholdPercent: 100, \
                     lowThresholdPercent: 100, minimumAge: 0s";

const HEAD: &str = "apiVersion: oci.custom.io/v1alpha1\nkind: NodeConfiguration\n";

/// Returns a configuration in which only publishes read content back.
fn without_scrub() -> String {
    format!("{ROOMY}, scrubInterval: 0}}\npull: {{attempts: 1}}\n")
}

/// Returns a configuration in which content is read back as often as possible.
fn with_scrub() -> String {
    format!("{ROOMY}, scrubInterval: 1s}}\n")
}

/// An artifact of a file, and of an archive with every kind of entry.
struct Artifact {
    repository: String,
    file: Vec<u8>,
    member: Vec<u8>,
}

impl Artifact {
    fn push() -> Self {
        let repository = unique("read-back");
        let (file, member) = (noise(20_000, 1), noise(30_000, 2));
        let titled = Manifest::artifact([Layer::titled("model.bin", file.clone())]);
        titled.push(registry(), &repository, "file");
        let archive = Tar::new()
            .folder("etc", 0o755)
            .pax(&[("SCHILY.xattr.user.kept", "value")])
            .file("etc/one", 0o644, member.clone())
            .file("etc/two", 0o644, "two")
            .symbolic_link("etc/link", "one")
            .finish();
        let image = Image::new().packed_layer(OCI_TAR, archive.clone(), &archive);
        image.push(registry(), &repository, "image");
        Self { repository, file, member }
    }

    fn reference(&self, proxy: &Proxy, tag: &str) -> String {
        proxy.reference(&format!("{}:{tag}", self.repository))
    }

    /// Checks that a volume shows the pushed content.
    #[track_caller]
    fn check(&self, volume: &Volume) {
        let (name, content) = if volume.target().join("model.bin").exists() {
            ("model.bin", &self.file)
        } else {
            ("etc/one", &self.member)
        };
        assert!(fs::read(volume.target().join(name)).expect("shown") == *content, "{name}");
    }
}

/// Returns the directory that a pod sees of the only image, or the only file, in the store.
fn root(state: &Path, name: &str) -> PathBuf {
    sound_root(state, name).expect("a tree")
}

/// Returns the same directory if there is one.
fn sound_root(state: &Path, name: &str) -> Option<PathBuf> {
    let trees = fs::read_dir(state.join("trees")).expect("trees").flatten();
    let generations = trees.flat_map(|tree| {
        let generations = fs::read_dir(tree.path()).into_iter().flatten().flatten();
        generations.map(|generation| generation.path()).collect::<Vec<_>>()
    });
    let mut sound = generations.filter(|path| {
        !path.with_extension("damaged").exists() && path.join("root").join(name).exists()
    });
    Some(sound.next()?.join("root"))
}

/// Writes as a pod did through the mount of an earlier version.
fn write_into(path: &Path) {
    let mut content = fs::read(path).expect("content");
    content[7] ^= 1;
    fs::write(path, content).expect("changed");
}

fn earlier_format(state: &Path) {
    fs::write(state.join("format"), "csi-driver-oci 1\n").expect("written");
}

/// Starts a node whose store is of an earlier version: it has both artifacts, and nothing is mounted.
fn left_by_an_earlier_build(configuration: &str) -> (Node, Admin, Artifact) {
    let (node, admin) = Admin::start(configuration);
    let artifact = Artifact::push();
    for tag in ["file", "image"] {
        let (volume, _) = node.mount(&artifact.reference(&node.proxy, tag));
        artifact.check(&volume);
        node.kubelet.unpublish(&volume);
    }
    (node, admin, artifact)
}

fn restarted(node: Node, meanwhile: impl FnOnce(&Path)) -> Node {
    let Node { driver, kubelet, proxy, sandbox } = node;
    let options = driver.kill();
    meanwhile(&options.state);
    let driver = options.start();
    Node { driver, kubelet, proxy, sandbox }
}

#[test]
fn what_an_earlier_build_has_left_is_read_back_before_it_is_shown() {
    let (node, admin, artifact) = left_by_an_earlier_build(&without_scrub());
    let node = restarted(node, |state| {
        earlier_format(state);
        write_into(&root(state, "model.bin").join("model.bin"));
    });
    let format = fs::read_to_string(node.driver.state().join("format")).expect("the format");
    assert_eq!(format, "csi-driver-oci 2\n");
    assert_eq!(admin.json(&["status"])["scrub"]["unreadObjects"], 4);
    node.proxy.go_down();
    // Intact content is shown without the registry, and content that a pod has changed is not.
    let sound = node.kubelet.new_volume(&artifact.reference(&node.proxy, "image"));
    node.kubelet.publish_well(&sound);
    artifact.check(&sound);
    let changed = node.kubelet.new_volume(&artifact.reference(&node.proxy, "file"));
    node.kubelet.publish_badly(&changed, Code::Unavailable);
    node.proxy.come_back();
    node.kubelet.publish_well(&changed);
    artifact.check(&changed);
    assert_eq!(admin.json(&["status"])["scrub"]["unreadObjects"], 0);
    // Content is read back only once.
    let read = |driver: &Driver| driver.log().matches("read back").count();
    let before = read(&node.driver);
    let node = restarted(node, |_| ());
    let again = node.kubelet.new_volume(&artifact.reference(&node.proxy, "image"));
    node.kubelet.publish_well(&again);
    artifact.check(&again);
    assert_eq!(read(&node.driver), before);
}

#[test]
fn what_a_pod_has_changed_through_an_earlier_build_is_not_shown() {
    let (node, _, artifact) = left_by_an_earlier_build(&without_scrub());
    let reference = artifact.reference(&node.proxy, "image");
    let (volume, sound) = node.mount(&reference);
    node.kubelet.unpublish(&volume);
    let mut node = node;
    for (what, change) in CHANGES {
        node = restarted(node, |state| {
            earlier_format(state);
            change(&root(state, "etc"));
        });
        let before = node.driver.log().matches("damaged content").count();
        node.proxy.go_down();
        let volume = node.kubelet.new_volume(&reference);
        // A tree is linked again from intact layers; a layer needs the registry.
        let shown = node.kubelet.publish(&volume);
        node.proxy.come_back();
        if let Err(status) = shown {
            assert_eq!(status.code(), Code::Unavailable, "{what}");
            node.kubelet.publish_well(&volume);
        }
        assert!(node.driver.log().matches("damaged content").count() > before, "{what}");
        assert_eq!(Tree::of(volume.target()), sound, "{what}");
        node.kubelet.unpublish(&volume);
    }
}

type Change = (&'static str, fn(&Path));

/// Changes by a process that sees a tree and may write.
const CHANGES: [Change; 15] = [
    ("content", |root| write_into(&root.join("etc/one"))),
    ("more content", |root| {
        let mut content = fs::read(root.join("etc/two")).expect("content");
        content.push(b'!');
        fs::write(root.join("etc/two"), content).expect("changed");
    }),
    ("a file's mode", |root| set_mode(&root.join("etc/one"), 0o4755)),
    ("a file's owner", |root| lchown(root.join("etc/one"), Some(7), None).expect("changed")),
    ("a file's time", |root| set_time(&root.join("etc/two"))),
    ("a new attribute", |root| set_attribute(&root.join("etc/two"), c"user.new", b"value")),
    ("an attribute's value", |root| set_attribute(&root.join("etc/one"), c"user.kept", b"other")),
    ("an access control list", |root| {
        set_attribute(&root.join("etc/two"), c"system.posix_acl_access", &access_list());
    }),
    ("what overlayfs would act on", |root| {
        set_attribute(&root.join("etc"), c"trusted.overlay.opaque", b"y");
    }),
    ("a folder's mode", |root| set_mode(&root.join("etc"), 0o777)),
    ("the root's attributes", |root| set_attribute(root, c"user.new", b"value")),
    ("a new name", |root| fs::hard_link(root.join("etc/one"), root.join("three")).expect("linked")),
    ("a name's end", |root| fs::remove_file(root.join("etc/two")).expect("removed")),
    ("a link's target", |root| {
        fs::remove_file(root.join("etc/link")).expect("removed");
        symlink("two", root.join("etc/link")).expect("a link");
        reset_time(&root.join("etc/link"));
        reset_time(&root.join("etc"));
    }),
    ("a link's owner", |root| lchown(root.join("etc/link"), Some(7), Some(7)).expect("changed")),
];

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("changed");
}

fn set_time(path: &Path) {
    let file = File::open(path).expect("a file");
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).expect("changed");
}

/// Resets a time to that of archives here.
fn reset_time(path: &Path) {
    run(tool("touch").args(["--no-dereference", "--date=@0"]).arg(path));
}

fn set_attribute(path: &Path, name: &CStr, value: &[u8]) {
    let file = File::open(path).expect("a file");
    extended_attributes::set(file.as_fd(), name, value).expect("set");
}

/// Returns an access list that lets user 7 write, hidden from the mode by a mask: acl(5), as the kernel takes it.
fn access_list() -> Vec<u8> {
    let nobody = u32::MAX;
    let entries: [(u16, u16, u32); 5] =
        [(1, 6, nobody), (2, 7, 7), (4, 4, nobody), (16, 4, nobody), (32, 4, nobody)];
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        list.extend(tag.to_le_bytes());
        list.extend(permissions.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}

#[test]
fn verify_finds_whatever_a_process_can_change() {
    let (node, admin) = Admin::start(&without_scrub());
    let artifact = Artifact::push();
    let reference = artifact.reference(&node.proxy, "image");
    for (what, change) in CHANGES {
        let (volume, _) = node.mount(&reference);
        artifact.check(&volume);
        assert_eq!(admin.json(&["verify"])["findings"], json!([]), "before {what}");
        change(&root(node.driver.state(), "etc"));
        let told = admin.ask(&["verify", "--output", "json"]);
        let found: Value = serde_json::from_slice(&told.stdout).expect("JSON");
        assert_ne!(found["findings"], json!([]), "{what}");
        node.kubelet.unpublish(&volume);
    }
}

#[test]
fn a_file_of_its_own_has_no_attributes_either() {
    let (node, admin) = Admin::start(&without_scrub());
    let artifact = Artifact::push();
    let (_volume, _) = node.mount(&artifact.reference(&node.proxy, "file"));
    let path = root(node.driver.state(), "model.bin").join("model.bin");
    set_attribute(&path, c"user.new", b"value");
    let told = admin.ask(&["verify", "--output", "json"]);
    let found: Value = serde_json::from_slice(&told.stdout).expect("JSON");
    assert_eq!(found["findings"][0]["kind"], "file", "{found}");
}

#[test]
fn a_volume_whose_content_was_decided_before_gets_it_read_back_too() {
    let (node, _) = Admin::start(&without_scrub());
    let artifact = Artifact::push();
    let (volume, _) = node.mount(&artifact.reference(&node.proxy, "file"));
    // Simulates a reboot: the record exists, and the mount does not.
    let node = restarted(node, |state| {
        nix::mount::umount(volume.target()).expect("unmounted");
        earlier_format(state);
        write_into(&root(state, "model.bin").join("model.bin"));
    });
    node.proxy.go_down();
    node.kubelet.publish_badly(&volume, Code::Unavailable);
    node.proxy.come_back();
    node.kubelet.publish_well(&volume);
    artifact.check(&volume);
}

#[test]
fn a_layer_of_an_earlier_build_is_read_back_before_another_tree_links_it() {
    let (node, _, artifact) = left_by_an_earlier_build(&without_scrub());
    let node = restarted(node, |state| {
        earlier_format(state);
        write_into(&root(state, "etc").join("etc/one"));
        write_into(&root(state, "model.bin").join("model.bin"));
    });
    for (tag, name, content) in
        [("image", "etc/one", &artifact.member), ("file", "model.bin", &artifact.file)]
    {
        let volume = node.kubelet.new_volume(&artifact.reference(&node.proxy, tag));
        // Another tree of the same layer.
        let volume = volume.attribute("include", name);
        node.kubelet.publish_well(&volume);
        assert!(fs::read(volume.target().join(name)).expect("shown") == *content, "{name}");
    }
}

#[test]
fn pods_that_want_the_same_wait_for_one_reading() {
    let (node, _, artifact) = left_by_an_earlier_build(&without_scrub());
    let node = restarted(node, earlier_format);
    let reference = artifact.reference(&node.proxy, "file");
    let volumes: Vec<_> = (0..6).map(|_| node.kubelet.new_volume(&reference)).collect();
    std::thread::scope(|scope| {
        for volume in &volumes {
            scope.spawn(|| node.kubelet.publish_well(volume));
        }
    });
    for volume in &volumes {
        artifact.check(volume);
    }
    let log = node.driver.log();
    let of_files = log.lines().filter(|line| line.contains("read back") && line.contains("files/"));
    assert_eq!(of_files.count(), 1, "{log}");
}

#[test]
fn an_upgrade_that_is_cut_off_anywhere_begins_again() {
    let (node, _, artifact) = left_by_an_earlier_build(&without_scrub());
    let Node { driver, kubelet, proxy, sandbox } = node;
    let options = driver.kill();
    earlier_format(&options.state);
    write_into(&root(&options.state, "model.bin").join("model.bin"));
    let reference = artifact.reference(&proxy, "file");
    for point in [
        "folder.created",
        "record.written",
        "record.synced",
        "rename.asked",
        "rename.done",
        "rename.durable",
    ] {
        for action in ["abort", "error:5"] {
            let copy = sandbox.path().join(format!("{point}-{action}"));
            run(tool("cp").arg("-a").arg(&options.state).arg(&copy));
            let copied = options.clone().state(&copy);
            cut_off(&copied.clone().environment("CSI_OCI_FAULT", &format!("{point}:{action}")));
            assert_eq!(mounts_under(&copied.kubelet), []);
            let driver = copied.start();
            check_unread(&kubelet, &proxy, &reference, &artifact);
            driver.kill();
        }
    }
}

/// Starts the driver with a fault, so that it ends or fails at a point.
fn cut_off(options: &DriverOptions) {
    let mut driver = options.spawn();
    wait_until("the start comes by the point", || {
        !driver.is_running() || driver.log().contains("a fault, as the test has asked for")
    });
    if driver.is_running() {
        driver.kill();
    }
}

#[track_caller]
fn check_unread(kubelet: &Kubelet, proxy: &Proxy, reference: &str, artifact: &Artifact) {
    let volume = kubelet.new_volume(reference);
    proxy.go_down();
    kubelet.publish_badly(&volume, Code::Unavailable);
    proxy.come_back();
    kubelet.publish_well(&volume);
    artifact.check(&volume);
    kubelet.unpublish(&volume);
}

/// A process that writes through a read-only bind, as `CAP_SYS_ADMIN` allows it, leaves a file that the registry did
/// not send. The registry is not blamed for it.
#[test]
fn a_cached_file_of_another_length_is_fetched_again() {
    use std::io::Write as _;
    let node = Node::start_with(|_, options| options.configuration(&without_scrub()));
    let artifact = Artifact::push();
    let reference = artifact.reference(&node.proxy, "file");
    let (first, _) = node.mount(&reference);
    let stored = only(&only(&only(&node.driver.state().join("files"))));
    let mut file = File::options().append(true).open(stored).expect("the file of the store");
    file.write_all(b"written by a pod").expect("written");
    let (another, _) = node.mount_with(&reference, |volume| volume.attribute("exclude", "other"));
    artifact.check(&another);
    for volume in [first, another] {
        node.kubelet.unpublish(&volume);
    }
}

#[test]
fn the_scrub_reads_first_what_an_earlier_build_has_left() {
    let (node, admin, artifact) = left_by_an_earlier_build(&format!("{ROOMY}}}\n"));
    let node = restarted(node, |state| {
        earlier_format(state);
        write_into(&root(state, "model.bin").join("model.bin"));
    });
    wait_until("all of it has been read back", || !node.driver.state().join("read-back").exists());
    let status = admin.json(&["status"]);
    assert_eq!(status["scrub"]["unreadObjects"], 0);
    assert_eq!(status["scrub"]["findings"], 1, "{status}");
    // It is fetched again before a pod needs it.
    wait_until("it was fetched again", || admin.json(&["status"])["scrub"]["repaired"] == 1);
    node.proxy.go_down();
    let (volume, _) = node.mount(&artifact.reference(&node.proxy, "file"));
    artifact.check(&volume);
}

#[test]
fn the_scrub_finds_damage_and_repairs_it() {
    let port = Port::new();
    let address = port.address();
    let mut endpoint = String::new();
    let node = Node::start_with(|sandbox, options| {
        endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
        options
            .configuration(&with_scrub())
            .argument(&format!("--metrics-endpoint={address}"))
            .argument(&format!("--admin-endpoint={endpoint}"))
    });
    let admin = Admin::at(&endpoint);
    let artifact = Artifact::push();
    let reference = artifact.reference(&node.proxy, "image");
    let (mounted, _) = node.mount(&reference);
    let scrub = || admin.json(&["status"])["scrub"].clone();
    wait_until("it was read back", || scrub()["objects"].as_u64() >= Some(10));
    assert_eq!(scrub()["findings"], 0);
    assert_eq!(scrub()["intervalSeconds"], 1);
    write_into(&root(node.driver.state(), "etc").join("etc/one"));
    wait_until("it was found and fetched again", || scrub()["repaired"].as_u64() >= Some(1));
    assert!(scrub()["findings"].as_u64() >= Some(1));
    node.proxy.go_down();
    let (volume, _) = node.mount(&reference);
    artifact.check(&volume);
    assert_ne!(fs::read(mounted.target().join("etc/one")).expect("shown"), artifact.member);
    // The lag is above zero while the machine is too busy for an interval of one second.
    for line in [
        "csi_oci_scrub_repairs_total{result=\"success\"} 1",
        "csi_oci_unread_objects 0",
        "csi_oci_scrub_lag_seconds ",
    ] {
        wait_until(line, || metrics(address).contains(line));
    }
    assert!(!metrics(address).contains("csi_oci_scrub_read_bytes_total 0\n"));
}

#[test]
fn a_scrub_that_is_off_says_so() {
    let (node, admin) = Admin::start(&without_scrub());
    assert_eq!(admin.json(&["status"])["scrub"]["intervalSeconds"], 0);
    assert!(admin.text(&["status"]).contains("off (cache.scrubInterval)"));
    drop(node);
}

/// Replaces a name of a tree by another file, and leaves everything else unchanged: also modes and times.
fn replace(tree: &Path) {
    let folder = tree.join("root/etc");
    let modified = fs::metadata(&folder).expect("a folder").modified().expect("a time");
    let path = folder.join("two");
    fs::remove_file(&path).expect("removed");
    fs::write(&path, "bad").expect("written");
    set_mode(&path, 0o444);
    reset_time(&path);
    File::open(&folder).expect("a folder").set_modified(modified).expect("the time");
}

/// Returns the only entry of a directory of the store.
fn only(folder: &Path) -> PathBuf {
    let mut names =
        fs::read_dir(folder).expect("a folder").map(|name| name.expect("a name").path());
    names.find(|path| path.extension().is_none()).expect("something")
}

/// Changes a record of a tree.
fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut record = serde_json::from_slice(&fs::read(path).expect("a record")).expect("JSON");
    change(&mut record);
    fs::write(path, record.to_string()).expect("written");
}

fn manifest_of(tree: &Path) -> PathBuf {
    let record: Value =
        serde_json::from_slice(&fs::read(tree.join("tree.json")).expect("a record")).expect("JSON");
    let digest = record["manifest"].as_str().expect("a digest").replace("sha256:", "");
    tree.ancestors().nth(3).expect("the state").join("blobs").join(digest)
}

fn change_a_digit(name: &mut Value) {
    let text = name.as_str().expect("a name");
    let other = if text.ends_with('1') { '2' } else { '1' };
    *name = json!(format!("{}{other}", &text[..text.len() - 1]));
}

/// Removals of the records that a tree is compared with.
const LOSSES: [Change; 12] = [
    ("a bit of its manifest", |tree| write_into(&manifest_of(tree))),
    ("its manifest", |tree| fs::remove_file(manifest_of(tree)).expect("removed")),
    ("what objects.json says", |tree| fs::write(tree.join("objects.json"), "").expect("written")),
    ("all that objects.json names", |tree| edit(&tree.join("objects.json"), |it| *it = json!([]))),
    ("objects.json", |tree| fs::remove_file(tree.join("objects.json")).expect("removed")),
    ("the bytes of objects.json", |tree| {
        let path = tree.join("objects.json");
        let length = fs::metadata(&path).expect("a record").len();
        fs::write(path, vec![0; usize::try_from(length).expect("few")]).expect("written");
    }),
    ("a digit of objects.json", |tree| {
        edit(&tree.join("objects.json"), |it| change_a_digit(&mut it[0]));
    }),
    ("its layers", |tree| {
        let layers = tree.ancestors().nth(3).expect("the state").join("layers");
        fs::remove_dir_all(only(&layers)).expect("removed");
    }),
    ("the name of its manifest", |tree| {
        edit(&tree.join("tree.json"), |it| {
            it["manifest"] = json!(format!("sha256:{}", "0".repeat(64)));
        });
    }),
    ("what it was selected by", |tree| {
        edit(&tree.join("tree.json"), |it| it["view"]["include"] = json!("etc/one"));
    }),
    ("tree.json", |tree| fs::remove_file(tree.join("tree.json")).expect("removed")),
    ("what tree.json says", |tree| fs::write(tree.join("tree.json"), "{").expect("written")),
];

#[test]
fn verify_finds_a_tree_that_cannot_be_compared() {
    let (node, admin) = Admin::start(&without_scrub());
    let artifact = Artifact::push();
    let reference = artifact.reference(&node.proxy, "image");
    let (volume, sound) = node.mount(&reference);
    node.kubelet.unpublish(&volume);
    let mut node = node;
    for (what, lose) in LOSSES {
        // Nothing of it is in memory either.
        node = restarted(node, |state| {
            let tree = root(state, "etc").parent().expect("a tree").to_owned();
            replace(&tree);
            lose(&tree);
        });
        let told = admin.ask(&["verify", "--output", "json"]);
        let found: Value = serde_json::from_slice(&told.stdout).expect("JSON");
        assert_eq!(told.status.code(), Some(1), "{what}");
        let findings = found["findings"].as_array().expect("a list");
        assert!(findings.iter().any(|finding| finding["kind"] == "tree"), "{what}: {found}");
        node.kubelet.publish_well(&volume);
        assert_eq!(Tree::of(volume.target()), sound, "{what}");
        assert!(manifest_of(root(node.driver.state(), "etc").parent().expect("a tree")).exists());
        assert_eq!(admin.json(&["verify"])["findings"], json!([]), "after {what}");
        node.kubelet.unpublish(&volume);
    }
}

#[test]
fn verify_finds_numbers_of_a_tree_that_were_changed() {
    let (node, admin) = Admin::start(&without_scrub());
    let artifact = Artifact::push();
    let reference = artifact.reference(&node.proxy, "image");
    for number in ["bytes", "inodes", "compressed_bytes"] {
        let (volume, _) = node.mount(&reference);
        assert_eq!(admin.json(&["verify"])["findings"], json!([]), "before {number}");
        let tree = root(node.driver.state(), "etc").parent().expect("a tree").to_owned();
        edit(&tree.join("tree.json"), |it| it[number] = json!(9));
        let told = admin.ask(&["verify", "--output", "json"]);
        let found: Value = serde_json::from_slice(&told.stdout).expect("JSON");
        let detail = found["findings"][0]["detail"].as_str().unwrap_or_default();
        assert!(detail.contains(number), "{number}: {found}");
        node.kubelet.unpublish(&volume);
    }
}

#[test]
fn a_tree_that_cannot_be_compared_is_repaired() {
    let (node, admin) = Admin::start(&without_scrub());
    let artifact = Artifact::push();
    let reference = artifact.reference(&node.proxy, "image");
    let (volume, sound) = node.mount(&reference);
    for (what, lose) in &LOSSES {
        let tree = root(node.driver.state(), "etc").parent().expect("a tree").to_owned();
        replace(&tree);
        lose(&tree);
        let repaired = admin.json(&["verify", "--repair"]);
        assert_eq!(repaired["unrepaired"], 0, "{what}: {repaired}");
        assert_eq!(repaired["repairs"][0]["done"], true, "{what}: {repaired}");
        node.proxy.go_down();
        let (volume, shown) = node.mount(&reference);
        assert_eq!(shown, sound, "{what}");
        node.proxy.come_back();
        assert_eq!(admin.json(&["verify"])["findings"], json!([]), "after {what}");
        node.kubelet.unpublish(&volume);
    }
    node.kubelet.unpublish(&volume);
}

#[test]
fn the_scrub_repairs_a_tree_that_cannot_be_compared() {
    let (node, admin) = Admin::start(&with_scrub());
    let artifact = Artifact::push();
    let reference = artifact.reference(&node.proxy, "image");
    let (volume, sound) = node.mount(&reference);
    node.kubelet.unpublish(&volume);
    let mut node = node;
    for (what, lose) in [LOSSES[0], LOSSES[2], LOSSES[6]] {
        node = restarted(node, |state| {
            let tree = root(state, "etc").parent().expect("a tree").to_owned();
            replace(&tree);
            // The layer that the tree links is damaged as well.
            write_into(&tree.join("root/etc/one"));
            lose(&tree);
        });
        let repaired = || admin.json(&["status"])["scrub"]["repaired"].as_u64() >= Some(1);
        wait_until("it was fetched again", repaired);
        // The tree may have had its turn before its layer.
        let holds = |root: &Path, name: &str, content: &[u8]| {
            fs::read(root.join(name)).is_ok_and(|shown| shown == content)
        };
        wait_until("a sound tree is there", || {
            sound_root(node.driver.state(), "etc").is_some_and(|root| {
                holds(&root, "etc/one", &artifact.member) && holds(&root, "etc/two", b"two")
            })
        });
        node.proxy.go_down();
        node.kubelet.publish_well(&volume);
        assert_eq!(Tree::of(volume.target()), sound, "{what}");
        node.proxy.come_back();
        node.kubelet.unpublish(&volume);
    }
}

#[test]
fn a_tree_that_took_long_to_make_has_its_manifest() {
    let mut go = PathBuf::new();
    let mut endpoint = String::new();
    let node = Node::start_with(|sandbox, options| {
        go = sandbox.path().join("go");
        endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
        options
            .configuration(&without_scrub())
            .argument(&format!("--admin-endpoint={endpoint}"))
            .environment("CSI_OCI_FAULT", &format!("layer.unpacked:pause:{}", go.display()))
    });
    let artifact = Artifact::push();
    let volume = node.kubelet.new_volume(&artifact.reference(&node.proxy, "image"));
    let blobs = node.driver.state().join("blobs");
    let staged = || {
        let layers = fs::read_dir(node.driver.state().join("staging")).expect("staging").flatten();
        layers.into_iter().any(|layer| layer.path().join("index").exists())
    };
    std::thread::scope(|scope| {
        scope.spawn(|| node.kubelet.publish_well(&volume));
        wait_until("the layer is unpacked", staged);
        // A sweep does this to blobs older than a day.
        for blob in fs::read_dir(&blobs).expect("blobs").flatten() {
            fs::remove_file(blob.path()).expect("removed");
        }
        fs::write(&go, "").expect("written");
    });
    artifact.check(&volume);
    assert_eq!(Admin::at(&endpoint).json(&["verify"])["findings"], json!([]));
}

/// Mounts an artifact for a pod that sees it through binds. Returns the volumes and the files that it sees.
fn mounted_by_binds(node: &Node, artifact: &Artifact) -> (Vec<Volume>, Vec<PathBuf>) {
    let tags: [(&str, &[&str]); 2] = [("file", &["model.bin"]), ("image", &["etc/one", "etc/two"])];
    let (mut volumes, mut paths) = (Vec::new(), Vec::new());
    for (tag, names) in tags {
        let (volume, _) = node.mount_with(&artifact.reference(&node.proxy, tag), |mut volume| {
            volume.request.readonly = true;
            volume
        });
        paths.extend(names.iter().map(|name| volume.target().join(name)));
        volumes.push(volume);
    }
    (volumes, paths)
}

#[test]
fn leases_keep_nothing_from_being_verified() {
    let (node, admin) = Admin::start(&without_scrub());
    let artifact = Artifact::push();
    let (_volumes, paths) = mounted_by_binds(&node, &artifact);
    let other = node.small_artifact();
    node.mount(&node.proxy.reference(&other.name));
    let state = node.driver.state();
    for name in ["file.txt", "etc/one", "model.bin"] {
        write_into(&root(state, name).join(name));
    }
    let _leases = HostileLeases::on(&paths);
    let told = admin.ask(&["verify", "--output", "json"]);
    let found: Value = serde_json::from_slice(&told.stdout).expect("JSON");
    let findings = found["findings"].as_array().expect("a list");
    let of = |kind: &str| findings.iter().filter(|finding| finding["kind"] == kind).count();
    // Both the content and the time of the file in the layer differ.
    assert_eq!((of("file"), of("layer"), of("unread")), (2, 2, 0), "{found}");
}

#[test]
fn leases_keep_the_scrub_from_nothing() {
    let (node, admin) = Admin::start(&with_scrub());
    let artifact = Artifact::push();
    let (_volumes, paths) = mounted_by_binds(&node, &artifact);
    let _leases = HostileLeases::on(&paths);
    let state = node.driver.state();
    for name in ["etc/one", "model.bin"] {
        write_into(&root(state, name).join(name));
    }
    let repaired = || admin.json(&["status"])["scrub"]["repaired"].as_u64() >= Some(2);
    wait_until("both are found and fetched again", repaired);
}

#[test]
fn leases_of_a_pod_of_an_earlier_build_keep_no_other_pod_from_its_content() {
    let (node, _, artifact) = left_by_an_earlier_build(&without_scrub());
    let (_volumes, paths) = mounted_by_binds(&node, &artifact);
    let node = restarted(node, earlier_format);
    let _leases = HostileLeases::on(&paths);
    for tag in ["file", "image"] {
        let volume = node.kubelet.new_volume(&artifact.reference(&node.proxy, tag));
        node.kubelet.publish_well(&volume);
        artifact.check(&volume);
    }
}

#[test]
fn a_tree_that_the_node_has_no_memory_for_is_unread_and_not_damaged() {
    let (node, admin) = Admin::start(&without_scrub());
    let repository = unique("large");
    // 80,000 directories that only paths imply. The volume shows none of them, and merging holds all.
    let deep = "d/".repeat(200);
    let archive = Tar::new().file("shown", 0o644, "shown");
    let archive = (0..400).fold(archive, |tar, n| tar.file(&format!("{n}/{deep}f"), 0o644, ""));
    let archive = archive.finish();
    Image::new().packed_layer(OCI_TAR, archive.clone(), &archive).push(
        registry(),
        &repository,
        "image",
    );
    let reference = node.proxy.reference(&format!("{repository}:image"));
    let selected = |volume: Volume| volume.attribute("include", "shown");
    node.mount_with(&reference, selected);
    let small = without_scrub().replace("attempts: 1", "attempts: 1, memory: 16Mi, unpacks: 1");
    let configuration = format!("{HEAD}{small}");
    let node = restarted(node, |state| {
        fs::write(state.with_file_name("node.yaml"), configuration).expect("written");
    });
    let told = admin.ask(&["verify", "--output", "json"]);
    assert_eq!(told.status.code(), Some(1));
    let found: Value = serde_json::from_slice(&told.stdout).expect("JSON");
    let [finding] = found["findings"].as_array().expect("a list").as_slice() else {
        panic!("{found}")
    };
    assert_eq!(finding["kind"], "unread", "{found}");
    assert!(finding["detail"].as_str().expect("text").contains("pull.memory"), "{found}");
    // It is shown as before.
    node.proxy.go_down();
    node.mount_with(&reference, selected);
}
