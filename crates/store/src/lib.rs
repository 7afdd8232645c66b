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
//!   partial/<digest>-<host>       downloads on their way, see `partial_downloads`
//!   pins/<hash>.json              which reference stays, for whom (see `pin_records`)
//!   staging/<random>              objects on their way
//!   resolutions/<hash>.json       reference and platform -> digest of the chosen manifest
//!   access/<hash>/<name>.json     who has been proven to open what (see `access`)
//!   publications/<hash>.json      which volume shows which tree at which target
//!   followed/<key>/               a volume that follows a tag (see `followed_volumes`)
//!   empty/                        the second lower directory of overlays, see `sys::mount::mount_attach`
//!   read-back/<name>              objects that need no reading any more, while others do (see `old_format_content`)
//!   scrub.json                    how far the scrub has come (see `content_verification`)
//!   mounts/                       where mounts are staged on kernels before 5.12
//! ```
//!
//! Keys hold everything that shapes an object ([`object_keys`]); `n` is its generation.
//!
//! # What may be trusted after a crash
//!
//! A name under `blobs`, `files`, `layers`, `trees` and `resolutions` was made
//! by a rename after its content was complete, verified and synced
//! ([`durable_rename`]): it can be trusted at any time. `partial` is trusted for
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
//! Only what [`object_catalog`] knows that nothing needs, and its name first: a rename
//! into staging, or the removal of a single file ([`gc`]). Nothing that has not
//! the form above is ever removed.

pub mod access;
pub mod blob_import;
pub mod byte_ranges;
pub mod content_verification;
pub mod damage_marks;
pub mod disk_space;
mod disk_units;
pub mod durable_rename;
pub mod error;
pub mod eviction;
mod folder_listing;
pub mod followed_volumes;
pub mod gc;
pub mod growing_download;
mod inode_metadata;
mod integrity_findings;
pub mod json_records;
pub mod layer_index_proto;
pub mod layers;
pub mod object_catalog;
pub mod object_inventory;
pub mod object_keys;
pub mod object_name;
pub mod old_format_content;
mod paced_reader;
pub mod partial_downloads;
pub mod pin_records;
pub mod publication_records;
mod record_index;
mod record_sweep;
pub mod resolution_records;
pub mod scrub_progress;
pub mod selinux_label;
pub mod single_files;
mod space_amount;
mod space_ledger;
pub mod space_reservations;
pub mod staging_folders;
mod state_directory;
pub mod state_lock;
pub mod state_ownership;
pub mod stored_documents;
mod stored_manifests;
pub mod trees;
pub mod write_meter;

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use nix::dir::Dir;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use parking_lot::Mutex;

pub use disk_space::{CacheOptions, DiskSpace};
pub use error::StoreError;
pub use followed_volumes::{FollowKey, MountedContent};
pub use object_keys::{FileKey, LayerKey, TreeKey};
pub use object_name::{ObjectKind, ObjectName};
pub use pin_records::PinShare;
pub use selinux_label::{SecurityLabel, SelinuxOptions};
pub use space_amount::SpaceAmount;
pub use trees::Tree;
pub use trees::mounted_tree::MountedTree;

use access::AccessFolder;
use access::access_proofs::Proofs;
use access::anonymous_refusals::AnonymousRefusals;
use access::blob_origins::Origins;
use access::imported_manifests::ImportRecords;
use access::verified_signatures::VerifiedSignatures;
use blob_import::ImportedBlobs;
use content_verification::Verification;
use damage_marks::DamageMarks;
use error::IoContext as _;
use followed_volumes::FollowedVolumes;
use gc::{Evictions, GarbageCollector};
use layers::Layers;
use object_inventory::Inventory;
use old_format_content::ReadBack;
use partial_downloads::Downloads;
use pin_records::Pins;
use publication_records::Publications;
use record_sweep::RecordSweeper;
use resolution_records::Resolutions;
use scrub_progress::ScrubProgress;
use single_files::Files;
use space_ledger::Ledger;
use space_reservations::SpaceReservations;
use state_directory::StateDirectory;
use stored_documents::Documents;
use sys::fault;
use trees::Trees;

/// The format that this version reads and writes.
const FORMAT: &str = "csi-driver-oci 2\n";
/// The format before it. The rest is the same, but pods could change content through their mounts.
const EARLIER_FORMAT: &str = "csi-driver-oci 1\n";

/// Options of an open state directory.
#[derive(Clone, Debug, Default)]
pub struct StoreOptions {
    /// Set on content before it is visible, on nodes with SELinux.
    pub label: Option<SecurityLabel>,
    /// The part of the filesystem that content may take.
    pub cache: CacheOptions,
}

/// An open state directory. Cheap to clone.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    directory: Arc<StateDirectory>,
    node_key: [u8; 32],
    ledger: Arc<Ledger>,
    documents: Arc<Documents>,
    files: Files,
    layers: Layers,
    trees: Arc<Trees>,
    inventory: Arc<Inventory>,
    downloads: Downloads,
    space: Arc<SpaceReservations>,
    collector: Arc<GarbageCollector>,
    verification: Verification,
    pins: Pins,
    publications: Publications,
    followed: FollowedVolumes,
    resolutions: Arc<Resolutions>,
    proofs: Proofs,
    origins: Origins,
    imports: ImportRecords,
    anonymous_refusals: AnonymousRefusals,
    verified_signatures: VerifiedSignatures,
    scrub_progress: ScrubProgress,
}

/// Gives access to the parts of a store.
macro_rules! parts {
    ($($(#[$attribute:meta])* $name:ident: $part:ty,)*) => {$(
        $(#[$attribute])*
        pub fn $name(&self) -> &$part {
            &self.0.$name
        }
    )*};
}

/// The format that `format` names.
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
    /// an earlier process left in staging. The caller holds the [`state_lock::Lock`].
    ///
    /// # Errors
    ///
    /// [`StoreError::Format`] for a folder of a version that this one does not know, and
    /// [`StoreError::Foreign`] for one that holds something else in place of the driver's own.
    pub fn open(root: &Path, options: StoreOptions) -> Result<Self, StoreError> {
        let format = root.join("format");
        let found = match std::fs::read(&format).if_there("read", &format)? {
            None => Found::Nothing,
            Some(found) if found == FORMAT.as_bytes() => Found::Current,
            Some(found) if found == EARLIER_FORMAT.as_bytes() => Found::Earlier,
            Some(found) => {
                let found = String::from_utf8_lossy(&found).trim().chars().take(80).collect();
                return Err(StoreError::Format { path: root.to_owned(), found });
            }
        };
        for folder in Self::FOLDERS {
            durable_rename::create_folder(&root.join(folder))?;
        }
        state_ownership::check(root, &Self::FOLDERS)?;
        let staging = root.join("staging");
        staging_folders::sweep(&staging)?;
        fault::point("recovery.swept").io_context("open", root)?;
        if found != Found::Current {
            // Nothing says who has written content without a format.
            if found == Found::Earlier || holds_content(root)? {
                ReadBack::begin(root)?;
            }
            durable_rename::write(&staging, &format, FORMAT.as_bytes())?;
        }
        let node_key = node_key(&staging, &root.join("node-key"))?;
        let StoreOptions { label, cache } = options;
        let directory = Arc::new(StateDirectory::open(root, label, cache)?);
        let ledger = Arc::new(Ledger::load(root.join("partial"), staging)?);
        Self::assemble(&directory, &ledger, node_key)
    }

    /// Builds the parts, each from those that it needs.
    fn assemble(
        directory: &Arc<StateDirectory>,
        ledger: &Arc<Ledger>,
        node_key: [u8; 32],
    ) -> Result<Self, StoreError> {
        let (directory, ledger) = (|| Arc::clone(directory), || Arc::clone(ledger));
        let trees = Arc::new(Trees { directory: directory() });
        let resolutions = Arc::new(Resolutions::new(directory()));
        let access = Arc::new(AccessFolder::new(directory()));
        let records = Arc::new(RecordSweeper {
            directory: directory(),
            // Resolutions first: they keep manifests, whose proofs then stay.
            kinds: vec![resolutions.clone(), access.clone()],
            swept: AtomicI64::default(),
        });
        let inventory = Arc::new(Inventory {
            directory: directory(),
            trees: trees.clone(),
            ledger: ledger(),
            records: records.clone(),
            loaded: Mutex::default(),
        });
        let collector = Arc::new(GarbageCollector {
            directory: directory(),
            inventory: inventory.clone(),
            ledger: ledger(),
            resolutions: resolutions.clone(),
            records,
            turn: Mutex::default(),
            evictions: Evictions::default(),
        });
        let space = Arc::new(SpaceReservations {
            directory: directory(),
            inventory: inventory.clone(),
            ledger: ledger(),
            collector: collector.clone(),
        });
        Ok(Self(Arc::new(Inner {
            directory: directory(),
            node_key,
            ledger: ledger(),
            documents: Arc::new(Documents { directory: directory(), space: space.clone() }),
            files: Files { directory: directory() },
            layers: Layers { directory: directory() },
            downloads: Downloads { directory: directory(), ledger: ledger() },
            verification: Verification {
                directory: directory(),
                inventory: inventory.clone(),
                trees: trees.clone(),
            },
            publications: Publications::open(directory(), trees.clone())?,
            followed: FollowedVolumes::open(directory(), trees.clone(), space.clone())?,
            pins: Pins::open(directory(), inventory.clone(), collector.clone())?,
            proofs: Proofs(access.clone()),
            origins: Origins(access.clone()),
            imports: ImportRecords(access.clone()),
            anonymous_refusals: AnonymousRefusals(access.clone()),
            verified_signatures: VerifiedSignatures(access),
            scrub_progress: ScrubProgress { directory: directory() },
            trees,
            inventory,
            space,
            collector,
            resolutions,
        })))
    }

    const FOLDERS: [&str; 12] = [
        "blobs",
        "empty",
        "files",
        "layers",
        "trees",
        "partial",
        pin_records::FOLDER,
        "staging",
        resolution_records::FOLDER,
        access::FOLDER,
        publication_records::FOLDER,
        followed_volumes::FOLDER,
    ];

    /// The state directory.
    pub fn root(&self) -> &Path {
        &self.0.directory.root
    }

    /// Keys the HMAC under which credentials are remembered.
    pub fn node_key(&self) -> &[u8; 32] {
        &self.0.node_key
    }

    /// The empty directory that overlays need as their second lower directory, open.
    ///
    /// # Errors
    ///
    /// [`StoreError::Foreign`] when it is not empty: its content would be seen in every volume.
    pub fn empty_folder(&self) -> Result<OwnedFd, StoreError> {
        let path = self.0.directory.path("empty");
        let failed = |error: nix::Error| StoreError::io("open", &path, error.into());
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut folder = Dir::open(&path, flags, Mode::empty()).map_err(failed)?;
        for entry in folder.iter() {
            let entry = entry.map_err(failed)?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                return Err(StoreError::Foreign { path, what: "is not empty" });
            }
        }
        folder.as_fd().try_clone_to_owned().io_context("open", &path)
    }

    /// Makes an empty file and removes it again.
    ///
    /// # Errors
    ///
    /// The reason why nothing can be made here.
    pub fn probe(&self) -> Result<(), StoreError> {
        let path = self.0.directory.staging().join(durable_rename::temporary_name());
        std::fs::write(&path, b"x").io_context("write", &path)?;
        std::fs::remove_file(&path).io_context("remove", &path)
    }

    parts! {
        /// Returns manifests, indexes and configurations.
        documents: Documents,
        /// Returns single-file layers.
        files: Files,
        /// Returns unpacked archives.
        layers: Layers,
        /// Returns the trees of artifacts.
        trees: Trees,
        /// Returns which objects there are, and what they take.
        inventory: Inventory,
        /// Returns downloads on their way.
        downloads: Downloads,
        /// Returns the space of the filesystem and the promises of it.
        space: SpaceReservations,
        /// Returns what decides which objects go, and removes them.
        collector: GarbageCollector,
        /// Returns what reads content back.
        verification: Verification,
        /// Returns the pins of references.
        pins: Pins,
        /// Returns the records of publications.
        publications: Publications,
        /// Returns the volumes that follow a tag.
        followed: FollowedVolumes,
        /// Returns what references resolved to.
        resolutions: Resolutions,
        /// Returns who has been proven to read a manifest.
        proofs: Proofs,
        /// Returns where blobs came from.
        origins: Origins,
        /// Returns which manifests an administrator has imported.
        imports: ImportRecords,
        /// Returns which repositories refuse anonymous requests.
        anonymous_refusals: AnonymousRefusals,
        /// Returns which signatures were verified.
        verified_signatures: VerifiedSignatures,
        /// Returns how far the scrub has come.
        scrub_progress: ScrubProgress,
    }

    /// Returns which content was found damaged.
    pub fn damage(&self) -> &DamageMarks {
        &self.0.directory.damage
    }

    /// Returns which content of an earlier format was read back.
    pub fn read_back(&self) -> &ReadBack {
        &self.0.directory.read_back
    }

    /// Starts an import of blobs that an administrator brings along.
    pub fn import_blobs(&self) -> Result<ImportedBlobs, StoreError> {
        let Inner { directory, documents, space, ledger, .. } = &*self.0;
        ImportedBlobs::begin(directory, documents, space, ledger)
    }
}

fn holds_content(root: &Path) -> Result<bool, StoreError> {
    for folder in ["files", "layers", "trees"] {
        if !folder_listing::names(&root.join(folder))?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn node_key(staging: &Path, path: &Path) -> Result<[u8; 32], StoreError> {
    // A key of another length was never ours; proofs made under it are simply not found.
    let known = std::fs::read(path).if_there("read", path)?;
    if let Some(key) = known.and_then(|bytes| bytes.try_into().ok()) {
        return Ok(key);
    }
    let mut key = [0; 32];
    getrandom::fill(&mut key)
        .map_err(|error| StoreError::io("make", path, std::io::Error::other(error)))?;
    durable_rename::write(staging, path, &key)?;
    Ok(key)
}

#[cfg(test)]
mod tests;
