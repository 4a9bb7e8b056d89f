//! Why a model cannot answer prompts.

use std::path::{Path, PathBuf};

use common::files::FileError;
use common::files::model::no_folder;
use common::model::ModelError;
use thiserror::Error;

use crate::engine::EngineError;

/// Why a model cannot answer prompts.
#[derive(Debug, Error)]
pub enum InferenceError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Config(#[from] ModelError),
    #[error("{path}: the adapter changes {module}, which the model does not have")]
    UnknownModule { path: PathBuf, module: String },
    #[error("{path}: tensor {name} holds numbers that are not finite: the adapter is of no use")]
    BrokenAdapter { path: PathBuf, name: String },
    #[error("token {token} is outside the model's vocabulary of {vocabulary}")]
    TokenOutOfRange { token: u32, vocabulary: usize },
    #[error(
        "the model's output is not finite: its weights are damaged or not of this architecture"
    )]
    NotFinite,
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("the model fails: {0}")]
    Candle(#[from] candle_core::Error),
}

/// Checks that the folder is there, so that a mistyped path is told from a folder that lacks a file.
pub fn check_folder(path: &Path) -> Result<(), InferenceError> {
    match path.is_dir() {
        true => Ok(()),
        false => Err(no_folder(path).into()),
    }
}
