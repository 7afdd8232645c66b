//! Checks that the state directory is the driver's own.
//!
//! Objects are renamed and linked between its folders, and removed below them:
//! a symbolic link, a foreign folder or one on another filesystem in
//! their place would make that fail, or reach what is not ours. Such a place is
//! refused by name; nothing in it is touched.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::error::{IoContext as _, StoreError};
use sys::mount::{MountEntry, MountTable};

/// Looks at the folders of a state directory.
pub(super) fn check(root: &Path, folders: &[&str]) -> Result<(), StoreError> {
    let own = nix::unistd::geteuid().as_raw();
    // The state directory itself may be reached through a link. The owner of the link's target can put anything in the
    // place of the content.
    let home = root.metadata().io_context("look at", root)?;
    if home.uid() != own {
        let what = "belongs to another user";
        return Err(StoreError::Foreign { path: root.to_owned(), what });
    }
    for folder in folders {
        let path = root.join(folder);
        let metadata = look(&path)?;
        let foreign = |what| Err(StoreError::Foreign { path: path.clone(), what });
        if metadata.is_symlink() {
            return foreign("is a symbolic link");
        }
        if !metadata.is_dir() {
            return foreign("is not a folder");
        }
        if metadata.uid() != own {
            return foreign("belongs to another user");
        }
        if metadata.dev() != home.dev() {
            return foreign("lies on another filesystem than the rest");
        }
    }
    Ok(())
}

/// Refuses a state directory whose disk is not mounted, before anything is written there.
pub fn require_mountpoint(root: &Path) -> Result<(), StoreError> {
    let mounted = std::fs::canonicalize(root).ok().is_some_and(|path| {
        MountTable::read()
            .is_ok_and(|table| table.top_at(&path).is_some_and(|mount| is_its_own(mount, &path)))
    });
    if mounted { Ok(()) } else { Err(StoreError::NotMounted { path: root.to_owned() }) }
}

/// Returns whether a mount is a disk's and not a folder's of a larger filesystem. In a container the state directory is
/// always a mount: of the node's folder at the same path.
fn is_its_own(mount: &MountEntry, path: &Path) -> bool {
    /// The number that btrfs gives the root of every subvolume.
    const SUBVOLUME: u64 = 256;
    let inode = || path.metadata().map(|metadata| metadata.ino());
    mount.origin.root == Path::new("/")
        || mount.origin.filesystem == "btrfs" && inode().is_ok_and(|inode| inode == SUBVOLUME)
        || mount.origin.root.file_name() != path.file_name()
}

fn look(path: &Path) -> Result<std::fs::Metadata, StoreError> {
    path.symlink_metadata().io_context("look at", path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_or_a_file_in_place_of_a_folder_is_refused() {
        let state = tempfile::tempdir().expect("a folder");
        let elsewhere = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(state.path().join("good")).expect("a folder");
        std::os::unix::fs::symlink(elsewhere.path(), state.path().join("link")).expect("a link");
        std::fs::write(state.path().join("file"), "").expect("a file");
        assert!(check(state.path(), &["good"]).is_ok());
        for (name, what) in [("link", "symbolic link"), ("file", "not a folder")] {
            let refused = check(state.path(), &["good", name]).expect_err("foreign").to_string();
            assert!(refused.contains(what) && refused.contains(name), "{refused}");
        }
    }

    #[test]
    fn a_plain_folder_is_no_mount_point() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(matches!(require_mountpoint(folder.path()), Err(StoreError::NotMounted { .. })));
        assert!(require_mountpoint(Path::new("/proc")).is_ok());
    }
}
