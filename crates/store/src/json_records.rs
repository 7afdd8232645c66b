//! Small records as files of JSON, one a name.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::durable_rename;
use super::error::{IoContext as _, StoreError};
use oci_types::Digest;

/// Reads a record. What is missing or unreadable is no record.
pub fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = std::fs::read(path).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// Reads a record that must be there.
///
/// # Errors
///
/// [`StoreError::Damaged`] when it is not a record of this kind, [`StoreError::Io`] when it cannot be read.
pub fn read_whole<T: DeserializeOwned>(path: &Path) -> Result<T, StoreError> {
    let bytes = std::fs::read(path).io_context("read", path)?;
    serde_json::from_slice(&bytes)
        .map_err(|error| StoreError::Damaged { path: path.to_owned(), what: error.to_string() })
}

/// Writes a record that must outlive a power loss.
pub fn write_durable<T: Serialize>(
    staging: &Path,
    path: &Path,
    record: &T,
) -> Result<(), StoreError> {
    durable_rename::write(staging, path, &encode(path, record)?)
}

/// Writes a record that is a hint.
pub fn write_hint<T: Serialize>(staging: &Path, path: &Path, record: &T) -> Result<(), StoreError> {
    durable_rename::write_unsynced(staging, path, &encode(path, record)?)
}

/// Removes a record; one that is not there is removed already.
pub fn remove(path: &Path) -> Result<(), StoreError> {
    remove_if_there(path).map(|_| ())
}

/// Removes a record. Returns whether it was there.
pub fn remove_if_there(path: &Path) -> Result<bool, StoreError> {
    Ok(std::fs::remove_file(path).if_there("remove", path)?.is_some())
}

/// All readable records of a folder with their paths.
pub fn list<T: DeserializeOwned>(folder: &Path) -> Result<Vec<(PathBuf, T)>, StoreError> {
    let entries = std::fs::read_dir(folder).io_context("list", folder)?;
    let paths = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let records = paths.filter(|path| path.extension().is_some_and(|kind| kind == "json"));
    Ok(records.filter_map(|path| read(&path).map(|record| (path, record))).collect())
}

/// The file name of a record whose key is text of any length and content.
pub fn name(key: Digest) -> String {
    format!("{}.json", key.hex())
}

fn encode<T: Serialize>(path: &Path, record: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(record).io_context("encode", path)
}
