//! Reads files to their end, at a pace, and hashes them.
//!
//! A pod's process may hold a write lease on a file that its volume shows (fcntl(2), `F_SETLEASE`). An open that does
//! not wait then fails with EAGAIN, also later if the holder takes the lease again. An open that waits gets the file after
//! `fs.lease-break-time` at most: the kernel grants no write lease on a file that another process is about to read.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice};
use nix::sys::stat::Mode;
use sha2::Digest as _;

use super::error::StoreError;
use oci_types::Digest;
use sys::background::{throttle, yield_to_pods};
use unpack::checksum::{Checksum, Checksummer};

/// Bytes of one read. Reads that pass the page cache have no read-ahead, so they are large.
const PIECE: usize = 1 << 20;
/// The alignment of reads that pass the page cache, for any disk.
const ALIGNMENT: usize = 4096;

/// Leased files that are waited for at once, each by a thread of its own.
pub(super) const LEASED_AT_ONCE: usize = 128;
/// Stack size of such a thread in bytes.
const STACK: usize = 64 << 10;
/// Waits for leases in one object that no pod waits for. Its remaining files are read in the next turn.
const WAITS: u32 = 8;
/// Seconds of the longest lease break time that is waited for. The kernel's default is 45; 0 means no end.
const LONGEST_BREAK: u64 = 120;
const BREAK_TIME: &str = "/proc/sys/fs/lease-break-time";

/// The error of a file that cannot be read because of leases on it.
#[derive(Debug, thiserror::Error)]
#[error("a process holds a lease on it")]
pub(super) struct FileLeased;

/// The number of objects and bytes that were read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Blobs, files, layers and trees.
    pub objects: u64,
    /// Bytes of them.
    pub bytes: u64,
}

/// The speed of reading back, and whether it passes the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadPace {
    /// Through the page cache, where the pod that waits finds it next.
    Urgent,
    /// As fast as the disk gives it, from the disk itself: what pods have in the cache stays there.
    Full,
    /// Reads from the disk itself, for a quarter of the time (see [`throttle`]).
    Gentle,
}

/// Reads content back, and counts it.
pub struct Reader {
    /// The objects and bytes that were read so far.
    pub verified: Verified,
    /// Ends reading with an error once it is set.
    pub stop: Arc<AtomicBool>,
    /// Is told how many bytes each step has read.
    pub arrived: Box<dyn Fn(u64) + Send>,
    /// Is called before waiting for leases or memory, so that shared resources can be released first.
    pub waits: Box<dyn FnMut() + Send>,
    pace: ReadPace,
    /// Number of further waits for leases in this object.
    waits_left: u32,
    buffer: Vec<u8>,
}

impl Reader {
    /// A reader that nothing stops.
    pub fn new(pace: ReadPace) -> Self {
        Self {
            verified: Verified::default(),
            pace,
            stop: Arc::default(),
            arrived: Box::new(|_| ()),
            waits: Box::new(|| ()),
            waits_left: WAITS,
            buffer: Vec::new(),
        }
    }

    /// Announces that the reading is about to wait.
    pub fn is_about_to_wait(&mut self) {
        (self.waits)();
    }

    /// Resets the number of waits for the next object.
    pub(super) fn begin(&mut self) {
        self.waits_left = WAITS;
    }

    /// Opens a file to be read back. Waits for leases on it.
    pub(super) fn open(&mut self, path: &Path) -> io::Result<File> {
        match open(path) {
            Err(error) if is_leased(&error) => {
                let opened = self.open_leased(&[path])?.pop();
                opened.unwrap_or(Err(error))
            }
            opened => opened,
        }
    }

    /// Opens files that others hold leases on. Waits for all of them together.
    ///
    /// # Errors
    ///
    /// [`FileLeased`] after too many waits, or where leases last too long.
    pub(super) fn open_leased<P: AsRef<Path> + Sync>(
        &mut self,
        paths: &[P],
    ) -> io::Result<Vec<io::Result<File>>> {
        let is_urgent = self.pace == ReadPace::Urgent;
        if !is_urgent && self.waits_left == 0 || !do_leases_end() {
            return Err(io::Error::other(FileLeased));
        }
        self.waits_left = self.waits_left.saturating_sub(1);
        self.is_about_to_wait();
        self.step()?;
        Ok(thread::scope(|scope| {
            let open = |path| {
                let thread = thread::Builder::new().name("lease".to_owned()).stack_size(STACK);
                // If no thread can be started, files are waited for one after the other.
                thread
                    .spawn_scoped(scope, move || open_waiting(path))
                    .map_err(|_| open_waiting(path))
            };
            let threads: Vec<_> = paths.iter().map(|path| open(path.as_ref())).collect();
            let crashed = |_| Err(io::Error::other("a thread that opens a file has crashed"));
            let opened = threads.into_iter().map(|thread| match thread {
                Ok(thread) => thread.join().unwrap_or_else(crashed),
                Err(opened) => opened,
            });
            opened.collect()
        }))
    }

    /// The digest of a file's content.
    pub(super) fn hash(&mut self, file: &File) -> io::Result<Digest> {
        let mut hasher = sha2::Sha256::new();
        self.read(file, |piece| hasher.update(piece))?;
        Ok(Digest::from_bytes(hasher.finalize().into()))
    }

    /// The checksum of a file's content, of the same kind as the one that was recorded.
    pub(super) fn checksum(&mut self, file: &File, recorded: Checksum) -> io::Result<Checksum> {
        match recorded {
            Checksum::Sha256(_) => self.hash(file).map(Checksum::Sha256),
            Checksum::Xxh3(_) => {
                let mut checksum = Checksummer::default();
                self.read(file, |piece| checksum.update(piece))?;
                Ok(checksum.finish())
            }
        }
    }

    /// Ends a step: lets pods go first, and ends with an error when it was stopped.
    pub(super) fn step(&self) -> io::Result<()> {
        yield_to_pods();
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        Ok(())
    }

    fn read(&mut self, mut file: &File, mut with: impl FnMut(&[u8])) -> io::Result<()> {
        let mut is_direct = self.pace != ReadPace::Urgent && set_direct(file, true).is_ok();
        let is_cached = self.pace != ReadPace::Urgent && !is_direct;
        if is_cached {
            drop_pages(file);
        }
        if self.buffer.is_empty() {
            self.buffer = vec![0; PIECE + ALIGNMENT];
        }
        let start = self.buffer.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        loop {
            self.step()?;
            let since = Instant::now();
            let piece = &mut self.buffer[start..start + PIECE];
            let count = match file.read(piece) {
                // A filesystem that promised more than it can.
                Err(error)
                    if is_direct && Errno::EINVAL as i32 == error.raw_os_error().unwrap_or(0) =>
                {
                    set_direct(file, false)?;
                    is_direct = false;
                    continue;
                }
                count => count?,
            };
            if count == 0 {
                break;
            }
            with(&piece[..count]);
            self.verified.bytes += count as u64;
            (self.arrived)(count as u64);
            if is_direct && !count.is_multiple_of(ALIGNMENT) {
                // The end, or what the next read of this kind cannot begin at.
                set_direct(file, false)?;
                is_direct = false;
            }
            if self.pace == ReadPace::Gentle {
                throttle(since.elapsed());
            }
        }
        if is_cached {
            drop_pages(file);
        }
        Ok(())
    }
}

/// Opens a regular file to be read back; anything else is refused. Fails with EAGAIN where another process holds a
/// write lease on it.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = File::from(nix::fcntl::open(path, flags, Mode::empty())?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is not a file")) }
}

/// Opens a regular file, and waits for a write lease on it to end. Anything else is refused: the wait might never end.
fn open_waiting(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let found = File::from(nix::fcntl::open(path, flags, Mode::empty())?);
    if !found.metadata()?.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let path = PathBuf::from(format!("/proc/self/fd/{}", found.as_raw_fd()));
    Ok(File::from(nix::fcntl::open(&path, flags, Mode::empty())?))
}

/// Opens a file outside of a reader's count of waits. Waits for a lease on it.
pub(super) fn open_patiently(path: &Path) -> io::Result<File> {
    match open(path) {
        Err(error) if is_leased(&error) && do_leases_end() => open_waiting(path),
        Err(error) if is_leased(&error) => Err(io::Error::other(FileLeased)),
        opened => opened,
    }
}

/// Returns whether the kernel ends leases within [`LONGEST_BREAK`].
fn do_leases_end() -> bool {
    let text = std::fs::read_to_string(BREAK_TIME);
    let seconds = text.ok().and_then(|text| text.trim().parse().ok());
    seconds.is_some_and(|seconds: u64| (1..=LONGEST_BREAK).contains(&seconds))
}

/// Returns whether an open failed for a lease.
pub(super) fn is_leased(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::EAGAIN as i32)
}

/// Returns whether a reading ended because of leases that did not end.
pub(super) fn was_leased(error: &io::Error) -> bool {
    matches!(error.get_ref(), Some(error) if error.is::<FileLeased>())
}

/// Returns what an error says of the content that was to be read; or the error, when it says nothing of it.
pub(super) fn unreadable(error: io::Error) -> io::Result<String> {
    if is_of_this_node(&error) { Err(error) } else { Ok(format!("it cannot be read: {error}")) }
}

/// Returns whether an error is the node's, which has too little of something, or that of a reader that was stopped.
pub(super) fn is_of_this_node(error: &io::Error) -> bool {
    let of_node = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::ENOBUFS, Errno::EAGAIN];
    error.kind() == io::ErrorKind::Interrupted
        || was_leased(error)
        || error.raw_os_error().is_some_and(|number| of_node.contains(&Errno::from_raw(number)))
}

fn set_direct(file: &File, is_direct: bool) -> io::Result<()> {
    let flags = if is_direct { OFlag::O_DIRECT } else { OFlag::empty() };
    nix::fcntl::fcntl(file, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

/// Returns the error of an object that could not be read back.
pub(super) fn failed_to_read(path: &Path, error: std::io::Error) -> StoreError {
    if was_leased(&error) {
        StoreError::Leased { path: path.to_owned() }
    } else {
        StoreError::io("read back", path, error)
    }
}

/// So that what comes is what the disk has, where pages cannot be passed.
fn drop_pages(file: &File) {
    // Advice: a kernel that does not take it reads from memory.
    let _ = nix::fcntl::posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pace_reads_the_same() {
        let folder = tempfile::tempdir().expect("a folder");
        for size in [0, 1, ALIGNMENT, ALIGNMENT + 1, PIECE, PIECE + 4096, 2 * PIECE + 17] {
            let content: Vec<u8> = (0..=250).cycle().take(size).collect();
            let path = folder.path().join("file");
            std::fs::write(&path, &content).expect("written");
            for pace in [ReadPace::Urgent, ReadPace::Full, ReadPace::Gentle] {
                let mut reader = Reader::new(pace);
                let read = reader.hash(&open(&path).expect("a file")).expect("read");
                assert_eq!(read, Digest::of(&content), "{size} bytes, {pace:?}");
                assert_eq!(reader.verified.bytes, size as u64);
            }
        }
    }

    #[test]
    fn nothing_but_files_is_waited_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let [file, fifo, link] = ["file", "fifo", "link"].map(|name| folder.path().join(name));
        std::fs::write(&file, "content").expect("written");
        nix::unistd::mkfifo(&fifo, Mode::S_IRUSR).expect("a fifo");
        std::os::unix::fs::symlink(&file, &link).expect("a link");
        for path in [&fifo, &link, &folder.path().to_owned()] {
            assert!(open_waiting(path).is_err(), "{}", path.display());
        }
        let mut reader = Reader::new(ReadPace::Full);
        let read = reader.hash(&open_waiting(&file).expect("opened")).expect("read");
        assert_eq!(read, Digest::of(b"content"));
    }

    #[test]
    fn leases_are_waited_for_a_few_times_in_one_object() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        std::fs::write(&path, "content").expect("written");
        let mut reader = Reader::new(ReadPace::Full);
        for _ in 0..WAITS {
            let opened = reader.open_leased(&[&path]).expect("waited for");
            assert!(opened.iter().all(Result::is_ok));
        }
        let error = reader.open_leased(&[&path]).expect_err("no more");
        assert!(was_leased(&error) && unreadable(error).is_err(), "it says nothing of the content");
        reader.begin();
        assert!(reader.open_leased(&[&path]).is_ok());
    }

    #[test]
    fn a_reader_that_is_stopped_has_found_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        std::fs::write(&path, "content").expect("written");
        let mut reader =
            Reader { stop: Arc::new(AtomicBool::new(true)), ..Reader::new(ReadPace::Full) };
        let stopped = reader.hash(&open(&path).expect("a file")).expect_err("stopped");
        assert!(unreadable(stopped).is_err());
        assert!(unreadable(Errno::EMFILE.into()).is_err(), "the node's own trouble is no damage");
        assert!(unreadable(Errno::EIO.into()).is_ok());
    }
}
