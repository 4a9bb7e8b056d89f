//! The fixed text that rows of instructions are put into, without a chat template: Axolotl's, and those that a job defines.
//!
//! Enters: a format in which `{instruction}` and other names stand for what a row says, as Python's `str.format` reads it.
//! Leaves: its text with a row's own, or what is wrong with it.

use serde::{Deserialize, Serialize};

/// The text that a row of instructions becomes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptFormat {
    /// What a row with an input asks; `{instruction}`, `{input}` and `{system}` stand for its columns.
    pub with_input: String,
    /// What a row without an input asks.
    pub without_input: String,
    /// What comes before that, where there is a system message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<SystemFormat>,
    /// What is learned; `{output}` stands for the row's answer.
    pub answer: String,
    /// Number of end tokens after the answer.
    pub end_tokens: usize,
}

/// How a row's system message is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemFormat {
    /// Its text, in which `{system}` stands for the message.
    pub text: String,
    /// Message of rows that have no such column. None: each must have it.
    pub default: Option<String>,
}

/// Alpaca's words before an instruction with an input, and before one without (Taori et al., "Stanford Alpaca: An
/// Instruction-following LLaMA model", 2023).
pub const TASK: [&str; 2] = [
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
];

/// What rows with an input and without one ask where a job says that it gives their text, but does not (Axolotl).
pub(super) const USUAL_WITH_INPUT: &str = "{instruction} {input} ";
pub(super) const USUAL_WITHOUT_INPUT: &str = "{instruction} ";

impl PromptFormat {
    /// Alpaca's text.
    pub fn alpaca() -> Self {
        let [with_input, without_input] = TASK;
        Self::new(
            format!(
                "{with_input}\n\n### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n### Response:\n"
            ),
            format!("{without_input}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n"),
        )
    }

    /// A text for rows with an input, one for those without, and the answer as it is.
    pub fn new(with_input: impl Into<String>, without_input: impl Into<String>) -> Self {
        Self {
            with_input: with_input.into(),
            without_input: without_input.into(),
            system: None,
            answer: "{output}".to_owned(),
            end_tokens: 1,
        }
    }

    /// Whether a row's column of system messages is read.
    pub fn reads_system(&self) -> bool {
        let shows = |format: &String| format.contains("{system}");
        self.system.is_some() || shows(&self.with_input) || shows(&self.without_input)
    }

    /// Whether the job gives the text itself.
    pub fn is_of_the_job(&self) -> bool {
        let system = self.system.as_ref();
        system.is_some_and(|system| system.default.is_some())
    }

    /// Whether the job gives a text of its own for rows with an input.
    pub fn is_own_with_input(&self) -> bool {
        let shows_input =
            self.with_input.contains("{input}") && self.with_input != USUAL_WITH_INPUT;
        self.is_of_the_job() && shows_input
    }

    /// Whether it gives one for rows without an input.
    pub fn is_own_without_input(&self) -> bool {
        self.is_of_the_job() && self.without_input != USUAL_WITHOUT_INPUT
    }

    /// Whether a row must have an input.
    pub fn needs_input(&self) -> bool {
        self.without_input.contains("{input}")
    }

    /// Whether a row's input is read.
    pub fn reads_input(&self) -> bool {
        self.with_input.contains("{input}") || self.with_input != self.without_input
    }

    /// Whether a row's answer is read.
    pub fn reads_output(&self) -> bool {
        self.answer.contains("{output}")
    }
}

/// The format with these values in place of their names; the error says what is wrong with the format.
pub fn fill(format: &str, values: &[(&str, &str)]) -> Result<String, String> {
    let mut filled = String::with_capacity(format.len());
    let mut rest = format;
    while let Some(at) = rest.find(['{', '}']) {
        filled.push_str(&rest[..at]);
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            filled.push_str(brace);
            rest = after;
            continue;
        }
        let named = rest.split_once('}').filter(|_| brace == "{");
        let Some((name, after)) = named else {
            return Err(format!(
                "has a single `{brace}`: write {brace}{brace} where a brace is meant"
            ));
        };
        let Some((_, value)) = values.iter().find(|(known, _)| *known == name) else {
            let known: Vec<String> = values
                .iter()
                .map(|(name, _)| format!("{{{name}}}"))
                .collect();
            return Err(format!(
                "has `{{{name}}}`, and only {} stand for something; write {{{{ where a brace is meant",
                known.join(" and ")
            ));
        };
        filled.push_str(value);
        rest = after;
    }
    filled.push_str(rest);
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_filled_as_python_does_it() {
        let values = [("instruction", "a {input}"), ("input", "b")];
        for (format, filled) in [
            ("{instruction}|{input}", "a {input}|b"),
            ("{{{input}}} {{}}", "{b} {}"),
            ("ü {input}", "ü b"),
            ("", ""),
        ] {
            assert_eq!(fill(format, &values).as_deref(), Ok(filled));
        }
        for (format, word) in [
            ("{", "single `{`"),
            ("a}b", "single `}`"),
            ("{input", "single `{`"),
            (
                "{other}",
                "has `{other}`, and only {instruction} and {input}",
            ),
            ("{}", "has `{}`"),
            ("{input!r}", "has `{input!r}`"),
        ] {
            let reason = fill(format, &values).expect_err(format);
            assert!(reason.contains(word), "{format}: {reason}");
        }
    }
}
