//! Tests the node's disk space: reserved before the first byte, freed by eviction, never taken from content in use.

use std::{fs, path::Path};

use tonic::Code;

use crate::support::{
    Admin, FakeRegistry, Image, Layer, Manifest, Node, OCI_MANIFEST, OCI_TAR_GZIP, Tar, Volume,
    gzip, noise, registry, unique, wait_until,
};

/// Returns a configuration in which only the quota decides.
fn quota(bytes: &str, more: &str) -> String {
    format!(
        "cache: {{maxBytes: {bytes}, minFreePercent: 0, minFreeInodesPercent: 0, highThresholdPercent: 100, \
         lowThresholdPercent: 100, minimumAge: 0s{more}}}\n"
    )
}

/// Pushes an artifact of one file of this many MiB.
fn artifact(node: &Node, mebibytes: usize) -> String {
    let repository = unique("room");
    // The sum of the bytes would be the same for some names, and so would the artifacts.
    let seed = repository
        .bytes()
        .fold(0, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)));
    let content = noise(mebibytes << 20, seed);
    Manifest::artifact([Layer::titled("file", content)]).push(registry(), &repository, "v1");
    node.proxy.reference(&format!("{repository}:v1"))
}

fn publish(node: &Node, reference: &str) -> Volume {
    let volume = node.kubelet.new_volume(reference);
    node.kubelet.publish_well(&volume);
    volume
}

/// Publishes and unpublishes, so that the artifact is cached and unused.
fn cache(node: &Node, admin: &Admin, reference: &str) {
    let volume = publish(node, reference);
    node.kubelet.unpublish(&volume);
    wait_until("the record is gone", || admin.json(&["status"])["published"] == 0);
}

#[test]
fn the_least_recently_used_goes_for_what_is_new() {
    let (node, admin) = Admin::start(&quota("25Mi", ""));
    let [one, two, three] = [(); 3].map(|()| artifact(&node, 10));
    let node = older(used(node, &admin, &one), 100);
    let node = older(used(node, &admin, &two), 50);
    let node = used(node, &admin, &one);
    let node = used(node, &admin, &three);
    assert!(admin.holds(&one) && admin.holds(&three), "what was used lately stays");
    assert!(!admin.holds(&two), "what was used longest ago goes");
    // An evicted artifact is pulled again.
    let volume = publish(&node, &two);
    assert_eq!(fs::metadata(volume.target().join("file")).expect("the file").len(), 10 << 20);
    let status = admin.json(&["status"]);
    assert!(status["evictedBytes"].as_u64() > Some(10 << 20), "{status}");
    assert!(status["cacheBytes"].as_u64() <= Some(25 << 20), "{status}");
}

fn used(node: Node, admin: &Admin, reference: &str) -> Node {
    cache(&node, admin, reference);
    node
}

/// Makes the last use of everything in the cache this many seconds earlier.
fn older(node: Node, seconds: u64) -> Node {
    let Node { driver, kubelet, proxy, sandbox } = node;
    let options = driver.kill();
    for tree in fs::read_dir(options.state.join("trees")).expect("trees").flatten() {
        let file = fs::File::open(tree.path().join("1/tree.json")).expect("a record");
        let before = file.metadata().and_then(|metadata| metadata.modified()).expect("a time");
        file.set_modified(before - std::time::Duration::from_secs(seconds)).expect("a time set");
    }
    Node { driver: options.start(), kubelet, proxy, sandbox }
}

#[test]
fn what_is_shown_or_pinned_is_never_evicted() {
    let (node, admin) = Admin::start(&quota("25Mi", ""));
    let [shown, pinned, wanted] = [(); 3].map(|()| artifact(&node, 10));
    let volume = publish(&node, &shown);
    cache_while_shown(&node, &admin, &pinned);
    admin.text(&["pin", &pinned]);
    let refused = node.kubelet.new_volume(&wanted);
    let told = node.kubelet.publish_badly(&refused, Code::ResourceExhausted);
    for part in ["needed 10.0 MiB", "evictable 0 B", "pinned 10.0 MiB", "cache.maxBytes"] {
        assert!(told.contains(part), "{part} is not in: {told}");
    }
    assert!(admin.holds(&shown) && admin.holds(&pinned));
    assert_eq!(fs::metadata(volume.target().join("file")).expect("the file").len(), 10 << 20);
    admin.text(&["unpin", &pinned]);
    node.kubelet.publish_well(&refused);
    assert!(admin.holds(&shown) && !admin.holds(&pinned));
}

fn cache_while_shown(node: &Node, admin: &Admin, reference: &str) {
    let before = admin.json(&["status"])["published"].clone();
    let volume = publish(node, reference);
    node.kubelet.unpublish(&volume);
    wait_until("the record is gone", || admin.json(&["status"])["published"] == before);
}

#[test]
fn what_was_used_just_now_stays_for_a_while() {
    let configuration = quota("15Mi", "").replace("minimumAge: 0s", "minimumAge: 1h");
    let (node, admin) = Admin::start(&configuration);
    let [one, two] = [(); 2].map(|()| artifact(&node, 10));
    cache(&node, &admin, &one);
    let told = node.kubelet.publish_badly(&node.kubelet.new_volume(&two), Code::ResourceExhausted);
    assert!(told.contains("evictable 0 B"), "{told}");
    assert!(admin.holds(&one));
}

#[test]
fn what_will_not_fit_is_refused_before_its_first_byte_and_evicts_nothing() {
    let (node, admin) = Admin::start(&quota("25Mi", ""));
    let small = artifact(&node, 1);
    cache(&node, &admin, &small);
    let fake = FakeRegistry::new();
    let layer = Layer::titled("huge", "never sent");
    let mut manifest = Manifest::artifact([layer]).json();
    manifest["layers"][0]["size"] = (1u64 << 40).into();
    fake.put_manifest("v1", OCI_MANIFEST, manifest.to_string());
    fake.put_blob("{}");
    let volume = node.kubelet.new_volume(&fake.reference("v1"));
    let told = node.kubelet.publish_badly(&volume, Code::ResourceExhausted);
    assert!(told.contains("needed 1.0 TiB"), "{told}");
    assert!(fake.requests().iter().all(|request| !request.path.contains("/blobs/")));
    assert!(admin.holds(&small), "no content is evicted for what does not fit anyway");
}

#[test]
fn content_that_is_shared_is_counted_once_and_goes_with_the_last() {
    let (node, admin) = Admin::start(&quota("15Mi", ""));
    let repository = unique("shared");
    let common = Layer::titled("common", noise(10 << 20, 7));
    for tag in ["v1", "v2"] {
        Manifest::artifact([common.clone(), Layer::titled("own", tag)]).push(
            registry(),
            &repository,
            tag,
        );
    }
    let [one, two] = ["v1", "v2"].map(|tag| node.proxy.reference(&format!("{repository}:{tag}")));
    let volume = publish(&node, &one);
    cache_while_shown(&node, &admin, &two);
    assert!(admin.json(&["status"])["cacheBytes"].as_u64() < Some(11 << 20));
    let freed = admin.json(&["gc", "--target", "0"]);
    assert!(freed["freedBytes"].as_u64() < Some(1 << 20), "{freed}");
    assert!(!admin.holds(&two) && admin.holds(&one));
    assert_eq!(fs::metadata(volume.target().join("common")).expect("the file").len(), 10 << 20);
    node.kubelet.unpublish(&volume);
    wait_until("the record is gone", || admin.json(&["status"])["published"] == 0);
    let freed = admin.json(&["gc", "--target", "0"]);
    assert!(freed["freedBytes"].as_u64() > Some(10 << 20), "{freed}");
    assert_eq!(admin.json(&["status"])["cacheObjects"], 0);
}

/// Starts a node whose state is on a small disk of its own.
fn on_a_small_disk(configuration: &str) -> (Node, Admin, std::path::PathBuf) {
    let mut endpoint = String::new();
    let mut disk = std::path::PathBuf::new();
    let node = Node::start_with(|sandbox, options| {
        endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
        disk = sandbox.filesystem_of(128 << 20, "ext4", "disk", "rw");
        options
            .state(&disk.join("state"))
            .configuration(configuration)
            .argument(&format!("--admin-endpoint={endpoint}"))
    });
    (node, Admin::at(&endpoint), disk)
}

/// Fills a disk until this many MiB are left.
fn fill(disk: &Path, left: u64) -> std::path::PathBuf {
    let status = nix::sys::statvfs::statvfs(disk).expect("the disk");
    let free = status.blocks_available() * status.fragment_size();
    let path = disk.join("filler");
    let file = fs::File::create(&path).expect("a file");
    let size = i64::try_from(free.saturating_sub(left << 20)).expect("a size");
    nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, size).expect("room");
    path
}

#[test]
fn nothing_is_written_below_the_floor() {
    let (node, _admin, disk) = on_a_small_disk("cache: {minFreePercent: 50, minimumAge: 0s}\n");
    let small = artifact(&node, 5);
    let volume = publish(&node, &small);
    let filler = fill(&disk, 30);
    let wanted = node.kubelet.new_volume(&artifact(&node, 5));
    let told = node.kubelet.publish_badly(&wanted, Code::ResourceExhausted);
    assert!(told.contains("stay free") && told.contains("cache.minFreePercent"), "{told}");
    // Cached content needs no space.
    node.kubelet.publish_well(&volume);
    publish(&node, &small);
    fs::remove_file(filler).expect("room again");
    node.kubelet.publish_well(&wanted);
    node.kubelet.unpublish(&volume);
}

#[test]
fn unpacking_never_takes_inodes_below_the_floor() {
    let (node, _admin, disk) = on_a_small_disk("cache: {minFreePercent: 0, minimumAge: 0s}\n");
    let free = || nix::sys::statvfs::statvfs(&disk).expect("the disk").files_available();
    let floor = nix::sys::statvfs::statvfs(&disk).expect("the disk").files() / 10;
    let fillers = disk.join("fillers");
    fs::create_dir(&fillers).expect("a directory");
    for number in 0..free().saturating_sub(floor + 1200) {
        fs::File::create(fillers.join(number.to_string())).expect("a file");
    }
    let mut layer = Tar::new();
    for number in 0..5000 {
        layer = layer.file(&format!("{number}"), 0o644, b"a few bytes");
    }
    let repository = unique("inodes");
    Image::new().layer(layer.finish()).push(registry(), &repository, "v1");
    let wanted = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let least = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut least = free();
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                least = least.min(free());
            }
            least
        });
        node.kubelet.publish_badly(&wanted, Code::ResourceExhausted);
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
        watcher.join().expect("the least number of free inodes")
    });
    // Records of the pull are not metered.
    assert!(least + 16 > floor, "{least} of {floor} inodes were left free");
    fs::remove_dir_all(&fillers).expect("free inodes");
    node.kubelet.publish_well(&wanted);
}

#[test]
fn the_threshold_is_kept_without_being_asked() {
    let configuration = "cache: {highThresholdPercent: 50, lowThresholdPercent: 30, minFreePercent: 5, minimumAge: 0s}\n";
    let (node, admin, disk) = on_a_small_disk(configuration);
    let one = artifact(&node, 10);
    cache(&node, &admin, &one);
    assert!(admin.holds(&one));
    let _filler = fill(&disk, 30);
    // Any publish or unpublish wakes the node's maintenance.
    let two = artifact(&node, 1);
    let _shown = publish(&node, &two);
    wait_until("unused content is evicted", || !admin.holds(&one));
    assert!(admin.holds(&two));
}

#[test]
fn an_archive_that_unpacks_to_more_than_was_thought_ends_at_the_floor() {
    let (node, admin, disk) = on_a_small_disk("cache: {minFreePercent: 40, minimumAge: 0s}\n");
    let old = artifact(&node, 5);
    cache(&node, &admin, &old);
    // One part noise, thirty parts zeros.
    let mut content = noise(90 << 20, 9);
    content.chunks_mut(4096).for_each(|chunk| chunk[128..].fill(0));
    let bomb = Tar::new().file("mostly-zeros", 0o644, content).finish();
    let repository = unique("inflated");
    Image::new().packed_layer(OCI_TAR_GZIP, gzip(&bomb), &bomb).push(registry(), &repository, "v1");
    let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    node.kubelet.publish_badly(&volume, Code::ResourceExhausted);
    let status = nix::sys::statvfs::statvfs(&disk).expect("the disk");
    let free = status.blocks_available() * status.fragment_size();
    assert!(free > 45 << 20, "what was half unpacked is gone: {free}");
    assert!(!admin.holds(&old), "unused content is evicted first");
}

#[test]
fn what_is_under_way_has_its_room_and_others_are_told_of_it() {
    let (node, admin) = Admin::start(&quota("15Mi", ""));
    let [first, second] = [(); 2].map(|()| artifact(&node, 10));
    let gate = node.proxy.hold_blobs();
    let [slow, same] = [(); 2].map(|()| node.kubelet.new_volume(&first));
    let refused = node.kubelet.new_volume(&second);
    std::thread::scope(|scope| {
        let call = scope.spawn(|| node.kubelet.publish_well(&slow));
        wait_until("the download waits", || gate.waiting() == 1);
        let told = node.kubelet.publish_badly(&refused, Code::ResourceExhausted);
        // Half of the first one has arrived, and is no longer reserved.
        assert!(told.contains("needed 10.0 MiB beside 5.0 MiB promised"), "{told}");
        // A call that joins a running pull needs no further space.
        let joined = scope.spawn(|| node.kubelet.publish_well(&same));
        gate.open();
        call.join().expect("the first call");
        joined.join().expect("the call that joined");
    });
    assert!(admin.holds(&first) && !admin.holds(&second));
}

#[test]
fn inodes_are_kept_free_as_bytes_are() {
    // Nearly all of them: one in a hundred is left above the floor.
    let configuration = "cache: {minFreePercent: 0, minFreeInodesPercent: 99, highThresholdPercent: 100, \
                         lowThresholdPercent: 100, minimumAge: 0s}\n";
    let (node, admin, disk) = on_a_small_disk(configuration);
    let free_inodes = || nix::sys::statvfs::statvfs(&disk).expect("the disk").files_available();
    let small = artifact(&node, 1);
    cache(&node, &admin, &small);
    let before = free_inodes();
    // An archive whose size alone implies more files than are allowed.
    let large = Tar::new().file("one", 0o644, noise(12 << 20, 31)).finish();
    let repository = unique("large");
    Image::new().layer(large).push(registry(), &repository, "v1");
    let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    let told = node.kubelet.publish_badly(&volume, Code::ResourceExhausted);
    assert!(told.contains("inodes") && told.contains("cache.minFreeInodesPercent"), "{told}");
    assert!(admin.holds(&small), "no content is evicted for what does not fit anyway");
    // An archive whose size does not imply that ends at the floor, and leaves nothing.
    let many = (0..4000).fold(Tar::new(), |tar, file| tar.file(&format!("f/{file}"), 0o644, ""));
    let (many, repository) = (many.finish(), unique("many"));
    Image::new().packed_layer(OCI_TAR_GZIP, gzip(&many), &many).push(registry(), &repository, "v1");
    let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    node.kubelet.publish_badly(&volume, Code::ResourceExhausted);
    let taken = before.saturating_sub(free_inodes());
    assert!(taken < 50, "of what was half unpacked {taken} inodes are left");
}

#[test]
fn a_copy_with_another_mode_takes_room_of_its_own() {
    let (node, _admin) = Admin::start(&quota("15Mi", ""));
    let reference = artifact(&node, 10);
    let restricted = node.kubelet.new_volume(&reference).attribute("fileMode", "0440");
    node.kubelet.publish_well(&restricted);
    let plain = node.kubelet.new_volume(&reference);
    let refused = node.kubelet.publish_badly(&plain, Code::ResourceExhausted);
    assert!(refused.contains("cache.maxBytes"), "{refused}");
    node.kubelet.unpublish(&restricted);
}

#[test]
fn layers_that_are_too_much_together_are_not_fetched_to_the_last() {
    const LAYERS: u64 = 12;
    let (node, _admin) = Admin::start("limits: {entries: 25}\n");
    let repository = unique("many");
    let image = (0..LAYERS).fold(Image::new(), |image, layer| {
        let files = (0..10).map(|file| format!("{layer}-{file}"));
        let archive = files.fold(Tar::new(), |tar, name| tar.file(&name, 0o644, "x")).finish();
        image.packed_layer(OCI_TAR_GZIP, gzip(&archive), &archive)
    });
    image.push(registry(), &repository, "v1");
    let volume = node.kubelet.new_volume(&node.proxy.reference(&format!("{repository}:v1")));
    let refused = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
    assert!(refused.contains("limits.entries"), "{refused}");
    let requests = node.proxy.requests();
    let blobs = requests.iter().filter(|passed| passed.path.contains("/blobs/"));
    let blobs: std::collections::BTreeSet<_> = blobs.map(|passed| &passed.path).collect();
    // The third is too much; four are fetched at once.
    assert!((3..=7).contains(&blobs.len()), "{blobs:?}");
}
