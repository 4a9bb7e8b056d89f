//! What is wrong with a chat template, or with a conversation that it does not take.

use std::path::PathBuf;

use thiserror::Error;

use super::jinja::{Failure, MAX_BYTES, Reason};

/// Longest text of a template's own that is told.
const MAX_TOLD_CHARS: usize = 2000;

/// Why a chat template cannot be used, or does not take a conversation.
#[derive(Debug, Error)]
pub enum TemplateError {
    #[error(
        "{dir} has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja): use a chat model, or data with `text` or `prompt` and `completion`", dir = .dir.display()
    )]
    Missing { dir: PathBuf },
    #[error("{path}: {reason}", path = .path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("{path}: the chat template does not parse: {reason}", path = .path.display())]
    Syntax { path: PathBuf, reason: String },
    #[error("the chat template raises: {0}")]
    Raised(String),
    #[error("the chat template fails: {0}")]
    Failed(String),
    #[error("the chat template builds more than {MAX_BYTES} bytes: no row is tried after this one")]
    TooLong,
    #[error("the chat template does not come to an end: no row is tried after this one")]
    Endless,
    #[error("{STOPPED}")]
    Stopped,
    #[error(
        "the chat template changes the text inside its generation marks, so that what is learned cannot be told: remove the marks ({{% generation %}}) from the template"
    )]
    UnclearMarks,
}

/// Message for a row that was not tried because the template had no end, or became too long, at another one.
pub const STOPPED: &str = "the chat template was given up at another row";

impl TemplateError {
    pub(super) fn of(failure: &Failure) -> Self {
        let text = |text: &str| visible(text);
        match &failure.reason {
            Reason::Raised(message) => Self::Raised(text(message)),
            Reason::Endless => Self::Endless,
            Reason::TooLarge => Self::TooLong,
            Reason::Syntax(reason) | Reason::Failed(reason) => {
                Self::Failed(with_line(&text(reason), failure.line))
            }
        }
    }

    pub(super) fn syntax(path: PathBuf, failure: &Failure) -> Self {
        let reason = match &failure.reason {
            Reason::Raised(reason) | Reason::Syntax(reason) | Reason::Failed(reason) => {
                visible(reason)
            }
            Reason::Endless | Reason::TooLarge => "it is too long".to_owned(),
        };
        Self::Syntax {
            path,
            reason: with_line(&reason, failure.line),
        }
    }
}

fn with_line(reason: &str, line: usize) -> String {
    match line {
        0 => reason.to_owned(),
        line => format!("{reason} (line {line} of the template)"),
    }
}

/// One line that a terminal shows and does not obey.
fn visible(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars().take(MAX_TOLD_CHARS) {
        match c {
            '\n' | '\r' | '\t' => out.push(' '),
            c if c.is_control() => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    if text.chars().nth(MAX_TOLD_CHARS).is_some() {
        out.push_str("...");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_template_says_is_one_visible_line() {
        let failure = |text: &str| Failure::new(Reason::Raised(text.to_owned()));
        let told = |text: &str| TemplateError::of(&failure(text)).to_string();
        assert_eq!(
            told("a\u{1b}[31m\nb\u{9b}"),
            "the chat template raises: a\\u{1b}[31m b\\u{9b}"
        );
        assert!(told(&"x".repeat(1 << 20)).len() < 3000);
    }
}
