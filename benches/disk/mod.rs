//! An ext4 in memory, so that the machine's disk does not decide how long things take.

use std::fs;
use std::path::PathBuf;

use nix::mount::MsFlags;

use crate::support::{Sandbox, run, tool};

/// Mounts one that ends with the sandbox; the arguments are for `mkfs.ext4`.
pub fn ext4_in_memory(sandbox: &Sandbox, bytes: u64, arguments: &[&str]) -> PathBuf {
    let image = sandbox.tmpfs("memory", MsFlags::empty()).join("ext4");
    fs::File::create(&image).and_then(|file| file.set_len(bytes)).expect("a sparse file");
    run(tool("mkfs.ext4").arg("-q").args(arguments).arg(&image));
    let path = sandbox.folder("disk");
    run(tool("mount").args(["-o", "loop,noatime"]).arg(&image).arg(&path));
    path
}
