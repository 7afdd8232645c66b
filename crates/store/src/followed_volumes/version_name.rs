//! The name of a version: it says which tree the version shows, so that no record has to.

use std::fmt;

use crate::TreeKey;

/// `..<number>.<tree>.<generation>`. Versions are ordered by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct VersionName {
    pub(super) number: u64,
    pub(super) tree: TreeKey,
    pub(super) generation: u32,
}

impl VersionName {
    pub(super) fn parse(name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix("..")?.split('.');
        let (number, tree, generation) = (parts.next()?, parts.next()?, parts.next()?);
        let (number, generation) = (number.parse().ok()?, generation.parse().ok()?);
        let parsed = Self { number, tree: TreeKey::from_hex(tree)?, generation };
        // One spelling alone.
        (parsed.to_string() == name).then_some(parsed)
    }
}

impl fmt::Display for VersionName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "..{}.{}.{}", self.number, self.tree, self.generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_types::Digest;

    #[test]
    fn a_name_is_parsed_as_it_is_written() {
        let tree = TreeKey::new(Digest::of(b""), "", "Readable", "");
        let name = VersionName { number: 12, tree, generation: 3 };
        assert_eq!(VersionName::parse(&name.to_string()), Some(name));
        for text in
            ["..data", "..data_tmp", "..12", &format!("..012.{tree}.3"), &format!("12.{tree}.3")]
        {
            assert_eq!(VersionName::parse(text), None, "{text}");
        }
    }
}
