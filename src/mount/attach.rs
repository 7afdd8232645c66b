//! Attaching a directory tree at a target: read-only, `nosuid`, `nodev`, in one step.
//!
//! On Linux 5.12 and later the mount is cloned detached, given its flags with
//! `mount_setattr`, and moved to the target. On older kernels it is bound and
//! remounted on a private staging folder, and that is bound to the target: a
//! bind inherits its source's flags, so the target is never writable either.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::syscalls;
use super::target::Target;

/// Flags that a PersistentVolume's `mountOptions` can add; `ro`, `nosuid` and `nodev` are always on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MountFlags {
    /// Nothing in the volume can be executed.
    pub noexec: bool,
    /// Access times are not looked at; on a read-only mount they never change anyway.
    pub noatime: bool,
}

/// How mounts are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttachMethod {
    /// `open_tree`, `mount_setattr`, `move_mount`.
    Detached,
    /// Bind and remount in this folder first; for kernels before 5.12.
    Staged(PathBuf),
}

impl AttachMethod {
    /// The best that this kernel has.
    #[must_use]
    pub fn detect(staging: &Path) -> Self {
        let probe = std::fs::File::open("/")
            .and_then(|root| syscalls::set_mount_attributes(root.as_fd(), 0, u64::MAX));
        // A kernel that knows the call refuses the impossible attribute with EINVAL (or EPERM without the right).
        match probe {
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
                Self::Staged(staging.to_owned())
            }
            _ => Self::Detached,
        }
    }

    /// Makes the content of `tree` (an open directory) appear at the target,
    /// whose folder exists and is empty.
    ///
    /// # Errors
    ///
    /// The kernel's; nothing is mounted then.
    pub fn attach(
        &self,
        tree: BorrowedFd<'_>,
        target: &Target,
        flags: MountFlags,
    ) -> io::Result<()> {
        match self {
            Self::Detached => detached(tree, target, flags),
            Self::Staged(staging) => staged(tree, target, flags, staging),
        }
    }
}

fn detached(tree: BorrowedFd<'_>, target: &Target, flags: MountFlags) -> io::Result<()> {
    let mount = syscalls::clone_mount(tree)?;
    let mut set = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    let mut clear = 0;
    if flags.noexec {
        set |= libc::MOUNT_ATTR_NOEXEC;
    } else {
        // The state directory may lie on a noexec mount, and a clone inherits that.
        clear |= libc::MOUNT_ATTR_NOEXEC;
    }
    if flags.noatime {
        set |= libc::MOUNT_ATTR_NOATIME;
        clear |= libc::MOUNT_ATTR__ATIME;
    }
    syscalls::set_mount_attributes(mount.as_fd(), set, clear)?;
    syscalls::move_mount(mount.as_fd(), target.folder(), target.name())
}

fn staged(
    tree: BorrowedFd<'_>,
    target: &Target,
    flags: MountFlags,
    staging: &Path,
) -> io::Result<()> {
    // One private mount holds all staging folders, so that nothing staged spreads to other
    // namespaces; it comes and goes with each attach, so they take turns.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let none = None::<&str>;
    std::fs::create_dir_all(staging)?;
    let place = staging.join(format!("{}-{}", std::process::id(), tree.as_raw_fd()));
    mount(Some(staging), staging, none, MsFlags::MS_BIND, none)?;
    let result = (|| -> io::Result<()> {
        mount(none, staging, none, MsFlags::MS_PRIVATE, none)?;
        std::fs::create_dir(&place)?;
        let source = PathBuf::from(format!("/proc/self/fd/{}", tree.as_raw_fd()));
        mount(Some(&source), &place, none, MsFlags::MS_BIND, none)?;
        let mut remount = MsFlags::MS_BIND
            | MsFlags::MS_REMOUNT
            | MsFlags::MS_RDONLY
            | MsFlags::MS_NOSUID
            | MsFlags::MS_NODEV;
        remount.set(MsFlags::MS_NOEXEC, flags.noexec);
        remount.set(MsFlags::MS_NOATIME, flags.noatime);
        mount(none, &place, none, remount, none)?;
        mount(Some(&place), &target.kernel_path(), none, MsFlags::MS_BIND, none)?;
        Ok(())
    })();
    // The target's mount does not need the staged one.
    let _ = umount2(&place, MntFlags::MNT_DETACH);
    let _ = std::fs::remove_dir(&place);
    let _ = umount2(staging, MntFlags::MNT_DETACH);
    result
}
