//! Tokenizers of SentencePiece (`tokenizer.model`), made into the `tokenizer.json` that Transformers makes of them.
//!
//! Enters: the bytes of a `tokenizer.model`, and the JSON files beside it. Leaves: the text of a `tokenizer.json` and the
//! `tokenizer_config.json` that goes with it, or a reason why there is none. Reads no file itself. What each part has to be
//! is what Transformers 5 does where a folder has no `tokenizer.json` (`LlamaTokenizer`, `GemmaTokenizer`, and
//! `SpmConverter.build_tokenizer_from_spm_proto` for all others).

mod added;
mod added_token;
mod beside;
mod charsmap;
mod declared;
mod make;
mod merges;
mod model;
mod parts;

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value, json};

use self::added_token::AddedToken;
use self::beside::CONVERT;
use self::make::Make;
use self::model::{Kind, Model};

pub use self::beside::{Beside, SPECIAL_NAMES};
pub use self::model::MAX_BYTES;

/// A tokenizer of SentencePiece with the files beside it.
#[derive(Debug)]
pub struct SentencePiece {
    model: Model,
    make: Make,
    beside: Beside,
    /// The text of each piece, by id: some makes take another one where the configuration names the id.
    names: Vec<String>,
    ids: HashMap<String, u32>,
}

/// The files that Transformers would have written of a tokenizer.
#[derive(Clone, Debug, PartialEq)]
pub struct MadeFiles {
    /// Text of `tokenizer.json`.
    pub tokenizer: String,
    /// Content of `tokenizer_config.json`.
    pub config: Value,
}

impl SentencePiece {
    /// Reads a `tokenizer.model`. The error is the reason alone, on one line.
    pub fn read(bytes: &[u8], beside: Beside) -> Result<Self, String> {
        if let Some(what) = model::foreign(bytes) {
            return Err(format!("is {what}, and no SentencePiece model: {CONVERT}"));
        }
        let model = Model::read(bytes)?;
        let make = Make::of(&model, &beside)?;
        let names = match make {
            Make::Generic if !model.is_unigram => declared::renamed(&model, &beside)?,
            _ => model.pieces.iter().map(|p| p.text.clone()).collect(),
        };
        let mut ids = HashMap::with_capacity(names.len());
        for (id, name) in (0..).zip(&names) {
            if ids.insert(name.clone(), id).is_some() {
                return Err(format!("has the piece {name:?} twice"));
            }
        }
        Ok(Self {
            model,
            make,
            beside,
            names,
            ids,
        })
    }

    /// What the tokenizer is, for people.
    pub fn description(&self) -> String {
        let kind = if self.model.is_unigram {
            "Unigram"
        } else {
            "BPE"
        };
        let pieces = crate::text::count(self.names.len() as u64, "piece");
        let make = self.make.name();
        format!("SentencePiece, {kind} of {pieces}, as Transformers' {make}")
    }

    /// The special tokens by name: those of the files, and where they are silent those that the make begins with.
    pub fn special_tokens(&self) -> BTreeMap<String, String> {
        let named = SPECIAL_NAMES.into_iter();
        let named = named.filter_map(|name| Some((name.to_owned(), self.special(name)?.text)));
        named.collect()
    }

    /// The files that Transformers would have written.
    pub fn files(&self) -> Result<MadeFiles, String> {
        let added = self.added_tokens()?;
        let id_of = |text: &str| {
            let id = added.iter().find(|(_, token)| token.text == text);
            id.map(|(id, _)| *id)
        };
        let listed: Vec<Value> = added
            .iter()
            .map(|(id, token)| token.described(Some(*id)))
            .collect();
        let tokenizer = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": listed,
            "normalizer": self.normalizer(),
            "pre_tokenizer": self.pre_tokenizer(),
            "post_processor": self.post_processor(&id_of),
            "decoder": self.decoder(),
            "model": self.model_json(),
        });
        Ok(MadeFiles {
            tokenizer: tokenizer.to_string(),
            config: self.tokenizer_config(&added),
        })
    }

    /// A special token of this name, if there is one.
    fn special(&self, name: &str) -> Option<AddedToken> {
        let [config, map] = [
            &self.beside.tokenizer_config,
            &self.beside.special_tokens_map,
        ];
        let written = [config, map].map(|file| file.get(name));
        let token = written.into_iter().flatten().find_map(AddedToken::named);
        if token.is_some() || written.iter().any(Option::is_some) {
            return token;
        }
        let text = match self.make {
            Make::Llama => make::llama_default(name)?,
            Make::Gemma => make::gemma_default(name)?,
            Make::Generic => self.model.special(name)?,
        };
        let has_it = self.ids.contains_key(text);
        has_it.then(|| AddedToken::plain(text, true))
    }

    /// Whether the configuration sets this switch; its default where it says nothing.
    fn switch(&self, name: &str, default: bool) -> bool {
        match self.beside.tokenizer_config.get(name) {
            None => default,
            Some(value) => value.as_bool().unwrap_or(false),
        }
    }

    /// Pieces that a user's text becomes whole, by rising ids.
    fn user_defined(&self) -> impl Iterator<Item = &str> {
        let all = self.names.iter().zip(&self.model.pieces);
        let defined = all.filter(|(_, piece)| piece.kind == Kind::UserDefined);
        defined.map(|(name, _)| name.as_str())
    }

    fn model_json(&self) -> Value {
        if self.model.is_unigram {
            let scores = self.model.pieces.iter().map(|piece| f64::from(piece.score));
            let vocabulary = self.names.iter().zip(scores);
            return json!({
                "type": "Unigram",
                "unk_id": self.model.unk_id,
                "vocab": vocabulary.collect::<Vec<_>>(),
                "byte_fallback": self.model.byte_fallback,
            });
        }
        let vocabulary = self.names.iter().zip(0..);
        let vocabulary: Map<String, Value> = vocabulary
            .map(|(name, id)| (name.clone(), Value::from(id)))
            .collect();
        let (merges, unknown) = match self.make {
            Make::Generic => (
                self.merges_by_score(),
                Some(self.model.unk_piece().to_owned()),
            ),
            // Every byte has its piece there, so nothing is unknown.
            Make::Llama => (self.merges_by_id(), None),
            Make::Gemma => (
                self.merges_by_id(),
                self.special("unk_token").map(|token| token.text),
            ),
        };
        let is_generic = self.make == Make::Generic;
        json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown.filter(|text| self.ids.contains_key(text)),
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": !is_generic || self.model.byte_fallback,
            "ignore_merges": is_generic && self.user_defined().next().is_some(),
            "vocab": vocabulary,
            "merges": merges,
        })
    }

    /// The `tokenizer_config.json` with which Transformers reads the same tokenizer from the `tokenizer.json`.
    fn tokenizer_config(&self, added: &[(u32, AddedToken)]) -> Value {
        let mut config = match &self.beside.tokenizer_config {
            Value::Object(config) => config.clone(),
            _ => Map::new(),
        };
        for (name, text) in self.special_tokens() {
            if config.get(&name).is_none_or(Value::is_null) {
                config.insert(name, text.into());
            }
        }
        let decoder: Map<String, Value> = added
            .iter()
            .map(|(id, token)| (id.to_string(), token.described(None)))
            .collect();
        config.insert("added_tokens_decoder".to_owned(), decoder.into());
        // It names code that makes a tokenizer of the model, where one is there already.
        config.remove("auto_map");
        if self.make == Make::Generic {
            // Any other class would make some of its parts anew.
            config.insert("tokenizer_class".to_owned(), make::ANY_CLASS.into());
        }
        config.into()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
