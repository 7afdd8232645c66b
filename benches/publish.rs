//! Measures publishes of content that is on the node: one small file, and an image of many files, in both forms of the
//! mount.
//!
//! The driver's own time is read from its log, one line for each call. The kubelet's time is that of the call with its
//! new connection. Waits count how often the driver's threads hand over to each other.

use std::time::Instant;

use crate::common::disk::node_in_memory;
use crate::common::figures::{driver_times, milliseconds, quantile};
use crate::common::support::{Image, Layer, Manifest, Node, Tar, registry, unique};

const PUBLISHES: usize = 2000;
const FILES: usize = 20_000;
/// The number of publishes whose waits are counted.
const WAITS: usize = 200;
const FORMS: [(&str, bool); 2] = [("bind", true), ("overlay", false)];

pub fn publish() {
    let small = unique("small");
    Manifest::artifact([Layer::titled("file", "content")]).push(registry(), &small, "v1");
    let large = push_files(FILES);
    println!("{PUBLISHES} publishes from the cache, one after the other, milliseconds:\n");
    println!(
        "{:<24} {:<8} {:>10} {:>10} {:>14} {:>14} {:>8}",
        "artifact", "form", "median", "99 %", "call median", "call 99 %", "waits"
    );
    for (what, repository) in [("one file", small), ("an image of 20,000 files", large)] {
        for (form, readonly) in FORMS {
            let node = node_in_memory(|options| options);
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
            let waits = waits_of_publishes(&node, &reference, readonly);
            node.kubelet.unpublish(&first);
            let mut driver = driver_times(&node.driver.log(), "published");
            println!(
                "{what:<24} {form:<8} {:>10} {:>10} {:>14} {:>14} {waits:>8.1}",
                milliseconds(quantile(&mut driver, 0.5)),
                milliseconds(quantile(&mut driver, 0.99)),
                milliseconds(quantile(&mut calls, 0.5)),
                milliseconds(quantile(&mut calls, 0.99))
            );
        }
    }
}

/// Returns the average number of waits of the driver's threads during one publish.
fn waits_of_publishes(node: &Node, reference: &str, readonly: bool) -> f64 {
    let volumes: Vec<_> = (0..WAITS)
        .map(|_| {
            let mut volume = node.kubelet.new_volume(reference);
            volume.request.readonly = readonly;
            node.kubelet.prepare(&volume);
            volume
        })
        .collect();
    let before = waits(node.driver.id());
    for volume in &volumes {
        node.kubelet.publish_request(volume.request.clone()).expect("published");
    }
    let waited = waits(node.driver.id()).saturating_sub(before);
    volumes.iter().for_each(|volume| node.kubelet.unpublish(volume));
    waited as f64 / WAITS as f64
}

/// Returns the number of waits of all threads of a process.
fn waits(process: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("a process");
    tasks
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok())
        .filter_map(|status| {
            let line =
                status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
            line.trim().parse::<u64>().ok()
        })
        .sum()
}

/// Pushes an image of this many small files. Returns its repository.
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
