//! Names of the objects that garbage collection knows.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use super::{FileKey, LayerKey, TreeKey};
use oci_types::Digest;
use unpack::Permissions;

/// The path below the state directory of a document, or of one generation of a file, layer or tree.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName(Arc<str>);

/// The kind of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ObjectKind {
    /// A single-file layer.
    File,
    /// An unpacked archive.
    Layer,
    /// A directory tree that pods see.
    Tree,
    /// A manifest, an index or a configuration, as the registry sent it.
    Document,
}

impl ObjectKind {
    /// All kinds, in the order of their declaration.
    pub const ALL: [Self; 4] = [Self::File, Self::Layer, Self::Tree, Self::Document];
}

impl ObjectName {
    /// A generation of a file.
    pub fn file(key: FileKey, generation: u32) -> Self {
        let FileKey { digest, permissions: Permissions { mode, uid, gid } } = key;
        Self(format!("files/{}/{mode:04o}-{uid}-{gid}/{generation}", digest.hex()).into())
    }

    /// A generation of a layer.
    pub fn layer(key: LayerKey, generation: u32) -> Self {
        Self(format!("layers/{key}/{generation}").into())
    }

    /// A generation of a tree.
    pub fn tree(key: TreeKey, generation: u32) -> Self {
        Self(format!("trees/{key}/{generation}").into())
    }

    /// Names a document, which has no generations because its content never changes.
    pub fn document(digest: Digest) -> Self {
        Self(format!("blobs/{}", digest.hex()).into())
    }

    /// Returns the digest of a document; none for other objects.
    pub fn document_digest(&self) -> Option<Digest> {
        Digest::from_hex(self.0.strip_prefix("blobs/")?)
    }

    /// Parses a name from a record. Paths that could lead out of the folders of objects are
    /// refused.
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(hex) = text.strip_prefix("blobs/") {
            return Digest::from_hex(hex).map(Self::document);
        }
        let parts: Vec<_> = text.split('/').collect();
        let depth = match *parts.first()? {
            "files" => 4,
            "layers" | "trees" => 3,
            _ => return None,
        };
        let [_, key, .., generation] = parts.as_slice() else { return None };
        let variant = |part: &str| part.chars().all(|char| char.is_ascii_digit() || char == '-');
        let well_formed = parts.len() == depth
            && Digest::from_hex(key).is_some()
            && generation.parse::<u32>().is_ok()
            && parts[2..].iter().all(|part| variant(part));
        well_formed.then(|| Self(text.into()))
    }

    /// Returns the object that lies at a path below a state directory.
    pub(super) fn at(root: &Path, path: &Path) -> Option<Self> {
        Self::parse(path.strip_prefix(root).ok()?.to_str()?)
    }

    /// Returns the kind of the object.
    pub fn kind(&self) -> ObjectKind {
        match self.0.as_bytes().first() {
            Some(b'f') => ObjectKind::File,
            Some(b'l') => ObjectKind::Layer,
            Some(b'b') => ObjectKind::Document,
            _ => ObjectKind::Tree,
        }
    }

    /// The path below the state directory.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_their_own_inverse() {
        let permissions = Permissions { mode: 0o555, uid: 0, gid: 7 };
        let digest = Digest::of(b"");
        for (name, kind) in [
            (ObjectName::file(FileKey { digest, permissions }, 3), ObjectKind::File),
            (ObjectName::layer(LayerKey::new(digest, "tar ", "Readable"), 1), ObjectKind::Layer),
            (ObjectName::tree(TreeKey::new(digest, "", "Readable", ""), 12), ObjectKind::Tree),
            (ObjectName::document(digest), ObjectKind::Document),
        ] {
            assert_eq!(name.kind(), kind);
            assert_eq!(ObjectName::parse(name.as_str()), Some(name));
        }
    }

    #[test]
    fn a_record_names_nothing_outside() {
        let key = Digest::of(b"").hex();
        for text in [
            "",
            "trees",
            "trees/../1",
            "trees/KEY/b",
            "/trees/KEY/1",
            "files/KEY/1",
            "blobs/KEY/1",
            "blobs/../1",
            "blobs/short",
            "trees/short/1",
            "files/KEY/../1",
            "trees/KEY/+1",
            "trees/KEY/1/x",
        ] {
            assert_eq!(ObjectName::parse(&text.replace("KEY", &key)), None, "{text}");
        }
    }
}
