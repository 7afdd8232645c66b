//! The tar format: reads blocks as members, with their extended headers applied.
//!
//! Reads what Go's `archive/tar` reads, since Go programs write nearly all layers and unpack them
//! elsewhere: v7, ustar, pax and GNU, with their sparse files.
//!
//! The `tar` crate is not used: it holds extended headers of any size in memory, splits pax values
//! at newlines (values of extended attributes are binary), applies the type of v7's files and
//! folders to later files, and drops the upper half of large numbers. Two readers that disagree
//! about the end of a member see two different archives, so ambiguous input is refused here.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Read};
use std::ops::Range;

use super::archive_entry::Timestamp;
use super::decompressed_content::DecompressedContent;
use super::error::{UnpackError, shown};
use super::permissions::Owner;
use super::unpack_limits::Limits;

mod sparse_files;

use sparse_files::{Extent, SparseForm, SparseParts};

const BLOCK: usize = 512;
/// Maximum number of headers for one entry, its own included. Entries are counted and give way to other unpackings;
/// headers alone do neither.
const MAXIMUM_HEADERS: usize = 64;

/// Reader of the members of an archive.
pub(super) struct TarReader<'a> {
    content: DecompressedContent,
    limits: &'a Limits,
    /// Unread bytes of the current member, and the padding after them.
    remaining: u64,
    padding: u64,
    /// Unread parts of the current member, if it is a sparse file.
    sparse: Option<SparseParts>,
    /// Bytes of holes that were read so far.
    expanded: u64,
    /// Failure during a read of the current member through [`BufRead`].
    failure: Option<UnpackError>,
}

/// One member. Only its numbers are checked.
#[derive(Debug)]
pub(super) struct ArchiveMember {
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) kind: MemberKind,
    pub(super) size: u64,
    pub(super) mode: u32,
    pub(super) uid: Owner,
    pub(super) gid: Owner,
    pub(super) modified: Timestamp,
    /// Names without their pax prefix, in all namespaces.
    pub(super) extended_attributes: PaxRecords,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MemberKind {
    File,
    Directory,
    HardLink,
    SymbolicLink,
    /// A device node or a fifo.
    Special,
}

const MODE: Range<usize> = 100..108;
const UID: Range<usize> = 108..116;
const GID: Range<usize> = 116..124;
const SIZE: Range<usize> = 124..136;
const MODIFIED: Range<usize> = 136..148;
const CHECKSUM: Range<usize> = 148..156;

/// The block that describes a member, as it is written.
struct TarHeader([u8; BLOCK]);

/// Values by key. The last of several records with one key counts, and an empty value removes the
/// key.
pub(super) type PaxRecords = BTreeMap<Box<[u8]>, Box<[u8]>>;

/// Extended headers that precede a member.
#[derive(Default)]
struct ExtendedHeaders {
    pax: Option<PaxRecords>,
    /// Empty if there is none, as an empty name is ignored.
    long_name: Vec<u8>,
    long_link: Vec<u8>,
}

impl<'a> TarReader<'a> {
    pub(super) fn new(content: DecompressedContent, limits: &'a Limits) -> Self {
        Self { content, limits, remaining: 0, padding: 0, sparse: None, expanded: 0, failure: None }
    }

    /// Returns the next member. Skips unread bytes of the previous one.
    pub(super) fn next(&mut self) -> Result<Option<ArchiveMember>, UnpackError> {
        let mut extensions = ExtendedHeaders::default();
        for _ in 0..MAXIMUM_HEADERS {
            self.skip_member()?;
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            let size = self.number(&header.0[SIZE], "a size is not a number")?;
            // As in Go's reader, the last header of each kind counts, with all its records.
            match header.kind() {
                b'x' => {
                    let bytes = self.extended_header(size)?;
                    let records = pax_records(&bytes)
                        .ok_or_else(|| self.broken("a pax header is malformed"))?;
                    extensions.pax = Some(records);
                }
                b'L' => extensions.long_name = text(&self.extended_header(size)?).to_vec(),
                b'K' => extensions.long_link = text(&self.extended_header(size)?).to_vec(),
                // Global pax headers (git writes one) are ignored, as in containerd. Go's reader takes one for an
                // entry, which the extended headers before it describe.
                b'g' => {
                    extensions = ExtendedHeaders::default();
                    let size = self.content_size(size)?;
                    self.starts(size);
                }
                _ => return self.member(&header, size, extensions).map(Some),
            }
        }
        Err(self.broken("too many extended headers precede an entry"))
    }

    /// Returns the content after the last member.
    pub(super) fn into_content(self) -> DecompressedContent {
        self.content
    }

    /// Takes the failure that a read of the current member through [`Read`] had.
    pub(super) fn failure(&mut self) -> Option<UnpackError> {
        self.failure.take()
    }

    /// Combines a header with the extended ones before it, as Go's reader does.
    fn member(
        &mut self,
        header: &TarHeader,
        size: i64,
        extensions: ExtendedHeaders,
    ) -> Result<ArchiveMember, UnpackError> {
        let mut name = header.name();
        let mut link = text(header.link()).to_vec();
        let mut size = size;
        let mode = self.number(&header.0[MODE], "a mode is not a number")?;
        let owner = |number: Option<i64>| number.map_or(Owner::Unreadable, Owner::Number);
        let mut uid = owner(number(&header.0[UID]));
        let mut gid = owner(number(&header.0[GID]));
        let seconds = self.number(&header.0[MODIFIED], "a time is not a number")?;
        let mut modified = Timestamp { seconds, nanoseconds: 0 };
        let mut extended_attributes = PaxRecords::new();
        let form = match header.kind() {
            b'S' => Some(SparseForm::OldGnu),
            _ => extensions.pax.as_ref().and_then(SparseForm::of),
        };
        let records = extensions.pax.unwrap_or_default();
        for (key, value) in records.iter().filter(|(_, value)| !value.is_empty()) {
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                extended_attributes.insert(name.into(), value.clone());
                continue;
            }
            match &**key {
                b"path" => name = value.to_vec(),
                b"linkpath" => link = value.to_vec(),
                b"size" => {
                    size = signed_decimal(value)
                        .ok_or_else(|| self.broken("a number in a pax header is malformed"))?;
                }
                b"uid" => uid = owner(signed_decimal(value)),
                b"gid" => gid = owner(signed_decimal(value)),
                b"mtime" => {
                    modified = pax_time(value)
                        .ok_or_else(|| self.broken("a time in a pax header is malformed"))?;
                }
                _ => {}
            }
        }
        if !extensions.long_name.is_empty() {
            name = extensions.long_name;
        }
        if !extensions.long_link.is_empty() {
            link = extensions.long_link;
        }
        if form.is_some() {
            name = records.get(&b"GNU.sparse.name"[..]).map_or(name, |name| name.to_vec());
        }
        let kind = match header.kind() {
            // Before ustar, folders were files with a trailing slash.
            0 if name.ends_with(b"/") && size == 0 => MemberKind::Directory,
            // Go's reader reads the next bytes as headers, others as content.
            0 if name.ends_with(b"/") => return Err(self.broken("a folder has content")),
            0 | b'0' | b'7' | b'S' => MemberKind::File,
            b'1' => MemberKind::HardLink,
            b'2' => MemberKind::SymbolicLink,
            b'3' | b'4' | b'6' => MemberKind::Special,
            b'5' => MemberKind::Directory,
            other => {
                return Err(UnpackError::EntryType { name: shown(&name), kind: shown(&[other]) });
            }
        };
        // As in Go's reader, other types have no content, whatever their size is.
        let size = match (kind, form) {
            (MemberKind::File, None) => {
                let size = self.content_size(size)?;
                self.starts(size);
                size
            }
            (MemberKind::File, Some(form)) => {
                let size = self.content_size(size)?;
                self.start_sparse(form, header, size, &name, &records)?
            }
            (_, None) => 0,
            (_, Some(_)) => return Err(self.broken("something else than a file is sparse")),
        };
        Ok(ArchiveMember {
            name,
            link,
            kind,
            size,
            // Later code uses the permission bits only.
            mode: u32::try_from(mode & 0o7777).unwrap_or_default(),
            uid,
            gid,
            modified,
            extended_attributes,
        })
    }

    /// Reads the next header. `None` at the end of the archive: two blocks of zeros, or the end of
    /// the content, as some writers leave it.
    fn header(&mut self) -> Result<Option<TarHeader>, UnpackError> {
        let mut header = TarHeader([0; BLOCK]);
        if !self.block(&mut header.0)? {
            return Ok(None);
        }
        if header.0 == [0; BLOCK] {
            let mut second = [0; BLOCK];
            if self.block(&mut second)? && second != [0; BLOCK] {
                return Err(self.broken("something follows a block of zeros"));
            }
            return Ok(None);
        }
        let bytes = &header.0;
        let expected = self.number(&header.0[CHECKSUM], "a checksum is not a number")?;
        let summed = || bytes[..148].iter().chain(&[b' '; 8]).chain(&bytes[156..]);
        let unsigned: i64 = summed().map(|&byte| i64::from(byte)).sum();
        // Some old writers summed signed bytes.
        let signed: i64 = summed().map(|&byte| i64::from(byte.cast_signed())).sum();
        if expected != unsigned && expected != signed {
            return Err(self.broken("the checksum of a header is wrong"));
        }
        Ok(Some(header))
    }

    /// Fills a block. Returns false at the end of the content.
    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, UnpackError> {
        let mut filled = 0;
        while filled < BLOCK {
            match self.content.read(&mut block[filled..])? {
                0 if filled == 0 => return Ok(false),
                0 => return Err(self.broken("it ends in the middle of a header")),
                read => filled += read,
            }
        }
        Ok(true)
    }

    /// Reads the content of an extended header, which has to be held in memory.
    fn extended_header(&mut self, size: i64) -> Result<Vec<u8>, UnpackError> {
        let size = self.content_size(size)?;
        let limit = self.limits.header_bytes;
        if size > limit {
            return Err(UnpackError::HeaderTooLarge { size, limit });
        }
        self.starts(size);
        let mut bytes = Vec::new();
        loop {
            let read = self.fill_member()?;
            if read.is_empty() {
                return Ok(bytes);
            }
            bytes.extend_from_slice(read);
            let length = read.len();
            self.consume_member(length);
        }
    }

    fn starts(&mut self, size: u64) {
        self.remaining = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
        self.sparse = None;
    }

    /// Returns the next bytes of the current member; an empty slice at its end.
    fn fill_member(&mut self) -> Result<&[u8], UnpackError> {
        let most = match &mut self.sparse {
            None => self.remaining,
            Some(parts) => match parts.next() {
                Extent::Hole(length) => {
                    self.check_ratio()?;
                    return Ok(sparse_files::zeros(length));
                }
                Extent::Data(length) => length,
            },
        };
        if most == 0 {
            return Ok(&[]);
        }
        let position = self.content.position;
        let bytes = self.content.fill()?;
        if bytes.is_empty() {
            let reason = "it ends in the middle of an entry";
            return Err(UnpackError::Archive { reason, position });
        }
        let length = usize::try_from(most).unwrap_or(usize::MAX).min(bytes.len());
        Ok(&bytes[..length])
    }

    fn consume_member(&mut self, bytes: usize) {
        if let Some(parts) = &mut self.sparse
            && parts.consume(bytes as u64)
        {
            self.expanded = self.expanded.saturating_add(bytes as u64);
            return;
        }
        self.content.consume(bytes);
        self.remaining = self.remaining.saturating_sub(bytes as u64);
    }

    /// Bounds the expansion of holes, as the decompression ratio bounds stored zeros.
    fn check_ratio(&self) -> Result<(), UnpackError> {
        let unpacked = self.content.position.saturating_add(self.expanded);
        let limit = self.limits.decompression_ratio;
        let is_much = unpacked > self.limits.decompression_ratio_floor;
        if is_much && unpacked > self.content.packed.saturating_mul(limit) {
            return Err(UnpackError::Ratio { limit });
        }
        Ok(())
    }

    fn skip_member(&mut self) -> Result<(), UnpackError> {
        // Holes have no bytes in the archive.
        self.sparse = None;
        loop {
            let length = self.fill_member()?.len();
            if length == 0 {
                break;
            }
            self.consume_member(length);
        }
        while self.padding > 0 {
            let available = self.content.fill()?.len() as u64;
            // A truncated padding loses no content.
            let skipped = if available == 0 { self.padding } else { available.min(self.padding) };
            self.content.consume(usize::try_from(skipped).unwrap_or_default());
            self.padding -= skipped;
        }
        Ok(())
    }

    fn pax_number(&self, value: &[u8]) -> Result<u64, UnpackError> {
        let number = decimal(value).map(i64::unsigned_abs);
        number.ok_or_else(|| self.broken("a number in a pax header is malformed"))
    }

    fn content_size(&self, size: i64) -> Result<u64, UnpackError> {
        u64::try_from(size).map_err(|_| self.broken("a size is negative"))
    }

    fn number(&self, field: &[u8], reason: &'static str) -> Result<i64, UnpackError> {
        number(field).ok_or_else(|| self.broken(reason))
    }

    fn broken(&self, reason: &'static str) -> UnpackError {
        UnpackError::Archive { reason, position: self.content.position }
    }
}

/// Reads the content of the current member.
impl BufRead for TarReader<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.failure.is_some() {
            return Err(io::Error::other("the layer failed before"));
        }
        // The call is repeated: a stored failure and returned bytes cannot borrow `self` at once.
        if let Err(error) = self.fill_member() {
            let passed_on = io::Error::other(error.to_string());
            self.failure = Some(error);
            return Err(passed_on);
        }
        self.fill_member().map_err(|error| io::Error::other(error.to_string()))
    }

    fn consume(&mut self, bytes: usize) {
        self.consume_member(bytes);
    }
}

impl Read for TarReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.fill_buf()?.read(buffer)?;
        self.consume(length);
        Ok(length)
    }
}

impl TarHeader {
    fn kind(&self) -> u8 {
        self.0[156]
    }

    fn link(&self) -> &[u8] {
        &self.0[157..257]
    }

    /// Returns the name, composed as Go's reader does: the magic determines the format, and the
    /// version of ustar is ignored.
    fn name(&self) -> Vec<u8> {
        let bytes = &self.0;
        let is_no_number = |field: &[u8]| field[0] != 0 && number(field).is_none();
        let prefix = match (&bytes[257..263], &bytes[263..265], &bytes[508..]) {
            // star has times at the end of the prefix field.
            (b"ustar\0", _, b"tar\0") => text(&bytes[345..476]),
            (b"ustar\0", ..) => text(&bytes[345..500]),
            // GNU has two times in place of a prefix. Go wrote a prefix there until 1.8.
            (b"ustar ", b" \0", _)
                if is_no_number(&bytes[345..357]) || is_no_number(&bytes[357..369]) =>
            {
                Some(text(&bytes[345..500])).filter(|prefix| prefix.is_ascii()).unwrap_or_default()
            }
            _ => &[],
        };
        let name = text(&bytes[..100]);
        if prefix.is_empty() { name.to_vec() } else { [prefix, name].join(&b'/') }
    }
}

/// Returns the text of a field, which ends at a NUL or with the field.
fn text(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// Parses a number of a header: octal digits between spaces and NULs or, marked by the first bit,
/// two's complement in base 256.
fn number(field: &[u8]) -> Option<i64> {
    if field.first()? & 0x80 == 0 {
        let is_blank = |byte: &u8| *byte == b' ' || *byte == 0;
        let start = field.iter().position(|byte| !is_blank(byte)).unwrap_or(field.len());
        let digits = field[start..].split(is_blank).next().unwrap_or_default();
        return digits.iter().try_fold(0_i64, |value, &digit| match digit {
            b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
            _ => None,
        });
    }
    let inverted = if field[0] & 0x40 == 0 { 0 } else { 0xff };
    let mut value = 0_i64;
    for (index, &byte) in field.iter().enumerate() {
        let mut byte = byte ^ inverted;
        if index == 0 {
            byte &= 0x7f;
        }
        if value >> 55 != 0 {
            return None;
        }
        value = value << 8 | i64::from(byte);
    }
    Some(if inverted == 0 { value } else { !value })
}

/// Parses a pax number: decimal digits, at most `i64::MAX`.
fn decimal(digits: &[u8]) -> Option<i64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_i64, |value, &digit| match digit {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

/// Parses a pax number that may be negative.
fn signed_decimal(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Parses a pax time: seconds since 1970 with an optional sign and fraction.
fn pax_time(value: &[u8]) -> Option<Timestamp> {
    const NANOSECONDS: u32 = 1_000_000_000;
    let (is_negative, value) = match value.strip_prefix(b"-") {
        Some(value) => (true, value),
        None => (false, value),
    };
    let mut parts = value.splitn(2, |&byte| byte == b'.');
    let seconds = decimal(parts.next()?)?;
    let fraction = parts.next().unwrap_or_default();
    let mut nanoseconds = 0;
    for index in 0..9 {
        let digit = *fraction.get(index).unwrap_or(&b'0');
        if !digit.is_ascii_digit() {
            return None;
        }
        nanoseconds = nanoseconds * 10 + u32::from(digit - b'0');
    }
    Some(match (is_negative, nanoseconds) {
        (false, _) => Timestamp { seconds, nanoseconds },
        (true, 0) => Timestamp { seconds: -seconds, nanoseconds },
        (true, _) => Timestamp { seconds: -seconds - 1, nanoseconds: NANOSECONDS - nanoseconds },
    })
}

/// Parses records `<length> <key>=<value>\n`, whose length includes all of the record.
///
/// The first form of sparse files repeats two keys for each extent. They become one record, as in
/// the form after it.
fn pax_records(mut bytes: &[u8]) -> Option<PaxRecords> {
    let mut records = PaxRecords::new();
    let mut sparse_map: Vec<&[u8]> = Vec::new();
    while !bytes.is_empty() {
        let space = bytes.iter().take(20).position(|&byte| byte == b' ')?;
        let length = usize::try_from(decimal(&bytes[..space])?).ok()?;
        let record = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|&byte| byte == b'=')?;
        if equals == 0 {
            return None;
        }
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        match key {
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                let is_in_turn = sparse_map.len() % 2 == usize::from(key != b"GNU.sparse.offset");
                if !is_in_turn || value.contains(&b',') {
                    return None;
                }
                sparse_map.push(value);
            }
            _ => {
                records.insert(key.into(), value.into());
            }
        }
        bytes = &bytes[length..];
    }
    if !sparse_map.is_empty() {
        records.insert((*b"GNU.sparse.map").into(), sparse_map.join(&b',').into());
    }
    Some(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_the_prefix_that_gos_reader_gives_them() {
        let with = |magic: &[u8; 8], prefix: &[u8], trailer: &[u8]| {
            let mut header = TarHeader([0; BLOCK]);
            let bytes = &mut header.0;
            bytes[..4].copy_from_slice(b"name");
            bytes[257..265].copy_from_slice(magic);
            bytes[345..345 + prefix.len()].copy_from_slice(prefix);
            bytes[512 - trailer.len()..].copy_from_slice(trailer);
            String::from_utf8(header.name()).unwrap()
        };
        let long = [b'p'; 155];
        for version in [b"00", b"\0\0", b"  ", b"xx"] {
            let magic: &[u8; 8] = &[&b"ustar\0"[..], version].concat().try_into().unwrap();
            assert_eq!(with(magic, b"a/b", b""), "a/b/name");
            assert_eq!(with(magic, b"", b""), "name");
            assert_eq!(with(magic, &long, b""), format!("{}/name", "p".repeat(155)));
            assert_eq!(with(magic, &long, b"tar\0"), format!("{}/name", "p".repeat(131)));
        }
        assert_eq!(with(b"ustar  \0", b"00000000012\0", b""), "name", "GNU has a time there");
        assert_eq!(with(b"ustar  \0", b"a/b", b""), "a/b/name", "or what old Go took for one");
        assert_eq!(with(b"ustar  \0", "é".as_bytes(), b""), "name");
        assert_eq!(with(b"\0\0\0\0\0\0\0\0", b"a/b", b""), "name", "v7 has none");
    }

    #[test]
    fn numbers_in_both_forms() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"  644 \0\0"), Some(0o644));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(number(b"99999999"), None);
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 1, 2]), Some(258));
        assert_eq!(number(&[0xff; 12]), Some(-1));
        let mut wide = [0; 12];
        wide[0] = 0x80;
        wide[1] = 1;
        assert_eq!(number(&wide), None, "the upper half must not be dropped");
    }

    #[test]
    fn times_with_fraction_and_sign() {
        let time = |text: &str| pax_time(text.as_bytes()).map(|t| (t.seconds, t.nanoseconds));
        assert_eq!(time("1"), Some((1, 0)));
        assert_eq!(time("1.5"), Some((1, 500_000_000)));
        assert_eq!(time("1.1234567891"), Some((1, 123_456_789)));
        assert_eq!(time("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time("-0.5"), Some((-1, 500_000_000)));
        assert_eq!(time("x"), None);
        assert_eq!(time("1.x"), None);
        assert_eq!(time("99999999999999999999"), None);
    }

    #[test]
    fn pax_values_may_hold_newlines() {
        let records = pax_records(b"12 a=1\n2\n34\n6 b=c\n").unwrap();
        let records: Vec<_> = records.iter().map(|(k, v)| (&**k, &**v)).collect();
        assert_eq!(records, [(&b"a"[..], &b"1\n2\n34"[..]), (b"b", b"c")]);
        for broken in ["6 b=c", "7 b=c\n", "5 b=c\n", "x b=c\n", "5 =c\n", "4 b\n", " b=c\n", "0 "]
        {
            assert_eq!(pax_records(broken.as_bytes()), None, "{broken}");
        }
    }
}
