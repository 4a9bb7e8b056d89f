//! Rows of instructions as Axolotl's types of a fixed text read them, without a chat template.

use serde_json::{Map, Value as Json};

use super::super::json::kind_of;
use super::{Segment, Segments};
use crate::job::{FieldNames, PromptFormat, fill};

/// The columns that a row of this text is read from.
pub(super) fn columns_read<'a>(prompt: &PromptFormat, fields: &'a FieldNames) -> Vec<&'a str> {
    let mut read = vec![fields.instruction.as_str()];
    let others = [
        (prompt.reads_input(), &fields.input),
        (prompt.reads_output(), &fields.output),
        (prompt.reads_system(), &fields.system),
    ];
    read.extend(
        others
            .iter()
            .filter(|(is_read, _)| *is_read)
            .map(|(_, name)| name.as_str()),
    );
    read
}

/// What a row asks, as the fixed text that an answer follows, and the answer.
pub(super) fn prompt_and_answer(
    row: &Map<String, Json>,
    fields: &FieldNames,
    prompt: &PromptFormat,
) -> Result<Segments, String> {
    let instruction = text(row, &fields.instruction)?;
    let input = match prompt.needs_input() {
        true => text(row, &fields.input)?,
        false if prompt.reads_input() => optional(row, &fields.input)?,
        false => "",
    };
    let system = match &prompt.system {
        _ if !prompt.reads_system() => "",
        Some(system) => match (row.get(&fields.system), &system.default) {
            (None, Some(default)) => default,
            (None, None) => text(row, &fields.system)?,
            _ => optional(row, &fields.system)?,
        },
        None => text(row, &fields.system)?,
    };
    let output = match prompt.reads_output() {
        true => text(row, &fields.output)?,
        false => "",
    };
    let mut asked = match &prompt.system {
        Some(format) if !system.is_empty() => fill(&format.text, &[("system", system)])?,
        _ => String::new(),
    };
    let format = match input.is_empty() {
        true => &prompt.without_input,
        false => &prompt.with_input,
    };
    let values = [
        ("instruction", instruction),
        ("input", input),
        ("system", system),
    ];
    asked.push_str(&fill(format, &values)?);
    let answer = fill(&prompt.answer, &[("output", output)])?;
    let list = [(asked, false), (answer, true)].map(|(text, learned)| Segment { text, learned });
    Ok(Segments {
        list: list.into(),
        begins_special: true,
        end_tokens: prompt.end_tokens,
    })
}

fn text<'a>(row: &'a Map<String, Json>, name: &str) -> Result<&'a str, String> {
    match row.get(name) {
        Some(Json::String(text)) => Ok(text),
        Some(other) => Err(format!(
            "column `{name}` must be a string, not {}",
            kind_of(other)
        )),
        None => Err(format!(
            "no column `{name}`, which `type` of the dataset needs"
        )),
    }
}

/// A text that need not be there.
fn optional<'a>(row: &'a Map<String, Json>, name: &str) -> Result<&'a str, String> {
    match row.get(name) {
        None | Some(Json::Null) => Ok(""),
        Some(_) => text(row, name),
    }
}
