//! Recognises mounts of followed volumes by what the kernel says that they show.

use std::fmt;
use std::path::Path;

use super::version_name::VersionName;
use super::{FOLDER, SHOWN};
use crate::object_keys;
use crate::trees::mounted_tree::MountedTree;
use oci_types::Digest;
use sys::mount::{MountForm, MountOrigin};

/// The key of a followed volume: one volume at one target with the same attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FollowKey(Digest);

/// The content of a mount of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountedContent {
    /// One tree, which does not change.
    Tree(MountedTree),
    /// A volume that follows a tag.
    Followed(FollowKey),
}

/// A mount of a followed volume, or of a part of it, as the kubelet makes for `subPath`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FollowedPart {
    pub(super) key: FollowKey,
    /// The version that it lies in; none of the volume as a whole.
    pub(super) version: Option<VersionName>,
}

impl FollowKey {
    /// Returns the key of a volume at a target. `fingerprint` is the hash of its attributes and mount flags.
    pub fn new(volume_id: &str, target: &Path, fingerprint: Digest) -> Self {
        let target = target.to_string_lossy();
        Self(object_keys::hash(&["followed", volume_id, &target, &fingerprint.hex()]))
    }

    /// The inverse of the key's text.
    pub(super) fn from_hex(text: impl AsRef<str>) -> Option<Self> {
        Digest::from_hex(text.as_ref()).map(Self)
    }
}

impl fmt::Display for FollowKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.hex())
    }
}

impl MountedContent {
    /// Recognises a volume: a mount of a whole tree, or of a whole followed volume. None for every other mount.
    pub fn of(origin: &MountOrigin) -> Option<Self> {
        if let Some(tree) = MountedTree::of(origin) {
            return Some(Self::Tree(tree));
        }
        let key = FollowedPart::of(origin)?.key;
        let shown = Path::new(FOLDER).join(key.to_string()).join(SHOWN);
        origin.root_as_mounted().ends_with(shown).then_some(Self::Followed(key))
    }

    /// Returns the form of the mount.
    pub const fn form(self) -> MountForm {
        match self {
            Self::Tree(tree) => tree.form,
            Self::Followed(_) => MountForm::Bind,
        }
    }
}

impl FollowedPart {
    /// Recognises a mount by the shape of its root: where the state directory's filesystem begins does not matter. A
    /// part of a tree may have a path of any shape.
    pub(super) fn of(origin: &MountOrigin) -> Option<Self> {
        if MountedTree::containing(origin).is_some() {
            return None;
        }
        let parts: Vec<_> = origin.root_as_mounted().iter().map(|part| part.to_str()).collect();
        let (place, key) = parts.windows(3).enumerate().find_map(|(place, parts)| match parts {
            [Some(FOLDER), Some(key), Some(SHOWN)] => Some((place, FollowKey::from_hex(key)?)),
            _ => None,
        })?;
        let version = parts.get(place + 3).copied().flatten().and_then(VersionName::parse);
        Some(Self { key, version })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TreeKey;

    fn origin(root: &str) -> MountOrigin {
        MountOrigin { filesystem: "ext4".into(), source: "/dev/vda".into(), root: root.into() }
    }

    #[test]
    fn a_followed_volume_is_recognised_by_its_root_and_its_versions_by_theirs() {
        let key = FollowKey::new("v", Path::new("/target"), Digest::of(b""));
        let tree = TreeKey::new(Digest::of(b""), "", "Readable", "");
        let version = VersionName { number: 7, tree, generation: 1 };
        for prefix in ["", "/var/lib/csi-driver-oci", "/followed/state"] {
            let root = format!("{prefix}/followed/{key}/shown");
            let of =
                |root: &str| (MountedContent::of(&origin(root)), FollowedPart::of(&origin(root)));
            let whole = FollowedPart { key, version: None };
            let expected = (Some(MountedContent::Followed(key)), Some(whole));
            assert_eq!(of(&root), expected, "{root}");
            assert_eq!(of(&format!("{root}//deleted")), expected, "{root}");
            let part = FollowedPart { key, version: Some(version) };
            assert_eq!(of(&format!("{root}/{version}/bin")), (None, Some(part)), "{root}");
            assert_eq!(of(&format!("{prefix}/followed/{key}")), (None, None));
            assert_eq!(of(&format!("{prefix}/followed/abc/shown")), (None, None));
        }
        // An artifact may have such paths.
        let inside = format!("/trees/{tree}/1/root/followed/{key}/shown");
        assert_eq!(MountedContent::of(&origin(&inside)), None);
        let tree = format!("/trees/{tree}/1/root");
        assert!(matches!(MountedContent::of(&origin(&tree)), Some(MountedContent::Tree(_))));
    }

    #[test]
    fn another_volume_target_or_attribute_is_another_key() {
        let key = |volume: &str, target: &str, attributes: &[u8]| {
            FollowKey::new(volume, Path::new(target), Digest::of(attributes))
        };
        let one = key("v", "/t", b"a");
        for other in [key("w", "/t", b"a"), key("v", "/u", b"a"), key("v", "/t", b"b")] {
            assert_ne!(one, other);
        }
        assert_eq!(one, key("v", "/t", b"a"));
    }
}
