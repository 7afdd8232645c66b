//! The SELinux label of content, set before anything of it is visible.
//!
//! A bind of a shared filesystem cannot be mounted with `context=`, so the
//! content itself carries the label that containers may read.

use std::ffi::CString;
use std::io;
use std::os::fd::BorrowedFd;

use serde::Deserialize;

use sys::extended_attributes;

/// The `selinux` section of the configuration. Read at start.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct SelinuxOptions {
    /// The label of content on nodes with SELinux.
    pub file_label: String,
}

/// A label such as `system_u:object_r:container_file_t:s0`.
#[derive(Clone, Debug)]
pub struct SecurityLabel(CString);

impl Default for SelinuxOptions {
    fn default() -> Self {
        Self { file_label: "system_u:object_r:container_file_t:s0".to_owned() }
    }
}

impl SelinuxOptions {
    /// Returns the label of content; `None` on a node without SELinux.
    pub fn label(&self) -> Option<SecurityLabel> {
        let is_used = SecurityLabel::is_used_on_this_node();
        is_used.then(|| SecurityLabel::new(&self.file_label)).flatten()
    }
}

impl SecurityLabel {
    /// The label's attribute has this name on every filesystem.
    const ATTRIBUTE: &std::ffi::CStr = c"security.selinux";

    /// Takes a label; none when it holds a NUL.
    pub fn new(label: &str) -> Option<Self> {
        CString::new(label).ok().map(Self)
    }

    /// Returns whether this node enforces or logs SELinux: the kernel knows the
    /// filesystem `selinuxfs` only then, and says so in containers too, where
    /// that filesystem itself is not mounted.
    pub fn is_used_on_this_node() -> bool {
        std::fs::read_to_string("/proc/filesystems").is_ok_and(|text| {
            text.lines().any(|line| line.split_whitespace().last() == Some("selinuxfs"))
        })
    }

    /// Labels an open file or folder.
    pub fn apply(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        extended_attributes::set(file, Self::ATTRIBUTE, self.0.as_bytes_with_nul())
    }

    /// Labels a symbolic link.
    pub fn apply_to_link(&self, path: &std::ffi::CStr) -> io::Result<()> {
        extended_attributes::set_at(path, Self::ATTRIBUTE, self.0.as_bytes_with_nul())
    }
}
