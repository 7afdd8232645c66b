//! What warming costs the pods that start meanwhile: publishes from the cache and of small new artifacts, while the
//! node does nothing else and while it warms 20 artifacts. Rounds take turns, so that what else the machine does meets both.
//!
//! The registry runs on the same machine, and its work counts as warming's.
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

#[path = "../tests/e2e/support/mod.rs"]
mod support;

use std::{
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use support::{
    Admin, Image, Layer, Manifest, Node, OCI_TAR_GZIP, Tar, gzip, noise, registry, unique,
};

const ROOMY: &str = "cache: {minFreePercent: 0, minFreeInodesPercent: 0, highThresholdPercent: 100, \
                     lowThresholdPercent: 100, minimumAge: 0s}\n";
const ROUNDS: usize = 6;
const WARMED: usize = 20;
const FILE_BYTES: usize = 48 << 20;
const FILES: usize = 1500;
/// Of each round; enough for medians, and fewer than warming outlasts.
const HITS: usize = 120;
const MISSES: usize = 12;

/// Times of one kind of publish, without and with warming beside.
#[derive(Default)]
struct Times {
    quiet: Vec<Duration>,
    beside: Vec<Duration>,
}

fn main() {
    let (node, admin) = Admin::start(ROOMY);
    let cached = small(0);
    let (_shown, _) = node.mount(&node.proxy.reference(&cached));
    let (mut hits, mut misses) = (Times::default(), Times::default());
    let (mut overlapped, mut warm_seconds) = (0, Vec::new());
    for round in 0..ROUNDS {
        publishes(&node, &cached, &mut hits.quiet, &mut misses.quiet, || true);
        let list = artifacts(&node, round);
        let started = Instant::now();
        let mut warming = warm(&admin, &list);
        let mut goes_on = || warming.try_wait().expect("its state").is_none();
        overlapped += publishes(&node, &cached, &mut hits.beside, &mut misses.beside, &mut goes_on);
        assert!(warming.wait().expect("its end").success(), "warming failed");
        warm_seconds.push(started.elapsed());
        for reference in &list {
            admin.told(&["rm", reference]);
        }
        admin.told(&["gc", "--target", "0"]);
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
        let milliseconds = |time: Duration| format!("{:.2}", time.as_secs_f64() * 1000.0);
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

/// Publishes as long as it is wanted; says how many there were.
fn publishes(
    node: &Node,
    cached: &str,
    hits: &mut Vec<Duration>,
    misses: &mut Vec<Duration>,
    mut wanted: impl FnMut() -> bool,
) -> usize {
    let fresh: Vec<_> = (0..MISSES).map(|number| small(number + 1)).collect();
    let before = hits.len() + misses.len();
    for (number, new) in fresh.iter().enumerate() {
        for _ in 0..HITS / MISSES {
            if !wanted() {
                return hits.len() + misses.len() - before;
            }
            hits.push(publish(node, cached));
        }
        if number > 0 && wanted() {
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

fn small(seed: usize) -> String {
    let repository = unique("small");
    let content = noise(256 << 10, seed as u64 + 1);
    Manifest::artifact([Layer::titled("file", content)]).push(registry(), &repository, "v1");
    format!("{repository}:v1")
}

/// New content each round: half of them a large file, half many small ones.
fn artifacts(node: &Node, round: usize) -> Vec<String> {
    let of = |number: usize| {
        let repository = unique("warmed");
        let seed = (round * WARMED + number) as u64 + 1000;
        if number.is_multiple_of(2) {
            let content = noise(FILE_BYTES, seed);
            Manifest::artifact([Layer::titled("file", content)]).push(
                registry(),
                &repository,
                "v1",
            );
        } else {
            let archive = (0..FILES).fold(Tar::new(), |archive, file| {
                archive.file(&format!("folder/file-{file}"), 0o644, noise(4096, seed + file as u64))
            });
            let archive = archive.finish();
            let packed = gzip(&archive);
            Image::new().packed_layer(OCI_TAR_GZIP, packed, &archive).push(
                registry(),
                &repository,
                "v1",
            );
        }
        node.proxy.reference(&format!("{repository}:v1"))
    };
    (0..WARMED).map(of).collect()
}

fn warm(admin: &Admin, list: &[String]) -> Child {
    let words: Vec<_> = std::iter::once("warm").chain(list.iter().map(String::as_str)).collect();
    let mut command = admin.command(&words);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary")
}

fn quantile(times: &mut [Duration], part: f64) -> Duration {
    times.sort_unstable();
    let last = times.len().saturating_sub(1);
    times.get(((last as f64) * part).round() as usize).copied().unwrap_or_default()
}
