//! Paths in a volume: relative, normalised, within the limits.

use std::fmt;

use super::unpack_limits::Limits;
use text::printable::is_printable;

/// A path below the root of a volume, or the root itself, as bytes.
///
/// It is never absolute and has no `.`, `..`, empty names or NUL. Joined to a folder, it stays
/// below that folder as long as no symbolic link is followed.
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelativePath(Box<[u8]>);

/// Reason why bytes are not a valid path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// An empty text.
    #[error("it is empty")]
    Empty,
    /// A path with a leading `/`.
    #[error("it is absolute")]
    Absolute,
    /// A path with a `..` component.
    #[error("it contains \"..\"")]
    Parent,
    /// A NUL byte, which no file name can hold.
    #[error("it contains a NUL byte")]
    Nul,
    /// A name over the limit.
    #[error("a name in it has {length} bytes, the limit is {limit} (limits.nameBytes)")]
    NameTooLong {
        /// Bytes of the name.
        length: usize,
        /// Value of `limits.nameBytes`.
        limit: usize,
    },
    /// A path over the limit.
    #[error("it has {length} bytes, the limit is {limit} (limits.pathBytes)")]
    TooLong {
        /// Minimum length of the path in bytes.
        length: usize,
        /// Value of `limits.pathBytes`.
        limit: usize,
    },
    /// Too many components.
    #[error("it is more than {limit} names deep (limits.depth)")]
    TooDeep {
        /// Value of `limits.depth`.
        limit: usize,
    },
    /// The root where a name is required.
    #[error("it names the root of the volume")]
    Root,
}

impl RelativePath {
    /// Returns the root of the volume.
    pub fn root() -> Self {
        Self::default()
    }

    /// Parses and normalises a path: `./a//b/` becomes `a/b`, and `./` the root.
    pub fn parse(bytes: &[u8], limits: &Limits) -> Result<Self, PathError> {
        if bytes.is_empty() {
            return Err(PathError::Empty);
        }
        if bytes[0] == b'/' {
            return Err(PathError::Absolute);
        }
        if bytes.contains(&0) {
            return Err(PathError::Nul);
        }
        let mut normal = Vec::with_capacity(bytes.len().min(limits.path_bytes));
        let mut depth = 0;
        for name in names(bytes) {
            if name == b".." {
                return Err(PathError::Parent);
            }
            if name.len() > limits.name_bytes {
                let (length, limit) = (name.len(), limits.name_bytes);
                return Err(PathError::NameTooLong { length, limit });
            }
            depth += 1;
            if depth > limits.depth {
                return Err(PathError::TooDeep { limit: limits.depth });
            }
            if !normal.is_empty() {
                normal.push(b'/');
            }
            normal.extend_from_slice(name);
            if normal.len() > limits.path_bytes {
                let (length, limit) = (normal.len(), limits.path_bytes);
                return Err(PathError::TooLong { length, limit });
            }
        }
        Ok(Self(normal.into()))
    }

    /// Parses a path of an archive, whose root is the root of the volume: `/a` becomes `a`, and `/`
    /// the root. A `..` is still refused.
    pub fn parse_rooted(bytes: &[u8], limits: &Limits) -> Result<Self, PathError> {
        match bytes.iter().position(|&byte| byte != b'/') {
            Some(start) => Self::parse(&bytes[start..], limits),
            None if bytes.is_empty() => Err(PathError::Empty),
            None => Ok(Self::root()),
        }
    }

    /// Parses like [`RelativePath::parse_rooted`], and refuses the root.
    pub fn parse_rooted_name(bytes: &[u8], limits: &Limits) -> Result<Self, PathError> {
        let path = Self::parse_rooted(bytes, limits)?;
        if path.is_root() { Err(PathError::Root) } else { Ok(path) }
    }

    /// Joins paths that are valid by themselves, whatever the limits are.
    pub(crate) fn of_names(paths: &[&[u8]]) -> Self {
        let paths: Vec<_> = paths.iter().copied().filter(|path| !path.is_empty()).collect();
        Self(paths.join(&b'/').into())
    }

    /// Returns the names joined by `/`; empty for the root.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns whether this is the root of the volume.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// Iterates over the names, outermost first; empty for the root.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.0.split(|&byte| byte == b'/').filter(|name| !name.is_empty())
    }

    /// Returns the folder and the last name; `None` for the root.
    pub fn split(&self) -> Option<(Self, &[u8])> {
        if self.is_root() {
            return None;
        }
        let (folder, name) = match self.0.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => (&self.0[..slash], &self.0[slash + 1..]),
            None => (&[][..], &*self.0),
        };
        Some((Self(folder.into()), name))
    }

    /// Returns the folder of this path; `None` for the root.
    pub fn parent(&self) -> Option<Self> {
        self.split().map(|(folder, _)| folder)
    }

    /// Iterates over the folders above this path, the root excluded, outermost first.
    pub fn ancestors(&self) -> impl Iterator<Item = Self> {
        let slashes = self.0.iter().enumerate().filter(|&(_, &byte)| byte == b'/');
        slashes.map(|(slash, _)| Self(self.0[..slash].into()))
    }

    /// Returns the path of a name in this folder.
    pub fn join(&self, name: &[u8], limits: &Limits) -> Result<Self, PathError> {
        let mut bytes = self.0.to_vec();
        if !self.is_root() {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(name);
        Self::parse(&bytes, limits)
    }

    /// Returns whether this is `other` or below it, compared by components.
    pub fn is_within(&self, other: &Self) -> bool {
        other.is_root()
            || self.0.strip_prefix(&*other.0).is_some_and(|rest| matches!(rest, [] | [b'/', ..]))
    }
}

/// Prints the path as [`Shown`] does.
impl fmt::Display for RelativePath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_root() { formatter.write_str(".") } else { Shown(&self.0).fmt(formatter) }
    }
}

impl fmt::Debug for RelativePath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "\"{self}\"")
    }
}

/// Splits an untrusted path into its names, without checks.
fn names(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split(|&byte| byte == b'/').filter(|name| !name.is_empty() && *name != b".")
}

/// Untrusted bytes, printed safely in a message: control characters and bytes that are not UTF-8
/// are escaped, and the middle of a long text is left out.
#[derive(Clone, Copy)]
pub struct Shown<'a>(pub &'a [u8]);

/// Bytes printed of each end, so that a message with two paths stays below 1 KiB.
const SHOWN_START: usize = 64;
const SHOWN_END: usize = 64;

impl fmt::Display for Shown<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0;
        if bytes.len() <= SHOWN_START + SHOWN_END {
            return escaped(bytes, formatter);
        }
        escaped(&bytes[..SHOWN_START], formatter)?;
        formatter.write_str("...")?;
        escaped(&bytes[bytes.len() - SHOWN_END..], formatter)
    }
}

fn escaped(bytes: &[u8], formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            if !is_printable(character) || matches!(character, '"' | '\\') {
                write!(formatter, "{}", character.escape_default())?;
            } else {
                write!(formatter, "{character}")?;
            }
        }
        for byte in chunk.invalid() {
            write!(formatter, "\\x{byte:02x}")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<RelativePath, PathError> {
        RelativePath::parse(text.as_bytes(), &Limits::default())
    }

    fn path(text: &str) -> RelativePath {
        parse(text).unwrap()
    }

    #[test]
    fn spellings_of_one_path_are_equal() {
        for text in ["a/b", "./a/b", "a//b", "a/./b/", "././a/b/."] {
            assert_eq!(path(text).as_bytes(), b"a/b", "{text}");
        }
        for text in [".", "./", "././/"] {
            assert!(path(text).is_root(), "{text}");
        }
    }

    #[test]
    fn the_property_that_is_violated_is_named() {
        assert_eq!(parse(""), Err(PathError::Empty));
        assert_eq!(parse("/a"), Err(PathError::Absolute));
        assert_eq!(parse("/"), Err(PathError::Absolute));
        assert_eq!(parse("a/../b"), Err(PathError::Parent));
        assert_eq!(parse(".."), Err(PathError::Parent));
        assert_eq!(parse("a\0b"), Err(PathError::Nul));
        assert_eq!(
            RelativePath::parse_rooted_name(b"./", &Limits::default()),
            Err(PathError::Root)
        );
        assert!(parse("...").is_ok());
        assert!(parse("a..").is_ok());
    }

    #[test]
    fn a_rooted_path_starts_at_the_root() {
        let rooted = |text: &str| RelativePath::parse_rooted(text.as_bytes(), &Limits::default());
        for text in ["/a/b", "//a//b/", "/./a/b", "a/b"] {
            assert_eq!(rooted(text), Ok(path("a/b")), "{text}");
        }
        for text in ["/", "//", "/.", "/./"] {
            assert_eq!(rooted(text), Ok(RelativePath::root()), "{text}");
        }
        assert_eq!(rooted(""), Err(PathError::Empty));
        assert_eq!(rooted("/../a"), Err(PathError::Parent));
        assert_eq!(rooted("/a/.."), Err(PathError::Parent));
    }

    #[test]
    fn limits_hold() {
        assert!(parse(&"n".repeat(255)).is_ok());
        assert_eq!(
            parse(&"n".repeat(256)),
            Err(PathError::NameTooLong { length: 256, limit: 255 })
        );
        assert!(parse(&"d/".repeat(256)).is_ok());
        assert_eq!(parse(&"d/".repeat(257)), Err(PathError::TooDeep { limit: 256 }));
        let long = format!("{}/", "n".repeat(254)).repeat(17);
        assert!(matches!(parse(&long), Err(PathError::TooLong { limit: 4095, .. })));
    }

    #[test]
    fn parents_ancestors_and_joins() {
        let deep = path("a/b/c");
        assert_eq!(deep.parent(), Some(path("a/b")));
        assert_eq!(path("a").parent(), Some(RelativePath::root()));
        assert_eq!(RelativePath::root().parent(), None);
        assert_eq!(deep.ancestors().collect::<Vec<_>>(), [path("a"), path("a/b")]);
        assert!(deep.is_within(&path("a/b")) && deep.is_within(&RelativePath::root()));
        assert!(deep.is_within(&deep) && !path("ab").is_within(&path("a")));
        assert_eq!(deep.join(b"d", &Limits::default()), Ok(path("a/b/c/d")));
    }

    #[test]
    fn control_characters_are_escaped() {
        let shown = |bytes: &[u8]| Shown(bytes).to_string();
        assert_eq!(shown(b"a\n\x1b[31m\xff"), "a\\n\\u{1b}[31m\\xff");
        assert_eq!(shown("\u{202e}x\"".as_bytes()), "\\u{202e}x\\\"");
        assert_eq!(shown(&[b'x'; 4000]).len(), 131);
    }

    proptest! {
        #[test]
        fn parsing_again_changes_nothing(text in "[a./\\PC]{0,40}") {
            if let Ok(once) = parse(&text) {
                prop_assert_eq!(path(&format!("./{}", String::from_utf8_lossy(once.as_bytes()))), once);
            }
        }

        #[test]
        fn a_path_is_accepted_if_all_its_names_are(names in prop::collection::vec("[ab.]{0,3}", 0..8)) {
            let text = names.join("/");
            let kept: Vec<_> = names.iter().filter(|name| !["", "."].contains(&name.as_str())).cloned().collect();
            let expected = if text.is_empty() {
                Err(PathError::Empty)
            } else if text.starts_with('/') {
                Err(PathError::Absolute)
            } else if kept.iter().any(|name| name == "..") {
                Err(PathError::Parent)
            } else {
                Ok(kept.join("/"))
            };
            let parsed = parse(&text).map(|path| String::from_utf8(path.as_bytes().to_vec()).unwrap());
            prop_assert_eq!(parsed, expected);
        }
    }
}
