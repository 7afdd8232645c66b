//! Control groups that bound the memory of one process.

use std::path::{Path, PathBuf};

/// A memory cgroup with one process. Dropping this removes the cgroup, once the process has ended.
pub struct Confinement {
    folder: PathBuf,
    is_first_version: bool,
}

impl Confinement {
    /// Moves a process into a cgroup of its own with this memory limit.
    #[track_caller]
    pub fn of(process: u32, bytes: u64) -> Self {
        let first = Path::new("/sys/fs/cgroup/memory");
        // Version 1 has a directory for each controller, version 2 has one file for each limit.
        let is_first_version = first.is_dir();
        let (root, limit) = if is_first_version {
            (first, "memory.limit_in_bytes")
        } else {
            (Path::new("/sys/fs/cgroup"), "memory.max")
        };
        let folder = root.join(format!("bench-{process}"));
        let write = |name: &str, text: String| std::fs::write(folder.join(name), text);
        std::fs::create_dir(&folder)
            .and_then(|()| write(limit, bytes.to_string()))
            .and_then(|()| write("cgroup.procs", process.to_string()))
            .expect("a memory cgroup, which needs root");
        Self { folder, is_first_version }
    }

    /// Returns the number of processes that the kernel has killed in the cgroup because of its limit.
    pub fn kills(&self) -> u64 {
        let file = if self.is_first_version { "memory.oom_control" } else { "memory.events" };
        let text = std::fs::read_to_string(self.folder.join(file)).unwrap_or_default();
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.and_then(|count| count.trim().parse().ok()).unwrap_or_default()
    }
}

impl Drop for Confinement {
    fn drop(&mut self) {
        // The kernel refuses while the process still exits.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.folder).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}
