//! Mounts of one directory tree, as read-only binds and overlays, and the mount table.
//!
//! A mount is made detached, given its flags, and only then attached, in one
//! step ([`mount_attach`]); nothing is ever visible at a target that is writable or
//! half made. Only the kernel knows which mounts exist and where ([`mount_table`]).
//! System calls that nix and rustix do not offer are in [`syscalls`], the only
//! place of the project with `unsafe`.

pub mod mount_attach;
pub mod mount_table;
pub mod mount_target;
pub mod syscalls;

pub use mount_attach::{AttachMethod, MountContent, MountFlags, MountForm};
pub use mount_table::{MountEntry, MountOrigin, MountTable};
pub use mount_target::{DetachedFilesystem, MountTarget, TargetState, UnmountError};
