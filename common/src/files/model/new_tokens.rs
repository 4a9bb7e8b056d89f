//! Adds tokens to a copy of a tokenizer's files, as its owner's program would have written them.
//!
//! In: a folder with a copy, and tokens with their ids. What the files say otherwise stays, to the byte in `tokenizer.json`.

use std::path::Path;

use serde_json::{Value, json};

use crate::files::error::read_bounded;
use crate::files::names::{LEGACY_TOKENS, MAX_COMPANION_BYTES, TOKENIZER, TOKENIZER_CONFIG};
use crate::files::{FileError, atomic};
use crate::job::NewToken;

const LIST: &str = "added_tokens";
const DECODER: &str = "added_tokens_decoder";

/// Adds the tokens, which have ids, to the files that name a tokenizer's tokens.
pub(super) fn add(to: &Path, tokens: &[NewToken]) -> Result<(), FileError> {
    let path = to.join(TOKENIZER);
    let bytes = read_bounded(&path, MAX_COMPANION_BYTES)?;
    let text =
        String::from_utf8(bytes).map_err(|error| FileError::malformed(&path, error.to_string()))?;
    let text = with_tokens(&text, tokens)
        .ok_or_else(|| FileError::malformed(&path, "has no list of added tokens"))?;
    atomic::write(&path, text.as_bytes())?;
    let in_decoder = |config: &mut Value| match config.get_mut(DECODER) {
        Some(Value::Object(decoder)) => {
            for (id, token) in entries(tokens) {
                decoder.insert(id.to_string(), described(token));
            }
            true
        }
        _ => false,
    };
    let in_legacy = |legacy: &mut Value| {
        let Some(known) = legacy.as_object_mut() else {
            return false;
        };
        for (id, token) in entries(tokens) {
            known.insert(token.text.clone(), json!(id));
        }
        true
    };
    change(&to.join(TOKENIZER_CONFIG), in_decoder)?;
    change(&to.join(LEGACY_TOKENS), in_legacy)
}

/// Rewrites a JSON file that is there, where `edit` changes it.
pub(super) fn change(path: &Path, edit: impl FnOnce(&mut Value) -> bool) -> Result<(), FileError> {
    if !path.is_file() {
        return Ok(());
    }
    let malformed = |error: serde_json::Error| FileError::malformed(path, error.to_string());
    let mut json =
        serde_json::from_slice(&read_bounded(path, MAX_COMPANION_BYTES)?).map_err(malformed)?;
    match edit(&mut json) {
        true => atomic::write(path, &serde_json::to_vec_pretty(&json).map_err(malformed)?),
        false => Ok(()),
    }
}

fn entries(tokens: &[NewToken]) -> impl Iterator<Item = (u32, &NewToken)> {
    tokens.iter().filter_map(|token| Some((token.id?, token)))
}

/// A token as `added_tokens_decoder` describes it.
fn described(token: &NewToken) -> Value {
    json!({
        "content": token.text,
        "lstrip": false,
        "normalized": false,
        "rstrip": false,
        "single_word": false,
        "special": token.is_special,
    })
}

/// The text of a `tokenizer.json` with further tokens at the end of its list. All else stays as it is written: numbers of a
/// vocabulary may not come back the same from a reader.
fn with_tokens(text: &str, tokens: &[NewToken]) -> Option<String> {
    let added: Vec<String> = entries(tokens)
        .map(|(id, token)| {
            let mut entry = json!({"id": id});
            if let (Value::Object(all), Value::Object(rest)) = (&mut entry, described(token)) {
                all.extend(rest);
            }
            entry.to_string()
        })
        .collect();
    let (end, is_empty) = end_of_list(text)?;
    let separator = if is_empty { "" } else { "," };
    let (before, after) = text.split_at(end);
    Some(format!("{before}{separator}{}{after}", added.join(",")))
}

/// Where the list of added tokens of a `tokenizer.json` ends, before its bracket, and whether it has no entry.
fn end_of_list(text: &str) -> Option<(usize, bool)> {
    let bytes = text.as_bytes();
    let (mut depth, mut at) = (0usize, 0);
    let mut list: Option<usize> = None;
    let mut key_before = false;
    while at < bytes.len() {
        match bytes[at] {
            b'"' => {
                let end = end_of_text(bytes, at)?;
                key_before = depth == 1 && &text[at + 1..end] == LIST;
                at = end;
            }
            b'[' | b'{' => {
                if key_before && list.is_none() && bytes[at] == b'[' {
                    list = Some(at);
                }
                depth += 1;
                key_before = false;
            }
            b']' | b'}' => {
                depth = depth.checked_sub(1)?;
                if let (Some(start), 1) = (list, depth) {
                    return Some((at, text[start + 1..at].trim().is_empty()));
                }
            }
            b':' | b' ' | b'\n' | b'\r' | b'\t' => {}
            _ => key_before = false,
        }
        at += 1;
    }
    None
}

/// Where a text that begins at this quote ends.
fn end_of_text(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start + 1;
    loop {
        match bytes.get(at)? {
            b'"' => return Some(at),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn token(text: &str, id: u32, is_special: bool) -> NewToken {
        NewToken {
            text: text.to_owned(),
            is_special,
            id: Some(id),
        }
    }

    #[test]
    fn tokens_join_the_list_and_nothing_else_changes() {
        let tokens = [token("<a\">", 7, true), token("<b>", 8, false)];
        for (before, known) in [
            ("", 0),
            (r#"{"id": 6, "content": "]\"added_tokens\": ["}"#, 1),
        ] {
            let text = format!(
                "{{\n \"version\": \"1.0\", \"model\": {{\"added_tokens\": [], \"vocab\": [[\"x\", -0.1000]]}},\n \"added_tokens\" : [ {before} ],\n \"z\": 1e-7}}"
            );
            let changed = with_tokens(&text, &tokens).unwrap();
            let json: Value = serde_json::from_str(&changed).unwrap();
            let list = json["added_tokens"].as_array().unwrap();
            assert_eq!(list.len(), known + 2);
            assert_eq!(list[known]["content"], "<a\">");
            assert_eq!(list[known]["id"], 7);
            assert_eq!(list[known]["special"], true);
            assert_eq!(list[known + 1]["special"], false);
            assert!(
                changed.contains("-0.1000") && changed.contains("1e-7"),
                "{changed}"
            );
            assert_eq!(json["model"]["added_tokens"], json!([]));
        }
        assert_eq!(
            with_tokens(r#"{"model": {"added_tokens": []}}"#, &tokens),
            None
        );
        assert_eq!(with_tokens(r#"{"added_tokens": ["#, &tokens), None);
    }

    #[test]
    fn every_file_that_lists_tokens_has_the_new_ones() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write(TOKENIZER, r#"{"added_tokens": [], "model": {}}"#);
        write(
            TOKENIZER_CONFIG,
            r#"{"added_tokens_decoder": {"2": {"content": "</s>"}}, "eos_token": "</s>"}"#,
        );
        write(LEGACY_TOKENS, r#"{"</s>": 2}"#);
        add(dir.path(), &[token("<a>", 3, true)]).unwrap();
        let json = |name: &str| -> Value {
            serde_json::from_slice(&std::fs::read(dir.path().join(name)).unwrap()).unwrap()
        };
        assert_eq!(json(TOKENIZER)["added_tokens"][0]["id"], 3);
        let config = json(TOKENIZER_CONFIG);
        assert_eq!(config["added_tokens_decoder"]["3"]["content"], "<a>");
        assert_eq!(config["added_tokens_decoder"]["2"]["content"], "</s>");
        assert_eq!(json(LEGACY_TOKENS), json!({"</s>": 2, "<a>": 3}));
    }
}
