//! Lists the folders of a store: names, and generations of objects.

use std::path::{Path, PathBuf};

use super::error::StoreError;

/// The newest generation that may be published: the highest that is not marked damaged.
pub(super) fn current_generation(key_folder: &Path) -> Result<Option<u32>, StoreError> {
    // Nearly every object has one generation; one look saves a listing on the hot path.
    let exists = |name: &str| key_folder.join(name).symlink_metadata().is_ok();
    if exists("1") && !exists("1.damaged") && !exists("2") {
        return Ok(Some(1));
    }
    let names = names(key_folder)?;
    let damaged = |number: u32| names.iter().any(|name| *name == format!("{number}.damaged"));
    let numbers = names.iter().filter_map(|name| name.parse::<u32>().ok());
    Ok(numbers.filter(|&number| !damaged(number)).max())
}

pub(super) fn newest_generation(key_folder: &Path) -> Result<Option<u32>, StoreError> {
    let number = |name: &String| name.split('.').next()?.parse::<u32>().ok();
    Ok(names(key_folder)?.iter().filter_map(number).max())
}

fn is_no_folder(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory)
}

/// The names in a folder; none where there is no folder.
pub(super) fn names(folder: &Path) -> Result<Vec<String>, StoreError> {
    let failed = |error| StoreError::io("list", folder, error);
    let entries = match std::fs::read_dir(folder) {
        // Whatever is not a folder holds nothing of ours.
        Err(error) if is_no_folder(&error) => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        Ok(entry.map_err(failed)?.file_name().to_string_lossy().into_owned())
    };
    entries.map(name).collect()
}

/// Returns the path of the mark that says that a generation is damaged.
pub(super) fn mark_of(generation: &Path) -> PathBuf {
    generation.with_extension("damaged")
}
