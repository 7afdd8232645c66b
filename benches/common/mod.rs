//! Shared by the benches, each of which uses a part.
//!
//! ```text
//! support   the end-to-end tests' registry, driver and kubelet
//! figures   reads times of the driver's log, and prints them
//! disk      an ext4 in memory
//! cgroup    bounds the memory of a process
//! ```
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    unused_imports,
    clippy::pedantic,
    reason = "a bench uses a part, and support is linted with its tests"
)]

pub mod cgroup;
pub mod disk;
pub mod figures;
#[path = "../../tests/e2e/support/mod.rs"]
pub mod support;
