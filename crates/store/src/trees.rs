//! What pods see: one ordinary directory tree for each tree key.
//!
//! ```text
//! trees/<key>/<n>/root          the tree; its files are hard links to files/ and layers/
//! trees/<key>/<n>/tree.json     totals and what it is: all that a publish reads
//! trees/<key>/<n>/objects.json  which files and layers it links
//! ```
//!
//! How a tree is shown is behind [`Tree`]: whoever mounts asks it for an open
//! root, so that another form (an EROFS image) can stand beside this one.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::time::TimeSpec;
use serde::{Deserialize, Serialize};

use super::catalog::{Entry, Lease};
use super::copies::Copies;
use super::error::StoreError;
use super::eviction::{FORGOTTEN, Goal};
use super::files::StoredFile;
use super::inventory::DiskUnits;
use super::layers::{IndexReader, Layer, LayerView};
use super::room::bytes_of_a_name;
use super::staging::{Staging, current_generation};
use super::tree_builder::Builder;
use super::{ObjectKind, ObjectName, Store, TreeKey, records};
use oci_types::Digest;
use sys::fault;
use unpack::Entry as LayerEntry;
use unpack::merge::{EntryReader, Source, TreePlan};
use unpack::{PermissionsRule, UnpackMode};

/// A complete tree in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Its name.
    pub key: TreeKey,
    /// Which generation.
    pub generation: u32,
    /// What it is.
    pub record: TreeRecord,
    path: PathBuf,
    /// None where it was read without a store.
    lease: Option<Lease>,
}

/// What is kept with a tree.
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
    /// What shaped it beside the manifest, as a volume asked for it.
    #[serde(default)]
    pub view: View,
}

/// What shapes a tree beside its manifest, as the volume attributes say it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct View {
    /// Patterns.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub include: String,
    /// Patterns.
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
}

/// A tree that is complete but for its records and its name.
#[derive(Debug)]
pub struct BuiltTree {
    staging: Staging,
    /// Disk space beside one block for each folder and link.
    own: Goal,
}

/// The objects that a plan's files come from.
#[derive(Debug, Default)]
pub struct Objects {
    /// By the layer's number in the manifest.
    pub layers: std::collections::BTreeMap<u32, LayerView>,
    /// Single files by digest, mode and owner.
    pub files: std::collections::HashMap<super::FileKey, StoredFile>,
}

impl Store {
    /// The tree's current generation, if it is in the store.
    pub fn tree(&self, key: TreeKey) -> Result<Option<Tree>, StoreError> {
        match current_generation(&self.path("trees").join(key.to_string()))? {
            Some(generation) => Ok(self.tree_generation(key, generation)),
            None => Ok(None),
        }
    }

    /// One generation of a tree; none when its record cannot be read.
    #[must_use]
    pub fn tree_generation(&self, key: TreeKey, generation: u32) -> Option<Tree> {
        // The lease first: what is read after it stays.
        let lease = self.catalog().lease(ObjectName::tree(key, generation));
        Some(Tree { lease: Some(lease), ..Tree::read(self.root(), key, generation)? })
    }

    /// The tree of this name.
    #[must_use]
    pub fn named_tree(&self, name: &ObjectName) -> Option<Tree> {
        let mut parts = name.as_str().strip_prefix("trees/")?.split('/');
        let key = TreeKey::from_hex(parts.next()?)?;
        self.tree_generation(key, parts.next()?.parse().ok()?)
    }

    /// Returns all trees of the store with their entries, damaged ones included.
    ///
    /// # Errors
    ///
    /// Those of reading the sizes, at the first call.
    pub fn all_trees(&self) -> Result<Vec<(ObjectName, Arc<Entry>)>, StoreError> {
        self.load_catalog()?;
        Ok(self.catalog().trees())
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
        self.load_catalog()?;
        Ok(self.catalog().trees_of(manifest))
    }

    /// Returns whether a tree of a manifest can be shown.
    ///
    /// # Errors
    ///
    /// Those of reading the sizes, at the first call.
    pub fn has_sound_tree(&self, manifest: Digest) -> Result<bool, StoreError> {
        let trees = self.trees_of_manifest(manifest)?;
        let is_sound = |(name, entry): &(ObjectName, Arc<Entry>)| {
            !entry.damaged && self.named_tree(name).is_some()
        };
        Ok(trees.iter().any(is_sound))
    }

    /// Remembers a publish: for eviction, which takes what was used longest ago.
    pub fn tree_was_published(&self, tree: &Tree) {
        self.touch(&ObjectName::tree(tree.key, tree.generation));
    }

    /// Remembers an unpublish. What an administrator has removed stays removed.
    pub(super) fn tree_was_unpublished(&self, tree: &ObjectName) {
        let forgotten = |record: &std::fs::Metadata| record.mtime() == FORGOTTEN;
        if !self.record_of(tree).metadata().is_ok_and(|record| forgotten(&record)) {
            self.touch(tree);
        }
    }

    /// Makes a tree go with its last unpublish, or at the next collection.
    pub fn forget_tree(&self, tree: &Tree) -> Result<(), StoreError> {
        let name = ObjectName::tree(tree.key, tree.generation);
        let path = self.record_of(&name);
        set_time(&path, FORGOTTEN).map_err(|error| StoreError::io("write", &path, error))?;
        self.catalog().used(&name, FORGOTTEN);
        Ok(())
    }

    fn touch(&self, tree: &ObjectName) {
        let now = jiff::Timestamp::now().as_second();
        self.catalog().used(tree, now);
        // A hint: where it cannot be written the tree only looks older after a restart.
        let _ = set_time(&self.record_of(tree), now);
    }

    fn record_of(&self, tree: &ObjectName) -> PathBuf {
        self.root().join(tree.as_str()).join("tree.json")
    }

    /// Makes a plan a tree, which has no name yet.
    pub fn build_tree(&self, plan: &TreePlan, objects: &Objects) -> Result<BuiltTree, StoreError> {
        let mut staging = self.stage()?;
        let root = staging.path().join("root");
        let since = Instant::now();
        let (label, meter) = (self.label(), self.meter());
        let copies = Copies::new(staging.path().join("copies"), label, &meter);
        Builder { plan, objects, label, meter: &meter, copies: &copies }
            .build(&root, &mut staging)?;
        let own = copies.finish().map_err(|error| StoreError::io("finish", &root, error))?;
        let nodes = plan.nodes.len();
        tracing::debug!(root = %root.display(), nodes, took = ?since.elapsed(), "linked");
        let own = own.plus(Goal { bytes: bytes_of_names(plan, self.units()), inodes: 0 });
        Ok(BuiltTree { staging, own })
    }

    /// Gives a tree its name, after all that it links has one.
    pub fn commit_tree(
        &self,
        key: TreeKey,
        mut record: TreeRecord,
        built: BuiltTree,
        (layers, files): (&[Layer], &[StoredFile]),
    ) -> Result<Tree, StoreError> {
        let BuiltTree { mut staging, own: Goal { bytes, inodes } } = built;
        record.own_inodes = record.own_inodes.saturating_add(inodes);
        record.own_bytes = record.own_bytes.saturating_add(bytes);
        let mut links = names_of(layers, files);
        let documents = self.documents_of(record.manifest).into_iter();
        links.extend(documents.map(|name| name.as_str().to_owned()));
        for (name, json) in [
            ("tree.json", serde_json::to_vec(&record)),
            ("objects.json", serde_json::to_vec(&links)),
        ] {
            let path = staging.path().join(name);
            let write = || -> io::Result<File> {
                let mut file = File::create_new(&path)?;
                file.write_all(&json?)?;
                Ok(file)
            };
            let _open = write().map_err(|error| StoreError::io("write", &path, error))?;
            staging.staged.wrote(|| path);
        }
        let path = staging.path().to_owned();
        staging.staged.wrote(|| path.clone());
        let folder = self.path("trees").join(key.to_string());
        fault::point("tree.built").map_err(|error| StoreError::io("build", &path, error))?;
        let links: Vec<_> = links.iter().filter_map(|link| ObjectName::parse(link)).collect();
        let entry = Entry { links: links.clone(), ..self.units().tree(Some(&record)) };
        let (generation, lease) = self.commit(staging, &path, &folder, entry)?;
        let path = folder.join(generation.to_string());
        // Whoever marks what it links looks for trees after that, and finds this one from here on.
        let mut content = links.iter().filter(|link| link.kind() != ObjectKind::Document);
        if let Some(damaged) = content.find(|link| self.is_damaged(link)) {
            self.mark_damaged(&path)?;
            let path = self.root().join(damaged.as_str());
            let what = "it was found damaged while a tree was made of it".to_owned();
            return Err(StoreError::Damaged { path, what });
        }
        Ok(Tree { key, generation, record, path, lease: Some(lease) })
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
const fn is_none(bytes: &u64) -> bool {
    *bytes == 0
}

/// Returns the disk space of names beyond the first block of each folder.
fn bytes_of_names(plan: &TreePlan, units: DiskUnits) -> u64 {
    let mut folders = HashMap::<_, u64>::new();
    for node in &plan.nodes {
        *folders.entry(node.parent).or_default() += bytes_of_a_name(node.name_bytes);
    }
    folders.into_values().map(|names| units.more_names(names)).sum()
}

/// `layers/<key>/<n>` and `files/<digest>/<variant>/<n>`, each once.
fn names_of(layers: &[Layer], files: &[StoredFile]) -> Vec<String> {
    let layers = layers.iter().map(|layer| ObjectName::layer(layer.key, layer.generation));
    let files = files.iter().map(|file| ObjectName::file(file.key, file.generation));
    let names: std::collections::BTreeSet<_> = layers.chain(files).collect();
    names.iter().map(|name| name.as_str().to_owned()).collect()
}

impl Tree {
    /// Reads a tree's record below a state directory that may not be open as a
    /// store: statistics of a mounted volume need no more.
    #[must_use]
    pub fn read(state: &std::path::Path, key: TreeKey, generation: u32) -> Option<Self> {
        let path = state.join("trees").join(key.to_string()).join(generation.to_string());
        let record = records::read(&path.join("tree.json"))?;
        Some(Self { key, generation, record, path, lease: None })
    }

    /// Its folder.
    #[must_use]
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// The root folder, open, for mounting.
    pub fn open(&self) -> Result<OwnedFd, StoreError> {
        let path = self.path.join("root");
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        open(&path, flags, Mode::empty())
            .map_err(|error| StoreError::io("open", &path, error.into()))
    }
}

impl Objects {
    /// Returns a reader of single entries of the layers, which keeps a few indexes open.
    #[must_use]
    pub fn records(&self) -> impl EntryReader {
        IndexEntryReader { objects: self, open: Vec::new() }
    }

    /// Where the content of a planned file lies: below a folder, or by itself.
    pub(super) fn locate(&self, source: Source) -> Option<(BorrowedFd<'_>, PathBuf)> {
        match source {
            Source::Archive { layer, data } => {
                self.layers.get(&layer).map(|layer| layer.data(data))
            }
            Source::Blob { digest, permissions } => {
                let file = self.files.get(&super::FileKey { digest, permissions })?;
                Some((nix::fcntl::AT_FDCWD, file.path.clone()))
            }
        }
    }

    /// The same as one path, good as long as these are.
    pub(super) fn path(&self, source: Source) -> Option<PathBuf> {
        use std::os::fd::AsRawFd as _;
        let (folder, path) = self.locate(source)?;
        // An absolute path stays what it is.
        Some(PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(path))
    }
}

/// Indexes that a reader keeps open, at most.
const OPEN_INDEXES: usize = 8;

/// Reads single entries from the indexes of layers.
struct IndexEntryReader<'a> {
    objects: &'a Objects,
    /// Open indexes by layer, the most recently used one last.
    open: Vec<(u32, IndexReader)>,
}

impl EntryReader for IndexEntryReader<'_> {
    fn read(&mut self, layer: u32, offset: u64) -> io::Result<LayerEntry> {
        match self.open.iter().rposition(|(open, _)| *open == layer) {
            Some(place) if place + 1 == self.open.len() => {}
            Some(place) => {
                let index = self.open.remove(place);
                self.open.push(index);
            }
            None => {
                let view = self.objects.layers.get(&layer).ok_or(io::ErrorKind::NotFound)?;
                let index = view.index().map_err(io::Error::other)?;
                if self.open.len() == OPEN_INDEXES {
                    self.open.remove(0);
                }
                self.open.push((layer, index));
            }
        }
        let (_, index) = self.open.last_mut().ok_or(io::ErrorKind::NotFound)?;
        index.read(offset)
    }
}

/// Sets a record's modification time, which is the last use of its tree.
fn set_time(record: &std::path::Path, seconds: i64) -> io::Result<()> {
    let time = TimeSpec::new(seconds, 0);
    let follow = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
    Ok(nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, record, &time, &time, follow)?)
}
