//! Names of objects: a hash of everything that shapes them, and of nothing else.
//!
//! Platform, reference, policy and credentials shape no object: the same bytes
//! shown the same way are one object, however they were named.

use std::fmt;

use oci_types::Digest;
use unpack::Permissions;

/// Part of every key of unpacked content: a change of how archives are read,
/// permissions are set, or trees are merged makes new objects beside the old ones.
pub const RULES_VERSION: u32 = 1;

/// One single-file layer as one inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileKey {
    /// The digest of the blob.
    pub digest: Digest,
    /// Mode and owner that it is shown with.
    pub permissions: Permissions,
}

/// One unpacked archive: always complete, never filtered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerKey(Digest);

/// The key of a tree, which pods see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TreeKey(Digest);

impl LayerKey {
    /// `decoder` names how the blob's bytes become entries, `permissions` the rule for modes and owners.
    pub fn new(blob: Digest, decoder: &str, permissions: &str) -> Self {
        Self(hash(&["layer", &RULES_VERSION.to_string(), &blob.hex(), decoder, permissions]))
    }

    /// The inverse of the key's text.
    pub fn from_hex(text: &str) -> Option<Self> {
        Digest::from_hex(text).map(Self)
    }
}

impl fmt::Display for LayerKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.hex())
    }
}

impl TreeKey {
    /// `selection`, `permissions` and `file_mode` are the attributes in canonical form.
    pub fn new(manifest: Digest, selection: &str, permissions: &str, file_mode: &str) -> Self {
        let rules = RULES_VERSION.to_string();
        Self(hash(&["tree", &rules, &manifest.hex(), selection, permissions, file_mode]))
    }

    /// Returns the key of the same tree with another value of `unpack` than the default.
    #[must_use]
    pub fn with_unpack(self, unpack: &str) -> Self {
        Self(hash(&["unpack", &self.0.hex(), unpack]))
    }

    /// Returns the key of a composite of trees, each below the folder of its path.
    pub fn of_parts(parts: &[(String, Self)]) -> Self {
        let texts = parts.iter().flat_map(|(path, tree)| [path.clone(), tree.0.hex()]);
        let texts: Vec<_> =
            ["composite".to_owned(), RULES_VERSION.to_string()].into_iter().chain(texts).collect();
        Self(hash(&texts.iter().map(String::as_str).collect::<Vec<_>>()))
    }

    /// Returns the key of the part of this tree that `subPath` names.
    #[must_use]
    pub fn with_sub_path(self, sub_path: &str) -> Self {
        Self(hash(&["subPath", &self.0.hex(), sub_path]))
    }

    /// The inverse of the key's text.
    pub fn from_hex(text: &str) -> Option<Self> {
        Digest::from_hex(text).map(Self)
    }

    /// Returns the digest of the key, for tables that have objects by digest.
    pub(super) const fn digest(self) -> Digest {
        self.0
    }
}

impl fmt::Display for TreeKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.hex())
    }
}

impl serde::Serialize for TreeKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for TreeKey {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <String as serde::Deserialize>::deserialize(deserializer)?;
        Self::from_hex(&text).ok_or_else(|| serde::de::Error::custom("not a tree's key"))
    }
}

/// Hashes parts so that no two lists of parts give one text.
pub fn hash(parts: &[&str]) -> Digest {
    let mut text = String::new();
    for part in parts {
        use fmt::Write as _;
        let _ = write!(text, "{}:{part},", part.len());
    }
    Digest::of(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_run_together() {
        assert_ne!(hash(&["a", "b"]), hash(&["ab"]));
        assert_ne!(hash(&["a", "", "b"]), hash(&["a", "b", ""]));
    }
}
