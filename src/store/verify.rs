//! Reads content back and compares it with what was written.
//!
//! ```text
//! blobs     the bytes with the digest in the name
//! files     the bytes with the digest in the name, mode and owner with the rest of it
//! layers    the index with its own checksum, each file with size and checksum in the index
//! trees     each name with what a fresh merge of its layers would make, each file by its inode
//! ```
//!
//! What is found damaged is marked before anything else happens: it is never
//! shown anew, the next generation is made afresh, and whoever has it mounted keeps it.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::PosixFadviseAdvice;
use sha2::Digest as _;

use super::catalog::Lease;
use super::error::StoreError;
use super::files::{StoredFile, is_executable};
use super::layers::{self, Layer, read_totals};
use super::object::{ObjectKind, ObjectName};
use super::staging::names;
use super::trees::{Objects, Tree};
use super::{FileKey, Store};
use crate::oci::Digest;
use crate::unpack::checksum::{Checksum, Checksummer};
use crate::unpack::entry::Metadata;
use crate::unpack::merge::{PlannedKind, TreePlan};
use crate::unpack::{EntryKind, Permissions};

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
}

/// What was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Blobs, files, layers and trees.
    pub objects: u64,
    /// Bytes of them.
    pub bytes: u64,
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
        }
    }
}

impl Store {
    /// Reads all blobs back; damaged ones are removed, to be fetched again.
    pub fn verify_blobs(
        &self,
        verified: &mut Verified,
        found: &mut dyn FnMut(Finding),
    ) -> Result<(), StoreError> {
        for name in names(&self.path("blobs"))? {
            let Some(digest) = Digest::from_hex(&name) else { continue };
            verified.objects += 1;
            let path = Path::new("blobs").join(&name);
            let size = self.root().join(&path).metadata().map_or(0, |metadata| metadata.len());
            verified.bytes += size;
            let wrong = match hash(&self.root().join(&path)) {
                Ok(got) if got == digest => continue,
                Ok(got) => format!("its content has the digest {got}"),
                Err(error) => format!("it cannot be read: {error}"),
            };
            // Reading it as any other reader does removes it.
            let _ = self.blob(digest);
            found(Finding { kind: FindingKind::Blob, digest: Some(digest), path, detail: wrong });
        }
        Ok(())
    }

    /// Reads all files and layers back, and marks what is damaged together with the trees that
    /// link it.
    pub fn verify_objects(
        &self,
        verified: &mut Verified,
        found: &mut dyn FnMut(Finding),
    ) -> Result<(), StoreError> {
        self.load_catalog()?;
        let mut objects: Vec<_> = self.catalog().snapshot().objects.into_iter().collect();
        objects.sort_by(|one, two| one.0.cmp(&two.0));
        for (name, entry) in objects {
            if name.kind() == ObjectKind::Tree {
                continue;
            }
            if entry.damaged {
                // Somebody has come by it since, and may have ended before its trees were marked.
                self.find_trees_of(&name, found)?;
                continue;
            }
            let Some((_lease, path)) = self.hold(&name) else { continue };
            verified.objects += 1;
            let before = verified.bytes;
            let mut damage = Vec::new();
            match name.kind() {
                ObjectKind::File => verify_file(&path, &name, verified, &mut damage),
                ObjectKind::Layer => verify_layer(&path, verified, &mut damage),
                ObjectKind::Tree => {}
            }
            tracing::debug!(object = %name, bytes = verified.bytes - before, "read back");
            if damage.is_empty() {
                continue;
            }
            self.mark_damaged(&path)?;
            for (below, detail) in damage {
                let digest = digest_of(&name, &path);
                let path = Path::new(name.as_str()).join(below);
                let kind = match name.kind() {
                    ObjectKind::File => FindingKind::File,
                    ObjectKind::Layer | ObjectKind::Tree => FindingKind::Layer,
                };
                found(Finding { kind, digest, path: trimmed(&path), detail });
            }
        }
        Ok(())
    }

    /// Compares a tree with what its layers merge to.
    pub fn verify_tree(
        &self,
        tree: &Tree,
        plan: &TreePlan,
        objects: &Objects,
        found: &mut dyn FnMut(Finding),
    ) -> Result<(), StoreError> {
        let mut damage = Vec::new();
        compare(&tree.path().join("root"), plan, objects, &mut damage);
        if damage.is_empty() {
            return Ok(());
        }
        self.mark_damaged(tree.path())?;
        let name = ObjectName::tree(tree.key, tree.generation);
        for (below, detail) in damage {
            let path = trimmed(&Path::new(name.as_str()).join("root").join(below));
            let digest = Some(tree.record.manifest);
            found(Finding { kind: FindingKind::Tree, digest, path, detail });
        }
        Ok(())
    }

    /// A generation of a layer that a tree links, whether it is the current one or not.
    #[must_use]
    pub fn linked_layer(&self, name: &ObjectName) -> Option<Layer> {
        let (lease, path) = self.hold(name)?;
        Layer::at(name, path, lease)
    }

    /// The file of a blob that a tree links. Without permissions it is the one whose mode
    /// its content has decided.
    #[must_use]
    pub fn linked_file(
        &self,
        digest: Digest,
        permissions: Option<Permissions>,
        links: &[ObjectName],
    ) -> Option<StoredFile> {
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
            return of_blob.into_iter().find(|file| file.key.permissions == wanted);
        }
        if of_blob.len() > 1 {
            let by_content = |file: &StoredFile| {
                let executable =
                    File::open(&file.path).and_then(|mut file| is_executable(&mut file));
                let Permissions { mode, uid, gid } = file.key.permissions;
                let is_plain = (uid, gid) == (0, 0);
                executable.is_ok_and(|is| is_plain && mode == if is { 0o555 } else { 0o444 })
            };
            of_blob.retain(by_content);
        }
        of_blob.into_iter().next()
    }

    /// Trees that are whole, and not marked damaged.
    pub fn sound_trees(&self) -> Result<Vec<Tree>, StoreError> {
        self.load_catalog()?;
        let entries = self.catalog().snapshot().objects;
        let trees = entries
            .into_iter()
            .filter(|(name, entry)| name.kind() == ObjectKind::Tree && !entry.damaged);
        let mut trees: Vec<_> = trees.filter_map(|(name, _)| self.named_tree(&name)).collect();
        trees.sort_by_key(|tree| (tree.key, tree.generation));
        Ok(trees)
    }

    /// The files and layers that a tree links.
    #[must_use]
    pub fn links(&self, tree: &Tree) -> Vec<ObjectName> {
        let links: Option<Vec<String>> = super::records::read(&tree.path().join("objects.json"));
        links.unwrap_or_default().iter().filter_map(|link| ObjectName::parse(link)).collect()
    }

    /// Trees that still stand over an object which was found damaged before.
    fn find_trees_of(
        &self,
        object: &ObjectName,
        found: &mut dyn FnMut(Finding),
    ) -> Result<(), StoreError> {
        for name in self.mark_trees_of(object)? {
            let digest = self.named_tree(&name).map(|tree| tree.record.manifest);
            let detail = format!("it shows {}, which is damaged", object.as_str());
            let path = PathBuf::from(name.as_str());
            found(Finding { kind: FindingKind::Tree, digest, path, detail });
        }
        Ok(())
    }

    fn hold(&self, name: &ObjectName) -> Option<(Lease, PathBuf)> {
        let lease = self.catalog().lease(name.clone());
        let path = self.root().join(name.as_str());
        path.symlink_metadata().is_ok().then_some((lease, path))
    }
}

/// Whether one inode has the content of another: a copy has many names, and is read once.
type Compared = HashMap<(u64, u64), bool>;

/// Where below the object, and what.
type Damage = Vec<(PathBuf, String)>;

fn verify_file(path: &Path, name: &ObjectName, verified: &mut Verified, damage: &mut Damage) {
    let mut wrong = |detail: String| damage.push((PathBuf::new(), detail));
    let parts: Vec<_> = name.as_str().split('/').collect();
    let expected = parts.get(1).and_then(|digest| Digest::from_hex(digest));
    let permissions = parts.get(2).and_then(|variant| super::files::permissions_of(variant));
    match path.symlink_metadata() {
        Ok(metadata) => {
            verified.bytes += metadata.len();
            if let Some(detail) =
                permissions.and_then(|wanted| other_permissions(&metadata, wanted))
            {
                wrong(detail);
            }
        }
        Err(error) => return wrong(format!("it cannot be looked at: {error}")),
    }
    match hash(path) {
        Ok(got) if Some(got) == expected => {}
        Ok(got) => wrong(format!("its content has the digest {got}")),
        Err(error) => wrong(format!("it cannot be read: {error}")),
    }
}

fn verify_layer(path: &Path, verified: &mut Verified, damage: &mut Damage) {
    let Some(layer) = Layer::read(path) else {
        return damage.push((PathBuf::new(), "it is not a layer".into()));
    };
    let entries = match layer.view().entries() {
        Ok(entries) => entries,
        Err(error) => return damage.push(("index".into(), error.to_string())),
    };
    for entry in entries {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => return damage.push(("index".into(), error.to_string())),
        };
        let EntryKind::File { size, data, checksum } = entry.kind else { continue };
        verified.bytes += size;
        let below = layers::data(data);
        let file = path.join(&below);
        let shown = OsStr::from_bytes(entry.path.as_bytes()).to_string_lossy().into_owned();
        match (checksum_of(&file, checksum), file.symlink_metadata()) {
            (Ok(got), _) if got != checksum => {
                damage.push((below, format!("{shown}: its content is not what was unpacked")));
            }
            (Err(error), _) | (_, Err(error)) => {
                damage.push((below, format!("{shown}: it cannot be read: {error}")));
            }
            (Ok(_), Ok(metadata)) => {
                let wanted = entry.metadata.permissions;
                if let Some(detail) = other_permissions(&metadata, wanted) {
                    damage.push((below, format!("{shown}: {detail}")));
                }
            }
        }
    }
}

/// Compares a tree with a plan, name by name.
fn compare(root: &Path, plan: &TreePlan, objects: &Objects, damage: &mut Damage) {
    let mut paths: Vec<PathBuf> = Vec::with_capacity(plan.nodes.len());
    let mut children = vec![BTreeSet::<&OsStr>::new(); plan.nodes.len() + 1];
    let folder = |parent: Option<u32>| parent.map_or(0, |number| number as usize + 1);
    let mut compared = Compared::default();
    check_folder(root, Path::new(""), &plan.root, damage);
    for node in &plan.nodes {
        let name = OsStr::from_bytes(&node.name);
        children[folder(node.parent)].insert(name);
        let above = node.parent.map_or(Path::new(""), |number| paths[number as usize].as_path());
        let below = above.join(name);
        let path = root.join(&below);
        match &node.kind {
            PlannedKind::Directory(metadata) => check_folder(&path, &below, metadata, damage),
            PlannedKind::File(file) => {
                let planned = &plan.files[*file as usize];
                let source = objects.path(planned.source);
                check_file(&path, &below, source.as_deref(), &mut compared, damage);
            }
            PlannedKind::SymbolicLink { target, .. } => match std::fs::read_link(&path) {
                Ok(found) if found.as_os_str().as_bytes() == &**target => {}
                Ok(_) => damage.push((below.clone(), "the symbolic link leads elsewhere".into())),
                Err(error) => damage.push((below.clone(), format!("no symbolic link: {error}"))),
            },
        }
        paths.push(below);
    }
    let folders = plan.nodes.iter().zip(&paths).enumerate();
    let folders = folders
        .filter(|(_, (node, _))| matches!(node.kind, PlannedKind::Directory(_)))
        .map(|(number, (_, path))| (number + 1, path.as_path()));
    for (number, below) in std::iter::once((0, Path::new(""))).chain(folders) {
        let Ok(entries) = std::fs::read_dir(root.join(below)) else { continue };
        let strange = |name: &OsString| !children[number].contains(name.as_os_str());
        for name in entries.flatten().map(|entry| entry.file_name()).filter(strange) {
            damage.push((below.join(name), "it does not belong there".into()));
        }
    }
}

fn check_folder(path: &Path, below: &Path, wanted: &Metadata, damage: &mut Damage) {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => {
            if let Some(detail) = other_permissions(&metadata, wanted.permissions) {
                damage.push((below.to_owned(), detail));
            }
        }
        Ok(_) => damage.push((below.to_owned(), "it is not a folder".into())),
        Err(error) => damage.push((below.to_owned(), format!("no folder: {error}"))),
    }
}

/// A file of a tree is the inode that it was linked from, which was read back by itself; or,
/// where that had all the names it can have, a copy.
fn check_file(
    path: &Path,
    below: &Path,
    source: Option<&Path>,
    compared: &mut Compared,
    damage: &mut Damage,
) {
    let mut wrong = |detail: String| damage.push((below.to_owned(), detail));
    let Some(source) = source else { return wrong("nothing is known of its content".into()) };
    let (found, wanted) = match (path.symlink_metadata(), source.symlink_metadata()) {
        (Ok(found), Ok(wanted)) => (found, wanted),
        (Err(error), _) => return wrong(format!("no file: {error}")),
        (_, Err(error)) => return wrong(format!("what it was linked from is gone: {error}")),
    };
    if (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()) {
        return;
    }
    let alike = found.is_file()
        && (found.mode(), found.uid(), found.gid()) == (wanted.mode(), wanted.uid(), wanted.gid());
    let is_copy = || matches!((hash(path), hash(source)), (Ok(one), Ok(two)) if one == two);
    if !alike || !*compared.entry((found.ino(), wanted.ino())).or_insert_with(is_copy) {
        wrong("it is not the file that was linked there".into());
    }
}

fn other_permissions(metadata: &std::fs::Metadata, wanted: Permissions) -> Option<String> {
    let found = (metadata.mode() & 0o7777, metadata.uid(), metadata.gid());
    let wanted = (wanted.mode, wanted.uid, wanted.gid);
    let text = |(mode, uid, gid): (u32, u32, u32)| format!("{mode:04o} {uid}:{gid}");
    (found != wanted).then(|| format!("mode and owner are {}, not {}", text(found), text(wanted)))
}

fn hash(path: &Path) -> io::Result<Digest> {
    let mut hasher = sha2::Sha256::new();
    read_back(path, |piece| hasher.update(piece))?;
    Ok(Digest::from_bytes(hasher.finalize().into()))
}

/// Of the same kind as the one that was recorded.
fn checksum_of(path: &Path, recorded: Checksum) -> io::Result<Checksum> {
    match recorded {
        Checksum::Sha256(_) => hash(path).map(Checksum::Sha256),
        Checksum::Xxh3(_) => {
            let mut checksum = Checksummer::default();
            read_back(path, |piece| checksum.update(piece))?;
            Ok(checksum.finish())
        }
    }
}

/// Reads what is on the disk: pages that memory has are given back first.
fn read_back(path: &Path, mut with: impl FnMut(&[u8])) -> io::Result<()> {
    let flags = nix::fcntl::OFlag::O_RDONLY
        | nix::fcntl::OFlag::O_NOFOLLOW
        | nix::fcntl::OFlag::O_NONBLOCK
        | nix::fcntl::OFlag::O_CLOEXEC;
    let mut file = File::from(nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    let drop_pages = |file: &File| {
        // Advice: a kernel that does not take it reads from memory.
        let _ =
            nix::fcntl::posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    };
    drop_pages(&file);
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => with(&buffer[..count]),
        }
    }
    drop_pages(&file);
    Ok(())
}

fn digest_of(name: &ObjectName, path: &Path) -> Option<Digest> {
    match name.kind() {
        ObjectKind::File => Digest::from_hex(name.as_str().split('/').nth(1)?),
        ObjectKind::Layer => read_totals(path)?.blob,
        ObjectKind::Tree => None,
    }
}

/// Without the slash that joining nothing leaves.
fn trimmed(path: &Path) -> PathBuf {
    path.components().collect()
}
