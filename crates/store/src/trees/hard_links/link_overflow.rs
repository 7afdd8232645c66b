//! Inodes that stand in for others which have all the names that they can have.
//!
//! ext4 gives an inode 65,000 names. A file that has them all, in the trees of a node or in one
//! archive that wants more, is copied, and further names lead to the copy until it has all of
//! its own. While a tree is built its copies lie in a folder of their own beside it.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::linkat;
use parking_lot::Mutex;

use crate::SecurityLabel;
use crate::durable_rename;
use crate::inode_metadata::set_owner_and_mode;
use crate::space_amount::SpaceAmount;
use crate::write_meter::{WriteMeter, full};
use sys::extended_attributes;
use unpack::Permissions;

/// The kernel copies so much at once; in between the floor is looked at.
const PIECE: u64 = 4 << 20;

/// The copies of one tree.
pub(super) struct Copies<'a> {
    folder: PathBuf,
    label: Option<&'a SecurityLabel>,
    meter: &'a WriteMeter,
    /// The disk space of the copies. Held while one is made: copies are few, and another thread's next
    /// name may lead to the same.
    made: Mutex<SpaceAmount>,
}

impl<'a> Copies<'a> {
    /// Prepares copies in `folder`, which is not there yet.
    pub(super) fn new(
        folder: PathBuf,
        label: Option<&'a SecurityLabel>,
        meter: &'a WriteMeter,
    ) -> Self {
        Self { folder, label, meter, made: Mutex::default() }
    }

    /// Gives a copy of `source`, whose number in the plan is `file`, one more name.
    pub(super) fn link(
        &self,
        file: u32,
        source: &Path,
        folder: &OwnedFd,
        name: &std::ffi::CStr,
    ) -> io::Result<()> {
        let copy = self.folder.join(file.to_string());
        let link = || linkat(AT_FDCWD, &copy, folder, name, AtFlags::empty());
        let mut made = self.made.lock();
        match link() {
            Err(Errno::ENOENT) if made.is_nothing() => std::fs::create_dir(&self.folder)?,
            Err(Errno::ENOENT) => {}
            // Its other names keep it.
            Err(Errno::EMLINK) => std::fs::remove_file(&copy)?,
            linked => return Ok(linked?),
        }
        let bytes = copy_inode(source, &copy, self.label, self.meter)?;
        *made = made.plus(SpaceAmount { bytes, inodes: 1 });
        Ok(link()?)
    }

    /// Removes the names outside of the tree. Returns the disk space of the copies.
    pub(super) fn finish(self) -> io::Result<SpaceAmount> {
        let made = self.made.into_inner();
        if !made.is_nothing() {
            std::fs::remove_dir_all(&self.folder)?;
        }
        Ok(made)
    }
}

/// A second inode, alike in everything, durable; says how large it is.
fn copy_inode(
    source: &Path,
    path: &Path,
    label: Option<&SecurityLabel>,
    meter: &WriteMeter,
) -> io::Result<u64> {
    meter.makes(1).map_err(full)?;
    let from = File::open(source)?;
    let metadata = from.metadata()?;
    let to = durable_rename::create_private(path)?;
    let mut copied = 0;
    loop {
        meter.writes(PIECE.min(metadata.len().saturating_sub(copied))).map_err(full)?;
        match io::copy(&mut (&from).take(PIECE), &mut &to)? {
            0 => break,
            more => copied += more,
        }
    }
    for name in extended_attributes::names(from.as_fd())? {
        // Others belong to the node, which gives new files their own.
        if name.to_bytes().starts_with(b"user.") {
            let value = extended_attributes::value(from.as_fd(), &name)?;
            extended_attributes::set(to.as_fd(), &name, &value)?;
        }
    }
    if let Some(label) = label {
        label.apply(to.as_fd())?;
    }
    let (mode, uid, gid) = (metadata.mode() & 0o777, metadata.uid(), metadata.gid());
    set_owner_and_mode(&to, Permissions { mode, uid, gid })?;
    to.set_times(std::fs::FileTimes::new().set_modified(metadata.modified()?))?;
    to.sync_all()?;
    Ok(copied)
}
