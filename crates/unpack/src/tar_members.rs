//! Members of a tar that is not a layer, plain or compressed, in one pass and bounded memory.

use std::io::{BufRead, Read};

use super::decompressed_content;
use super::error::UnpackError;
use super::tar_reader::{MemberKind, TarReader};
use super::unpack_limits::Limits;

/// One member that is not a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TarMember {
    /// Name as it is written, without any check.
    pub name: Vec<u8>,
    /// True for a regular file. Other members have no content.
    pub is_file: bool,
    /// Size of the content in bytes. The reader fails if there are fewer.
    pub size: u64,
}

/// Calls `visit` for each member that is not a directory, with its content. Content that `visit`
/// leaves unread is skipped.
///
/// # Errors
///
/// Errors of a malformed archive, more than `limits.entries` members, and the errors of `visit`. A
/// failure of the archive takes precedence over the error of `visit` that it causes.
pub fn read_members<E: From<UnpackError>>(
    input: impl Read + Send,
    limits: &Limits,
    mut visit: impl FnMut(&TarMember, &mut dyn BufRead) -> Result<(), E>,
) -> Result<(), E> {
    decompressed_content::decompress(input, limits, false, |content| {
        let mut tar = TarReader::new(content, limits);
        let mut members = 0;
        while let Some(member) = tar.next()? {
            members += 1;
            if members > limits.entries {
                return Err(UnpackError::TooManyEntries { limit: limits.entries }.into());
            }
            if member.kind == MemberKind::Directory {
                continue;
            }
            let is_file = member.kind == MemberKind::File;
            let member = TarMember { name: member.name, is_file, size: member.size };
            let visited = visit(&member, &mut tar);
            if let Some(failure) = tar.failure() {
                return Err(failure.into());
            }
            visited?;
        }
        tar.into_content().finish()?;
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Tar, gzip, zstd};
    use super::*;

    fn read(input: &[u8], limits: &Limits) -> Result<Vec<(String, String)>, UnpackError> {
        let mut files = Vec::new();
        read_members(input, limits, |member, content| {
            let mut text = String::new();
            content.read_to_string(&mut text).map_err(UnpackError::Store)?;
            files.push((String::from_utf8_lossy(&member.name).into_owned(), text));
            Ok(())
        })?;
        Ok(files)
    }

    #[test]
    fn plain_and_compressed_archives_have_the_same_members() {
        let tar = Tar::new().folder("d/", 0o755).file("d/a", "one").file("b", "").end();
        let expected = [("d/a", "one"), ("b", "")].map(|(name, text)| (name.into(), text.into()));
        for input in [gzip(&tar), zstd(&tar), tar] {
            assert_eq!(read(&input, &Limits::default()).unwrap(), expected);
        }
    }

    #[test]
    fn unread_content_is_skipped() {
        let tar = Tar::new().file("a", &"x".repeat(10_000)).file("b", "y").end();
        let mut names = Vec::new();
        let visit = |member: &TarMember, _: &mut dyn BufRead| {
            names.push(member.name.clone());
            Ok::<_, UnpackError>(())
        };
        read_members(tar.as_slice(), &Limits::default(), visit).unwrap();
        assert_eq!(names, [b"a", b"b"]);
    }

    #[test]
    fn headers_and_the_number_of_members_are_bounded() {
        let limits = Limits { entries: 2, header_bytes: 1000, ..Limits::default() };
        let tar = Tar::new().folder("a/", 0o755).file("b", "").file("c", "").end();
        let refused = read(&tar, &limits);
        assert!(matches!(refused, Err(UnpackError::TooManyEntries { limit: 2 })), "{refused:?}");
        for kind in [b'L', b'K', b'x'] {
            let header = Tar::header(b"long", kind, 1001);
            let tar = Tar::new().member(header, &[b'x'; 1001]).file("a", "").end();
            let refused = read(&tar, &limits);
            let is_named = matches!(refused, Err(UnpackError::HeaderTooLarge { size: 1001, .. }));
            assert!(is_named, "{refused:?}");
        }
    }

    #[test]
    fn a_failure_of_the_archive_precedes_the_error_of_visit() {
        let mut tar = Tar::new().file("a", &"x".repeat(5000)).end();
        tar.truncate(2000);
        let refused = read(&tar, &Limits::default());
        assert!(matches!(refused, Err(UnpackError::Archive { .. })), "{refused:?}");
    }
}
