//! The memory of a process that no file is behind, which is what a container's limit is about.

use std::fs;

/// The largest memory of a process since a moment, as the kernel keeps it.
pub struct PeakMemory {
    process: u32,
    /// The pages of files at that moment.
    file_bytes: u64,
}

impl PeakMemory {
    /// Begins anew: what the process took before does not count.
    #[track_caller]
    pub fn reset(process: u32) -> Self {
        fs::write(format!("/proc/{process}/clear_refs"), "5").expect("the peak is reset");
        Self { process, file_bytes: bytes_of(process, "RssFile:") }
    }

    /// Returns a bound of the largest anonymous memory since: pages of files that came later count, too.
    pub fn anonymous_bytes(&self) -> u64 {
        bytes_of(self.process, "VmHWM:").saturating_sub(self.file_bytes)
    }
}

/// Returns the anonymous memory of a process now.
pub fn anonymous_bytes(process: u32) -> u64 {
    bytes_of(process, "RssAnon:")
}

#[track_caller]
fn bytes_of(process: u32, key: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix(key)).expect("a line of memory");
    let kibibytes = line.trim().strip_suffix("kB").expect("kibibytes").trim();
    kibibytes.parse::<u64>().expect("a number") * 1024
}
