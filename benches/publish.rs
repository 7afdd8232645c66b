//! How long a publish takes when the node has the content: one small file, and
//! an image of many files. The driver's own time is read from its log, one line
//! a publish; the kubelet's is that of the call with its new connection.
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

use std::time::{Duration, Instant};

use support::{Image, Layer, Manifest, Node, Tar, registry, unique};

const PUBLISHES: usize = 2000;
const FILES: usize = 20_000;

fn main() {
    let small = unique("small");
    Manifest::artifact([Layer::titled("file", "content")]).push(registry(), &small, "v1");
    let large = unique("large");
    let archive = (0..FILES).fold(Tar::new(), |archive, number| {
        archive.file(&format!("folder-{}/file-{number}", number % 100), 0o644, "content")
    });
    Image::new().layer(archive.finish()).push(registry(), &large, "v1");
    println!("{PUBLISHES} publishes from the cache, one after the other, milliseconds:\n");
    println!(
        "{:<28} {:>10} {:>10} {:>14} {:>14}",
        "artifact", "median", "99 %", "call median", "call 99 %"
    );
    for (what, repository) in [("one file", small), ("an image of 20,000 files", large)] {
        let node = Node::start();
        let reference = node.proxy.reference(&format!("{repository}:v1"));
        let (first, _) = node.mount(&reference);
        let mut calls = Vec::with_capacity(PUBLISHES);
        for _ in 0..PUBLISHES {
            let volume = node.kubelet.new_volume(&reference);
            node.kubelet.prepare(&volume);
            let started = Instant::now();
            node.kubelet.publish_request(volume.request.clone()).expect("published");
            calls.push(started.elapsed());
            node.kubelet.unpublish(&volume);
        }
        node.kubelet.unpublish(&first);
        let mut driver = driver_times(&node.driver.log());
        let (median, tail) = (quantile(&mut driver, 0.5), quantile(&mut driver, 0.99));
        let (call_median, call_tail) = (quantile(&mut calls, 0.5), quantile(&mut calls, 0.99));
        let milliseconds = |time: Duration| format!("{:.2}", time.as_secs_f64() * 1000.0);
        println!(
            "{what:<28} {:>10} {:>10} {:>14} {:>14}",
            milliseconds(median),
            milliseconds(tail),
            milliseconds(call_median),
            milliseconds(call_tail)
        );
    }
}

/// The times of publishes that hit the cache.
fn driver_times(log: &str) -> Vec<Duration> {
    log.lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|line| line["message"] == "published" && line["path"] == "hit")
        .filter_map(|line| line["milliseconds"].as_f64())
        .map(|milliseconds| Duration::from_secs_f64(milliseconds / 1000.0))
        .collect()
}

fn quantile(times: &mut [Duration], part: f64) -> Duration {
    times.sort_unstable();
    let last = times.len().saturating_sub(1);
    times[((last as f64) * part).round() as usize]
}
