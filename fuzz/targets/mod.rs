//! Functions that take any bytes and panic if the driver breaks a promise about them: one for each parser of foreign input.
//! `make fuzz` calls them with libFuzzer, and `tests/fuzz_targets.rs` with their seeds and random changes of these.

mod archive;
mod artifacts;
mod attributes;
mod configuration;
mod hosts;
mod manifest;
mod mountinfo;
mod platform;
mod providers;
mod reference;
mod secret;
mod selection;
mod signature;
mod sigstore;

/// A function of one target.
type Run = fn(&[u8]);

/// Each target by its name, which is also that of its folder of seeds.
pub(crate) const TARGETS: &[(&str, Run)] = &[
    ("archive", archive::run),
    ("artifacts", artifacts::run),
    ("attributes", attributes::run),
    ("configuration", configuration::run),
    ("hosts", hosts::run),
    ("manifest", manifest::run),
    ("mountinfo", mountinfo::run),
    ("platform", platform::run),
    ("providers", providers::run),
    ("reference", reference::run),
    ("secret", secret::run),
    ("selection", selection::run),
    ("signature", signature::run),
    ("sigstore", sigstore::run),
];
