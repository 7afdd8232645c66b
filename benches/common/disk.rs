//! An ext4 in memory, so that the machine's disk does not affect the times.

use std::path::{Path, PathBuf};

use nix::mount::MsFlags;

use super::support::{DriverOptions, Node, Sandbox, run, tool};

/// Starts a node with all directories, including the kubelet's, on an ext4 in memory. Without a journal, a filesystem
/// that has just lost many files, as after a bench, is slow to create new ones.
pub fn node_in_memory(options: impl FnOnce(DriverOptions) -> DriverOptions) -> Node {
    Node::start_with(|sandbox, defaults| {
        let disk = ext4_in_memory(sandbox, 8 << 30, &["-i", "2048", "-E", "nodiscard"]);
        options(defaults.in_folder(&disk))
    })
}

/// Mounts an ext4 that ends with the sandbox. The arguments are for `mkfs.ext4`.
pub fn ext4_in_memory(sandbox: &Sandbox, bytes: u64, arguments: &[&str]) -> PathBuf {
    ext4_in(sandbox, arguments, |image| {
        run(tool("truncate").args(["-s", &bytes.to_string()]).arg(image));
    })
}

/// Mounts an ext4 with all of its memory allocated before, so that none of it is charged to the process that writes.
pub fn allocated_ext4_in_memory(sandbox: &Sandbox, bytes: u64, arguments: &[&str]) -> PathBuf {
    ext4_in(sandbox, arguments, |image| {
        run(tool("fallocate").args(["-l", &bytes.to_string()]).arg(image));
    })
}

fn ext4_in(sandbox: &Sandbox, arguments: &[&str], make_image: impl FnOnce(&Path)) -> PathBuf {
    let image = sandbox.tmpfs("memory", MsFlags::empty()).join("ext4");
    make_image(&image);
    run(tool("mkfs.ext4").arg("-q").args(arguments).arg(&image));
    let path = sandbox.folder("disk");
    run(tool("mount").args(["-o", "loop,noatime"]).arg(&image).arg(&path));
    path
}
