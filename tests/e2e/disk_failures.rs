//! Tests a disk that is full, read-only or broken: clean codes, nothing half done, and a full recovery afterwards.

use std::{fs, path::PathBuf};

use nix::mount::{MsFlags, mount};
use tonic::Code;

use crate::support::{
    Admin, DriverOptions, Image, Layer, Manifest, Node, OCI_TAR_GZIP, Tar, digest, gzip, noise,
    registry, run, tool, unique, wait_until,
};

/// A node whose state lies on a disk of its own.
fn node(configuration: &str) -> (Node, PathBuf) {
    let mut disk = PathBuf::new();
    let node = Node::start_with(|sandbox, options| {
        disk = sandbox.filesystem_of(64 << 20, "ext4", "disk", "rw");
        options.state(&disk.join("state")).configuration(configuration)
    });
    (node, disk)
}

const NO_FLOOR: &str = "cache: {minFreePercent: 0, minFreeInodesPercent: 0, highThresholdPercent: 100, \
                        lowThresholdPercent: 100, minimumAge: 0s}\n";

fn staging_is_empty(node: &Node) {
    let staging = node.driver.state().join("staging");
    assert_eq!(fs::read_dir(staging).expect("staging").count(), 0);
}

#[test]
fn a_full_disk_is_told_and_forgotten() {
    let (node, disk) = node(NO_FLOOR);
    let reference = node.proxy.reference(&node.small_artifact().name);
    let (volume, _) = node.mount(&reference);
    let filler = disk.join("filler");
    // Fills the disk, including the space that is reserved for root.
    let file = fs::File::create(&filler).expect("a file");
    let mut size = 64i64 << 20;
    let mut offset = 0;
    while size >= 4096 {
        let flags = nix::fcntl::FallocateFlags::empty();
        match nix::fcntl::fallocate(&file, flags, offset, size) {
            Ok(()) => offset += size,
            Err(_) => size /= 2,
        }
    }
    let repository = unique("full");
    Manifest::artifact([Layer::titled("file", noise(1 << 20, 5))]).push(
        registry(),
        &repository,
        "v1",
    );
    let wanted = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    node.kubelet.publish_badly(&wanted, Code::ResourceExhausted);
    staging_is_empty(&node);
    // A mounted volume is found and unpublished without a byte.
    node.kubelet.publish_well(&volume);
    node.kubelet.unpublish(&volume);
    // Unlike a removal, this frees the space although a process that was just forked still has the file open.
    file.set_len(0).expect("room");
    node.kubelet.publish_well(&wanted);
}

#[test]
fn a_disk_that_turns_read_only_serves_what_is_mounted_and_comes_back() {
    let (node, disk) = node(NO_FLOOR);
    let reference = node.proxy.reference(&node.small_artifact().name);
    let (volume, _) = node.mount(&reference);
    let (other, _) = node.mount(&reference);
    let remount = |flags: MsFlags| {
        mount(None::<&str>, &disk, None::<&str>, MsFlags::MS_REMOUNT | flags, None::<&str>)
            .expect("remounted");
    };
    remount(MsFlags::MS_RDONLY);
    // Cached content is mounted: its record is a hint, and nothing else has to be written.
    let (wanted, _) = node.mount(&reference);
    let unknown = node.kubelet.new_volume(&node.proxy.reference(&node.small_artifact().name));
    node.kubelet.publish_badly(&unknown, Code::Internal);
    node.kubelet.publish_well(&volume);
    node.kubelet.unpublish(&volume);
    remount(MsFlags::empty());
    for volume in [&wanted, &unknown, &other] {
        node.kubelet.publish_well(volume);
    }
    staging_is_empty(&node);
}

#[test]
fn a_disk_with_errors_harms_only_what_lies_on_it() {
    let (node, disk) = node(NO_FLOOR);
    let artifact = node.small_artifact();
    let reference = node.proxy.reference(&artifact.name);
    let (volume, _) = node.mount(&reference);
    let (gone, _) = node.mount(&reference);
    // From here on every access to the disk fails, as if its cable were pulled.
    run(tool("xfs_io").args(["-x", "-c", "shutdown"]).arg(&disk));
    let wanted = node.kubelet.new_volume(&node.proxy.reference(&node.small_artifact().name));
    for volume in [&wanted, &node.kubelet.new_volume(&reference)] {
        node.kubelet.publish_badly(volume, Code::Internal);
    }
    // A mounted volume stays mounted, and its unpublish succeeds.
    node.kubelet.publish_well(&volume);
    node.kubelet.unpublish(&volume);
    node.kubelet.unpublish(&gone);
    let Node { driver, kubelet, proxy: _proxy, sandbox } = node;
    let options = driver.kill();
    nix::mount::umount2(&disk, nix::mount::MntFlags::empty()).expect("an unused disk");
    let image = sandbox.image("disk", "ext4");
    run(tool("mount").args(["-o", "loop"]).arg(&image).arg(&disk));
    let _driver = options.start();
    kubelet.publish_well(&wanted);
    kubelet.publish_well(&volume);
    let content = fs::read_to_string(volume.target().join("file.txt")).expect("readable");
    assert_eq!(content, artifact.content);
}

/// Starts a node that fails at a point. Returns its options without the fault.
fn node_with_fault(fault: &str) -> (Node, DriverOptions) {
    let mut sound = None;
    let node = Node::start_with(|_, options| {
        sound = Some(options.clone());
        options.environment("CSI_OCI_FAULT", fault)
    });
    (node, sound.expect("options"))
}

/// Publishes an artifact of a `file` on a disk that fails at a point, then on a healthy one. Returns the number of
/// fetches of its blob.
#[track_caller]
fn fetches_with_fault(manifest: &Manifest, blob: &[u8], content: &[u8], point: &str) -> usize {
    let (node, sound) = node_with_fault(point);
    let repository = unique("fault");
    manifest.push(registry(), &repository, "v1");
    let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    node.kubelet.publish_badly(&volume, Code::Internal);
    let Node { driver, kubelet, proxy, sandbox: _sandbox } = node;
    driver.kill();
    let _driver = sound.start();
    kubelet.publish_well(&volume);
    assert!(fs::read(volume.target().join("file")).expect("the file") == content);
    proxy.fetches(&digest(blob))
}

#[test]
fn a_blob_that_only_the_disk_has_failed_is_not_fetched_again() {
    let content = noise(1 << 20, 31);
    let archive = Tar::new().file("file", 0o644, &content).finish();
    let packed = gzip(&archive);
    let image = Image::new().packed_layer(OCI_TAR_GZIP, packed.clone(), &archive).manifest();
    assert_eq!(fetches_with_fault(&image, &packed, &content, "layer.unpacked:error:5"), 1);
    let file = Manifest::artifact([Layer::titled("file", content.clone())]);
    assert_eq!(fetches_with_fault(&file, &content, &content, "file.moved:error:5"), 1);
}

#[test]
fn what_could_not_be_synced_is_fetched_again_and_not_taken_for_written() {
    let content = noise(1 << 20, 33);
    let file = Manifest::artifact([Layer::titled("file", content.clone())]);
    assert_eq!(fetches_with_fault(&file, &content, &content, "commit.staged:error:5"), 2);
}

#[test]
fn a_name_that_could_not_be_made_durable_is_counted_and_goes() {
    let mut endpoint = String::new();
    let node = Node::start_with(|sandbox, options| {
        endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
        options.configuration(NO_FLOOR).argument(&format!("--admin-endpoint={endpoint}"))
    });
    let admin = Admin::at(&endpoint);
    let reference = node.proxy.reference(&node.small_artifact().name);
    let (volume, _) = node.mount(&reference);
    let Node { driver, kubelet, proxy: _proxy, sandbox: _sandbox } = node;
    let options = driver.kill();
    // All of its content is in the store; only a tree of another shape is named.
    let driver = options.environment("CSI_OCI_FAULT", "rename.done:error:5").start();
    admin.json(&["status"]);
    let other = kubelet.new_volume(&reference).attribute("include", "file.txt");
    kubelet.publish_badly(&other, Code::Internal);
    // Its content is durable: it serves, and is not created again.
    kubelet.publish_well(&other);
    for volume in [&volume, &other] {
        kubelet.unpublish(volume);
    }
    wait_until("no record is left", || admin.json(&["status"])["published"] == 0);
    for folder in ["trees", "files", "staging"] {
        // A reader may release its lease a moment after its response.
        wait_until(&format!("nothing is left in {folder}"), || {
            admin.text(&["gc", "--target", "0"]);
            fs::read_dir(driver.state().join(folder)).expect("a folder").count() == 0
        });
    }
}
