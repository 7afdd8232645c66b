//! The few system calls that nix lacks, behind safe names.
//!
//! Every function takes borrowed file descriptors and C strings, so that no
//! argument can be dangling. Each function documents its guarantees.
#![allow(unsafe_code, reason = "the one place where system calls are made by hand")]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// The result of [`statx`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStatus {
    /// File type and permission bits.
    pub mode: u16,
    /// True if the file is the root of a mount. Unknown to kernels before 5.8.
    pub is_mount_root: Option<bool>,
    /// The mount that the file was found through. Unknown to kernels before 6.8.
    pub mount: Option<UniqueMountId>,
}

/// A mount's number, which no other mount gets until the next boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UniqueMountId(u64);

/// Calls `statx` on `name` below `folder`, or on the folder itself if the name is
/// empty. Follows no symbolic link and triggers no automount.
pub fn statx(folder: BorrowedFd<'_>, name: &CStr) -> io::Result<FileStatus> {
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT | libc::AT_EMPTY_PATH;
    let mask = libc::STATX_TYPE | libc::STATX_MODE | STATX_MNT_ID_UNIQUE;
    // SAFETY: an all-zero statx is a valid value of a structure of integers.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, the name ends in NUL, the buffer is as large as the kernel writes.
    let done =
        unsafe { libc::statx(folder.as_raw_fd(), name.as_ptr(), flags, mask, &raw mut status) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let mount_root = u64::from(libc::STATX_ATTR_MOUNT_ROOT.cast_unsigned());
    let knows = status.stx_attributes_mask & mount_root != 0;
    let is_unique = status.stx_mask & STATX_MNT_ID_UNIQUE != 0;
    Ok(FileStatus {
        mode: status.stx_mode,
        is_mount_root: knows.then_some(status.stx_attributes & mount_root != 0),
        mount: is_unique.then_some(UniqueMountId(status.stx_mnt_id)),
    })
}

/// The flag of [`statx`] for the mount's unique number. It is defined here because the C library's
/// headers lag behind the kernel's.
const STATX_MNT_ID_UNIQUE: u32 = 0x4000;

/// The strings of [`statmount`], as far as the kernel returns them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountStrings {
    /// The filesystem's type, such as `ext4`.
    pub filesystem: Option<Vec<u8>>,
    /// The directory of the filesystem that is mounted.
    pub root: Option<Vec<u8>>,
    /// The filesystem's source, from Linux 6.13 on.
    pub source: Option<Vec<u8>>,
}

/// Calls `statmount` (Linux 6.8) for a mount's root and its filesystem's type and source.
///
/// # Errors
///
/// `ENOSYS` before Linux 6.8, `ENOENT` for a mount that is gone, `EOVERFLOW` for strings of more than 16 KiB.
pub fn statmount(mount: UniqueMountId) -> io::Result<MountStrings> {
    // Offsets of fields in the kernel's `struct statmount`. Strings are given as offsets from its end.
    const MASK: usize = 8;
    const FILESYSTEM: usize = 36;
    const ROOT: usize = 104;
    const SOURCE: usize = 124;
    const STRINGS: usize = 512;
    const STATMOUNT_MNT_ROOT: u64 = 0x8;
    const STATMOUNT_FS_TYPE: u64 = 0x20;
    const STATMOUNT_SB_SOURCE: u64 = 0x200;
    // The same number on all architectures that this driver is built for.
    const SYS_STATMOUNT: libc::c_long = 457;
    #[repr(C)]
    struct MountIdRequest {
        size: u32,
        spare: u32,
        mount: u64,
        parameter: u64,
    }
    let wanted = STATMOUNT_MNT_ROOT | STATMOUNT_FS_TYPE | STATMOUNT_SB_SOURCE;
    let size = u32::try_from(size_of::<MountIdRequest>()).unwrap_or(u32::MAX);
    let request = MountIdRequest { size, spare: 0, mount: mount.0, parameter: wanted };
    let mut answer = vec![0_u8; STRINGS + (16 << 10)];
    let (buffer, length) = (answer.as_mut_ptr(), answer.len());
    // SAFETY: the request is of the size that it names, and the kernel writes no more than the passed length.
    let done = unsafe { libc::syscall(SYS_STATMOUNT, &raw const request, buffer, length, 0_u32) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let number = |at: usize| u32::from_ne_bytes(std::array::from_fn(|byte| answer[at + byte]));
    let given = u64::from_ne_bytes(std::array::from_fn(|byte| answer[MASK + byte]));
    let string = |bit: u64, at: usize| {
        let start = STRINGS.checked_add(usize::try_from(number(at)).ok()?)?;
        let text = CStr::from_bytes_until_nul(answer.get(start..)?).ok()?;
        (given & bit != 0).then(|| text.to_bytes().to_owned())
    };
    Ok(MountStrings {
        filesystem: string(STATMOUNT_FS_TYPE, FILESYSTEM),
        root: string(STATMOUNT_MNT_ROOT, ROOT),
        source: string(STATMOUNT_SB_SOURCE, SOURCE),
    })
}

/// A filesystem that is being configured, before it is mounted.
#[derive(Debug)]
pub struct FilesystemContext(OwnedFd);

impl FilesystemContext {
    /// Calls `fsopen`, which begins to configure a filesystem of this type.
    ///
    /// # Errors
    ///
    /// `ENODEV` where the kernel has no such filesystem, `ENOSYS` before Linux 5.2.
    pub fn open(filesystem: &CStr) -> io::Result<Self> {
        const FSOPEN_CLOEXEC: u32 = 1;
        // SAFETY: the name ends in NUL.
        let fd = unsafe { libc::syscall(libc::SYS_fsopen, filesystem.as_ptr(), FSOPEN_CLOEXEC) };
        owned(fd).map(Self)
    }

    /// Calls `fsconfig(FSCONFIG_SET_STRING)`. The kernel takes values of at most 255 bytes.
    pub fn set_string(&self, key: &CStr, value: &CStr) -> io::Result<()> {
        self.configure(1, key.as_ptr(), value.as_ptr())
    }

    /// Calls `fsconfig(FSCONFIG_SET_FLAG)`, with `ro` for a read-only superblock.
    pub fn set_flag(&self, key: &CStr) -> io::Result<()> {
        self.configure(0, key.as_ptr(), std::ptr::null())
    }

    /// Calls `fsconfig(FSCONFIG_CMD_CREATE)` and `fsmount`, and returns a detached mount with these
    /// `MOUNT_ATTR_*` flags. It is invisible before [`move_mount`]. Dropping it unmounts it.
    pub fn mount(&self, attributes: u64) -> io::Result<OwnedFd> {
        const FSMOUNT_CLOEXEC: u32 = 1;
        self.configure(6, std::ptr::null(), std::ptr::null())?;
        // SAFETY: the descriptor is open and the other arguments are numbers.
        let fd = unsafe {
            libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), FSMOUNT_CLOEXEC, attributes)
        };
        owned(fd)
    }

    /// Calls `fsconfig` with a key and a value that end in NUL or are null, as the command demands.
    fn configure(
        &self,
        command: u32,
        key: *const libc::c_char,
        value: *const libc::c_char,
    ) -> io::Result<()> {
        // SAFETY: the descriptor is open; both pointers are null or come from a C string that the caller borrows.
        let done = unsafe {
            libc::syscall(libc::SYS_fsconfig, self.0.as_raw_fd(), command, key, value, 0_i32)
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Takes ownership of a descriptor that the kernel has just returned, or returns its error.
fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor and nothing else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Calls `open_tree(OPEN_TREE_CLONE)`, and returns a detached copy of the mount that `directory`
/// lies on, rooted at it. It is invisible before [`move_mount`]. Dropping it unmounts it.
pub fn clone_mount(directory: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags =
        libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH.cast_unsigned();
    // SAFETY: the descriptor is open, the path is an empty C string, as AT_EMPTY_PATH asks.
    let fd =
        unsafe { libc::syscall(libc::SYS_open_tree, directory.as_raw_fd(), c"".as_ptr(), flags) };
    owned(fd)
}

/// Calls `mount_setattr` on the mount that `mount` is the root of: sets and clears
/// `MOUNT_ATTR_*` flags in one step, and makes its propagation private.
pub fn set_mount_attributes(mount: BorrowedFd<'_>, set: u64, clear: u64) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: clear,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the descriptor is open, the path is an empty C string, and the structure's own size is passed.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Calls `move_mount`, which attaches a detached mount at `name` below `folder`. Follows no symbolic
/// link at the name.
pub fn move_mount(mount: BorrowedFd<'_>, folder: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    // SAFETY: both descriptors are open and both paths end in NUL.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            folder.as_raw_fd(),
            name.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Calls `fsetxattr`, which sets an extended attribute of an open file.
pub fn set_extended_attribute(file: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> io::Result<()> {
    // SAFETY: the descriptor is open, the name ends in NUL, and the length is the slice's.
    let done = unsafe {
        libc::fsetxattr(file.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Calls `flistxattr`, and returns the names of an open file's extended attributes. Returns none on a
/// filesystem without extended attributes.
pub fn list_extended_attributes(file: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    list_names(|names| {
        // SAFETY: the descriptor is open, and the kernel writes no more than the passed length.
        unsafe { libc::flistxattr(file.as_raw_fd(), names.as_mut_ptr().cast(), names.len()) }
    })
}

/// Calls `llistxattr`, and returns the names of the extended attributes of the file at a path. Follows
/// no symbolic link: links cannot be opened for [`list_extended_attributes`].
pub fn list_link_extended_attributes(path: &CStr) -> io::Result<Vec<CString>> {
    list_names(|names| {
        // SAFETY: the path ends in NUL, and the kernel writes no more than the passed length.
        unsafe { libc::llistxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) }
    })
}

fn list_names(list: impl FnOnce(&mut [u8]) -> isize) -> io::Result<Vec<CString>> {
    // The kernel returns no more (XATTR_LIST_MAX).
    let mut names = vec![0_u8; 64 << 10];
    let Ok(length) = usize::try_from(list(&mut names)) else {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Unsupported {
            Ok(Vec::new())
        } else {
            Err(error)
        };
    };
    let names = names[..length].split_inclusive(|&byte| byte == 0);
    Ok(names.filter_map(|name| CStr::from_bytes_with_nul(name).ok().map(CStr::to_owned)).collect())
}

/// Calls `fgetxattr`, and returns the value of an open file's extended attribute.
pub fn extended_attribute(file: BorrowedFd<'_>, name: &CStr) -> io::Result<Vec<u8>> {
    // The kernel stores no more (XATTR_SIZE_MAX).
    let mut value = vec![0_u8; 64 << 10];
    let (buffer, size) = (value.as_mut_ptr().cast(), value.len());
    // SAFETY: the descriptor is open, the name ends in NUL, and the kernel writes no more than the passed length.
    let length = unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), buffer, size) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    value.truncate(length);
    Ok(value)
}

/// Calls `lsetxattr`, which sets an extended attribute of the file at a path. Follows no symbolic
/// link: links cannot be opened for [`set_extended_attribute`].
pub fn set_link_extended_attribute(path: &CStr, name: &CStr, value: &[u8]) -> io::Result<()> {
    // SAFETY: both texts end in NUL, and the length is the slice's.
    let done = unsafe {
        libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Calls `sync_file_range(SYNC_FILE_RANGE_WRITE)` on a whole file: the kernel starts to write dirty
/// pages, and the call does not wait for it. Promises nothing about durability.
pub fn start_write_back(file: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the descriptor is open and the other arguments are numbers.
    let done =
        unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Calls `mallopt`: all threads share `arenas` arenas, and blocks of at least `large` bytes go back to
/// the system when they are freed. By default the C library gives each thread an arena, whose freed
/// memory no other thread uses, and keeps larger and larger blocks.
#[cfg(target_env = "gnu")]
pub fn limit_malloc_arenas(arenas: i32, large: i32) {
    // SAFETY: mallopt takes two numbers; it is called before there are other threads.
    unsafe {
        let _ = libc::mallopt(libc::M_ARENA_MAX, arenas);
        let _ = libc::mallopt(libc::M_MMAP_THRESHOLD, large);
    }
}

/// Does nothing: other C libraries share one arena anyway.
#[cfg(not(target_env = "gnu"))]
pub fn limit_malloc_arenas(_: i32, _: i32) {}

/// Calls `malloc_trim`, which returns freed memory to the system rather than keep it for later
/// allocations.
#[cfg(target_env = "gnu")]
pub fn trim_heap() {
    // SAFETY: malloc_trim takes a number, and may be called by any thread.
    let _ = unsafe { libc::malloc_trim(0) };
}

/// Does nothing: other C libraries return freed memory by themselves.
#[cfg(not(target_env = "gnu"))]
pub fn trim_heap() {}
