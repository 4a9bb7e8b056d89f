//! The tokens that the JSON files beside a `tokenizer.model` declare.

use std::collections::{BTreeMap, HashSet};

use serde_json::Value;

use super::added_token::AddedToken;
use super::beside::{Beside, SPECIAL_NAMES};
use super::model::Model;

pub(super) const DECODER: &str = "added_tokens_decoder";
const EXTRA: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// The texts of the model's pieces with those that the configuration gives their ids instead (`_convert_from_sentencepiece` in
/// `tokenization_utils_tokenizers.py`).
pub(super) fn renamed(model: &Model, beside: &Beside) -> Result<Vec<String>, String> {
    let declared = declared(beside)?;
    let kept: HashSet<&str> = (0..)
        .zip(&model.pieces)
        .filter(|(id, _)| !declared.contains_key(id))
        .map(|(_, piece)| piece.text.as_str())
        .collect();
    let mut names: Vec<String> = model.pieces.iter().map(|p| p.text.clone()).collect();
    for (id, token) in &declared {
        if let Some(name) = names.get_mut(*id as usize)
            && !kept.contains(token.text.as_str())
        {
            name.clone_from(&token.text);
        }
    }
    Ok(names)
}

/// The tokens of `added_tokens_decoder`, and where there is none of `added_tokens.json`, by id.
pub(super) fn declared(beside: &Beside) -> Result<BTreeMap<u32, AddedToken>, String> {
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
pub(super) struct Extra {
    pub tokens: Vec<AddedToken>,
    /// Whether it lists them, without names: those of the model do not count then.
    pub is_list: bool,
}

/// The further special tokens of `tokenizer_config.json`.
pub(super) fn extra(beside: &Beside) -> Result<Extra, String> {
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
