//! Recognises the mount of a tree by what the kernel says that it shows.
//!
//! ```text
//! bind       its root is `.../trees/<key>/<n>/root`
//! overlay    its source is `oci.custom.io/<key>/<n>` and its root is `/`
//! ```
//!
//! A bind out of a state directory that lies on an overlay, such as a container's own filesystem,
//! is an overlay with another source: it is recognised by its root.
//!
//! Lower directories are not looked at: how the mount table shows them depends on how the
//! overlay was made.

use std::path::Path;

use super::hard_links::HardLinkTree;
use crate::TreeKey;
use sys::mount::{MountForm, MountOrigin};

/// Begins the source of every overlay of this driver, whatever name the driver is registered under.
const SOURCE_PREFIX: &str = "oci.custom.io/";

/// The tree that a mount shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MountedTree {
    /// The tree's name.
    pub key: TreeKey,
    /// The generation of the tree.
    pub generation: u32,
    /// The form of the mount.
    pub form: MountForm,
}

impl MountedTree {
    /// Recognises a volume: a mount of a whole tree. None for every other mount.
    pub fn of(origin: &MountOrigin) -> Option<Self> {
        let root = origin.root_as_mounted();
        match Self::of_source(origin) {
            Some(tree) => (root == Path::new("/")).then_some(tree),
            None => Self::of_root(root),
        }
    }

    /// Recognises also a mount of a part of a tree, as the kubelet makes for `subPath`.
    pub fn containing(origin: &MountOrigin) -> Option<Self> {
        let of_root = || origin.root_as_mounted().ancestors().find_map(Self::of_root);
        Self::of_source(origin).or_else(of_root)
    }

    /// The source that an overlay of a tree gets.
    pub fn source(key: TreeKey, generation: u32) -> String {
        format!("{SOURCE_PREFIX}{key}/{generation}")
    }

    fn of_source(origin: &MountOrigin) -> Option<Self> {
        if origin.filesystem != "overlay" {
            return None;
        }
        let name = origin.source.to_str()?.strip_prefix(SOURCE_PREFIX)?;
        let (key, generation) = name.split_once('/')?;
        let (key, generation) = (TreeKey::from_hex(key)?, generation.parse().ok()?);
        Some(Self { key, generation, form: MountForm::Overlay })
    }

    /// The shape is enough: where the state directory's filesystem begins (subvolumes, bind
    /// mounts) does not matter.
    fn of_root(root: &Path) -> Option<Self> {
        let mut parts = HardLinkTree::folder_of(root)?.iter().rev().map(|part| part.to_str());
        let mut next = || parts.next().flatten();
        let generation = next()?.parse().ok()?;
        let key = TreeKey::from_hex(next()?)?;
        (next()? == "trees").then_some(Self { key, generation, form: MountForm::Bind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_types::Digest;

    fn key() -> TreeKey {
        TreeKey::new(Digest::of(b""), "", "Readable", "")
    }

    fn origin(filesystem: &str, source: &str, root: &str) -> MountOrigin {
        MountOrigin { filesystem: filesystem.into(), source: source.into(), root: root.into() }
    }

    #[test]
    fn a_bind_is_recognised_by_its_root() {
        let key = key();
        let of = |root: &str| MountedTree::of(&origin("ext4", "/dev/vda", root));
        for prefix in ["", "/var/lib/csi-driver-oci", "/@subvolume"] {
            let root = format!("{prefix}/trees/{key}/12/root");
            let expected = MountedTree { key, generation: 12, form: MountForm::Bind };
            assert_eq!(of(&root), Some(expected), "{root}");
            assert_eq!(of(&format!("{root}//deleted")), Some(expected), "{root}");
        }
        for root in [
            "/".to_owned(),
            "/root".into(),
            format!("/trees/{key}/x/root"),
            format!("/layers/{key}/1/root"),
            format!("/trees/{key}/1/root/bin"),
            "/trees/abc/1/root".into(),
        ] {
            assert_eq!(of(&root), None, "{root}");
        }
    }

    #[test]
    fn an_overlay_is_recognised_by_its_source() {
        let key = key();
        let source = MountedTree::source(key, 3);
        let expected = MountedTree { key, generation: 3, form: MountForm::Overlay };
        assert_eq!(MountedTree::of(&origin("overlay", &source, "/")), Some(expected));
        assert!(source.len() < 256, "the kernel's bound on a string");
        let tree = format!("/trees/{key}/3/root");
        for (filesystem, source, root) in [
            ("overlay", source.as_str(), "/bin"),
            ("overlay", "overlay", "/"),
            ("overlay", source.as_str(), tree.as_str()),
            ("overlay", "oci.custom.io/abc/3", "/"),
            ("tmpfs", source.as_str(), "/"),
        ] {
            let origin = origin(filesystem, source, root);
            assert_eq!(MountedTree::of(&origin), None, "{origin:?}");
        }
        let bind = MountedTree { form: MountForm::Bind, ..expected };
        assert_eq!(MountedTree::of(&origin("overlay", "overlay", &tree)), Some(bind));
    }

    #[test]
    fn a_part_of_a_tree_is_recognised_as_well() {
        let key = key();
        let containing = |filesystem: &str, source: &str, root: &str| {
            MountedTree::containing(&origin(filesystem, source, root)).map(|tree| tree.generation)
        };
        assert_eq!(containing("xfs", "/dev/vdb", &format!("/s/trees/{key}/7/root/bin/x")), Some(7));
        assert_eq!(containing("overlay", &MountedTree::source(key, 8), "/bin/x"), Some(8));
        assert_eq!(containing("xfs", "/dev/vdb", &format!("/s/trees/{key}/7")), None);
    }
}
