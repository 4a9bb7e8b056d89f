//! The special tokens that a job names. None is renamed: what is named must be what the tokenizer has, but for the end of texts,
//! which may be any token, and is added where the tokenizer does not have it (`tokens.rs`).

use crate::job::merge::Given;
use crate::job::quote::shorten;
use crate::job::read::Reader;
use crate::job::yaml::{Node, Value};

const EOS: &str = "eos_token";

/// Names whose text must be the tokenizer's.
const DECIDING: [&str; 2] = ["bos_token", "unk_token"];

/// Reads the rest of `special_tokens`: names with their texts, to be compared with the tokenizer's own.
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
            // Read where tokens are added.
            "additional_special_tokens" => {}
            // Read as the field of that name.
            EOS => {
                if !matches!(node.value, Value::Scalar { .. }) {
                    of_token(reader, given, EOS, "must be a text");
                }
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
                let reason = "cannot be given: no token is renamed; use the tokenizer as it is";
                of_token(reader, given, name, reason);
            }
        }
    }
    named
}

/// The token that ends texts, from the field or from `special_tokens`.
pub(super) fn eos_token(reader: &mut Reader<'_>) -> Option<String> {
    let named = reader.given("special_tokens").and_then(|given| {
        let Value::Mapping(entries) = &given.node.value else {
            return None;
        };
        let (_, node) = entries.iter().find(|(key, _)| key.text == EOS)?;
        match &node.value {
            Value::Scalar { text, .. } if !node.is_null() => Some((given, text.clone())),
            _ => None,
        }
    });
    let own = reader.text(EOS);
    match (own, named) {
        (Some(own), Some((given, other))) if own != other => {
            let reason = format!(
                "is {}, and the field {EOS} says otherwise; remove one",
                shorten(&other)
            );
            of_token(reader, given, EOS, &reason);
            None
        }
        (own, named) => own.or(named.map(|(_, text)| text)),
    }
}

fn of_token(reader: &mut Reader<'_>, given: &Given, name: &str, reason: &str) {
    reader.problem(given, format!("has `{}`, which {reason}", shorten(name)));
}

fn is_empty_list(node: &Node) -> bool {
    matches!(&node.value, Value::Sequence(items) if items.is_empty())
}
