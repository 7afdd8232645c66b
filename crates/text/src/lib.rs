//! Durations, sizes and untrusted text, in the form that users read and write.

pub mod duration;
pub mod printable;
pub mod quantity;
pub mod units;
