//! Tests what keeps working without the registry, the driver, or its state.

use std::{fs, time::Duration};

use tonic::Code;

use crate::support::{
    Driver, Layer, Manifest, Node, Tree, digest, mounts_at, noise, registry, unique, wait_until,
};

#[test]
fn a_registry_that_is_down_is_unavailable_and_works_again_when_back() {
    let node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    node.proxy.go_down();
    let volume = node.kubelet.new_volume(&reference);
    node.kubelet.publish_badly(&volume, Code::Unavailable);
    node.proxy.come_back();
    node.kubelet.publish_well(&volume);
}

#[test]
fn cached_content_needs_no_registry_also_after_a_restart_of_the_driver() {
    let mut node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    let (first, tree) = node.mount(&reference);
    node.proxy.go_down();
    assert_eq!(node.mount(&reference).1, tree);
    node.kubelet.unpublish(&first);
    assert_eq!(node.mount(&reference).1, tree);
    node.driver = node.driver.restart();
    assert_eq!(node.mount(&reference).1, tree);
    node.driver = node.driver.kill().start();
    assert_eq!(node.mount(&reference).1, tree);
}

#[test]
fn a_mounted_volume_is_published_again_without_registry_secret_or_tag() {
    let mut node = Node::start();
    let artifact = node.small_artifact();
    let reference = node.proxy.reference(&artifact.name);
    let (volume, tree) = node.mount_with(&reference, |volume| {
        volume.attribute("pullPolicy", "Always").secret("username", "u").secret("password", "p")
    });
    let mount = mounts_at(volume.target());
    Manifest::artifact([Layer::titled("moved", "x")]).push(registry(), &artifact.repository, "v1");
    node.proxy.go_down();
    let mut again = volume.clone();
    again.request.secrets.clear();
    node.kubelet.publish_well(&again);
    // The kubelet does this for every running pod after its own restart.
    node.driver = node.driver.restart();
    node.kubelet.publish_well(&again);
    assert_eq!(mounts_at(volume.target()), mount);
    assert_eq!(Tree::of(volume.target()), tree);
}

#[test]
fn mounts_outlive_the_driver_and_are_undone_by_the_next_one() {
    let mut node = Node::start();
    let (volume, tree) = node.mount(&node.proxy.reference(&node.small_artifact().name));
    let options = node.driver.kill();
    assert_eq!(Tree::of(volume.target()), tree);
    node.driver = options.start();
    assert_eq!(Tree::of(volume.target()), tree);
    node.kubelet.unpublish(&volume);
}

#[test]
fn an_open_file_outlives_everything() {
    use std::io::Read as _;
    let node = Node::start();
    let artifact = node.small_artifact();
    let (volume, _) = node.mount(&node.proxy.reference(&artifact.name));
    let mut file = fs::File::open(volume.target().join("file.txt")).expect("a file");
    node.kubelet.unpublish(&volume);
    let mut text = String::new();
    file.read_to_string(&mut text).expect("read");
    assert_eq!(text, artifact.content);
}

#[test]
fn unpublish_needs_no_state() {
    let mut node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    let (first, _) = node.mount(&reference);
    let (second, _) = node.mount(&reference);
    // While the driver runs,
    empty(node.driver.state());
    node.kubelet.unpublish(&first);
    // and before another one starts.
    let options = node.driver.kill();
    empty(&options.state);
    node.driver = options.start();
    node.kubelet.unpublish(&second);
}

#[test]
fn a_driver_that_lost_its_state_pulls_again() {
    let mut node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    let (volume, tree) = node.mount(&reference);
    node.kubelet.unpublish(&volume);
    let options = node.driver.kill();
    empty(&options.state);
    node.driver = options.start();
    assert_eq!(node.mount(&reference).1.without_times(), tree.without_times());
}

#[test]
fn records_that_are_garbage_are_ignored() {
    let mut node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    let (volume, _) = node.mount(&reference);
    let options = node.driver.kill();
    overwrite_small_files(&options.state);
    node.driver = options.start();
    node.kubelet.unpublish(&volume);
    node.driver.wait_until_registered();
}

#[test]
fn sigterm_answers_waiting_calls_leaves_mounts_and_ends() {
    let node = Node::start();
    let (mounted, tree) = node.mount(&node.proxy.reference(&node.small_artifact().name));
    let repository = unique("slow");
    Manifest::artifact([Layer::titled("slow", noise(1 << 20, 1))]).push(
        registry(),
        &repository,
        "v1",
    );
    let gate = node.proxy.hold_blobs();
    let waiting = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    let status = std::thread::scope(|scope| {
        let call = scope.spawn(|| node.kubelet.publish(&waiting));
        wait_until("the download waits", || gate.waiting() == 1);
        node.driver.terminate();
        call.join().expect("the call")
    });
    assert_eq!(status.expect_err("the driver ends").code(), Code::Unavailable);
    let started = std::time::Instant::now();
    let options = node.driver.wait();
    // The contract's promise; the grace period of Kubernetes is not much longer.
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(Tree::of(mounted.target()), tree);
    gate.open();
    let _driver: Driver = options.start();
    node.kubelet.publish_well(&waiting);
    node.kubelet.unpublish(&waiting);
    node.kubelet.unpublish(&mounted);
}

#[test]
fn a_driver_killed_during_a_pull_leaves_nothing_wrong_and_the_next_one_pulls() {
    let mut node = Node::start();
    let repository = unique("killed");
    let content = noise(8 << 20, 7);
    let manifest = Manifest::artifact([
        Layer::titled("big", content.clone()),
        Layer::titled("small", "small"),
    ]);
    manifest.push(registry(), &repository, "v1");
    let gate = node.proxy.hold_blobs();
    let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    node.kubelet.prepare(&volume);
    let options = std::thread::scope(|scope| {
        let call = scope.spawn(|| node.kubelet.publish_request(volume.request.clone()));
        wait_until("downloads wait", || gate.waiting() >= 1);
        node.driver.terminate_hard();
        assert!(call.join().expect("the call").is_err());
        node.driver.options.clone()
    });
    assert_eq!(mounts_at(volume.target()), []);
    gate.open();
    node.driver = options.start();
    node.kubelet.publish_well(&volume);
    let tree = Tree::of(volume.target());
    assert_eq!(tree.files(), ["big", "small"]);
    assert_eq!(fs::read(volume.target().join("big")).expect("the file"), content);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_download_that_broke_off_goes_on_where_it_stopped() {
    let mut node = Node::start();
    let repository = unique("resumed");
    let content = noise(32 << 20, 9);
    Manifest::artifact([Layer::titled("big", content.clone())]).push(registry(), &repository, "v1");
    let gate = node.proxy.hold_blobs();
    let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    node.kubelet.prepare(&volume);
    let half = 16 << 20;
    let options = std::thread::scope(|scope| {
        let call = scope.spawn(|| node.kubelet.publish_request(volume.request.clone()));
        wait_until("half of the blob has come", || {
            gate.waiting() >= 1 && partial_bytes(node.driver.state()) >= half / 2
        });
        node.driver.terminate_hard();
        assert!(call.join().expect("the call").is_err());
        node.driver.options.clone()
    });
    gate.open();
    node.proxy.take_requests();
    node.driver = options.start();
    node.kubelet.publish_well(&volume);
    assert_eq!(fs::read(volume.target().join("big")).expect("the file"), content);
    let requests = node.proxy.requests();
    let blob: Vec<_> =
        requests.iter().filter(|request| request.path.contains(&digest(&content))).collect();
    assert!(!blob.is_empty() && blob.iter().all(|request| request.ranged), "{blob:?}");
}

/// Returns the number of bytes in partial downloads.
fn partial_bytes(state: &std::path::Path) -> u64 {
    fn sum(folder: &std::path::Path, inside: bool) -> u64 {
        fs::read_dir(folder).into_iter().flatten().flatten().fold(0, |total, entry| {
            let Ok(metadata) = entry.metadata() else { return total };
            if metadata.is_dir() {
                total + sum(&entry.path(), inside || entry.file_name() == "partial")
            } else if inside {
                // A download in parts has holes, which its length includes.
                total + std::os::unix::fs::MetadataExt::blocks(&metadata) * 512
            } else {
                total
            }
        })
    }
    sum(state, false)
}

/// Deletes the contents of the state directory, as when an administrator frees a disk.
fn empty(state: &std::path::Path) {
    for entry in fs::read_dir(state).expect("the state").flatten() {
        let path = entry.path();
        let removed =
            if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.expect("remove the state");
    }
}

/// Overwrites small files, as a power failure leaves files that were never synced.
fn overwrite_small_files(folder: &std::path::Path) {
    for entry in fs::read_dir(folder).expect("the state").flatten() {
        let path = entry.path();
        let metadata = fs::symlink_metadata(&path).expect("metadata");
        if metadata.is_dir() {
            overwrite_small_files(&path);
        } else if metadata.is_file() && metadata.len() > 0 && metadata.len() < 4096 {
            fs::write(&path, vec![0; usize::try_from(metadata.len()).expect("a length")])
                .expect("overwrite");
        }
    }
}
