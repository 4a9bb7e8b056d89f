//! The added tokens of a tokenizer: those that the model itself keeps from being divided, and those of the files beside it
//! (`TokenizersBackend.__init__` in `tokenization_utils_tokenizers.py`). What a file says of a token comes before what the
//! model says.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::{Value, json};

use super::make::Make;
use super::model::{Kind, Model};
use super::{Beside, SPECIAL_NAMES, SentencePiece};

const DECODER: &str = "added_tokens_decoder";
const EXTRA: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// A token that text becomes whole, and where it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AddedToken {
    pub text: String,
    is_special: bool,
    normalized: bool,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
}

impl AddedToken {
    pub fn plain(text: &str, is_special: bool) -> Self {
        Self {
            text: text.to_owned(),
            is_special,
            normalized: !is_special,
            single_word: false,
            lstrip: false,
            rstrip: false,
        }
    }

    /// A token that a file describes. None where it is not described as it should be.
    fn parse(json: &Value) -> Option<Self> {
        let flag = |name: &str, default: bool| match &json[name] {
            Value::Null => Some(default),
            other => other.as_bool(),
        };
        let text = json["content"].as_str().filter(|text| !text.is_empty())?;
        let is_special = flag("special", false)?;
        Some(Self {
            text: text.to_owned(),
            is_special,
            normalized: flag("normalized", !is_special)?,
            single_word: flag("single_word", false)?,
            lstrip: flag("lstrip", false)?,
            rstrip: flag("rstrip", false)?,
        })
    }

    /// A special token as a file names it: its text, or its description.
    pub fn named(json: &Value) -> Option<Self> {
        match json {
            Value::String(text) if !text.is_empty() => Some(Self::plain(text, true)),
            Value::Object(_) => Some(Self {
                is_special: true,
                ..Self::parse(json)?
            }),
            _ => None,
        }
    }

    /// The token as `tokenizer.json` describes it, and without an id as `tokenizer_config.json` does.
    pub fn described(&self, id: Option<u32>) -> Value {
        let mut token = json!({
            "id": id,
            "content": self.text,
            "single_word": self.single_word,
            "lstrip": self.lstrip,
            "rstrip": self.rstrip,
            "normalized": self.normalized,
            "special": self.is_special,
        });
        if let (None, Some(fields)) = (id, token.as_object_mut()) {
            fields.shift_remove("id");
        }
        token
    }
}

/// The added tokens of a tokenizer, by rising ids.
pub(super) fn list(tokenizer: &SentencePiece) -> Result<Vec<(u32, AddedToken)>, String> {
    let mut all = Found::of(tokenizer);
    for (id, token) in declared(&tokenizer.beside)? {
        let normalized = match tokenizer.make {
            // Found in the text as it is, so that each part between them begins as a text does.
            Make::Generic if tokenizer.model.add_dummy_prefix => false,
            _ => token.normalized,
        };
        all.declare(
            id,
            AddedToken {
                normalized,
                ..token
            },
        )?;
    }
    for token in SPECIAL_NAMES
        .iter()
        .filter_map(|name| tokenizer.special(name))
    {
        // One that the vocabulary does not have is missed where it is needed.
        if tokenizer.ids.contains_key(&token.text) {
            all.add(token);
        }
    }
    let extra = extra(&tokenizer.beside)?;
    extra.tokens.into_iter().for_each(|token| all.add(token));
    if !extra.is_list {
        of_model(tokenizer).for_each(|token| all.add(token));
    }
    Ok(all.by_id.into_iter().collect())
}

/// Added tokens by their ids.
struct Found<'a> {
    vocabulary: &'a HashMap<String, u32>,
    by_id: BTreeMap<u32, AddedToken>,
    texts: HashSet<String>,
}

impl<'a> Found<'a> {
    fn of(tokenizer: &'a SentencePiece) -> Self {
        Self {
            vocabulary: &tokenizer.ids,
            by_id: BTreeMap::new(),
            texts: HashSet::new(),
        }
    }

    /// The id that the vocabulary has for a text, or the one that follows.
    fn id_of(&self, text: &str) -> u32 {
        let next = || {
            let last = self.by_id.keys().next_back().map_or(0, |id| id + 1);
            last.max(self.vocabulary.len() as u32)
        };
        self.vocabulary.get(text).copied().unwrap_or_else(next)
    }

    fn declare(&mut self, id: u32, token: AddedToken) -> Result<(), String> {
        let found = self.id_of(&token.text);
        if found != id {
            return Err(format!(
                "gives the token {:?} the id {found}, but by {DECODER} or added_tokens.json beside it it has {id}; one of the files is of another tokenizer",
                token.text
            ));
        }
        self.add(token);
        Ok(())
    }

    fn add(&mut self, token: AddedToken) {
        if self.texts.insert(token.text.clone()) {
            let id = self.id_of(&token.text);
            self.by_id.insert(id, token);
        }
    }
}

/// The pieces that the model keeps whole.
fn of_model(tokenizer: &SentencePiece) -> impl Iterator<Item = AddedToken> {
    // The generic make keeps those of users whole while it divides a text.
    let is_added = |kind: Kind| match kind {
        Kind::Control => true,
        Kind::UserDefined => tokenizer.make != Make::Generic,
        _ => false,
    };
    let pieces = tokenizer.names.iter().zip(&tokenizer.model.pieces);
    let added = pieces.filter(move |(_, piece)| is_added(piece.kind));
    added.map(|(name, piece)| AddedToken {
        normalized: false,
        ..AddedToken::plain(name, piece.kind == Kind::Control)
    })
}

/// The texts of the model's pieces with those that the configuration gives their ids instead (`_convert_from_sentencepiece` in
/// `tokenization_utils_tokenizers.py`).
pub(super) fn renamed(model: &Model, beside: &Beside) -> Result<Vec<String>, String> {
    let declared = declared(beside)?;
    let own = |id: u32| {
        model
            .pieces
            .get(id as usize)
            .map(|piece| piece.text.as_str())
    };
    let kept: HashSet<&str> = (0..)
        .zip(&model.pieces)
        .filter(|(id, _)| !declared.contains_key(id))
        .map(|(_, piece)| piece.text.as_str())
        .collect();
    let mut names: Vec<String> = model.pieces.iter().map(|p| p.text.clone()).collect();
    for (id, token) in &declared {
        if own(*id).is_some() && !kept.contains(token.text.as_str()) {
            names[*id as usize].clone_from(&token.text);
        }
    }
    Ok(names)
}

/// The tokens of `added_tokens_decoder`, and where there is none of `added_tokens.json`, by id.
fn declared(beside: &Beside) -> Result<BTreeMap<u32, AddedToken>, String> {
    let mut tokens = BTreeMap::new();
    if let Some(decoder) = beside.tokenizer_config.get(DECODER) {
        let wrong =
            |what: &str| format!("cannot be used: {DECODER} of tokenizer_config.json {what}");
        let entries = decoder
            .as_object()
            .ok_or_else(|| wrong("is not an object"))?;
        for (id, token) in entries {
            let parsed = id.parse().ok().zip(AddedToken::parse(token));
            let (number, token) = parsed
                .ok_or_else(|| wrong(&format!("has an entry {id:?} that is no id with a token")))?;
            tokens.insert(number, token);
        }
        return Ok(tokens);
    }
    let wrong = |what: &str| format!("cannot be used: added_tokens.json {what}");
    let entries = match &beside.added_tokens {
        Value::Null => return Ok(tokens),
        entries => entries
            .as_object()
            .ok_or_else(|| wrong("is not an object"))?,
    };
    let named = |file: &Value, text: &str| {
        let mut names = SPECIAL_NAMES.iter();
        names.any(|name| AddedToken::named(&file[*name]).is_some_and(|token| token.text == text))
    };
    let extra = extra(beside)?;
    for (text, id) in entries {
        let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let number = number.filter(|_| !text.is_empty());
        let number = number.ok_or_else(|| wrong(&format!("gives {text:?} no id")))?;
        let is_special = named(&beside.tokenizer_config, text)
            || named(&beside.special_tokens_map, text)
            || extra.tokens.iter().any(|token| token.text == *text);
        tokens.insert(number, AddedToken::plain(text, is_special));
    }
    Ok(tokens)
}

/// Further special tokens of a configuration.
#[derive(Default)]
struct Extra {
    tokens: Vec<AddedToken>,
    /// Whether it lists them, without names: those of the model do not count then.
    is_list: bool,
}

fn extra(beside: &Beside) -> Result<Extra, String> {
    let mut extra = Extra::default();
    for field in EXTRA {
        let wrong = |what: &str| format!("cannot be used: {field} of tokenizer_config.json {what}");
        let tokens: Vec<&Value> = match beside.tokenizer_config.get(field) {
            None => continue,
            Some(Value::Object(tokens)) => tokens.values().collect(),
            Some(Value::Array(tokens)) => {
                extra.is_list = true;
                tokens.iter().collect()
            }
            Some(Value::Null) => {
                extra.is_list = true;
                Vec::new()
            }
            Some(other) => return Err(wrong(&format!("is {other}, not a list of tokens"))),
        };
        for token in tokens {
            let parsed = AddedToken::named(token);
            let parsed = parsed.ok_or_else(|| wrong(&format!("has {token}, which is no token")))?;
            extra.tokens.push(parsed);
        }
    }
    Ok(extra)
}
