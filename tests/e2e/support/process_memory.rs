//! The anonymous memory of a process, which a container's limit is about.

use std::fs;

/// The peak memory of a process since a moment, as the kernel counts it.
pub struct PeakMemory {
    process: u32,
    /// The pages of files at that moment.
    file_bytes: u64,
}

impl PeakMemory {
    /// Starts a new measurement: earlier memory of the process does not count.
    #[track_caller]
    pub fn reset(process: u32) -> Self {
        fs::write(format!("/proc/{process}/clear_refs"), "5").expect("the peak is reset");
        Self { process, file_bytes: bytes_of(process, "RssFile:") }
    }

    /// Returns an upper bound of the peak anonymous memory since: later pages of files count as well.
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
