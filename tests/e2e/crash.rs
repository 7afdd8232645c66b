//! Tests the real driver, stopped at every named point at which names and mounts are created or removed.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use serde_json::json;
use sys::fault::POINTS;

use crate::support::{
    Admin, Driver, DriverOptions, Image, Kubelet, Layer, Manifest, OCI_TAR_GZIP, Proxy, Sandbox,
    Tar, Volume, gzip, mounts_under, noise, registry, unique,
};

/// Small enough that each new artifact evicts an old one.
const SMALL: &str = "cache: {maxBytes: 3Mi, minFreePercent: 0, minFreeInodesPercent: 0, \
                     highThresholdPercent: 100, lowThresholdPercent: 100, minimumAge: 0s}\n";

/// A node that may die at any time.
struct CrashNode {
    options: DriverOptions,
    admin: Admin,
    kubelet: Kubelet,
    artifacts: Vec<ExpectedArtifact>,
    _proxy: Proxy,
    _sandbox: Sandbox,
}

/// A published artifact, and its expected content.
struct ExpectedArtifact {
    reference: String,
    files: Vec<(&'static str, Vec<u8>)>,
}

impl CrashNode {
    #[track_caller]
    fn new() -> Self {
        let sandbox = Sandbox::new();
        let endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
        let options = DriverOptions::new(&sandbox)
            .configuration(SMALL)
            .argument(&format!("--admin-endpoint={endpoint}"));
        fs::create_dir_all(&options.kubelet).expect("the kubelet's folder");
        let kubelet = Kubelet::new(&options.kubelet, &options.socket);
        let proxy = Proxy::new(registry());
        let artifacts = artifacts(&proxy);
        let admin = Admin::at(&endpoint);
        Self { options, admin, kubelet, artifacts, _proxy: proxy, _sandbox: sandbox }
    }

    /// Starts a driver that may end at once. Returns `None` if it does.
    fn spawn(&self, fault: Option<&str>) -> Option<Driver> {
        let options = match fault {
            Some(fault) => self.options.clone().environment("CSI_OCI_FAULT", fault),
            None => self.options.clone(),
        };
        let mut driver = options.spawn();
        let socket = driver.options.registration_socket();
        loop {
            if !driver.is_running() {
                return None;
            }
            if crate::support::accepts(&socket) {
                return Some(driver);
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// Runs every operation of a node, until the driver ends.
    fn live(&self) -> Vec<Volume> {
        let volumes: Vec<_> = self
            .artifacts
            .iter()
            .map(|artifact| self.kubelet.new_volume(&artifact.reference))
            .collect();
        for volume in &volumes {
            self.kubelet.prepare(volume);
            let _ = self.kubelet.publish_request(volume.request.clone());
        }
        // The same volume again, with the other form of the mount.
        let mut other_form = volumes[2].request.clone();
        other_form.readonly = true;
        let _ = self.kubelet.publish_request(other_form);
        let first = &volumes[0];
        let _ =
            self.kubelet.unpublish_request(&first.request.volume_id, &first.request.target_path);
        let _ = self.admin.ask(&["pin", &self.artifacts[1].reference]);
        let _ = self.admin.ask(&["gc", "--target", "0"]);
        let _ = self.admin.ask(&["rm", &self.artifacts[2].reference]);
        volumes
    }

    /// Checks the invariants after any failure.
    #[track_caller]
    fn check(&self, driver: &Driver, volumes: &[Volume]) {
        let state = driver.state();
        assert_eq!(entries(&state.join("staging")), BTreeSet::new(), "staging is swept");
        let verified = self.admin.json(&["verify"]);
        assert_eq!(verified["findings"], json!([]), "a name means verified content");
        for (volume, artifact) in volumes.iter().zip(self.artifacts.iter().cycle()) {
            if mounts_under(volume.target()).is_empty() {
                continue;
            }
            artifact.check(volume.target());
        }
        // All operations again, which now succeed.
        for (volume, artifact) in volumes.iter().zip(self.artifacts.iter().cycle()) {
            self.kubelet.publish_well(volume);
            artifact.check(volume.target());
            self.kubelet.unpublish(volume);
        }
        assert_eq!(mounts_under(&self.options.kubelet), [], "a mount is leaked");
        crate::support::wait_until("no record is left", || {
            entries(&state.join("publications")).is_empty()
        });
        let _ = self.admin.ask(&["unpin", &self.artifacts[1].reference]);
        for folder in ["files", "layers", "trees", "staging", "partial"] {
            // A reader may release its lease a moment after its response.
            crate::support::wait_until(&format!("nothing is left in {folder}"), || {
                self.admin.text(&["gc", "--target", "0"]);
                entries(&state.join(folder)).is_empty()
            });
        }
    }
}

impl ExpectedArtifact {
    #[track_caller]
    fn check(&self, target: &Path) {
        for (name, content) in &self.files {
            let read = fs::read(target.join(name)).expect("a file of the volume");
            assert!(read == *content, "{name} is not what was pushed");
        }
    }
}

/// Pushes a file, an image, and one more file that needs an eviction.
fn artifacts(proxy: &Proxy) -> Vec<ExpectedArtifact> {
    let file = |seed: u64| {
        let repository = unique("file");
        let content = noise(1 << 20, seed);
        Manifest::artifact([Layer::titled("file", content.clone())]).push(
            registry(),
            &repository,
            "v1",
        );
        let reference = proxy.reference(&format!("{repository}:v1"));
        ExpectedArtifact { reference, files: vec![("file", content)] }
    };
    let repository = unique("image");
    let (one, many) = (noise(300_000, 21), noise(1000, 22));
    let mut archive = Tar::new().folder("etc", 0o755).file("etc/one", 0o644, &one);
    for number in 0..20 {
        archive = archive.file(&format!("etc/{number}"), 0o644, &many);
    }
    let archive = archive.finish();
    Image::new().packed_layer(OCI_TAR_GZIP, gzip(&archive), &archive).push(
        registry(),
        &repository,
        "v1",
    );
    let image = ExpectedArtifact {
        reference: proxy.reference(&format!("{repository}:v1")),
        files: vec![("etc/one", one), ("etc/7", many)],
    };
    vec![file(11), image, file(12)]
}

fn entries(folder: &Path) -> BTreeSet<PathBuf> {
    fs::read_dir(folder).expect("a folder").flatten().map(|entry| entry.path()).collect()
}

/// Tests every point of this test's share, with this fault.
#[track_caller]
fn at_each_point(share: usize, of: usize, action: &str) {
    // `follow` and `recovery` pass the others.
    let is_passed =
        |point: &&&str| !point.starts_with("follow.") && !point.starts_with("reconcile.");
    let points = POINTS.iter().filter(is_passed);
    for point in points.skip(share).step_by(of) {
        let crash_node = CrashNode::new();
        let mut volumes = Vec::new();
        if let Some(mut driver) = crash_node.spawn(Some(&format!("{point}:{action}"))) {
            volumes = crash_node.live();
            if action == "abort" {
                // The caller may see the failure before the kernel has removed the process.
                let ended = format!("the driver comes by {point} and ends");
                crate::support::wait_until(&ended, || !driver.is_running());
            }
            driver.kill();
        }
        let mut driver = crash_node.options.spawn();
        driver.wait_until_registered();
        crash_node.check(&driver, &volumes);
    }
}

macro_rules! shares {
    ($($name:ident: $share:literal, $action:literal;)*) => {
        $(#[test]
        fn $name() {
            at_each_point($share, 4, $action);
        })*
    };
}

shares! {
    a_power_cut_at_any_point_spoils_nothing_1: 0, "abort";
    a_power_cut_at_any_point_spoils_nothing_2: 1, "abort";
    a_power_cut_at_any_point_spoils_nothing_3: 2, "abort";
    a_power_cut_at_any_point_spoils_nothing_4: 3, "abort";
    an_io_error_at_any_point_spoils_nothing_1: 0, "error:5";
    an_io_error_at_any_point_spoils_nothing_2: 1, "error:5";
    an_io_error_at_any_point_spoils_nothing_3: 2, "error:5";
    an_io_error_at_any_point_spoils_nothing_4: 3, "error:5";
    a_full_disk_at_any_point_spoils_nothing_1: 0, "error:28";
    a_full_disk_at_any_point_spoils_nothing_2: 1, "error:28";
    a_full_disk_at_any_point_spoils_nothing_3: 2, "error:28";
    a_full_disk_at_any_point_spoils_nothing_4: 3, "error:28";
}

impl CrashNode {
    /// Starts a driver that pauses at a point. Returns it, and the file that resumes it.
    #[track_caller]
    fn paused_at(&self, point: &str) -> (Driver, PathBuf) {
        let go = self.options.state.with_file_name("go");
        let driver = self.spawn(Some(&format!("{point}:pause:{}", go.display())));
        (driver.expect("a driver"), go)
    }
}

/// Waits until the driver is at its point.
#[track_caller]
fn wait_for_the_point(driver: &Driver, point: &str) {
    let told = format!("\"point\":\"{point}\"");
    crate::support::wait_until("the driver comes by the point", || driver.log().contains(&told));
}

/// Publishes the image by a driver that pauses at a point. Meanwhile runs `look` on the state, and removes all that may
/// be removed: the publish's content may not.
#[track_caller]
fn publish_meanwhile(crash_node: &CrashNode, point: &str, look: impl FnOnce(&Path)) {
    let artifact = &crash_node.artifacts[1];
    let (driver, go) = crash_node.paused_at(point);
    let volume = crash_node.kubelet.new_volume(&artifact.reference);
    std::thread::scope(|scope| {
        let publish = scope.spawn(|| crash_node.kubelet.publish_well(&volume));
        wait_for_the_point(&driver, point);
        look(driver.state());
        crash_node.admin.text(&["gc", "--target", "0"]);
        fs::write(&go, "").expect("written");
        publish.join().expect("published");
    });
    artifact.check(volume.target());
    crash_node.kubelet.unpublish(&volume);
    crash_node.check(&driver, &[]);
}

#[test]
fn what_is_about_to_be_shown_is_not_evicted() {
    for point in ["publish.acquired", "publish.recorded", "publish.folder"] {
        let crash_node = CrashNode::new();
        publish_meanwhile(&crash_node, point, |_| ());
    }
}

#[test]
fn who_asks_for_what_is_being_evicted_gets_all_of_it() {
    for point in ["gc.planned", "gc.condemned", "gc.renamed", "gc.removed"] {
        let crash_node = CrashNode::new();
        let artifact = &crash_node.artifacts[1];
        let (driver, go) = crash_node.paused_at(point);
        let first = crash_node.kubelet.new_volume(&artifact.reference);
        crash_node.kubelet.publish_well(&first);
        crash_node.kubelet.unpublish(&first);
        let volume = crash_node.kubelet.new_volume(&artifact.reference);
        std::thread::scope(|scope| {
            let collect = scope.spawn(|| crash_node.admin.text(&["gc", "--target", "0"]));
            wait_for_the_point(&driver, point);
            let publish = scope.spawn(|| crash_node.kubelet.publish_well(&volume));
            // Whether the publish waits by now or comes too late for that, it gets all of its content.
            fs::write(&go, "").expect("written");
            collect.join().expect("collected");
            publish.join().expect("published");
        });
        artifact.check(volume.target());
        crash_node.kubelet.unpublish(&volume);
        crash_node.check(&driver, &[]);
    }
}

#[test]
fn a_tree_is_built_of_layers_without_names_and_named_after_them() {
    publish_meanwhile(&CrashNode::new(), "commit.staged", |state| {
        let is_built = |staged: &PathBuf| staged.join("root/etc/one").exists();
        crate::support::wait_until("the tree is linked beside", || {
            entries(&state.join("staging")).iter().any(is_built)
        });
        for folder in ["layers", "trees"] {
            assert_eq!(entries(&state.join(folder)), BTreeSet::new(), "{folder}");
        }
    });
}

/// `make crash ROUNDS=200` runs longer.
#[test]
fn kills_at_random_moments_under_load_spoil_nothing() {
    let rounds = std::env::var("CRASH_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(6);
    let crash_node = CrashNode::new();
    let mut volumes: Vec<Volume> = Vec::new();
    for round in 0..rounds {
        let driver = crash_node.spawn(None).expect("a driver");
        let stop = AtomicBool::new(false);
        let wait = noise(2, round)[0];
        std::thread::scope(|scope| {
            let (crash_node, stop) = (&crash_node, &stop);
            let workers: Vec<_> =
                (0..3).map(|worker| scope.spawn(move || load(crash_node, stop, worker))).collect();
            // The random moment is the test's point: no state can be waited for.
            std::thread::sleep(std::time::Duration::from_millis(u64::from(wait) * 2));
            driver.terminate_hard();
            stop.store(true, Ordering::SeqCst);
            for worker in workers {
                volumes.extend(worker.join().expect("a worker"));
            }
        });
        driver.kill();
        let driver = crash_node.spawn(None).expect("a driver");
        for volume in volumes.drain(..) {
            let reference = &volume.request.volume_context["reference"];
            let artifact =
                crash_node.artifacts.iter().find(|artifact| artifact.reference == *reference);
            if !mounts_under(volume.target()).is_empty() {
                artifact.expect("one of ours").check(volume.target());
            }
            crash_node.kubelet.unpublish(&volume);
        }
        let fresh: Vec<_> = crash_node
            .artifacts
            .iter()
            .map(|artifact| crash_node.kubelet.new_volume(&artifact.reference))
            .collect();
        crash_node.check(&driver, &fresh);
        driver.kill();
    }
}

/// Publishes and unpublishes until the driver is gone. Returns the volumes that it has not unpublished.
fn load(crash_node: &CrashNode, stop: &AtomicBool, worker: usize) -> Vec<Volume> {
    let mut left = Vec::new();
    for number in worker.. {
        if stop.load(Ordering::SeqCst) {
            return left;
        }
        let artifact = &crash_node.artifacts[number % crash_node.artifacts.len()];
        let volume = crash_node.kubelet.new_volume(&artifact.reference);
        crash_node.kubelet.prepare(&volume);
        let published = crash_node.kubelet.publish_request(volume.request.clone());
        if published.is_ok() {
            artifact.check(volume.target());
        }
        let request = &volume.request;
        if crash_node.kubelet.unpublish_request(&request.volume_id, &request.target_path).is_err() {
            left.push(volume);
            continue;
        }
        let _ = fs::remove_dir_all(volume.parent());
    }
    left
}
