//! Three artifacts that are small on the wire and large in memory, in a cgroup of 512 MiB: the driver's largest
//! `RssAnon` while many volumes of each are published, and what is left of it ten seconds after the last unpublish.
#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    unused_imports,
    reason = "the tests' support, used in part"
)]
#![allow(
    clippy::pedantic,
    clippy::print_stdout,
    reason = "a bench prints, and support is linted with its tests"
)]

mod cgroup;
#[path = "../tests/e2e/support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cgroup::Confinement;
use nix::mount::{MntFlags, MsFlags, umount2};
use serde_json::json;
use support::{
    DriverOptions, FakeRegistry, Kubelet, OCI_CONFIG, OCI_MANIFEST, OCI_TAR_GZIP, Sandbox, Tar,
    Volume, digest, gzip, run, tool,
};

/// What the chart gives the driver.
const LIMIT: u64 = 512 << 20;
/// The disk, all of it allocated before: its memory is not the driver's.
const DISK: &str = "5G";
/// How long after the last unpublish the rest is looked at.
const AFTER: Duration = Duration::from_secs(10);

/// One of the artifacts.
struct Case {
    name: &'static str,
    volumes: usize,
    /// The attribute that makes each volume a tree of its own.
    attribute: &'static str,
    patterns: fn(usize) -> String,
    /// Puts it into the registry as `v1`; the digest of a blob that is held back until all volumes wait for it.
    put: fn(&FakeRegistry) -> Option<String>,
}

const CASES: [Case; 3] = [
    Case {
        name: "4 MiB of annotations, the layer held back",
        volumes: 16,
        attribute: "exclude",
        patterns: |number| format!("other{number}"),
        put: annotations,
    },
    Case {
        name: "990,000 empty files, different include",
        volumes: 4,
        attribute: "include",
        patterns: |number| format!("f/{}*,f/*{number}", number + 1),
        put: empty_files,
    },
    Case {
        name: "30,000 links of 4,000 bytes, different exclude",
        volumes: 8,
        attribute: "exclude",
        patterns: |number| format!("l/*{number}"),
        put: links,
    },
];

fn main() {
    println!("MiB of RssAnon in a cgroup of 512 MiB; state on ext4 in memory\n");
    println!(
        "{:<48} {:>8} {:>7} {:>13} {:>7} {:>6}",
        "artifact", "volumes", "peak", "10 s after", "s", "kills"
    );
    let chosen = std::env::var("BENCH_CASES").unwrap_or_default();
    for (number, case) in CASES.iter().enumerate() {
        if chosen.is_empty() || chosen.split(',').any(|wanted| wanted == number.to_string()) {
            measure(case);
        }
    }
}

fn measure(case: &Case) {
    let sandbox = Sandbox::new();
    let memory = sandbox.tmpfs("memory", MsFlags::empty());
    let image = memory.join("ext4");
    run(tool("fallocate").args(["-l", DISK]).arg(&image));
    // An inode for every 2 KiB: a million empty files are all inodes.
    run(tool("mkfs.ext4")
        .args(["-q", "-i", "2048", "-E", "lazy_itable_init=1,nodiscard"])
        .arg(&image));
    let disk = sandbox.folder("disk");
    run(tool("mount").args(["-o", "loop,noatime"]).arg(&image).arg(&disk));
    let state = disk.join("state");
    std::fs::create_dir(&state).expect("a folder");
    let registry = FakeRegistry::new();
    let held_back = (case.put)(&registry);
    let is_released = Arc::new(AtomicBool::new(held_back.is_none()));
    let released = Arc::clone(&is_released);
    registry.script(move |request| {
        let is_held_back = held_back.as_ref().is_some_and(|blob| request.path.contains(blob));
        while is_held_back && !released.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(10));
        }
        None
    });
    // Declared first, so that it goes last: a cgroup with a process in it cannot.
    let confinement;
    let options = DriverOptions::new(&sandbox).state(&state).configuration(
        "cache: {minFreePercent: 0, minFreeInodesPercent: 0}\npull: {memory: 192Mi}\n",
    );
    let driver = options.start();
    confinement = Confinement::of(driver.id(), LIMIT);
    let kubelet = driver.kubelet();
    let volumes: Vec<_> = (0..case.volumes)
        .map(|number| {
            let volume = kubelet.new_volume(&registry.reference("v1"));
            let volume = volume.attribute(case.attribute, &(case.patterns)(number));
            kubelet.prepare(&volume);
            volume
        })
        .collect();
    let (peak, process) = (Arc::new(AtomicU64::new(0)), driver.id());
    let (is_over, sampled) = (Arc::new(AtomicBool::new(false)), Arc::clone(&peak));
    let over = Arc::clone(&is_over);
    let sampler = std::thread::spawn(move || {
        while !over.load(Ordering::SeqCst) {
            sampled.fetch_max(anonymous_bytes(process), Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    let started = Instant::now();
    std::thread::scope(|scope| {
        for volume in &volumes {
            scope.spawn(|| publish(&kubelet, volume));
        }
        // Volumes that wait for a layer have done all else long before.
        std::thread::sleep(Duration::from_secs(if is_released.load(Ordering::SeqCst) {
            0
        } else {
            15
        }));
        is_released.store(true, Ordering::SeqCst);
    });
    let took = started.elapsed();
    volumes.iter().for_each(|volume| kubelet.unpublish(volume));
    std::thread::sleep(AFTER);
    is_over.store(true, Ordering::SeqCst);
    sampler.join().expect("a sampler");
    println!(
        "{:<48} {:>8} {:>7} {:>13} {:>7.1} {:>6}",
        case.name,
        case.volumes,
        peak.load(Ordering::SeqCst) >> 20,
        anonymous_bytes(process) >> 20,
        took.as_secs_f64(),
        confinement.kills(),
    );
    drop(driver);
    let _ = umount2(&disk, MntFlags::MNT_DETACH);
}

/// As the kubelet does, again after each deadline.
fn publish(kubelet: &Kubelet, volume: &Volume) {
    while let Err(status) = kubelet.publish_request(volume.request.clone()) {
        assert_eq!(status.code(), tonic::Code::Aborted, "{status}");
    }
}

fn anonymous_bytes(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kibibytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
    kibibytes.unwrap_or(0_u64) * 1024
}

fn annotations(registry: &FakeRegistry) -> Option<String> {
    let layer = b"a layer that comes late".to_vec();
    let blob = registry.put_blob(layer.clone());
    let annotations: Vec<_> = (0..380_000).map(|n| format!(r#""{n:x}":"""#)).collect();
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","artifactType":"a/b","config":{{"mediaType":"application/vnd.oci.empty.v1+json","digest":"{}","size":2}},"layers":[{{"mediaType":"a/b","digest":"{blob}","size":{},"annotations":{{"org.opencontainers.image.title":"file",{}}}}}]}}"#,
        registry.put_blob("{}"),
        layer.len(),
        annotations.join(","),
    );
    registry.put_manifest("v1", OCI_MANIFEST, manifest);
    Some(blob)
}

fn empty_files(registry: &FakeRegistry) -> Option<String> {
    put_image(
        registry,
        (0..990_000).fold(Tar::new(), |tar, n| tar.file(&format!("f/{n}"), 0o644, "")),
    )
}

fn links(registry: &FakeRegistry) -> Option<String> {
    let target = "t/".repeat(2000);
    put_image(
        registry,
        (0..30_000).fold(Tar::new(), |tar, n| tar.symbolic_link(&format!("l/{n}"), &target)),
    )
}

fn put_image(registry: &FakeRegistry, tar: Tar) -> Option<String> {
    let config = br#"{"architecture":"amd64","os":"linux"}"#;
    let descriptor = |kind: &str, bytes: Vec<u8>| {
        let size = bytes.len();
        json!({"mediaType": kind, "digest": registry.put_blob(bytes), "size": size})
    };
    registry.put_json(
        "v1",
        &json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor(OCI_CONFIG, config.to_vec()),
            "layers": [descriptor(OCI_TAR_GZIP, gzip(&tar.finish()))],
        }),
    );
    None
}
