//! Tests the driver from a user's view: the real binary, a real registry, real mounts, and a kubelet's calls.
#![allow(missing_docs, unreachable_pub, reason = "a test binary has no readers of its interface")]
#![allow(
    clippy::missing_panics_doc,
    clippy::needless_pass_by_value,
    clippy::new_without_default,
    clippy::unused_self,
    reason = "tests read better so, and have no callers to surprise"
)]

mod support;

mod accounting;
mod addresses;
mod admin_commands;
mod admin_socket;
mod artifacts;
mod attributes;
mod availability;
mod bad_content;
mod bad_requests;
mod broken_connections;
mod check;
mod cluster;
mod command_line;
mod commit_order;
mod concurrency;
mod content_disclosure;
#[cfg(feature = "fault-points")]
mod crash;
mod credentials;
mod disk_failures;
mod disk_space;
mod documents;
mod endpoints;
#[cfg(feature = "fault-points")]
mod follow;
mod format;
mod identity;
mod images;
mod isolation;
mod keyless;
mod layered_images;
mod lifecycle;
mod mirrors;
mod mounts;
mod neighbours;
mod parts;
mod policy;
mod preload;
mod progress;
mod provision;
mod proxies;
mod pull_policy;
mod recorded;
mod recovery;
mod registration;
mod registry_variants;
mod runtimes;
mod sanity;
mod scrub;
mod secret_leaks;
mod secrets;
mod several_artifacts;
mod signatures;
mod stress;
mod tls;
mod tokens;
mod tools;
mod trust;
mod tutorial;
mod warm_list;
