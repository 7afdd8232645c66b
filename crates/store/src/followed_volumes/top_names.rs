//! The names at the top of a followed volume, which lead through `..data`.

use std::collections::BTreeSet;
use std::ffi::{CString, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::DATA;
use crate::SecurityLabel;
use crate::error::{IoContext as _, StoreError};
use crate::trees::Tree;

/// The most names at the top: the volume has a link for each, and a switch looks at all of them.
const MAXIMUM_NAMES: usize = 10_000;

/// The names at the top of one version.
#[derive(Default)]
pub(super) struct TopNames(BTreeSet<OsString>);

impl TopNames {
    /// Reads the names at the top of a tree, which must suit a followed volume.
    pub(super) fn of_tree(tree: &Tree) -> Result<Self, StoreError> {
        let names = Self::of_folder(&tree.root())?;
        let refused = |what: String| Err(StoreError::CannotFollow { what });
        if let Some(name) = names.0.iter().find(|name| is_own(name.as_bytes())) {
            return refused(format!(
                "it has \"{}\" at its top, and names that begin with two dots are the volume's own there: exclude it",
                text::printable::excerpt(&name.to_string_lossy(), 100)
            ));
        }
        if names.0.len() > MAXIMUM_NAMES {
            return refused(format!(
                "it has {} names at its top, and at most {MAXIMUM_NAMES} are allowed: put them into a folder",
                names.0.len()
            ));
        }
        Ok(names)
    }

    /// Reads the names in a folder.
    pub(super) fn of_folder(folder: &Path) -> Result<Self, StoreError> {
        let read = || -> io::Result<_> {
            let entries = std::fs::read_dir(folder)?;
            entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()
        };
        read().map(Self).io_context("list", folder)
    }

    pub(super) fn len(&self) -> u64 {
        self.0.len() as u64
    }

    /// Adds links for the names that have none.
    pub(super) fn add(&self, shown: &Path, label: Option<&SecurityLabel>) -> io::Result<()> {
        for name in &self.0 {
            let link = shown.join(name);
            match symbolic_link(Path::new(DATA).join(name), &link, label) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                linked => linked?,
            }
        }
        Ok(())
    }

    /// Removes the links of all other names.
    pub(super) fn remove_others(&self, shown: &Path) -> io::Result<()> {
        for entry in std::fs::read_dir(shown)? {
            let name = entry?.file_name();
            if !is_own(name.as_bytes()) && !self.0.contains(&name) {
                std::fs::remove_file(shown.join(name))?;
            }
        }
        Ok(())
    }
}

/// Makes a symbolic link with the label of content.
pub(super) fn symbolic_link(
    target: impl AsRef<Path>,
    link: &Path,
    label: Option<&SecurityLabel>,
) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)?;
    match label {
        Some(label) => label.apply_to_link(&CString::new(link.as_os_str().as_bytes())?),
        None => Ok(()),
    }
}

/// Returns whether a name at the top is the volume's own, and leads to no name of the artifact.
fn is_own(name: &[u8]) -> bool {
    name.starts_with(b"..")
}
