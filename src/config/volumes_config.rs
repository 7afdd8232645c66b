//! The `volumes` section. Read at start.

use serde::Deserialize;

use crate::volume::mount_form::MountMode;

/// The `volumes` section.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct VolumesSection {
    /// The form in which volumes are mounted.
    pub mount: MountMode,
}
