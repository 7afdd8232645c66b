//! Archives for tests, built byte by byte so that they can be malformed.

use std::io::{self, BufRead, Write};

use tar::Header;

use super::archive::{FileHeader, Sink, StoredContent, Totals, unpack};
use super::archive_entry::{Entry, EntryKind};
use super::error::UnpackError;
use super::layer_rule::ArchiveRule;
use super::permissions::PermissionsRule;
use super::unpack_limits::Limits;
use crate::Checksum;

/// Rule of the layers of an image.
pub(crate) const IMAGE: ArchiveRule =
    ArchiveRule { whiteouts: true, tar_digest: None, within: None };
/// Rule of other archives.
pub(crate) const ARTIFACT: ArchiveRule =
    ArchiveRule { whiteouts: false, tar_digest: None, within: None };

/// Builder of a tar archive.
#[derive(Clone, Default)]
pub(crate) struct Tar {
    pub(crate) bytes: Vec<u8>,
}

impl Tar {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn header(name: &[u8], kind: u8, size: u64) -> Header {
        let mut header = Header::new_ustar();
        let fields = header.as_old_mut();
        fields.name[..name.len()].copy_from_slice(name);
        // Set by value, since the `tar` crate has one name for two of the types.
        header.as_old_mut().linkflag = [kind];
        header.set_mode(0o644);
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(1000);
        header.set_size(size);
        header
    }

    pub(crate) fn member(mut self, mut header: Header, content: &[u8]) -> Self {
        header.set_cksum();
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, name: &str, content: &str) -> Self {
        self.file_with_mode(name, content, 0o644)
    }

    pub(crate) fn file_with_mode(self, name: &str, content: &str, mode: u32) -> Self {
        let mut header = Self::header(name.as_bytes(), b'0', content.len() as u64);
        header.set_mode(mode);
        self.member(header, content.as_bytes())
    }

    pub(crate) fn folder(self, name: &str, mode: u32) -> Self {
        let mut header = Self::header(name.as_bytes(), b'5', 0);
        header.set_mode(mode);
        self.member(header, b"")
    }

    /// Adds a hard link (`b'1'`), a symbolic link (`b'2'`) or another type with a target.
    pub(crate) fn link(self, kind: u8, name: &str, target: &str) -> Self {
        let mut header = Self::header(name.as_bytes(), kind, 0);
        header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        self.member(header, b"")
    }

    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut content = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length += 1;
            }
            content.extend_from_slice(format!("{length} {key}=").as_bytes());
            content.extend_from_slice(value);
            content.push(b'\n');
        }
        let header = Self::header(b"pax", b'x', content.len() as u64);
        self.member(header, &content)
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.bytes.extend_from_slice(&[0; 1024]);
        self.bytes
    }

    /// Returns the entries that an image layer records of the archive.
    pub(crate) fn entries(self) -> Vec<Entry> {
        let mut memory = Memory::default();
        let (archive, limits) = (self.end(), Limits::default());
        let rule = PermissionsRule::Readable;
        unpack(archive.as_slice(), &IMAGE, rule, &limits, &mut memory).unwrap();
        memory.entries
    }
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 1).unwrap()
}

/// A sink that keeps all entries and contents in memory.
#[derive(Default)]
pub(crate) struct Memory {
    pub(crate) entries: Vec<Entry>,
    pub(crate) contents: Vec<Vec<u8>>,
}

impl Sink for Memory {
    fn file(
        &mut self,
        header: &FileHeader,
        content: &mut dyn BufRead,
    ) -> io::Result<StoredContent> {
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes)?;
        assert_eq!(bytes.len() as u64, header.size, "content of another length must be an error");
        let stored = StoredContent {
            data: u32::try_from(self.contents.len()).unwrap(),
            checksum: Checksum::of(&bytes),
        };
        self.contents.push(bytes);
        Ok(stored)
    }

    fn entry(&mut self, entry: Entry) -> io::Result<()> {
        self.entries.push(entry);
        Ok(())
    }
}

impl Memory {
    /// Returns the entries in order, as lines such as `path=content`.
    pub(crate) fn lines(&self) -> Vec<String> {
        let line = |entry: &Entry| {
            let path = match entry.path.as_bytes() {
                b"" => ".".into(),
                path => String::from_utf8_lossy(path),
            };
            match &entry.kind {
                EntryKind::Directory => format!("{path}/"),
                EntryKind::File { data, .. } => {
                    format!("{path}={}", String::from_utf8_lossy(&self.contents[*data as usize]))
                }
                EntryKind::SymbolicLink { target } => {
                    format!("{path}->{}", String::from_utf8_lossy(target))
                }
                EntryKind::HardLink { target } => format!("{path}=>{target}"),
                EntryKind::Special => format!("{path}!"),
                EntryKind::Whiteout => format!("-{path}"),
                EntryKind::Opaque => format!("-{path}/*"),
            }
        };
        self.entries.iter().map(line).collect()
    }
}

pub(crate) fn unpack_all(
    bytes: &[u8],
    rule: &ArchiveRule,
    limits: &Limits,
) -> (Result<Totals, UnpackError>, Memory) {
    let mut memory = Memory::default();
    let result = unpack(bytes, rule, PermissionsRule::Readable, limits, &mut memory);
    (result, memory)
}

/// Returns the error of unpacking an image layer with the default limits.
pub(crate) fn refusal(bytes: &[u8]) -> UnpackError {
    unpack_all(bytes, &IMAGE, &Limits::default()).0.expect_err("it lies")
}
