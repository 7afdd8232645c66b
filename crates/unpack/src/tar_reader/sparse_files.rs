//! Sparse files: members whose holes are left out of the archive.
//!
//! ```text
//! old GNU    type `S`; the map is in the header and in blocks after it
//! pax 0.0    GNU.sparse.offset and GNU.sparse.numbytes, one pair for each extent
//! pax 0.1    GNU.sparse.map, all extents in one record
//! pax 1.0    the map is in the content, before the data
//! ```
//!
//! Sparse files are expanded: holes are read as zeros, and limits count their full size.

use std::vec::IntoIter;

use super::{BLOCK, PaxRecords, TarHeader, TarReader, decimal, number};
use crate::error::{UnpackError, shown};

/// Bytes of a hole that one read returns.
const ZEROS: usize = 64 << 10;

/// Format of a sparse file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SparseForm {
    OldGnu,
    /// The map is in the pax header.
    Pax0,
    /// The map is in the content.
    Pax1,
    Unknown,
}

/// A part of a sparse file, by its length.
pub(super) enum Extent {
    Hole(u64),
    /// Empty at the end of the file.
    Data(u64),
}

/// Unread parts of a sparse file.
pub(super) struct SparseParts {
    hole: u64,
    data: u64,
    /// Lengths of holes and of the data after them.
    rest: IntoIter<(u64, u64)>,
}

/// Offsets and lengths of the data of a sparse file.
type SparseMap = Vec<(u64, u64)>;

impl SparseForm {
    /// Returns the form of a member with these records, if it is sparse.
    pub(super) fn of(records: &PaxRecords) -> Option<Self> {
        let record = |key: &[u8]| records.get(key).map(|value| &**value).filter(|v| !v.is_empty());
        match (record(b"GNU.sparse.major"), record(b"GNU.sparse.minor")) {
            (Some(b"1"), Some(b"0")) => Some(Self::Pax1),
            (Some(b"0"), Some(b"0" | b"1")) => Some(Self::Pax0),
            (None, None) => {
                let has_map = [&b"GNU.sparse.map"[..], b"GNU.sparse.numblocks"];
                has_map.iter().any(|key| record(key).is_some()).then_some(Self::Pax0)
            }
            _ => Some(Self::Unknown),
        }
    }
}

impl SparseParts {
    /// Returns the next part.
    pub(super) fn next(&mut self) -> Extent {
        while self.hole == 0 && self.data == 0 {
            let Some((hole, data)) = self.rest.next() else { break };
            (self.hole, self.data) = (hole, data);
        }
        if self.hole > 0 { Extent::Hole(self.hole) } else { Extent::Data(self.data) }
    }

    /// Consumes bytes of the next part. Returns whether they are those of a hole.
    pub(super) fn consume(&mut self, bytes: u64) -> bool {
        let is_hole = self.hole > 0;
        let part = if is_hole { &mut self.hole } else { &mut self.data };
        *part = part.saturating_sub(bytes);
        is_hole
    }
}

/// Returns the first bytes of a hole.
pub(super) fn zeros(length: u64) -> &'static [u8] {
    static BYTES: [u8; ZEROS] = [0; ZEROS];
    &BYTES[..usize::try_from(length).unwrap_or(ZEROS).min(ZEROS)]
}

impl TarReader<'_> {
    /// Starts a sparse file whose member has `member_size` bytes. Returns the size of the file.
    pub(super) fn start_sparse(
        &mut self,
        form: SparseForm,
        header: &TarHeader,
        member_size: u64,
        name: &[u8],
        records: &PaxRecords,
    ) -> Result<u64, UnpackError> {
        let record = |key: &[u8]| records.get(key).filter(|value| !value.is_empty());
        let (map, size) = match form {
            SparseForm::OldGnu if header.is_gnu() => {
                let size = self.sparse_number(header.sparse_size())?;
                let map = self.map_of_headers(header)?;
                self.starts(member_size);
                (map, size)
            }
            SparseForm::OldGnu | SparseForm::Unknown => {
                return Err(UnpackError::Sparse { name: shown(name) });
            }
            SparseForm::Pax0 | SparseForm::Pax1 => {
                let size = record(b"GNU.sparse.size").or(record(b"GNU.sparse.realsize"));
                let size = size.map_or(Ok(member_size), |size| self.pax_number(size))?;
                self.starts(member_size);
                let map = if form == SparseForm::Pax1 {
                    self.map_of_content()?
                } else {
                    self.map_of_records(record(b"GNU.sparse.map").map_or(b"", |map| map))?
                };
                (map, size)
            }
        };
        self.sparse = Some(self.parts(map, size)?);
        Ok(size)
    }

    /// Checks a map against the size of the file and of the data that follows.
    fn parts(&self, map: SparseMap, size: u64) -> Result<SparseParts, UnpackError> {
        let mut parts = Vec::with_capacity(map.len() + 1);
        let (mut position, mut data) = (0_u64, 0_u64);
        for (offset, length) in map {
            let end = offset.checked_add(length).filter(|&end| end <= size);
            let (Some(hole), Some(end)) = (offset.checked_sub(position), end) else {
                return Err(self.broken("the map of a sparse file is out of order"));
            };
            parts.push((hole, length));
            position = end;
            data += length;
        }
        if data != self.remaining {
            return Err(self.broken("a sparse file has other data than its map says"));
        }
        parts.push((size - position, 0));
        Ok(SparseParts { hole: 0, data: 0, rest: parts.into_iter() })
    }

    /// Reads the map of the old form: up to 4 extents in the header, 21 in each block after it.
    fn map_of_headers(&mut self, header: &TarHeader) -> Result<SparseMap, UnpackError> {
        let mut map = SparseMap::new();
        let (mut extents, mut has_more) = (header.0[386..482].to_vec(), header.0[482] != 0);
        let mut bytes = 0;
        loop {
            for extent in extents.chunks_exact(24).take_while(|extent| extent[0] != 0) {
                let (offset, length) = extent.split_at(12);
                map.push((self.sparse_number(offset)?, self.sparse_number(length)?));
            }
            if !has_more {
                return Ok(map);
            }
            bytes += BLOCK as u64;
            self.check_map(bytes)?;
            let mut block = [0; BLOCK];
            if !self.block(&mut block)? {
                return Err(self.broken("it ends in the middle of a header"));
            }
            (extents, has_more) = (block[..504].to_vec(), block[504] != 0);
        }
    }

    /// Reads the map of the last form, in whole blocks at the start of the content: the number of
    /// extents, then decimal numbers, one per line.
    fn map_of_content(&mut self) -> Result<SparseMap, UnpackError> {
        let (mut text, mut lines, mut expected) = (Vec::new(), 0, 1);
        while lines < expected {
            self.check_map((text.len() + BLOCK) as u64)?;
            let start = text.len();
            while text.len() < start + BLOCK {
                let missing = start + BLOCK - text.len();
                let bytes = self.fill_member()?;
                let length = bytes.len().min(missing);
                text.extend_from_slice(&bytes[..length]);
                if length == 0 {
                    return Err(self.broken("the map of a sparse file has no end"));
                }
                self.consume_member(length);
            }
            lines += text[start..].split(|&byte| byte == b'\n').count() - 1;
            if expected == 1 && lines > 0 {
                let count = text.split(|&byte| byte == b'\n').next().unwrap_or_default();
                let lines = usize::try_from(self.pax_number(count)?).ok();
                let lines = lines.and_then(|count| count.checked_mul(2)?.checked_add(1));
                // The check of the next block refuses a size over the header limit.
                expected = lines.unwrap_or(usize::MAX);
            }
        }
        let numbers = text.split(|&byte| byte == b'\n').skip(1).take(expected - 1);
        self.pairs(numbers)
    }

    fn map_of_records(&self, map: &[u8]) -> Result<SparseMap, UnpackError> {
        if map.is_empty() {
            return Ok(SparseMap::new());
        }
        self.pairs(map.split(|&byte| byte == b','))
    }

    fn pairs<'n>(
        &self,
        mut numbers: impl Iterator<Item = &'n [u8]>,
    ) -> Result<SparseMap, UnpackError> {
        let malformed = || self.broken("the map of a sparse file is malformed");
        let mut map = SparseMap::new();
        while let Some(offset) = numbers.next() {
            let length = numbers.next().and_then(decimal).ok_or_else(malformed)?;
            let offset = decimal(offset).ok_or_else(malformed)?;
            // An empty extent only marks the end of the file.
            if length > 0 {
                map.push((offset.unsigned_abs(), length.unsigned_abs()));
            }
        }
        Ok(map)
    }

    /// Checks the size of a map, which is held in memory like an extended header.
    fn check_map(&self, size: u64) -> Result<(), UnpackError> {
        let limit = self.limits.header_bytes;
        if size > limit { Err(UnpackError::HeaderTooLarge { size, limit }) } else { Ok(()) }
    }

    fn sparse_number(&self, field: &[u8]) -> Result<u64, UnpackError> {
        let number = number(field).and_then(|number| u64::try_from(number).ok());
        number.ok_or_else(|| self.broken("a number in the map of a sparse file is malformed"))
    }
}

impl TarHeader {
    fn is_gnu(&self) -> bool {
        &self.0[257..265] == b"ustar  \0"
    }

    /// Returns the field with the size of a sparse file in the old form.
    fn sparse_size(&self) -> &[u8] {
        &self.0[483..495]
    }
}
