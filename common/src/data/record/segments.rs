//! Rows of texts that say of themselves whether they are learned: Axolotl's `input_output`.

use serde_json::{Map, Value as Json};

use super::super::json::kind_of;
use super::meant::columns_found;
use super::{Segment, Segments, column};

/// The column that the texts are in.
pub(super) const SEGMENTS: &str = "segments";

/// Whether a row is of this shape by its column.
pub(super) fn is_one(row: &Map<String, Json>) -> bool {
    let first = row.get(SEGMENTS).and_then(|list| list.get(0));
    first.is_some_and(|first| first.get("label").is_some() && first.get("text").is_some())
}

/// The texts of a row. Nothing is put before, between or after them.
pub(super) fn read(row: &Map<String, Json>) -> Result<Segments, String> {
    let list = match column(row, SEGMENTS)? {
        Json::Array(list) if list.is_empty() => {
            return Err(format!("column `{SEGMENTS}` has no segments"));
        }
        Json::Array(list) => list,
        other => {
            return Err(format!(
                "column `{SEGMENTS}` must be a list of objects with `text` and `label`, not {}",
                kind_of(other)
            ));
        }
    };
    let list = list.iter().zip(1..).map(|(item, number)| {
        segment(item).map_err(|reason| format!("segment {number}: {reason}"))
    });
    Ok(Segments {
        list: list.collect::<Result<_, _>>()?,
        begins_special: false,
        end_tokens: 0,
    })
}

fn segment(item: &Json) -> Result<Segment, String> {
    let Json::Object(fields) = item else {
        return Err(format!(
            "must be an object with `text` and `label`, not {}",
            kind_of(item)
        ));
    };
    let value = |name: &str| {
        let found = fields.get(name);
        found.ok_or_else(|| format!("no `{name}`; {}", columns_found(fields, &[name])))
    };
    let learned = match value("label")? {
        Json::Bool(learned) => *learned,
        Json::Number(number) if number.as_f64() == Some(0.0) => false,
        Json::Number(number) if number.as_f64() == Some(1.0) => true,
        other => return Err(format!("`label` must be true or false, not {other}")),
    };
    if let Some(other) = fields
        .keys()
        .find(|key| !["text", "label"].contains(&key.as_str()))
    {
        return Err(format!(
            "`{other}` is not read: a segment has `text` and `label`"
        ));
    }
    match value("text")? {
        Json::String(text) => Ok(Segment {
            text: text.clone(),
            learned,
        }),
        other => Err(format!("`text` must be a string, not {}", kind_of(other))),
    }
}
