//! Durations, sizes and foreign text, in the form that people read and write.

pub mod duration;
pub mod printable;
pub mod quantity;
pub mod units;
