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
    #[error(
        "the model would have {vocabulary} tokens, and embed_tokens_per_layer has rows for {rows}: tokens are not added to models whose \
         layers have inputs of their own; remove them from the job"
    )]
    Vocabulary { vocabulary: usize, rows: usize },
}
