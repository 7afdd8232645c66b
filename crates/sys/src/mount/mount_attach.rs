//! Attaching a directory tree at a target: read-only, `nosuid`, `nodev`, in one step.
//!
//! ```text
//! bind       the tree itself; read-only by the flag of the mount, which a container runtime may
//!            clear on its own copy. It can be idmapped, for pods with a user namespace.
//! overlay    overlayfs of lower directories only; its superblock is read-only, so that no flag
//!            of any copy of the mount opens a way to write. It cannot be idmapped.
//! ```
//!
//! On Linux 5.12 and later the mount is made detached, with its flags, and moved to the target. On
//! older kernels it is made on a private staging folder, and that is bound to the target: a bind
//! inherits its source's flags, so the target is never writable either.
//!
//! overlayfs refuses a single lower directory, so an empty directory is the second one. Both are
//! named through open descriptors (`/proc/self/fd/N`): the kernel takes 255 bytes for all lower
//! directories, and the path of a state directory may be longer. The mount table then shows lower
//! directories that identify nothing, so the mount's *source* names the tree.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use parking_lot::Mutex;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use super::mount_target::MountTarget;
use super::syscalls;

/// Flags that a PersistentVolume's `mountOptions` can add; `ro`, `nosuid` and `nodev` are always set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MountFlags {
    /// Forbids to execute files of the volume.
    pub noexec: bool,
    /// Ignores access times, which never change on a read-only mount anyway.
    pub noatime: bool,
}

/// The two forms of a volume's mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountForm {
    /// A read-only bind mount of the tree.
    Bind,
    /// An overlay with a read-only superblock.
    Overlay,
}

/// The open directories that a mount consists of.
#[derive(Clone, Copy, Debug)]
pub enum MountContent<'a> {
    /// The content of a [`MountForm::Bind`].
    Bind {
        /// The tree's root.
        tree: BorrowedFd<'a>,
    },
    /// The content of a [`MountForm::Overlay`].
    Overlay {
        /// The tree's root.
        tree: BorrowedFd<'a>,
        /// An empty directory of the same filesystem.
        empty: BorrowedFd<'a>,
        /// The mount's source in the mount table, at most 255 bytes.
        source: &'a str,
    },
}

/// The system calls that make mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttachMethod {
    /// `open_tree`, `mount_setattr`, `move_mount`.
    Detached,
    /// `mount` on this staging folder, then a bind to the target; for kernels before 5.12.
    Staged(PathBuf),
}

impl AttachMethod {
    /// Detects the best method of this kernel.
    pub fn detect(staging: &Path) -> Self {
        let probe = std::fs::File::open("/")
            .and_then(|root| syscalls::set_mount_attributes(root.as_fd(), 0, u64::MAX));
        // A kernel with this call refuses the impossible attribute with EINVAL, or EPERM without the privilege.
        match probe {
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
                Self::Staged(staging.to_owned())
            }
            _ => Self::Detached,
        }
    }

    /// Returns whether this kernel has overlayfs. The question loads the module of overlayfs.
    pub fn has_overlay(&self) -> bool {
        match fsopen(OVERLAY, FsOpenFlags::FSOPEN_CLOEXEC) {
            Ok(_) => return true,
            Err(rustix::io::Errno::NOSYS) => {}
            Err(error) => return error != rustix::io::Errno::NODEV,
        }
        // Before Linux 5.2, a mount without lower directories fails, but only after the type was found.
        let none = None::<&str>;
        mount(none, "/", Some("overlay"), MsFlags::MS_RDONLY, none) != Err(Errno::ENODEV)
    }

    /// Mounts content read-only at the target, whose folder exists and is empty.
    ///
    /// # Errors
    ///
    /// The kernel's. Nothing is mounted then.
    pub fn attach(
        &self,
        content: MountContent<'_>,
        target: &MountTarget,
        flags: MountFlags,
    ) -> io::Result<()> {
        match self {
            Self::Detached => {
                let mount = match content {
                    MountContent::Bind { tree } => detached_bind(tree, flags),
                    MountContent::Overlay { tree, empty, source } => {
                        detached_overlay(tree, empty, source, flags)
                    }
                }?;
                let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
                Ok(move_mount(mount, c"", &target.folder, &target.name, flags)?)
            }
            Self::Staged(staging) => attach_staged(content, target, flags, staging),
        }
    }
}

const OVERLAY: &std::ffi::CStr = c"overlay";

/// Returns the flags of a volume's mount.
fn attributes(flags: MountFlags) -> MountAttrFlags {
    let mut set = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV;
    set.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, flags.noexec);
    set.set(MountAttrFlags::MOUNT_ATTR_NOATIME, flags.noatime);
    set
}

/// Returns a detached copy of the mount that `directory` lies on, rooted at it. It is invisible, and
/// dropping it unmounts it.
pub(super) fn clone_mount(directory: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(open_tree(directory, c"", flags)?)
}

fn detached_bind(tree: BorrowedFd<'_>, flags: MountFlags) -> io::Result<OwnedFd> {
    let mount = clone_mount(tree)?;
    let mut clear = MountAttrFlags::empty();
    // The state directory may lie on a noexec mount, and a clone inherits that.
    clear.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, !flags.noexec);
    clear.set(MountAttrFlags::MOUNT_ATTR__ATIME, flags.noatime);
    let (set, clear) = (attributes(flags).bits().into(), clear.bits().into());
    syscalls::set_mount_attributes(mount.as_fd(), set, clear)?;
    Ok(mount)
}

fn detached_overlay(
    tree: BorrowedFd<'_>,
    empty: BorrowedFd<'_>,
    source: &str,
    flags: MountFlags,
) -> io::Result<OwnedFd> {
    let filesystem = fsopen(OVERLAY, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&filesystem, c"source", source)?;
    fsconfig_set_string(&filesystem, c"lowerdir", lower_directories(tree, empty))?;
    fsconfig_set_flag(&filesystem, c"ro")?;
    fsconfig_create(&filesystem)?;
    Ok(fsmount(filesystem, FsMountFlags::FSMOUNT_CLOEXEC, attributes(flags))?)
}

fn lower_directories(tree: BorrowedFd<'_>, empty: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}:/proc/self/fd/{}", tree.as_raw_fd(), empty.as_raw_fd())
}

fn attach_staged(
    content: MountContent<'_>,
    target: &MountTarget,
    flags: MountFlags,
    staging: &Path,
) -> io::Result<()> {
    // One private mount holds all staging folders, so that no staged mount propagates to other
    // namespaces. Each attach mounts and unmounts it, so only one runs at a time.
    static STAGING: Mutex<()> = Mutex::new(());
    let _exclusive = STAGING.lock();
    let none = None::<&str>;
    std::fs::create_dir_all(staging)?;
    let place = staging.join(std::process::id().to_string());
    mount(Some(staging), staging, none, MsFlags::MS_BIND, none)?;
    let result = (|| -> io::Result<()> {
        mount(none, staging, none, MsFlags::MS_PRIVATE, none)?;
        // The folder exists if a process with the same number was killed between two steps.
        std::fs::create_dir_all(&place)?;
        let mut set = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        set.set(MsFlags::MS_NOEXEC, flags.noexec);
        set.set(MsFlags::MS_NOATIME, flags.noatime);
        match content {
            MountContent::Bind { tree } => {
                let source = PathBuf::from(format!("/proc/self/fd/{}", tree.as_raw_fd()));
                mount(Some(&source), &place, none, MsFlags::MS_BIND, none)?;
                // A copy of a shared mount would propagate mounts inside of it to all other copies.
                mount(none, &place, none, MsFlags::MS_PRIVATE, none)?;
                let remount = set | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
                mount(none, &place, none, remount, none)?;
            }
            MountContent::Overlay { tree, empty, source } => {
                let lower = format!("lowerdir={}", lower_directories(tree, empty));
                mount(Some(source), &place, Some("overlay"), set, Some(lower.as_str()))?;
            }
        }
        mount(Some(&place), &target.kernel_path(), none, MsFlags::MS_BIND, none)?;
        Ok(())
    })();
    // The target's mount does not need the staged one.
    let _ = umount2(&place, MntFlags::MNT_DETACH);
    let _ = std::fs::remove_dir(&place);
    let _ = umount2(staging, MntFlags::MNT_DETACH);
    result
}
