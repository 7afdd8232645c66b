//! Unpacked archives.
//!
//! ```text
//! layers/<key>/<n>/index        "OCI layer index 1\n", then an entry a record (varint length and
//!                               the message of proto/layer_index.proto), an empty record, the
//!                               totals as JSON, and the SHA-256 of everything before it
//! layers/<key>/<n>/data/<i>/<j> regular file number j, in folder j / 4096
//! ```
//!
//! A layer is complete or absent: it is written in staging and named last. It
//! is never filtered; selection only decides which of its files a tree links.
//! Trees may link a layer ([`LayerView`]) while it is being synced: they get
//! their own name after all of their layers have theirs.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Read, Seek as _, Write};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::fcntl::{AT_FDCWD, OFlag};
use nix::sys::stat::Mode;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use super::catalog::Lease;
use super::durable::WRITE_BYTES;
use super::error::StoreError;
use super::files::set_owner_and_mode;
use super::inventory::DiskUnits;
use super::room::{Meter, full};
use super::staging::{Staging, current_generation};
use super::{LayerKey, ObjectName, SecurityLabel, Store};
use crate::layer_index as wire;
use oci_types::Digest;
use sys::background::yield_to_pods;
use sys::fault;
use sys::mount::syscalls;
use unpack::archive::{FileHeader, Sink, StoredFile};
use unpack::checksum::{Checksum, Checksummer};
use unpack::entry::{Metadata, Timestamp};
use unpack::{Entry, EntryKind, Limits, Permissions, RelativePath};

const MAGIC: &[u8] = b"OCI layer index 1\n";

/// Folders have few files: ext4 looks through a block of names, up to 340 of these short ones, at
/// each name that is made or looked up, which took half of the time of making a small file.
pub(super) const FILES_PER_FOLDER: u32 = 64;

/// A file's number tells its folder. Folders that were filled to this number of files are read as
/// well; where they end earlier, numbers are left out.
const NUMBERS_PER_FOLDER: u32 = 4096;

/// A file of this size is written back while the next ones come; smaller ones wait for the sync,
/// which writes many of them at once.
const LARGE: u64 = 1 << 20;

/// A layer of so many bytes has filled all buffers on its way; below, giving them back costs more
/// than it brings.
const MUCH: u64 = 16 << 20;

/// Bytes of the totals and the checksum at the end of an index, about.
const MOST_AFTER_ENTRIES: u64 = 256;

/// A layer's own folder, its index, and the folder of its files.
const INODES_OF_A_LAYER: u64 = 3;

/// A complete layer in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its name.
    pub key: LayerKey,
    /// Which generation.
    pub generation: u32,
    path: PathBuf,
    /// None where it is only read back.
    lease: Option<Lease>,
}

/// The content of a complete layer, whether it has its name yet or not.
#[derive(Clone, Debug)]
pub struct LayerView {
    place: Place,
    /// Nobody takes it away meanwhile.
    _lease: Option<Lease>,
}

#[derive(Clone, Debug)]
enum Place {
    Named(PathBuf),
    /// An open folder stays the same when it is renamed.
    Staged(Arc<OwnedFd>),
}

/// A layer that is unpacked, and has neither been synced nor named.
#[derive(Debug)]
pub struct UnpackedLayer {
    key: LayerKey,
    totals: LayerTotals,
    staging: Staging,
}

/// What a layer adds up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerTotals {
    /// Entries of the archive.
    pub entries: u64,
    /// Bytes of regular files.
    pub bytes: u64,
    /// Regular files.
    #[serde(default)]
    pub files: u64,
    /// Bytes of the blocks of those files and of the index; 0 where they were not counted.
    #[serde(default)]
    pub disk_bytes: u64,
    /// The blob that was unpacked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blob: Option<Digest>,
}

/// A layer on its way: the archive's entries go to its index, their content to its data.
#[derive(Debug)]
pub struct LayerWriter {
    staging: Staging,
    index: BufWriter<File>,
    index_bytes: u64,
    units: DiskUnits,
    hasher: sha2::Sha256,
    totals: LayerTotals,
    meter: Arc<Meter>,
    files: u32,
    folder: Option<File>,
    label: Option<SecurityLabel>,
    /// What files are that nothing was said about; the same for all of a filesystem and process.
    made_as: Option<Made>,
}

/// What the kernel makes of a new file.
#[derive(Clone, Copy, Debug)]
struct Made {
    uid: u32,
    gid: u32,
    /// Bits of the mode that it takes away.
    umask: u32,
}

impl Store {
    /// The layer's current generation, if it is in the store.
    pub fn layer(&self, key: LayerKey) -> Result<Option<Layer>, StoreError> {
        let folder = self.path("layers").join(key.to_string());
        let Some(generation) = current_generation(&folder)? else { return Ok(None) };
        let lease = self.catalog().lease(ObjectName::layer(key, generation));
        let layer = Layer {
            key,
            generation,
            path: folder.join(generation.to_string()),
            lease: Some(lease),
        };
        // It may have gone between the first look and the lease.
        Ok(layer.path.symlink_metadata().is_ok().then_some(layer))
    }

    /// Starts a layer that is unpacked from a blob.
    pub fn write_layer(&self, blob: Digest) -> Result<LayerWriter, StoreError> {
        // Of many small layers these are most of what they take.
        self.meter().makes(INODES_OF_A_LAYER)?;
        let staging = self.stage()?;
        let data = staging.path().join("data");
        std::fs::create_dir(&data).map_err(|error| StoreError::io("create", &data, error))?;
        let path = staging.path().join("index");
        let index = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| StoreError::io("create", &path, error))?;
        let mut writer = LayerWriter {
            staging,
            index: BufWriter::with_capacity(64 * 1024, index),
            index_bytes: 0,
            units: self.units(),
            hasher: sha2::Sha256::new(),
            totals: LayerTotals { blob: Some(blob), ..LayerTotals::default() },
            meter: self.meter(),
            files: 0,
            folder: None,
            label: self.label().cloned(),
            made_as: None,
        };
        writer.write(MAGIC).map_err(|error| StoreError::io("write", &path, error))?;
        Ok(writer)
    }

    /// Ends the writing of a layer.
    pub fn finish_layer(
        &self,
        key: LayerKey,
        writer: LayerWriter,
    ) -> Result<UnpackedLayer, StoreError> {
        let (staging, totals) = writer.finish()?;
        if totals.bytes >= MUCH {
            // What decompressing took is not wanted again soon.
            super::give_memory_back();
        }
        let path = staging.path();
        fault::point("layer.unpacked").map_err(|error| StoreError::io("write", path, error))?;
        Ok(UnpackedLayer { key, totals, staging })
    }

    /// Gives an unpacked layer its name.
    pub fn commit_layer(&self, unpacked: UnpackedLayer) -> Result<Layer, StoreError> {
        let UnpackedLayer { key, totals, staging } = unpacked;
        let folder = self.path("layers").join(key.to_string());
        let path = staging.path().to_owned();
        let entry = self.units().layer(&totals);
        let (generation, lease) = self.commit(staging, &path, &folder, entry)?;
        Ok(Layer { key, generation, path: folder.join(generation.to_string()), lease: Some(lease) })
    }
}

impl UnpackedLayer {
    /// What it adds up to.
    #[must_use]
    pub fn totals(&self) -> LayerTotals {
        self.totals
    }

    /// Its content, which stays where it is while the layer is named.
    pub fn view(&self) -> Result<LayerView, StoreError> {
        let path = self.staging.path();
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let folder = nix::fcntl::open(path, flags, Mode::empty())
            .map_err(|error| StoreError::io("open", path, error.into()))?;
        Ok(LayerView { place: Place::Staged(Arc::new(folder)), _lease: None })
    }
}

impl Layer {
    /// One generation, by its name.
    pub(super) fn at(name: &ObjectName, path: PathBuf, lease: Lease) -> Option<Self> {
        let mut parts = name.as_str().split('/').skip(1);
        let key = LayerKey::from_hex(parts.next()?)?;
        Some(Self { key, generation: parts.next()?.parse().ok()?, path, lease: Some(lease) })
    }

    /// A layer that somebody holds already.
    pub(super) fn read(path: &Path) -> Option<Self> {
        let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
        let key = LayerKey::from_hex(&name(path.parent()?)?)?;
        let generation = name(path)?.parse().ok()?;
        Some(Self { key, generation, path: path.to_owned(), lease: None })
    }

    /// Where it lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it adds up to, by its index, which nobody has compared with its checksum for this:
    /// one that cannot be read is found when the layer is merged.
    #[must_use]
    pub fn totals(&self) -> LayerTotals {
        read_totals(&self.path).unwrap_or_default()
    }

    /// Its content.
    #[must_use]
    pub fn view(&self) -> LayerView {
        LayerView { place: Place::Named(self.path.clone()), _lease: self.lease.clone() }
    }
}

impl LayerView {
    /// Where it lies; none while it has no name.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match &self.place {
            Place::Named(path) => Some(path),
            Place::Staged(_) => None,
        }
    }

    /// Where regular file `number` lies: below an open folder, or by itself.
    pub(super) fn data(&self, number: u32) -> (BorrowedFd<'_>, PathBuf) {
        self.below(&data(number))
    }

    fn below(&self, name: &Path) -> (BorrowedFd<'_>, PathBuf) {
        match &self.place {
            Place::Named(path) => (AT_FDCWD, path.join(name)),
            Place::Staged(folder) => (folder.as_fd(), name.to_owned()),
        }
    }

    /// Reads the index, whose checksum is compared before the first entry is given out.
    ///
    /// # Errors
    ///
    /// [`StoreError::Damaged`] when it is not what was written.
    pub fn entries(&self) -> Result<Entries, StoreError> {
        let (mut file, path) = self.open_index()?;
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
        // What was accepted once is read again whatever the limits are now: merging compares them.
        let limits = Limits { depth: 1024, ..Limits::default() };
        let next = MAGIC.len() as u64;
        Ok(Entries { path, reader, limits, record: Vec::new(), offset: 0, next })
    }

    /// Opens the index for reading single entries.
    pub(super) fn index(&self) -> Result<IndexReader, StoreError> {
        let (file, _) = self.open_index()?;
        let limits = Limits { depth: 1024, ..Limits::default() };
        Ok(IndexReader { file, limits, start: 0, window: Vec::new() })
    }

    fn open_index(&self) -> Result<(File, PathBuf), StoreError> {
        let (folder, path) = self.below(Path::new("index"));
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match nix::fcntl::openat(folder, &path, flags, Mode::empty()) {
            Ok(file) => Ok((file.into(), path)),
            Err(error) => Err(StoreError::io("read", &path, error.into())),
        }
    }
}

/// The entries of a layer, in the archive's order.
#[derive(Debug)]
pub struct Entries {
    path: PathBuf,
    reader: BufReader<File>,
    limits: Limits,
    record: Vec<u8>,
    /// Offset of the entry that was read last.
    offset: u64,
    /// Offset of the next entry.
    next: u64,
}

/// Reads single entries of a layer's index.
#[derive(Debug)]
pub(super) struct IndexReader {
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
    /// Returns the offset in the index of the entry that was read last.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

impl IndexReader {
    /// Reads the entry at an offset.
    pub(super) fn read(&mut self, offset: u64) -> std::io::Result<Entry> {
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
pub(super) fn read_totals(layer: &Path) -> Option<LayerTotals> {
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

impl LayerWriter {
    fn finish(mut self) -> Result<(Staging, LayerTotals), StoreError> {
        let path = self.staging.path().join("index");
        let mut finish = || -> std::io::Result<()> {
            self.totals.files = self.files.into();
            self.write(&[0])?;
            let index = self.units.blocks(self.index_bytes + MOST_AFTER_ENTRIES);
            self.totals.disk_bytes = self.totals.disk_bytes.saturating_add(index);
            let totals = serde_json::to_vec(&self.totals)?;
            self.write(&totals)?;
            let checksum: [u8; 32] = self.hasher.clone().finalize().into();
            self.index.write_all(&checksum)?;
            self.index.flush()
        };
        finish().map_err(|error| StoreError::io("write", &path, error))?;
        let Self { mut staging, index, totals, .. } = self;
        staging.staged.wrote(|| path);
        drop(index);
        let data = staging.path().join("data");
        staging.staged.wrote(|| data);
        let folder = staging.path().to_owned();
        staging.staged.wrote(|| folder);
        Ok((staging, totals))
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.hasher.update(bytes);
        self.index_bytes += bytes.len() as u64;
        self.index.write_all(bytes)
    }

    /// The number of the next file, and its folder, made when it is the first of it.
    fn next_place(&mut self) -> std::io::Result<(u32, PathBuf)> {
        let number = number_of(self.files).ok_or(std::io::ErrorKind::FileTooLarge)?;
        let path = self.staging.path().join("data").join(folder_of(number).to_string());
        if self.files.is_multiple_of(FILES_PER_FOLDER) {
            self.meter.makes(1).map_err(full)?;
            std::fs::create_dir(&path)?;
            self.folder = Some(File::open(&path)?);
            self.staging.staged.wrote(|| path.clone());
        }
        self.files += 1;
        Ok((number, path))
    }
}

impl Made {
    /// Learns it from a file that was made with `mode`.
    fn of(file: &File, mode: u32) -> std::io::Result<Self> {
        let metadata = file.metadata()?;
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let umask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
        let umask = umask.and_then(|text| u32::from_str_radix(text.trim(), 8).ok());
        // An unknown one, or an access control list, may take away anything: then each file is given its mode.
        let is_known = |umask: &u32| metadata.mode() & 0o777 == mode & !umask;
        let umask = umask.filter(is_known).unwrap_or(0o777);
        Ok(Self { uid: metadata.uid(), gid: metadata.gid(), umask })
    }

    /// Whether a file that was made with this mode needs nothing more.
    fn is_already(self, permissions: Permissions) -> bool {
        (self.uid, self.gid) == (permissions.uid, permissions.gid)
            && permissions.mode & self.umask == 0
    }
}

impl Sink for LayerWriter {
    fn file(
        &mut self,
        header: &FileHeader,
        content: &mut dyn BufRead,
    ) -> std::io::Result<StoredFile> {
        yield_to_pods();
        self.meter.makes(1).map_err(full)?;
        let (number, path) = self.next_place()?;
        let Some(folder) = &self.folder else {
            return Err(std::io::ErrorKind::NotFound.into());
        };
        let Metadata { permissions, modified, extended_attributes } = &header.metadata;
        // Relative to the open folder: no path is walked for each of many small files.
        let name = number.to_string();
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(permissions.mode);
        let mut file = File::from(nix::fcntl::openat(folder, name.as_str(), flags, mode)?);
        let mut checksum = Checksummer::default();
        let mut size = 0;
        loop {
            let bytes = content.fill_buf()?;
            if bytes.is_empty() {
                break;
            }
            yield_to_pods();
            checksum.update(bytes);
            self.meter.writes(bytes.len() as u64).map_err(full)?;
            for piece in bytes.chunks(WRITE_BYTES) {
                file.write_all(piece)?;
            }
            let length = bytes.len();
            size += length as u64;
            content.consume(length);
        }
        if size >= LARGE {
            // Where the filesystem cannot, the sync at the end does all the work.
            let _ = syscalls::start_write_back(file.as_fd());
        }
        for (name, value) in extended_attributes.iter() {
            let name = std::ffi::CString::new(name)?;
            syscalls::set_extended_attribute(file.as_fd(), &name, value).map_err(too_large)?;
        }
        if let Some(label) = &self.label {
            label.apply(file.as_fd())?;
        }
        let as_made = match self.made_as {
            Some(known) => known,
            None => *self.made_as.insert(Made::of(&file, permissions.mode)?),
        };
        if !as_made.is_already(*permissions) {
            set_owner_and_mode(&file, *permissions)?;
        }
        file.set_times(std::fs::FileTimes::new().set_modified(system_time(*modified)))?;
        self.staging.staged.wrote(|| path.join(&name));
        self.totals.bytes += size;
        self.totals.disk_bytes += self.units.blocks(size);
        Ok(StoredFile { data: number, checksum: checksum.finish() })
    }

    fn entry(&mut self, entry: Entry) -> std::io::Result<()> {
        self.totals.entries += 1;
        let record = encode(entry).encode_length_delimited_to_vec();
        self.meter.writes(record.len() as u64).map_err(full)?;
        self.write(&record)
    }
}

/// ext4 calls an attribute that does not fit its block a full disk.
pub(super) fn too_large(error: std::io::Error) -> std::io::Error {
    match error.kind() {
        std::io::ErrorKind::StorageFull => std::io::Error::other(
            "the node's filesystem cannot hold an extended attribute of this size",
        ),
        _ => error,
    }
}

/// A time as the filesystem takes it; before the epoch and far in the future too.
pub(super) fn system_time(time: Timestamp) -> SystemTime {
    let seconds = Duration::from_secs(time.seconds.unsigned_abs());
    let base = if time.seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(seconds)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(seconds)
    };
    base.and_then(|base| base.checked_add(Duration::from_nanos(time.nanoseconds.into())))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Where regular file `number` lies below its layer.
pub(super) fn data(number: u32) -> PathBuf {
    format!("data/{}/{number}", folder_of(number)).into()
}

fn folder_of(number: u32) -> u32 {
    number / NUMBERS_PER_FOLDER
}

/// The number of the file before which there were so many.
fn number_of(files: u32) -> Option<u32> {
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

fn encode(entry: Entry) -> wire::Entry {
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

    #[test]
    fn entries_are_read_again_in_any_order() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path(), crate::StoreOptions::default());
        let store = store.expect("a store");
        let mut writer = store.write_layer(Digest::of(b"layer")).expect("a layer");
        let path = |text: String| RelativePath::parse(text.as_bytes(), &Limits::default());
        let entry = |number: usize| {
            // From a few bytes to more than is read at once.
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
        let view = store.finish_layer(key, writer).expect("a layer");
        let view = view.view().expect("a view");
        let mut entries = view.entries().expect("the index");
        let mut offsets = Vec::new();
        while let Some(read) = entries.next() {
            assert_eq!(read.expect("an entry"), entry(offsets.len()));
            offsets.push(entries.offset());
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
        let store = Store::open(folder.path(), crate::StoreOptions::default());
        let store = store.expect("a store");
        let mut writer = store.write_layer(Digest::of(b"layer")).expect("a layer");
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
        let view = store.finish_layer(key, writer).expect("a layer");
        let view = view.view().expect("a view");
        let mut entries = view.entries().expect("the index");
        assert_eq!(entries.next().expect("an entry").expect("readable"), entry);
        let mut index = view.index().expect("the index");
        assert_eq!(index.read(entries.offset()).expect("an entry"), entry);
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
