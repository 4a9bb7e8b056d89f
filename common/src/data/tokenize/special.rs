//! The special tokens of a model by name, and what can be wrong with a tokenizer's files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;
use thiserror::Error;

use crate::files::model::tokenizer_model;
use crate::files::{FileError, stray};
use crate::sentencepiece::SPECIAL_NAMES;

/// Largest JSON file read whole, in bytes (tokenizer.json of big vocabularies is about 20 MB).
const MAX_JSON_BYTES: u64 = 1 << 30;

/// Why a tokenizer cannot be used.
#[derive(Debug, Error)]
pub enum TokenizerError {
    #[error(
        "{dir} has no tokenizer.json{}: the model folder needs its tokenizer (convert older ones with `AutoTokenizer.from_pretrained(..).save_pretrained(..)`)",
        .found.map(|name| format!(", and its {name} is not read")).unwrap_or_default(),
        dir = .dir.display()
    )]
    Missing {
        dir: PathBuf,
        /// A file of another make that is there instead.
        found: Option<&'static str>,
    },
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{path}: {reason}", path = .path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("{dir}: the {name} {text:?} is not in the tokenizer's vocabulary", dir = .dir.display())]
    UnknownSpecialToken {
        dir: PathBuf,
        name: String,
        text: String,
    },
    #[error("added_tokens_overrides: {0}")]
    NotRenamed(String),
    #[error("the tokenizer fails: {0}")]
    Failed(String),
}

/// The named special tokens (`bos_token`, `eos_token`, ...) as text.
#[derive(Clone, Debug, Default)]
pub struct SpecialTokens(pub(super) BTreeMap<String, String>);

/// Files of tokenizers that are read by their own programs alone.
const OTHER_FILES: [&str; 7] = [
    "tekken.json",
    "qwen.tiktoken",
    "tiktoken.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
];

impl TokenizerError {
    /// The error of a folder that has none of the files that are read.
    pub(super) fn missing(dir: &Path) -> Self {
        let mut others = OTHER_FILES.into_iter();
        Self::Missing {
            dir: dir.to_owned(),
            found: others.find(|name| dir.join(name).is_file()),
        }
    }
}

impl SpecialTokens {
    /// Reads the special tokens from `tokenizer_config.json`, else `special_tokens_map.json`. Either may be missing; of a
    /// tokenizer that is made of a `tokenizer.model` some are there all the same.
    pub fn load(model_dir: &Path) -> Result<Self, TokenizerError> {
        // What is wrong with that file is told when the tokenizer is read.
        if let Ok(Some(tokenizer)) = tokenizer_model(model_dir) {
            return Ok(Self(tokenizer.special_tokens()));
        }
        let mut tokens = BTreeMap::new();
        for file in ["special_tokens_map.json", "tokenizer_config.json"] {
            let path = model_dir.join(file);
            let Some(config) =
                read_json(&path).map_err(|reason| TokenizerError::Unreadable { path, reason })?
            else {
                continue;
            };
            for name in SPECIAL_NAMES {
                let text = match config.get(name) {
                    Some(Json::String(text)) => Some(text.as_str()),
                    Some(Json::Object(token)) => token.get("content").and_then(Json::as_str),
                    _ => None,
                };
                if let Some(text) = text {
                    tokens.insert(name.to_owned(), text.to_owned());
                }
            }
        }
        Ok(Self(tokens))
    }

    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self(
            pairs
                .into_iter()
                .map(|(name, text)| (name.to_owned(), text.to_owned()))
                .collect(),
        )
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    pub fn named(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(name, text)| (name.as_str(), text.as_str()))
    }
}

/// A JSON file, or None where there is none. The error is the reason alone, on one line.
pub(in crate::data) fn read_json(path: &Path) -> Result<Option<Json>, String> {
    let size = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    if size > MAX_JSON_BYTES {
        return Err(format!("{size} bytes is too long"));
    }
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| match stray::recognised(&bytes) {
            Some(reason) => reason.to_owned(),
            None => format!("not valid JSON: {error}"),
        })
}
