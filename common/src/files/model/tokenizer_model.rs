//! The tokenizer of a model folder that has a `tokenizer.model` of SentencePiece and no `tokenizer.json`.
//!
//! In: a folder. Out: the tokenizer made of its files, or those that stand for it in a copy of the folder.

use std::path::Path;

use serde_json::Value;

use crate::files::error::read_bounded;
use crate::files::json::{json_text, read_json};
use crate::files::names::{
    CONFIG, LEGACY_TOKENS, MAX_COMPANION_BYTES, MAX_CONFIG_BYTES, SPECIAL_TOKENS_MAP, TOKENIZER,
    TOKENIZER_CONFIG, TOKENIZER_MODEL,
};
use crate::files::stray::recognised;
use crate::files::{FileError, atomic};
use crate::sentencepiece::{self, Beside, MadeFiles, SentencePiece};

/// Whether a folder has a tokenizer: as `tokenizer.json`, or as a `tokenizer.model` of which one is made.
pub fn has_tokenizer(dir: &Path) -> bool {
    [TOKENIZER, TOKENIZER_MODEL]
        .iter()
        .any(|name| dir.join(name).is_file())
}

/// Reads the `tokenizer.model` of a folder that has no `tokenizer.json`. None where that is there, or neither.
pub fn tokenizer_model(dir: &Path) -> Result<Option<SentencePiece>, FileError> {
    let path = dir.join(TOKENIZER_MODEL);
    if dir.join(TOKENIZER).is_file() || !path.is_file() {
        return Ok(None);
    }
    let bytes = read_bounded(&path, sentencepiece::MAX_BYTES)?;
    if let Some(reason) = recognised(&bytes) {
        return Err(FileError::malformed(&path, reason));
    }
    let beside = Beside {
        config: json(dir, CONFIG, MAX_CONFIG_BYTES)?,
        tokenizer_config: json(dir, TOKENIZER_CONFIG, MAX_COMPANION_BYTES)?,
        special_tokens_map: json(dir, SPECIAL_TOKENS_MAP, MAX_COMPANION_BYTES)?,
        added_tokens: json(dir, LEGACY_TOKENS, MAX_COMPANION_BYTES)?,
    };
    let tokenizer = SentencePiece::read(&bytes, beside);
    let tokenizer = tokenizer.map_err(|reason| FileError::malformed(&path, reason))?;
    Ok(Some(tokenizer))
}

/// The files that Transformers would have written of the tokenizer of this folder.
pub fn made_files(dir: &Path, tokenizer: &SentencePiece) -> Result<MadeFiles, FileError> {
    let files = tokenizer.files();
    files.map_err(|reason| FileError::malformed(&dir.join(TOKENIZER_MODEL), reason))
}

/// Writes the files that are made of the tokenizer of `dir` to a copy of the folder, where `dir` does not have them.
pub(super) fn complete(dir: &Path, to: &Path) -> Result<(), FileError> {
    let Some(tokenizer) = tokenizer_model(dir)? else {
        return Ok(());
    };
    let files = made_files(dir, &tokenizer)?;
    atomic::write(&to.join(TOKENIZER), files.tokenizer.as_bytes())?;
    let config = json_text(TOKENIZER_CONFIG, &files.config)?;
    atomic::write(&to.join(TOKENIZER_CONFIG), &config)
}

/// A JSON file of a folder; null where there is none.
fn json(dir: &Path, name: &str, limit: u64) -> Result<Value, FileError> {
    let path = dir.join(name);
    match path.is_file() {
        true => read_json(&path, limit),
        false => Ok(Value::Null),
    }
}
