//! How long a publish takes when the node has the content: one small file, and an image of many
//! files, in both forms of the mount. How long an unpublish takes after a container has looked up
//! names in the volume: the kernel forgets each of them. The driver's own time is read from its
//! log, one line a call; the kubelet's is that of the call with its new connection.
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
/// Names that a container looks up before an unpublish.
const NAMES: [usize; 3] = [0, 10_000, 1_000_000];
/// Unpublishes of each kind.
const UNPUBLISHES: usize = 5;
const FORMS: [(&str, bool); 2] = [("bind", true), ("overlay", false)];

fn main() {
    publishes();
    unpublishes();
}

fn publishes() {
    let small = unique("small");
    Manifest::artifact([Layer::titled("file", "content")]).push(registry(), &small, "v1");
    let large = push_files(FILES);
    println!("{PUBLISHES} publishes from the cache, one after the other, milliseconds:\n");
    println!(
        "{:<24} {:<8} {:>10} {:>10} {:>14} {:>14}",
        "artifact", "form", "median", "99 %", "call median", "call 99 %"
    );
    for (what, repository) in [("one file", small), ("an image of 20,000 files", large)] {
        for (form, readonly) in FORMS {
            let node = Node::start();
            let reference = node.proxy.reference(&format!("{repository}:v1"));
            let (first, _) = node.mount(&reference);
            let mut calls = Vec::with_capacity(PUBLISHES);
            for _ in 0..PUBLISHES {
                let mut volume = node.kubelet.new_volume(&reference);
                volume.request.readonly = readonly;
                node.kubelet.prepare(&volume);
                let started = Instant::now();
                node.kubelet.publish_request(volume.request.clone()).expect("published");
                calls.push(started.elapsed());
                node.kubelet.unpublish(&volume);
            }
            node.kubelet.unpublish(&first);
            let mut driver = driver_times(&node.driver.log(), "published");
            println!(
                "{what:<24} {form:<8} {:>10} {:>10} {:>14} {:>14}",
                milliseconds(quantile(&mut driver, 0.5)),
                milliseconds(quantile(&mut driver, 0.99)),
                milliseconds(quantile(&mut calls, 0.5)),
                milliseconds(quantile(&mut calls, 0.99))
            );
        }
    }
}

fn unpublishes() {
    println!("\n{UNPUBLISHES} unpublishes after so many names were looked up, milliseconds:\n");
    println!("{:<24} {:<8} {:>10} {:>10}", "names", "form", "median", "longest");
    let largest = NAMES[NAMES.len() - 1];
    // The folders count, too.
    let node = Node::start_configured(|_| {}, "limits: {entries: 2000000}\n");
    let reference = node.proxy.reference(&format!("{}:v1", push_files(largest)));
    // Fetched and unpacked once; a kubelet waits longer than one call for that.
    let first = node.kubelet.new_volume(&reference);
    node.kubelet.prepare(&first);
    while let Err(status) = node.kubelet.publish_request(first.request.clone()) {
        assert_eq!(status.code(), tonic::Code::Aborted, "{status}");
    }
    for names in NAMES {
        for (form, readonly) in FORMS {
            let before = driver_times(&node.driver.log(), "unpublished").len();
            for _ in 0..UNPUBLISHES {
                let mut volume = node.kubelet.new_volume(&reference);
                volume.request.readonly = readonly;
                node.kubelet.publish_well(&volume);
                for number in 0..names {
                    std::fs::symlink_metadata(volume.target().join(file_name(number)))
                        .expect("a file of the volume");
                }
                node.kubelet.unpublish(&volume);
            }
            let mut times = driver_times(&node.driver.log(), "unpublished").split_off(before);
            println!(
                "{names:<24} {form:<8} {:>10} {:>10}",
                milliseconds(quantile(&mut times, 0.5)),
                milliseconds(quantile(&mut times, 1.0))
            );
        }
    }
}

/// Pushes an image of so many small files, and returns its repository.
fn push_files(files: usize) -> String {
    let repository = unique("files");
    let archive = (0..files)
        .fold(Tar::new(), |archive, number| archive.file(&file_name(number), 0o644, "content"));
    Image::new().layer(archive.finish()).push(registry(), &repository, "v1");
    repository
}

fn file_name(number: usize) -> String {
    format!("folder-{}/file-{number}", number % 1000)
}

fn milliseconds(time: Duration) -> String {
    format!("{:.2}", time.as_secs_f64() * 1000.0)
}

/// The driver's own times of calls that ended with this message: of publishes, those from the cache.
fn driver_times(log: &str, message: &str) -> Vec<Duration> {
    log.lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|line| line["message"] == message && line["path"] != "miss")
        .filter_map(|line| line["milliseconds"].as_f64())
        .map(|milliseconds| Duration::from_secs_f64(milliseconds / 1000.0))
        .collect()
}

fn quantile(times: &mut [Duration], part: f64) -> Duration {
    times.sort_unstable();
    let last = times.len().saturating_sub(1);
    times[((last as f64) * part).round() as usize]
}
