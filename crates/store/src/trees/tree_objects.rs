//! The layers and files that the content of a tree comes from.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::path::PathBuf;

use crate::FileKey;
use crate::layers::{IndexReader, LayerView};
use crate::single_files::StoredFile;
use unpack::Entry;
use unpack::layer_merge::{EntryReader, FileSource};

/// The objects that a plan's files come from.
#[derive(Debug, Default)]
pub struct Objects {
    /// Layers by their numbers in the manifest.
    pub layers: BTreeMap<u32, LayerView>,
    /// Single files by digest, mode and owner.
    pub files: HashMap<FileKey, StoredFile>,
}

impl Objects {
    /// Returns a reader of single entries of the layers, which keeps a few indexes open.
    pub fn records(&self) -> impl EntryReader {
        IndexEntryReader { objects: self, open: Vec::new() }
    }

    /// Returns the path of a planned file's content: below a folder, or by itself.
    pub(crate) fn locate(&self, source: FileSource) -> Option<(BorrowedFd<'_>, PathBuf)> {
        match source {
            FileSource::Archive { layer, data } => {
                self.layers.get(&layer).map(|layer| layer.data(data))
            }
            FileSource::Blob { digest, permissions } => {
                let file = self.files.get(&FileKey { digest, permissions })?;
                Some((nix::fcntl::AT_FDCWD, file.path.clone()))
            }
        }
    }

    /// The same as one path, good as long as these are.
    pub(crate) fn path(&self, source: FileSource) -> Option<PathBuf> {
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
    fn read(&mut self, layer: u32, offset: u64) -> io::Result<Entry> {
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
