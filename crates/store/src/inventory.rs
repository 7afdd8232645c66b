//! Fills the catalog from the disk: once, when somebody first needs it.
//!
//! Publishing needs none of this, so that a store of any size serves at once.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::PoisonError;

use super::catalog::Entry;
use super::error::StoreError;
use super::eviction::Goal;
use super::layers;
use super::object::{ObjectKind, ObjectName};
use super::staging::names;
use super::trees::TreeRecord;
use super::{Store, records};
use oci_types::Digest;

/// Bytes of a small file or folder on common filesystems, at most: one block.
pub(super) const BYTES_PER_INODE: u64 = 4096;

/// Files of a tree's generation: `tree.json` and `objects.json`.
const FILES_OF_A_TREE: u64 = 2;
/// Folders around them: of the generation and of the key.
const FOLDERS_OF_A_TREE: u64 = 2;
/// Inodes of a tree beside those that it shows.
pub(super) const RECORDS_OF_A_TREE: u64 = FILES_OF_A_TREE + FOLDERS_OF_A_TREE;

/// Folders around a file: of its blob, and of its mode and owner.
pub(super) const FOLDERS_OF_A_FILE: u64 = 2;

/// Disk space of files and folders on the state directory's filesystem.
#[derive(Clone, Copy, Debug)]
pub(super) struct DiskUnits {
    /// Bytes of a block: files take whole ones.
    block: u64,
    /// Bytes of an empty folder: 0 on a filesystem that keeps few names in the inode.
    folder: u64,
}

impl Store {
    /// Reads the sizes of all objects, unless that is done already.
    pub fn load_catalog(&self) -> Result<(), StoreError> {
        let mut loaded = self.0.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if *loaded {
            return Ok(());
        }
        for (folder, depth) in [("files", 2), ("layers", 1), ("trees", 1)] {
            self.load(folder, depth)?;
        }
        self.load_documents()?;
        self.index_resolutions()?;
        self.count_records()?;
        *loaded = true;
        drop(loaded);
        // Earlier versions had no bounds on idle downloads.
        self.ledger().trim_all();
        Ok(())
    }

    /// Adds the objects below a folder to the catalog. Returns how many names the folder has.
    fn load(&self, folder: &str, depth: usize) -> Result<usize, StoreError> {
        let names_here = names(&self.root().join(folder))?;
        for name in &names_here {
            let folder = format!("{folder}/{name}");
            // A link leads out of the store: what is behind it is not ours to count or remove.
            if self.root().join(&folder).is_symlink() {
                continue;
            }
            if depth > 1 {
                if self.load(&folder, depth - 1)? == 0 && Digest::from_hex(name).is_some() {
                    // Left by an interrupted removal. A folder that is in use again is not empty.
                    let _ = fs::remove_dir(self.root().join(&folder));
                }
                continue;
            }
            // Whatever is not of the form of an object was not made here, and is left alone.
            let here = names(&self.root().join(&folder))?;
            let mut is_used = false;
            for generation in &here {
                let Some(name) = ObjectName::parse(&format!("{folder}/{generation}")) else {
                    continue;
                };
                let damaged = here.contains(&format!("{generation}.damaged"));
                if let Some(entry) = self.read_entry(&name, damaged) {
                    self.catalog().add(name, entry);
                    is_used = true;
                }
            }
            // Only folders named like the driver's own are removed.
            if !is_used && ObjectName::parse(&format!("{folder}/1")).is_some() {
                self.remove_empty_key(&self.root().join(&folder), &here);
            }
        }
        Ok(names_here.len())
    }

    /// Removes the folder of a key without generations, left by an interrupted removal. A commit that
    /// needs the folder at the same time makes it again.
    fn remove_empty_key(&self, folder: &Path, names: &[String]) {
        for name in names {
            // A mark has no meaning without its generation.
            if let Some(generation) = name.strip_suffix(".damaged")
                && generation.parse::<u32>().is_ok()
                && folder.join(generation).symlink_metadata().is_err()
            {
                let _ = fs::remove_file(folder.join(name));
            }
        }
        let folders = folder
            .ancestors()
            .take_while(|above| above.parent().is_some_and(|parent| parent != self.root()));
        for folder in folders {
            if fs::remove_dir(folder).is_err() {
                return;
            }
        }
    }

    fn load_documents(&self) -> Result<(), StoreError> {
        let folder = self.root().join("blobs");
        for name in names(&folder)? {
            let Some(digest) = Digest::from_hex(&name) else { continue };
            let Ok(metadata) = folder.join(name).symlink_metadata() else { continue };
            if metadata.is_file() {
                let entry =
                    Entry { last_used: metadata.mtime(), ..self.units().document(metadata.len()) };
                self.catalog().add(ObjectName::document(digest), entry);
            }
        }
        Ok(())
    }

    /// Counts the proofs and resolutions on the disk.
    pub(super) fn count_records(&self) -> Result<(), StoreError> {
        let mut count = names(&self.root().join("resolutions"))?.len();
        let access = self.root().join("access");
        for place in names(&access)? {
            let place = access.join(place);
            if !place.is_symlink() {
                count += 1 + names(&place)?.len();
            }
        }
        self.catalog().set_records(self.units().record().times(count as u64));
        Ok(())
    }

    fn read_entry(&self, name: &ObjectName, damaged: bool) -> Option<Entry> {
        let path = self.root().join(name.as_str());
        let metadata = path.symlink_metadata().ok()?;
        let mut entry = match name.kind() {
            ObjectKind::File if metadata.is_file() => self.units().file(metadata.len()),
            ObjectKind::Layer if metadata.is_dir() => {
                // One whose totals cannot be read is counted as its index alone.
                let totals = layers::read_totals(&path).unwrap_or_default();
                self.units().layer(&totals)
            }
            ObjectKind::Tree if metadata.is_dir() => {
                let record: Option<TreeRecord> = records::read(&path.join("tree.json"));
                let links: Vec<String> =
                    records::read(&path.join("objects.json")).unwrap_or_default();
                let mut links: Vec<_> =
                    links.iter().filter_map(|link| ObjectName::parse(link)).collect();
                if let Some(record) = &record
                    && !links.contains(&ObjectName::document(record.manifest))
                {
                    // Earlier versions did not list documents.
                    links.extend(self.documents_of(record.manifest));
                }
                Entry { links, ..self.units().tree(record.as_ref()) }
            }
            _ => return None,
        };
        entry.damaged = damaged;
        entry.last_used = last_used(&path, &metadata, name.kind());
        Some(entry)
    }
}

/// A tree's last use is the time of its record; another object is as old as it is.
fn last_used(path: &Path, metadata: &fs::Metadata, kind: ObjectKind) -> i64 {
    match kind {
        ObjectKind::Tree => path.join("tree.json").metadata().map_or(0, |record| record.mtime()),
        // Content may have any modification time that its author chose.
        ObjectKind::File | ObjectKind::Layer => metadata.ctime(),
        ObjectKind::Document => metadata.mtime(),
    }
}

impl DiskUnits {
    /// Reads them from the filesystem of a state directory.
    pub(super) fn of(root: &Path) -> Result<Self, StoreError> {
        let empty = root.join("empty");
        let failed = |error| StoreError::io("look at", &empty, error);
        let status = nix::sys::statvfs::statvfs(&empty).map_err(|error| failed(error.into()))?;
        let folder = empty.symlink_metadata().map_err(failed)?.blocks() * 512;
        // Other numbers are implausible.
        let block = status.fragment_size().clamp(512, 1 << 16);
        Ok(Self { block, folder: folder.min(1 << 16) })
    }

    /// Returns the disk space of a file of this size: whole blocks.
    pub(super) const fn blocks(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.block).saturating_mul(self.block)
    }

    /// Returns the disk space of names in a folder beyond its first block.
    pub(super) const fn more_names(self, bytes: u64) -> u64 {
        self.blocks(bytes).saturating_sub(self.block)
    }

    /// Returns the disk space of a proof or another small record.
    pub(super) const fn record(self) -> Goal {
        Goal { bytes: self.block, inodes: 1 }
    }

    pub(super) fn document(self, size: u64) -> Entry {
        entry(self.blocks(size), 1)
    }

    pub(super) fn file(self, size: u64) -> Entry {
        let bytes = self.blocks(size).saturating_add(FOLDERS_OF_A_FILE * self.folder);
        entry(bytes, 1 + FOLDERS_OF_A_FILE)
    }

    pub(super) fn layer(self, totals: &layers::LayerTotals) -> Entry {
        // Folders of its files, and the three of its key, its generation and its data.
        let folders = totals.files.div_ceil(layers::FILES_PER_FOLDER.into()).saturating_add(3);
        // One more inode for the index.
        let inodes = totals.files.saturating_add(folders).saturating_add(1);
        let content = match totals.disk_bytes {
            // Earlier versions did not count blocks: one more is assumed for each file.
            0 => totals.bytes.saturating_add((totals.files + 1).saturating_mul(self.block)),
            counted => counted,
        };
        entry(content.saturating_add(folders.saturating_mul(self.folder)), inodes)
    }

    pub(super) fn tree(self, record: Option<&TreeRecord>) -> Entry {
        let (own, more) = record.map_or((0, 0), |record| (record.own_inodes, record.own_bytes));
        let folders = own.saturating_add(FOLDERS_OF_A_TREE).saturating_mul(self.folder);
        let bytes = folders.saturating_add(FILES_OF_A_TREE * self.block).saturating_add(more);
        let inodes = own.saturating_add(RECORDS_OF_A_TREE);
        Entry { manifest: record.map(|record| record.manifest), ..entry(bytes, inodes) }
    }
}

fn entry(bytes: u64, inodes: u64) -> Entry {
    Entry {
        bytes,
        inodes,
        last_used: jiff::Timestamp::now().as_second(),
        damaged: false,
        manifest: None,
        links: Vec::new(),
    }
}
