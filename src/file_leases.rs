//! The node's `fs.leases-enable` setting: whether processes may take leases on files.
//!
//! Volumes that show the same file share its inode. While leases are enabled, a process with uid 0 in one pod, without
//! any capability, can delay each `open` of that file in all other pods by `fs.lease-break-time` (45 s). The setting
//! belongs to the kernel, not to a namespace: it holds for the node and all of its containers.

use std::io;
use std::path::Path;

use clap::ValueEnum;

/// The kernel's file of the setting: `0` or `1`.
const SETTING: &str = "/proc/sys/fs/leases-enable";

/// The action on the setting when the node plugin starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LeasePolicy {
    /// Disable file leases on the node.
    #[value(name = "Disable")]
    Disable,
    /// Leave the setting as it is.
    #[default]
    #[value(name = "Keep")]
    Keep,
}

impl LeasePolicy {
    /// Applies the policy. A failure is logged, and reported by `status` and the metric. The node plugin starts anyway.
    pub fn apply(self) {
        match self {
            Self::Keep => {}
            Self::Disable => match disable(Path::new(SETTING)) {
                Ok(true) => tracing::info!(
                    "file leases are disabled on this node (fs.leases-enable=0): NFS servers of the kernel give no delegations, Samba gets no kernel oplocks"
                ),
                Ok(false) => {}
                Err(error) => tracing::error!(
                    %error,
                    "file leases cannot be disabled on this node, so a pod can delay opens of files that it shares with others: set fs.leases-enable=0 with sysctl, or --leases Keep"
                ),
            },
        }
    }
}

/// Returns whether leases are enabled on the node now, or `None` if the kernel does not say.
pub fn are_enabled() -> Option<bool> {
    read(Path::new(SETTING)).ok()
}

/// Disables leases. Returns whether they were enabled before.
fn disable(setting: &Path) -> io::Result<bool> {
    if !read(setting)? {
        return Ok(false);
    }
    std::fs::write(setting, "0\n")?;
    // A container runtime may show a file of its own in place of the kernel's.
    if read(setting)? {
        return Err(io::Error::other("the kernel still allows them"));
    }
    Ok(true)
}

fn read(setting: &Path) -> io::Result<bool> {
    let text = std::fs::read_to_string(setting)?;
    match text.trim() {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the setting is neither 0 nor 1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_are_disabled_once() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "1\n").expect("the setting");
        assert!(disable(file.path()).expect("disabled"));
        assert_eq!(std::fs::read_to_string(file.path()).expect("the setting"), "0\n");
        assert!(!disable(file.path()).expect("disabled before"));
    }

    #[test]
    fn a_setting_that_cannot_be_changed_is_an_error() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(disable(&folder.path().join("missing")).is_err());
        let file = folder.path().join("other");
        std::fs::write(&file, "yes\n").expect("the setting");
        assert!(disable(&file).is_err());
    }
}
