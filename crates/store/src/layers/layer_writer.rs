//! Writes a layer: the archive's entries to its index, their content to its data.

use std::fs::File;
use std::io::{BufRead, BufWriter, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use prost::Message as _;
use sha2::Digest as _;

use super::layer_index_file::{FILES_PER_FOLDER, LayerTotals, MAGIC, encode, folder_of, number_of};
use crate::SecurityLabel;
use crate::disk_units::DiskUnits;
use crate::durable_rename::{self, WRITE_BYTES};
use crate::error::{IoContext as _, StoreError};
use crate::inode_metadata::{set_owner_and_mode, system_time, too_large};
use crate::staging_folders::Staging;
use crate::state_directory::StateDirectory;
use crate::write_meter::{WriteMeter, full};
use oci_types::Digest;
use sys::background::yield_to_pods;
use sys::extended_attributes;
use sys::mount::syscalls;
use unpack::archive::{FileHeader, Sink, StoredContent};
use unpack::archive_entry::Metadata;
use unpack::checksum::Checksummer;
use unpack::{Entry, Permissions};

/// A file of this size is written back while the next ones come; smaller ones wait for the sync,
/// which writes many of them at once.
const LARGE: u64 = 1 << 20;

/// Bytes of the totals and the checksum at the end of an index, about.
const MOST_AFTER_ENTRIES: u64 = 256;

/// A layer's own folder, its index, and the folder of its files.
const INODES_OF_A_LAYER: u64 = 3;

/// A layer on its way: the archive's entries go to its index, their content to its data.
pub struct LayerWriter {
    staging: Staging,
    index: BufWriter<File>,
    index_bytes: u64,
    units: DiskUnits,
    hasher: sha2::Sha256,
    totals: LayerTotals,
    meter: Arc<WriteMeter>,
    files: u32,
    folder: Option<File>,
    label: Option<SecurityLabel>,
    /// Owner and mode of a new file, the same for all of a filesystem and process.
    made_as: Option<Made>,
}

/// Owner and mode that the kernel gives a new file.
#[derive(Clone, Copy, Debug)]
struct Made {
    uid: u32,
    gid: u32,
    /// Bits of the mode that it takes away.
    umask: u32,
}

impl LayerWriter {
    /// Starts a layer that is unpacked from a blob.
    pub(super) fn begin(directory: &StateDirectory, blob: Digest) -> Result<Self, StoreError> {
        // Directories and the index are most of the disk space of a small layer.
        directory.meter.makes(INODES_OF_A_LAYER)?;
        let staging = directory.stage()?;
        let data = staging.path().join("data");
        std::fs::create_dir(&data).io_context("create", &data)?;
        let path = staging.path().join("index");
        let index = durable_rename::create_private(&path).io_context("create", &path)?;
        let mut writer = Self {
            staging,
            index: BufWriter::with_capacity(64 * 1024, index),
            index_bytes: 0,
            units: directory.units,
            hasher: sha2::Sha256::new(),
            totals: LayerTotals { blob: Some(blob), ..LayerTotals::default() },
            meter: Arc::clone(&directory.meter),
            files: 0,
            folder: None,
            label: directory.label.clone(),
            made_as: None,
        };
        writer.write(MAGIC).io_context("write", &path)?;
        Ok(writer)
    }

    /// Ends the index.
    pub(super) fn finish(mut self) -> Result<(Staging, LayerTotals), StoreError> {
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
        finish().io_context("write", &path)?;
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

    /// Returns whether a file that was made with this mode needs nothing more.
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
    ) -> std::io::Result<StoredContent> {
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
            extended_attributes::set(file.as_fd(), &name, value).map_err(too_large)?;
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
        Ok(StoredContent { data: number, checksum: checksum.finish() })
    }

    fn entry(&mut self, entry: Entry) -> std::io::Result<()> {
        self.totals.entries += 1;
        let record = encode(entry).encode_length_delimited_to_vec();
        self.meter.writes(record.len() as u64).map_err(full)?;
        self.write(&record)
    }
}
