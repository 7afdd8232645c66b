//! Tests attacks on the disk of a node, and on the decisions about it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::{HonestPods, all_go_on, hostile_volume, publish_each};
use crate::support::hostile::{
    leave_broken_downloads, put_files_never_sent, put_large_manifest_without_layer,
};
use crate::support::{Admin, FakeRegistry, Node, wait_until};

#[test]
fn manifests_of_many_layers_beside_many_broken_downloads_delay_no_other_pull() {
    let node = Node::start_with(|_, options| {
        leave_broken_downloads(&options.state);
        options
    });
    let honest = HonestPods::new(&node);
    let registry = FakeRegistry::new();
    put_files_never_sent(&registry, 4);
    std::thread::scope(|scope| {
        let volumes: Vec<_> = (0..4)
            .map(|number| hostile_volume(&node, &registry.reference(&format!("v{number}"))))
            .collect();
        let attacks = publish_each(scope, &node, &volumes);
        wait_until("every manifest was asked for", || {
            let requests = registry.requests();
            let manifests = requests.iter().filter(|request| request.path.contains("/manifests/v"));
            manifests.map(|request| &request.path).collect::<BTreeSet<_>>().len() == 4
        });
        // While space is reserved, and afterwards.
        let mut is_reserved = false;
        while !is_reserved {
            let requests = registry.requests();
            let blobs = requests.iter().filter(|request| request.path.contains("/blobs/"));
            // Four layers of one artifact are fetched at once. The lists of the others wait for the namespace's share
            // of memory.
            is_reserved = blobs.map(|request| &request.path).collect::<BTreeSet<_>>().len() >= 4;
            honest.are_served_while(|| all_go_on(&attacks));
        }
        // No waiting task is left.
        node.driver.terminate();
    });
}

/// Ends an attack, also if the test fails.
struct EndOfAttack<'a>(&'a AtomicBool);

impl Drop for EndOfAttack<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Returns the size of all files of a directory in bytes.
fn bytes_in(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).expect("a folder").flatten();
    entries.map(|entry| entry.metadata().map_or(0, |metadata| metadata.len())).sum()
}

#[test]
fn ever_new_documents_of_failing_publishes_fill_no_disk() {
    const DISK: u64 = 300 << 20;
    const QUOTA: u64 = 50 << 20;
    let (mut endpoint, mut disk) = (String::new(), std::path::PathBuf::new());
    let node = Node::start_with(|sandbox, options| {
        endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
        disk = sandbox.filesystem_of(DISK, "ext4", "disk", "rw");
        options
            .state(&disk.join("state"))
            .configuration("cache: {minFreePercent: 20, maxBytes: 50Mi, minimumAge: 0s}\n")
            .argument(&format!("--admin-endpoint={endpoint}"))
    });
    let admin = Admin::at(&endpoint);
    let honest = HonestPods::new(&node);
    let registry = FakeRegistry::new();
    let (published, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let attack = scope.spawn(|| {
            // More of them than the disk has space for.
            while published.load(Ordering::SeqCst) < 90 || !is_over.load(Ordering::SeqCst) {
                let number = published.load(Ordering::SeqCst);
                put_large_manifest_without_layer(&registry, "v1", &number.to_string());
                let volume = hostile_volume(&node, &registry.reference("v1"))
                    .attribute("pullPolicy", "Always");
                node.kubelet.publish(&volume).expect_err("it cannot be had");
                published.fetch_add(1, Ordering::SeqCst);
            }
        });
        let _end = EndOfAttack(&is_over);
        wait_until("the disk would be full", || {
            assert!(!attack.is_finished(), "the attack failed");
            published.load(Ordering::SeqCst) >= 80
        });
        honest.are_served_while(|| !attack.is_finished());
    });
    let state = node.driver.state();
    let status = nix::sys::statvfs::statvfs(&disk).expect("the disk");
    let free = status.blocks_available() * status.fragment_size();
    assert!(free > DISK / 5, "the floor is kept: {free}");
    let documents = bytes_in(&state.join("blobs"));
    assert!(documents <= QUOTA, "documents count in the quota: {documents}");
    assert!(admin.json(&["status"])["cacheBytes"].as_u64() <= Some(QUOTA));
    admin.text(&["gc", "--target", "0"]);
    assert_eq!(bytes_in(&state.join("blobs")), 0, "nothing refers to them");
}
