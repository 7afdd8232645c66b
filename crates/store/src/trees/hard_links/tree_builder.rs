//! A plan made a directory tree in staging: folders first, then links by several threads,
//! then what making them has changed of the folders.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{Mode, mkdirat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat, linkat, symlinkat};

use super::link_overflow::Copies;
use super::way_to;
use crate::SecurityLabel;
use crate::disk_units::bytes_of_a_name;
use crate::inode_metadata::{set_owner_and_mode, system_time, too_large};
use crate::staging_folders::Staging;
use crate::trees::tree_objects::Objects;
use crate::write_meter::{WriteMeter, full};
use sys::background;
use sys::extended_attributes;
use unpack::archive_entry::Metadata;
use unpack::layer_merge::{PlannedKind, PlannedLeaf, PlannedNode, TreePlan};

/// The most threads that link files: names in different folders do not wait for each other
/// in the kernel, but the journal is one.
const LINKERS: usize = 4;
/// Fewer nodes than this are not worth a thread.
const NODES_PER_LINKER: usize = 4096;

/// Makes a plan's folders, links and files.
#[derive(Clone, Copy)]
pub(super) struct Builder<'a> {
    pub(super) plan: &'a TreePlan,
    pub(super) objects: &'a Objects,
    pub(super) label: Option<&'a SecurityLabel>,
    pub(super) meter: &'a WriteMeter,
    pub(super) copies: &'a Copies<'a>,
}

/// Open folders from the root (none) down to where nodes are being made.
struct Way<'a> {
    plan: &'a TreePlan,
    folders: Vec<(Option<u32>, OwnedFd)>,
}

impl Builder<'_> {
    /// Makes the tree at `root`, which is not there yet.
    pub(super) fn build(self, root: &Path, staging: &mut Staging) -> io::Result<()> {
        std::fs::create_dir(root)?;
        let mut way = Way::from(root, self.plan)?;
        for (number, node) in self.folders() {
            self.meter.makes(1).map_err(full)?;
            let name = CString::new(self.plan.held_name(node))?;
            mkdirat(way.to(node.parent)?, name.as_c_str(), Mode::S_IRWXU)?;
            staging.staged.wrote(|| path_of(root, self.plan, number));
        }
        self.fill(root)?;
        // Making children changes a folder's time, and its mode may forbid making them: folders come last.
        for (number, node) in self.folders() {
            if let PlannedKind::Directory(folder) = node.kind {
                self.finish_folder(way.to(Some(number))?, self.plan.folder(folder))?;
            }
        }
        self.finish_folder(way.to(None)?, &self.plan.root)?;
        staging.staged.wrote(|| root.to_owned());
        Ok(())
    }

    /// Folders with their numbers, in the plan's order.
    fn folders(&self) -> impl Iterator<Item = (u32, &PlannedNode)> {
        let numbered = (0..).zip(&self.plan.nodes);
        numbered.filter(|(_, node)| matches!(node.kind, PlannedKind::Directory(_)))
    }

    /// Makes everything but folders, by several threads where there is much of it.
    fn fill(self, root: &Path) -> io::Result<()> {
        let nodes = &self.plan.nodes;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let linkers = nodes.len().div_ceil(NODES_PER_LINKER).min(cores).clamp(1, LINKERS);
        let mut parts = nodes.chunks(nodes.len().div_ceil(linkers).max(1));
        let Some(own) = parts.next() else { return Ok(()) };
        std::thread::scope(|scope| {
            let link = |part| {
                let thread = std::thread::Builder::new().name("link".to_owned());
                let current = background::current();
                thread.spawn_scoped(scope, move || {
                    background::inherit(current);
                    self.fill_part(root, part)
                })
            };
            let others = parts.map(link).collect::<io::Result<Vec<_>>>()?;
            let mut filled = self.fill_part(root, own);
            for other in others {
                let crashed = |_| io::Error::other("a thread that links files has crashed");
                filled = filled.and(other.join().map_err(crashed)?);
            }
            filled
        })
    }

    fn fill_part(self, root: &Path, nodes: &[PlannedNode]) -> io::Result<()> {
        let mut way = Way::from(root, self.plan)?;
        let mut records = self.objects.records();
        for node in nodes {
            background::yield_to_pods();
            self.meter.writes(bytes_of_a_name(node.name_bytes)).map_err(full)?;
            if matches!(node.kind, PlannedKind::Directory(_)) {
                continue;
            }
            let PlannedLeaf { name, link } = self.plan.leaf(node, &mut records)?;
            let name = CString::new(&*name)?;
            match (node.kind, link) {
                (PlannedKind::File(file), _) => self.link(file, way.to(node.parent)?, &name)?,
                (_, Some((target, metadata))) => {
                    self.symbolic_link(&target, &metadata, way.to(node.parent)?, &name)?;
                }
                (_, None) => {}
            }
        }
        Ok(())
    }

    fn link(self, file: u32, folder: &OwnedFd, name: &CString) -> io::Result<()> {
        let source = self.plan.source(file);
        let (from, path) = self.objects.locate(source).ok_or(io::ErrorKind::NotFound)?;
        match linkat(from, &path, folder, name.as_c_str(), AtFlags::empty()) {
            Err(nix::errno::Errno::EMLINK) => {
                let path = self.objects.path(source).ok_or(io::ErrorKind::NotFound)?;
                self.copies.link(file, &path, folder, name)
            }
            linked => Ok(linked?),
        }
    }

    fn symbolic_link(
        self,
        target: &[u8],
        metadata: &Metadata,
        folder: &OwnedFd,
        name: &CString,
    ) -> io::Result<()> {
        self.meter.makes(1).map_err(full)?;
        symlinkat(target, folder, name.as_c_str())?;
        let (uid, gid) = (metadata.permissions.uid, metadata.permissions.gid);
        let (owner, group) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        fchownat(folder, name.as_c_str(), owner, group, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let time =
            TimeSpec::new(metadata.modified.seconds, i64::from(metadata.modified.nanoseconds));
        let flags = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
        // A time that the filesystem cannot hold is not worth a volume.
        let _ = nix::sys::stat::utimensat(folder, name.as_c_str(), &time, &time, flags);
        if let Some(label) = self.label {
            use std::os::unix::ffi::OsStrExt as _;
            label.apply_to_link(&CString::new(way_to(folder, name).as_os_str().as_bytes())?)?;
        }
        Ok(())
    }

    fn finish_folder(self, folder: &OwnedFd, metadata: &Metadata) -> io::Result<()> {
        let folder = File::from(folder.try_clone()?);
        for (name, value) in metadata.extended_attributes.iter() {
            extended_attributes::set(folder.as_fd(), &CString::new(name)?, value)
                .map_err(too_large)?;
        }
        if let Some(label) = self.label {
            label.apply(folder.as_fd())?;
        }
        set_owner_and_mode(&folder, metadata.permissions)?;
        folder.set_times(std::fs::FileTimes::new().set_modified(system_time(metadata.modified)))
    }
}

impl<'a> Way<'a> {
    fn from(root: &Path, plan: &'a TreePlan) -> io::Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self { plan, folders: vec![(None, open(root, flags, Mode::empty())?)] })
    }

    /// Opens a folder. In the plan's order it is nearly always the last one or one of those above it.
    fn to(&mut self, wanted: Option<u32>) -> io::Result<&OwnedFd> {
        let mut missing = Vec::new();
        let mut ancestor = wanted;
        let place = loop {
            if let Some(place) = self.folders.iter().rposition(|(number, _)| *number == ancestor) {
                break place;
            }
            // Only the root has no number, and it is always open.
            let number = ancestor.ok_or(io::ErrorKind::NotFound)?;
            missing.push(number);
            ancestor = self.plan.nodes[number as usize].parent;
        };
        self.folders.truncate(place + 1);
        for number in missing.into_iter().rev() {
            let name = CString::new(self.plan.held_name(&self.plan.nodes[number as usize]))?;
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let folder = openat(self.here()?, name.as_c_str(), flags, Mode::empty())?;
            self.folders.push((Some(number), folder));
        }
        self.here()
    }

    fn here(&self) -> io::Result<&OwnedFd> {
        self.folders.last().map(|(_, folder)| folder).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

fn path_of(root: &Path, plan: &TreePlan, number: u32) -> PathBuf {
    use std::os::unix::ffi::OsStrExt as _;
    let mut names = Vec::new();
    let mut next = Some(number);
    while let Some(number) = next {
        let node = &plan.nodes[number as usize];
        names.push(std::ffi::OsStr::from_bytes(plan.held_name(node)));
        next = node.parent;
    }
    let mut path = root.to_owned();
    path.extend(names.iter().rev());
    path
}
