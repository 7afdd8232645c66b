//! The few system calls that nix and rustix lack, behind safe names.
#![allow(unsafe_code, reason = "the one place where system calls are made by hand")]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

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

/// Calls `statmount` (Linux 6.8) for the root, and the filesystem's type and source, of the mount with this unique
/// number.
///
/// # Errors
///
/// `ENOSYS` before Linux 6.8, `ENOENT` for a mount that is gone, `EOVERFLOW` for strings of more than 16 KiB.
pub fn statmount(mount: u64) -> io::Result<MountStrings> {
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
    let request = MountIdRequest { size, spare: 0, mount, parameter: wanted };
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
