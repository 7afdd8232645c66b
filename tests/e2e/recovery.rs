//! Tests the state that a new process finds, and its reaction.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use nix::mount::MsFlags;
use serde_json::json;
use tonic::Code;

use crate::support::{
    Admin, Driver, DriverOptions, Kubelet, Node, Sandbox, Volume, mounts_at, run, tool, wait_until,
};

const ROOMY: &str = "cache: {minFreePercent: 0, minFreeInodesPercent: 0, highThresholdPercent: 100, \
                     lowThresholdPercent: 100, minimumAge: 0s}\n";

fn records(state: &Path) -> Vec<PathBuf> {
    let folder = fs::read_dir(state.join("publications")).expect("records");
    folder.flatten().map(|entry| entry.path()).collect()
}

#[test]
fn a_mount_that_the_kubelet_has_forgotten_is_unmounted() {
    let node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    let [forgotten, lost, kept] = [(); 3].map(|()| node.mount(&reference).0);
    let Node { driver, kubelet, .. } = node;
    let options = driver.kill();
    fs::remove_file(forgotten.parent().join("vol_data.json")).expect("removed");
    fs::remove_file(lost.parent().join("vol_data.json")).expect("removed");
    for record in records(&options.state) {
        let text = fs::read_to_string(&record).expect("a record");
        if text.contains(lost.target().to_str().expect("a path")) {
            fs::remove_file(record).expect("removed");
        }
    }
    let driver = options.start();
    for gone in [&forgotten, &lost] {
        assert_eq!(mounts_at(gone.target()), []);
        assert!(!gone.target().exists() && gone.parent().exists());
    }
    kept.assert_mounted();
    kubelet.publish_well(&kept);
    assert_eq!(records(driver.state()).len(), 1);
}

#[test]
fn a_volume_that_is_published_while_stale_records_are_removed_keeps_its_record() {
    let mut go = PathBuf::new();
    let node = Node::start_with(|sandbox, options| {
        go = sandbox.path().join("go");
        let fault = format!("reconcile.decided:pause:{}", go.display());
        options
            .configuration(ROOMY)
            .environment("CSI_OCI_FAULT", &fault)
            .environment("CSI_OCI_COMPARE_INTERVAL", "200")
    });
    let reference = node.proxy.reference(&node.small_artifact().name);
    let has_record = |volume: &Volume| {
        let of_volume = |path: &PathBuf| {
            let text = fs::read_to_string(path).unwrap_or_default();
            text.contains(&volume.request.volume_id)
        };
        records(node.driver.state()).iter().any(of_volume)
    };
    let (volume, _) = node.mount(&reference);
    nix::mount::umount(volume.target()).expect("unmounted");
    fs::remove_dir_all(volume.parent()).expect("the kubelet's folder");
    wait_until("a stale record is found", || node.driver.log().contains("reconcile.decided"));
    node.kubelet.publish_well(&volume);
    let (gone, _) = node.mount(&reference);
    nix::mount::umount(gone.target()).expect("unmounted");
    fs::remove_dir_all(gone.parent()).expect("the kubelet's folder");
    fs::write(&go, "").expect("a file");
    wait_until("the next stale record is removed", || !has_record(&gone));
    assert!(has_record(&volume));
}

#[test]
fn a_lost_record_is_written_again_and_keeps_its_content() {
    let (node, admin) = Admin::start(ROOMY);
    let artifact = node.small_artifact();
    let (volume, _) = node.mount(&node.proxy.reference(&artifact.name));
    let Node { driver, kubelet, proxy, .. } = node;
    let options = driver.kill();
    for record in records(&options.state) {
        fs::write(record, "{\"volume_id\": \"half").expect("cut in half");
    }
    let driver = options.start();
    assert_eq!(admin.json(&["status"])["published"], 1);
    admin.text(&["rm", &proxy.reference(&artifact.name)]);
    admin.text(&["gc", "--target", "0"]);
    assert_eq!(
        fs::read_to_string(volume.target().join("file.txt")).expect("shown"),
        artifact.content
    );
    // The kubelet that mounted it publishes it again, and finds it.
    kubelet.publish_well(&volume);
    kubelet.unpublish(&volume);
    wait_until("it goes", || admin.json(&["status"])["cacheObjects"] == 0);
    drop(driver);
}

#[test]
fn a_state_directory_of_another_machine_keeps_its_content_and_drops_its_publications() {
    let node = Node::start();
    let artifact = node.small_artifact();
    let reference = node.proxy.reference(&artifact.name);
    let (elsewhere, _) = node.mount(&reference);
    let Node { driver, proxy, sandbox, kubelet } = node;
    let options = driver.kill();
    proxy.go_down();
    let copy = sandbox.path().join("copy");
    run(tool("cp").arg("-a").arg(&options.state).arg(&copy));
    // The other machine's kubelet has none of these pods.
    nix::mount::umount2(elsewhere.target(), nix::mount::MntFlags::empty()).expect("unmounted");
    fs::remove_dir_all(kubelet.directory().join("pods")).expect("no pods");
    let other = Sandbox::new();
    let driver = DriverOptions::new(&other).state(&copy).start();
    assert_eq!(records(&copy), Vec::<PathBuf>::new());
    let volume = driver.kubelet().new_volume(&reference);
    driver.kubelet().publish_well(&volume);
    assert_eq!(
        fs::read_to_string(volume.target().join("file.txt")).expect("shown"),
        artifact.content
    );
}

#[test]
fn what_is_not_the_drivers_is_left_alone() {
    let (node, admin) = Admin::start(ROOMY);
    let (volume, _) = node.mount(&node.proxy.reference(&node.small_artifact().name));
    let Node { driver, kubelet, sandbox, .. } = node;
    let options = driver.kill();
    let outside = sandbox.folder("outside");
    fs::write(outside.join("precious"), "data").expect("a file");
    let strange = [
        options.state.join("notes.txt"),
        options.state.join("trees/README"),
        options.state.join("layers/not-a-key/1/data"),
        options.state.join("files/x"),
        options.state.join("partial/readme"),
        options.state.join("blobs/backup.json"),
    ];
    for path in &strange {
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, "mine").expect("a file");
    }
    symlink(&outside, options.state.join("staging/link")).expect("a link");
    symlink(&outside, options.state.join("trees").join("a".repeat(64))).expect("a link");
    let _driver = options.start();
    kubelet.unpublish(&volume);
    wait_until("the record is gone", || admin.json(&["status"])["published"] == 0);
    admin.text(&["gc", "--target", "0"]);
    admin.text(&["verify"]);
    for path in &strange {
        assert!(path.exists(), "{} is gone", path.display());
    }
    assert_eq!(fs::read_to_string(outside.join("precious")).expect("kept"), "data");
}

#[test]
fn a_link_in_place_of_a_folder_is_named_and_not_followed() {
    let node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    let (volume, _) = node.mount(&reference);
    let Node { driver, kubelet, sandbox, .. } = node;
    let options = driver.kill();
    let elsewhere = sandbox.path().join("elsewhere");
    fs::rename(options.state.join("staging"), &elsewhere).expect("moved");
    fs::write(elsewhere.join("precious"), "data").expect("a file");
    symlink(&elsewhere, options.state.join("staging")).expect("a link");
    let _driver = options.start();
    let told = kubelet.publish_badly(&kubelet.new_volume(&reference), Code::Unavailable);
    assert!(told.contains("staging") && told.contains("symbolic link"), "{told}");
    assert!(elsewhere.join("precious").exists());
    kubelet.unpublish(&volume);
}

#[test]
fn a_folder_of_another_user_or_filesystem_is_named_and_left_alone() {
    let node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    let Node { driver, kubelet, proxy: _proxy, sandbox: _sandbox } = node;
    let mut options = driver.kill();
    let blobs = options.state.join("blobs");
    std::os::unix::fs::chown(&blobs, Some(1234), None).expect("another owner");
    let driver = options.start();
    let told = kubelet.publish_badly(&kubelet.new_volume(&reference), Code::Unavailable);
    assert!(told.contains("blobs") && told.contains("another user"), "{told}");
    options = driver.kill();
    std::os::unix::fs::chown(&blobs, Some(0), None).expect("the owner again");
    // The owner of the parent directory can put anything in its place.
    std::os::unix::fs::chown(&options.state, Some(1234), None).expect("another owner");
    let driver = options.start();
    let told = kubelet.publish_badly(&kubelet.new_volume(&reference), Code::Unavailable);
    assert!(told.contains("another user"), "{told}");
    options = driver.kill();
    std::os::unix::fs::chown(&options.state, Some(0), None).expect("the owner again");
    let no_options = None::<&str>;
    nix::mount::mount(Some("other"), &blobs, Some("tmpfs"), MsFlags::empty(), no_options)
        .expect("a filesystem beneath");
    let driver = options.start();
    let told = kubelet.publish_badly(&kubelet.new_volume(&reference), Code::Unavailable);
    assert!(told.contains("blobs") && told.contains("another filesystem"), "{told}");
    options = driver.kill();
    nix::mount::umount2(&blobs, nix::mount::MntFlags::empty()).expect("unmounted");
    let _driver = options.start();
    kubelet.publish_well(&kubelet.new_volume(&reference));
}

#[test]
fn nothing_is_written_before_the_disk_is_mounted() {
    let mut state = PathBuf::new();
    let node = Node::start_with(|sandbox, options| {
        state = sandbox.folder("disk");
        options.state(&state).configuration("cache: {requireMountpoint: true, minFreePercent: 0}\n")
    });
    let reference = node.proxy.reference(&node.small_artifact().name);
    let volume = node.kubelet.new_volume(&reference);
    let told = node.kubelet.publish_badly(&volume, Code::Unavailable);
    assert!(told.contains("requireMountpoint"), "{told}");
    assert_eq!(fs::read_dir(&state).expect("a folder").count(), 0);
    node.kubelet.unpublish(&volume);
    drop(node);
    let sandbox = Sandbox::new();
    let disk = sandbox.tmpfs("disk", MsFlags::empty());
    let options = DriverOptions::new(&sandbox).state(&disk);
    let mut driver: Driver =
        options.configuration("cache: {requireMountpoint: true, minFreePercent: 0}\n").spawn();
    driver.wait_until_registered();
    let kubelet: Kubelet = driver.kubelet();
    let proxy = crate::support::Proxy::new(crate::support::registry());
    let reference = proxy.reference(&crate::support::small_artifact().name);
    kubelet.publish_well(&kubelet.new_volume(&reference));
}

#[test]
fn a_use_in_the_future_makes_nothing_immortal() {
    let (node, admin) = Admin::start(ROOMY);
    let (volume, _) = node.mount(&node.proxy.reference(&node.small_artifact().name));
    node.kubelet.unpublish(&volume);
    let Node { driver, .. } = node;
    let options = driver.kill();
    for tree in fs::read_dir(options.state.join("trees")).expect("trees").flatten() {
        let record = fs::File::open(tree.path().join("1/tree.json")).expect("a record");
        let future = std::time::SystemTime::now() + std::time::Duration::from_secs(1 << 30);
        record.set_modified(future).expect("a time set");
    }
    let _driver = options.start();
    wait_until("the record is gone", || admin.json(&["status"])["published"] == 0);
    admin.text(&["gc", "--target", "0"]);
    assert_eq!(admin.json(&["ls"])["artifacts"], json!([]));
}
