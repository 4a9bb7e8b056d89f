//! Why a model cannot be trained here.

use std::path::PathBuf;

use thiserror::Error;

use crate::files::FileError;

/// Why a model cannot be trained here.
#[derive(Debug, Error)]
pub enum ModelError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{path}: {feature} is not supported")]
    Feature { path: PathBuf, feature: String },
}
