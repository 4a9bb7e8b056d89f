//! Rows of instructions as conversations: what LLaMA-Factory's `formatting: alpaca` makes of them.
//!
//! Source of the shape: LLaMA-Factory, `data/README.md` (0.9.5): the user's turn is the instruction, a line end and the
//! input; `history` has earlier turns in pairs.

use serde_json::{Map, Value as Json, json};

use super::super::json::kind_of;
use super::message::Message;
use crate::job::FieldNames;

/// The messages that a row stands for.
pub(super) fn messages(
    row: &Map<String, Json>,
    fields: &FieldNames,
) -> Result<Vec<Message>, String> {
    let mut messages = Vec::new();
    let mut say = |role: &str, text: &str| {
        let json = json!({"role": role, "content": text});
        messages.push(Message {
            json,
            learned: None,
            partial: None,
        });
    };
    match text(row, &fields.system)? {
        "" => {}
        system => say("system", system),
    }
    for (number, turn) in history(row, &fields.history)?.iter().enumerate() {
        let texts = turn
            .as_array()
            .map(|pair| pair.iter().map(Json::as_str).collect::<Vec<_>>());
        let Some([Some(asked), Some(answered)]) = texts.as_deref() else {
            return Err(format!(
                "entry {} of `{}` must be a list of two texts, what was asked and what was answered",
                number + 1,
                fields.history
            ));
        };
        say("user", asked);
        say("assistant", answered);
    }
    let asked = [text(row, &fields.instruction)?, text(row, &fields.input)?];
    let asked: Vec<&str> = asked.into_iter().filter(|text| !text.is_empty()).collect();
    if asked.is_empty() {
        return Err(format!(
            "neither column `{}` nor `{}` says anything: an instruction is needed",
            fields.instruction, fields.input
        ));
    }
    say("user", &asked.join("\n"));
    if row.get(&fields.output).is_none_or(Json::is_null) {
        return Err(format!("no column `{}`, the answer", fields.output));
    }
    say("assistant", text(row, &fields.output)?);
    Ok(messages)
}

/// The text of a column, which is empty where there is none.
fn text<'a>(row: &'a Map<String, Json>, name: &str) -> Result<&'a str, String> {
    match row.get(name) {
        None | Some(Json::Null) => Ok(""),
        Some(Json::String(text)) => Ok(text),
        Some(Json::Array(_)) => Err(format!(
            "column `{name}` is a list: rows with several answers to choose from (as for DPO) are not learned from"
        )),
        Some(other) => Err(format!(
            "column `{name}` must be a string, not {}",
            kind_of(other)
        )),
    }
}

fn history<'a>(row: &'a Map<String, Json>, name: &str) -> Result<&'a [Json], String> {
    match row.get(name) {
        None | Some(Json::Null) => Ok(&[]),
        Some(Json::Array(turns)) => Ok(turns),
        Some(other) => Err(format!(
            "column `{name}` must be a list of earlier turns, not {}",
            kind_of(other)
        )),
    }
}
