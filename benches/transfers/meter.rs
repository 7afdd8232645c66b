//! Wall time, CPU time and peak memory.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The costs of one run.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    pub wall: Duration,
    pub cpu: Duration,
    /// The peak memory of the largest process; `None` if the process does not report it.
    pub peak_bytes: Option<u64>,
}

/// Runs a command successfully to its end, with all of its children.
#[track_caller]
#[allow(unsafe_code, reason = "only wait4 tells the cost of one child")]
pub fn command(command: &mut Command) -> Measured {
    let started = Instant::now();
    #[expect(clippy::zombie_processes, reason = "wait4 below waits for it")]
    let child: Child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; `make bench` installs the tools"));
    let (mut status, id) = (0, i32::try_from(child.id()).expect("a process id"));
    // SAFETY: rusage is a structure of integers, for which zeros are a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live values of the types that the call writes.
    let waited = unsafe { libc::wait4(id, &raw mut status, 0, &raw mut usage) };
    assert_eq!(waited, id, "{command:?}");
    assert_eq!(status, 0, "{command:?} failed");
    let wall = started.elapsed();
    let time = |value: libc::timeval| {
        Duration::from_secs(value.tv_sec as u64) + Duration::from_micros(value.tv_usec as u64)
    };
    let cpu = time(usage.ru_utime) + time(usage.ru_stime);
    Measured { wall, cpu, peak_bytes: Some(usage.ru_maxrss as u64 * 1024) }
}

/// Returns the CPU time of a running process so far.
pub fn cpu(process: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("a process");
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split(' ').collect();
    let ticks = |index: usize| fields[index].parse::<u64>().expect("ticks");
    // utime and stime, in hundredths of a second.
    Duration::from_millis((ticks(12) + ticks(13)) * 10)
}

/// Returns the peak resident memory of a running process (`VmHWM`).
pub fn peak_bytes(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Describes the machine in one line.
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let value = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        line.split(':').nth(1).unwrap_or("unknown").trim().to_owned()
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = value(&read("/proc/meminfo"), "MemTotal");
    let memory = memory.trim_end_matches(" kB").parse::<u64>().unwrap_or_default() >> 20;
    let kernel = read("/proc/sys/kernel/osrelease");
    let load = read("/proc/loadavg");
    format!(
        "machine: {cores} cores ({}), {memory} GiB, Linux {}; load when started: {}",
        value(&read("/proc/cpuinfo"), "model name"),
        kernel.trim(),
        load.split(' ').next().unwrap_or_default()
    )
}
