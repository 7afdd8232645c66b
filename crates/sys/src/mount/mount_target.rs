//! The target of a volume's mount: a name below a folder that is held open.
//!
//! The folder is opened component by component without following symbolic
//! links below the base (the kubelet's folder). All calls are relative to the
//! open folder, so that no process can swap the path between two steps.
//! The only thing that this module removes is one empty folder.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use rustix::fs::{AtFlags, FileType, Statx, StatxAttributes, StatxFlags, statx};

use super::mount_attach::clone_mount;
use super::mount_table::{MountOrigin, MountTable};
use super::syscalls::{self, MountStrings};

/// The flag of `statx` for the mount's unique number, which no other mount gets until the next boot
/// (Linux 6.8).
const STATX_MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// A name below an open folder, where a volume is mounted.
pub struct MountTarget {
    pub(super) folder: OwnedFd,
    pub(super) name: CString,
}

/// A filesystem that is kept without being mounted anywhere. Dropping it may block.
pub struct DetachedFilesystem(#[expect(dead_code, reason = "held until it is dropped")] OwnedFd);

/// The state of a target now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetState {
    /// No file has the target's name.
    Missing,
    /// An empty folder without a mount, as after a reboot.
    EmptyFolder,
    /// The root of a mount, the topmost of a stack, whether this driver made it or not.
    Mounted(MountOrigin),
    /// A file, a link, or a folder that is not empty.
    Occupied,
}

/// The reason that a mount cannot be unmounted.
#[derive(Debug, thiserror::Error)]
pub enum UnmountError {
    /// Another mount lies inside, at this path.
    #[error("the mount at {} lies inside: unmount that first", .0.display())]
    Nested(PathBuf),
    /// The kernel refused.
    #[error(transparent)]
    Kernel(#[from] io::Error),
}

impl MountTarget {
    /// Opens the folder that holds the target. `relative` has at least one
    /// component and neither `.` nor `..`.
    ///
    /// # Errors
    ///
    /// `NotFound` when the folder does not exist; `InvalidInput` for a path that
    /// is not of that form; `ELOOP` or `ENOTDIR` where a symbolic link is in the way.
    pub fn open(base: &Path, relative: &Path) -> io::Result<Self> {
        let mut names = Vec::new();
        for component in relative.components() {
            let Component::Normal(name) = component else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            names.push(CString::new(name.as_bytes())?);
        }
        let name = names.pop().ok_or(io::ErrorKind::InvalidInput)?;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut folder = open(base, flags, Mode::empty())?;
        for step in names {
            folder = openat(&folder, step.as_c_str(), flags | OFlag::O_NOFOLLOW, Mode::empty())?;
        }
        Ok(Self { folder, name })
    }

    /// Reads the state of the target, without following a link.
    pub fn state(&self) -> io::Result<TargetState> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::EMPTY_PATH;
        let mask = StatxFlags::TYPE | StatxFlags::MODE | STATX_MNT_ID_UNIQUE;
        let status = match statx(&self.folder, &self.name, flags, mask) {
            Err(rustix::io::Errno::NOENT) => return Ok(TargetState::Missing),
            status => status?,
        };
        if let Some(origin) = self.mount_of(&status)? {
            return Ok(TargetState::Mounted(origin));
        }
        let is_folder = FileType::from_raw_mode(status.stx_mode.into()) == FileType::Directory;
        if is_folder && std::fs::read_dir(self.kernel_path())?.next().is_none() {
            return Ok(TargetState::EmptyFolder);
        }
        Ok(TargetState::Occupied)
    }

    /// Creates the target's folder. Returns `false` if it existed.
    pub fn create(&self) -> io::Result<bool> {
        // The kubelet gives the folder above it the same mode.
        match mkdirat(&self.folder, self.name.as_c_str(), Mode::from_bits_truncate(0o750)) {
            Ok(()) => Ok(true),
            Err(Errno::EEXIST) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes the target if it is an empty folder without a mount. Leaves anything else.
    pub fn remove_if_empty(&self) -> io::Result<()> {
        match unlinkat(&self.folder, self.name.as_c_str(), UnlinkatFlags::RemoveDir) {
            Ok(()) | Err(Errno::ENOENT | Errno::ENOTEMPTY | Errno::EBUSY | Errno::ENOTDIR) => {
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Returns the origin of the mount whose root has this status, if it is the root of a mount. Asks
    /// the kernel about this mount alone (Linux 6.13), and reads the whole table on older kernels.
    fn mount_of(&self, status: &Statx) -> io::Result<Option<MountOrigin>> {
        // Kernels before 5.8 do not know whether a file is the root of a mount.
        let knows_roots = status.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT);
        if knows_roots && !status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            return Ok(None);
        }
        if knows_roots
            && status.stx_mask & STATX_MNT_ID_UNIQUE.bits() != 0
            && let Ok(strings) = syscalls::statmount(status.stx_mnt_id)
            && let Some(origin) = origin(strings)
        {
            return Ok(Some(origin));
        }
        let table = MountTable::read()?;
        Ok(table.top_at(&self.path()?).map(|entry| entry.origin.clone()))
    }

    /// Returns the origins of all mounts at the target, the lowest first, from the whole table.
    pub fn stack(&self) -> io::Result<Vec<MountOrigin>> {
        let path = self.path()?;
        let table = MountTable::read()?;
        let stack = table.iter().filter(|entry| entry.mount_point == path);
        Ok(stack.map(|entry| entry.origin.clone()).collect())
    }

    /// Keeps the filesystem of the topmost mount while the mount is unmounted. Returns none where the
    /// kernel has no such call (before Linux 5.2): unmounting frees the filesystem then.
    pub fn hold_filesystem(&self) -> Option<DetachedFilesystem> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let root = openat(&self.folder, self.name.as_c_str(), flags, Mode::empty()).ok()?;
        clone_mount(root.as_fd()).ok().map(DetachedFilesystem)
    }

    /// Unmounts the topmost mount. One that is in use is unmounted lazily: a process with open files
    /// keeps them, and the path is free at once.
    ///
    /// May block while the kernel frees each name that was looked up in an overlay, unless
    /// [`Self::hold_filesystem`] keeps the filesystem.
    ///
    /// # Errors
    ///
    /// [`UnmountError::Nested`] if another mount lies inside: a lazy unmount would remove it as well.
    pub fn unmount_top(&self) -> Result<(), UnmountError> {
        let path = self.kernel_path();
        if umount2(&path, MntFlags::UMOUNT_NOFOLLOW).is_ok() {
            return Ok(());
        }
        if let Some(nested) = MountTable::read()?.nested_in(&self.path()?) {
            return Err(UnmountError::Nested(nested.mount_point.clone()));
        }
        Ok(umount2(&path, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH)
            .map_err(io::Error::from)?)
    }

    /// Returns the target's path without symbolic links, as the mount table shows it.
    fn path(&self) -> io::Result<PathBuf> {
        let folder = std::fs::read_link(format!("/proc/self/fd/{}", self.folder.as_raw_fd()))?;
        Ok(folder.join(OsStr::from_bytes(self.name.as_bytes())))
    }

    /// Returns a path through the open folder, for calls that take no descriptor.
    pub(super) fn kernel_path(&self) -> PathBuf {
        let folder = PathBuf::from(format!("/proc/self/fd/{}", self.folder.as_raw_fd()));
        folder.join(OsStr::from_bytes(self.name.as_bytes()))
    }
}

/// Returns the origin of a mount, unless the kernel left a string out.
fn origin(strings: MountStrings) -> Option<MountOrigin> {
    Some(MountOrigin {
        filesystem: String::from_utf8(strings.filesystem?).ok()?,
        source: OsString::from_vec(strings.source?),
        root: OsString::from_vec(strings.root?).into(),
    })
}
