//! The trees that pods see: one ordinary directory tree for each tree key.
//!
//! ```text
//! trees/<key>/<n>/root          the tree; its files are hard links to files/ and layers/
//! trees/<key>/<n>/tree.json     totals and what it is: all that a publish reads
//! trees/<key>/<n>/objects.json  which files and layers it links
//! ```
//!
//! The form in which a tree is kept, compared and shown is [`HardLinkTree`], which this module
//! alone knows: a mount gets an open root from [`Tree::open`]. Another form, such as an EROFS
//! image, would stand beside it with the same functions.

mod hard_links;
pub mod mounted_tree;
mod tree_objects;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::time::TimeSpec;
use serde::{Deserialize, Serialize};

use super::disk_units::{BYTES_PER_INODE, DiskUnits};
use super::error::{IoContext as _, StoreError};
use super::eviction::FORGOTTEN;
use super::folder_listing::current_generation;
use super::inode_metadata::Rules;
use super::integrity_findings::DamageList;
use super::layers::Layer;
use super::object_catalog::{Entry, Lease};
use super::paced_reader::Reader;
use super::single_files::StoredFile;
use super::space_amount::SpaceAmount;
use super::space_ledger::Claim;
use super::staging_folders::Staging;
use super::state_directory::StateDirectory;
use super::{ObjectKind, ObjectName, TreeKey, json_records, object_keys};
use hard_links::HardLinkTree;
use oci_types::Digest;
use sys::fault;
pub use tree_objects::Objects;
use unpack::layer_merge::TreePlan;
use unpack::{PermissionsRule, UnpackMode};

/// The file that says what a tree is.
const RECORD: &str = "tree.json";
/// The file that lists what a tree links.
const LINKS: &str = "objects.json";

/// The number of these files.
const FILES_OF_A_TREE: u64 = 2;
/// Folders around them: of the generation and of the key.
const FOLDERS_OF_A_TREE: u64 = 2;
/// Inodes of a tree beside those that it shows.
const RECORDS_OF_A_TREE: u64 = FILES_OF_A_TREE + FOLDERS_OF_A_TREE;

/// A complete tree in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// The key of the tree.
    pub key: TreeKey,
    /// The number of its generation.
    pub generation: u32,
    /// The content of its `tree.json`.
    pub record: TreeRecord,
    /// The directory of the tree.
    pub path: PathBuf,
    /// The hold on it; none where it was read without a store.
    lease: Option<Lease>,
}

/// The record that is kept with a tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeRecord {
    /// The manifest that it was made from.
    pub manifest: Digest,
    /// `artifactType` or the configuration's media type, for people.
    pub kind: String,
    /// Bytes of its regular files, each inode once.
    pub bytes: u64,
    /// Inodes, the root folder included.
    pub inodes: u64,
    /// Bytes that were to be fetched for it, by the manifest.
    pub compressed_bytes: u64,
    /// Folders, symbolic links, and copies of files that had no name left to give: inodes that
    /// it shares with no other tree.
    #[serde(default)]
    pub own_inodes: u64,
    /// Bytes of those copies, and of names beyond the first block of each folder.
    #[serde(default, skip_serializing_if = "is_none")]
    pub own_bytes: u64,
    /// The view that the volume asked for.
    #[serde(default)]
    pub view: View,
    /// The artifacts of a composite, in the volume's order; empty for the tree of one artifact.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<TreePart>,
}

/// One artifact of a composite.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreePart {
    /// The folder of its root; empty for the root of the volume.
    pub path: String,
    /// The manifest that it was made from.
    pub manifest: Digest,
    /// Bytes of its regular files.
    pub bytes: u64,
    /// The view that the volume asked for.
    #[serde(default)]
    pub view: View,
}

impl TreeRecord {
    /// Returns what the tree shows of each artifact, also if there is only one.
    pub fn artifacts(&self) -> Vec<TreePart> {
        if !self.parts.is_empty() {
            return self.parts.clone();
        }
        let &Self { manifest, bytes, .. } = self;
        vec![TreePart { path: String::new(), manifest, bytes, view: self.view.clone() }]
    }

    /// Returns the manifests that the tree was made from.
    pub fn manifests(&self) -> impl Iterator<Item = Digest> {
        self.artifacts().into_iter().map(|artifact| artifact.manifest)
    }
}

impl TreePart {
    /// Returns the digest that stands for the manifests of a composite. No document has it.
    pub fn digest_of(parts: &[Self]) -> Digest {
        let texts = parts.iter().flat_map(|part| [part.path.clone(), part.manifest.hex()]);
        let texts: Vec<_> = std::iter::once("parts".to_owned()).chain(texts).collect();
        object_keys::hash(&texts.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

/// The shape of a tree beside its manifest, from the volume attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct View {
    /// The `include` patterns.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub include: String,
    /// The `exclude` patterns.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub exclude: String,
    /// The rule for modes and owners.
    pub permissions: PermissionsRule,
    /// Mode of single-file layers that carry none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_mode: Option<u32>,
    /// The choice of layers that are unpacked.
    #[serde(skip_serializing_if = "UnpackMode::is_auto")]
    pub unpack: UnpackMode,
    /// The folder or file that is shown; empty for all.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub sub_path: String,
}

/// A tree that is complete but for its records and its name.
pub struct BuiltTree {
    staging: Staging,
    /// Disk space beside one block for each folder and link.
    own: SpaceAmount,
}

/// The trees of a store.
pub struct Trees {
    pub(super) directory: Arc<StateDirectory>,
}

impl Claim {
    /// Returns the claim of a tree: what its form takes, and its records. Its files are other
    /// objects'.
    pub fn of_tree(tree: TreeKey, plan: &TreePlan) -> Self {
        let SpaceAmount { bytes, inodes } = HardLinkTree::space(plan);
        let bytes = bytes.saturating_add(RECORDS_OF_A_TREE * BYTES_PER_INODE);
        Self { blob: tree.digest(), bytes, inodes: inodes.saturating_add(RECORDS_OF_A_TREE) }
    }
}

/// Returns the entry of a tree, of which the record may be missing.
fn entry(units: DiskUnits, record: Option<&TreeRecord>) -> Entry {
    let (own, more) = record.map_or((0, 0), |record| (record.own_inodes, record.own_bytes));
    let folders = own.saturating_add(FOLDERS_OF_A_TREE).saturating_mul(units.folder);
    let bytes = folders.saturating_add(FILES_OF_A_TREE * units.block).saturating_add(more);
    let inodes = own.saturating_add(RECORDS_OF_A_TREE);
    Entry { manifest: record.map(|record| record.manifest), ..Entry::new(bytes, inodes) }
}

/// Reads the entry of a tree on the disk; none where there is no folder.
pub(super) fn read_entry(directory: &StateDirectory, path: &Path) -> Option<Entry> {
    path.symlink_metadata().ok().filter(std::fs::Metadata::is_dir)?;
    let record_path = path.join(RECORD);
    let record: Option<TreeRecord> = json_records::read(&record_path);
    let links: Vec<String> = json_records::read(&path.join(LINKS)).unwrap_or_default();
    let mut links: Vec<_> = links.iter().filter_map(|link| ObjectName::parse(link)).collect();
    if let Some(record) = &record
        && record.parts.is_empty()
        && !links.contains(&ObjectName::document(record.manifest))
    {
        // Earlier versions did not list documents.
        links.extend(directory.documents_of(record.manifest));
    }
    // The last use of a tree is the time of its record.
    let last_used = record_path.metadata().map_or(0, |record| record.mtime());
    Some(Entry { last_used, links, ..entry(directory.units, record.as_ref()) })
}

impl Trees {
    /// The tree's current generation, if it is in the store.
    pub fn get(&self, key: TreeKey) -> Result<Option<Tree>, StoreError> {
        match current_generation(&self.directory.path("trees").join(key.to_string()))? {
            Some(generation) => Ok(self.generation(key, generation)),
            None => Ok(None),
        }
    }

    /// One generation of a tree; none when its record cannot be read.
    pub fn generation(&self, key: TreeKey, generation: u32) -> Option<Tree> {
        // The lease first: what is read after it stays.
        let lease = self.directory.catalog.lease(ObjectName::tree(key, generation));
        Some(Tree { lease: Some(lease), ..Tree::read(&self.directory.root, key, generation)? })
    }

    /// The tree of this name.
    pub fn named(&self, name: &ObjectName) -> Option<Tree> {
        let mut parts = name.as_str().strip_prefix("trees/")?.split('/');
        let key = TreeKey::from_hex(parts.next()?)?;
        self.generation(key, parts.next()?.parse().ok()?)
    }

    /// Remembers a publish: for eviction, which takes what was used longest ago.
    pub fn mark_published(&self, tree: &Tree) {
        self.touch(&ObjectName::tree(tree.key, tree.generation));
    }

    /// Remembers an unpublish. What an administrator has removed stays removed.
    pub(super) fn mark_unpublished(&self, tree: &ObjectName) {
        let forgotten = |record: &std::fs::Metadata| record.mtime() == FORGOTTEN;
        if !self.record_of(tree).metadata().is_ok_and(|record| forgotten(&record)) {
            self.touch(tree);
        }
    }

    /// Makes a tree go with its last unpublish, or at the next collection.
    pub fn forget(&self, tree: &Tree) -> Result<(), StoreError> {
        let name = ObjectName::tree(tree.key, tree.generation);
        let path = self.record_of(&name);
        set_time(&path, FORGOTTEN).io_context("write", &path)?;
        self.directory.catalog.used(&name, FORGOTTEN);
        Ok(())
    }

    fn touch(&self, tree: &ObjectName) {
        let now = jiff::Timestamp::now().as_second();
        self.directory.catalog.used(tree, now);
        // A hint: where it cannot be written the tree only looks older after a restart.
        let _ = set_time(&self.record_of(tree), now);
    }

    fn record_of(&self, tree: &ObjectName) -> PathBuf {
        self.directory.root.join(tree.as_str()).join(RECORD)
    }

    /// Makes a plan a tree, which has no name yet.
    pub fn build(&self, plan: &TreePlan, objects: &Objects) -> Result<BuiltTree, StoreError> {
        let mut staging = self.directory.stage()?;
        let content = HardLinkTree::of(staging.path());
        let own = content.build(plan, objects, &self.directory, &mut staging)?;
        Ok(BuiltTree { staging, own })
    }

    /// Gives a tree its name, after all that it links has one.
    pub fn commit(
        &self,
        key: TreeKey,
        record: TreeRecord,
        built: BuiltTree,
        layers: &[Layer],
        files: &[StoredFile],
    ) -> Result<Tree, StoreError> {
        self.commit_linking(key, record, built, names_of(layers, files))
    }

    /// Gives a tree its name, after these files and layers that it links have theirs.
    pub fn commit_linking(
        &self,
        key: TreeKey,
        mut record: TreeRecord,
        built: BuiltTree,
        links: BTreeSet<ObjectName>,
    ) -> Result<Tree, StoreError> {
        let BuiltTree { mut staging, own: SpaceAmount { bytes, inodes } } = built;
        record.own_inodes = record.own_inodes.saturating_add(inodes);
        record.own_bytes = record.own_bytes.saturating_add(bytes);
        let documents = record.manifests().flat_map(|of| self.directory.documents_of(of));
        let documents: BTreeSet<_> = documents.collect();
        let links: Vec<_> = links.into_iter().chain(documents).collect();
        let texts: Vec<_> = links.iter().map(ObjectName::as_str).collect();
        for (name, json) in
            [(RECORD, serde_json::to_vec(&record)), (LINKS, serde_json::to_vec(&texts))]
        {
            let path = staging.path().join(name);
            let write = || -> io::Result<File> {
                let mut file = File::create_new(&path)?;
                file.write_all(&json?)?;
                Ok(file)
            };
            let _open = write().io_context("write", &path)?;
            staging.staged.wrote(|| path);
        }
        let path = staging.path().to_owned();
        staging.staged.wrote(|| path.clone());
        let folder = self.directory.path("trees").join(key.to_string());
        fault::point("tree.built").io_context("build", &path)?;
        let entry = Entry { links: links.clone(), ..entry(self.directory.units, Some(&record)) };
        let (generation, lease) = self.directory.commit(staging, &path, &folder, entry)?;
        let path = folder.join(generation.to_string());
        // Marking an object looks for its trees afterwards, and finds this one from here on.
        let mut content = links.iter().filter(|link| link.kind() != ObjectKind::Document);
        if let Some(damaged) = content.find(|link| self.directory.damage.is_marked(link)) {
            self.directory.damage.mark(&path)?;
            let path = self.directory.root.join(damaged.as_str());
            let what = "it was found damaged while a tree was made of it".to_owned();
            return Err(StoreError::Damaged { path, what });
        }
        Ok(Tree { key, generation, record, path, lease: Some(lease) })
    }

    /// Returns the files and layers that a tree links, from its `objects.json`. Other names in it,
    /// such as those of a later version, are ignored.
    ///
    /// # Errors
    ///
    /// [`StoreError::Damaged`] when that is not a list of names.
    pub fn links(&self, tree: &Tree) -> Result<Vec<ObjectName>, StoreError> {
        let links: Vec<String> = json_records::read_whole(&tree.path.join(LINKS))?;
        let names = links.iter().filter_map(|link| ObjectName::parse(link));
        Ok(names.filter(|link| link.kind() != ObjectKind::Document).collect())
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
const fn is_none(bytes: &u64) -> bool {
    *bytes == 0
}

/// `layers/<key>/<n>` and `files/<digest>/<variant>/<n>`, each once.
fn names_of(layers: &[Layer], files: &[StoredFile]) -> BTreeSet<ObjectName> {
    let layers = layers.iter().map(|layer| ObjectName::layer(layer.key, layer.generation));
    let files = files.iter().map(|file| ObjectName::file(file.key, file.generation));
    layers.chain(files).collect()
}

impl Tree {
    /// Reads a tree's record below a state directory that may not be open as a
    /// store: statistics of a mounted volume need no more.
    pub fn read(state: &Path, key: TreeKey, generation: u32) -> Option<Self> {
        let path = state.join("trees").join(key.to_string()).join(generation.to_string());
        let record = json_records::read(&path.join(RECORD))?;
        Some(Self { key, generation, record, path, lease: None })
    }

    /// Returns the path of the root of what it shows.
    pub(super) fn root(&self) -> PathBuf {
        HardLinkTree::of(&self.path).root().to_owned()
    }

    /// Opens the root of what it shows, for mounting.
    pub fn open(&self) -> Result<OwnedFd, StoreError> {
        HardLinkTree::of(&self.path).open()
    }

    /// Gives all that it shows second names in a folder of staging. Returns that folder, and the disk space that the
    /// names take, folders and symbolic links included.
    pub(super) fn copy(
        &self,
        directory: &StateDirectory,
        staging: &Staging,
    ) -> Result<(PathBuf, SpaceAmount), StoreError> {
        let (root, copies) = HardLinkTree::of(&self.path).copy(directory, staging)?;
        Ok((root, self.own_space(directory.units).plus(copies)))
    }

    /// Returns the disk space of its folders, symbolic links and names, which it shares with no other tree.
    pub(super) fn own_space(&self, units: DiskUnits) -> SpaceAmount {
        let TreeRecord { own_inodes: inodes, own_bytes, .. } = self.record;
        let bytes = inodes.saturating_mul(units.folder).saturating_add(own_bytes);
        SpaceAmount { bytes, inodes }
    }

    /// Compares what it shows with a plan, name by name.
    pub(super) fn compare(
        &self,
        plan: &TreePlan,
        objects: &Objects,
        rules: Rules,
        reader: &mut Reader,
    ) -> Result<DamageList, StoreError> {
        HardLinkTree::of(&self.path).compare(plan, objects, rules, reader)
    }
}

/// Sets a record's modification time, which is the last use of its tree.
fn set_time(record: &Path, seconds: i64) -> io::Result<()> {
    let time = TimeSpec::new(seconds, 0);
    let follow = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
    Ok(nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, record, &time, &time, follow)?)
}
