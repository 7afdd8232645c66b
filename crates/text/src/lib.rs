//! Durations, sizes and untrusted text, in the form that users read and write.

pub mod duration;
pub mod human_units;
pub mod printable;
pub mod quantity;
