//! The `selinux` section. Read at start.

use serde::Deserialize;

/// The default label of content, which containers may read.
const DEFAULT_FILE_LABEL: &str = "system_u:object_r:container_file_t:s0";

/// The `selinux` section.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct SelinuxSection {
    /// The label of content on nodes with SELinux.
    pub file_label: String,
}

impl Default for SelinuxSection {
    fn default() -> Self {
        Self { file_label: DEFAULT_FILE_LABEL.to_owned() }
    }
}
