//! How far the scrub has come: one time for all content, in `scrub.json`.

use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::{Store, records};

/// A hint: one that a power loss takes, or that is wrong, costs readings.
#[derive(Debug, Serialize, Deserialize)]
struct Scrubbed {
    /// Everything whose turn came before this was read back; milliseconds since 1970.
    through_unix_milliseconds: i64,
}

impl Store {
    /// Everything whose turn came before this was read back; milliseconds since 1970.
    #[must_use]
    pub fn scrubbed_through(&self) -> Option<i64> {
        let record: Option<Scrubbed> = records::read(&self.path("scrub.json"));
        record.map(|record| record.through_unix_milliseconds)
    }

    /// Remembers how far the scrub has come.
    pub fn put_scrubbed_through(&self, milliseconds: i64) -> Result<(), StoreError> {
        let record = Scrubbed { through_unix_milliseconds: milliseconds };
        records::write_hint(&self.staging(), &self.path("scrub.json"), &record)
    }

    /// The names of all objects.
    pub fn object_names(&self) -> Result<Vec<super::ObjectName>, StoreError> {
        self.load_catalog()?;
        Ok(self.catalog().names().into_iter().map(|(name, _)| name).collect())
    }
}
