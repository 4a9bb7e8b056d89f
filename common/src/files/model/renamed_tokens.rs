//! Gives added tokens other texts in a copy of a tokenizer's files, as Axolotl does (`modify_tokenizer_files` in
//! `loaders/tokenizer.py`).
//!
//! In: a folder with a copy, and texts by the ids of tokens. Out: the files that name tokens, with those texts.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::new_tokens::change;
use crate::files::FileError;
use crate::files::names::{LEGACY_TOKENS, SPECIAL_TOKENS_MAP, TOKENIZER, TOKENIZER_CONFIG};

/// Lists of special tokens that have no name of their own.
const LISTS: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// Gives the tokens these texts in every file that names them.
pub(super) fn rename(to: &Path, texts: &BTreeMap<u32, String>) -> Result<(), FileError> {
    // Files without a decoder have the old texts in the tokenizer alone.
    let mut old = BTreeMap::new();
    change(&to.join(TOKENIZER), |json| {
        old = rename_tokens(json, texts);
        !old.is_empty()
    })?;
    change(&to.join(TOKENIZER_CONFIG), |config| {
        let decoder = config.get_mut("added_tokens_decoder");
        for (id, token) in decoder.and_then(Value::as_object_mut).into_iter().flatten() {
            if let Some(text) = id.parse().ok().and_then(|id: u32| texts.get(&id)) {
                let content = token.get_mut("content");
                old.extend(content.and_then(|content| replace(content, text)));
            }
        }
        rename_listed(config, &old);
        true
    })?;
    change(&to.join(SPECIAL_TOKENS_MAP), |map| rename_listed(map, &old))?;
    change(&to.join(LEGACY_TOKENS), |tokens| {
        let Some(known) = tokens.as_object_mut() else {
            return false;
        };
        let renamed = std::mem::take(known).into_iter().map(|(text, id)| {
            let new = id.as_u64().and_then(|id| texts.get(&id.try_into().ok()?));
            (new.cloned().unwrap_or(text), id)
        });
        *known = renamed.collect();
        true
    })
}

/// Gives the tokens these texts in the content of a `tokenizer.json`, among its added tokens and in its vocabulary. Returns
/// the new text of each that it had.
pub fn rename_tokens(
    tokenizer: &mut Value,
    texts: &BTreeMap<u32, String>,
) -> BTreeMap<String, String> {
    let mut old = BTreeMap::new();
    let listed = tokenizer
        .get_mut("added_tokens")
        .and_then(Value::as_array_mut);
    for token in listed.into_iter().flatten() {
        let id = token["id"].as_u64().and_then(|id| u32::try_from(id).ok());
        if let Some(text) = id.and_then(|id| texts.get(&id)) {
            let content = token.get_mut("content");
            old.extend(content.and_then(|content| replace(content, text)));
        }
    }
    match tokenizer
        .get_mut("model")
        .and_then(|model| model.get_mut("vocab"))
    {
        Some(Value::Object(vocabulary)) => {
            for (text, new) in &old {
                if let Some(id) = vocabulary.shift_remove(text) {
                    vocabulary.insert(new.clone(), id);
                }
            }
        }
        Some(Value::Array(vocabulary)) => {
            for entry in vocabulary {
                rename_text(&mut entry[0], &old);
            }
        }
        _ => {}
    }
    old
}

/// Puts a text in place of another. Returns both.
fn replace(content: &mut Value, text: &str) -> Option<(String, String)> {
    let old = content.as_str()?.to_owned();
    *content = text.into();
    Some((old, text.to_owned()))
}

/// Renames what the lists of special tokens of a file name. Returns whether it has one.
fn rename_listed(file: &mut Value, texts: &BTreeMap<String, String>) -> bool {
    let mut has_one = false;
    for name in LISTS {
        let tokens: Vec<&mut Value> = match file.get_mut(name) {
            Some(Value::Array(tokens)) => tokens.iter_mut().collect(),
            Some(Value::Object(tokens)) => tokens.values_mut().collect(),
            _ => continue,
        };
        has_one = true;
        for token in tokens {
            match token {
                Value::Object(token) => {
                    if let Some(content) = token.get_mut("content") {
                        rename_text(content, texts);
                    }
                }
                token => rename_text(token, texts),
            }
        }
    }
    has_one
}

fn rename_text(text: &mut Value, texts: &BTreeMap<String, String>) {
    if let Some(new) = text.as_str().and_then(|text| texts.get(text)) {
        *text = new.as_str().into();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_file_that_names_a_token_has_its_new_text() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, json: Value| {
            std::fs::write(dir.path().join(name), json.to_string()).unwrap()
        };
        let token = |id: u32, text: &str| json!({"id": id, "content": text, "special": true});
        write(
            TOKENIZER,
            json!({"added_tokens": [token(2, "</s>"), token(3, "<r3>")], "model": {"vocab": {"a": 0, "<r3>": 3, "b": 1}}}),
        );
        write(
            TOKENIZER_CONFIG,
            json!({
                "added_tokens_decoder": {"2": {"content": "</s>"}, "3": {"content": "<r3>"}},
                "eos_token": "</s>", "extra_special_tokens": ["<r3>", {"content": "<r3>"}, "<x>"]
            }),
        );
        write(
            SPECIAL_TOKENS_MAP,
            json!({"additional_special_tokens": ["<r3>"]}),
        );
        write(LEGACY_TOKENS, json!({"<r3>": 3, "</s>": 2}));
        rename(dir.path(), &BTreeMap::from([(3, "<step>".to_owned())])).unwrap();
        let read = |name: &str| -> Value {
            serde_json::from_slice(&std::fs::read(dir.path().join(name)).unwrap()).unwrap()
        };
        let tokenizer = read(TOKENIZER);
        assert_eq!(
            tokenizer["added_tokens"],
            json!([token(2, "</s>"), token(3, "<step>")])
        );
        assert_eq!(
            tokenizer["model"]["vocab"],
            json!({"a": 0, "b": 1, "<step>": 3})
        );
        let config = read(TOKENIZER_CONFIG);
        assert_eq!(config["added_tokens_decoder"]["3"]["content"], "<step>");
        assert_eq!(config["added_tokens_decoder"]["2"]["content"], "</s>");
        assert_eq!(config["eos_token"], "</s>");
        let listed = json!(["<step>", {"content": "<step>"}, "<x>"]);
        assert_eq!(config["extra_special_tokens"], listed);
        assert_eq!(
            read(SPECIAL_TOKENS_MAP)["additional_special_tokens"],
            json!(["<step>"])
        );
        assert_eq!(read(LEGACY_TOKENS), json!({"<step>": 3, "</s>": 2}));
    }

    #[test]
    fn a_vocabulary_with_scores_keeps_them() {
        let mut json = json!({
            "added_tokens": [{"id": 1, "content": "<r>"}], "model": {"vocab": [["a", -0.1], ["<r>", 0.0]]}
        });
        let of = |id: u32, text: &str| BTreeMap::from([(id, text.to_owned())]);
        let renamed = rename_tokens(&mut json, &of(1, "<n>"));
        assert_eq!(renamed["<r>"], "<n>");
        assert_eq!(json["model"]["vocab"], json!([["a", -0.1], ["<n>", 0.0]]));
        assert!(rename_tokens(&mut json, &of(0, "<a>")).is_empty());
    }

    #[test]
    fn lists_are_renamed_where_the_tokenizer_alone_says_which_token_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let added = json!({"added_tokens": [{"id": 3, "content": "<r3>"}], "model": {"vocab": {"<r3>": 3}}});
        std::fs::write(path(TOKENIZER), added.to_string()).unwrap();
        let config = json!({"backend": "tokenizers", "extra_special_tokens": ["<r3>"]});
        std::fs::write(path(TOKENIZER_CONFIG), config.to_string()).unwrap();
        rename(dir.path(), &BTreeMap::from([(3, "<step>".to_owned())])).unwrap();
        let text = std::fs::read_to_string(path(TOKENIZER_CONFIG)).unwrap();
        assert!(text.contains("<step>") && !text.contains("<r3>"), "{text}");
    }
}
