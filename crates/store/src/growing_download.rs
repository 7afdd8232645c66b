//! A download that others read while it grows.
//!
//! The unpacking of a blob follows the bytes that are hashed already. That is not yet
//! a verified blob: what is made of them has no name before the whole blob's digest
//! is known to be right, and is thrown away when it is not.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Time between two questions of a waiting reader whether it should yield.
const LOOK: Duration = Duration::from_secs(1);

/// The progress of a download, for its followers.
#[derive(Default)]
pub(super) struct Growth {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// Bytes from the start that are hashed.
    prefix: u64,
    /// The number of times that the content was thrown away: a follower of an older one follows nothing.
    restarts: u32,
    /// Nothing will be added any more.
    ended: bool,
}

/// Reads a download from its start, as it grows; waits where it is not yet.
pub struct Follower {
    file: Arc<File>,
    growth: Arc<Growth>,
    size: u64,
    restarts: u32,
    position: u64,
    /// Time that it has waited for bytes so far.
    waited: Duration,
    /// Reading fails once this says so, which is told how long was waited for bytes so far.
    pub gives_way: Option<Box<dyn Fn(Duration) -> bool + Send>>,
}

impl Growth {
    pub(super) fn grow(&self, prefix: u64) {
        self.change(|state| state.prefix = prefix);
    }

    pub(super) fn restart(&self) {
        self.change(|state| {
            state.prefix = 0;
            state.restarts += 1;
        });
    }

    pub(super) fn end(&self) {
        self.change(|state| state.ended = true);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock());
        self.changed.notify_all();
    }
}

impl Follower {
    pub(super) fn new(file: Arc<File>, growth: &Arc<Growth>, size: u64) -> Self {
        let restarts = growth.state.lock().restarts;
        let growth = Arc::clone(growth);
        let waited = Duration::ZERO;
        Self { file, growth, size, restarts, position: 0, waited, gives_way: None }
    }

    /// Returns how many bytes there are beyond the position, at least one.
    fn available(&mut self) -> io::Result<u64> {
        let given_up = || io::Error::other("the download that is followed was given up");
        let mut state = self.growth.state.lock();
        loop {
            if state.restarts != self.restarts {
                return Err(given_up());
            }
            if state.prefix > self.position {
                return Ok(state.prefix - self.position);
            }
            if state.ended {
                return Err(given_up());
            }
            if self.gives_way.as_ref().is_some_and(|gives_way| gives_way(self.waited)) {
                return Err(io::Error::other("it gave way to others"));
            }
            let since = Instant::now();
            self.growth.changed.wait_for(&mut state, LOOK);
            self.waited += since.elapsed();
        }
    }
}

impl Read for Follower {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.position >= self.size || buffer.is_empty() {
            return Ok(0);
        }
        let available = usize::try_from(self.available()?).unwrap_or(usize::MAX);
        let wanted = available.min(buffer.len());
        match self.file.read_at(&mut buffer[..wanted], self.position)? {
            // The file was cut, which a download does not do.
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            read => {
                self.position += read as u64;
                Ok(read)
            }
        }
    }
}
