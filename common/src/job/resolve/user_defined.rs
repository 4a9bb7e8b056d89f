//! The text that a job defines for rows of instructions: Axolotl's `type` as a mapping.
//!
//! Source of the names and defaults: Axolotl, `prompt_strategies/user_defined.py` (0.18).

use super::super::prompt_format::{PromptFormat, SystemFormat, fill};
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
    let with_input = format(reader, entry, "format", "{instruction} {input} ");
    let without_input = format(reader, entry, "no_input_format", "{instruction} ");
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
    if let Err(reason) = fill(&text, names)
        && let Some(given) = reader.given(&name)
    {
        reader.problem(given, reason);
    }
    text
}
