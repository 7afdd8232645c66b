//! Measures the effect of warming on pods that start meanwhile: publishes from the cache and of small new artifacts, on
//! an idle node and while it warms 20 artifacts. Rounds alternate, so that other load on the machine affects both.
//!
//! The state is on an ext4 in memory. Warming uses a registry of its own, whose threads have low priority like the
//! driver's: in reality it would be another machine.

use std::{
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use crate::common::figures::{milliseconds, quantile};
use crate::common::support::{
    Admin, Image, Layer, Manifest, Node, OCI_TAR_GZIP, Registry, Tar, gzip, noise, own_registry,
    registry, run, tool, unique,
};

const CONFIGURATION: &str = "cache: {minFreePercent: 0, minFreeInodesPercent: 0, highThresholdPercent: 100, \
                             lowThresholdPercent: 100, minimumAge: 0s}\n";
const DISK_BYTES: u64 = 4 << 30;
const ROUNDS: usize = 10;
const WARMED: usize = 20;
const FILE_BYTES: usize = 64 << 20;
const FILES: usize = 2000;
/// The number of publishes of each round, while warming lasts.
const HITS: usize = 120;
const MISSES: usize = 24;

/// The times of one kind of publish, without and with warming.
#[derive(Default)]
struct Times {
    quiet: Vec<Duration>,
    beside: Vec<Duration>,
}

pub fn warming() {
    let mut endpoint = String::new();
    let node = Node::start_with(|sandbox, options| {
        let disk = crate::common::disk::ext4_in_memory(
            sandbox,
            DISK_BYTES,
            &["-E", "lazy_itable_init=1,nodiscard"],
        );
        endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
        let state = disk.join("state");
        std::fs::create_dir(&state).expect("a folder");
        options
            .state(&state)
            .configuration(CONFIGURATION)
            .argument("--log-level=info")
            .argument(&format!("--admin-endpoint={endpoint}"))
    });
    let admin = Admin::at(&endpoint);
    let elsewhere = standing_back(own_registry);
    let list = artifacts(&elsewhere);
    let cached = small();
    let (_shown, _) = node.mount(&node.proxy.reference(&cached));
    let (mut hits, mut misses) = (Times::default(), Times::default());
    let (mut overlapped, mut warm_seconds) = (0, Vec::new());
    for _ in 0..ROUNDS {
        let fresh = [(); MISSES].map(|()| small());
        settle(&node);
        publishes(&node, &cached, &fresh, (&mut hits.quiet, &mut misses.quiet), || true);
        let fresh = [(); MISSES].map(|()| small());
        settle(&node);
        let started = Instant::now();
        let mut warming = warm(&admin, &list);
        let mut goes_on = || warming.try_wait().expect("its state").is_none();
        let beside = (&mut hits.beside, &mut misses.beside);
        overlapped += publishes(&node, &cached, &fresh, beside, &mut goes_on);
        assert!(warming.wait().expect("its end").success(), "warming failed");
        warm_seconds.push(started.elapsed());
        for reference in &list {
            admin.text(&["rm", reference]);
        }
        admin.text(&["gc", "--target", "0"]);
    }
    println!(
        "{WARMED} artifacts, half of {} MiB and half of {FILES} files, are warmed in {:.1} s (median of {ROUNDS}); {overlapped} \
         publishes met it\n",
        FILE_BYTES >> 20,
        quantile(&mut warm_seconds, 0.5).as_secs_f64()
    );
    println!(
        "{:<24} {:>12} {:>12} {:>12} {:>12} {:>8}",
        "publish, milliseconds", "quiet", "99 %", "beside", "99 %", "ratio"
    );
    for (what, times) in [("from the cache", &mut hits), ("of a new small artifact", &mut misses)] {
        let (quiet, beside) = (quantile(&mut times.quiet, 0.5), quantile(&mut times.beside, 0.5));
        let (quiet_tail, tail) =
            (quantile(&mut times.quiet, 0.99), quantile(&mut times.beside, 0.99));
        println!(
            "{what:<24} {:>12} {:>12} {:>12} {:>12} {:>8.2}",
            milliseconds(quiet),
            milliseconds(quiet_tail),
            milliseconds(beside),
            milliseconds(tail),
            beside.as_secs_f64() / quiet.as_secs_f64()
        );
    }
}

/// Syncs earlier writes, so that the next measurement does not pay for them.
fn settle(node: &Node) {
    run(tool("sync").arg("-f").arg(&node.driver.options.state));
}

/// Starts something that the kernel runs only on an idle processor: it would run on another machine.
fn standing_back<T>(start: impl FnOnce() -> T) -> T {
    let thread = nix::unistd::gettid().to_string();
    let class = |class| run(Command::new("chrt").args([class, "--pid", "0", &thread]));
    class("--idle");
    let started = start();
    class("--other");
    started
}

/// Publishes until `stop`. Returns the number of publishes.
fn publishes(
    node: &Node,
    cached: &str,
    fresh: &[String],
    (hits, misses): (&mut Vec<Duration>, &mut Vec<Duration>),
    mut wanted: impl FnMut() -> bool,
) -> usize {
    let before = hits.len() + misses.len();
    for new in fresh {
        for _ in 0..HITS / MISSES {
            if !wanted() {
                return hits.len() + misses.len() - before;
            }
            hits.push(publish(node, cached));
        }
        if wanted() {
            misses.push(publish(node, new));
        }
    }
    hits.len() + misses.len() - before
}

fn publish(node: &Node, name: &str) -> Duration {
    let volume = node.kubelet.new_volume(&node.proxy.reference(name));
    node.kubelet.prepare(&volume);
    let started = Instant::now();
    node.kubelet.publish_request(volume.request.clone()).expect("published");
    let took = started.elapsed();
    node.kubelet.unpublish(&volume);
    took
}

/// Returns new content each time.
fn small() -> String {
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    let repository = unique("small");
    let content = noise(256 << 10, NUMBER.fetch_add(1, Ordering::Relaxed));
    Manifest::artifact([Layer::titled("file", content)]).push(registry(), &repository, "v1");
    format!("{repository}:v1")
}

/// Pushes artifacts: half of them a large file, half many small ones.
fn artifacts(registry: &Registry) -> Vec<String> {
    let of = |number: usize| {
        let (repository, seed) = (unique("warmed"), number as u64 + 1000);
        if number.is_multiple_of(2) {
            let content = noise(FILE_BYTES, seed);
            Manifest::artifact([Layer::titled("file", content)]).push(registry, &repository, "v1");
        } else {
            let archive = (0..FILES).fold(Tar::new(), |archive, file| {
                archive.file(&format!("folder/file-{file}"), 0o644, noise(4096, seed + file as u64))
            });
            let archive = archive.finish();
            let packed = gzip(&archive);
            Image::new().packed_layer(OCI_TAR_GZIP, packed, &archive).push(
                registry,
                &repository,
                "v1",
            );
        }
        format!("{}/{repository}:v1", registry.host())
    };
    (0..WARMED).map(of).collect()
}

fn warm(admin: &Admin, list: &[String]) -> Child {
    let words: Vec<_> = std::iter::once("warm").chain(list.iter().map(String::as_str)).collect();
    let mut command = admin.command(&words);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary")
}
