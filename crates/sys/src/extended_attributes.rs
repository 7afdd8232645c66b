//! Extended attributes of files.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::BorrowedFd;

use rustix::buffer::spare_capacity;
use rustix::fs::{XattrFlags, fgetxattr, flistxattr, fsetxattr, llistxattr, lsetxattr};
use rustix::io::Errno;

/// Maximum bytes of a value, and of all names of a file together, in Linux.
const MAXIMUM_BYTES: usize = 64 << 10;

/// Sets an attribute of an open file.
pub fn set(file: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> io::Result<()> {
    Ok(fsetxattr(file, name, value, XattrFlags::empty())?)
}

/// Sets an attribute of the file at a path. Follows no symbolic link: links cannot be opened.
pub fn set_at(path: &CStr, name: &CStr, value: &[u8]) -> io::Result<()> {
    Ok(lsetxattr(path, name, value, XattrFlags::empty())?)
}

/// Returns the value of an attribute of an open file.
pub fn value(file: BorrowedFd<'_>, name: &CStr) -> io::Result<Vec<u8>> {
    let mut value = Vec::with_capacity(MAXIMUM_BYTES);
    fgetxattr(file, name, spare_capacity(&mut value))?;
    Ok(value)
}

/// Returns the names of an open file's attributes; none on a filesystem without attributes.
pub fn names(file: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    split(|names| flistxattr(file, spare_capacity(names)))
}

/// Returns the names of the attributes of the file at a path. Follows no symbolic link.
pub fn names_at(path: &CStr) -> io::Result<Vec<CString>> {
    split(|names| llistxattr(path, spare_capacity(names)))
}

fn split(list: impl FnOnce(&mut Vec<u8>) -> Result<usize, Errno>) -> io::Result<Vec<CString>> {
    let mut names = Vec::with_capacity(MAXIMUM_BYTES);
    match list(&mut names) {
        Ok(_) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
        Err(error) => return Err(error.into()),
    }
    let names = names.split_inclusive(|&byte| byte == 0);
    Ok(names.filter_map(|name| CStr::from_bytes_with_nul(name).ok().map(CStr::to_owned)).collect())
}
