//! Trees as ordinary directory trees whose files are hard links to `files/` and `layers/`.

mod link_overflow;
mod tree_builder;
mod tree_comparison;
mod tree_copy;

use std::collections::HashMap;
use std::ffi::{CStr, OsStr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use super::tree_objects::Objects;
use crate::disk_units::{BYTES_PER_INODE, DiskUnits, bytes_of_a_name};
use crate::error::{IoContext as _, StoreError};
use crate::inode_metadata::Rules;
use crate::integrity_findings::DamageList;
use crate::paced_reader::{Reader, failed_to_read};
use crate::space_amount::SpaceAmount;
use crate::staging_folders::Staging;
use crate::state_directory::StateDirectory;
use link_overflow::Copies;
use tree_builder::Builder;
use tree_comparison::Comparison;
use tree_copy::TreeCopier;
use unpack::layer_merge::TreePlan;

/// The root of a tree, below the folder of its generation.
const ROOT: &str = "root";

/// The content of one generation of a tree.
pub(super) struct HardLinkTree {
    root: PathBuf,
}

impl HardLinkTree {
    /// Returns the content in the folder of a generation, whether it is there yet or not.
    pub(super) fn of(folder: &Path) -> Self {
        Self { root: folder.join(ROOT) }
    }

    /// Returns the path of the root.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the folder of the generation whose root this path is; none of another path.
    pub(super) fn folder_of(root: &Path) -> Option<&Path> {
        root.parent().filter(|_| root.file_name().is_some_and(|name| name == ROOT))
    }

    /// Returns the space of a planned tree: its folders and symbolic links, and the names in its
    /// folders.
    pub(super) fn space(plan: &TreePlan) -> SpaceAmount {
        let inodes = plan.totals.directories.saturating_add(plan.totals.symbolic_links);
        let names: u64 = plan.nodes.iter().map(|node| bytes_of_a_name(node.name_bytes)).sum();
        SpaceAmount { bytes: inodes.saturating_mul(BYTES_PER_INODE).saturating_add(names), inodes }
    }

    /// Makes the content. Returns the disk space that it takes beside one block for each folder
    /// and symbolic link.
    pub(super) fn build(
        &self,
        plan: &TreePlan,
        objects: &Objects,
        directory: &StateDirectory,
        staging: &mut Staging,
    ) -> Result<SpaceAmount, StoreError> {
        let root = self.root.as_path();
        let since = Instant::now();
        let (label, meter) = (directory.label.as_ref(), &directory.meter);
        let copies = Copies::new(staging.path().join("copies"), label, meter);
        Builder { plan, objects, label, meter, copies: &copies }
            .build(root, staging)
            .io_context("build the tree in", root)?;
        let own = copies.finish().io_context("finish", root)?;
        let nodes = plan.nodes.len();
        tracing::debug!(root = %root.display(), nodes, took = ?since.elapsed(), "linked");
        let bytes = bytes_of_names(plan, directory.units);
        Ok(own.plus(SpaceAmount { bytes, inodes: 0 }))
    }

    /// Opens the root, for mounting.
    pub(super) fn open(&self) -> Result<OwnedFd, StoreError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        open(&self.root, flags, Mode::empty()).io_context("open", &self.root)
    }

    /// Gives all of the content second names in a folder of staging. Returns that folder, and the disk space of
    /// copies of files that have all the names that they can have.
    pub(super) fn copy(
        &self,
        directory: &StateDirectory,
        staging: &Staging,
    ) -> Result<(PathBuf, SpaceAmount), StoreError> {
        let root = staging.path().join(ROOT);
        let (label, meter) = (directory.label.as_ref(), &directory.meter);
        let copies = Copies::new(staging.path().join("copies"), label, meter);
        let mut tree = TreeCopier { label, meter, copies: &copies, full: HashMap::new() };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut fill = || -> std::io::Result<()> {
            std::fs::create_dir(&root)?;
            let from = open(&self.root, flags, Mode::empty())?;
            tree.fill(&from, &open(&root, flags, Mode::empty())?)
        };
        fill().io_context("link the tree in", &root)?;
        let own = copies.finish().io_context("finish", &root)?;
        Ok((root, own))
    }

    /// Compares the content with a plan.
    pub(super) fn compare(
        &self,
        plan: &TreePlan,
        objects: &Objects,
        rules: Rules,
        reader: &mut Reader,
    ) -> Result<DamageList, StoreError> {
        let mut damage = DamageList::default();
        Comparison { plan, objects, rules }
            .run(&self.root, reader, &mut damage)
            .map_err(|error| failed_to_read(&self.root, error))?;
        Ok(damage.below(Path::new(ROOT)))
    }
}

/// Returns a path to an open folder, of any length.
fn descriptor(folder: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()))
}

/// Returns a path to a name in an open folder.
fn way_to(folder: &impl AsRawFd, name: &CStr) -> PathBuf {
    descriptor(folder).join(OsStr::from_bytes(name.to_bytes()))
}

/// Returns the disk space of names beyond the first block of each folder.
fn bytes_of_names(plan: &TreePlan, units: DiskUnits) -> u64 {
    let mut folders = HashMap::<_, u64>::new();
    for node in &plan.nodes {
        *folders.entry(node.parent).or_default() += bytes_of_a_name(node.name_bytes);
    }
    folders.into_values().map(|names| units.more_names(names)).sum()
}
