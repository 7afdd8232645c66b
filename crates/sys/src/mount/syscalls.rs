//! The few system calls that nix lacks, behind safe names.
//!
//! Every function takes borrowed file descriptors and owned C strings, so that
//! nothing a caller passes can be dangling; what each guarantees is said there.
#![allow(unsafe_code, reason = "the one place where system calls are made by hand")]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// What [`statx`] tells of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStatus {
    /// File type and permission bits.
    pub mode: u16,
    /// Whether a mount is rooted here; none when the kernel (before 5.8) cannot say.
    pub is_mount_root: Option<bool>,
    /// The mount that the file is seen through; none before Linux 6.8.
    pub mount: Option<UniqueMountId>,
}

/// A mount's number that no other mount gets until the next boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UniqueMountId(u64);

/// `statx` of `name` below `folder`, of the folder itself when the name is
/// empty. A symbolic link is not followed, an automount not triggered.
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

/// Asks [`statx`] for the mount's unique number; the C library's headers lag behind the kernel's.
const STATX_MNT_ID_UNIQUE: u32 = 0x4000;

/// The strings of [`statmount`]; none where the kernel does not give one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountStrings {
    /// The filesystem's type.
    pub filesystem: Option<Vec<u8>>,
    /// The directory of the filesystem that the mount shows.
    pub root: Option<Vec<u8>>,
    /// The filesystem's source; from Linux 6.13.
    pub source: Option<Vec<u8>>,
}

/// `statmount` of one mount (Linux 6.8): its filesystem's type and source, and its root.
///
/// # Errors
///
/// `ENOSYS` before Linux 6.8, `ENOENT` for a mount that is gone, `EOVERFLOW` for strings of more than 16 KiB.
pub fn statmount(mount: UniqueMountId) -> io::Result<MountStrings> {
    // Where the kernel's `struct statmount` keeps what is read here; strings are offsets from its end.
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
    // SAFETY: the request is of the size that it names, and the kernel writes no more than the length that it is told.
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
    /// `fsopen`: begins to configure a filesystem of this type.
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

    /// `fsconfig(FSCONFIG_SET_STRING)`. The kernel takes values of at most 255 bytes.
    pub fn set_string(&self, key: &CStr, value: &CStr) -> io::Result<()> {
        self.configure(1, key.as_ptr(), value.as_ptr())
    }

    /// `fsconfig(FSCONFIG_SET_FLAG)`, such as `ro` for a read-only superblock.
    pub fn set_flag(&self, key: &CStr) -> io::Result<()> {
        self.configure(0, key.as_ptr(), std::ptr::null())
    }

    /// `fsconfig(FSCONFIG_CMD_CREATE)` and `fsmount`: a detached mount with these
    /// `MOUNT_ATTR_*`. It is invisible before [`move_mount`]; dropping it unmounts it.
    pub fn mount(&self, attributes: u64) -> io::Result<OwnedFd> {
        const FSMOUNT_CLOEXEC: u32 = 1;
        self.configure(6, std::ptr::null(), std::ptr::null())?;
        // SAFETY: the descriptor is open and the other arguments are numbers.
        let fd = unsafe {
            libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), FSMOUNT_CLOEXEC, attributes)
        };
        owned(fd)
    }

    /// `key` and `value` end in NUL or are null, as the command asks.
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

/// Takes a descriptor that the kernel has just returned, or the error in its place.
fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor and nothing else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `open_tree(OPEN_TREE_CLONE)`: a detached copy of the mount that `directory`
/// is on, rooted at it. Nobody sees it before [`move_mount`]; dropping it unmounts it.
pub fn clone_mount(directory: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags =
        libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH.cast_unsigned();
    // SAFETY: the descriptor is open, the path is an empty C string, as AT_EMPTY_PATH asks.
    let fd =
        unsafe { libc::syscall(libc::SYS_open_tree, directory.as_raw_fd(), c"".as_ptr(), flags) };
    owned(fd)
}

/// `mount_setattr` on the mount that `mount` is the root of: sets and clears
/// `MOUNT_ATTR_*` in one step and makes its propagation private.
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

/// `move_mount`: attaches a detached mount at `name` below `folder`. A symbolic
/// link at the name is not followed.
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

/// `fsetxattr`: sets an extended attribute of an open file.
pub fn set_extended_attribute(file: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> io::Result<()> {
    // SAFETY: the descriptor is open, the name ends in NUL, and the length is the slice's.
    let done = unsafe {
        libc::fsetxattr(file.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `flistxattr`: the names of an open file's extended attributes; none where the filesystem has none.
pub fn list_extended_attributes(file: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    list_names(|names| {
        // SAFETY: the descriptor is open, and the kernel writes no more than the length that it is told.
        unsafe { libc::flistxattr(file.as_raw_fd(), names.as_mut_ptr().cast(), names.len()) }
    })
}

/// `llistxattr`: the names of the extended attributes of the file at a path, of a symbolic link itself:
/// links cannot be opened for [`list_extended_attributes`].
pub fn list_link_extended_attributes(path: &CStr) -> io::Result<Vec<CString>> {
    list_names(|names| {
        // SAFETY: the path ends in NUL, and the kernel writes no more than the length that it is told.
        unsafe { libc::llistxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) }
    })
}

fn list_names(list: impl FnOnce(&mut [u8]) -> isize) -> io::Result<Vec<CString>> {
    // What the kernel gives at most (XATTR_LIST_MAX).
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

/// `fgetxattr`: the value of an open file's extended attribute.
pub fn extended_attribute(file: BorrowedFd<'_>, name: &CStr) -> io::Result<Vec<u8>> {
    // What the kernel takes at most (XATTR_SIZE_MAX).
    let mut value = vec![0_u8; 64 << 10];
    let (buffer, size) = (value.as_mut_ptr().cast(), value.len());
    // SAFETY: the descriptor is open, the name ends in NUL, and the kernel writes no more than the length that it is told.
    let length = unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), buffer, size) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    value.truncate(length);
    Ok(value)
}

/// `lsetxattr`: sets an extended attribute of the file at a path, of a symbolic
/// link itself: links cannot be opened for [`set_extended_attribute`].
pub fn set_link_extended_attribute(path: &CStr, name: &CStr, value: &[u8]) -> io::Result<()> {
    // SAFETY: both texts end in NUL, and the length is the slice's.
    let done = unsafe {
        libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `sync_file_range(SYNC_FILE_RANGE_WRITE)` over a whole file: the kernel starts to
/// write what is dirty and is not waited for. Promises nothing about durability.
pub fn start_write_back(file: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the descriptor is open and the other arguments are numbers.
    let done =
        unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How the kernel chooses between a thread and others that want the processor (sched(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadClass {
    /// By its share: `SCHED_OTHER`, or whatever the process was given in its place.
    Ordinary,
    /// After all others: `SCHED_IDLE`.
    Idle,
}

/// `sched_setscheduler` of a thread by its number. Coming back from idle takes `CAP_SYS_NICE`.
pub fn set_thread_class(thread: i32, class: ThreadClass) -> io::Result<()> {
    let policy = match class {
        ThreadClass::Ordinary => libc::SCHED_OTHER,
        ThreadClass::Idle => libc::SCHED_IDLE,
    };
    // SAFETY: an all-zero parameter is a valid value of a structure of integers.
    let parameter: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: the parameter outlives the call, which only reads it.
    let done = unsafe { libc::sched_setscheduler(thread, policy, &raw const parameter) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `sched_getscheduler` of a thread by its number.
pub fn thread_class(thread: i32) -> io::Result<ThreadClass> {
    // SAFETY: the call takes a number.
    let policy = unsafe { libc::sched_getscheduler(thread) };
    match policy {
        -1 => Err(io::Error::last_os_error()),
        // A thread keeps a flag beside the policy that says what its children get.
        policy if policy & !libc::SCHED_RESET_ON_FORK == libc::SCHED_IDLE => Ok(ThreadClass::Idle),
        _ => Ok(ThreadClass::Ordinary),
    }
}

/// `mallopt`: all threads share so many pools of memory, and whatever has at least `large` bytes
/// goes back to the system when it is freed. The C library gives each thread a pool of its own
/// else, where what one has freed no other uses, and keeps larger and larger blocks.
#[cfg(target_env = "gnu")]
pub fn share_memory_pools(pools: i32, large: i32) {
    // SAFETY: mallopt takes two numbers; it is called before there are other threads.
    unsafe {
        let _ = libc::mallopt(libc::M_ARENA_MAX, pools);
        let _ = libc::mallopt(libc::M_MMAP_THRESHOLD, large);
    }
}

/// Other C libraries share one pool anyway.
#[cfg(not(target_env = "gnu"))]
pub fn share_memory_pools(_: i32, _: i32) {}

/// `malloc_trim`: memory that was freed goes back to the system, rather than stay for whoever
/// wants as much again.
#[cfg(target_env = "gnu")]
pub fn give_memory_back() {
    // SAFETY: malloc_trim takes a number, and may be called by any thread.
    let _ = unsafe { libc::malloc_trim(0) };
}

/// Other C libraries do so by themselves.
#[cfg(not(target_env = "gnu"))]
pub fn give_memory_back() {}
