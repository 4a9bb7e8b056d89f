//! JSON files of models and adapters: read within a bound, written as we write them.

use std::path::Path;

use super::error::{FileError, read_bounded};
use super::{atomic, stray};

/// Reads a JSON file of at most `limit` bytes.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(
    path: &Path,
    limit: u64,
) -> Result<T, FileError> {
    let bytes = read_bounded(path, limit)?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let reason = stray::recognised(&bytes).map(str::to_owned);
        FileError::malformed(
            path,
            reason.unwrap_or_else(|| format!("not valid: {error}")),
        )
    })
}

/// Writes a value as a JSON file, whole or not at all.
pub(in crate::files) fn write_json(
    path: &Path,
    value: &impl serde::Serialize,
) -> Result<(), FileError> {
    atomic::write(path, &json_text(&path.to_string_lossy(), value)?)
}

/// The text of a value for the JSON file of that name.
pub(in crate::files) fn json_text(
    name: &str,
    value: &impl serde::Serialize,
) -> Result<Vec<u8>, FileError> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|error| FileError::malformed(Path::new(name), error.to_string()))?;
    text.push(b'\n');
    Ok(text)
}
