//! Measures an unpublish and a start on nodes with many mounts, and an unpublish after a container has looked up many
//! names in the volume: the kernel frees each of them after the driver's response.
//!
//! The time of an unpublish is read from the driver's log. A start lasts until the driver registers with the kubelet.

use std::time::Instant;

use crate::common::disk::node_in_memory;
use crate::common::figures::{driver_times, milliseconds, quantile};
use crate::common::support::{Image, Node, Tar, Volume, registry, unique};

/// Volumes that are mounted on the node.
const MOUNTS: [usize; 3] = [100, 1_000, 5_000];
/// Names that a container looks up before an unpublish.
const NAMES: [usize; 3] = [0, 10_000, 200_000];
/// Calls of each kind.
const CALLS: usize = 20;
/// Calls after many names were looked up, which takes a while.
const CALLS_AFTER_LOOKUPS: usize = 5;
const FORMS: [(&str, bool); 2] = [("bind", true), ("overlay", false)];

pub fn mounts() {
    println!("{CALLS} unpublishes and starts on a node with so many volumes, milliseconds:\n");
    println!(
        "{:<10} {:<8} {:>18} {:>18} {:>14}",
        "volumes", "form", "unpublish, median", "longest", "start, median"
    );
    for mounts in MOUNTS {
        for (form, readonly) in FORMS {
            let node = node_in_memory(|options| options);
            let reference = node.proxy.reference(&node.small_artifact().name);
            let volumes: Vec<_> =
                (0..mounts).map(|_| publish(&node, &reference, readonly)).collect();
            for _ in 0..CALLS {
                let volume = publish(&node, &reference, readonly);
                node.kubelet.unpublish(&volume);
            }
            let mut unpublishes = driver_times(&node.driver.log(), "unpublished");
            let Node { mut driver, kubelet, proxy: _proxy, sandbox: _sandbox } = node;
            let mut starts = Vec::new();
            for _ in 0..CALLS {
                let options = driver.kill();
                let started = Instant::now();
                driver = options.start();
                starts.push(started.elapsed());
            }
            println!(
                "{mounts:<10} {form:<8} {:>18} {:>18} {:>14}",
                milliseconds(quantile(&mut unpublishes, 0.5)),
                milliseconds(quantile(&mut unpublishes, 1.0)),
                milliseconds(quantile(&mut starts, 0.5))
            );
            volumes.iter().for_each(|volume| kubelet.unpublish(volume));
        }
    }
}

pub fn lookups() {
    println!(
        "{CALLS_AFTER_LOOKUPS} unpublishes after so many names were looked up, milliseconds:\n"
    );
    println!("{:<10} {:<8} {:>10} {:>10}", "names", "form", "median", "longest");
    let largest = NAMES[NAMES.len() - 1];
    let node = node_in_memory(|options| options);
    let reference = node.proxy.reference(&format!("{}:v1", push_files(largest)));
    // Fetched and unpacked once. A kubelet waits longer than one call for that.
    let first = node.kubelet.new_volume(&reference);
    node.kubelet.prepare(&first);
    while let Err(status) = node.kubelet.publish_request(first.request.clone()) {
        assert_eq!(status.code(), tonic::Code::Aborted, "{status}");
    }
    for names in NAMES {
        for (form, readonly) in FORMS {
            let before = driver_times(&node.driver.log(), "unpublished").len();
            for _ in 0..CALLS_AFTER_LOOKUPS {
                let volume = publish(&node, &reference, readonly);
                for number in 0..names {
                    std::fs::symlink_metadata(volume.target().join(file_name(number)))
                        .expect("a file of the volume");
                }
                node.kubelet.unpublish(&volume);
            }
            let mut times = driver_times(&node.driver.log(), "unpublished").split_off(before);
            println!(
                "{names:<10} {form:<8} {:>10} {:>10}",
                milliseconds(quantile(&mut times, 0.5)),
                milliseconds(quantile(&mut times, 1.0))
            );
        }
    }
}

fn publish(node: &Node, reference: &str, readonly: bool) -> Volume {
    let mut volume = node.kubelet.new_volume(reference);
    volume.request.readonly = readonly;
    node.kubelet.publish_well(&volume);
    volume
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
