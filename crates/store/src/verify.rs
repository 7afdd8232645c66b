//! Reads content back and compares it with what was written.
//!
//! ```text
//! blobs     the bytes with the digest in the name
//! files     the bytes with the digest in the name, mode and owner with the rest of it, no attributes
//! layers    the index with its own checksum; each file with the size, checksum, mode, owner, time and
//!           attributes in the index
//! trees     each name with what a fresh merge of its layers would make: each file by its inode, each
//!           folder with mode, owner, time and attributes, each link with target, owner and time; and
//!           no names beside these; tree.json and objects.json with the manifest and the merge
//! ```
//!
//! A tree without its manifest, its records or the objects that it links is damaged.
//!
//! So everything is noticed that a process can change which has a tree before it and may write, but
//! for the access times, and the modification time of single files, which nothing else depends on.
//!
//! What is found damaged is marked before anything else happens: it is never
//! shown anew, the next generation is made afresh, and whoever has it mounted keeps it.

mod inode;
mod reader;
mod tree;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::catalog::Lease;
use super::error::StoreError;
use super::files::{StoredFile, is_executable};
use super::layers::{self, Layer, read_totals};
use super::object::{ObjectKind, ObjectName};
use super::staging::names;
use super::trees::{Objects, Tree, TreeRecord};
use super::{FileKey, Store};
use inode::Rules;
use oci_types::Digest;
use reader::{
    LEASED_AT_ONCE, is_leased, is_of_this_node, open, open_patiently, unreadable, was_leased,
};
pub use reader::{ReadPace, Reader};
use unpack::checksum::Checksum;
use unpack::entry::ExtendedAttributes;
use unpack::merge::TreePlan;
use unpack::{Entry, EntryKind, Permissions};

/// Findings of one object that are kept; the rest is counted.
const MOST_FINDINGS: usize = 1000;

/// Something that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is.
    pub kind: FindingKind,
    /// Of a blob or file: its digest; of a layer: its blob's; of a tree: its manifest's.
    pub digest: Option<Digest>,
    /// Where, below the state directory.
    pub path: PathBuf,
    /// What is wrong with it.
    pub detail: String,
}

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FindingKind {
    /// A manifest, index or configuration.
    Blob,
    /// A single-file layer.
    File,
    /// An unpacked archive.
    Layer,
    /// What a pod sees.
    Tree,
    /// Content of any kind that could not be read, so that its state is unknown.
    Unread,
}

/// The expected state of a tree, from its manifest.
#[derive(Debug)]
pub struct ExpectedTree {
    /// Names, modes, times and links.
    pub plan: TreePlan,
    /// The generations of files and layers that it links.
    pub objects: Objects,
    /// The expected content of `tree.json`.
    pub record: TreeRecord,
}

/// What was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Blobs, files, layers and trees.
    pub objects: u64,
    /// Bytes of them.
    pub bytes: u64,
}

impl Finding {
    /// Returns the finding for an object that could not be read back for a reason outside of it.
    #[must_use]
    pub fn of_unread(name: &ObjectName, error: &impl std::fmt::Display) -> Self {
        let (path, detail) = (PathBuf::from(name.as_str()), error.to_string());
        Self { kind: FindingKind::Unread, digest: None, path, detail }
    }

    /// Writes it to the log.
    pub fn log(&self) {
        let (kind, path) = (self.kind.name(), self.path.display());
        let detail = &self.detail;
        if self.kind == FindingKind::Unread {
            tracing::warn!(%path, detail, "content is not read back");
        } else {
            tracing::warn!(kind, %path, detail, "damaged content");
        }
    }
}

impl StoreError {
    /// Returns whether the error is the node's, such as too few file descriptors, and not the content's.
    #[must_use]
    pub fn is_of_this_node(&self) -> bool {
        match self {
            Self::Io { source, .. } => is_of_this_node(source),
            Self::Damaged { .. } => false,
            _ => true,
        }
    }
}

impl FindingKind {
    /// For people and programs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Blob => "blob",
            Self::File => "file",
            Self::Layer => "layer",
            Self::Tree => "tree",
            Self::Unread => "unread",
        }
    }
}

impl Store {
    /// Reads all blobs back; damaged ones are removed, to be fetched again.
    pub fn verify_blobs(
        &self,
        reader: &mut Reader,
        found: &mut dyn FnMut(Finding),
    ) -> Result<(), StoreError> {
        for name in names(&self.path("blobs"))? {
            let Some(digest) = Digest::from_hex(&name) else { continue };
            let below = Path::new("blobs").join(&name);
            let path = self.root().join(&below);
            let failed = |error| StoreError::io("read back", &path, error);
            let read = open(&path).and_then(|file| reader.hash(&file));
            reader.verified.objects += 1;
            let detail = match read {
                Ok(got) if got == digest => continue,
                Ok(got) => format!("its content has the digest {got}"),
                // It led nowhere any more, and was swept.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => unreadable(error).map_err(failed)?,
            };
            // A removed document is fetched again. A failed removal is tried at the next reading.
            if super::records::remove(&path).is_ok() {
                self.catalog().remove_document(&ObjectName::document(digest));
            }
            found(Finding { kind: FindingKind::Blob, digest: Some(digest), path: below, detail });
        }
        Ok(())
    }

    /// Reads all files and layers back, and marks what is damaged together with the trees that
    /// link it.
    pub fn verify_objects(
        &self,
        reader: &mut Reader,
        found: &mut dyn FnMut(Finding),
    ) -> Result<(), StoreError> {
        self.load_catalog()?;
        let mut objects = self.catalog().names();
        objects.sort();
        for (name, _) in objects {
            match self.verify_object(&name, reader, found) {
                // The remaining objects are still read.
                Err(error @ StoreError::Leased { .. }) => found(Finding::of_unread(&name, &error)),
                read => drop(read?),
            }
        }
        Ok(())
    }

    /// Reads one file or layer back; marks it, and the trees that link it, if it is damaged.
    /// Returns the trees that were sound until now.
    pub fn verify_object(
        &self,
        name: &ObjectName,
        reader: &mut Reader,
        found: &mut dyn FnMut(Finding),
    ) -> Result<Vec<ObjectName>, StoreError> {
        if matches!(name.kind(), ObjectKind::Tree | ObjectKind::Document) {
            return Ok(Vec::new());
        }
        if self.is_damaged(name) {
            // It was found since, and the process may have ended before its trees were marked.
            return self.find_trees_of(name, found);
        }
        let Some((_lease, path)) = self.hold(name) else { return Ok(Vec::new()) };
        let before = reader.verified.bytes;
        reader.begin();
        let (rules, mut damage) = (self.rules(), Damage::default());
        let read = match name.kind() {
            ObjectKind::File => verify_file(&path, name, reader, rules, &mut damage),
            _ => verify_layer(&path, reader, rules, &mut damage),
        };
        match read {
            // Findings from before the lease are still valid.
            Err(error) if was_leased(&error) && !damage.is_empty() => {}
            read => read.map_err(|error| failed_to_read(&path, error))?,
        }
        reader.verified.objects += 1;
        tracing::debug!(object = %name, bytes = reader.verified.bytes - before, "read back");
        if damage.is_empty() {
            self.was_read(name);
            return Ok(Vec::new());
        }
        let trees = self.mark_damaged(&path)?;
        for (below, detail) in damage.into_list() {
            let digest = digest_of(name, &path);
            let path = Path::new(name.as_str()).join(below);
            let kind = match name.kind() {
                ObjectKind::File => FindingKind::File,
                _ => FindingKind::Layer,
            };
            found(Finding { kind, digest, path: trimmed(&path), detail });
        }
        Ok(trees)
    }

    /// Compares a tree with what its manifest and its layers say it is. Returns whether they are the same.
    pub fn verify_tree(
        &self,
        tree: &Tree,
        expected: &ExpectedTree,
        reader: &mut Reader,
        found: &mut dyn FnMut(Finding),
    ) -> Result<bool, StoreError> {
        let mut damage = Damage::default();
        reader.begin();
        let root = tree.path().join("root");
        let ExpectedTree { plan, objects, record } = expected;
        tree::Comparison { plan, objects, rules: self.rules() }
            .run(&root, reader, &mut damage)
            .map_err(|error| failed_to_read(&root, error))?;
        reader.verified.objects += 1;
        let mut damage = damage.below(Path::new("root"));
        damage.extend(Path::new("tree.json"), tree::other_numbers(&tree.record, record));
        let linked: BTreeSet<_> = self.names_of_objects(objects);
        match self.links(tree) {
            Ok(links) if links.iter().cloned().collect::<BTreeSet<_>>() == linked => {}
            Ok(_) => damage.push((
                PathBuf::from("objects.json"),
                "it does not name the files and layers that the tree links".to_owned(),
            )),
            Err(error) if error.is_of_this_node() => return Err(error),
            Err(error) => damage.push((PathBuf::from("objects.json"), error.to_string())),
        }
        let name = ObjectName::tree(tree.key, tree.generation);
        if damage.is_empty() {
            // A tree is no better than what it links.
            if !linked.iter().any(|link| self.is_unread(link)) {
                self.was_read(&name);
            }
            return Ok(true);
        }
        self.condemn_tree(&name, Some(tree.record.manifest), damage, found)?;
        Ok(false)
    }

    /// Marks a tree as damaged that cannot be compared, and reports the reason.
    pub fn refuse_tree(
        &self,
        tree: &Tree,
        why: String,
        found: &mut dyn FnMut(Finding),
    ) -> Result<(), StoreError> {
        let name = ObjectName::tree(tree.key, tree.generation);
        let mut damage = Damage::default();
        damage.push((PathBuf::new(), why));
        self.condemn_tree(&name, Some(tree.record.manifest), damage, found)
    }

    /// Marks a tree as damaged whose record cannot be read, since it has no expected state.
    pub fn verify_tree_record(
        &self,
        name: &ObjectName,
        found: &mut dyn FnMut(Finding),
    ) -> Result<(), StoreError> {
        let Some((_lease, path)) = self.hold(name) else { return Ok(()) };
        match super::records::read_whole::<TreeRecord>(&path.join("tree.json")) {
            Ok(_) => Ok(()),
            Err(error) if error.is_of_this_node() => Err(error),
            Err(error) => {
                let mut damage = Damage::default();
                damage.push((PathBuf::from("tree.json"), error.to_string()));
                self.condemn_tree(name, None, damage, found)
            }
        }
    }

    fn condemn_tree(
        &self,
        name: &ObjectName,
        digest: Option<Digest>,
        damage: Damage,
        found: &mut dyn FnMut(Finding),
    ) -> Result<(), StoreError> {
        self.mark_damaged(&self.root().join(name.as_str()))?;
        for (below, detail) in damage.into_list() {
            let path = trimmed(&Path::new(name.as_str()).join(below));
            found(Finding { kind: FindingKind::Tree, digest, path, detail });
        }
        Ok(())
    }

    fn names_of_objects(&self, objects: &Objects) -> BTreeSet<ObjectName> {
        let layers = objects.layers.values().filter_map(|layer| self.object_at(layer.path()?));
        let files = objects.files.values();
        layers.chain(files.map(|file| ObjectName::file(file.key, file.generation))).collect()
    }

    /// A generation of a layer that a tree links, whether it is the current one or not.
    #[must_use]
    pub fn linked_layer(&self, name: &ObjectName) -> Option<Layer> {
        let (lease, path) = self.hold(name)?;
        Layer::at(name, path, lease)
    }

    /// The file of a blob that a tree links. Without permissions it is the one whose mode
    /// its content has decided.
    pub fn linked_file(
        &self,
        digest: Digest,
        permissions: Option<Permissions>,
        links: &[ObjectName],
    ) -> Result<Option<StoredFile>, StoreError> {
        let folder = format!("files/{}/", digest.hex());
        let of_blob = links.iter().filter_map(|name| {
            let mut parts = name.as_str().strip_prefix(&folder)?.split('/');
            let found = super::files::permissions_of(parts.next()?)?;
            let generation = parts.next()?.parse().ok()?;
            let (lease, path) = self.hold(name)?;
            Some(StoredFile {
                key: FileKey { digest, permissions: found },
                generation,
                path,
                lease,
            })
        });
        let mut of_blob: Vec<_> = of_blob.collect();
        if let Some(wanted) = permissions {
            return Ok(of_blob.into_iter().find(|file| file.key.permissions == wanted));
        }
        if of_blob.len() < 2 {
            return Ok(of_blob.pop());
        }
        for file in of_blob {
            let executable =
                open_patiently(&file.path).and_then(|mut content| is_executable(&mut content));
            let is_executable = match executable {
                Err(error) if is_of_this_node(&error) => {
                    return Err(failed_to_read(&file.path, error));
                }
                // The tree links a readable file.
                Err(_) => continue,
                Ok(is_executable) => is_executable,
            };
            let Permissions { mode, uid, gid } = file.key.permissions;
            if (uid, gid) == (0, 0) && mode == if is_executable { 0o555 } else { 0o444 } {
                return Ok(Some(file));
            }
        }
        Ok(None)
    }

    /// Trees that are whole, and not marked damaged.
    pub fn sound_trees(&self) -> Result<Vec<Tree>, StoreError> {
        let trees = self.all_trees()?.into_iter().filter(|(_, entry)| !entry.damaged);
        let mut trees: Vec<_> = trees.filter_map(|(name, _)| self.named_tree(&name)).collect();
        trees.sort_by_key(|tree| (tree.key, tree.generation));
        Ok(trees)
    }

    /// Returns the names of trees that are not marked as damaged and whose records cannot be read.
    pub fn trees_without_record(&self) -> Result<Vec<ObjectName>, StoreError> {
        let mut trees = self.all_trees()?;
        trees.retain(|(name, entry)| !entry.damaged && self.named_tree(name).is_none());
        Ok(trees.into_iter().map(|(name, _)| name).collect())
    }

    /// Returns the files and layers that a tree links, from its `objects.json`. Other names in it,
    /// such as those of a later version, are ignored.
    ///
    /// # Errors
    ///
    /// [`StoreError::Damaged`] when that is not a list of names.
    pub fn links(&self, tree: &Tree) -> Result<Vec<ObjectName>, StoreError> {
        let links: Vec<String> = super::records::read_whole(&tree.path().join("objects.json"))?;
        let names = links.iter().filter_map(|link| ObjectName::parse(link));
        Ok(names.filter(|link| link.kind() != ObjectKind::Document).collect())
    }

    /// Trees that still stand over an object which was found damaged before.
    fn find_trees_of(
        &self,
        object: &ObjectName,
        found: &mut dyn FnMut(Finding),
    ) -> Result<Vec<ObjectName>, StoreError> {
        let trees = self.mark_trees_of(object)?;
        for name in &trees {
            let digest = self.named_tree(name).map(|tree| tree.record.manifest);
            let detail = format!("it shows {}, which is damaged", object.as_str());
            let path = PathBuf::from(name.as_str());
            found(Finding { kind: FindingKind::Tree, digest, path, detail });
        }
        Ok(trees)
    }

    fn rules(&self) -> Rules {
        Rules::of(&self.staging())
    }

    fn hold(&self, name: &ObjectName) -> Option<(Lease, PathBuf)> {
        let lease = self.catalog().lease(name.clone());
        let path = self.root().join(name.as_str());
        path.symlink_metadata().is_ok().then_some((lease, path))
    }
}

/// Where below the object, and what: the first ones of as many as there are.
#[derive(Debug, Default)]
struct Damage {
    list: Vec<(PathBuf, String)>,
    more: u64,
}

impl Damage {
    fn push(&mut self, damage: (PathBuf, String)) {
        if self.list.len() < MOST_FINDINGS {
            self.list.push(damage);
        } else {
            self.more += 1;
        }
    }

    fn extend(&mut self, below: &Path, details: impl IntoIterator<Item = String>) {
        for detail in details {
            self.push((below.to_owned(), detail));
        }
    }

    /// Prefixes all paths with a folder.
    fn below(mut self, folder: &Path) -> Self {
        for (path, _) in &mut self.list {
            *path = folder.join(&path);
        }
        self
    }

    fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    fn into_list(mut self) -> Vec<(PathBuf, String)> {
        if self.more > 0 {
            self.list
                .push((PathBuf::new(), format!("{} more of its files are damaged", self.more)));
        }
        self.list
    }
}

fn verify_file(
    path: &Path,
    name: &ObjectName,
    reader: &mut Reader,
    rules: Rules,
    damage: &mut Damage,
) -> std::io::Result<()> {
    let mut parts = name.as_str().split('/').skip(1);
    let expected = parts.next().and_then(Digest::from_hex);
    let permissions = parts.next().and_then(super::files::permissions_of);
    let mut wrong = |detail: String| damage.push((PathBuf::new(), detail));
    let mut look = || -> std::io::Result<()> {
        let file = reader.open(path)?;
        let metadata = file.metadata()?;
        let other = permissions.and_then(|wanted| inode::other_permissions(&metadata, wanted));
        other.into_iter().for_each(&mut wrong);
        rules
            .other_attributes(&file, &ExtendedAttributes::default())?
            .into_iter()
            .for_each(&mut wrong);
        let got = reader.hash(&file)?;
        if Some(got) != expected {
            wrong(format!("its content has the digest {got}"));
        }
        Ok(())
    };
    if let Err(error) = look() {
        let detail = unreadable(error)?;
        damage.push((PathBuf::new(), detail));
    }
    Ok(())
}

fn verify_layer(
    path: &Path,
    reader: &mut Reader,
    rules: Rules,
    damage: &mut Damage,
) -> std::io::Result<()> {
    let of_index = |error: StoreError| match error {
        StoreError::Io { source, .. } if is_of_this_node(&source) => Err(source),
        error => Ok((PathBuf::from("index"), error.to_string())),
    };
    let Some(layer) = Layer::read(path) else {
        damage.push((PathBuf::new(), "it is not a layer".into()));
        return Ok(());
    };
    let entries = match layer.view().entries() {
        Ok(entries) => entries,
        Err(error) => {
            damage.push(of_index(error)?);
            return Ok(());
        }
    };
    let mut members = LayerFiles { path, rules, leased: Vec::new(), unread: None };
    for entry in entries {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                damage.push(of_index(error)?);
                return Ok(());
            }
        };
        let EntryKind::File { data, checksum, .. } = entry.kind else { continue };
        let member = LayerFile { below: layers::data(data), entry, checksum };
        match open(&path.join(&member.below)) {
            Err(error) if is_leased(&error) => members.defer(member, reader, damage)?,
            opened => members.verify(&member, opened, reader, damage)?,
        }
    }
    members.finish(reader, damage)
}

/// The regular files of a layer.
struct LayerFiles<'a> {
    path: &'a Path,
    rules: Rules,
    /// Files that other processes hold leases on, which are waited for together.
    leased: Vec<LayerFile>,
    /// The error of files that cannot be read.
    unread: Option<std::io::Error>,
}

/// A regular file of a layer.
struct LayerFile {
    below: PathBuf,
    entry: Entry,
    checksum: Checksum,
}

impl LayerFiles<'_> {
    fn verify(
        &self,
        member: &LayerFile,
        opened: std::io::Result<std::fs::File>,
        reader: &mut Reader,
        damage: &mut Damage,
    ) -> std::io::Result<()> {
        let LayerFile { below, entry, checksum } = member;
        let mut wrong = |detail: String| {
            let shown = String::from_utf8_lossy(entry.path.as_bytes());
            damage.push((below.clone(), format!("{shown}: {detail}")));
        };
        let look = || -> std::io::Result<()> {
            let file = opened?;
            self.rules.other_metadata(&file, &entry.metadata)?.into_iter().for_each(&mut wrong);
            if reader.checksum(&file, *checksum)? != *checksum {
                wrong("its content is not what was unpacked".into());
            }
            Ok(())
        };
        if let Err(error) = look() {
            let detail = unreadable(error)?;
            wrong(detail);
        }
        Ok(())
    }

    fn defer(
        &mut self,
        member: LayerFile,
        reader: &mut Reader,
        damage: &mut Damage,
    ) -> std::io::Result<()> {
        self.leased.push(member);
        if self.leased.len() < LEASED_AT_ONCE { Ok(()) } else { self.wait(reader, damage) }
    }

    fn wait(&mut self, reader: &mut Reader, damage: &mut Damage) -> std::io::Result<()> {
        let leased = std::mem::take(&mut self.leased);
        let paths: Vec<_> = leased.iter().map(|member| self.path.join(&member.below)).collect();
        match reader.open_leased(&paths) {
            Ok(opened) => leased
                .iter()
                .zip(opened)
                .try_for_each(|(member, opened)| self.verify(member, opened, reader, damage)),
            // Files without leases are still read.
            Err(error) if was_leased(&error) => {
                self.unread = Some(error);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn finish(mut self, reader: &mut Reader, damage: &mut Damage) -> std::io::Result<()> {
        if !self.leased.is_empty() {
            self.wait(reader, damage)?;
        }
        self.unread.map_or(Ok(()), Err)
    }
}

fn failed_to_read(path: &Path, error: std::io::Error) -> StoreError {
    if was_leased(&error) {
        StoreError::Leased { path: path.to_owned() }
    } else {
        StoreError::io("read back", path, error)
    }
}

fn digest_of(name: &ObjectName, path: &Path) -> Option<Digest> {
    match name.kind() {
        ObjectKind::File => Digest::from_hex(name.as_str().split('/').nth(1)?),
        ObjectKind::Layer => read_totals(path)?.blob,
        ObjectKind::Tree | ObjectKind::Document => None,
    }
}

/// Without the slash that joining nothing leaves.
fn trimmed(path: &Path) -> PathBuf {
    path.components().collect()
}
