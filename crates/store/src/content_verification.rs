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
//! shown anew, the next generation is made afresh, and its mounts keep it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::StoreError;
use super::folder_listing::names;
use super::inode_metadata::{Rules, other_permissions};
use super::integrity_findings::DamageList;
pub use super::integrity_findings::{Finding, FindingKind};
use super::layers::{self, Layer, read_totals};
use super::object_inventory::Inventory;
use super::object_name::{ObjectKind, ObjectName};
use super::paced_reader::{
    LEASED_AT_ONCE, failed_to_read, is_leased, is_of_this_node, open, open_patiently, unreadable,
    was_leased,
};
pub use super::paced_reader::{ReadPace, Reader, Verified};
use super::single_files::{StoredFile, is_executable, permissions_of};
use super::state_directory::StateDirectory;
use super::trees::{Objects, Tree, TreeRecord, Trees};
use super::{FileKey, json_records};
use oci_types::Digest;
use unpack::archive_entry::ExtendedAttributes;
use unpack::checksum::Checksum;
use unpack::layer_merge::TreePlan;
use unpack::{Entry, EntryKind, Permissions};

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

impl StoreError {
    /// Returns whether the error is the node's, such as too few file descriptors, and not the content's.
    pub fn is_of_this_node(&self) -> bool {
        match self {
            Self::Io { source, .. } => is_of_this_node(source),
            Self::Damaged { .. } => false,
            _ => true,
        }
    }
}

/// Reads the content of a store back.
pub struct Verification {
    pub(super) directory: Arc<StateDirectory>,
    pub(super) inventory: Arc<Inventory>,
    pub(super) trees: Arc<Trees>,
}

impl Verification {
    /// Reads all blobs back; damaged ones are removed, to be fetched again.
    pub fn verify_blobs(
        &self,
        reader: &mut Reader,
        found: &mut dyn FnMut(Finding),
    ) -> Result<(), StoreError> {
        for name in names(&self.directory.path("blobs"))? {
            let Some(digest) = Digest::from_hex(&name) else { continue };
            let below = Path::new("blobs").join(&name);
            let path = self.directory.root.join(&below);
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
            if json_records::remove(&path).is_ok() {
                self.directory.catalog.remove_document(&ObjectName::document(digest));
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
        let mut objects = self.inventory.names()?;
        objects.sort();
        for name in objects {
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
        if self.directory.damage.is_marked(name) {
            // It was found since, and the process may have ended before its trees were marked.
            return self.find_trees_of(name, found);
        }
        let Some((_lease, path)) = self.directory.hold(name) else { return Ok(Vec::new()) };
        let before = reader.verified.bytes;
        reader.begin();
        let (rules, mut damage) = (self.rules(), DamageList::default());
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
            self.directory.read_back.was_read(name);
            return Ok(Vec::new());
        }
        let trees = self.inventory.mark_damaged(&path)?;
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
        reader.begin();
        let ExpectedTree { plan, objects, record } = expected;
        let mut damage = tree.compare(plan, objects, self.rules(), reader)?;
        reader.verified.objects += 1;
        damage.extend(Path::new("tree.json"), other_numbers(&tree.record, record));
        let linked: BTreeSet<_> = self.names_of_objects(objects);
        match self.trees.links(tree) {
            Ok(links) if links.iter().cloned().collect::<BTreeSet<_>>() == linked => {}
            Ok(_) => damage.push(
                PathBuf::from("objects.json"),
                "it does not name the files and layers that the tree links".to_owned(),
            ),
            Err(error) if error.is_of_this_node() => return Err(error),
            Err(error) => damage.push(PathBuf::from("objects.json"), error.to_string()),
        }
        let name = ObjectName::tree(tree.key, tree.generation);
        if damage.is_empty() {
            // A tree is no better than what it links.
            if !linked.iter().any(|link| self.directory.read_back.is_unread(link)) {
                self.directory.read_back.was_read(&name);
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
        let mut damage = DamageList::default();
        damage.push(PathBuf::new(), why);
        self.condemn_tree(&name, Some(tree.record.manifest), damage, found)
    }

    /// Marks a tree as damaged whose record cannot be read, since it has no expected state.
    pub fn verify_tree_record(
        &self,
        name: &ObjectName,
        found: &mut dyn FnMut(Finding),
    ) -> Result<(), StoreError> {
        let Some((_lease, path)) = self.directory.hold(name) else { return Ok(()) };
        match json_records::read_whole::<TreeRecord>(&path.join("tree.json")) {
            Ok(_) => Ok(()),
            Err(error) if error.is_of_this_node() => Err(error),
            Err(error) => {
                let mut damage = DamageList::default();
                damage.push(PathBuf::from("tree.json"), error.to_string());
                self.condemn_tree(name, None, damage, found)
            }
        }
    }

    fn condemn_tree(
        &self,
        name: &ObjectName,
        digest: Option<Digest>,
        damage: DamageList,
        found: &mut dyn FnMut(Finding),
    ) -> Result<(), StoreError> {
        self.inventory.mark_damaged(&self.directory.root.join(name.as_str()))?;
        for (below, detail) in damage.into_list() {
            let path = trimmed(&Path::new(name.as_str()).join(below));
            found(Finding { kind: FindingKind::Tree, digest, path, detail });
        }
        Ok(())
    }

    fn names_of_objects(&self, objects: &Objects) -> BTreeSet<ObjectName> {
        let layers =
            objects.layers.values().filter_map(|layer| self.directory.object_at(layer.path()?));
        let files = objects.files.values();
        layers.chain(files.map(|file| ObjectName::file(file.key, file.generation))).collect()
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
            let found = permissions_of(parts.next()?)?;
            let generation = parts.next()?.parse().ok()?;
            let (lease, path) = self.directory.hold(name)?;
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

    /// Trees that still stand over an object which was found damaged before.
    fn find_trees_of(
        &self,
        object: &ObjectName,
        found: &mut dyn FnMut(Finding),
    ) -> Result<Vec<ObjectName>, StoreError> {
        let trees = self.inventory.mark_trees_of(object)?;
        for name in &trees {
            let digest = self.trees.named(name).map(|tree| tree.record.manifest);
            let detail = format!("it shows {}, which is damaged", object.as_str());
            let path = PathBuf::from(name.as_str());
            found(Finding { kind: FindingKind::Tree, digest, path, detail });
        }
        Ok(trees)
    }

    fn rules(&self) -> Rules {
        Rules::of(&self.directory.staging())
    }
}

fn verify_file(
    path: &Path,
    name: &ObjectName,
    reader: &mut Reader,
    rules: Rules,
    damage: &mut DamageList,
) -> std::io::Result<()> {
    let mut parts = name.as_str().split('/').skip(1);
    let expected = parts.next().and_then(Digest::from_hex);
    let permissions = parts.next().and_then(permissions_of);
    let mut wrong = |detail: String| damage.push(PathBuf::new(), detail);
    let mut look = || -> std::io::Result<()> {
        let file = reader.open(path)?;
        let metadata = file.metadata()?;
        let other = permissions.and_then(|wanted| other_permissions(&metadata, wanted));
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
        damage.push(PathBuf::new(), detail);
    }
    Ok(())
}

fn verify_layer(
    path: &Path,
    reader: &mut Reader,
    rules: Rules,
    damage: &mut DamageList,
) -> std::io::Result<()> {
    let of_index = |error: StoreError| match error {
        StoreError::Io { source, .. } if is_of_this_node(&source) => Err(source),
        error => Ok(error.to_string()),
    };
    let Some(layer) = Layer::read(path) else {
        damage.push(PathBuf::new(), "it is not a layer".into());
        return Ok(());
    };
    let entries = match layer.view().entries() {
        Ok(entries) => entries,
        Err(error) => {
            damage.push(PathBuf::from("index"), of_index(error)?);
            return Ok(());
        }
    };
    let mut members = LayerFiles { path, rules, reader, damage, leased: Vec::new(), unread: None };
    for entry in entries {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                members.damage.push(PathBuf::from("index"), of_index(error)?);
                return Ok(());
            }
        };
        let EntryKind::File { data, checksum, .. } = entry.kind else { continue };
        let member = LayerFile { below: layers::data(data), entry, checksum };
        match open(&path.join(&member.below)) {
            Err(error) if is_leased(&error) => members.defer(member)?,
            opened => members.verify(&member, opened)?,
        }
    }
    members.finish()
}

/// The regular files of a layer.
struct LayerFiles<'a> {
    path: &'a Path,
    rules: Rules,
    reader: &'a mut Reader,
    damage: &'a mut DamageList,
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
        &mut self,
        member: &LayerFile,
        opened: std::io::Result<std::fs::File>,
    ) -> std::io::Result<()> {
        let LayerFile { below, entry, checksum } = member;
        let Self { rules, reader, damage, .. } = self;
        let mut wrong = |detail: String| {
            let shown = String::from_utf8_lossy(entry.path.as_bytes());
            damage.push(below.clone(), format!("{shown}: {detail}"));
        };
        let look = || -> std::io::Result<()> {
            let file = opened?;
            rules.other_metadata(&file, &entry.metadata)?.into_iter().for_each(&mut wrong);
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

    fn defer(&mut self, member: LayerFile) -> std::io::Result<()> {
        self.leased.push(member);
        if self.leased.len() < LEASED_AT_ONCE { Ok(()) } else { self.wait() }
    }

    fn wait(&mut self) -> std::io::Result<()> {
        let leased = std::mem::take(&mut self.leased);
        let paths: Vec<_> = leased.iter().map(|member| self.path.join(&member.below)).collect();
        match self.reader.open_leased(&paths) {
            Ok(opened) => leased
                .iter()
                .zip(opened)
                .try_for_each(|(member, opened)| self.verify(member, opened)),
            // Files without leases are still read.
            Err(error) if was_leased(&error) => {
                self.unread = Some(error);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn finish(mut self) -> std::io::Result<()> {
        if !self.leased.is_empty() {
            self.wait()?;
        }
        self.unread.map_or(Ok(()), Err)
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

/// Compares the numbers of a record that users and volume statistics see with those of the plan. The
/// disk space of the tree itself is an estimate that differs between versions.
fn other_numbers(found: &TreeRecord, planned: &TreeRecord) -> impl Iterator<Item = String> {
    let numbers = [
        ("bytes", (found.bytes, planned.bytes)),
        ("inodes", (found.inodes, planned.inodes)),
        ("compressed_bytes", (found.compressed_bytes, planned.compressed_bytes)),
    ];
    let other = numbers.into_iter().filter(|(_, (found, expected))| found != expected);
    other.map(|(name, (found, expected))| format!("{name} is {found}, not {expected}"))
}
