//! The text that a job defines for rows of instructions: Axolotl's `type` as a mapping.
//!
//! Source of the names and defaults: Axolotl, `prompt_strategies/user_defined.py` (0.18).

use super::super::prompt_format::{
    PromptFormat, SystemFormat, USUAL_WITH_INPUT, USUAL_WITHOUT_INPUT, fill,
};
use super::super::read::Reader;

/// Fields that only rows of a text that the job defines have.
pub(super) const FIELDS: [&str; 4] = [
    "system_prompt",
    "system_format",
    "format",
    "no_input_format",
];

/// Reads the formats of a dataset, and checks that they can be filled.
pub(super) fn prompt(reader: &mut Reader<'_>, entry: &str) -> PromptFormat {
    let with_input = format(reader, entry, "format", USUAL_WITH_INPUT);
    let without_input = format(reader, entry, "no_input_format", USUAL_WITHOUT_INPUT);
    let system = format(reader, entry, "system_format", "{system}");
    let default = reader.verbatim(&format!("{entry}.system_prompt"));
    PromptFormat {
        system: Some(SystemFormat {
            text: system,
            default: Some(default.unwrap_or_default()),
        }),
        ..PromptFormat::new(with_input, without_input)
    }
}

/// Reads one format; the names in it are those that Axolotl fills.
fn format(reader: &mut Reader<'_>, entry: &str, field: &str, usual: &str) -> String {
    let name = format!("{entry}.{field}");
    let Some(text) = reader.verbatim(&name) else {
        return usual.to_owned();
    };
    let names: &[(&str, &str)] = match field {
        "format" => &[("instruction", ""), ("input", "")],
        "no_input_format" => &[("instruction", "")],
        _ => &[("system", "")],
    };
    if let Err(reason) = shows_something(&text, names)
        && let Some(given) = reader.given(&name)
    {
        reader.problem(given, reason);
    }
    text
}

/// Checks that a format can be filled, and that what rows say is in it: else all of them would ask the same.
fn shows_something(text: &str, names: &[(&str, &str)]) -> Result<(), String> {
    const MARK: &str = "\0";
    let marked: Vec<(&str, &str)> = names.iter().map(|(name, _)| (*name, MARK)).collect();
    if fill(text, &marked)?.contains(MARK) {
        return Ok(());
    }
    let known: Vec<String> = names
        .iter()
        .map(|(name, _)| format!("{{{name}}}"))
        .collect();
    Err(format!(
        "shows nothing of a row: write {} where its text goes",
        known.join(" or ")
    ))
}
