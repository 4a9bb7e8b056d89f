//! The special tokens that a job names. No token is added or renamed: what is named must be what the tokenizer has.

use crate::job::merge::Given;
use crate::job::quote::shorten;
use crate::job::read::Reader;
use crate::job::yaml::{Node, Value};

/// Names whose text decides what is learned.
const DECIDING: [&str; 3] = ["bos_token", "eos_token", "unk_token"];

/// Reads `special_tokens`: names with their texts, to be compared with the tokenizer's own.
pub(super) fn special_tokens(reader: &mut Reader<'_>) -> Vec<(String, String)> {
    let Some(given) = reader.given("special_tokens") else {
        return Vec::new();
    };
    let Value::Mapping(entries) = &given.node.value else {
        reader.wrong(given, "a mapping (special_tokens: {eos_token: </s>})");
        return Vec::new();
    };
    let mut named = Vec::new();
    for (key, node) in entries {
        match key.text.as_str() {
            _ if node.is_null() || is_empty_list(node) => {}
            "pad_token" => {
                let told = "special_tokens.pad_token: nothing is learned of padding, so no token is added or changed for it";
                reader.notices.push(told.to_owned());
            }
            name if DECIDING.contains(&name) => match &node.value {
                Value::Scalar { text, .. } if name == "unk_token" => {
                    let told = "special_tokens.unk_token: text becomes the tokenizer's own unknown token, if it has one";
                    reader.notices.push(told.to_owned());
                    named.push((name.to_owned(), text.clone()));
                }
                Value::Scalar { text, .. } => named.push((name.to_owned(), text.clone())),
                _ => of_token(reader, given, name, "must be a text"),
            },
            name => {
                let reason = "cannot be given: tokens cannot be added or renamed yet; use the tokenizer as it is";
                of_token(reader, given, name, reason);
            }
        }
    }
    named
}

fn of_token(reader: &mut Reader<'_>, given: &Given, name: &str, reason: &str) {
    reader.problem(given, format!("has `{}`, which {reason}", shorten(name)));
}

fn is_empty_list(node: &Node) -> bool {
    matches!(&node.value, Value::Sequence(items) if items.is_empty())
}
