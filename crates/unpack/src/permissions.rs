//! The attribute `permissions`: the mode and owner of content on the node.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bits of a mode that are kept; setuid, setgid and sticky are not.
const PERMISSION_BITS: u32 = 0o777;
const READABLE: u32 = 0o444;
const EXECUTABLE: u32 = 0o111;

/// The rule that maps modes and owners of an archive to those of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PermissionsRule {
    /// All users may read everything, since pods run as any user; the owner is 0:0.
    #[default]
    Readable,
    /// Mode and owner as recorded, for pods that run as that user.
    Preserve,
}

/// Type of the node that permissions apply to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeType {
    /// A folder, which needs execute permission to be entered.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link, whose mode has no meaning.
    SymbolicLink,
}

/// User or group ID as recorded: any number, or text that is not a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A number, which may be outside the range of Linux.
    Number(i64),
    /// Text that is not a number.
    Unreadable,
}

/// Mode, owner and group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Permissions {
    /// Permission bits. Before a rule is applied, it may have more.
    pub mode: u32,
    /// User ID of the owner.
    pub uid: u32,
    /// ID of the group.
    pub gid: u32,
}

impl PermissionsRule {
    /// Returns the value of the attribute, which is part of the key of a layer.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Readable => "Readable",
            Self::Preserve => "Preserve",
        }
    }

    /// Returns the permissions that a node gets for recorded ones.
    pub const fn apply(self, node: NodeType, recorded: Permissions) -> Permissions {
        let mode = recorded.mode & PERMISSION_BITS;
        let executable = mode & EXECUTABLE != 0;
        let mode = match (node, self) {
            (NodeType::SymbolicLink, _) => PERMISSION_BITS,
            (NodeType::Directory | NodeType::File, Self::Preserve) => mode,
            (NodeType::Directory, Self::Readable) => mode | READABLE | EXECUTABLE,
            (NodeType::File, Self::Readable) if executable => mode | READABLE | EXECUTABLE,
            (NodeType::File, Self::Readable) => mode | READABLE,
        };
        match self {
            Self::Readable => Permissions { mode, uid: 0, gid: 0 },
            Self::Preserve => Permissions { mode, uid: recorded.uid, gid: recorded.gid },
        }
    }
}

impl Owner {
    /// Returns the number for the kernel, or `u32::MAX`, which no file can have, if it is out of
    /// range.
    pub fn number(&self) -> u32 {
        match self {
            Self::Number(number) => u32::try_from(*number).unwrap_or(u32::MAX),
            Self::Unreadable => u32::MAX,
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(formatter),
            Self::Unreadable => formatter.write_str("?"),
        }
    }
}

impl Permissions {
    /// Returns whether a file can have this owner and group. In `chown`, `u32::MAX` means
    /// "unchanged".
    pub const fn has_owner(self) -> bool {
        self.uid != u32::MAX && self.gid != u32::MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(rule: PermissionsRule, node: NodeType, mode: u32) -> (u32, u32, u32) {
        let Permissions { mode, uid, gid } = rule.apply(node, Permissions { mode, uid: 7, gid: 8 });
        (mode, uid, gid)
    }

    #[test]
    fn readable_allows_every_user_to_read() {
        use NodeType::{Directory, File};
        let readable = |node, mode| applied(PermissionsRule::Readable, node, mode);
        assert_eq!(readable(File, 0o600), (0o644, 0, 0));
        assert_eq!(readable(File, 0o000), (0o444, 0, 0));
        assert_eq!(readable(File, 0o700), (0o755, 0, 0));
        assert_eq!(readable(File, 0o010), (0o555, 0, 0));
        assert_eq!(readable(Directory, 0o700), (0o755, 0, 0));
        assert_eq!(readable(Directory, 0o000), (0o555, 0, 0));
    }

    #[test]
    fn preserve_keeps_mode_and_owner() {
        let preserve = |node, mode| applied(PermissionsRule::Preserve, node, mode);
        assert_eq!(preserve(NodeType::File, 0o600), (0o600, 7, 8));
        assert_eq!(preserve(NodeType::Directory, 0o000), (0, 7, 8));
        assert_eq!(preserve(NodeType::SymbolicLink, 0o000), (0o777, 7, 8));
    }

    #[test]
    fn setuid_setgid_and_sticky_are_dropped() {
        for rule in [PermissionsRule::Readable, PermissionsRule::Preserve] {
            for node in [NodeType::File, NodeType::Directory, NodeType::SymbolicLink] {
                assert_eq!(applied(rule, node, 0o17_7777).0, 0o777);
            }
        }
    }
}
