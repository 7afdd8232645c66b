//! Measures three artifacts that are small on the wire and large in memory, in a cgroup of 512 MiB: the driver's peak of
//! anonymous memory while many volumes of each are published, and its `RssAnon` ten seconds after the last unpublish.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::cgroup::Confinement;
use crate::common::disk;
use crate::common::support::hostile::{empty_files, put_annotated_and_held_back, with_long_links};
use crate::common::support::{
    DriverOptions, FakeRegistry, Gate, Image, Kubelet, PeakMemory, Sandbox, Tar, Volume,
    anonymous_bytes,
};
use nix::mount::{MntFlags, umount2};

/// The memory limit of the chart.
const LIMIT: u64 = 512 << 20;
const DISK_BYTES: u64 = 5 << 30;
/// The time that the driver has to give memory back.
const SETTLE: Duration = Duration::from_secs(10);

/// One of the artifacts.
struct Case {
    name: &'static str,
    volumes: usize,
    /// The attribute that makes each volume a tree of its own.
    attribute: &'static str,
    patterns: fn(usize) -> String,
    /// Puts the artifact into the registry as `v1`. Returns the gate of a layer that is held back, if there is one.
    put: fn(&FakeRegistry) -> Option<Arc<Gate>>,
}

const CASES: [Case; 3] = [
    Case {
        name: "4 MiB of annotations, the layer held back",
        volumes: 16,
        attribute: "exclude",
        patterns: |number| format!("other{number}"),
        put: |registry| {
            Some(put_annotated_and_held_back(registry, "v1", b"a layer that comes late"))
        },
    },
    Case {
        name: "990,000 empty files, different include",
        volumes: 4,
        attribute: "include",
        patterns: |number| format!("f/{}*,f/*{number}", number + 1),
        put: |registry| put_image(registry, empty_files(990_000)),
    },
    Case {
        name: "30,000 links of 4,000 bytes, different exclude",
        volumes: 8,
        attribute: "exclude",
        patterns: |number| format!("l/*{number}"),
        put: |registry| put_image(registry, with_long_links(Tar::new(), 30_000)),
    },
];

pub fn memory() {
    println!("MiB of anonymous memory in a cgroup of 512 MiB; state on ext4 in memory\n");
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
    // An inode for every 2 KiB: a million empty files are all inodes.
    let options = ["-i", "2048", "-E", "lazy_itable_init=1,nodiscard"];
    let disk = disk::allocated_ext4_in_memory(&sandbox, DISK_BYTES, &options);
    let state = disk.join("state");
    std::fs::create_dir(&state).expect("a folder");
    let registry = FakeRegistry::new();
    let gate = (case.put)(&registry);
    // Declared first, so that it is dropped last: the kernel keeps a cgroup that has a process.
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
    let peak = PeakMemory::reset(driver.id());
    let started = Instant::now();
    if let Some(gate) = gate {
        for_each(&volumes, |volume| kubelet.publish_until_bytes_are_awaited(volume));
        gate.open();
    }
    for_each(&volumes, |volume| publish(&kubelet, volume));
    let took = started.elapsed();
    volumes.iter().for_each(|volume| kubelet.unpublish(volume));
    std::thread::sleep(SETTLE);
    println!(
        "{:<48} {:>8} {:>7} {:>13} {:>7.1} {:>6}",
        case.name,
        case.volumes,
        peak.anonymous_bytes() >> 20,
        anonymous_bytes(driver.id()) >> 20,
        took.as_secs_f64(),
        confinement.kills(),
    );
    drop(driver);
    let _ = umount2(&disk, MntFlags::MNT_DETACH);
}

/// Runs `work` for all volumes at once.
fn for_each(volumes: &[Volume], work: impl Fn(&Volume) + Sync) {
    std::thread::scope(|scope| {
        for volume in volumes {
            scope.spawn(|| work(volume));
        }
    });
}

/// Publishes as the kubelet does, again after each deadline.
fn publish(kubelet: &Kubelet, volume: &Volume) {
    while let Err(status) = kubelet.publish_request(volume.request.clone()) {
        assert_eq!(status.code(), tonic::Code::Aborted, "{status}");
    }
}

fn put_image(registry: &FakeRegistry, archive: Tar) -> Option<Arc<Gate>> {
    Image::new().layer(archive.finish()).push(registry, "hostile", "v1");
    None
}
