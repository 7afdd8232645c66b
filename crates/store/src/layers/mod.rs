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

mod layer_index_file;
mod layer_writer;

use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{AT_FDCWD, OFlag};
use nix::sys::stat::Mode;

use super::disk_units::DiskUnits;
use super::error::{IoContext as _, StoreError};
use super::folder_listing::current_generation;
use super::object_catalog::{Entry, Lease};
use super::staging_folders::Staging;
use super::state_directory::StateDirectory;
use super::{LayerKey, ObjectName};
pub use layer_index_file::{Entries, LayerTotals};
pub(super) use layer_index_file::{IndexReader, data, read_totals};
pub use layer_writer::LayerWriter;
use oci_types::Digest;
use sys::fault;
use sys::mount::syscalls;

/// A layer of so many bytes has filled all buffers on its way; below, giving them back costs more
/// than it brings.
const MUCH: u64 = 16 << 20;

/// A complete layer in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// The key of the layer.
    pub key: LayerKey,
    /// The number of its generation.
    pub generation: u32,
    /// The directory of the layer.
    pub path: PathBuf,
    /// The hold on it; none where it is only read back.
    lease: Option<Lease>,
}

/// The content of a complete layer, whether it has its name yet or not.
#[derive(Clone, Debug)]
pub struct LayerView {
    place: Place,
    /// Keeps it in the store meanwhile.
    _lease: Option<Lease>,
}

#[derive(Clone, Debug)]
enum Place {
    Named(PathBuf),
    /// An open folder stays the same when it is renamed.
    Staged(Arc<OwnedFd>),
}

/// A layer that is unpacked, and has neither been synced nor named.
pub struct UnpackedLayer {
    key: LayerKey,
    totals: LayerTotals,
    staging: Staging,
}

/// The unpacked archives of a store.
pub struct Layers {
    pub(super) directory: Arc<StateDirectory>,
}

/// Returns the entry of a layer with these totals.
fn entry(units: DiskUnits, totals: &LayerTotals) -> Entry {
    // Folders of its files, and the three of its key, its generation and its data.
    let folders =
        totals.files.div_ceil(layer_index_file::FILES_PER_FOLDER.into()).saturating_add(3);
    // One more inode for the index.
    let inodes = totals.files.saturating_add(folders).saturating_add(1);
    let content = match totals.disk_bytes {
        // Earlier versions did not count blocks: one more is assumed for each file.
        0 => totals.bytes.saturating_add((totals.files + 1).saturating_mul(units.block)),
        counted => counted,
    };
    Entry::new(content.saturating_add(folders.saturating_mul(units.folder)), inodes)
}

/// Reads the entry of a layer on the disk; none where there is no folder.
pub(super) fn read_entry(units: DiskUnits, path: &Path) -> Option<Entry> {
    let metadata = path.symlink_metadata().ok().filter(std::fs::Metadata::is_dir)?;
    // One whose totals cannot be read is counted as its index alone.
    let totals = read_totals(path).unwrap_or_default();
    Some(Entry { last_used: metadata.ctime(), ..entry(units, &totals) })
}

impl Layers {
    /// The layer's current generation, if it is in the store.
    pub fn get(&self, key: LayerKey) -> Result<Option<Layer>, StoreError> {
        let folder = self.directory.path("layers").join(key.to_string());
        let Some(generation) = current_generation(&folder)? else { return Ok(None) };
        let held = self.directory.hold(&ObjectName::layer(key, generation));
        Ok(held.map(|(lease, path)| Layer { key, generation, path, lease: Some(lease) }))
    }

    /// Starts a layer that is unpacked from a blob.
    pub fn write(&self, blob: Digest) -> Result<LayerWriter, StoreError> {
        LayerWriter::begin(&self.directory, blob)
    }

    /// Ends the writing of a layer.
    pub fn finish(&self, key: LayerKey, writer: LayerWriter) -> Result<UnpackedLayer, StoreError> {
        let (staging, totals) = writer.finish()?;
        if totals.bytes >= MUCH {
            // What decompressing took is not wanted again soon.
            syscalls::trim_heap();
        }
        let path = staging.path();
        fault::point("layer.unpacked").io_context("write", path)?;
        Ok(UnpackedLayer { key, totals, staging })
    }

    /// Gives an unpacked layer its name.
    pub fn commit(&self, unpacked: UnpackedLayer) -> Result<Layer, StoreError> {
        let UnpackedLayer { key, totals, staging } = unpacked;
        let folder = self.directory.path("layers").join(key.to_string());
        let path = staging.path().to_owned();
        let entry = entry(self.directory.units, &totals);
        let (generation, lease) = self.directory.commit(staging, &path, &folder, entry)?;
        Ok(Layer { key, generation, path: folder.join(generation.to_string()), lease: Some(lease) })
    }

    /// A generation of a layer that a tree links, whether it is the current one or not.
    pub fn linked(&self, name: &ObjectName) -> Option<Layer> {
        let (lease, path) = self.directory.hold(name)?;
        Layer::at(name, path, lease)
    }
}

impl UnpackedLayer {
    /// Returns its totals.
    pub fn totals(&self) -> LayerTotals {
        self.totals
    }

    /// Its content, which stays where it is while the layer is named.
    pub fn view(&self) -> Result<LayerView, StoreError> {
        let path = self.staging.path();
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let folder = nix::fcntl::open(path, flags, Mode::empty()).io_context("open", path)?;
        Ok(LayerView { place: Place::Staged(Arc::new(folder)), _lease: None })
    }
}

impl Layer {
    /// One generation, by its name.
    fn at(name: &ObjectName, path: PathBuf, lease: Lease) -> Option<Self> {
        let mut parts = name.as_str().split('/').skip(1);
        let key = LayerKey::from_hex(parts.next()?)?;
        Some(Self { key, generation: parts.next()?.parse().ok()?, path, lease: Some(lease) })
    }

    /// Reads a layer that is held already.
    pub(super) fn read(path: &Path) -> Option<Self> {
        let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
        let key = LayerKey::from_hex(&name(path.parent()?)?)?;
        let generation = name(path)?.parse().ok()?;
        Some(Self { key, generation, path: path.to_owned(), lease: None })
    }

    /// Reads the totals from the index, which is not compared with its checksum here:
    /// one that cannot be read is found when the layer is merged.
    pub fn totals(&self) -> LayerTotals {
        read_totals(&self.path).unwrap_or_default()
    }

    /// Returns the content of the layer.
    pub fn view(&self) -> LayerView {
        LayerView { place: Place::Named(self.path.clone()), _lease: self.lease.clone() }
    }
}

impl LayerView {
    /// Returns its path; none while it has no name.
    pub fn path(&self) -> Option<&Path> {
        match &self.place {
            Place::Named(path) => Some(path),
            Place::Staged(_) => None,
        }
    }

    /// Returns the path of regular file `number`: below an open folder, or by itself.
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
        let (file, path) = self.open_index()?;
        Entries::read(file, path)
    }

    /// Opens the index for reading single entries.
    pub(super) fn index(&self) -> Result<IndexReader, StoreError> {
        Ok(IndexReader::new(self.open_index()?.0))
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
