//! Measures a store of 10, 1,000 and 10,000 artifacts: opening it, publishing from it, and evicting everything.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::figures::{milliseconds, quantile};
use crate::common::support::{
    Admin, Driver, DriverOptions, Kubelet, Proxy, Sandbox, registry, small_artifact,
};
use oci::{Digest, Platform, Reference};
use store::resolution_records::Resolution;
use store::trees::{Objects, TreeRecord, View};
use store::{FileKey, Store, StoreOptions, TreeKey};
use unpack::layer_merge::Merger;
use unpack::layer_rule::FileRule;
use unpack::{Limits, Permissions, RelativePath, Selection};

const ARTIFACTS: [usize; 3] = [10, 1_000, 10_000];
const PUBLISHES: usize = 500;
/// The number of runs; each figure is their median.
const STARTS: usize = 5;
/// The number of operations of each kind, on references of their own.
const OPERATIONS: u32 = 10;

const CONFIGURATION: &str = "cache: {minFreePercent: 0, minFreeInodesPercent: 0, highThresholdPercent: 100, \
                             lowThresholdPercent: 100, minimumAge: 0s}\n";

pub fn store() {
    println!(
        "milliseconds; state on ext4 in memory, medians of {STARTS} starts and {PUBLISHES} publishes\n"
    );
    println!(
        "{:>10} {:>14} {:>16} {:>16} {:>14}",
        "artifacts", "read all sizes", "start to socket", "cached publish", "evict all"
    );
    for artifacts in ARTIFACTS {
        measure(artifacts);
    }
}

fn measure(artifacts: usize) {
    let sandbox = Sandbox::new();
    // An inode for every 4 KiB: small artifacts are all inodes.
    let disk = crate::common::disk::ext4_in_memory(&sandbox, 2 << 30, &["-i", "4096"]);
    let state = disk.join("state");
    std::fs::create_dir(&state).expect("a folder");
    fill(&state, artifacts);

    let endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
    let options = DriverOptions::new(&sandbox)
        .state(&state)
        .configuration(CONFIGURATION)
        .argument(&format!("--admin-endpoint={endpoint}"));
    let admin = Admin::at(&endpoint);
    let mut opens = Vec::new();
    let mut starts = Vec::new();
    for _ in 0..STARTS {
        // Simulates a boot: nothing of the disk is in memory.
        std::fs::write("/proc/sys/vm/drop_caches", "3").expect("root");
        let started = Instant::now();
        let store = Store::open(&state, StoreOptions::default()).expect("a store");
        store.inventory().load().expect("sizes");
        opens.push(started.elapsed());
        drop(store);
        std::fs::write("/proc/sys/vm/drop_caches", "3").expect("root");
        let started = Instant::now();
        let driver = options.start();
        starts.push(started.elapsed());
        driver.kill();
    }
    let driver = options.start();
    let kubelet = Kubelet::new(&driver.options.kubelet, &driver.options.socket);
    let proxy = Proxy::new(registry());
    let reference = proxy.reference(&small_artifact().name);
    let first = kubelet.new_volume(&reference);
    kubelet.publish_well(&first);
    // Sizes are read in the background after the start. This command waits for them.
    admin.json(&["status"]);
    let mut publishes = Vec::new();
    for _ in 0..PUBLISHES {
        let volume = kubelet.new_volume(&reference);
        kubelet.prepare(&volume);
        let started = Instant::now();
        kubelet.publish_request(volume.request.clone()).expect("published");
        publishes.push(started.elapsed());
        kubelet.unpublish(&volume);
    }
    let operations = cpu_of_operations(&driver, &admin);
    let started = Instant::now();
    let collected = admin.json(&["gc", "--target", "0"]);
    let evicted = started.elapsed();
    let trees = collected["victims"].as_array().expect("a list");
    let trees = trees.iter().filter(|victim| !victim["digest"].is_null()).count();
    assert_eq!(trees + OPERATIONS as usize, artifacts, "all but what is shown, and was removed");
    println!(
        "{artifacts:>10} {:>14} {:>16} {:>16} {:>14}",
        milliseconds(quantile(&mut opens, 0.5)),
        milliseconds(quantile(&mut starts, 0.5)),
        milliseconds(quantile(&mut publishes, 0.5)),
        milliseconds(evicted)
    );
    for (operation, cpu) in operations {
        println!("{:>10} {operation:>14} {:>16} of CPU", "", milliseconds(cpu));
    }
    kubelet.unpublish(&first);
}

/// Returns the driver's average processor time for one operation on one reference.
fn cpu_of_operations(driver: &Driver, admin: &Admin) -> Vec<(&'static str, Duration)> {
    let operations: [(&str, &[&str]); 4] =
        [("inspect", &["inspect"]), ("pin", &["pin"]), ("unpin", &["unpin"]), ("rm", &["rm"])];
    operations
        .into_iter()
        .map(|(name, command)| {
            let before = cpu_time(driver.id());
            for number in 0..OPERATIONS {
                let reference = format!("r.io/artifact-{number}:v1");
                admin.json(&[command, &[reference.as_str()]].concat());
            }
            (name, (cpu_time(driver.id()) - before) / OPERATIONS)
        })
        .collect()
}

/// Returns the processor time of all threads of a process.
fn cpu_time(process: u32) -> Duration {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("a process");
    let nanoseconds = tasks
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok())
        .filter_map(|text| text.split_whitespace().next()?.parse::<u64>().ok())
        .sum();
    Duration::from_nanos(nanoseconds)
}

/// Creates artifacts of one file each in the store itself.
fn fill(state: &Path, artifacts: usize) {
    let store = Store::open(state, StoreOptions::default()).expect("a store");
    let (limits, platform) = (Limits::default(), Platform::of_this_node());
    for number in 0..artifacts {
        let content = format!("content of artifact {number}");
        let permissions = Permissions { mode: 0o444, uid: 0, gid: 0 };
        let key = FileKey { digest: Digest::of(content.as_bytes()), permissions };
        let file = store.files().commit_inline(key, content.as_bytes()).expect("a file");
        let everything = Selection::default();
        let mut merger = Merger::new(&limits, &everything);
        let path = RelativePath::parse(b"file", &limits).expect("a path");
        let rule = FileRule { path, recorded: None };
        merger.file(0, &rule, key.digest, content.len() as u64, permissions).expect("a file");
        let plan = merger.finish().expect("a plan");
        let mut objects = Objects::default();
        objects.files.insert(key, file.clone());
        let manifest_bytes = format!("{{\"manifest\": {number}}}").into_bytes();
        let manifest = Digest::of(&manifest_bytes);
        store.documents().put(manifest, &manifest_bytes).expect("a manifest");
        let reference: Reference = format!("r.io/artifact-{number}:v1").parse().expect("valid");
        let resolution = Resolution {
            reference: reference.to_string(),
            resolved: manifest,
            manifest,
            platform: None,
        };
        store.resolutions().put(&reference, &platform, &resolution).expect("a resolution");
        let record = TreeRecord {
            manifest,
            kind: "application/vnd.bench".into(),
            bytes: content.len() as u64,
            inodes: 2,
            compressed_bytes: content.len() as u64,
            own_inodes: 1,
            own_bytes: 0,
            view: View::default(),
            parts: Vec::new(),
        };
        let tree = TreeKey::new(manifest, "", "Readable", "");
        let built = store.trees().build(&plan, &objects).expect("a tree");
        store.trees().commit(tree, record, built, &[], &[file]).expect("a tree");
    }
}
