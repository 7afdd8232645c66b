//! Fills the catalog from the disk: once, when somebody first needs it.
//!
//! Publishing needs none of this, so that a store of any size serves at once.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::PoisonError;

use super::catalog::Entry;
use super::error::StoreError;
use super::layers;
use super::object::{ObjectKind, ObjectName};
use super::staging::names;
use super::trees::TreeRecord;
use super::{Store, records};

/// What a small file and an entry of a folder take on common filesystems.
pub(super) const BYTES_PER_INODE: u64 = 4096;

/// The record, the list of objects and the folder around them.
pub(super) const RECORDS_OF_A_TREE: u64 = 3;

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
        *loaded = true;
        drop(loaded);
        // An earlier version had no bounds on them.
        self.ledger().trim_all();
        Ok(())
    }

    fn load(&self, folder: &str, depth: usize) -> Result<(), StoreError> {
        for name in names(&self.root().join(folder))? {
            let folder = format!("{folder}/{name}");
            // A link leads out of the store: what is behind it is not ours to count or remove.
            if self.root().join(&folder).is_symlink() {
                continue;
            }
            if depth > 1 {
                self.load(&folder, depth - 1)?;
                continue;
            }
            // Whatever is not of the form of an object was not made here, and is left alone.
            let objects = names(&self.root().join(&folder))?;
            let objects =
                objects.iter().filter_map(|name| ObjectName::parse(&format!("{folder}/{name}")));
            for name in objects {
                if let Some(entry) = self.read_entry(&name) {
                    self.catalog().add(name, entry);
                }
            }
        }
        Ok(())
    }

    fn read_entry(&self, name: &ObjectName) -> Option<Entry> {
        let path = self.root().join(name.as_str());
        let metadata = path.symlink_metadata().ok()?;
        let damaged = path.with_extension("damaged").exists();
        let mut entry = match name.kind() {
            ObjectKind::File if metadata.is_file() => file_entry(metadata.len()),
            ObjectKind::Layer if metadata.is_dir() => {
                // One whose totals cannot be read is counted as its index alone.
                let totals = layers::read_totals(&path).unwrap_or_default();
                layer_entry(&totals)
            }
            ObjectKind::Tree if metadata.is_dir() => {
                let record: Option<TreeRecord> = records::read(&path.join("tree.json"));
                let links: Vec<String> =
                    records::read(&path.join("objects.json")).unwrap_or_default();
                let links = links.iter().filter_map(|link| ObjectName::parse(link)).collect();
                Entry { links, ..tree_entry(record.as_ref()) }
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
    }
}

pub(super) fn file_entry(size: u64) -> Entry {
    Entry {
        bytes: size.saturating_add(BYTES_PER_INODE),
        inodes: 1,
        last_used: jiff::Timestamp::now().as_second(),
        damaged: false,
        manifest: None,
        links: Vec::new(),
    }
}

pub(super) fn layer_entry(totals: &layers::LayerTotals) -> Entry {
    let folders = totals.files.div_ceil(layers::FILES_PER_FOLDER.into()).saturating_add(2);
    // The index besides.
    let inodes = totals.files.saturating_add(folders).saturating_add(1);
    let bytes = totals.bytes.saturating_add(inodes.saturating_mul(BYTES_PER_INODE));
    Entry { bytes, inodes, ..file_entry(0) }
}

pub(super) fn tree_entry(record: Option<&TreeRecord>) -> Entry {
    let (own, copied) = record.map_or((0, 0), |record| (record.own_inodes, record.own_bytes));
    let inodes = own.saturating_add(RECORDS_OF_A_TREE);
    let bytes = inodes.saturating_mul(BYTES_PER_INODE).saturating_add(copied);
    Entry { bytes, inodes, manifest: record.map(|record| record.manifest), ..file_entry(0) }
}
