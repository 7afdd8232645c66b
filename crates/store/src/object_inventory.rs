//! The objects of a store, and the space that they take.
//!
//! The catalog is filled from the disk once, at the first question. Publishing needs none of this,
//! so that a store of any size serves at once.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use super::error::StoreError;
use super::folder_listing::names;
use super::object_catalog::{Catalog, Entry, Usage};
use super::object_name::{ObjectKind, ObjectName};
use super::record_sweep::RecordSweeper;
use super::space_amount::SpaceAmount;
use super::space_ledger::Ledger;
use super::state_directory::StateDirectory;
use super::trees::{self, Tree, Trees};
use super::{layers, single_files};
use oci_types::Digest;

/// The objects of a store, from its catalog.
pub struct Inventory {
    pub(super) directory: Arc<StateDirectory>,
    pub(super) trees: Arc<Trees>,
    pub(super) ledger: Arc<Ledger>,
    pub(super) records: Arc<RecordSweeper>,
    /// True once the catalog has the objects of earlier processes.
    pub(super) loaded: Mutex<bool>,
}

impl Inventory {
    /// Reads the sizes of all objects, unless that is done already.
    pub fn load(&self) -> Result<(), StoreError> {
        let mut loaded = self.loaded.lock();
        if *loaded {
            return Ok(());
        }
        for (folder, depth) in [("files", 2), ("layers", 1), ("trees", 1)] {
            self.load_folder(folder, depth)?;
        }
        self.directory.load_documents()?;
        self.records.load()?;
        *loaded = true;
        drop(loaded);
        // Earlier versions had no bounds on idle downloads.
        self.ledger.trim_all();
        Ok(())
    }

    /// Returns the catalog, whose sizes were read.
    pub(super) fn catalog(&self) -> Result<&Arc<Catalog>, StoreError> {
        self.load()?;
        Ok(&self.directory.catalog)
    }

    /// Returns all trees of the store with their entries, damaged ones included.
    ///
    /// # Errors
    ///
    /// Those of reading the sizes, at the first call.
    pub fn trees(&self) -> Result<Vec<(ObjectName, Arc<Entry>)>, StoreError> {
        Ok(self.catalog()?.trees())
    }

    /// Returns the trees of a manifest with their entries, damaged ones included.
    ///
    /// # Errors
    ///
    /// Those of reading the sizes, at the first call.
    pub fn trees_of_manifest(
        &self,
        manifest: Digest,
    ) -> Result<Vec<(ObjectName, Arc<Entry>)>, StoreError> {
        Ok(self.catalog()?.trees_of(manifest))
    }

    /// Returns whether a tree of a manifest can be shown.
    ///
    /// # Errors
    ///
    /// Those of reading the sizes, at the first call.
    pub fn has_sound_tree(&self, manifest: Digest) -> Result<bool, StoreError> {
        let trees = self.trees_of_manifest(manifest)?;
        let is_sound = |(name, entry): &(ObjectName, Arc<Entry>)| {
            !entry.damaged && self.trees.named(name).is_some()
        };
        Ok(trees.iter().any(is_sound))
    }

    /// Trees that are whole, and not marked damaged.
    pub fn sound_trees(&self) -> Result<Vec<Tree>, StoreError> {
        let trees = self.trees()?.into_iter().filter(|(_, entry)| !entry.damaged);
        let mut trees: Vec<_> = trees.filter_map(|(name, _)| self.trees.named(&name)).collect();
        trees.sort_by_key(|tree| (tree.key, tree.generation));
        Ok(trees)
    }

    /// Returns the names of trees that are not marked as damaged and whose records cannot be read.
    pub fn trees_without_record(&self) -> Result<Vec<ObjectName>, StoreError> {
        let mut trees = self.trees()?;
        trees.retain(|(name, entry)| !entry.damaged && self.trees.named(name).is_none());
        Ok(trees.into_iter().map(|(name, _)| name).collect())
    }

    /// Returns the names of all objects but documents.
    pub fn names(&self) -> Result<Vec<ObjectName>, StoreError> {
        Ok(self.catalog()?.names().into_iter().map(|(name, _)| name).collect())
    }

    /// Returns the number of objects of a kind; 0 before their sizes were read.
    pub fn count(&self, kind: ObjectKind) -> u64 {
        self.directory.catalog.count(kind)
    }

    /// Returns the disk space of all content, documents, records and downloads.
    pub fn usage(&self) -> Result<Usage, StoreError> {
        let Usage { bytes, inodes, objects } = self.catalog()?.usage(self.directory.units.record());
        let downloads = self.ledger.unclaimed();
        Ok(Usage {
            bytes: bytes.saturating_add(downloads.bytes),
            inodes: inodes.saturating_add(downloads.inodes),
            objects,
        })
    }

    /// Returns the disk space of all pinned content.
    ///
    /// # Errors
    ///
    /// Those of reading the sizes, at the first call.
    pub fn pinned_space(&self) -> Result<SpaceAmount, StoreError> {
        let catalog = self.catalog()?;
        Ok(catalog.space_of_manifests(&catalog.pinned()))
    }

    /// Returns all objects that are unread, but for those that were found damaged.
    pub fn unread_objects(&self) -> Result<Vec<ObjectName>, StoreError> {
        let read_back = &self.directory.read_back;
        if !read_back.is_under_way() {
            return Ok(Vec::new());
        }
        let objects = self.catalog()?.names().into_iter();
        let unread = objects.filter(|(name, damaged)| !damaged && read_back.is_unread(name));
        Ok(unread.map(|(name, _)| name).collect())
    }

    /// Ends the reading back of an earlier format when nothing is unread.
    pub fn finish_reading_back(&self) -> Result<(), StoreError> {
        let read_back = &self.directory.read_back;
        if !read_back.is_under_way() || !self.unread_objects()?.is_empty() {
            return Ok(());
        }
        read_back.end()
    }

    /// Marks a generation of an object (`<key>/<n>`), and of every tree that links it: it is
    /// never published or linked again, the next one is made afresh, and its mounts keep it.
    /// Returns the trees that were sound until now.
    pub fn mark_damaged(&self, generation: &Path) -> Result<Vec<ObjectName>, StoreError> {
        self.directory.damage.mark(generation)?;
        let Some(name) = self.directory.object_at(generation) else { return Ok(Vec::new()) };
        if name.kind() == ObjectKind::Tree {
            return Ok(vec![name]);
        }
        self.mark_trees_of(&name)
    }

    /// Marks the trees that link a damaged object; says which were not marked before.
    pub(super) fn mark_trees_of(&self, object: &ObjectName) -> Result<Vec<ObjectName>, StoreError> {
        if object.kind() == ObjectKind::Tree {
            return Ok(Vec::new());
        }
        let trees = self.catalog()?.sound_trees_of(object);
        for tree in &trees {
            self.directory.damage.mark(&self.directory.root.join(tree.as_str()))?;
        }
        Ok(trees)
    }

    /// Adds the objects below a folder to the catalog. Returns how many names the folder has.
    fn load_folder(&self, folder: &str, depth: usize) -> Result<usize, StoreError> {
        let names_here = names(&self.directory.root.join(folder))?;
        for name in &names_here {
            let folder = format!("{folder}/{name}");
            // A link leads out of the store: what is behind it is not ours to count or remove.
            if self.directory.root.join(&folder).is_symlink() {
                continue;
            }
            if depth > 1 {
                if self.load_folder(&folder, depth - 1)? == 0 && Digest::from_hex(name).is_some() {
                    // Left by an interrupted removal. A folder that is in use again is not empty.
                    let _ = fs::remove_dir(self.directory.root.join(&folder));
                }
                continue;
            }
            // Whatever is not of the form of an object was not made here, and is left alone.
            let here = names(&self.directory.root.join(&folder))?;
            let mut is_used = false;
            for generation in &here {
                let Some(name) = ObjectName::parse(&format!("{folder}/{generation}")) else {
                    continue;
                };
                let damaged = here.contains(&format!("{generation}.damaged"));
                if let Some(entry) = self.read_entry(&name, damaged) {
                    self.directory.catalog.add(name, entry);
                    is_used = true;
                }
            }
            // Only folders named like the driver's own are removed.
            if !is_used && ObjectName::parse(&format!("{folder}/1")).is_some() {
                self.remove_empty_key(&self.directory.root.join(&folder), &here);
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
        let folders = folder.ancestors().take_while(|above| {
            above.parent().is_some_and(|parent| parent != self.directory.root.as_path())
        });
        for folder in folders {
            if fs::remove_dir(folder).is_err() {
                return;
            }
        }
    }

    fn read_entry(&self, name: &ObjectName, damaged: bool) -> Option<Entry> {
        let path = self.directory.root.join(name.as_str());
        let units = self.directory.units;
        let entry = match name.kind() {
            ObjectKind::File => single_files::read_entry(units, &path)?,
            ObjectKind::Layer => layers::read_entry(units, &path)?,
            ObjectKind::Tree => trees::read_entry(&self.directory, &path)?,
            ObjectKind::Document => return None,
        };
        Some(Entry { damaged, ..entry })
    }
}
