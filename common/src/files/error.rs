//! What can be wrong with a file, and the bounded reads that say so.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// What is wrong with a file; every variant names it.
#[derive(Debug, Error)]
pub enum FileError {
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What could not be done, a verb: read, write, rename.
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{path}: {reason}")]
    Malformed { path: PathBuf, reason: String },
    #[error(
        "{path} is truncated: tensor {tensor} ends at byte {expected}, but the file has {found} bytes; copy or download it again"
    )]
    Truncated {
        path: PathBuf,
        tensor: String,
        expected: u64,
        found: u64,
    },
    #[error("{path}: no tensor {tensor}")]
    MissingTensor { path: PathBuf, tensor: String },
    #[error("{path}: tensor {tensor} has shape {found:?} where {expected:?} was expected")]
    Shape {
        path: PathBuf,
        tensor: String,
        expected: Vec<usize>,
        found: Vec<usize>,
    },
    #[error("{path}: the architecture {found} is not supported; supported are {supported}")]
    UnsupportedArchitecture {
        path: PathBuf,
        found: String,
        supported: String,
    },
    #[error("{path}: {field} is {found}, which is not supported; {remedy}")]
    UnsupportedField {
        path: PathBuf,
        field: String,
        found: String,
        remedy: &'static str,
    },
    #[error("{path} has {found} bytes where the manifest says {expected}")]
    Size {
        path: PathBuf,
        expected: u64,
        found: u64,
    },
    #[error(
        "{path} does not have the digest in the manifest ({expected}): its content was changed"
    )]
    Digest { path: PathBuf, expected: String },
}

impl FileError {
    /// Makes the error of an operation of the system on `path`; `action` is a verb.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    /// The error of a file whose content cannot be used.
    pub fn malformed(path: &Path, reason: impl Into<String>) -> Self {
        Self::Malformed {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}

/// Reads a file of at most `limit` bytes.
pub(super) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
    let file = File::open(path).map_err(FileError::io("read", path))?;
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(FileError::io("read", path))?;
    if bytes.len() as u64 > limit {
        let reason = format!("has more than the {limit} bytes that such a file may have");
        return Err(FileError::malformed(path, reason));
    }
    Ok(bytes)
}
