//! A place where a volume appears: a name below a folder that is held open.
//!
//! The folder is reached component by component without following symbolic
//! links below the base (the kubelet's folder), and everything is done relative
//! to the open folder, so that nobody can swap the path between two steps.
//! Nothing here removes anything but one empty folder.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, SFlag, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::syscalls::{self, FileStatus, MountStrings};
use super::table::{MountOrigin, MountTable};

/// A place where a volume appears.
#[derive(Debug)]
pub struct Target {
    folder: OwnedFd,
    name: CString,
}

/// A filesystem that is held without being mounted anywhere. Dropping it may block.
#[derive(Debug)]
pub struct DetachedFilesystem(#[expect(dead_code, reason = "held until it is dropped")] OwnedFd);

/// What is at a target now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetState {
    /// Nothing.
    Missing,
    /// An empty folder, as after a reboot.
    EmptyFolder,
    /// The root of a mount, the topmost of a stack: this driver's or another.
    Mounted(MountOrigin),
    /// A file, a link, or a folder with something in it.
    Occupied,
}

/// Why a mount cannot be taken away.
#[derive(Debug, thiserror::Error)]
pub enum UnmountError {
    /// Another mount lies inside, at this path.
    #[error("the mount at {} lies inside: unmount that first", .0.display())]
    Nested(PathBuf),
    /// The kernel refused.
    #[error(transparent)]
    Kernel(#[from] io::Error),
}

impl Target {
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

    /// Looks at the target without following a link.
    pub fn state(&self) -> io::Result<TargetState> {
        let status = match syscalls::statx(self.folder.as_fd(), &self.name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(TargetState::Missing);
            }
            status => status?,
        };
        if let Some(origin) = self.mount_of(&status)? {
            return Ok(TargetState::Mounted(origin));
        }
        let is_folder = u32::from(status.mode) & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits();
        if is_folder && std::fs::read_dir(self.kernel_path())?.next().is_none() {
            return Ok(TargetState::EmptyFolder);
        }
        Ok(TargetState::Occupied)
    }

    /// Makes the target's folder; `false` when it was there.
    pub fn create(&self) -> io::Result<bool> {
        // As the kubelet makes the folder above it.
        match mkdirat(&self.folder, self.name.as_c_str(), Mode::from_bits_truncate(0o750)) {
            Ok(()) => Ok(true),
            Err(Errno::EEXIST) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes the target if it is an empty folder without a mount; anything else stays.
    pub fn remove_if_empty(&self) -> io::Result<()> {
        match unlinkat(&self.folder, self.name.as_c_str(), UnlinkatFlags::RemoveDir) {
            Ok(()) | Err(Errno::ENOENT | Errno::ENOTEMPTY | Errno::EBUSY | Errno::ENOTDIR) => {
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The mount whose root has this status, if it is one. Asks the kernel about this
    /// mount alone (Linux 6.13); older kernels have only the whole table.
    fn mount_of(&self, status: &FileStatus) -> io::Result<Option<MountOrigin>> {
        if status.is_mount_root == Some(false) {
            return Ok(None);
        }
        if status.is_mount_root.is_some()
            && let Some(id) = status.mount
            && let Ok(strings) = syscalls::statmount(id)
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

    /// Holds the filesystem of the topmost mount, which can be unmounted meanwhile. Returns none where
    /// the kernel cannot do so (before Linux 5.2): unmounting frees the filesystem then.
    #[must_use]
    pub fn hold_filesystem(&self) -> Option<DetachedFilesystem> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let root = openat(&self.folder, self.name.as_c_str(), flags, Mode::empty()).ok()?;
        syscalls::clone_mount(root.as_fd()).ok().map(DetachedFilesystem)
    }

    /// Takes the topmost mount away. One that is in use goes lazily: a process that
    /// still has files open keeps them, the path is free at once.
    ///
    /// May block while the kernel frees each name that was looked up in an overlay, unless
    /// [`Self::hold_filesystem`] holds the filesystem.
    ///
    /// # Errors
    ///
    /// [`UnmountError::Nested`] where another mount lies inside: a lazy unmount would take it along.
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

    /// The target's path without symbolic links, as the mount table names it.
    fn path(&self) -> io::Result<PathBuf> {
        let folder = std::fs::read_link(format!("/proc/self/fd/{}", self.folder.as_raw_fd()))?;
        Ok(folder.join(OsStr::from_bytes(self.name.as_bytes())))
    }

    pub(super) fn folder(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }

    pub(super) fn name(&self) -> &CString {
        &self.name
    }

    /// A path for calls that take no descriptor, through the open folder.
    pub(super) fn kernel_path(&self) -> PathBuf {
        let folder = PathBuf::from(format!("/proc/self/fd/{}", self.folder.as_raw_fd()));
        folder.join(OsStr::from_bytes(self.name.as_bytes()))
    }
}

/// None where the kernel left a string out.
fn origin(strings: MountStrings) -> Option<MountOrigin> {
    Some(MountOrigin {
        filesystem: String::from_utf8(strings.filesystem?).ok()?,
        source: OsString::from_vec(strings.source?),
        root: OsString::from_vec(strings.root?).into(),
    })
}
