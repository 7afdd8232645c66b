//! A snapshot of a directory, to compare a pod's view with the unpacking of another program.

use std::{
    collections::BTreeMap,
    fmt, fs,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::Path,
};

use super::hexadecimal_sha256;

/// The type of an entry, with its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Folder,
    File { sha256: String },
    Link { target: String },
    Other,
}

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub kind: Kind,
    /// All twelve permission bits; zero for symbolic links, whose bits mean nothing.
    pub mode: u32,
    pub owner: (u32, u32),
    pub modified: i64,
    /// The first of the names that share the file, in order.
    pub same_file_as: Option<String>,
}

/// The entries of a directory by path, the directory itself left out.
#[derive(Clone, PartialEq, Eq)]
pub struct Tree {
    pub entries: BTreeMap<String, Entry>,
}

impl Tree {
    #[track_caller]
    pub fn of(root: &Path) -> Self {
        let mut tree = Self { entries: BTreeMap::new() };
        tree.walk(root, "");
        let mut first_names: BTreeMap<u64, String> = BTreeMap::new();
        for (name, entry) in &mut tree.entries {
            if matches!(entry.kind, Kind::File { .. }) {
                let inode = fs::symlink_metadata(root.join(name)).expect("metadata").ino();
                let first = first_names.entry(inode).or_insert_with(|| name.clone());
                if first != name {
                    entry.same_file_as = Some(first.clone());
                }
            }
        }
        tree
    }

    #[track_caller]
    fn walk(&mut self, root: &Path, below: &str) {
        let folder = root.join(below);
        for entry in
            fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        {
            let entry = entry.expect("a folder entry");
            let name = String::from_utf8_lossy(entry.file_name().as_bytes()).into_owned();
            let path = if below.is_empty() { name } else { format!("{below}/{name}") };
            let metadata = fs::symlink_metadata(entry.path()).expect("metadata");
            let kind = if metadata.is_dir() {
                Kind::Folder
            } else if metadata.is_symlink() {
                let target = fs::read_link(entry.path()).expect("a link's target");
                Kind::Link { target: target.to_string_lossy().into_owned() }
            } else if metadata.is_file() {
                Kind::File {
                    sha256: hexadecimal_sha256(&fs::read(entry.path()).expect("a file's content")),
                }
            } else {
                Kind::Other
            };
            let mode = if metadata.is_symlink() { 0 } else { metadata.mode() & 0o7777 };
            let is_folder = metadata.is_dir();
            self.entries.insert(
                path.clone(),
                Entry {
                    kind,
                    mode,
                    owner: (metadata.uid(), metadata.gid()),
                    modified: metadata.mtime(),
                    same_file_as: None,
                },
            );
            if is_folder {
                self.walk(root, &path);
            }
        }
    }

    /// Removes device nodes and FIFOs, which no volume shows.
    #[must_use]
    pub fn without_special_files(mut self) -> Self {
        self.entries.retain(|_, entry| entry.kind != Kind::Other);
        self
    }

    pub fn names(&self) -> Vec<&str> {
        self.entries.keys().map(String::as_str).collect()
    }

    /// Returns the names of everything but directories.
    pub fn files(&self) -> Vec<&str> {
        self.entries
            .iter()
            .filter(|(_, entry)| entry.kind != Kind::Folder)
            .map(|(name, _)| name.as_str())
            .collect()
    }

    #[track_caller]
    pub fn entry(&self, name: &str) -> &Entry {
        self.entries.get(name).unwrap_or_else(|| panic!("{name} is not among {:?}", self.names()))
    }

    pub fn mode(&self, name: &str) -> u32 {
        self.entry(name).mode
    }

    /// Applies `permissions: Readable`.
    #[must_use]
    pub fn readable(mut self) -> Self {
        for entry in self.entries.values_mut() {
            entry.owner = (0, 0);
            let added = match entry.kind {
                Kind::Link { .. } => continue,
                Kind::Folder => 0o555,
                _ if entry.mode & 0o111 != 0 => 0o555,
                _ => 0o444,
            };
            entry.mode = (entry.mode & 0o777) | added;
        }
        self
    }

    /// Sets the modes of all files, as for single-file layers, which carry none.
    #[must_use]
    pub fn with_file_modes(mut self, mode: impl Fn(&str) -> u32) -> Self {
        for (name, entry) in &mut self.entries {
            if matches!(entry.kind, Kind::File { .. }) {
                entry.mode = mode(name);
            }
        }
        self
    }

    /// Removes the times, where none are promised.
    #[must_use]
    pub fn without_times(mut self) -> Self {
        for entry in self.entries.values_mut() {
            entry.modified = 0;
        }
        self
    }

    /// Removes the modes of directories, where none are promised.
    #[must_use]
    pub fn without_folder_modes(mut self) -> Self {
        for entry in self.entries.values_mut() {
            if entry.kind == Kind::Folder {
                entry.mode = 0;
            }
        }
        self
    }

    /// Removes which names share a file: the store shares equal files that an archive holds twice.
    #[must_use]
    pub fn without_sharing(mut self) -> Self {
        for entry in self.entries.values_mut() {
            entry.same_file_as = None;
        }
        self
    }
}

impl fmt::Debug for Tree {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, entry) in &self.entries {
            writeln!(
                formatter,
                "{:04o} {}:{} {} {name} {:?} {:?}",
                entry.mode,
                entry.owner.0,
                entry.owner.1,
                entry.modified,
                entry.kind,
                entry.same_file_as
            )?;
        }
        Ok(())
    }
}
