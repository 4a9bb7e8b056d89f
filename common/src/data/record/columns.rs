//! Columns that other programs give a meaning: those that would change what is learned are refused, the others are noted.
//!
//! Enters: a row and which of its columns are read. Leaves: notes on the others, or why the row cannot be used. Names are
//! those of TRL, Axolotl, LLaMA-Factory, ms-swift and the OpenAI API.

use serde_json::{Map, Value as Json};

use super::super::notes::Note;

/// Kind of record that a row becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Conversation,
    Completion,
    Text,
}

/// Columns of rows that are compared with each other, as DPO and reward models want them.
const PREFERENCES: [&str; 5] = [
    "chosen",
    "rejected",
    "rejected_response",
    "rejected_messages",
    "chosen_response",
];

/// Columns of rows that are tokenised or masked already.
const TOKENISED: [&str; 8] = [
    "input_ids",
    "labels",
    "attention_mask",
    "completion_mask",
    "assistant_masks",
    "loss_mask",
    "token_ids",
    "prompt_ids",
];

/// Columns with what a model that only reads text never sees.
const MEDIA: [&str; 6] = ["images", "image", "videos", "video", "audios", "audio"];

/// Columns that weigh a whole row.
const WEIGHTS: [&str; 5] = [
    "weight",
    "train",
    "loss_weight",
    "sample_weight",
    "loss_scale",
];

/// Refuses a row whose columns ask for another method. `read` are the columns that the job names or that decide the kind.
pub fn refuse_other_methods(row: &Map<String, Json>, read: &[&str]) -> Result<(), String> {
    let asks = |name: &str| !read.contains(&name) && row.get(name).is_some_and(has_content);
    let preferences: Vec<String> = PREFERENCES
        .iter()
        .filter(|name| asks(name))
        .map(|name| format!("`{name}`"))
        .collect();
    // Who names `chosen` as the column to read knows what is beside it.
    let reads_preference = read.iter().any(|name| PREFERENCES.contains(name));
    if !preferences.is_empty() && !reads_preference {
        let way = match row.get("chosen") {
            Some(Json::Array(_)) => "field_messages: chosen",
            _ => "field_completion: chosen",
        };
        return Err(format!(
            "has {}: rows of preferences (as for DPO) are not learned from; to learn the chosen answers alone, say `{way}`",
            preferences.join(" and ")
        ));
    }
    if let Some(name) = TOKENISED
        .iter()
        .find(|name| asks(name) && row.get(**name).is_some_and(is_numbers))
    {
        return Err(format!(
            "has `{name}`, of a row that is tokenised already: such rows are read where they have `input_ids` and `labels` and `type` says no other shape (or `type: tokenized`); else remove the column"
        ));
    }
    Ok(())
}

/// Refuses a row with a column that says what of it is learned, or that holds what is not text.
pub fn refuse_unlike(row: &Map<String, Json>, read: &[&str], shape: Shape) -> Result<(), String> {
    let value_of = |name: &str| row.get(name).filter(|_| !read.contains(&name));
    if shape != Shape::Text {
        refuse_verdicts_and_media(&value_of)?;
    }
    for name in WEIGHTS {
        let Some(value) = value_of(name).filter(|value| !value.is_null()) else {
            continue;
        };
        let counts_whole = *value == Json::Bool(true) || value.as_f64() == Some(1.0);
        if !counts_whole && matches!(value, Json::Bool(_) | Json::Number(_)) {
            return Err(format!(
                "has `{name}`: {value}: whole rows are not weighed; leave such rows out, or remove the column"
            ));
        }
    }
    Ok(())
}

/// Refuses verdicts and media, which no plain text has beside it, but a prompt or a conversation may.
fn refuse_verdicts_and_media<'a>(
    value_of: &impl Fn(&str) -> Option<&'a Json>,
) -> Result<(), String> {
    for name in ["label", "kto_tag"] {
        if value_of(name).is_some_and(is_verdict) {
            return Err(format!(
                "has `{name}`, which says whether the answer is good (as for KTO): that is not learned from, and bad answers would be trained as good ones; keep the rows with good answers and remove the column"
            ));
        }
    }
    if let Some(name) = MEDIA
        .iter()
        .find(|name| value_of(name).is_some_and(has_content))
    {
        return Err(format!(
            "has `{name}`: only text is learned from; remove the column, or such rows"
        ));
    }
    Ok(())
}

/// Notes on the columns that nothing reads.
pub fn notes(row: &Map<String, Json>, read: &[&str]) -> Vec<Note> {
    row.iter()
        .filter(|(name, value)| !read.contains(&name.as_str()) && !value.is_null())
        .map(|(name, _)| Note::Column(name.clone()))
        .collect()
}

/// Advice on rows of a shape that is known, but not read.
pub fn hint(row: &Map<String, Json>) -> Option<&'static str> {
    let has = |name: &str| row.get(name).is_some_and(|value| !value.is_null());
    if has("conversations") || has("conversation") {
        return Some(
            "say which column holds the messages: `field_messages`, and `field_role: from` with `field_content: value` where messages have those",
        );
    }
    if has("instruction") {
        return Some(
            "for rows of instructions say `type: instructions` (a conversation) or `type: alpaca` (Axolotl's fixed text), and name the columns with field_instruction, field_input and field_output",
        );
    }
    if has("segments") {
        return Some("segments are objects with `text` and `label` (`type: input_output`)");
    }
    if has("data") || has("rows") || has("train") {
        return Some("is the list of rows inside it? Then make that list the file");
    }
    None
}

fn has_content(value: &Json) -> bool {
    match value {
        Json::Null => false,
        Json::Array(items) => !items.is_empty(),
        Json::Object(fields) => !fields.is_empty(),
        Json::String(text) => !text.is_empty(),
        Json::Bool(_) | Json::Number(_) => true,
    }
}

fn is_numbers(value: &Json) -> bool {
    matches!(value, Json::Array(items) if items.iter().all(Json::is_number))
}

/// Words (and numbers as text) that stand for a verdict on a row.
const VERDICTS: [&str; 28] = [
    "true",
    "false",
    "yes",
    "no",
    "0",
    "1",
    "good",
    "bad",
    "right",
    "wrong",
    "correct",
    "incorrect",
    "desirable",
    "undesirable",
    "positive",
    "negative",
    "chosen",
    "rejected",
    "accept",
    "reject",
    "accepted",
    "like",
    "dislike",
    "liked",
    "disliked",
    "thumbs_up",
    "thumbs_down",
    "preferred",
];

/// Whether a value is true or false, also as a word or as the 0 and 1 that spreadsheets make of them.
fn is_verdict(value: &Json) -> bool {
    match value {
        Json::Bool(_) => true,
        Json::Number(number) => matches!(number.as_f64(), Some(0.0 | 1.0 | -1.0)),
        Json::String(text) => {
            let word = text.trim().to_lowercase().replace([' ', '-'], "_");
            VERDICTS.contains(&word.as_str()) || text.trim() == "-1"
        }
        _ => false,
    }
}
