//! The mount table: `/proc/self/mountinfo`, read as it is documented in proc(5).

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

/// One mount of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// The mount's number.
    pub id: u32,
    /// The number of the mount below it.
    pub parent: u32,
    /// The mount's path, seen from this process's root.
    pub mount_point: PathBuf,
    /// The content of the mount.
    pub origin: MountOrigin,
}

/// The content of a mount, as the kernel names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOrigin {
    /// The filesystem's type, such as `ext4`.
    pub filesystem: String,
    /// The filesystem's source: a device, or the text that the filesystem was mounted with.
    pub source: OsString,
    /// The directory of the filesystem that the mount shows. The kernel appends `//deleted` to the
    /// name of a directory that was removed since.
    pub root: PathBuf,
}

/// All mounts of this process's namespace, in the kernel's order.
#[derive(Clone, Debug, Default)]
pub struct MountTable(Vec<MountEntry>);

impl MountOrigin {
    /// Returns the root without the kernel's mark of removed directories.
    pub fn root_as_mounted(&self) -> &Path {
        let root = self.root.as_os_str().as_bytes();
        Path::new(OsStr::from_bytes(root.strip_suffix(b"//deleted").unwrap_or(root)))
    }
}

impl MountTable {
    /// Reads the kernel's table.
    pub fn read() -> io::Result<Self> {
        std::fs::read("/proc/self/mountinfo").map(|text| Self::parse(&text))
    }

    /// Parses a table's text. Skips lines that are not of the documented form.
    pub fn parse(text: &[u8]) -> Self {
        Self(text.split(|&byte| byte == b'\n').filter_map(parse_entry).collect())
    }

    /// Iterates over all mounts, in the kernel's order.
    pub fn iter(&self) -> impl Iterator<Item = &MountEntry> {
        self.0.iter()
    }

    /// Returns the mount that is visible at exactly this path: the topmost of a stack.
    pub fn top_at(&self, path: &Path) -> Option<&MountEntry> {
        let here: Vec<_> = self.0.iter().filter(|entry| entry.mount_point == path).collect();
        // Each mount of a stack is mounted on the one below it; nothing is mounted on the topmost.
        here.iter().copied().find(|entry| here.iter().all(|other| other.parent != entry.id))
    }

    /// Returns a mount that lies somewhere inside of the topmost mount at this path.
    pub fn nested_in(&self, path: &Path) -> Option<&MountEntry> {
        let top = self.top_at(path)?;
        self.0.iter().find(|entry| entry.parent == top.id)
    }

    /// Returns the mount that a path lies on.
    pub fn containing(&self, path: &Path) -> Option<&MountEntry> {
        path.ancestors().find_map(|ancestor| self.top_at(ancestor))
    }
}

/// Parses a line: `36 35 98:0 /root /point rw,noatime master:1 - ext4 /dev/root rw,errors=continue`.
fn parse_entry(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse().ok();
    let (id, parent) = (number()?, number()?);
    // The device's numbers are not kept.
    std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
    let root = unescape(fields.next()?);
    let mount_point = unescape(fields.next()?);
    // A hyphen ends the optional fields.
    fields.by_ref().find(|&field| field == b"-")?;
    let filesystem = String::from_utf8_lossy(fields.next()?).into_owned();
    let source = unescape(fields.next()?).into_os_string();
    let origin = MountOrigin { filesystem, source, root };
    Some(MountEntry { id, parent, mount_point, origin })
}

/// Decodes space, tab, newline and backslash, which the kernel writes as `\040` and the like.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| first == b'\\').and_then(|digits| {
            let value = digits.iter().try_fold(0u32, |value, &digit| {
                (b'0'..=b'7').contains(&digit).then(|| value * 8 + u32::from(digit - b'0'))
            })?;
            u8::try_from(value).ok()
        });
        if let Some(byte) = octal {
            bytes.push(byte);
            rest = &tail[3..];
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
25 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
80 25 0:40 /sub/state /var/state rw,noexec - btrfs /dev/vdb rw,subvol=/sub
90 25 0:40 /sub/state/trees/a/1/root /pods/with\\040space/mount ro,nosuid master:1 propagate_from:2 - btrfs /dev/vdb rw
91 90 0:41 / /pods/with\\040space/mount rw - tmpfs tmpfs rw
92 25 254:0 /gone//deleted /pods/b/mount ro - ext4 /dev/vda rw
broken line
93 25 254 / /nowhere ro - ext4 /dev/vda rw
94 25 0:50 / /pods/c/mount ro,nosuid - overlay oci.custom.io/a\\040b/1 ro,lowerdir=/a:/b
95 25 0:51 / /pods/no-source ro - tmpfs
";

    #[test]
    fn the_topmost_of_a_stack_is_found_in_any_order() {
        let table = MountTable::parse(TABLE);
        let point = Path::new("/pods/with space/mount");
        assert_eq!(table.top_at(point).map(|entry| entry.id), Some(91));
        let reversed = MountTable(table.0.iter().cloned().rev().collect());
        assert_eq!(reversed.top_at(point).map(|entry| entry.id), Some(91));
        assert_eq!(table.top_at(Path::new("/pods")), None);
    }

    #[test]
    fn a_path_lies_on_the_nearest_mount() {
        let table = MountTable::parse(TABLE);
        let id = |path: &str| table.containing(Path::new(path)).map(|entry| entry.id);
        assert_eq!(id("/var/state/trees"), Some(80));
        assert_eq!(id("/var/states"), Some(25));
    }

    #[test]
    fn a_removed_folder_keeps_its_name() {
        let table = MountTable::parse(TABLE);
        let entry = table.top_at(Path::new("/pods/b/mount")).expect("a mount");
        assert_eq!(entry.origin.root_as_mounted(), Path::new("/gone"));
    }

    #[test]
    fn filesystem_and_source_are_read() {
        let table = MountTable::parse(TABLE);
        let entry = table.top_at(Path::new("/pods/c/mount")).expect("a mount");
        assert_eq!(entry.origin.filesystem, "overlay");
        assert_eq!(entry.origin.source, "oci.custom.io/a b/1");
    }

    #[test]
    fn a_mount_inside_of_another_is_found() {
        let table = MountTable::parse(TABLE);
        let nested = |path: &str| table.nested_in(Path::new(path)).map(|entry| entry.id);
        assert_eq!(nested("/"), Some(80));
        assert_eq!(nested("/pods/b/mount"), None);
        assert_eq!(nested("/pods"), None);
    }

    #[test]
    fn malformed_lines_are_skipped() {
        assert_eq!(MountTable::parse(TABLE).iter().count(), 6);
        assert_eq!(unescape(b"a\\04"), PathBuf::from("a\\04"));
        assert_eq!(unescape(b"\\777\\134"), PathBuf::from("\\777\\"));
    }
}
