//! Which shape a row has, told by its columns where the job does not say.

use serde_json::{Map, Value as Json};

use super::meant::columns_found;
use super::{columns, segments, tokenized};
use crate::job::{DatasetKind, DatasetSpec, FieldNames};

/// The shape of a row: what the job says, else what its columns tell.
pub(super) fn kind_of_row(
    spec: &DatasetSpec,
    row: &Map<String, Json>,
) -> Result<DatasetKind, String> {
    let FieldNames {
        messages,
        prompt,
        completion,
        text,
        instruction,
        output,
        ..
    } = &spec.fields;
    if spec.kind != DatasetKind::Auto {
        return Ok(spec.kind);
    }
    if tokenized::is_one(row) {
        return Ok(DatasetKind::Tokenized);
    }
    let has = |name: &String| row.get(name).is_some_and(|value| !value.is_null());
    let both = |one: &str, other: &str, kinds: [&str; 2]| {
        let [first, second] = kinds;
        Err(format!(
            "has `{one}` and `{other}`: say with `type: {first}` or `type: {second}` which is trained"
        ))
    };
    if has(messages) && has(completion) {
        both(messages, completion, ["messages", "prompt_completion"])
    } else if has(messages) {
        Ok(DatasetKind::Messages)
    } else if has(completion) && has(text) {
        both(completion, text, ["prompt_completion", "text"])
    } else if has(prompt) || has(completion) {
        Ok(DatasetKind::PromptCompletion)
    } else if has(text) && has(instruction) && has(output) {
        Err(format!(
            "has `{text}` and `{instruction}` with `{output}`: say with `type: instructions` (a conversation), `type: alpaca` (Axolotl's text) or `type: text` which is trained"
        ))
    } else if has(text) {
        Ok(DatasetKind::Text)
    } else if has(instruction) && has(output) {
        Ok(DatasetKind::Instructions)
    } else if segments::is_one(row) {
        Ok(DatasetKind::Segments)
    } else {
        let wanted = [messages, prompt, completion, text, instruction, output];
        let is_null = |name: &&&String| row.get(**name).is_some_and(Json::is_null);
        if let Some(name) = wanted.iter().find(is_null) {
            return Err(format!(
                "column `{name}` is null: write its text, or leave the row out"
            ));
        }
        let found = columns_found(row, &[messages, prompt, completion, text]);
        let hint = columns::hint(row).map(|hint| format!(": {hint}"));
        Err(format!(
            "no column `{messages}`, `{prompt}` and `{completion}`, or `{text}`; {found}{}",
            hint.unwrap_or_default()
        ))
    }
}
