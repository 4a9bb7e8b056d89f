//! Rows of instructions as Axolotl's `type: alpaca` reads them: a fixed text, without a chat template.
//!
//! Source of the text: Taori et al., "Stanford Alpaca: An Instruction-following LLaMA model" (2023).

use serde_json::{Map, Value as Json};

use super::super::json::kind_of;
use crate::job::FieldNames;

const WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an input that provides further context. \
     Write a response that appropriately completes the request.";
const WITHOUT_INPUT: &str = "Below is an instruction that describes a task. Write a response that appropriately completes the request.";

/// What a row asks, as the fixed text that an answer follows, and the answer.
pub(super) fn prompt_and_answer(
    row: &Map<String, Json>,
    fields: &FieldNames,
) -> Result<(String, String), String> {
    let instruction = text(row, &fields.instruction)?;
    let answer = text(row, &fields.output)?;
    let prompt = match optional(row, &fields.input)? {
        "" => format!("{WITHOUT_INPUT}\n\n### Instruction:\n{instruction}\n\n### Response:\n"),
        input => format!(
            "{WITH_INPUT}\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        ),
    };
    Ok((prompt, answer.to_owned()))
}

fn text<'a>(row: &'a Map<String, Json>, name: &str) -> Result<&'a str, String> {
    match row.get(name) {
        Some(Json::String(text)) => Ok(text),
        Some(other) => Err(format!(
            "column `{name}` must be a string, not {}",
            kind_of(other)
        )),
        None => Err(format!("no column `{name}`, which `type: alpaca` needs")),
    }
}

/// A text that need not be there.
fn optional<'a>(row: &'a Map<String, Json>, name: &str) -> Result<&'a str, String> {
    match row.get(name) {
        None | Some(Json::Null) => Ok(""),
        Some(_) => text(row, name),
    }
}
