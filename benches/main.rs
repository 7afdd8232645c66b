//! Figures of the driver, side by side with what they are compared with. One program, since each would link the driver's
//! library and all of its dependencies anew.
//!
//! ```text
//! publish      publishes from the cache, in both forms
//! mounts       unpublish and start on nodes with many mounts
//! lookups      unpublish after a container has looked up many names in the volume
//! store        opening, publishing, listing and evicting at 10 to 10,000 artifacts
//! memory       peak memory of artifacts that are small on the wire and large in memory
//! neighbours   times of honest pods beside each attack
//! warming      times of publishes beside warming
//! transfers    cold publishes beside curl, oras, skopeo and containerd
//! preload      the preload controller with thousands of nodes
//! preload-api-server   the same with a real API server
//! common       shared by them
//! ```
//!
//! `make bench` runs all, `make bench ARGUMENTS='publish memory'` these.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::pedantic,
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::allow_attributes_without_reason,
    reason = "a bench prints figures for people, and has no readers of its interface"
)]

mod common;
mod memory;
mod mounts;
mod neighbours;
mod preloading;
mod publish;
mod store;
mod transfers;
mod warming;

const BENCHES: [(&str, fn()); 10] = [
    ("publish", publish::publish),
    ("mounts", mounts::mounts),
    ("lookups", mounts::lookups),
    ("store", store::store),
    ("memory", memory::memory),
    ("neighbours", neighbours::neighbours),
    ("warming", warming::warming),
    ("transfers", transfers::transfers),
    ("preload", preloading::preload),
    ("preload-api-server", preloading::api_server::preload),
];

fn main() {
    // Cargo adds a flag of its own.
    let chosen: Vec<_> = std::env::args().skip(1).filter(|name| !name.starts_with("--")).collect();
    let known = |name: &String| BENCHES.iter().any(|(known, _)| known == name);
    let unknown = chosen.iter().find(|name| !known(name));
    assert!(unknown.is_none(), "no bench has the name {unknown:?}");
    for (name, run) in BENCHES {
        if chosen.is_empty() || chosen.iter().any(|wanted| wanted == name) {
            println!("\n== {name}\n");
            run();
        }
    }
}
