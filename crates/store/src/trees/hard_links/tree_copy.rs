//! Second names of a whole tree: folders and symbolic links of their own, whose files are the same inodes.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, UtimensatFlags, fstatat, mkdirat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat, linkat, symlinkat};

use super::link_overflow::Copies;
use super::way_to;
use crate::SecurityLabel;
use crate::disk_units::bytes_of_a_name;
use crate::inode_metadata::{set_owner_and_mode, too_large};
use crate::write_meter::{WriteMeter, full};
use sys::background;
use sys::extended_attributes;
use unpack::Permissions;

/// Gives a tree second names.
pub(super) struct TreeCopier<'a> {
    pub(super) label: Option<&'a SecurityLabel>,
    pub(super) meter: &'a WriteMeter,
    pub(super) copies: &'a Copies<'a>,
    /// Numbers of the inodes that have all the names that they can have.
    pub(super) full: HashMap<(u64, u64), u32>,
}

const FOLDER: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

impl TreeCopier<'_> {
    /// Fills the new folder `to` with what the folder `from` shows. The depth of a tree is limited, so the recursion is.
    pub(super) fn fill(&mut self, from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
        let mut listing = Dir::from_fd(from.try_clone()?)?;
        for entry in listing.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            background::yield_to_pods();
            let length = u8::try_from(name.to_bytes().len()).unwrap_or(u8::MAX);
            self.meter.writes(bytes_of_a_name(length)).map_err(full)?;
            let status = fstatat(from, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            let kind = SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT;
            if kind == SFlag::S_IFDIR {
                self.meter.makes(1).map_err(full)?;
                mkdirat(to, name, Mode::S_IRWXU)?;
                let inner = openat(to, name, FOLDER, Mode::empty())?;
                self.fill(&openat(from, name, FOLDER, Mode::empty())?, &inner)?;
            } else if kind == SFlag::S_IFLNK {
                self.symbolic_link(from, to, name, &status)?;
            } else {
                self.link(from, to, name, &status)?;
            }
        }
        self.finish_folder(from, to)
    }

    fn link(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        name: &CStr,
        status: &FileStat,
    ) -> io::Result<()> {
        match linkat(from, name, to, name, AtFlags::empty()) {
            Err(Errno::EMLINK) => {
                let next = u32::try_from(self.full.len()).unwrap_or(u32::MAX);
                let number = *self.full.entry((status.st_dev, status.st_ino)).or_insert(next);
                self.copies.link(number, &way_to(from, name), to, name)
            }
            linked => Ok(linked?),
        }
    }

    fn symbolic_link(
        &self,
        from: &OwnedFd,
        to: &OwnedFd,
        name: &CStr,
        status: &FileStat,
    ) -> io::Result<()> {
        self.meter.makes(1).map_err(full)?;
        symlinkat(readlinkat(from, name)?.as_os_str(), to, name)?;
        let (owner, group) = (Uid::from_raw(status.st_uid), Gid::from_raw(status.st_gid));
        fchownat(to, name, Some(owner), Some(group), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let time = TimeSpec::new(status.st_mtime, status.st_mtime_nsec);
        // A time that the filesystem cannot hold is not worth a volume.
        let _ = utimensat(to, name, &time, &time, UtimensatFlags::NoFollowSymlink);
        if let Some(label) = self.label {
            label.apply_to_link(&CString::new(way_to(to, name).as_os_str().as_bytes())?)?;
        }
        Ok(())
    }

    /// Sets the metadata last: making children changes a folder's time, and its mode may forbid making them.
    fn finish_folder(&self, from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
        let (from, to) = (File::from(from.try_clone()?), File::from(to.try_clone()?));
        for name in extended_attributes::names(from.as_fd())? {
            // Others belong to the node, which gives new folders their own.
            if name.to_bytes().starts_with(b"user.") {
                let value = extended_attributes::value(from.as_fd(), &name)?;
                extended_attributes::set(to.as_fd(), &name, &value).map_err(too_large)?;
            }
        }
        if let Some(label) = self.label {
            label.apply(to.as_fd())?;
        }
        let metadata = from.metadata()?;
        let (mode, uid, gid) = (metadata.mode() & 0o777, metadata.uid(), metadata.gid());
        set_owner_and_mode(&to, Permissions { mode, uid, gid })?;
        to.set_times(std::fs::FileTimes::new().set_modified(metadata.modified()?))
    }
}
