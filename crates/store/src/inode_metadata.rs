//! Metadata of inodes: how they get it, and what it is compared with.

use std::fs::{File, Metadata as FileMetadata};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, fchown};

use sys::extended_attributes;
use unpack::Permissions;
use unpack::archive_entry::{ExtendedAttributes, Metadata, Timestamp};

/// Sets owner and mode. The owner first: changing it would drop bits of the mode.
pub(super) fn set_owner_and_mode(file: &File, permissions: Permissions) -> std::io::Result<()> {
    let Permissions { mode, uid, gid } = permissions;
    let metadata = file.metadata()?;
    if (metadata.uid(), metadata.gid()) != (uid, gid) {
        fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    fchmod(file, Mode::from_bits_truncate(mode))?;
    Ok(())
}

/// ext4 calls an attribute that does not fit its block a full disk.
pub(super) fn too_large(error: std::io::Error) -> std::io::Error {
    match error.kind() {
        std::io::ErrorKind::StorageFull => std::io::Error::other(
            "the node's filesystem cannot hold an extended attribute of this size",
        ),
        _ => error,
    }
}

/// A time as the filesystem takes it; before the epoch and far in the future too.
pub(super) fn system_time(time: Timestamp) -> SystemTime {
    let seconds = Duration::from_secs(time.seconds.unsigned_abs());
    let base = if time.seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(seconds)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(seconds)
    };
    base.and_then(|base| base.checked_add(Duration::from_nanos(time.nanoseconds.into())))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Differences that are not damage on this node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// The state directory gives access control lists to all that is made in it.
    inherits_lists: bool,
}

impl Rules {
    /// Learns them from a folder in which objects are made.
    pub(super) fn of(folder: &Path) -> Self {
        let list = |folder: File| {
            let names = extended_attributes::names(folder.as_fd())?;
            Ok::<_, io::Error>(names.iter().any(|name| name.to_bytes() == DEFAULT_LIST))
        };
        Self { inherits_lists: File::open(folder).and_then(list).unwrap_or(false) }
    }

    /// All that is wrong with the mode, owner, time and attributes of an open file or folder.
    pub(super) fn other_metadata(self, file: &File, wanted: &Metadata) -> io::Result<Vec<String>> {
        let found = file.metadata()?;
        let mut wrong = self.other_attributes(file, &wanted.extended_attributes)?;
        wrong.extend(other_permissions(&found, wanted.permissions));
        wrong.extend(other_time(found.mtime(), found.mtime_nsec(), wanted.modified));
        Ok(wrong)
    }

    /// Returns the differences of the extended attributes of an open file or folder.
    pub(super) fn other_attributes(
        self,
        file: &File,
        wanted: &ExtendedAttributes,
    ) -> io::Result<Vec<String>> {
        let (mut wrong, mut missing) = (Vec::new(), wanted.iter().count());
        for name in extended_attributes::names(file.as_fd())? {
            let bytes = name.to_bytes();
            if !bytes.starts_with(b"user.") {
                wrong.extend(self.is_foreign(bytes).then(|| strange(bytes)));
                continue;
            }
            match wanted.iter().find(|(known, _)| *known == bytes) {
                None => wrong.push(strange(bytes)),
                Some((_, value)) => {
                    missing -= 1;
                    if extended_attributes::value(file.as_fd(), &name)? != value {
                        let name = String::from_utf8_lossy(bytes);
                        wrong.push(format!("the extended attribute {name} has another value"));
                    }
                }
            }
        }
        if missing > 0 {
            wrong.push(format!("{missing} extended attributes are missing"));
        }
        Ok(wrong)
    }

    /// Returns the differences of the attributes of a symbolic link, which has none of its own.
    pub(super) fn other_link_attributes(self, link: &std::ffi::CStr) -> io::Result<Vec<String>> {
        let names = extended_attributes::names_at(link)?;
        let foreign = names.iter().filter(|name| self.is_foreign(name.to_bytes()));
        Ok(foreign.map(|name| strange(name.to_bytes())).collect())
    }

    /// Returns whether the driver and the node set no such attribute. Labels and measurements of the
    /// node's security modules are its own affair.
    fn is_foreign(self, name: &[u8]) -> bool {
        name == b"security.capability"
            || name.starts_with(b"trusted.")
            || name.starts_with(LISTS) && !self.inherits_lists
    }
}

const LISTS: &[u8] = b"system.posix_acl_";
const DEFAULT_LIST: &[u8] = b"system.posix_acl_default";

fn strange(name: &[u8]) -> String {
    format!(
        "it has the extended attribute {}, which is not the archive's",
        String::from_utf8_lossy(name)
    )
}

pub(super) fn other_permissions(metadata: &FileMetadata, wanted: Permissions) -> Option<String> {
    let found = (metadata.mode() & 0o7777, metadata.uid(), metadata.gid());
    let wanted = (wanted.mode, wanted.uid, wanted.gid);
    let text = |(mode, uid, gid): (u32, u32, u32)| format!("{mode:04o} {uid}:{gid}");
    (found != wanted).then(|| format!("mode and owner are {}, not {}", text(found), text(wanted)))
}

/// Compares a modification time, as exactly as filesystems keep it.
pub(super) fn other_time(seconds: i64, nanoseconds: i64, wanted: Timestamp) -> Option<String> {
    // Beyond this some filesystems keep the nearest time that they can.
    if i32::try_from(wanted.seconds).is_err() {
        return None;
    }
    let exact = i64::from(wanted.nanoseconds);
    // Whole units of a tenth of a microsecond, or of anything coarser, rounded down.
    let is_rounded = nanoseconds % 100 == 0 && nanoseconds <= exact;
    let is_same = seconds == wanted.seconds && (nanoseconds == exact || is_rounded);
    (!is_same).then(|| format!("its modification time is {seconds}, not {}", wanted.seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_compared_as_exactly_as_they_are_kept() {
        let wanted = Timestamp { seconds: 1_700_000_000, nanoseconds: 123_456_789 };
        let other = |nanoseconds| other_time(wanted.seconds, nanoseconds, wanted);
        for kept in [123_456_789, 123_456_700, 123_456_000, 123_000_000, 0] {
            assert_eq!(other(kept), None, "{kept}");
        }
        assert!(other(123_456_788).is_some() && other(200_000_000).is_some());
        assert!(other_time(wanted.seconds + 1, 123_456_789, wanted).is_some());
        let far = Timestamp { seconds: 1 << 40, nanoseconds: 0 };
        assert_eq!(other_time(1 << 31, 0, far), None, "a filesystem may not hold it");
    }
}
