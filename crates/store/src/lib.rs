//! The node's content: a directory tree that is the database.
//!
//! # Layout
//!
//! ```text
//! <state>/
//!   format                        "csi-driver-oci 2": what the rest is to be read as
//!   lock                          flock of the one process that uses the folder, and its name
//!   node-key                      32 random bytes: keys the HMAC of credentials in access/
//!   blobs/<digest>                manifests, indexes, configurations, as the registry sent them
//!   files/<digest>/<mode>-<uid>-<gid>/<n>   a single-file layer: one inode, linked into every tree
//!   layers/<key>/<n>/index        what an archive said, an entry a record, with its own checksum
//!   layers/<key>/<n>/data/<i>/<j> the archive's regular files, numbered, linked into trees
//!   trees/<key>/<n>/root          what a pod sees
//!   trees/<key>/<n>/tree.json     what it is, its totals
//!   trees/<key>/<n>/objects.json  which files and layers it links
//!   {files,layers,trees}/<key>/<n>.damaged   generation n is never published again
//!   partial/<digest>-<host>       downloads on their way, see `partial`
//!   pins/<hash>.json              which reference stays, for whom (see `pins`)
//!   staging/<random>              objects on their way
//!   resolutions/<hash>.json       reference and platform -> digest of the chosen manifest
//!   access/<hash>/<name>.json     who has been proven to open what (see `access`)
//!   publications/<hash>.json      which volume shows which tree at which target
//!   empty/                        the second lower directory of overlays, see `mount::attach`
//!   read-back/<name>              objects that need no reading any more, while others do (see `read_back`)
//!   scrub.json                    how far the scrub has come (see `verify`)
//!   mounts/                       where mounts are staged on kernels before 5.12
//! ```
//!
//! Keys hold everything that shapes an object ([`keys`]); `n` is its generation.
//!
//! # What may be trusted after a crash
//!
//! A name under `blobs`, `files`, `layers`, `trees` and `resolutions` was made
//! by a rename after its content was complete, verified and synced
//! ([`durable`]): it can be trusted at any time. `partial` is trusted for
//! nothing: its bytes are hashed again before they count. `staging` is swept at
//! start. `access` and `publications` are written without a sync: a proof that
//! is lost costs a request, an unreadable publication is ignored, and what is
//! mounted is asked of the kernel. The last use of a tree is the modification
//! time of its `tree.json`, unsynced: a power loss makes it look older.
//!
//! Content of format 1 is not trusted: its mounts could be written through. The folder `read-back`
//! is durable before `format` says 2, and what it does not name is verified before it is used. What
//! a power loss takes of the names in it costs another reading.
//!
//! # What is removed, and how
//!
//! Only what [`catalog`] knows that nobody needs, and its name first: a rename
//! into staging, or the removal of a single file ([`gc`]). Nothing that has not
//! the form above is ever removed.

/// The index of an unpacked layer, as `proto/layer_index.proto` has it.
#[allow(missing_docs, reason = "the proto carries the documentation")]
#[allow(clippy::all, clippy::pedantic, reason = "generated code")]
pub mod layer_index {
    include!(concat!(env!("OUT_DIR"), "/csi_driver_oci.store.v1.rs"));
}

pub mod access;
pub mod blobs;
pub mod catalog;
mod copies;
pub mod durable;
pub mod error;
pub mod eviction;
pub mod files;
pub mod gc;
pub mod growth;
pub mod import;
mod inventory;
pub mod keys;
pub mod label;
pub mod layers;
mod ledger;
pub mod lock;
pub mod mounted_tree;
pub mod namespace_resolutions;
pub mod object;
pub mod own;
pub mod partial;
pub mod pins;
pub mod publications;
pub mod ranges;
mod read_back;
mod record_index;
pub mod records;
pub mod resolutions;
pub mod room;
pub mod scrubbed;
pub mod staging;
pub mod sweep;
mod tree_builder;
pub mod trees;
pub mod verdicts;
pub mod verify;

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use nix::dir::Dir;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

pub use error::StoreError;
pub use keys::{FileKey, LayerKey, TreeKey};
pub use label::SecurityLabel;
pub use mounted_tree::MountedTree;
pub use object::{ObjectKind, ObjectName};
pub use pins::PinShare;
pub use room::{CacheOptions, Room};
pub use trees::Tree;

use sys::fault;

/// The format that this version reads and writes.
const FORMAT: &str = "csi-driver-oci 2\n";
/// The format before it. The rest is the same, but pods could change content through their mounts.
const EARLIER_FORMAT: &str = "csi-driver-oci 1\n";

/// How a state directory is used.
#[derive(Clone, Debug, Default)]
pub struct StoreOptions {
    /// Set on content before it is visible, on nodes with SELinux.
    pub label: Option<SecurityLabel>,
    /// How much of the filesystem content may take.
    pub cache: CacheOptions,
}

/// An open state directory. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    options: StoreOptions,
    barrier: durable::Barrier,
    node_key: [u8; 32],
    proofs: access::ProofLock,
    catalog: Arc<catalog::Catalog>,
    /// Whether the catalog knows what was here before this process.
    loaded: Mutex<bool>,
    /// Time of the last sweep of records for want of space, in seconds since 1970.
    swept: AtomicI64,
    resolution_index: record_index::RecordIndex,
    pin_index: record_index::RecordIndex,
    units: inventory::DiskUnits,
    ledger: Arc<ledger::Ledger>,
    meter: Arc<room::Meter>,
    /// Held by whoever decides what goes.
    collecting: Mutex<()>,
    evictions: gc::Evictions,
    /// How often content was found damaged.
    damages: AtomicU64,
    /// Trees that were found damaged and not reported yet.
    damaged_trees: Mutex<Vec<ObjectName>>,
    read_back: read_back::ReadBack,
}

/// What `format` says.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Current,
    Earlier,
    Nothing,
}

/// Returns freed memory to the system, after work that has taken much of it.
pub fn give_memory_back() {
    sys::mount::syscalls::trim_heap();
}

impl Store {
    /// Opens the state directory, makes what is missing in it, and removes what
    /// an earlier process left in staging. The caller holds the [`lock::Lock`].
    ///
    /// # Errors
    ///
    /// [`StoreError::Format`] for a folder of a version that this one does not know, and
    /// [`StoreError::Foreign`] for one that holds something else in place of the driver's own.
    pub fn open(root: &Path, options: StoreOptions) -> Result<Self, StoreError> {
        let format = root.join("format");
        let found = match std::fs::read(&format) {
            Ok(found) if found == FORMAT.as_bytes() => Found::Current,
            Ok(found) if found == EARLIER_FORMAT.as_bytes() => Found::Earlier,
            Ok(found) => {
                let found = String::from_utf8_lossy(&found).trim().chars().take(80).collect();
                return Err(StoreError::Format { path: root.to_owned(), found });
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Found::Nothing,
            Err(error) => return Err(StoreError::io("read", &format, error)),
        };
        for folder in Self::FOLDERS {
            durable::create_folder(&root.join(folder))?;
        }
        own::check(root, &Self::FOLDERS)?;
        let staging = root.join("staging");
        staging::sweep(&staging)?;
        fault::point("recovery.swept").map_err(|error| StoreError::io("open", root, error))?;
        if found != Found::Current {
            // Nothing says who has written content without a format.
            if found == Found::Earlier || holds_content(root)? {
                read_back::ReadBack::begin(root)?;
            }
            durable::write(&staging, &format, FORMAT.as_bytes())?;
        }
        let read_back = read_back::ReadBack::load(root)?;
        let node_key = node_key(&staging, &root.join("node-key"))?;
        let meter = Arc::new(room::Meter::new(root, options.cache));
        let ledger = Arc::new(ledger::Ledger::load(root.join("partial"), staging)?);
        let store = Self(Arc::new(Inner {
            root: root.to_owned(),
            options,
            barrier: durable::Barrier::default(),
            node_key,
            proofs: access::ProofLock::default(),
            catalog: Arc::default(),
            loaded: Mutex::default(),
            swept: AtomicI64::default(),
            resolution_index: record_index::RecordIndex::default(),
            pin_index: record_index::RecordIndex::default(),
            units: inventory::DiskUnits::of(root)?,
            ledger,
            meter,
            collecting: Mutex::default(),
            evictions: gc::Evictions::default(),
            damages: AtomicU64::default(),
            damaged_trees: Mutex::default(),
            read_back,
        }));
        store.load_publications()?;
        store.load_pins()?;
        Ok(store)
    }

    const FOLDERS: [&str; 11] = [
        "blobs",
        "empty",
        "files",
        "layers",
        "trees",
        "partial",
        "pins",
        "staging",
        "resolutions",
        "access",
        "publications",
    ];

    /// The state directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.0.root
    }

    /// Keys the HMAC under which credentials are remembered.
    #[must_use]
    pub fn node_key(&self) -> &[u8; 32] {
        &self.0.node_key
    }

    /// How often content was found damaged since the process began.
    #[must_use]
    pub fn damages(&self) -> u64 {
        self.0.damages.load(Ordering::Relaxed)
    }

    /// The empty directory that overlays need as their second lower directory, open.
    ///
    /// # Errors
    ///
    /// [`StoreError::Foreign`] when it is not empty: its content would be seen in every volume.
    pub fn empty_folder(&self) -> Result<OwnedFd, StoreError> {
        let path = self.path("empty");
        let failed = |error: nix::Error| StoreError::io("open", &path, error.into());
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut folder = Dir::open(&path, flags, Mode::empty()).map_err(failed)?;
        for entry in folder.iter() {
            let entry = entry.map_err(failed)?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                return Err(StoreError::Foreign { path, what: "is not empty" });
            }
        }
        folder.as_fd().try_clone_to_owned().map_err(|error| StoreError::io("open", &path, error))
    }

    fn path(&self, folder: &str) -> PathBuf {
        self.0.root.join(folder)
    }

    fn label(&self) -> Option<&SecurityLabel> {
        self.0.options.label.as_ref()
    }

    /// How much of the filesystem content may take.
    #[must_use]
    pub fn cache_options(&self) -> &CacheOptions {
        &self.0.options.cache
    }

    fn catalog(&self) -> &Arc<catalog::Catalog> {
        &self.0.catalog
    }

    fn resolution_index(&self) -> &record_index::RecordIndex {
        &self.0.resolution_index
    }

    fn pin_index(&self) -> &record_index::RecordIndex {
        &self.0.pin_index
    }

    fn proofs(&self) -> &access::ProofLock {
        &self.0.proofs
    }

    fn units(&self) -> inventory::DiskUnits {
        self.0.units
    }

    fn ledger(&self) -> &Arc<ledger::Ledger> {
        &self.0.ledger
    }

    fn barrier(&self) -> &durable::Barrier {
        &self.0.barrier
    }
}

fn holds_content(root: &Path) -> Result<bool, StoreError> {
    for folder in ["files", "layers", "trees"] {
        if !staging::names(&root.join(folder))?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn node_key(staging: &Path, path: &Path) -> Result<[u8; 32], StoreError> {
    match std::fs::read(path) {
        Ok(bytes) => {
            if let Ok(key) = bytes.try_into() {
                return Ok(key);
            }
            // A key of another length was never ours; proofs made under it are simply not found.
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(StoreError::io("read", path, error)),
    }
    let mut key = [0; 32];
    getrandom::fill(&mut key)
        .map_err(|error| StoreError::io("make", path, std::io::Error::other(error)))?;
    durable::write(staging, path, &key)?;
    Ok(key)
}

#[cfg(test)]
mod tests;
