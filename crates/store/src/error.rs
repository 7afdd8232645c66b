//! Errors of the node's own disk.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use text::human_units::Bytes;

/// A failure of the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The filesystem or a quota on it is full.
    #[error("no room on the node to {action} {}: free space on the state directory's filesystem", path.display())]
    NoSpace {
        /// The action that failed.
        action: &'static str,
        /// The path that it was about.
        path: PathBuf,
    },
    /// The room that is wanted cannot be had, also not by evicting.
    #[error("no room on the node: {0}")]
    NoRoom(Box<Shortage>),
    /// The kernel refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The action that failed.
        action: &'static str,
        /// The path that it was about.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another process uses the state directory.
    #[error("the state directory {} is in use by {holder}: stop that process or choose another --state-dir", path.display())]
    Locked {
        /// The path of the directory.
        path: PathBuf,
        /// The holder's description of itself.
        holder: String,
    },
    /// Written by a version that this one does not know.
    #[error("the state directory {} has the format \"{found}\", which this version does not know: install the newer version again, or empty the directory", path.display())]
    Format {
        /// The path of the directory.
        path: PathBuf,
        /// The format that the folder names.
        found: String,
    },
    /// The disk that should hold the state directory is not there.
    #[error("the state directory {} is not a mount point, and cache.requireMountpoint asks for one: mount its disk", path.display())]
    NotMounted {
        /// The path of the directory.
        path: PathBuf,
    },
    /// Something in the state directory that this driver did not make.
    #[error("{} {what}: the state directory must belong to the driver alone; move away what is not its own", path.display())]
    Foreign {
        /// The path of the foreign content.
        path: PathBuf,
        /// The reason why it is foreign.
        what: &'static str,
    },
    /// Pins may not hold so much.
    #[error("pinning it would hold {} of at most {}: unpin something, or raise cache.maxPinnedBytes", Bytes(*wanted), Bytes(*max))]
    TooMuchPinned {
        /// Bytes that pins would hold.
        wanted: u64,
        /// Bytes that they may hold.
        max: u64,
    },
    /// Pins of some owners may not hold so much together.
    #[error("pinning it would hold {} for {owners}, and at most {} are allowed", Bytes(*wanted), Bytes(*max))]
    PinShareExceeded {
        /// The owners of the pins, as text for people.
        owners: String,
        /// Bytes that their pins would hold.
        wanted: u64,
        /// Bytes that they may hold.
        max: u64,
    },
    /// Content that a volume that follows a tag cannot show.
    #[error("a volume that follows a tag cannot show it: {what}")]
    CannotFollow {
        /// The reason, and the way to change it.
        what: String,
    },
    /// Content that cannot be read back because another process holds leases on its files.
    #[error("{} cannot be read back now: a process on the node holds leases on its files (fcntl F_SETLEASE) and takes them again: find it by LEASE in /proc/locks, and set node.leases: Disable in the chart, or the sysctl fs.leases-enable=0", path.display())]
    Leased {
        /// Path of the object.
        path: PathBuf,
    },
    /// Content that was complete once and is not any more.
    #[error("{} is damaged ({what}): it will be fetched again", path.display())]
    Damaged {
        /// The path of the object.
        path: PathBuf,
        /// The difference that was found.
        what: String,
    },
}

/// A resource that is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes of the filesystem.
    Bytes,
    /// Inodes of the filesystem.
    Inodes,
    /// Bytes by `cache.maxBytes`.
    Quota,
}

/// Room that cannot be had, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// The exhausted resource.
    pub kind: Kind,
    /// The amount that is still to be written.
    pub needed: u64,
    /// The amount that was promised to others before.
    pub promised: u64,
    /// The amount that is missing of these two.
    pub missing: u64,
    /// The amount that is free.
    pub free: u64,
    /// The amount that stays free.
    pub floor: u64,
    /// The amount that could be evicted.
    pub evictable: u64,
    /// The amount that pins hold.
    pub pinned: u64,
}

impl Shortage {
    /// Returns whether evicting everything would not be enough.
    pub fn is_hopeless(&self) -> bool {
        self.evictable < self.missing
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, needed, promised, free, floor, evictable, pinned, .. } = *self;
        let amount = |number: u64| match kind {
            Kind::Inodes => format!("{number} inodes"),
            Kind::Bytes | Kind::Quota => Bytes(number).to_string(),
        };
        let [needed, promised, free, floor, evictable, pinned] =
            [needed, promised, free, floor, evictable, pinned].map(amount);
        let (limit, remedy) = match kind {
            Kind::Bytes => (format!(" of which {floor} stay free"), "cache.minFreePercent"),
            Kind::Inodes => (format!(" of which {floor} stay free"), "cache.minFreeInodesPercent"),
            Kind::Quota => (" by cache.maxBytes".to_owned(), "cache.maxBytes"),
        };
        write!(
            formatter,
            "needed {needed} beside {promised} promised to other pulls; free {free}{limit}; evictable \
             {evictable}; pinned {pinned}: remove or unpin artifacts, enlarge the disk, or change {remedy}"
        )
    }
}

/// Adds the action and the path to an error of a system call.
pub(crate) trait IoContext<T> {
    /// Returns the error of the store for a failed action on this path.
    fn io_context(self, action: &'static str, path: &Path) -> Result<T, StoreError>;

    /// Does the same, with `None` in place of the error that there is no such file.
    fn if_there(self, action: &'static str, path: &Path) -> Result<Option<T>, StoreError>;
}

impl<T, E: Into<io::Error>> IoContext<T> for Result<T, E> {
    fn io_context(self, action: &'static str, path: &Path) -> Result<T, StoreError> {
        self.map_err(|error| StoreError::io(action, path, error.into()))
    }

    fn if_there(self, action: &'static str, path: &Path) -> Result<Option<T>, StoreError> {
        match self.map_err(Into::into) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            result => result.map(Some).io_context(action, path),
        }
    }
}

impl StoreError {
    /// Tells a full disk from everything else.
    pub fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { action, path }
            }
            _ => Self::Io { action, path, source },
        }
    }
}
