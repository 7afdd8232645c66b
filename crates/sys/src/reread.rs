//! Files that others change while the driver runs: looked at when they are used.
//!
//! A look is a `stat` per file: inode, size and times say whether it is the file
//! that was read before. The kubelet swaps a link when a `ConfigMap` or a Secret
//! changes, so links are followed; a file that was missing counts as seen missing.

use std::fmt;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// The files that a value was read from, as they were then.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen(Vec<(PathBuf, Option<Stamp>)>);

/// What changes when a file does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Seen {
    /// Nothing looked at yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks at a path, before it is read: what changes in between is noticed at the next use.
    pub fn look(&mut self, path: &Path) {
        self.0.push((path.to_owned(), Stamp::of(path)));
    }

    /// Whether all of it is as it was.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.0.iter().all(|(path, stamp)| Stamp::of(path) == *stamp)
    }

    /// Looks at a file and reads it, `limit` bytes at most.
    ///
    /// # Errors
    ///
    /// The kernel's, or `FileTooLarge`.
    pub fn read(&mut self, path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
        self.look(path);
        let mut bytes = Vec::new();
        std::fs::File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        Ok(bytes)
    }
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

/// A value that is made from files, and made again when one of them has changed.
#[derive(Debug)]
pub struct Reread<T>(Mutex<Option<(Seen, Arc<T>)>>);

impl<T> Default for Reread<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T> Reread<T> {
    /// The value of now. `make` tells every file that it reads to [`Seen`]. Blocking.
    pub fn get(&self, make: impl FnOnce(&mut Seen) -> T) -> Arc<T> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((seen, value)) = held.as_ref()
            && seen.is_current()
        {
            return Arc::clone(value);
        }
        let mut seen = Seen::new();
        let value = Arc::new(make(&mut seen));
        *held = Some((seen, Arc::clone(&value)));
        value
    }
}

/// Makes a value from files, and tells [`Seen`] which.
type Make<T> = dyn Fn(&mut Seen) -> Result<T, String> + Send + Sync;
/// Is told whether the last reading failed.
type Tell = dyn Fn(bool) + Send + Sync;

/// A part of the configuration that is read again when its files change. Cheap to clone.
///
/// At first one that cannot be read has no value. Later the last good one stays in force,
/// and the failure is told.
pub struct LastGood<T>(Arc<Inner<T>>);

struct Inner<T> {
    what: &'static str,
    make: Box<Make<T>>,
    tell: Box<Tell>,
    state: Mutex<Option<Made<T>>>,
}

struct Made<T> {
    seen: Seen,
    value: Result<Arc<T>, String>,
}

impl<T> Clone for LastGood<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> fmt::Debug for LastGood<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("LastGood").field(&self.0.what).finish()
    }
}

impl<T> LastGood<T> {
    /// Reads nothing yet. `what` is for the log; `tell` is told after each reading whether it
    /// failed.
    pub fn new(
        what: &'static str,
        make: impl Fn(&mut Seen) -> Result<T, String> + Send + Sync + 'static,
        tell: impl Fn(bool) + Send + Sync + 'static,
    ) -> Self {
        let (make, tell) = (Box::new(make), Box::new(tell));
        Self(Arc::new(Inner { what, make, tell, state: Mutex::new(None) }))
    }

    /// What is in force. Blocking.
    ///
    /// # Errors
    ///
    /// Why there is none.
    pub fn current(&self) -> Result<Arc<T>, String> {
        let what = self.0.what;
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Made { seen, value }) = state.as_ref()
            && seen.is_current()
        {
            return value.clone();
        }
        let mut seen = Seen::new();
        let value = match ((self.0.make)(&mut seen), state.take()) {
            (Ok(value), _) => {
                (self.0.tell)(false);
                Ok(Arc::new(value))
            }
            (Err(error), Some(Made { value: Ok(last), .. })) => {
                tracing::error!(what, error, "it cannot be read again: the last good one stays");
                (self.0.tell)(true);
                Ok(last)
            }
            (Err(error), _) => {
                tracing::error!(what, error, "it cannot be read: there is none until it can");
                (self.0.tell)(true);
                Err(error)
            }
        };
        *state = Some(Made { seen, value: value.clone() });
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_good_value_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        let at = path.clone();
        let source = LastGood::new(
            "a number",
            move |seen| match seen.read(&at, 10) {
                Ok(bytes) => {
                    String::from_utf8_lossy(&bytes).parse::<u8>().map_err(|e| e.to_string())
                }
                Err(_) => Ok(0),
            },
            |_| {},
        );
        std::fs::write(&path, "odd").expect("written");
        assert!(source.current().is_err());
        for (text, expected) in [("1", 1), ("odd", 1), ("12", 12)] {
            std::fs::write(&path, text).expect("written");
            assert_eq!(source.current().as_deref(), Ok(&expected), "{text}");
        }
        std::fs::remove_file(path).expect("removed");
        assert_eq!(source.current().as_deref(), Ok(&0));
    }

    #[test]
    fn a_changed_file_is_read_again_and_an_unchanged_one_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        let reread = Reread::default();
        let mut reads = 0;
        let mut get = || {
            let value = reread.get(|seen| {
                reads += 1;
                seen.read(&path, 100).ok()
            });
            (value, reads)
        };
        assert_eq!(get(), (Arc::new(None), 1));
        assert_eq!(get(), (Arc::new(None), 1));
        std::fs::write(folder.path().join("file"), "one").expect("written");
        assert_eq!(get(), (Arc::new(Some(b"one".to_vec())), 2));
        assert_eq!(get(), (Arc::new(Some(b"one".to_vec())), 2));
    }

    #[test]
    fn the_kubelets_swap_of_a_link_is_noticed() {
        let folder = tempfile::tempdir().expect("a folder");
        let of = |name: &str| folder.path().join(name);
        for version in ["1", "2"] {
            std::fs::create_dir(of(version)).expect("a version");
            std::fs::write(of(version).join("file"), version).expect("its file");
        }
        let link = |to: &str| {
            std::os::unix::fs::symlink(to, of("next")).expect("a link");
            std::fs::rename(of("next"), of("..data")).expect("swapped");
        };
        link("1");
        std::os::unix::fs::symlink("..data/file", of("file")).expect("a link");
        let reread = Reread::default();
        let get = || reread.get(|seen| seen.read(&of("file"), 10).expect("read"));
        assert_eq!(*get(), b"1");
        link("2");
        assert_eq!(*get(), b"2");
    }

    #[test]
    fn a_file_beyond_the_limit_is_not_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        std::fs::write(&path, "12345").expect("written");
        assert!(Seen::new().read(&path, 4).is_err());
        assert_eq!(Seen::new().read(&path, 5).expect("read"), b"12345");
    }
}
