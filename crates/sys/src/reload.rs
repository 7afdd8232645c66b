//! Values made from files that change while the driver runs.
//!
//! Each use of a value checks its files with one `stat` per file: inode, size and times tell whether
//! it is the file that was read before. The kubelet swaps a link when a `ConfigMap` or a Secret
//! changes, so links are followed. A missing file is recorded as missing.

use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

/// The files that a value was made from, with the version of each that was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileVersions(Vec<(PathBuf, Option<FileVersion>)>);

/// The metadata that changes with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileVersion {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileVersions {
    /// Starts without files.
    pub fn new() -> Self {
        Self::default()
    }

    /// Records the version of a file before it is read: a change in between is noticed at the next
    /// use.
    pub fn record(&mut self, path: &Path) {
        self.0.push((path.to_owned(), FileVersion::of(path)));
    }

    /// Returns whether all files still have the recorded versions.
    pub fn is_current(&self) -> bool {
        self.0.iter().all(|(path, version)| FileVersion::of(path) == *version)
    }

    /// Records the version of a file and reads the file, up to `limit` bytes. Nothing but a regular
    /// file is waited for.
    ///
    /// # Errors
    ///
    /// The kernel's, `FileTooLarge`, or that it is no regular file.
    pub fn read(&mut self, path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
        self.record(path);
        let mut bytes = Vec::new();
        // Without this flag, a FIFO blocks until someone writes to it.
        let file = std::fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(std::io::Error::other("it is no regular file"));
        }
        file.take(limit + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        Ok(bytes)
    }
}

impl FileVersion {
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
pub struct FileBacked<T>(Mutex<Option<(FileVersions, Arc<T>)>>);

impl<T> Default for FileBacked<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T> FileBacked<T> {
    /// Returns the value for the present files. `make` records each file that it reads. Blocks.
    pub fn get(&self, make: impl FnOnce(&mut FileVersions) -> T) -> Arc<T> {
        let mut held = self.0.lock();
        if let Some((versions, value)) = held.as_ref()
            && versions.is_current()
        {
            return Arc::clone(value);
        }
        let mut versions = FileVersions::new();
        let value = Arc::new(make(&mut versions));
        *held = Some((versions, Arc::clone(&value)));
        value
    }
}

/// Makes a value from files, and records which.
type MakeValue<T> = dyn Fn(&mut FileVersions) -> Result<T, String> + Send + Sync;
/// Receives whether the latest reading failed.
type ReportFailure = dyn Fn(bool) + Send + Sync;

/// A part of the configuration that is read again when its files change. Cheap to clone.
///
/// There is no value before files could be read for the first time. After that, a failure to read
/// changed files is reported, and the last good value stays in force.
pub struct Reloadable<T>(Arc<ReloadableInner<T>>);

struct ReloadableInner<T> {
    name: &'static str,
    make: Box<MakeValue<T>>,
    report: Box<ReportFailure>,
    state: Mutex<Option<LoadedValue<T>>>,
}

struct LoadedValue<T> {
    versions: FileVersions,
    value: Result<Arc<T>, String>,
}

impl<T> Clone for Reloadable<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Reloadable<T> {
    /// Reads no file before the first [`Self::current`]. The log calls the value `name`. After each
    /// reading, `report` receives whether it failed.
    pub fn new(
        name: &'static str,
        make: impl Fn(&mut FileVersions) -> Result<T, String> + Send + Sync + 'static,
        report: impl Fn(bool) + Send + Sync + 'static,
    ) -> Self {
        let (make, report) = (Box::new(make), Box::new(report));
        Self(Arc::new(ReloadableInner { name, make, report, state: Mutex::new(None) }))
    }

    /// Returns [`Self::current`], read on a thread for blocking work.
    pub async fn load(&self) -> Result<Arc<T>, String>
    where
        T: Send + Sync + 'static,
    {
        let source = self.clone();
        let read = tokio::task::spawn_blocking(move || source.current()).await;
        read.unwrap_or_else(|error| Err(error.to_string()))
    }

    /// Returns the value in force, and reads changed files first. Blocks.
    ///
    /// # Errors
    ///
    /// The reason that no file contents were ever valid.
    pub fn current(&self) -> Result<Arc<T>, String> {
        let what = self.0.name;
        let mut state = self.0.state.lock();
        if let Some(LoadedValue { versions, value }) = state.as_ref()
            && versions.is_current()
        {
            return value.clone();
        }
        let mut versions = FileVersions::new();
        let value = match ((self.0.make)(&mut versions), state.take()) {
            (Ok(value), _) => {
                (self.0.report)(false);
                Ok(Arc::new(value))
            }
            (Err(error), Some(LoadedValue { value: Ok(last), .. })) => {
                tracing::error!(what, error, "it cannot be read again: the last good one stays");
                (self.0.report)(true);
                Ok(last)
            }
            (Err(error), _) => {
                tracing::error!(what, error, "it cannot be read: there is none until it can");
                (self.0.report)(true);
                Err(error)
            }
        };
        *state = Some(LoadedValue { versions, value: value.clone() });
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
        let source = Reloadable::new(
            "a number",
            move |versions| match versions.read(&at, 10) {
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
    fn nothing_but_files_is_waited_for_and_the_last_good_value_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        let at = path("file");
        let source = Reloadable::new(
            "bytes",
            move |versions| versions.read(&at, 10).map_err(|error| error.to_string()),
            |_| {},
        );
        std::fs::write(path("file"), "good").expect("written");
        assert_eq!(source.current().as_deref(), Ok(&b"good".to_vec()));
        nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRUSR).expect("a FIFO");
        std::fs::rename(path("fifo"), path("file")).expect("replaced");
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(source.current()));
        let current = receiver.recv_timeout(std::time::Duration::from_secs(30));
        assert_eq!(current.expect("no waiting").as_deref(), Ok(&b"good".to_vec()));
        for other in [path("file"), folder.path().to_owned(), "/dev/zero".into()] {
            let refused = FileVersions::new().read(&other, 10).expect_err("no file");
            assert_eq!(refused.to_string(), "it is no regular file");
        }
    }

    #[test]
    fn a_changed_file_is_read_again_and_an_unchanged_one_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        let backed = FileBacked::default();
        let mut reads = 0;
        let mut get = || {
            let value = backed.get(|versions| {
                reads += 1;
                versions.read(&path, 100).ok()
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
    fn a_swapped_link_of_the_kubelet_is_noticed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        for version in ["1", "2"] {
            std::fs::create_dir(path(version)).expect("a version");
            std::fs::write(path(version).join("file"), version).expect("its file");
        }
        let link = |to: &str| {
            std::os::unix::fs::symlink(to, path("next")).expect("a link");
            std::fs::rename(path("next"), path("..data")).expect("swapped");
        };
        link("1");
        std::os::unix::fs::symlink("..data/file", path("file")).expect("a link");
        let value = FileBacked::default();
        let get = || value.get(|versions| versions.read(&path("file"), 10).expect("read"));
        assert_eq!(*get(), b"1");
        link("2");
        assert_eq!(*get(), b"2");
    }

    #[test]
    fn a_file_beyond_the_limit_is_not_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        std::fs::write(&path, "12345").expect("written");
        assert!(FileVersions::new().read(&path, 4).is_err());
        assert_eq!(FileVersions::new().read(&path, 5).expect("read"), b"12345");
    }
}
