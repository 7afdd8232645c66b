//! Durations, sizes and foreign text as people read and write them.

pub mod duration;
pub mod printable;
pub mod units;
