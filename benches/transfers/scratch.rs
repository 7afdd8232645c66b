//! A fresh ext4 in memory.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::common::support::{Sandbox, run, tool};

/// The size for the largest case with its unpacked content.
const BYTES: u64 = 6 << 30;
/// The size for the confined case, whose pages are all allocated before.
const ALLOCATED_BYTES: u64 = 4 << 30;

/// An ext4 on a loop device over a file in memory; both end with the value.
pub struct Scratch {
    mounted: PathBuf,
    memory: PathBuf,
    _sandbox: Sandbox,
}

impl Scratch {
    /// Mounts a filesystem. Its memory belongs to the process that touches it first: allocated beforehand, it is not
    /// charged to the driver.
    pub fn new(allocated: bool) -> Self {
        let sandbox = Sandbox::new();
        let memory = sandbox.folder("memory");
        mount(Some("bench"), &memory, Some("tmpfs"), MsFlags::empty(), Some("size=7g"))
            .expect("mount a tmpfs");
        let image = memory.join("ext4");
        if allocated {
            let bytes = ALLOCATED_BYTES.to_string();
            run(tool("fallocate").args(["-l", &bytes]).arg(&image));
        } else {
            fs::File::create(&image).and_then(|file| file.set_len(BYTES)).expect("a sparse file");
        }
        run(tool("mkfs.ext4").args(["-q", "-E", "lazy_itable_init=1,nodiscard"]).arg(&image));
        let mounted = sandbox.folder("scratch");
        run(tool("mount").args(["-o", "loop,noatime"]).arg(&image).arg(&mounted));
        Self { mounted, memory, _sandbox: sandbox }
    }

    pub fn path(&self) -> &Path {
        &self.mounted
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Lazily, because a killed driver may still be ending.
        let _ = umount2(&self.mounted, MntFlags::MNT_DETACH);
        let _ = umount2(&self.memory, MntFlags::MNT_DETACH);
    }
}
