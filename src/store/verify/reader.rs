//! Reads files to their end, at a pace, and hashes them.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice};
use nix::sys::stat::Mode;
use sha2::Digest as _;

use super::Verified;
use crate::background::{give_way, rest};
use crate::oci::Digest;
use crate::unpack::checksum::{Checksum, Checksummer};

/// What is read at once. Reads that pass the page cache have no read-ahead, so they are large.
const PIECE: usize = 1 << 20;
/// What reads that pass the page cache are aligned to, on any disk.
const ALIGNMENT: usize = 4096;

/// How fast content is read back, and whether past the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadPace {
    /// Through the page cache, where the pod that waits finds it next.
    Urgent,
    /// As fast as the disk gives it, from the disk itself: what pods have in the cache stays there.
    Full,
    /// From the disk itself, for a quarter of the time (see [`rest`]).
    Gentle,
}

/// Reads content back, and counts it.
pub struct Reader {
    /// What was read so far.
    pub verified: Verified,
    pace: ReadPace,
    stop: Arc<AtomicBool>,
    arrived: Box<dyn Fn(u64) + Send>,
    buffer: Vec<u8>,
}

impl fmt::Debug for Reader {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("Reader");
        shown.field("verified", &self.verified).field("pace", &self.pace).finish_non_exhaustive()
    }
}

impl Reader {
    /// A reader that nothing stops.
    #[must_use]
    pub fn new(pace: ReadPace) -> Self {
        Self {
            verified: Verified::default(),
            pace,
            stop: Arc::default(),
            arrived: Box::new(|_| ()),
            buffer: Vec::new(),
        }
    }

    /// Ends with an error once `stop` is set.
    #[must_use]
    pub fn stopped_by(self, stop: Arc<AtomicBool>) -> Self {
        Self { stop, ..self }
    }

    /// Tells how many bytes each step has read.
    #[must_use]
    pub fn telling(self, arrived: impl Fn(u64) + Send + 'static) -> Self {
        Self { arrived: Box::new(arrived), ..self }
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
        give_way();
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
                rest(since.elapsed());
            }
        }
        if is_cached {
            drop_pages(file);
        }
        Ok(())
    }
}

/// Opens a file to be read back; whatever else lies there is refused.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = File::from(nix::fcntl::open(path, flags, Mode::empty())?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is not a file")) }
}

/// What an error says of the content that was to be read; or the error, when it says nothing of it.
pub(super) fn unreadable(error: io::Error) -> io::Result<String> {
    if is_of_this_node(&error) { Err(error) } else { Ok(format!("it cannot be read: {error}")) }
}

/// Whether an error is the node's, which has too little of something, or that of a reader that was stopped.
pub(super) fn is_of_this_node(error: &io::Error) -> bool {
    let of_node = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::ENOBUFS, Errno::EAGAIN];
    error.kind() == io::ErrorKind::Interrupted
        || error.raw_os_error().is_some_and(|number| of_node.contains(&Errno::from_raw(number)))
}

fn set_direct(file: &File, is_direct: bool) -> io::Result<()> {
    let flags = if is_direct { OFlag::O_DIRECT } else { OFlag::empty() };
    nix::fcntl::fcntl(file, FcntlArg::F_SETFL(flags))?;
    Ok(())
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
    fn a_reader_that_is_stopped_has_found_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        std::fs::write(&path, "content").expect("written");
        let mut reader = Reader::new(ReadPace::Full).stopped_by(Arc::new(AtomicBool::new(true)));
        let stopped = reader.hash(&open(&path).expect("a file")).expect_err("stopped");
        assert!(unreadable(stopped).is_err());
        assert!(unreadable(Errno::EMFILE.into()).is_err(), "the node's own trouble is no damage");
        assert!(unreadable(Errno::EIO.into()).is_ok());
    }
}
