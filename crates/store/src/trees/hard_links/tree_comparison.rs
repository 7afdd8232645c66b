//! Compares a tree with the plan of it, name by name.
//!
//! Folders are opened below one another, so that paths may be longer than the kernel takes in one
//! call, and only those are held that lead to the name at hand.

use std::borrow::Cow;
use std::collections::hash_map::RandomState;
use std::collections::{HashMap, HashSet};
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::hash::BuildHasher as _;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, fstatat};

use super::{descriptor, way_to};
use crate::inode_metadata::{Rules, other_time};
use crate::integrity_findings::DamageList;
use crate::paced_reader::{Reader, unreadable};
use crate::trees::tree_objects::Objects;
use unpack::archive_entry::{ExtendedAttributes, Metadata};
use unpack::layer_merge::{PlannedKind, PlannedLeaf, PlannedNode, TreePlan};

/// A tree is compared with this.
pub(super) struct Comparison<'a> {
    pub(super) plan: &'a TreePlan,
    pub(super) objects: &'a Objects,
    pub(super) rules: Rules,
}

/// A folder on the way to the name at hand.
struct OpenFolder {
    /// Its number in the plan; the root has none.
    number: Option<u32>,
    /// Its path below the root.
    below: PathBuf,
    /// The open folder; none when it cannot be opened: then nothing in it can be compared.
    folder: Option<File>,
    /// Expected names, as keyed hashes to save memory: a folder may have a million.
    names: HashSet<u64>,
}

/// Results of comparisons by the two inodes, since a copy has many names and is read once.
type Compared = HashMap<(u64, u64), bool>;

const OPEN_FOLDER: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

impl Comparison<'_> {
    /// Compares what is at `root`.
    pub(super) fn run(
        &self,
        root: &Path,
        reader: &mut Reader,
        damage: &mut DamageList,
    ) -> io::Result<()> {
        let opened = nix::fcntl::open(root, OPEN_FOLDER, Mode::empty());
        let folder = self.folder(opened, PathBuf::new(), &self.plan.root, damage)?;
        let mut way =
            vec![OpenFolder { number: None, below: PathBuf::new(), folder, names: HashSet::new() }];
        let mut compared = Compared::default();
        let mut records = self.objects.records();
        let keys = RandomState::new();
        let hash = |name: &[u8]| keys.hash_one(name);
        for (number, node) in (0..).zip(&self.plan.nodes) {
            reader.step()?;
            while way.len() > 1
                && way.last().is_some_and(|level| level.number != node.parent)
                && let Some(level) = way.pop()
            {
                level.close(damage, hash)?;
            }
            let Some(level) = way.last_mut() else { break };
            let PlannedLeaf { name: text, link } = match node.kind {
                PlannedKind::Directory(_) => {
                    PlannedLeaf { name: Cow::Borrowed(self.plan.held_name(node)), link: None }
                }
                _ => match self.plan.leaf(node, &mut records) {
                    Ok(leaf) => leaf,
                    Err(error) => {
                        let detail = unreadable(error)?;
                        let detail = format!("the index of its layer has changed: {detail}");
                        damage.push(level.below.clone(), detail);
                        continue;
                    }
                },
            };
            let below = level.below.join(OsStr::from_bytes(&text));
            let name = CString::new(&*text)?;
            level.names.insert(hash(&text));
            let Some(folder) = &level.folder else {
                way.extend(is_folder(node).then(|| OpenFolder::lost(number, below)));
                continue;
            };
            match node.kind {
                PlannedKind::Directory(number_of_folder) => {
                    let metadata = self.plan.folder(number_of_folder);
                    let opened = openat(folder, name.as_c_str(), OPEN_FOLDER, Mode::empty());
                    let folder = self.folder(opened, below.clone(), metadata, damage)?;
                    let number = Some(number);
                    way.push(OpenFolder { number, below, folder, names: HashSet::new() });
                }
                PlannedKind::File(file) => {
                    let wrong = self.file(folder, &name, file, reader, &mut compared)?;
                    damage.extend(&below, wrong);
                }
                PlannedKind::SymbolicLink(_) => {
                    if let Some((target, metadata)) = link {
                        let wrong = self.link(folder, &name, &target, &metadata)?;
                        damage.extend(&below, wrong);
                    }
                }
            }
        }
        while let Some(level) = way.pop() {
            level.close(damage, hash)?;
        }
        Ok(())
    }

    fn folder(
        &self,
        opened: nix::Result<std::os::fd::OwnedFd>,
        below: PathBuf,
        wanted: &Metadata,
        damage: &mut DamageList,
    ) -> io::Result<Option<File>> {
        let look = || -> io::Result<File> {
            let folder = File::from(opened?);
            let wrong = self.rules.other_metadata(&folder, wanted)?;
            damage.extend(&below, wrong);
            Ok(folder)
        };
        match look() {
            Ok(folder) => Ok(Some(folder)),
            Err(error) => {
                let detail = unreadable(error)?;
                damage.push(below, format!("no folder: {detail}"));
                Ok(None)
            }
        }
    }

    /// A file of a tree is the inode that it was linked from, which was read back by itself; or,
    /// where that had all the names it can have, a copy.
    fn file(
        &self,
        folder: &File,
        name: &CString,
        file: u32,
        reader: &mut Reader,
        compared: &mut Compared,
    ) -> io::Result<Option<String>> {
        let source = self.plan.source(file);
        let Some((from, path)) = self.objects.locate(source) else {
            return Ok(Some("nothing is known of its content".into()));
        };
        let wanted = match look_at(from, path.as_path()) {
            Ok(wanted) => wanted,
            Err(error) => {
                let detail = unreadable(error)?;
                return Ok(Some(format!("what it was linked from is gone: {detail}")));
            }
        };
        let found = match look_at(folder, name.as_c_str()) {
            Ok(found) => found,
            Err(error) => return Ok(Some(format!("no file: {}", unreadable(error)?))),
        };
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino) {
            return Ok(None);
        }
        let of = |stat: &FileStat| {
            (
                stat.st_mode,
                stat.st_uid,
                stat.st_gid,
                stat.st_size,
                stat.st_mtime,
                stat.st_mtime_nsec,
            )
        };
        let is_copy = of(&found) == of(&wanted) && {
            let inodes = (found.st_ino, wanted.st_ino);
            if let Some(&known) = compared.get(&inodes) {
                known
            } else {
                let path = self.objects.path(source).unwrap_or_default();
                let is_copy = self.is_copy(&way_to(folder, name), &path, reader)?;
                compared.insert(inodes, is_copy);
                is_copy
            }
        };
        Ok((!is_copy).then(|| "it is not the file that was linked there".into()))
    }

    fn is_copy(&self, copy: &Path, source: &Path, reader: &mut Reader) -> io::Result<bool> {
        let mut compare = || -> io::Result<bool> {
            let (copy, source) = (reader.open(copy)?, reader.open(source)?);
            let wanted = user_attributes(&source)?;
            Ok(self.rules.other_attributes(&copy, &wanted)?.is_empty()
                && reader.hash(&copy)? == reader.hash(&source)?)
        };
        compare().or_else(|error| unreadable(error).map(|_| false))
    }

    fn link(
        &self,
        folder: &File,
        name: &CString,
        target: &[u8],
        metadata: &Metadata,
    ) -> io::Result<Vec<String>> {
        let look = || -> io::Result<Vec<String>> {
            let found = readlinkat(folder, name.as_c_str())?;
            let stat = look_at(folder, name.as_c_str())?;
            let mut wrong = Vec::new();
            if found.as_bytes() != target {
                wrong.push("the symbolic link leads elsewhere".to_owned());
            }
            let (owner, wanted) = ((stat.st_uid, stat.st_gid), metadata.permissions);
            if owner != (wanted.uid, wanted.gid) {
                let (uid, gid) = owner;
                wrong.push(format!("its owner is {uid}:{gid}, not {}:{}", wanted.uid, wanted.gid));
            }
            wrong.extend(other_time(stat.st_mtime, stat.st_mtime_nsec, metadata.modified));
            let path = CString::new(way_to(folder, name).as_os_str().as_bytes())?;
            wrong.extend(self.rules.other_link_attributes(&path)?);
            Ok(wrong)
        };
        look().or_else(|error| Ok(vec![format!("no symbolic link: {}", unreadable(error)?)]))
    }
}

impl OpenFolder {
    /// One that cannot be looked into, as the one above it cannot.
    fn lost(number: u32, below: PathBuf) -> Self {
        Self { number: Some(number), below, folder: None, names: HashSet::new() }
    }

    /// Looks for names that do not belong there, once all are known that do.
    fn close(self, damage: &mut DamageList, hash: impl Fn(&[u8]) -> u64) -> io::Result<()> {
        let Self { below, folder: Some(folder), names, .. } = self else { return Ok(()) };
        for entry in std::fs::read_dir(descriptor(&folder))? {
            let name = entry?.file_name();
            if !names.contains(&hash(name.as_bytes())) {
                damage.push(below.join(name), "it does not belong there".into());
            }
        }
        Ok(())
    }
}

fn is_folder(node: &PlannedNode) -> bool {
    matches!(node.kind, PlannedKind::Directory(_))
}

fn look_at<P: nix::NixPath + ?Sized>(folder: impl AsFd, name: &P) -> io::Result<FileStat> {
    Ok(fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW)?)
}

fn user_attributes(file: &File) -> io::Result<ExtendedAttributes> {
    use sys::extended_attributes;
    let names = extended_attributes::names(file.as_fd())?.into_iter();
    names
        .filter(|name| name.to_bytes().starts_with(b"user."))
        .map(|name| {
            let value = extended_attributes::value(file.as_fd(), &name)?;
            Ok((name.to_bytes().into(), value.into()))
        })
        .collect::<io::Result<Vec<_>>>()
        .map(|attributes| attributes.into_iter().collect())
}
