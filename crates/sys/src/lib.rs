//! Mounts, system calls, threads and files: what the driver asks of the Linux kernel.
//!
//! ```text
//! mount          binds, overlays and the mount table; `syscalls` is the only `unsafe` of the project
//! background     threads that stand back behind all others
//! process_group  a program and all that it starts, ended together
//! reread         files that change while the driver runs
//! fault          named places where a test stops, fails or holds the driver
//! ```

pub mod background;
pub mod fault;
pub mod mount;
pub mod process_group;
pub mod reread;
