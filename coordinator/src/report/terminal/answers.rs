//! The test prompts, answered before and after training.

use super::text::{Style, cut, indent, visible};

const MAX_CHARACTERS: usize = 800;

/// One test prompt and what the model said to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub prompt: String,
    /// The base model's answer; None where that was not asked.
    pub before: Option<String>,
    pub after: String,
}

pub(super) fn render(answers: &[Answer], style: Style) -> String {
    let mut text = String::new();
    for answer in answers {
        text += &format!(
            "\n{}\n",
            style.bold(&format!("> {}", visible(&answer.prompt)))
        );
        if let Some(before) = &answer.before {
            text += &block(&style.dim("before"), before);
        }
        text += &block(&style.trained("after "), &answer.after);
    }
    text
}

fn block(label: &str, answer: &str) -> String {
    let (answer, left_out) = cut(visible(answer).trim(), MAX_CHARACTERS);
    let rest = if left_out > 0 { "…" } else { "" };
    let answer = match answer.is_empty() {
        true => "(nothing)".to_owned(),
        false => format!("{answer}{rest}"),
    };
    let lines = indent(&answer, "          ");
    format!("  {label}  {}", lines.trim_start_matches(' '))
}
