//! The index of a layer: its entries, its totals, and where its files lie.

use std::fs::File;
use std::io::{BufReader, Read, Seek as _};
use std::path::{Path, PathBuf};

use prost::Message as _;
use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use crate::error::StoreError;
use crate::layer_index_proto as wire;
use oci_types::Digest;
use sys::background::yield_to_pods;
use unpack::archive_entry::{Metadata, Timestamp};
use unpack::checksum::Checksum;
use unpack::{Entry, EntryKind, Limits, Permissions, RelativePath};

/// The first bytes of every index.
pub(super) const MAGIC: &[u8] = b"OCI layer index 1\n";

/// Folders have few files: ext4 looks through a block of names, up to 340 of these short ones, at
/// each name that is made or looked up, which took half of the time of making a small file.
pub(super) const FILES_PER_FOLDER: u32 = 64;

/// A file's number tells its folder. Folders that were filled to this number of files are read as
/// well; where they end earlier, numbers are left out.
const NUMBERS_PER_FOLDER: u32 = 4096;

/// The totals of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerTotals {
    /// Entries of the archive.
    pub entries: u64,
    /// Bytes of regular files.
    pub bytes: u64,
    /// The number of regular files.
    #[serde(default)]
    pub files: u64,
    /// Bytes of the blocks of those files and of the index; 0 where they were not counted.
    #[serde(default)]
    pub disk_bytes: u64,
    /// The blob that was unpacked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blob: Option<Digest>,
}

/// The entries of a layer, in the archive's order.
pub struct Entries {
    path: PathBuf,
    reader: BufReader<File>,
    limits: Limits,
    record: Vec<u8>,
    /// Offset of the entry that was read last.
    pub offset: u64,
    /// Offset of the next entry.
    next: u64,
}

/// Reads single entries of a layer's index.
pub(crate) struct IndexReader {
    file: File,
    limits: Limits,
    /// Offset of the window.
    start: u64,
    /// The bytes that were read last, since entries are mostly read in their order.
    window: Vec<u8>,
}

/// Bytes of an index that are read at once, where no larger entry asks for more.
const WINDOW: usize = 16 << 10;

/// Bytes of an entry with its path, target and extended attributes, at most, as `limits` bounds them.
const LARGEST_RECORD: usize = 4 << 20;

impl Entries {
    /// Compares an index with its checksum, and starts to read it.
    pub(super) fn read(mut file: File, path: PathBuf) -> Result<Self, StoreError> {
        let failed = |error| StoreError::io("read", &path, error);
        let length = file.metadata().map_err(failed)?.len();
        let body = length.checked_sub(32).ok_or_else(|| damaged(&path, "it is cut short"))?;
        let mut hasher = sha2::Sha256::new();
        let mut buffer = vec![0; 64 * 1024];
        let mut reader = (&mut file).take(body);
        loop {
            match reader.read(&mut buffer).map_err(failed)? {
                0 => break,
                count => hasher.update(&buffer[..count]),
            }
        }
        let mut checksum = [0; 32];
        file.read_exact(&mut checksum).map_err(failed)?;
        if checksum != <[u8; 32]>::from(hasher.finalize()) {
            return Err(damaged(&path, "its checksum does not match"));
        }
        file.rewind().map_err(failed)?;
        let mut reader = BufReader::with_capacity(64 * 1024, file);
        let mut magic = [0; MAGIC.len()];
        reader.read_exact(&mut magic).map_err(failed)?;
        if magic != MAGIC {
            return Err(damaged(&path, "it is not an index"));
        }
        // Reads an accepted index under any later limits; merging compares with the current ones.
        let limits = Limits { depth: 1024, ..Limits::default() };
        let next = MAGIC.len() as u64;
        Ok(Self { path, reader, limits, record: Vec::new(), offset: 0, next })
    }
}

impl IndexReader {
    pub(super) fn new(file: File) -> Self {
        let limits = Limits { depth: 1024, ..Limits::default() };
        Self { file, limits, start: 0, window: Vec::new() }
    }

    /// Reads the entry at an offset.
    pub(crate) fn read(&mut self, offset: u64) -> std::io::Result<Entry> {
        use std::os::unix::fs::FileExt as _;
        let mut size = WINDOW;
        loop {
            let skipped = offset.checked_sub(self.start).and_then(|n| usize::try_from(n).ok());
            let record = skipped.and_then(|skipped| self.window.get(skipped..));
            if let Some(record) = record.and_then(delimited_record) {
                let record = wire::Entry::decode(record).ok();
                let entry = record.and_then(|record| decode(record, &self.limits));
                return entry.ok_or_else(|| std::io::ErrorKind::InvalidData.into());
            }
            self.window.resize(size, 0);
            let mut filled = 0;
            while filled < size {
                match self.file.read_at(&mut self.window[filled..], offset + filled as u64)? {
                    0 => break,
                    read => filled += read,
                }
            }
            self.window.truncate(filled);
            self.start = offset;
            let is_all = filled < size || size == LARGEST_RECORD;
            if is_all && delimited_record(&self.window).is_none() {
                return Err(std::io::ErrorKind::InvalidData.into());
            }
            size = (size * 8).min(LARGEST_RECORD);
        }
    }
}

/// Returns the record at the start of some bytes; none where they end before it does.
fn delimited_record(bytes: &[u8]) -> Option<&[u8]> {
    let mut rest = bytes;
    let length = usize::try_from(read_varint(&mut rest)?).ok()?;
    rest.get(..length)
}

impl Iterator for Entries {
    type Item = Result<Entry, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        yield_to_pods();
        let failed = || damaged(&self.path, "a record cannot be decoded");
        let length = match read_varint(&mut self.reader) {
            Some(0) => return None,
            Some(length) => length,
            None => return Some(Err(failed())),
        };
        let of_length = prost::length_delimiter_len(usize::try_from(length).unwrap_or(usize::MAX));
        self.offset = self.next;
        self.next = self.next.saturating_add(length).saturating_add(of_length as u64);
        self.record.clear();
        let read = (&mut self.reader).take(length).read_to_end(&mut self.record);
        let whole = read.is_ok_and(|count| count as u64 == length);
        let record = whole.then(|| wire::Entry::decode(self.record.as_slice()).ok()).flatten();
        Some(record.and_then(|record| decode(record, &self.limits)).ok_or_else(failed))
    }
}

/// The totals at the end of a layer's index, for accounting: unverified.
pub(crate) fn read_totals(layer: &Path) -> Option<LayerTotals> {
    use std::os::unix::fs::FileExt as _;
    /// More than the totals and the checksum take.
    const END: u64 = 1024;
    let file = File::open(layer.join("index")).ok()?;
    let length = file.metadata().ok()?.len();
    let mut end = vec![0; usize::try_from(length.min(END)).ok()?];
    file.read_exact_at(&mut end, length.saturating_sub(END)).ok()?;
    let totals = &end[..end.len().checked_sub(32)?];
    // The empty record before them is a zero byte, which JSON has none of.
    let start = totals.iter().rposition(|&byte| byte == 0)? + 1;
    serde_json::from_slice(&totals[start..]).ok()
}

fn damaged(path: &Path, what: &str) -> StoreError {
    StoreError::Damaged { path: path.to_owned(), what: what.to_owned() }
}

/// Returns the path of regular file `number` below its layer.
pub(crate) fn data(number: u32) -> PathBuf {
    format!("data/{}/{number}", folder_of(number)).into()
}

pub(super) fn folder_of(number: u32) -> u32 {
    number / NUMBERS_PER_FOLDER
}

/// The number of the file before which there were so many.
pub(super) fn number_of(files: u32) -> Option<u32> {
    let folder = (files / FILES_PER_FOLDER).checked_mul(NUMBERS_PER_FOLDER)?;
    folder.checked_add(files % FILES_PER_FOLDER)
}

fn read_varint(reader: &mut impl Read) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..63).step_by(7) {
        let mut byte = [0];
        reader.read_exact(&mut byte).ok()?;
        value |= u64::from(byte[0] & 0x7f) << shift;
        if byte[0] & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

pub(super) fn encode(entry: Entry) -> wire::Entry {
    use wire::entry::Kind;
    let Metadata { permissions, modified, extended_attributes } = entry.metadata;
    let mut record = wire::Entry {
        path: entry.path.as_bytes().to_vec(),
        mode: permissions.mode,
        uid: permissions.uid,
        gid: permissions.gid,
        mtime_seconds: modified.seconds,
        mtime_nanoseconds: modified.nanoseconds,
        extended_attributes: extended_attributes
            .iter()
            .map(|(name, value)| wire::ExtendedAttribute { name: name.into(), value: value.into() })
            .collect(),
        ..wire::Entry::default()
    };
    let kind = match entry.kind {
        EntryKind::Directory => Kind::Directory,
        EntryKind::File { size, data, checksum } => {
            record.size = size;
            record.data = data;
            match checksum {
                Checksum::Xxh3(checksum) => record.xxh3 = checksum.to_be_bytes().to_vec(),
                Checksum::Sha256(digest) => record.sha256 = digest.as_bytes().to_vec(),
            }
            Kind::File
        }
        EntryKind::SymbolicLink { target } => {
            record.link = target.into_vec();
            Kind::SymbolicLink
        }
        EntryKind::HardLink { target } => {
            record.link = target.as_bytes().to_vec();
            Kind::HardLink
        }
        EntryKind::Whiteout => Kind::Whiteout,
        EntryKind::Opaque => Kind::Opaque,
        EntryKind::Special => Kind::Special,
    };
    record.kind = kind.into();
    record
}

fn decode(record: wire::Entry, limits: &Limits) -> Option<Entry> {
    use wire::entry::Kind;
    let path = |bytes: &[u8]| match bytes {
        // The root, which an archive may give modes and times.
        b"" => Some(RelativePath::root()),
        bytes => RelativePath::parse(bytes, limits).ok(),
    };
    let kind = match record.kind() {
        Kind::Unspecified => return None,
        Kind::Directory => EntryKind::Directory,
        Kind::File => EntryKind::File {
            size: record.size,
            data: record.data,
            checksum: match (record.xxh3.as_slice(), record.sha256.as_slice()) {
                (xxh3, []) => Checksum::Xxh3(u128::from_be_bytes(xxh3.try_into().ok()?)),
                (_, sha256) => Checksum::Sha256(Digest::from_bytes(sha256.try_into().ok()?)),
            },
        },
        Kind::SymbolicLink => EntryKind::SymbolicLink { target: record.link.into_boxed_slice() },
        Kind::HardLink => EntryKind::HardLink { target: path(&record.link)? },
        Kind::Whiteout => EntryKind::Whiteout,
        Kind::Opaque => EntryKind::Opaque,
        Kind::Special => EntryKind::Special,
    };
    let attributes = record.extended_attributes.into_iter();
    Some(Entry {
        path: path(&record.path)?,
        kind,
        metadata: Metadata {
            permissions: Permissions { mode: record.mode, uid: record.uid, gid: record.gid },
            modified: Timestamp {
                seconds: record.mtime_seconds,
                nanoseconds: record.mtime_nanoseconds,
            },
            extended_attributes: attributes
                .map(|attribute| (attribute.name.into(), attribute.value.into()))
                .collect(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LayerKey, Store};
    use unpack::archive::Sink as _;

    #[test]
    fn entries_are_read_again_in_any_order() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path(), crate::tests::options());
        let store = store.expect("a store");
        let mut writer = store.layers().write(Digest::of(b"layer")).expect("a layer");
        let path = |text: String| RelativePath::parse(text.as_bytes(), &Limits::default());
        let entry = |number: usize| {
            // Values are empty, within one read, or longer than one read.
            let value = vec![b'v'; (number % 7) * (WINDOW / 2)];
            let attribute = ((*b"user.a").into(), value.into());
            let metadata = Metadata {
                extended_attributes: [attribute].into_iter().collect(),
                ..Metadata::of_implied_folder()
            };
            let target = vec![b't'; 1 + number % 300].into();
            let kind = EntryKind::SymbolicLink { target };
            Entry { path: path(format!("folder/{number}")).expect("a path"), kind, metadata }
        };
        (0..200).for_each(|number| writer.entry(entry(number)).expect("an entry"));
        let key = LayerKey::new(Digest::of(b"layer"), "tar", "Readable");
        let view = store.layers().finish(key, writer).expect("a layer");
        let view = view.view().expect("a view");
        let mut entries = view.entries().expect("the index");
        let mut offsets = Vec::new();
        while let Some(read) = entries.next() {
            assert_eq!(read.expect("an entry"), entry(offsets.len()));
            offsets.push(entries.offset);
        }
        assert_eq!(offsets.len(), 200);
        let mut index = view.index().expect("the index");
        let there_and_back = (0..200).chain((0..200).rev()).chain((0..200).map(|n| n * 73 % 200));
        for number in there_and_back {
            assert_eq!(index.read(offsets[number]).expect("an entry"), entry(number));
        }
        assert!(index.read(u64::MAX / 2).is_err());
    }

    #[test]
    fn an_entry_of_the_largest_size_is_read_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path(), crate::tests::options());
        let store = store.expect("a store");
        let mut writer = store.layers().write(Digest::of(b"layer")).expect("a layer");
        let limits = Limits::largest();
        let attribute = |number: u32| {
            let name = format!("user.{number:0250}").into_bytes();
            (name.into(), vec![b'v'; limits.extended_attribute_bytes / 16 - 255].into())
        };
        let metadata = Metadata {
            extended_attributes: (0..16).map(attribute).collect(),
            ..Metadata::of_implied_folder()
        };
        let target = vec![b't'; limits.link_target_bytes].into();
        let path = RelativePath::parse(b"link", &limits).expect("a path");
        let entry = Entry { path, kind: EntryKind::SymbolicLink { target }, metadata };
        writer.entry(entry.clone()).expect("an entry");
        let key = LayerKey::new(Digest::of(b"layer"), "tar", "Readable");
        let view = store.layers().finish(key, writer).expect("a layer");
        let view = view.view().expect("a view");
        let mut entries = view.entries().expect("the index");
        assert_eq!(entries.next().expect("an entry").expect("readable"), entry);
        let mut index = view.index().expect("the index");
        assert_eq!(index.read(entries.offset).expect("an entry"), entry);
    }

    #[test]
    fn a_number_tells_the_folder() {
        let place = |files| number_of(files).map(|number| (folder_of(number), number));
        assert_eq!(place(0), Some((0, 0)));
        assert_eq!(place(63), Some((0, 63)));
        assert_eq!(place(64), Some((1, 4096)));
        assert_eq!(place(200), Some((3, 3 * 4096 + 8)));
        assert_eq!(place(u32::MAX), None);
        // Folders that were filled further.
        assert_eq!(data(4095), Path::new("data/0/4095"));
        assert_eq!(data(4096), Path::new("data/1/4096"));
    }
}
