//! Tests the sizes that the cache reports, and that nothing remains when everything is removed.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::{
    Admin, Driver, DriverOptions, FakeRegistry, Image, Kubelet, Layer, Manifest, Node, Sandbox,
    Tar, run, tool, unique, wait_until,
};

/// A configuration in which only an administrator removes content.
const QUIET: &str = "cache: {minFreePercent: 0, minFreeInodesPercent: 0, highThresholdPercent: 100, \
                     lowThresholdPercent: 100, minimumAge: 0s}\n";

const ARTIFACTS: usize = 400;

/// Returns the size of a directory as `du` reports it, in bytes.
fn disk_usage(folder: &Path) -> u64 {
    let told = run(tool("du").args(["--summarize", "--block-size=1"]).arg(folder));
    let bytes = told.split_whitespace().next().expect("a number");
    bytes.parse().expect("a number")
}

fn cache_bytes(admin: &Admin) -> u64 {
    admin.json(&["status"])["cacheBytes"].as_u64().expect("a number")
}

#[track_caller]
fn assert_agrees_with_du(admin: &Admin, state: &Path) {
    let (counted, taken) = (cache_bytes(admin), disk_usage(state));
    assert!(counted.abs_diff(taken) * 20 <= taken, "{counted} counted, {taken} by du");
}

/// Returns all names in a directory of the state, at any depth.
fn everything_in(folder: &Path) -> BTreeSet<String> {
    let found = run(tool("find").arg(folder).args(["-mindepth", "1"]));
    found.lines().map(str::to_owned).collect()
}

#[test]
fn four_hundred_artifacts_of_a_few_bytes_are_counted_as_du_counts_them_and_leave_nothing() {
    // The second filesystem keeps small directories in their inodes.
    for filesystem in ["ext4", "xfs"] {
        are_counted_and_leave_nothing_on(filesystem);
    }
}

fn are_counted_and_leave_nothing_on(filesystem: &str) {
    let mut endpoint = String::new();
    let node = Node::start_with(|sandbox, options| {
        endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
        let disk = sandbox.filesystem_of(512 << 20, filesystem, "disk", "rw");
        options
            .state(&disk.join("state"))
            .configuration(QUIET)
            .argument(&format!("--admin-endpoint={endpoint}"))
    });
    let admin = Admin::at(&endpoint);
    let registry = FakeRegistry::new();
    for number in 0..ARTIFACTS {
        let content = format!("content {number}");
        let manifest = Manifest::artifact([Layer::titled("file", content)]);
        manifest.push(&registry, "any", &format!("v{number}"));
    }
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::SeqCst);
                    if number >= ARTIFACTS {
                        return;
                    }
                    let reference = registry.reference(&format!("v{number}"));
                    let volume = node.kubelet.new_volume(&reference);
                    node.kubelet.publish_well(&volume);
                    node.kubelet.unpublish(&volume);
                }
            });
        }
    });
    let state = node.driver.state().to_owned();
    assert_eq!(admin.json(&["status"])["cacheObjects"], 2 * ARTIFACTS);
    assert_agrees_with_du(&admin, &state);
    let Node { driver, kubelet, proxy, sandbox } = node;
    let node = Node { driver: driver.restart(), kubelet, proxy, sandbox };
    // The values of the next process, from the disk.
    assert_agrees_with_du(&admin, &state);
    admin.text(&["gc", "--target", "0"]);
    for folder in ["files", "layers", "trees", "blobs", "resolutions", "staging", "partial"] {
        assert_eq!(everything_in(&state.join(folder)), BTreeSet::new(), "{folder}");
    }
    let status = admin.json(&["status"]);
    assert_eq!((&status["cacheObjects"], &status["cacheBytes"]), (&0.into(), &0.into()));
    drop(node);
}

/// A node that was killed at a system call of a removal, and its leftovers.
struct KilledNode {
    options: DriverOptions,
    admin: Admin,
    _sandbox: Sandbox,
}

/// Makes the kernel end the driver at its `count`th call of this name.
#[track_caller]
fn kill_at(driver: &Driver, call: &str, count: usize) -> Child {
    let inject = format!("inject={call}:signal=KILL:when={count}");
    let mut strace = tool("strace")
        .args(["-f", "-e", &format!("trace={call}"), "-e", &inject, "-o", "/dev/null"])
        .args(["-p", &driver.id().to_string()])
        .stderr(Stdio::piped())
        .spawn()
        .expect("strace");
    let mut told = BufReader::new(strace.stderr.take().expect("a pipe")).lines();
    let attached = told.by_ref().map_while(Result::ok).find(|line| line.contains("attached"));
    attached.expect("strace attaches");
    // strace prints a line for each new thread, and ends if its output is not read.
    std::thread::spawn(move || told.map_while(Result::ok).for_each(drop));
    strace
}

impl KilledNode {
    /// Creates a store with an unused file and image, and ends a collection at this call.
    #[track_caller]
    fn at(call: &str, count: usize) -> Self {
        let sandbox = Sandbox::new();
        let endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
        let options = DriverOptions::new(&sandbox)
            .configuration(QUIET)
            .argument(&format!("--admin-endpoint={endpoint}"));
        let (admin, registry) = (Admin::at(&endpoint), FakeRegistry::new());
        Manifest::artifact([Layer::titled("file", unique("file"))]).push(&registry, "any", "v1");
        let archive = Tar::new().folder("etc", 0o755).file("etc/one", 0o644, unique("one"));
        Image::new().layer(archive.finish()).push(&registry, "any", "v2");
        let mut driver = options.start();
        let kubelet = Kubelet::new(&options.kubelet, &options.socket);
        for tag in ["v1", "v2"] {
            let volume = kubelet.new_volume(&registry.reference(tag));
            kubelet.publish_well(&volume);
            kubelet.unpublish(&volume);
        }
        wait_until("nothing is published", || admin.json(&["status"])["published"] == 0);
        let mut strace = kill_at(&driver, call, count);
        let collected = admin.ask(&["gc", "--target", "0"]);
        if !collected.status.success() {
            wait_until("the driver is killed", || !driver.is_running());
        }
        driver.kill();
        strace.wait().expect("strace ends with the driver");
        Self { options, admin, _sandbox: sandbox }
    }

    #[track_caller]
    fn leaves_nothing(&self, step: &str) {
        let driver = self.options.start();
        wait_until(&format!("nothing is left after {step}"), || {
            self.admin.text(&["gc", "--target", "0"]);
            ["files", "layers", "trees", "blobs", "staging"]
                .iter()
                .all(|folder| everything_in(&driver.state().join(folder)).is_empty())
        });
        assert_eq!(self.admin.json(&["status"])["cacheObjects"], 0);
    }
}

#[test]
fn a_crash_at_any_step_of_a_removal_leaves_no_object_and_no_empty_folder() {
    for (call, counts) in [("rmdir", 1..=6), ("rename", 1..=3), ("unlink", 1..=6)] {
        for count in counts {
            KilledNode::at(call, count).leaves_nothing(&format!("{call} {count}"));
        }
    }
}
