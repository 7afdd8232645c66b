//! The progress of the scrub: one time for all content, in `scrub.json`.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::json_records;
use super::state_directory::StateDirectory;

/// The record of how far the scrub has come.
pub struct ScrubProgress {
    pub(super) directory: Arc<StateDirectory>,
}

/// A hint: one that a power loss takes, or that is wrong, costs readings.
#[derive(Debug, Serialize, Deserialize)]
struct Scrubbed {
    /// Everything whose turn came before this was read back; milliseconds since 1970.
    through_unix_milliseconds: i64,
}

impl ScrubProgress {
    /// Returns the time before which everything whose turn came was read back, in milliseconds
    /// since 1970.
    pub fn through(&self) -> Option<i64> {
        let record: Option<Scrubbed> = json_records::read(&self.path());
        record.map(|record| record.through_unix_milliseconds)
    }

    /// Remembers how far the scrub has come.
    pub fn set_through(&self, milliseconds: i64) -> Result<(), StoreError> {
        let record = Scrubbed { through_unix_milliseconds: milliseconds };
        json_records::write_hint(&self.directory.staging(), &self.path(), &record)
    }

    fn path(&self) -> PathBuf {
        self.directory.path("scrub.json")
    }
}
