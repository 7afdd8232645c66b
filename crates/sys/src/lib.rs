//! Mounts, system calls, threads and files: the driver's use of the Linux kernel.
//!
//! ```text
//! mount                binds, overlays and the mount table; `syscalls` is the only `unsafe` of the project
//! extended_attributes  extended attributes of files
//! background           threads that yield to all others of the driver
//! process_group        a program and its descendants, ended together
//! reload               values made from files that change while the driver runs
//! lru_map              the entries that were used last
//! weak_map             values by key that are shared while in use
//! fault                named points where a test stops, fails or holds the driver
//! ```

pub mod background;
pub mod extended_attributes;
pub mod fault;
pub mod lru_map;
pub mod mount;
pub mod process_group;
pub mod reload;
pub mod weak_map;
