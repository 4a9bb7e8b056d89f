//! Where the text of a `tokenizer.json` comes from: the file, or what is made of a `tokenizer.model`.

use std::path::{Path, PathBuf};

use super::special::TokenizerError;
use crate::files::model::{made_files, tokenizer_model};
use crate::files::stray;

/// The text of a `tokenizer.json`.
pub(super) struct Source {
    /// The file that is named where something is wrong with it.
    path: PathBuf,
    pub bytes: Vec<u8>,
    /// What it was made of, for people; None where it is a file.
    pub made_from: Option<String>,
}

impl Source {
    pub fn read(model_dir: &Path) -> Result<Self, TokenizerError> {
        if let Some(tokenizer) = tokenizer_model(model_dir)? {
            return Ok(Self {
                path: model_dir.join("tokenizer.model"),
                bytes: made_files(model_dir, &tokenizer)?.tokenizer.into_bytes(),
                made_from: Some(format!("tokenizer.model ({})", tokenizer.description())),
            });
        }
        let path = model_dir.join("tokenizer.json");
        if !path.is_file() {
            return Err(TokenizerError::missing(model_dir));
        }
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Self {
                path,
                bytes,
                made_from: None,
            }),
            Err(error) => Err(TokenizerError::Unreadable {
                path,
                reason: error.to_string(),
            }),
        }
    }

    pub fn parse(&self) -> Result<tokenizers::Tokenizer, TokenizerError> {
        tokenizers::Tokenizer::from_bytes(&self.bytes).map_err(|error| {
            let recognised = stray::recognised(&self.bytes).map(str::to_owned);
            TokenizerError::Unreadable {
                path: self.path.clone(),
                reason: recognised.unwrap_or_else(|| format!("not a tokenizer: {error}")),
            }
        })
    }
}
