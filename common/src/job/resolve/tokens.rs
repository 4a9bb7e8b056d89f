//! Resolves the tokens that a job adds, and what is trained of the embedding and the output layer beside adapters.
//!
//! Sources of the names: Axolotl's `tokens` and `special_tokens`, LLaMA-Factory's `add_tokens`, `add_special_tokens` and
//! `additional_target`, PEFT's `trainable_token_indices` and `modules_to_save`.

use std::collections::BTreeMap;

use crate::job::merge::Given;
use crate::job::quote::shorten;
use crate::job::read::Reader;
use crate::job::tokens::{NewToken, TrainedRows, TrainedTokens};
use crate::job::yaml::{Node, Value};

/// Most tokens that a job adds, or whose rows it trains each by itself.
const MAX_TOKENS: usize = 100_000;
const OVERRIDES: &str = "added_tokens_overrides";
const INDICES: &str = "trainable_token_indices";
const MODULES: &str = "lora_modules_to_save";

/// Tokens that the tokenizer shall have, in the order in which they get their ids. Those that it has already are among them.
pub(super) fn new_tokens(reader: &mut Reader<'_>) -> Vec<NewToken> {
    let mut tokens: Vec<NewToken> = Vec::new();
    let mut add = |texts: Vec<String>, is_special| {
        for text in texts {
            match tokens.iter_mut().find(|token| token.text == text) {
                Some(known) => known.is_special |= is_special,
                None => tokens.push(NewToken {
                    text,
                    is_special,
                    id: None,
                }),
            }
        }
    };
    // Axolotl adds the special ones first.
    add(of_special_tokens(reader), true);
    add(texts(reader, "tokens"), false);
    add(texts(reader, "add_special_tokens"), true);
    if tokens.len() > MAX_TOKENS
        && let Some(given) = reader.given("tokens")
    {
        reader.problem(given, format!("names more than {MAX_TOKENS} tokens"));
        tokens.clear();
    }
    tokens
}

/// Axolotl's `added_tokens_overrides`: the texts that tokens get, by their ids.
pub(super) fn overrides(reader: &mut Reader<'_>) -> BTreeMap<u32, String> {
    let mut texts = BTreeMap::new();
    let Some(given) = reader.given(OVERRIDES) else {
        return texts;
    };
    let Value::Mapping(entries) = &given.node.value else {
        reader.wrong(given, "a mapping of the ids of tokens to their texts");
        return texts;
    };
    if entries.len() > MAX_TOKENS {
        reader.problem(given, format!("names more than {MAX_TOKENS} tokens"));
        return texts;
    }
    for (key, node) in entries {
        let id = key.text.trim().parse().ok();
        match (id, &node.value) {
            (Some(id), Value::Scalar { text, .. }) if !text.is_empty() && !node.is_null() => {
                texts.insert(id, text.clone());
            }
            _ => {
                let key = shorten(&key.text);
                let message = format!("has an entry `{key}` that is no id of a token with a text");
                reader.problem(given, message);
            }
        }
    }
    texts
}

/// A list of texts, or one with commas between them, as LLaMA-Factory writes it. White space belongs to tokens of a list.
fn texts(reader: &mut Reader<'_>, name: &str) -> Vec<String> {
    let Some(given) = reader.given(name) else {
        return Vec::new();
    };
    let texts: Option<Vec<String>> = match &given.node.value {
        Value::Sequence(items) => items
            .iter()
            .map(|item| match &item.value {
                Value::Scalar { text, .. } if !text.is_empty() => Some(text.clone()),
                _ => None,
            })
            .collect(),
        Value::Scalar { text, .. } => {
            let parts = text.split(',').map(str::trim);
            let parts = parts.filter(|part| !part.is_empty());
            Some(parts.map(str::to_owned).collect())
        }
        Value::Mapping(_) => None,
    };
    match (&given.node.value, &texts) {
        (Value::Mapping(_), _) => {
            let message = "is a mapping, and names no tokens to add; bos_token, eos_token and their like belong under special_tokens";
            reader.problem(given, message.to_owned());
        }
        (_, None) => reader.wrong(given, "a list of texts, none of them empty"),
        _ => {}
    }
    texts.unwrap_or_default()
}

/// Tokens that `special_tokens` names and that are added where the tokenizer lacks them.
fn of_special_tokens(reader: &mut Reader<'_>) -> Vec<String> {
    let Some(given) = reader.given("special_tokens") else {
        return Vec::new();
    };
    // What is wrong with it is told where the rest of it is read.
    let Value::Mapping(entries) = &given.node.value else {
        return Vec::new();
    };
    let mut texts = Vec::new();
    for (key, node) in entries.iter().filter(|(_, node)| !node.is_null()) {
        match (key.text.as_str(), &node.value) {
            ("eos_token", Value::Scalar { text, .. }) if !text.is_empty() => {
                texts.push(text.clone());
            }
            ("additional_special_tokens", Value::Sequence(items)) => {
                for item in items {
                    match &item.value {
                        Value::Scalar { text, .. } if !text.is_empty() => texts.push(text.clone()),
                        _ => not_texts(reader, given),
                    }
                }
            }
            ("additional_special_tokens", _) => not_texts(reader, given),
            _ => {}
        }
    }
    texts
}

fn not_texts(reader: &mut Reader<'_>, given: &Given) {
    let message = "has `additional_special_tokens`, which must be a list of texts";
    reader.problem(given, message.to_owned());
}

/// What is trained of the embedding and the output layer beside adapters, before it is known which tokens are new.
pub(super) fn trained_tokens(reader: &mut Reader<'_>) -> TrainedTokens {
    let mut trained = indices(reader);
    for name in reader.texts(MODULES, Some(',')).unwrap_or_default() {
        match (trained.rows_of(&name), reader.given(MODULES)) {
            (Some(rows), _) => *rows = TrainedRows::All,
            (None, Some(given)) => {
                let message = format!(
                    "names `{}`; what is trained as a whole beside adapters is embed_tokens or lm_head: remove it",
                    shorten(&name)
                );
                reader.problem(given, message);
            }
            (None, None) => {}
        }
    }
    trained
}

/// PEFT's `trainable_token_indices`: a list is of the embedding, a mapping names the matrix of each.
fn indices(reader: &mut Reader<'_>) -> TrainedTokens {
    let mut trained = TrainedTokens::default();
    let Some(given) = reader.given(INDICES) else {
        return trained;
    };
    match &given.node.value {
        Value::Mapping(entries) => {
            for (key, node) in entries {
                let Some(rows) = trained.rows_of(&key.text) else {
                    let message = format!(
                        "has `{}`; rows are trained of embed_tokens and lm_head",
                        shorten(&key.text)
                    );
                    reader.problem(given, message);
                    continue;
                };
                rows.add(&ids(reader, given, node));
            }
        }
        _ => trained.embedding.add(&ids(reader, given, &given.node)),
    }
    trained
}

/// A list of ids, or their texts between commas as on a command line.
fn ids(reader: &mut Reader<'_>, given: &Given, node: &Node) -> Vec<u32> {
    let texts: Option<Vec<&str>> = match &node.value {
        Value::Sequence(items) => items
            .iter()
            .map(|item| match &item.value {
                Value::Scalar { text, .. } => Some(text.trim()),
                _ => None,
            })
            .collect(),
        Value::Scalar { text, .. } => Some(text.split(',').map(str::trim).collect()),
        Value::Mapping(_) => None,
    };
    let Some(texts) = texts else {
        reader.wrong(given, "a list of the ids of tokens");
        return Vec::new();
    };
    if texts.len() > MAX_TOKENS {
        reader.problem(given, format!("names more than {MAX_TOKENS} tokens"));
        return Vec::new();
    }
    let mut ids = Vec::new();
    for text in texts {
        match text.parse() {
            Ok(id) => ids.push(id),
            Err(_) => {
                let text = shorten(text);
                reader.problem(given, format!("has `{text}`, which is no id of a token"));
                return Vec::new();
            }
        }
    }
    ids
}
